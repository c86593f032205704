"""Measures equivariance: do the features f of an encoder move with a transformation t in a way that can be predicted?

The objectives of these methods are about that, and no paper of the VTE line measures it. On held-out images x:

- What share of the variance of f(t(x)) is invariant, equivariant, unexplained? `variance_shares` has the definitions.
- Does f hold t? Ridge regression from f(x) and f(t(x)), f(t(x)) alone, or STL's code, to the numbers that describe t.
- Can f(t(x)) be worked out? It is predicted from f(x) and t, by a ridge regression and by the map that a method has
  learned, and must be found among the features of the same image under 60 transformations; by t alone, how often?
- How far does f move under t, relative to how far images lie apart?

    python equivariance.py pt.ckpt vte_ba.ckpt --json equivariance.json

Encoders of torchvision, of timm and of your own file are measured by name (--help). Beside them stand an untrained
encoder, raw pixels, and two controls of known answers. Intervals are of a bootstrap over test images.
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
    Settings,
    Table,
    architectures,
    encode,
    evaluation_parser,
    explain_features,
    knn_predictions,
    load_checkpoints,
    random_encoder,
    row_label,
    run_evaluation,
    standardizer,
)

RIDGE_PENALTIES = [10.0**power for power in range(-3, 4)]  # times the kernel's mean diagonal
RIDGE_VALIDATION = 0.2  # of the training images, to choose the penalty on
BOOTSTRAP = 1000
COMPOSITION = ("two in turn", "ρ(g)ρ(h) - ρ(gh)", "ρ(g)⁴ - 1")
COLOURS, JITTER = ("brightness", "contrast", "saturation", "hue"), torch.tensor([0.4, 0.4, 0.4, 0.1])
SINGLE = ("crop", *COLOURS)  # the kinds of transformation, one at a time


# ------------------------------------------------------------------------------------------------- transformations


def draw_projective(n, size, generator, border="grey", family="projective"):
    """n of the transformations that predictive transformation, AVT and VTE learn from, or (see `sample_corners`) of a
    family that is a part of theirs.

    border: what is seen outside of the image; grey, reflect, or inside: nothing, since t is followed by a zoom into the
    middle, the same for all t of a family.

    Returns apply(images, index, rows, scale, shift, dtype), which makes images[index] under the transformations `rows`
    as `warp_batch` returns them, and the targets of a prediction, {name: (n, k) float32}: t, the 8 normalised
    coefficients (of projective only); the rotation, one of 4; and of the quadrilateral that the image becomes, in sides
    of the image, the scale (square root of its area) and the translation (of the mean of its corners, across and
    down). No parameters, which `draw_crop_or_colour` has."""
    quarter_turns, corners = sample_corners(n, size, generator, family)
    coefficients = coefficients_from_corners(corners, size)
    x, y = (corners / size).float().unbind(-1)  # (n, 4)
    area = 0.5 * (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1)
    targets = {"t": transformation_target(coefficients.float(), size),
               "rotation": nn.functional.one_hot(quarter_turns, 4).float(),
               "scale": area.sqrt()[:, None],
               "translation": torch.stack([x.mean(1), y.mean(1)], 1) - 0.5}
    if border == "inside":
        coefficients = zoom(coefficients, size, INSIDE[family])
    coefficients = coefficients.float()

    def apply(images, index, rows, scale, shift, dtype):
        chosen = coefficients[rows].to(images.device)
        if border != "reflect":
            return warp_batch(images, index, None, chosen, scale, shift, dtype)
        return (reflected_warp(images[index], chosen) * scale[:, None, None] + shift[:, None, None]).to(dtype)

    return apply, targets if family == "projective" else {family: targets[family]}, {}


def zoom(coefficients, size, side):
    """The coefficients (n, 8) followed by an enlargement of the output's middle, `side` of each of its sides."""
    enlarge = torch.tensor([[side, 0, (1 - side) * size / 2], [0, side, (1 - side) * size / 2], [0, 0, 1]]).double()
    matrices = nn.functional.pad(coefficients, (0, 1), value=1).view(-1, 3, 3) @ enlarge
    return (matrices / matrices[:, 2:, 2:]).flatten(1)[:, :8]


def reflected_warp(images, coefficients):
    """`projective_warp` of images whose plane goes on beyond the edges as in mirrors. (N, C, S, S), (N, 8) -> float32
    (N, C, S, S)."""
    size, rows = images.shape[3], nn.functional.pad(coefficients.double(), (0, 1), value=1).view(-1, 3, 3)
    centres = torch.arange(size, device=images.device) + 0.5
    points = torch.cartesian_prod(centres, centres).flip(1)  # (x, y), row after row
    u, v, w = (rows @ nn.functional.pad(points.double(), (0, 1), value=1).T).unbind(1)  # (N, S * S)
    grid = (2 * torch.stack([u / w, v / w], 2) / size - 1).float().unflatten(1, (size, size))
    return nn.functional.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def draw_crop_or_colour(n, size, generator, border=None, crop=True, colour=True, single=False):
    """The same of what STL learns from: a resized crop, colour jitter (on every image, in random order), both, or
    (single) one of SINGLE alone; they show nothing outside whatever the border. The targets are the crop's centre and
    its width and height, in sides of the image, how far each adjustment of colour is of its range, -1 to 1, and of
    single ones the kind. Also returns the parameters, which `views.transform` takes."""
    drawn, targets = sample_transformations(n, size, generator), {}
    parameters = unchanged_transformations(n, size)
    kept = torch.ones(n, len(SINGLE))
    if single:
        kinds = torch.randint(len(SINGLE), (n,), generator=generator)
        targets["kind"] = kept = nn.functional.one_hot(kinds, len(SINGLE)).float()
    if crop:
        parameters["box"] = torch.where(kept[:, :1] > 0, drawn["box"], parameters["box"])
        top, left, height, width = (parameters["box"] / size).unbind(1)
        targets["crop position"] = torch.stack([left + width / 2, top + height / 2], 1) - 0.5
        targets["crop size"] = torch.stack([width, height], 1)
    if colour:
        strength = kept[:, 1:] * (2 * torch.rand(n, 4, generator=generator) - 1)
        parameters["factors"] += strength * JITTER
        parameters["order"] = drawn["order"]
        targets |= zip(COLOURS, strength.split(1, 1), strict=True)

    def apply(images, index, rows, scale, shift, dtype):
        chosen = {name: values[rows].to(images.device) for name, values in parameters.items()}
        return transform(images, index, chosen, (255 * scale, shift), dtype)

    return apply, targets, parameters


INSIDE = {"rotation": 1, "scale": 0.8, "translation": 0.75, "projective": 0.55}  # the square that is always filled
FAMILIES = {**{family: partial(draw_projective, family=family) for family in INSIDE},
            "crop": partial(draw_crop_or_colour, colour=False), "colour": partial(draw_crop_or_colour, crop=False),
            "crop+colour": draw_crop_or_colour, "single": partial(draw_crop_or_colour, single=True)}
GROUPS = {"crop": ("crop position", "crop size"), "colour": COLOURS,  # of STL's Table 5
          "all": ("crop position", "crop size", *COLOURS)}


class EvaluationSet:
    """The transformations that all rows of a table are measured on: N training pairs of an image and the same
    transformed, and n test images under T transformations each.

    Test images 2i and 2i + 1 share their T transformations: STL reads the code off the partner. The bootstrap resamples
    pairs. Of rotation each image gets all four (every).

    train_index (N,), test_index (n * T,): which image. train_targets {name: (N, k)}, test_targets {name: (n * T, k)};
    test_parameters {name: (n * T, ...)} of crops and colours, as `views.transform` takes them.
    held_out (N,): the pairs that the ridge penalty is chosen on. weights (1 + B, n): of each test image in the
    bootstrap; the first row, all 1, is no resample."""

    def __init__(self, family, train_images, test_images, pairs, per_image, size, seed, border="grey"):
        generator = torch.Generator().manual_seed(seed)
        self.every = family == "rotation"
        per_image = 4 if self.every else per_image
        self.family, self.border, self.n, self.per_image = family, border, test_images - test_images % 2, per_image
        self.train_index = torch.arange(pairs) % train_images
        self.held_out = self.train_index < max(1, round(RIDGE_VALIDATION * min(pairs, train_images)))
        self.train_apply, self.train_targets, _ = FAMILIES[family](pairs, size, generator, border)
        apply, drawn, parameters = FAMILIES[family](self.n // 2 * per_image, size, generator, border)
        row = torch.arange(self.n * per_image)
        self.test_index = row // per_image
        shared = self.test_index // 2 * per_image + row % per_image
        self.test_targets = {name: values[shared] for name, values in drawn.items()}
        self.test_parameters = {name: values[shared] for name, values in parameters.items()}
        self.test_apply = lambda images, index, rows, *rest: apply(images, index, shared[rows], *rest)

        def apply_twice(images, index, rows, scale, shift, dtype):
            once = self.test_apply(images, index, rows, torch.ones_like(scale), torch.zeros_like(shift), torch.float32)
            after = rows - rows % per_image + (rows + 1) % per_image
            return self.test_apply(once, torch.arange(len(once), device=once.device), after, scale, shift, dtype)

        self.apply_twice = apply_twice  # t2(t1(x)), t2 being the next of the image's transformations, in a circle
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


def ridge(inputs, targets, held_out, together=False, dual=False):
    """Ridge regression: inputs (N, d) and targets (N, k) float64 -> weights (d, k); dual: kernel (N, N) -> dual
    coefficients (N, k). The penalty is the one of RIDGE_PENALTIES with the least squared error on the held-out pairs,
    chosen for each column or for all together; then all pairs are fitted."""
    unit = inputs.diagonal().mean() if dual else inputs.square().sum(1).mean()

    def system(inputs, targets):
        return (inputs, targets) if dual else (inputs.T @ inputs, inputs.T @ targets)

    def solve(matrix, targets, penalty):
        matrix = matrix.clone()
        matrix.diagonal().add_(penalty * unit)
        return torch.cholesky_solve(targets, torch.linalg.cholesky(matrix))

    fit = inputs[~held_out][:, ~held_out] if dual else inputs[~held_out]
    across = inputs[held_out][:, ~held_out] if dual else inputs[held_out]
    fitted = system(fit, targets[~held_out])
    errors = torch.stack([(across @ solve(*fitted, penalty) - targets[held_out]).square().sum(0)
                          for penalty in RIDGE_PENALTIES])  # (penalties, k)
    best = (errors.sum(1, keepdim=True).expand_as(errors) if together else errors).argmin(0)
    matrix, right = system(inputs, targets)
    weights = torch.empty_like(right)
    for which in best.unique().tolist():
        chosen = best == which
        weights[:, chosen] = solve(matrix, right[:, chosen], RIDGE_PENALTIES[which])
    return weights


def regress(held_out, train, targets, device, together=False):
    """Ridge regression from blocks of inputs and, if there are two, all products of the one with the other. train: a
    list of (N, D); targets (N, k). Returns a function: a list of (M, D) -> predictions (M, k) float32 on the CPU. Of
    two blocks the first may have M / r rows, each of which stands for r in a row.

    The kernel of [a, b, a x b] is the product of two linear kernels, (1 + a.a' / D) (1 + b.b' / D'), so the inputs
    themselves, N x (D + 1) (D' + 1), are never made. One block of no more than N numbers, [1, a / D^0.5], takes no
    kernel."""
    scales = [standardizer(block) for block in train]

    def inputs(blocks, dtype=torch.float32):
        return [nn.functional.pad(scaled(block).to(device, dtype) / block.shape[1]**0.5, (1, 0), value=1)
                for scaled, block in zip(scales, blocks, strict=True)]

    def kernel(rows, columns):
        product, *others = (a @ b.T for a, b in zip(rows, columns, strict=True))
        for other in others:
            product = product.repeat_interleave(len(other) // len(product), 0).mul_(other)
        return product

    train, dual = inputs(train, torch.float64), len(train) == 2 or train[0].shape[1] > len(train[0])
    targets = targets.double().to(device)
    mean = targets.mean(0)
    weights = ridge(kernel(train, train) if dual else train[0], targets - mean, held_out.to(device), together, dual)
    weights, mean, train = weights.float(), mean.float(), [block.float() for block in train]

    def predict(blocks):
        at_once = max(1, 1000 * len(blocks[0]) // len(blocks[-1]))
        parts = zip(*(block.split(at_once * len(block) // len(blocks[0])) for block in blocks), strict=True)
        return torch.cat([((kernel(rows, train) if dual else rows[0]) @ weights + mean).cpu()
                          for rows in map(inputs, parts)])

    return predict


def predict_targets(data, train, test, device):
    """How well `regress` tells the transformations of an `EvaluationSet` from blocks of features, train and test.

    Returns {(name, measure): interval}: accuracy of the rotation and of the kind, the largest of its outputs; of all
    else the squared error, summed over its numbers, and R2 = 1 - squared error / that of the training mean; and of
    GROUPS the MSE, the squared error's mean over its numbers."""
    known, truth = (targets.double() for targets in data.joined_targets())
    predicted = regress(data.held_out, train, known, device)(test).double()
    widths, measured, errors = {name: values.shape[1] for name, values in data.train_targets.items()}, {}, {}
    columns = (values.split(list(widths.values()), -1) for values in (predicted, truth, known.mean(0)))
    for name, guess, answer, mean in zip(widths, *columns, strict=True):
        if name in ("rotation", "kind"):
            right = data.per_image_sum(guess.argmax(1) == answer.argmax(1)) / data.per_image
            measured[name, "accuracy"] = data.mean(right)
            continue
        errors[name] = error = data.per_image_sum((guess - answer).square().sum(1))
        total = data.per_image_sum((answer - mean).square().sum(1))
        measured[name, "squared error"] = data.mean(error, per=data.per_image)
        measured[name, "R2"] = data.with_interval(lambda w, error=error, total=total: 1 - w @ error / (w @ total))
    for group, names in GROUPS.items():
        if errors.keys() >= set(names):
            numbers = data.per_image * sum(widths[name] for name in names)
            measured[group, "MSE"] = data.mean(sum(errors[name] for name in names), per=numbers)
    return measured


def ridge_map(data, x, tx, device):
    """An equivariant map for methods that have none: predicts f(t(x)) from f(x) and t. x, tx (N, D): the features of
    the training pairs. Returns a function: features (M / r, D), see `regress`, and targets (M, k) -> (M, D).

    It is linear in the feature, and its matrix and its offset are affine in the targets: a ridge regression from f, t
    and all products of the two. f and t alone would not do: such a map adds the same offset to every image, while an
    equivariant representation acts on the feature by a matrix that depends on t."""
    predict = regress(data.held_out, [x, data.joined_targets()[0]], tx, device, together=True)
    return lambda features, targets: predict([features, targets])


def variance_shares(data, features, by_map, by_t, noise):
    """Splits the variance of y = f(t(x)) over images x and transformations t into three shares, which sum to one.

    features, by_map, by_t (n, T, D): y of the test images; g, its prediction from f(x) and t by `ridge_map`; h, its
    prediction from t alone. g and h are fitted on other images and other transformations. noise (n,) float64: the mean
    over t of the sum of sigma^2 where z is sampled, else 0. |.|^2 is summed over the D numbers, which are not rescaled.
    With Var_t(.) = E_t |. - E_t .|^2, taken within one image:

        V = E |y - E y|^2 = B + W
        invariant    = B / V                               B = E_x |E_t y - E y|^2: what stays when t changes
        equivariant  = (W - U) / V                         U = E_x Var_t(y - g): of what changes, what g predicts
          the same for all images  = (W - A) / V           A = E_x Var_t(y - h): of that, what t alone predicts
          image by image           = (A - U) / V           of that, what takes f(x)
        unexplained  = U / V                               W = E_x Var_t(y)
          noise of sigma           = E_x E_t |sigma|^2 / V

    A prediction's mean over t cannot count: Var_t removes it, so that g is judged on the deviation from the image's
    mean alone. g is linear in f(x) and affine in the targets, and fitted on few pairs: what it misses is unexplained,
    so the equivariant share is a lower bound. A map that predicts worse than the image's mean has a share below 0.

    Estimates of B, W, U and A have no bias from finite n and T. Var_t divides by T - 1. B is half the mean of |m_i -
    m_j|^2, of two images' means over t, less W / T, by which T draws move a mean. The two images have no transformation
    in common, nor are they the same one twice in the bootstrap. Where the T are all that there are (data.every), Var_t
    divides by T, and only the noise, which is known, moves a mean.

    Returns {part: interval}; all are 0 where nothing varies. Source: one-way random-effects analysis of variance."""

    def within(values):  # (n, T, D) -> (n,) float64
        spread = torch.cat([part.double().var(1, correction=int(not data.every)).sum(1) for part in values.split(20)])
        return spread + noise / data.per_image if data.every else spread

    w, a, u = within(features), within(features - by_t), within(features - by_map)
    moved = (noise if data.every else w) / data.per_image
    means = features.mean(1, dtype=torch.float64)
    least = 1e-12 * (means.square().sum(1) + w).mean() + 1e-300  # rounding of a constant
    means = means - means.mean(0)
    sharing = (means[::2] - means[1::2]).square().sum(1).repeat_interleave(2) / 2

    def share_of(part):
        def statistic(weights):
            q = weights / weights.sum(1, keepdim=True)
            # Sums over pairs of images, each pair weighted by the product, less pairs that share transformations.
            pairs = q @ means.square().sum(1) - (q @ means).square().sum(1) - q.square() @ sharing
            between = pairs / (1 - 2 * q.square().sum(1)).clamp(min=1e-9) - q @ moved  # one pair of images alone: 0
            total = between + q @ w
            return torch.where(total > least, (between if part is None else q @ part) / total.clamp(min=least), 0.0)

        return data.with_interval(statistic)

    parts = {"invariant": None, "equivariant": w - u, "the same for all images": w - a, "image by image": a - u,
             "unexplained": u}
    return {name: share_of(part) for name, part in (parts | ({"noise of sigma": noise} if noise.any() else {})).items()}


def rank_distribution(predicted, candidates, tie=1e-9):
    """How likely each rank is for the true candidate of each query. predicted, candidates (n, T, D): query j of an
    image is compared by cosine with the T candidates of that image, of which the j-th is the true one. Candidates as
    near as the true one are ordered at random, so that a representation that does not change with t scores as chance
    does. Returns two of (n, T, T) float64, for each query: the probabilities of the ranks 1 to T, and of each candidate
    that it is ranked first."""
    ranks, outcome, first = torch.arange(1, predicted.shape[1] + 1), [], []
    for guess, truth in zip(predicted.split(20), candidates.split(20), strict=True):
        guess, truth = (nn.functional.normalize(values.double(), dim=2) for values in (guess, truth))
        cosine = guess @ truth.mT  # (20, queries, candidates)
        ahead = cosine - cosine.diagonal(dim1=1, dim2=2)[..., None]
        nearer, tied = (ahead > tie).sum(2, keepdim=True), (ahead.abs() <= tie).sum(2, keepdim=True)  # itself as well
        outcome.append(((ranks > nearer) & (ranks <= nearer + tied)).double() / tied)
        nearest = (cosine >= cosine.amax(2, keepdim=True) - tie).double()
        first.append(nearest / nearest.sum(2, keepdim=True))
    return torch.cat(outcome), torch.cat(first)


def retrieval(data, predicted, candidates):
    """{measure: (n,)}, MRR, H@1, H@5 and PRE of each image, and the share of each rank, a list of T. PRE is the mean
    squared error between the numbers that describe the transformation ranked first and those of the true one (STL's
    Table 6), each in units of its variance over the training pairs: by chance some 2 (1 - 1 / T)."""
    by_rank, first = rank_distribution(predicted, candidates)
    by_image, ranks = by_rank.mean(1), torch.arange(1, data.per_image + 1)  # (n, T)
    known, told = data.joined_targets()
    numbers = standardizer(known)(told).double().unflatten(0, (data.n, -1))
    apart = torch.cdist(numbers, numbers).square() / numbers.shape[2]  # (n, T, T)
    scores = {"MRR": by_image @ (1 / ranks.double()), "H@1": by_image[:, 0], "H@5": by_image[:, :5].sum(1),
              "PRE": (first * apart).sum(2).mean(1)}
    return scores, [round(share, 6) for share in by_image.mean(0).tolist()]


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
        apart = 2 * variance / (1 - w.square().sum(1)).clamp(min=1e-9)  # of two images that are not the same one
        return w @ moved / apart.clamp(min=1e-12 * x.square().sum(1).mean().item())

    return data.with_interval(ratio)


def composition(data, act, x, by_map, features, twice=None):
    """Does the ridge map rho(t) compose? Mean squared errors relative to its own, |rho(t) f(x) - f(t(x))|^2. Of two
    maps in turn: |rho(t2) rho(t1) f(x) - f(t2(t1(x)))|^2. Of quarter turns g and h, which are to be a group: |rho(g)
    rho(h) f(x) - rho(gh) f(x)|^2 and, g being the first, |rho(g)^4 f(x) - f(x)|^2.

    act: the function that `ridge_map` returns. x (n, D): f(x). by_map, features (n, T, D): rho(t) f(x) and f(t(x)).
    twice (n * T, D): of t2(t1(x)), t2 being the next of the T; of quarter turns None, since all 16 products are turns.
    An image's own error counts as a millionth of the features' variance at least. Returns {measure: interval}."""
    def error(found, wanted):  # (n, ..., D) both -> (n,)
        return (found.double() - wanted.double()).square().sum(-1).flatten(1).mean(1)

    def after(targets):  # rho(t2) rho(t1) f(x), (n, T, D)
        return act(by_map.flatten(0, 1), targets).unflatten(0, by_map.shape[:2])

    if data.every:
        turns = torch.eye(4).repeat_interleave(4 * data.n, 0).split(4 * data.n)  # each for all images under all four
        products = [after(turn) for turn in turns]
        fourth = x
        for _ in range(4):
            fourth = act(fourth, turns[1][: len(x)])
        sought = [[of.roll(-turn, 1) for turn in range(4)] for of in (features, by_map)]
        errors = [sum(map(error, products, of)) / 4 for of in sought] + [error(fourth[:, None], x[:, None])]
    else:
        following = data.joined_targets()[1].unflatten(0, (data.n, -1)).roll(-1, 1).flatten(0, 1)
        errors = [error(after(following), twice.unflatten(0, (data.n, -1)))]
    least = 1e-6 * error(features, features.mean((0, 1), keepdim=True)).mean().item() + 1e-300
    own = error(by_map, features).clamp(min=least)
    return {name: data.with_interval(lambda w, e=e: w @ e / (w @ own))
            for name, e in zip(COMPOSITION, errors, strict=False)}


# ------------------------------------------------------------------------------------- maps that a method has learned
#
# A function of (checkpoint, path) that returns the encoder whose features of t(x) the map predicts, None for the
# checkpoint's own; predict(data, x, tx): test features (n, D) and (n * T, D) -> (name, predicted, candidates) of each
# map, (n, T, D) both; and what reads a code of t off the features of x and t(x), (N, D) each, or None.


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

    return model.phase_one, predict, None


def hypernetwork_map(checkpoint, path):
    """STL's: W(y_t(x')) f(x), with the code y_t from another image x' under the same t (eq. 5 and 7); also after the
    projector, where its loss compares. --code labels: the code comes from the parameters of t."""
    import stl

    model, _ = stl.load_stl(path)
    size = checkpoint["config"]["image_size"]

    def predict(data, x, tx):
        if model.hypernetwork is None or (model.code == "labels" and not data.test_parameters):  # projective: no labels
            return
        candidates = tx.unflatten(0, (data.n, -1))  # (n, T, D)
        if model.code == "labels":
            groups = stl.LEARN[checkpoint["config"]["learn"]]
            labels = transformation_labels(data.test_parameters, size, groups)
            unchanged = transformation_labels(unchanged_transformations(len(labels), size), size, groups)
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

    reads = model.transformation_encoder is not None and model.code != "labels"
    return None, predict, model.encode_transformation if reads else None


LEARNED_MAPS = {"vte_ba": barber_agakov_map, "stl": hypernetwork_map}  # by how the method's name begins


# --------------------------------------------------------------------------------------------------------- controls


class FourTurns(nn.Module):
    """An exactly steerable control: the features of a small untrained network over the four quarter turns of the image,
    stacked. A turn of the image permutes the four. Images (N, 3, S, S) -> (N, 4 * 128)."""

    def __init__(self, size, seed):
        super().__init__()
        torch.manual_seed(seed)
        side = min(size, 16)
        self.network = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(3 * side**2, 128), nn.ReLU())

    def forward(self, images):
        return torch.cat([self.network(images.rot90(turns, (2, 3))) for turns in range(4)], 1)


def average_of_turns(stacked):
    """An exactly invariant one: (N, 4 * 128) of `FourTurns` -> (N, 128). Sorted, since a sum depends on its order."""
    return stacked.unflatten(1, (4, -1)).sort(1).values.mean(1)


class Blocks(nn.Module):
    """What leaves each block of an encoder's trunk, averaged over the image's four quarters: (N, 3, S, S) -> (N, the
    sum of 4 C over the blocks). widths: 4 C of each block, once it has run."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.widths = trunk, []

    def forward(self, images):
        outputs = []
        for part in self.trunk.children():
            images = part(images)
            if isinstance(part, nn.Sequential):
                outputs.append(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1))
        self.widths = [output.shape[1] for output in outputs]
        return torch.cat(outputs, 1)


# ------------------------------------------------------------------------------------------------- the measurement


def fit_maps(data, x, tx, test_x, device):
    """The function that `ridge_map` returns, and predictions of the test features (n, T, D), by it and by a ridge
    regression on t alone. x, tx (N, D): features of the training pairs; test_x (n, D)."""
    (known, told), shape = data.joined_targets(), (data.n, data.per_image)
    act = ridge_map(data, x, tx, device)
    by_t = regress(data.held_out, [known], tx, device, together=True)([told])
    return act, act(test_x, told).unflatten(0, shape), by_t.unflatten(0, shape)


@torch.no_grad()
def measure(data, original, transformed, twice, learned, device):
    """All measures of one row, dicts with measure, value, low and high. original, transformed: representations of x,
    (M, D) and (n, D), and of t(x), (N, D) and (n * T, D). twice: that of t2(t1(x)) for `composition`, or None. learned:
    of learned maps `predict`, what reads the code, and the test features (n * T, D) that `predict` is to predict."""
    x, test_x = original.draw("train")[data.train_index], original.draw("test")
    tx, test_tx = transformed.draw("train"), transformed.draw("test")
    candidates = test_tx.unflatten(0, (data.n, data.per_image))
    act, by_map, by_t = fit_maps(data, x, tx, test_x, device)
    logvar = transformed.logvar["test"] if transformed.sampled else torch.full((len(test_tx), 1), -torch.inf)
    noise = data.per_image_sum(logvar.exp().sum(1)) / data.per_image
    rows = [{"measure": "share", "part": part, **interval} for part, interval
            in variance_shares(data, candidates, by_map, by_t, noise).items()]
    sources = [({"from": "x and t(x)"}, [x, tx], [test_x, test_tx]), ({"from": "t(x)"}, [tx], [test_tx]),
               *(({"from": "x and t(x)", "map": "code of t"}, [read(x, tx)], [read(test_x[data.test_index], test_tx)])
                 for _, read, _ in learned if read)]
    rows += [{"measure": name, "target": target, **source, **interval} for source, *blocks in sources
             for (target, name), interval in predict_targets(data, *blocks, device).items()]
    maps = [("ridge", by_map, candidates), ("t alone", by_t, candidates)]
    if transformed.sampled:  # what a perfect map would predict: all but the noise
        maps.append(("ceiling, mu of t(x)", transformed.mu["test"].unflatten(0, candidates.shape[:2]), candidates))
    for predict, _, wanted in learned:
        maps += predict(data, test_x, wanted)
    scores = {}
    for name, predicted, wanted in maps:
        scores[name], shares = retrieval(data, predicted, wanted)
        rows += [{"measure": score, "map": name, **data.mean(values)} for score, values in scores[name].items()]
        rows[-len(scores[name])]["ranks"] = shares
    rows += [{"measure": f"excess {score}", "map": "ridge", **data.mean(values - scores["t alone"][score])}
             for score, values in scores["ridge"].items() if score != "PRE"]
    if twice or data.every:
        measured = composition(data, act, test_x, by_map, candidates, twice and twice.draw("test"))
        rows += [{"measure": name, "map": "ridge", **interval} for name, interval in measured.items()]
    apart = bool((test_x != test_x[0]).any())  # else there is nothing to compare with
    return [*rows, *[{"measure": "moved", **movement(data, test_x, test_tx)}] * apart]


def probe_equivariance(args, device):
    """Returns rows, dicts that --json writes, tables, and the notes to print under them."""
    checkpoints, dataset = load_checkpoints(args)
    dtype = choose_precision(args.precision, device)
    size, generator = checkpoints[0][2]["config"]["image_size"], torch.Generator().manual_seed(args.seed)

    def some_images(split, most):
        images, labels, *_ = load_images(dataset, split, args.data_dir, size)
        if len(images) < 10:
            raise UserError(f"'{dataset}' has {len(images)} {split} images: measuring equivariance takes 10 or more")
        chosen = torch.randperm(len(images), generator=generator)[:most]
        return images[chosen], labels[chosen]

    (images, labels), (test_images, test_labels) = some_images("train", args.pairs), some_images("test", args.images)
    even = len(test_images) - len(test_images) % 2
    test_images, test_labels = test_images[:even], test_labels[:even]

    def features(encoder, config, split, index=None, apply=None):
        return encode(encoder, split, config["mean"], config["std"], device, dtype, index=index, apply=apply)

    def encoded(data, encoder, config):
        """(training, test) features of x and of t(x), and of t2(t1(x)) where asked for, which has no training pairs."""
        torch.manual_seed(args.seed)  # a row does not depend on the rows above it
        of = partial(features, encoder, config)
        splits = [(of(images), of(test_images)), (of(images, data.train_index, data.train_apply),
                                                  of(test_images, data.test_index, data.test_apply))]
        if args.compose and not data.every:
            splits.append(2 * (of(test_images, data.test_index, data.apply_twice),))
        return splits

    def measured(data, name, method, x, tx, twice=None, maps=(None, None), wanted=None):
        for kind in [None] if x[0][1] is None else ["sample", "mu"]:
            torch.manual_seed(args.seed)
            represented = [splits and Representation(name, method, kind, *splits) for splits in (x, tx, twice)]
            learned = [(*maps, Representation(name, method, kind, wanted, wanted).draw("test"))] if maps[0] else []
            row = described(data, name, method, kind)
            if not any(bool((values != values[0]).any()) for values in (x[1][0], tx[1][0])):
                raise UserError(f"{name or method} has the same features for all images: there is nothing to measure")
            yield from ({**row, **found} for found in measure(data, *represented, learned, device))

    def described(data, name, method, kind):
        return {"checkpoint": name, "method": method, "features": kind, "transformations": data.family,
                "border": data.border, "dataset": dataset, "test_images": data.n, "per_image": data.per_image,
                "pairs": args.pairs, "seed": args.seed}

    def layers(data, name, method, encoder, config):
        """The shares, and the k-NN error, after each block."""
        if not args.layers or not hasattr(encoder, "trunk"):
            return
        blocks, settings = Blocks(encoder.trunk), Settings(1, args.seed, device, dtype)
        x, tx, *_ = encoded(data, blocks, config)
        parts = zip(*(features.split(blocks.widths, 1) for splits in (x, tx) for features, _ in splits), strict=True)
        for block, (train, test, train_tx, test_tx) in enumerate(parts, 1):
            x = Representation(name, method, f"block {block}", (train, None), (test, None))
            (predicted,) = knn_predictions(x, torch.arange(len(images)), labels, settings)
            wrong = torch.from_numpy(predicted != test_labels.numpy()).double()
            maps = fit_maps(data, train[data.train_index], train_tx, test, device)[1:]
            shares = variance_shares(data, test_tx.unflatten(0, (data.n, -1)), *maps, torch.zeros(data.n).double())
            found = [{"measure": "k-NN error", **data.mean(wrong)},
                     *({"measure": "share", "part": part, **interval} for part, interval in shares.items())]
            yield from ({**described(data, name, method, x.features), "block": block, **one} for one in found)

    rows = []
    for family in dict.fromkeys(args.transformations or ("projective", "crop", "colour")):
        members = [one for one in checkpoints if args.transformations or family == "projective"
                   or one[2]["method"].startswith("stl")]
        if not members:
            continue
        data = EvaluationSet(family, len(images), len(test_images), args.pairs, args.per_image, size, args.seed,
                             args.border)
        chosen = members if args.rows != "baselines" else []
        print(f"{dataset}: {family} transformations", flush=True)  # then minutes of silence
        for name, path, checkpoint, encoder in tqdm(chosen, desc=family, leave=False, disable=None):
            method, config = checkpoint["method"], checkpoint["config"]
            load = next((load for begin, load in LEARNED_MAPS.items() if method.startswith(begin)), None)
            exported = checkpoint["model"] is checkpoint["encoder"]  # without the map
            target_encoder, *maps = load(checkpoint, path) if load and not exported else (None, None, None)
            x, tx, *twice = encoded(data, encoder, config)
            wanted = tx[1]
            if target_encoder:
                wanted = features(target_encoder, config, test_images, data.test_index, data.test_apply)
            rows += measured(data, name, method, x, tx, *twice, maps=maps, wanted=wanted)
            rows += layers(data, name, method, encoder, config)
        if args.rows == "checkpoints":
            continue
        for kind, config in architectures(members).items():
            encoder = random_encoder(images, config, args.seed, device, dtype)
            rows += measured(data, None, f"random encoder ({kind})", *encoded(data, encoder, config))
            rows += layers(data, None, f"random encoder ({kind})", encoder, config)
        config = checkpoints[0][2]["config"]
        pixels = nn.Sequential(nn.AdaptiveAvgPool2d(min(size, 32)), nn.Flatten())
        rows += measured(data, None, "raw pixels", *encoded(data, pixels, config))
        stacked = encoded(data, FourTurns(size, args.seed), config)
        rows += measured(data, None, "steerable control", *stacked)
        averaged = [[(average_of_turns(features), None) for features, _ in splits] for splits in stacked]
        rows += measured(data, None, "invariant control", *averaged)
    notes = [
        f"{dataset}: {len(test_images):,} test images, {args.per_image} transformations each (of rotation all 4), the "
        f"same for images 2i and 2i + 1, border {args.border}; ridge regressions fitted on {args.pairs:,} pairs of "
        f"{len(images):,} training images, the penalty chosen on {RIDGE_VALIDATION:.0%} of these; no crops or flips; "
        f"seed {args.seed}",
        *explain_features(rows),
        "shares of the variance of f(t(x)): invariant stays when t changes; equivariant changes, and is predicted from "
        "f(x) and t; of that a part from t alone, the same for all images; the rest is unexplained; the three sum to 1",
        "prediction: from the features of x and t(x) and their products, without which the two cannot be compared, of "
        "t(x) alone, or from the method's code of t; R² of 1 is perfect, of 0 the training mean",
        "MRR (mean reciprocal rank), H@1 (found first): f(t(x)) predicted from f(x) and t, ranked by cosine among "
        "those of all transformations of the same image; by a ridge regression on f(x), t and their products, or (its "
        "...) by the method's own map; excess H@1: over that of a ridge regression on t alone",
        *["does the map compose: mean squared errors over the ridge map's own: the map of t2 after that of t1, against "
          "f(t2(t1(x))); for quarter turns also against the map of both, and a turn four times against f(x)"]
        * any(question(row) == "composition" for row in rows),
        *[f"block by block: averaged over the image's four quarters; k-NN on {len(images):,} labels"]
        * any(str(row["features"]).startswith("block") for row in rows),
        "moved: mean |f(t(x)) - f(x)|² over mean |f(x) - f(x')|²; 0 is invariant",
        *["controls: a small untrained network's features over the four quarter turns of the image, stacked (exactly "
          "steerable under rotation) and averaged (exactly invariant)"] * (args.rows != "checkpoints"),
        f"last lines: half the widest 95 % interval of the column, of {BOOTSTRAP:,} bootstrap samples of the test "
        "images; it says nothing of training seeds",
    ]
    return rows, make_tables(rows, reference_errors()), notes


# --------------------------------------------------------------------------------------------------- what is shown


ALONE = ", t(x) alone"
QUESTIONS = {"share": "shares of the variance of f(t(x))", "x and t(x)": "predicted from x and t(x)",
             "t(x)": "predicted from t(x) alone", None: "retrieval and movement", "composition": "does the map compose",
             "block": "block by block"}
ONLY_STUDIES = ("t error", "H@5")  # tables of at most six columns lack these


def column(row):
    """The heading under which a row's value stands; None for what only --json tells."""
    if row["measure"] == "share":
        return None if row["part"] in ("image by image", "noise of sigma") else row["part"]
    if row.get("map") == "t alone" or row["measure"] in ("excess MRR", "excess H@5", "MSE", "PRE"):
        return None
    alone = ALONE if row.get("from") == "t(x)" else ""
    if row["measure"] == "squared error":
        return "t error" if row["target"] == "t" and not alone else None
    if row["measure"] in ("accuracy", "R2"):
        return f"{row['target']}{' R²' if row['measure'] == 'R2' else ''}{alone}"
    return row["measure"]


def question(row):
    """Which of QUESTIONS a row answers."""
    if "block" in row:
        return "block"
    return "composition" if row["measure"] in COMPOSITION else "share" if row["measure"] == "share" else row.get("from")


def make_tables(rows, errors):
    """For each family of transformations a `probe.Table` for each of QUESTIONS. errors: what `reference_errors`
    returns."""
    rotation = {"rotation": 1.0, "t R²": 1 - errors["rotation_only"] / errors["constant_predictor"]}
    tables = []
    for family in dict.fromkeys(row["transformations"] for row in rows):
        per_image = next(row["per_image"] for row in rows if row["transformations"] == family)
        nothing = {"rotation": 0.25, "kind": 1 / len(SINGLE), "H@1": 1 / per_image, "excess H@1": 0.0,
                   "MRR": sum(1 / rank for rank in range(1, per_image + 1)) / per_image}
        for key, title in QUESTIONS.items():
            found = [(column(row).removesuffix(ALONE), row) for row in rows
                     if row["transformations"] == family and question(row) == key and column(row)]
            if not found:
                continue
            headings = [heading for heading in dict.fromkeys(heading for heading, _ in found)
                        if heading not in ONLY_STUDIES][:4]
            widest, cells = {}, {}
            for heading, row in found:
                widest[heading] = max(widest.get(heading, 0.0), (row["high"] - row["low"]) / 2)
                cells.setdefault(row_label(row), {})[heading] = row["value"]
            if key in ("x and t(x)", "t(x)", None):
                no_r2 = {heading: 0.0 for heading in headings if heading.endswith("R²")}
                cells["knowing nothing", ""] = {**no_r2, **nothing}
            if "t R²" in headings:
                cells["knowing the rotation", ""] = rotation
            cells["95 % interval, at most ±", ""] = widest
            lines = [[*label, *(f"{round(of[heading], 3) + 0.0:.3f}" if heading in of else ""  # never -0.000
                                for heading in headings)] for label, of in cells.items()]
            tables.append(Table(f"{family.capitalize()} transformations, {title}", ["", "features", *headings],
                                lines))
    return tables


def parse_args():
    parser = evaluation_parser("Measure the equivariance of checkpoints, beside a random encoder and raw pixels.",
                               "python equivariance.py pt.ckpt vte_ba.ckpt --json equivariance.json")
    add = parser.add_argument_group("equivariance").add_argument
    add("--transformations", nargs="+", choices=list(FAMILIES),
        help="to measure all checkpoints under; rotation: by quarter turns; single: a crop or one adjustment of colour "
        "(default: projective, and for STL crop and colour too)")
    add("--border", choices=["grey", "reflect", "inside"], default="grey",
        help="what a transformed image shows outside of x: grey, as in training, which gives t away; x reflected; or "
        "nothing, each t being followed by the same zoom into what is always inside (x itself is whole); crops and "
        "colours show nothing outside")
    add("--compose", action="store_true",
        help="also compare the ridge map used twice with t2(t1(x)), whose features take half the time again; of "
        "rotation always")
    add("--layers", action="store_true",
        help="also the shares, and the k-NN error, after each block of the encoders; twice the time")
    add("--images", type=number(int, 10, 10**6), default=300, metavar="N", help="test images")
    add("--per-image", type=number(int, 10, 10**6), default=60, metavar="N",
        help="transformations of each test image, the candidates in retrieval; of rotation all 4")
    add("--pairs", type=number(int, 10, 10**6), default=4000, metavar="N",
        help="training pairs for the ridge regressions")
    return parser.parse_args()


def main():
    run_evaluation(parse_args(), probe_equivariance)


if __name__ == "__main__":
    run_command(main)
