"""Measures equivariance: do the features f of a checkpoint move with a transformation t in a way that can be predicted?

The objectives of these methods are about that, and no paper of the VTE line measures it. On held-out images x:

- Does f hold t? Ridge regression from f(x) and f(t(x)), or from f(t(x)) alone, to the numbers that describe t.
- Can f(t(x)) be worked out? It is predicted from f(x) and t, by a ridge regression and by the map that a method has
  learned, and must be found among the features of the same image under 60 transformations.
- How far does f move under t, relative to how far images lie apart?

    python equivariance.py pt.ckpt vte_ba.ckpt --json equivariance.json

An untrained encoder and raw pixels are measured beside the checkpoints. Intervals are of a bootstrap over test images.
"""

from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from common import UserError, build_encoder, choose_precision, load_images, load_model, number, run_command
from minter_warp import coefficients_from_corners, reference_errors, sample_corners, transformation_target, warp_batch
from minter_warp.views import sample_transformations, transform, transformation_labels, unchanged_transformations
from probe import (
    Representation,
    Table,
    architectures,
    encode,
    evaluation_parser,
    explain_features,
    load_checkpoints,
    random_encoder,
    row_label,
    run_evaluation,
    standardizer,
)

RIDGE_PENALTIES = [10.0**power for power in range(-3, 4)]  # times the kernel's mean diagonal
RIDGE_VALIDATION = 0.2  # of the training images, to choose the penalty on
BOOTSTRAP = 1000
COLOURS, JITTER = ("brightness", "contrast", "saturation", "hue"), torch.tensor([0.4, 0.4, 0.4, 0.1])


# ------------------------------------------------------------------------------------------------- transformations


def draw_projective(n, size, generator):
    """n of the transformations that predictive transformation, AVT and VTE learn from.

    Returns apply(images, index, rows, scale, shift, dtype), which makes images[index] under the transformations `rows`
    as `warp_batch` returns them, and the targets of a prediction, {name: (n, k) float32}: t, the 8 normalised
    coefficients; the rotation, one of 4; and of the quadrilateral that the image becomes, in sides of the image, the
    scale (square root of its area) and the translation (of the mean of its corners, across and down)."""
    quarter_turns, corners = sample_corners(n, size, generator)
    coefficients = coefficients_from_corners(corners, size).float()
    x, y = (corners / size).float().unbind(-1)  # (n, 4)
    area = 0.5 * (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1)
    targets = {"t": transformation_target(coefficients, size),
               "rotation": nn.functional.one_hot(quarter_turns, 4).float(),
               "scale": area.sqrt()[:, None],
               "translation": torch.stack([x.mean(1), y.mean(1)], 1) - 0.5}

    def apply(images, index, rows, scale, shift, dtype):
        return warp_batch(images, index, None, coefficients[rows].to(images.device), scale, shift, dtype)

    return apply, targets


def draw_crop_or_colour(n, size, generator, crop=True, colour=True):
    """The same of what STL learns from: a resized crop, colour jitter (on every image, in random order), or both. The
    targets are the crop's centre and its width and height, in sides of the image, and how far each adjustment of colour
    is of its range, -1 to 1."""
    drawn, targets = sample_transformations(n, size, generator), {}
    parameters = unchanged_transformations(n, size)
    if crop:
        parameters["box"] = drawn["box"]
        top, left, height, width = (drawn["box"] / size).unbind(1)
        targets["crop position"] = torch.stack([left + width / 2, top + height / 2], 1) - 0.5
        targets["crop size"] = torch.stack([width, height], 1)
    if colour:
        strength = 2 * torch.rand(n, 4, generator=generator) - 1
        parameters["factors"] += strength * JITTER
        parameters["order"] = drawn["order"]
        targets |= zip(COLOURS, strength.split(1, 1), strict=True)

    def apply(images, index, rows, scale, shift, dtype):
        chosen = {name: values[rows].to(images.device) for name, values in parameters.items()}
        return transform(images, index, chosen, (255 * scale, shift), dtype)

    return apply, targets


FAMILIES = {"projective": draw_projective, "crop": partial(draw_crop_or_colour, colour=False),
            "colour": partial(draw_crop_or_colour, crop=False), "crop+colour": draw_crop_or_colour}


class EvaluationSet:
    """The transformations that all rows of a table are measured on: N training pairs of an image and the same
    transformed, and n test images under T transformations each.

    Test images 2i and 2i + 1 share their T transformations: STL reads the code off the partner. The bootstrap resamples
    pairs.

    train_index (N,), test_index (n * T,): which image. train_targets {name: (N, k)}, test_targets {name: (n * T, k)}.
    held_out (N,): the pairs that the ridge penalty is chosen on. weights (1 + B, n): of each test image in the
    bootstrap; the first row, all 1, is no resample."""

    def __init__(self, family, train_images, test_images, pairs, per_image, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.family, self.n, self.per_image = family, test_images - test_images % 2, per_image
        self.train_index = torch.arange(pairs) % train_images
        self.held_out = self.train_index < max(1, round(RIDGE_VALIDATION * min(pairs, train_images)))
        self.train_apply, self.train_targets = FAMILIES[family](pairs, size, generator)
        apply, drawn = FAMILIES[family](self.n // 2 * per_image, size, generator)
        row = torch.arange(self.n * per_image)
        self.test_index = row // per_image
        shared = self.test_index // 2 * per_image + row % per_image
        self.test_targets = {name: values[shared] for name, values in drawn.items()}
        self.test_apply = lambda images, index, rows, *rest: apply(images, index, shared[rows], *rest)

        drawn = torch.randint(0, self.n // 2, (BOOTSTRAP, self.n // 2), generator=generator)  # two images each
        counts = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
        self.weights = torch.cat([torch.ones(1, self.n).double(), counts.repeat_interleave(2, 1)])  # (1 + B, n)

    def joined_targets(self):
        """(N, k) and (n * T, k): all targets beside each other."""
        return [torch.cat(list(targets.values()), 1) for targets in (self.train_targets, self.test_targets)]

    def per_image_sum(self, values):
        """(n * T,) -> (n,) float64"""
        return values.double().cpu().view(self.n, self.per_image).sum(1)

    def with_interval(self, statistic):
        """A statistic of image weights (1 + B, n) -> (1 + B,): its value for all images, and its 95 % interval when the
        images are drawn again with replacement."""
        values = statistic(self.weights)
        low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
        return {"value": values[0].item(), "low": low, "high": high}

    def mean(self, values, per=1):
        """`with_interval` of the mean of values (n,), each a sum of so many."""
        return self.with_interval(lambda w: w @ values / (w.sum(1) * per))


# -------------------------------------------------------------------------------------------------------- measures


def ridge(kernel, targets, held_out, together=False):
    """Kernel ridge regression: kernel (N, N) and targets (N, k) float64 -> dual coefficients (N, k). The penalty is the
    one of RIDGE_PENALTIES with the least squared error on the held-out pairs, chosen for each column or for all
    together; then all pairs are fitted."""
    unit = kernel.diagonal().mean().clamp(min=1e-12)

    def solve(kernel, targets, penalty):
        kernel = kernel.clone()
        kernel.diagonal().add_(penalty * unit)
        return torch.cholesky_solve(targets, torch.linalg.cholesky(kernel))

    fit, across = kernel[~held_out][:, ~held_out], kernel[held_out][:, ~held_out]
    errors = torch.stack([(across @ solve(fit, targets[~held_out], penalty) - targets[held_out]).square().sum(0)
                          for penalty in RIDGE_PENALTIES])  # (penalties, k)
    best = (errors.sum(1, keepdim=True).expand_as(errors) if together else errors).argmin(0)
    coefficients = torch.empty_like(targets)
    for which in best.unique().tolist():
        chosen = best == which
        coefficients[:, chosen] = solve(kernel, targets, RIDGE_PENALTIES[which])[:, chosen]
    return coefficients


def regress(held_out, train, test, targets, device, together=False):
    """Ridge regression from blocks of inputs and, if there are two, all products of the one with the other. train,
    test: lists of (N, D) and (M, D); targets (N, k). Returns predictions (M, k) float32 on the CPU.

    The kernel of [a, b, a x b] is the product of two linear kernels, (1 + a.a' / D) (1 + b.b' / D'), so the inputs
    themselves, N x (D + 1) (D' + 1), are never made."""
    scales = [standardizer(block) for block in train]
    train, test = ([scaled(block).to(device) for scaled, block in zip(scales, blocks, strict=True)]
                   for blocks in (train, test))

    def kernel(rows, columns):
        products = 1
        for a, b in zip(rows, columns, strict=True):
            products = products * (1 + a @ b.T / a.shape[1])
        return products

    exact = [block.double() for block in train]
    targets = targets.double().to(device)
    mean = targets.mean(0)
    dual = ridge(kernel(exact, exact), targets - mean, held_out.to(device), together).float()
    parts = zip(*(block.split(1000) for block in test), strict=True)
    return torch.cat([(kernel(part, train) @ dual + mean.float()).cpu() for part in parts])


def predict_targets(data, train, test, device):
    """How well `regress` tells the transformations of an `EvaluationSet` from blocks of features, train and test.

    Returns {(name, measure): interval}: accuracy of the rotation, the largest of its four outputs; of all else the
    squared error, summed over its numbers, and R2 = 1 - squared error / that of the training mean."""
    known, truth = (targets.double() for targets in data.joined_targets())
    predicted = regress(data.held_out, train, test, known, device).double()
    widths, measured = [values.shape[1] for values in data.train_targets.values()], {}
    columns = (values.split(widths, -1) for values in (predicted, truth, known.mean(0)))
    for name, guess, answer, mean in zip(data.train_targets, *columns, strict=True):
        if name == "rotation":
            right = data.per_image_sum(guess.argmax(1) == answer.argmax(1)) / data.per_image
            measured[name, "accuracy"] = data.mean(right)
            continue
        error = data.per_image_sum((guess - answer).square().sum(1))
        total = data.per_image_sum((answer - mean).square().sum(1))
        measured[name, "squared error"] = data.mean(error, per=data.per_image)
        measured[name, "R2"] = data.with_interval(lambda w, error=error, total=total: 1 - w @ error / (w @ total))
    return measured


def ridge_map(data, x, tx, test_x, device):
    """An equivariant map for methods that have none: predicts f(t(x)) from f(x) and t. x, tx (N, D): the features of
    the training pairs; test_x (n, D). Returns (n, T, D).

    It is linear in the feature, and its matrix and its offset are affine in the targets: a ridge regression from f, t
    and all products of the two. f and t alone would not do: such a map adds the same offset to every image, while an
    equivariant representation acts on the feature by a matrix that depends on t."""
    targets, test_targets = data.joined_targets()
    predicted = regress(data.held_out, [x, targets], [test_x[data.test_index], test_targets], tx, device, together=True)
    return predicted.unflatten(0, (data.n, data.per_image))


def rank_distribution(predicted, candidates, tie=1e-9):
    """How likely each rank is for the true candidate of each query. predicted, candidates (n, T, D): query j of an
    image is compared by cosine with the T candidates of that image, of which the j-th is the true one. Candidates as
    near as the true one are ordered at random, so that a representation that does not change with t scores as chance
    does. Returns (n, T, T) float64, probabilities of the ranks 1 to T for each query."""
    ranks, outcome = torch.arange(1, predicted.shape[1] + 1), []
    for guess, truth in zip(predicted.split(20), candidates.split(20), strict=True):
        guess, truth = (nn.functional.normalize(values.double(), dim=2) for values in (guess, truth))
        cosine = guess @ truth.mT  # (20, queries, candidates)
        ahead = cosine - cosine.diagonal(dim1=1, dim2=2)[..., None]
        nearer, tied = (ahead > tie).sum(2, keepdim=True), (ahead.abs() <= tie).sum(2, keepdim=True)  # itself as well
        outcome.append(((ranks > nearer) & (ranks <= nearer + tied)).double() / tied)
    return torch.cat(outcome)


def retrieval(data, predicted, candidates):
    """{measure: interval} of MRR, H@1 and H@5, and the share of each rank, a list of T."""
    by_image = rank_distribution(predicted, candidates).mean(1)  # (n, T)
    ranks = torch.arange(1, data.per_image + 1)
    scores = {"MRR": by_image @ (1 / ranks.double()), "H@1": by_image[:, 0], "H@5": by_image[:, :5].sum(1)}
    measured = {name: data.mean(score) for name, score in scores.items()}
    return measured, [round(share, 6) for share in by_image.mean(0).tolist()]


def movement(data, x, tx):
    """How far features move under t, relative to how far images lie apart: mean |f(t(x)) - f(x)|^2 over the mean
    |f(x) - f(x')|^2 of two images. x (n, D), tx (n * T, D) of the test images. 0: invariant; 1: as far as to another
    image."""
    x, tx = x.double(), tx.double()
    moved = data.per_image_sum((tx - x[data.test_index]).square().sum(1)) / data.per_image
    x = x - x.mean(0)

    def ratio(w):
        w = w / w.sum(1, keepdim=True)
        variance = w @ x.square().sum(1) - (w @ x).square().sum(1)
        return w @ moved / (2 * variance * len(x) / (len(x) - 1)).clamp(min=1e-12)

    return data.with_interval(ratio)


# ------------------------------------------------------------------------------------- maps that a method has learned
#
# A function of (checkpoint, path) that returns the encoder whose features of t(x) the map predicts, None for the
# checkpoint's own, and predict(data, x, tx): test features (n, D) and (n * T, D) -> (name, predicted, candidates) of
# each map, (n, T, D) both.


def barber_agakov_map(checkpoint, path):
    """VTE-BA's decoder: from z_hat of x to phase one's code of t(x). It sees t only if steerable; if not, its
    prediction is the same for all t and must score chance."""
    from vte_ba import VTEBarberAgakov

    config = checkpoint["config"]
    encoder, phase_one = (build_encoder(config["encoder"], config["image_size"]) for _ in range(2))
    model = load_model(VTEBarberAgakov(encoder, phase_one, config["encoder"] == "alexnet",
                                       steerable=config.get("steerable", False)), checkpoint, path)

    def predict(data, x, z):
        if "t" not in data.test_targets:  # it knows projective transformations only
            return
        z_hat = x.repeat_interleave(data.per_image, 0)
        inputs = torch.cat([z_hat, data.test_targets["t"]], 1) if model.steerable else z_hat
        predicted, candidates = (rows.unflatten(0, (data.n, -1)) for rows in (model.decoder(inputs), z))
        yield "decoder of z and t" if model.steerable else "decoder, which never sees t", predicted, candidates

    return model.phase_one, predict


def labels_from_targets(targets, groups):
    """The `transformation_labels` of what `draw_crop_or_colour` drew, from its targets."""
    n = len(next(iter(targets.values())))
    parameters = unchanged_transformations(n, 1)  # in sides of the image
    if "crop size" in targets:
        size = targets["crop size"]
        parameters["box"] = torch.cat([targets["crop position"] + 0.5 - size / 2, size], 1)[:, [1, 0, 3, 2]]
    if "hue" in targets:
        parameters["factors"] += torch.cat([targets[name] for name in COLOURS], 1) * JITTER
    return transformation_labels(parameters, 1, groups)


def hypernetwork_map(checkpoint, path):
    """STL's: W(y_t(x')) f(x), with the code y_t from another image x' under the same t (eq. 5 and 7); also after the
    projector, where its loss compares. --code labels: the code comes from the parameters of t."""
    import stl

    model, _ = stl.load_stl(path)

    def predict(data, x, tx):
        if model.hypernetwork is None or (model.code == "labels" and "t" in data.test_targets):  # which has no labels
            return
        candidates = tx.unflatten(0, (data.n, -1))  # (n, T, D)
        if model.code == "labels":
            groups = stl.LEARN[checkpoint["config"]["learn"]]
            labels = labels_from_targets(data.test_targets, groups)
            unchanged = transformation_labels(unchanged_transformations(len(labels), 1), 1, groups)
            codes = model.encode_transformation(unchanged, labels).unflatten(0, (data.n, -1))
        else:
            codes = stl.partner(model.encode_transformation(x[data.test_index], tx).unflatten(0, (data.n, -1)))
        # W(y_t) y for all T codes of an image: the product with y comes first and is shared by them.
        predicted = torch.cat([torch.einsum("nok,ntk->nto", torch.einsum("oik,ni->nok", model.hypernetwork.weight, few),
                                            of) for few, of in zip(x.split(50), codes.split(50), strict=True)])
        yield "hypernetwork", predicted, candidates
        projected = (model.equi_projector(values.flatten(0, 1)).unflatten(0, (data.n, -1))
                     for values in (predicted, candidates))
        yield "hypernetwork, projected", *projected

    return None, predict


LEARNED_MAPS = {"vte_ba": barber_agakov_map, "stl": hypernetwork_map}  # by how the method's name begins


# ------------------------------------------------------------------------------------------------- the measurement


@torch.no_grad()
def measure(data, original, transformed, learned, device):
    """All measures of one row, dicts with measure, value, low and high. original, transformed: representations of x,
    (M, D) and (n, D), and of t(x), (N, D) and (n * T, D). learned: pairs of a learned map's `predict` and the test
    features (n * T, D) that it is to predict."""
    x, test_x = original.draw("train")[data.train_index], original.draw("test")
    tx, test_tx = transformed.draw("train"), transformed.draw("test")
    both, rows = ([x, tx], [test_x[data.test_index], test_tx]), []
    sources = {"x and t(x)": both, "x and t(x), no products": [[torch.cat(blocks, 1)] for blocks in both],
               "t(x)": ([tx], [test_tx])}
    for source, blocks in sources.items():
        rows += [{"measure": name, "target": target, "from": source, **interval} for (target, name), interval
                 in predict_targets(data, *blocks, device).items()]
    maps = [("ridge", ridge_map(data, x, tx, test_x, device), test_tx.unflatten(0, (data.n, -1)))]
    for predict, wanted in learned:
        maps += predict(data, test_x, wanted)
    for name, predicted, candidates in maps:
        measured, shares = retrieval(data, predicted, candidates)
        rows += [{"measure": score, "map": name, **interval} for score, interval in measured.items()]
        rows[-len(measured)]["ranks"] = shares
    return [*rows, {"measure": "moved", **movement(data, test_x, test_tx)}]


def probe_equivariance(args, device):
    """Returns rows, dicts that --json writes, tables, and the notes to print under them."""
    checkpoints, dataset = load_checkpoints(args.checkpoints, args.dataset)
    dtype = choose_precision(args.precision, device)
    size, generator = checkpoints[0][2]["config"]["image_size"], torch.Generator().manual_seed(args.seed)

    def some_images(split, most):
        images = load_images(dataset, split, args.data_dir, size).images
        images = images[torch.randperm(len(images), generator=generator)[:most]]
        if len(images) < 10:
            raise UserError(f"'{dataset}' has {len(images)} {split} images: measuring equivariance takes 10 or more")
        return images

    images, test_images = some_images("train", args.pairs), some_images("test", args.images)
    test_images = test_images[: len(test_images) - len(test_images) % 2]

    def measured(data, name, method, encoder, config, target_encoder=None, predict=None):
        torch.manual_seed(args.seed)  # a row does not depend on the rows above it

        def features(encoder, split, **which):
            return encode(encoder, split, config["mean"], config["std"], device, dtype, **which)

        pairs_of, views_of = ({"index": index, "apply": apply} for index, apply in (
            (data.train_index, data.train_apply), (data.test_index, data.test_apply)))
        x = features(encoder, images), features(encoder, test_images)
        tx = features(encoder, images, **pairs_of), features(encoder, test_images, **views_of)
        wanted = features(target_encoder, test_images, **views_of) if target_encoder else tx[1]
        for kind in [None] if x[0][1] is None else ["sample", "mu"]:
            original, transformed = (Representation(name, method, kind, *splits) for splits in (x, tx))
            learned = [(predict, Representation(name, method, kind, wanted, wanted).draw("test"))] if predict else []
            row = {"checkpoint": name, "method": method, "features": kind, "transformations": data.family,
                   "dataset": dataset, "test_images": data.n, "per_image": args.per_image, "pairs": args.pairs,
                   "seed": args.seed}
            yield from ({**row, **found} for found in measure(data, original, transformed, learned, device))

    rows = []
    for family in dict.fromkeys(args.transformations or ("projective", "crop", "colour")):
        members = [one for one in checkpoints if args.transformations or family == "projective"
                   or one[2]["method"].startswith("stl")]
        if not members:
            continue
        data = EvaluationSet(family, len(images), len(test_images), args.pairs, args.per_image, size, args.seed)
        chosen = members if args.rows != "baselines" else []
        for name, path, checkpoint, encoder in tqdm(chosen, desc=family, leave=False, disable=None):
            method = checkpoint["method"]
            load = next((load for begin, load in LEARNED_MAPS.items() if method.startswith(begin)), None)
            exported = checkpoint["model"] is checkpoint["encoder"]  # without the map
            learned = load(checkpoint, path) if load and not exported else ()
            rows += measured(data, name, method, encoder, checkpoint["config"], *learned)
        if args.rows == "checkpoints":
            continue
        for kind, config in architectures(members).items():
            encoder = random_encoder(images, config, args.seed, device, dtype)
            rows += measured(data, None, f"random encoder ({kind})", encoder, config)
        pixels = nn.Sequential(nn.AdaptiveAvgPool2d(min(size, 32)), nn.Flatten())
        rows += measured(data, None, "raw pixels", pixels, checkpoints[0][2]["config"])
    notes = [
        f"{dataset}: {len(test_images):,} test images, {args.per_image} transformations each, two images share theirs; "
        f"ridge regressions fitted on {args.pairs:,} pairs of {len(images):,} training images, the penalty chosen on "
        f"{RIDGE_VALIDATION:.0%} of these; no crops or flips; seed {args.seed}",
        *explain_features(rows),
        "prediction: from the features of x and t(x) and their products, without which the two cannot be compared "
        "(--json has it without them too), or of t(x) alone; R² of 1 is perfect, of 0 the training mean",
        "MRR, H@1, H@5: f(t(x)) predicted from f(x) and t, ranked by cosine among those of all transformations of the "
        "same image; by a ridge regression on f(x), t and their products, or (its ...) by the method's own map",
        "moved: mean |f(t(x)) - f(x)|² over mean |f(x) - f(x')|²; 0 is invariant",
        f"last lines: half the widest 95 % interval of the column, of {BOOTSTRAP:,} bootstrap samples of the test "
        "images; it says nothing of training seeds",
    ]
    return rows, make_tables(rows, reference_errors()), notes


# --------------------------------------------------------------------------------------------------- what is shown


ALONE = ", t(x) alone"


def column(row):
    """The heading under which a row's value stands; None for what only --json tells."""
    if row.get("from") == "x and t(x), no products":
        return None
    alone = ALONE if row.get("from") == "t(x)" else ""
    if row["measure"] == "squared error":
        return "t error" if row["target"] == "t" and not alone else None
    if row["measure"] in ("accuracy", "R2"):
        return f"{row['target']}{' R²' if row['measure'] == 'R2' else ''}{alone}"
    return row["measure"]


def make_tables(rows, errors):
    """For each family of transformations three of `probe.Table`: what is predicted from x and t(x), what from t(x)
    alone, and retrieval and movement. errors: what `reference_errors` returns."""
    per_image = rows[0]["per_image"]
    nothing = {"t error": errors["constant_predictor"], "rotation": 0.25, "H@1": 1 / per_image, "H@5": 5 / per_image,
               "MRR": sum(1 / rank for rank in range(1, per_image + 1)) / per_image}
    rotation = {"t error": errors["rotation_only"], "rotation": 1.0,
                "t R²": 1 - errors["rotation_only"] / errors["constant_predictor"]}
    questions = {"x and t(x)": "predicted from x and t(x)", "t(x)": "predicted from t(x) alone",
                 None: "retrieval and movement"}
    tables = []
    for family in dict.fromkeys(row["transformations"] for row in rows):
        for source, question in questions.items():
            found = [(column(row).removesuffix(ALONE), row) for row in rows
                     if (row["transformations"], row.get("from")) == (family, source) and column(row)]
            widest, cells = {}, {}
            for heading, row in found:
                widest[heading] = max(widest.get(heading, 0.0), (row["high"] - row["low"]) / 2)
                cells.setdefault(row_label(row), {})[heading] = row["value"]
            no_r2 = {heading: 0.0 for heading in widest if heading.endswith("R²")}
            cells["knowing nothing", ""] = {**no_r2, **nothing}
            if "t" in (heading.partition(" ")[0] for heading in widest):
                cells["knowing the rotation", ""] = rotation
            cells["95 % interval, at most ±", ""] = widest
            lines = [[*label, *(f"{round(of[heading], 3) + 0.0:.3f}" if heading in of else ""  # never -0.000
                                for heading in widest)] for label, of in cells.items()]
            tables.append(Table(f"{family.capitalize()} transformations, {question}", ["", "features", *widest], lines))
    return tables


def parse_args():
    parser = evaluation_parser("Measure the equivariance of checkpoints, beside a random encoder and raw pixels.",
                               "python equivariance.py pt.ckpt vte_ba.ckpt --json equivariance.json")
    add = parser.add_argument_group("equivariance").add_argument
    add("--transformations", nargs="+", choices=list(FAMILIES),
        help="to measure all checkpoints under (default: projective, and for STL crop and colour too)")
    add("--images", type=number(int, 10), default=300, metavar="N", help="test images")
    add("--per-image", type=number(int, 10), default=60, metavar="N",
        help="transformations of each test image, the candidates in retrieval")
    add("--pairs", type=number(int, 10), default=4000, metavar="N", help="training pairs for the ridge regressions")
    return parser.parse_args()


def main():
    run_evaluation(parse_args(), probe_equivariance, brief=True)


if __name__ == "__main__":
    run_command(main)
