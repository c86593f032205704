"""Evaluates saved encoders: frozen features, an MLP, k-nearest neighbours and multinomial logistic regression.

The protocol of VTE (Sinaga, Basaruddin & Krisnadhi, ICPRAM 2022, section 4): class-balanced subsets of the training
labels; a probabilistic encoder's z is sampled, each test image is classified `--passes` times, and the mean error is
reported with its standard deviation over the passes (which says nothing about training seeds). Two rows and a column of
ours make the others readable: the mean mu in place of a sampled z, an untrained encoder of the same architecture (its
batch normalisation calibrated on training images), and the raw pixels.

    python probe.py pt.ckpt vte_ba.ckpt --train-sizes 5000 500 --json probe.json

--classifiers linear is the protocol of STL (Yu et al., NeurIPS 2024): linear classification by full-batch L-BFGS, with
the L2 weight chosen on a fifth of the labels, and a refit on all.

--equivariance measures what the objectives of these methods are about, and what no paper of the VTE line measures: how
much of the transformation the features hold, whether they move with it in a way that can be predicted, and how far.

    python probe.py --equivariance pt.ckpt vte_ba.ckpt --json equivariance.json

What the papers do not state and this script chose is printed with the table and defined by the constants below.
"""

import copy
import json
import os
import re
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from tqdm import tqdm

from common import (
    CONSTANT_PREDICTOR_ERROR,
    ROTATION_PREDICTOR_ERROR,
    Parser,
    UserError,
    build_encoder,
    choose_device,
    choose_precision,
    coefficients_from_corners,
    file_path,
    load_checkpoint,
    load_encoder,
    load_images,
    load_model,
    normalization,
    positive,
    reparameterize,
    run_command,
    sample_corners,
    sample_crops,
    seed,
    transformation_target,
    warp_batch,
)

MLP_EPOCHS, MLP_BATCH, MLP_LR = 30, 128, 1e-3  # Adam
NEIGHBOURS = 5  # the paper's; uniform weights, Euclidean distance between unscaled features
LOGISTIC_C, LOGISTIC_ITERATIONS = 1.0, 100  # the paper's 100 iterations of SAG; L2 weight 1 / C
LINEAR_WEIGHTS = np.logspace(5, -6, 45)  # L2 weight beside the mean loss; strongest first, each fit starts at the last
LINEAR_ITERATIONS, LINEAR_VALIDATION = 100, 0.2
LINEAR_PIXELS = 10_000_000  # labels x dimensions; of raw pixels beyond it 46 fits would take long: left out
KNN_PAIRS = 1 << 28  # distances on a GPU at once: 1 GiB
CALIBRATION_IMAGES, ENCODE_BATCH = 2048, 500
RIDGE_PENALTIES = [10.0**power for power in range(-3, 4)]  # times the kernel's mean diagonal
RIDGE_VALIDATION = 0.2  # of the training images, to choose the penalty on
BOOTSTRAP = 1000
NAMES = {"mlp": "MLP", "knn": "k-NN", "logistic": "logistic regression", "linear": "linear, L2 weight chosen",
         "finetuned": "MLP, encoder trained too"}


class Representation:
    """One row of the table: features of training and test images, mu (N, D) and log-variance (N, D) or None; features
    says which: sample, mu, trunk, or None where there is no choice."""

    def __init__(self, checkpoint, method, features, train, test, network=None):
        self.checkpoint, self.method, self.features = checkpoint, method, features
        self.network = network  # (encoder, its config, training images, test images)
        self.mu, self.logvar = {"train": train[0], "test": test[0]}, {"train": train[1], "test": test[1]}
        self.sampled = features == "sample"
        if not all(bool(self.draw(split).isfinite().all()) for split in ("train", "test")):
            raise UserError(f"the features of {checkpoint or method} are not finite: its weights are broken")

    def draw(self, split):
        mu, logvar = self.mu[split], self.logvar[split]
        return reparameterize(mu, logvar) if self.sampled else mu

    def label(self):
        name = f"{self.method} ({self.checkpoint})" if self.checkpoint else self.method
        return name, {"sample": "z sampled", "mu": "mu", "trunk": "before mu", None: ""}[self.features]


@torch.no_grad()
def encode(encoder, images, mean, std, device, dtype, batch_size=ENCODE_BATCH, index=None, apply=None):
    """Images (M, 3, S, S) uint8 -> mu, logvar, (N, D) float32 on the CPU; no logvar (None) where nothing is sampled.
    index: (N,) which images, all by default; apply: transforms a batch of them (`draw_projective`)."""
    encoder = encoder.to(device, memory_format=torch.channels_last)
    images, (scale, shift) = images.to(device), normalization(mean, std, device)
    index, outputs = torch.arange(len(images)) if index is None else index, []
    for rows in tqdm(torch.arange(len(index)).split(batch_size), desc="encoding", leave=False, disable=None):
        chosen = index[rows].to(device)
        if apply is None:
            batch = warp_batch(images, chosen, scale=scale, shift=shift, dtype=dtype)
        else:
            batch = apply(images, chosen, rows, scale, shift, dtype)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = encoder(batch)
        outputs.append([part.float().cpu() for part in (output if isinstance(output, tuple) else (output,))])
    parts = [torch.cat(part) for part in zip(*outputs, strict=True)]
    return parts[0], parts[1] if len(parts) > 1 else None


def random_encoder(images, config, seed, device, dtype):
    """An untrained encoder whose batch normalisation has the statistics of (up to 2,048) training images."""
    torch.manual_seed(seed)
    encoder = build_encoder(config["encoder"], config["image_size"], config.get("probabilistic", True)).train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the running statistics become plain averages over the batches
    n = min(CALIBRATION_IMAGES, len(images))
    n -= n % ENCODE_BATCH == 1 and n > 1  # batch normalisation takes no last batch of one image
    encode(encoder, images[:n], config["mean"], config["std"], device, dtype)
    return encoder.eval()


def balanced_subset(labels, n, seed):
    """Indices of n images with equally many of each class (the first classes one more where n does not divide), or None
    where the labels cannot give them or n is less than one a class. A seed's smaller subsets lie within its larger."""
    if n == len(labels):
        return torch.arange(n)
    classes = int(labels.max()) + 1
    if n < classes:
        return None
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in range(classes):
        wanted = n // classes + (label < n % classes)
        of_class = order[labels[order] == label][:wanted]
        if len(of_class) < wanted:
            return None
        chosen.append(of_class)
    return torch.cat(chosen)


def standardizer(features):
    """Mean 0 and variance 1 in each dimension, measured on the training features."""
    mean, std = features.mean(0), features.std(0)
    std = torch.where(std > 0, std, 1.0)
    return lambda values: (values - mean) / std


def mlp(width, classes):
    """Three layers, 2048-2048-classes: the paper's."""
    return nn.Sequential(nn.Linear(width, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, classes))


def mlp_predictions(representation, index, labels, classes, passes, device, dtype):
    """Sampled features are drawn anew in each epoch."""
    scaled = standardizer(representation.draw("train")[index])
    model = mlp(representation.mu["train"].shape[1], classes).to(device)
    labels = labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=MLP_LR, fused=True)
    for _ in tqdm(range(MLP_EPOCHS), desc=f"MLP, {len(index):,} labels", leave=False, disable=None):
        features = scaled(representation.draw("train")[index]).to(device)
        for batch in torch.randperm(len(index)).to(device).split(MLP_BATCH):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(features[batch])
            loss = nn.functional.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    for _ in range(passes):
        with torch.no_grad():
            yield model(scaled(representation.draw("test")).to(device)).argmax(1).cpu().numpy()


def finetuned_predictions(representation, index, labels, classes, device, dtype):
    """What frozen features are to be told from: a copy of the encoder, from where the checkpoint left it, and an MLP on
    its mu, trained together on the same images, cropped and flipped as in pretraining."""
    encoder, config, images, test_images = representation.network
    images, test_images, labels = images[index].to(device), test_images.to(device), labels.to(device)
    size, (scale, shift) = images.shape[-1], normalization(config["mean"], config["std"], device)
    encoder = copy.deepcopy(encoder).to(device, memory_format=torch.channels_last)
    head = mlp(representation.mu["train"].shape[1], classes).to(device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=MLP_LR, fused=True)

    def logits(batch, training):
        encoder.train(training)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = encoder(batch)
            return head(output[0] if isinstance(output, tuple) else output).float()

    for _ in tqdm(range(MLP_EPOCHS), desc=f"with the encoder, {len(index):,} labels", leave=False, disable=None):
        crops = sample_crops(len(index), size).to(device)
        for chosen in torch.randperm(len(index)).to(device).split(MLP_BATCH):
            batch = warp_batch(images, chosen, crops[chosen], None, scale, shift, dtype)
            loss = nn.functional.cross_entropy(logits(batch, len(chosen) > 1), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        parts = torch.arange(len(test_images), device=device).split(ENCODE_BATCH)
        yield torch.cat([logits(warp_batch(test_images, part, scale=scale, shift=shift, dtype=dtype), False).argmax(1)
                         for part in parts]).cpu().numpy()


def vote_of_nearest(train, labels, queries, neighbours, pairs=KNN_PAIRS):
    """What KNeighborsClassifier predicts, on any device: train (N, D), labels (N,) from 0, queries (M, D) -> (M,). Of
    equally many votes the first class wins; which of equally near neighbours counts is left open, as there. pairs: how
    many distances are held at once."""
    classes = int(labels.max()) + 1
    last_to_first = torch.arange(classes - 1, -1, -1, device=train.device)
    middle = train.mean(0)  # taken off, or float32 would lose small distances far from the origin
    train = train - middle
    norms, predicted = train.square().sum(1), []
    for part in (queries - middle).split(max(1, pairs // len(train))):
        distances = torch.addmm(norms, part, train.T, alpha=-2)  # squared, less what is the same for all neighbours
        nearest = labels[distances.topk(neighbours, largest=False).indices]
        votes = nn.functional.one_hot(nearest, classes).sum(1)
        predicted.append((votes * classes + last_to_first).argmax(1))
    return torch.cat(predicted)


def knn_predictions(representation, index, labels, passes, device):
    """scikit-learn's on the CPU; on a GPU the same, there."""
    train, neighbours = representation.draw("train")[index], min(NEIGHBOURS, len(index))
    if device.type == "cpu":
        model = KNeighborsClassifier(neighbours, algorithm="brute", n_jobs=-1).fit(train.numpy(), labels.numpy())
        for _ in range(passes):
            yield model.predict(representation.draw("test").numpy())
    else:
        train, labels = train.to(device), labels.to(device)
        for _ in range(passes):
            yield vote_of_nearest(train, labels, representation.draw("test").to(device), neighbours).cpu().numpy()


def logistic_predictions(representation, index, labels, passes, seed):
    """Draws the features now and returns a function that fits and predicts, so that several fits can run at once."""
    train = representation.draw("train")[index]
    tests = [representation.draw("test") for _ in range(passes)]

    def fit_and_predict():
        scaled = standardizer(train)
        model = LogisticRegression(solver="sag", C=LOGISTIC_C, max_iter=LOGISTIC_ITERATIONS, random_state=seed)
        model.fit(scaled(train).numpy(), labels.numpy())
        return [model.predict(scaled(test).numpy()) for test in tests]

    return fit_and_predict


def linear_predictions(representation, index, labels, passes, seed):
    """STL's: multinomial regression on the features as they are, minimising the mean loss + weight / 2 |W|^2."""
    train, labels = representation.draw("train")[index].numpy(), labels.numpy()
    fit, held_out = split_labels(labels, seed)

    def model(weight, n):
        return LogisticRegression(C=1 / (weight * n), max_iter=LINEAR_ITERATIONS, warm_start=True)

    classifier, best, fewest = model(1, 1), None, np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for weight in LINEAR_WEIGHTS:
            classifier.set_params(C=1 / (weight * len(fit))).fit(train[fit], labels[fit])
            wrong = np.mean(classifier.predict(train[held_out]) != labels[held_out])
            best, fewest = (weight, wrong) if wrong < fewest else (best, fewest)
        classifier = model(best, len(train)).fit(train, labels)
    for _ in range(passes):
        yield classifier.predict(representation.draw("test").numpy())


def split_labels(labels, seed):
    """Indices to fit on and to choose the L2 weight on, the classes in equal shares; a class of one image is fitted."""
    generator, held_out = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out[members[: max(len(members) > 1, round(LINEAR_VALIDATION * len(members)))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def error_rate(predicted, labels, per_class):
    """The share of wrong predictions, of all images or, per_class, as the mean over the classes' own."""
    wrong = predicted != labels
    return float(np.mean([wrong[labels == label].mean() for label in np.unique(labels)] if per_class else wrong))


def errors_of(classifier, representation, index, train_labels, test_labels, passes, seed, device, dtype,
              per_class=False):
    """A function that returns the error rate of each pass over the test images; one pass where nothing is sampled. All
    is done when this returns, but for logistic fits, which the function does: several can run at once."""
    torch.manual_seed(seed)
    passes = passes if representation.sampled else 1
    labels, classes = train_labels[index], int(train_labels.max()) + 1
    fit_and_predict = None
    if classifier == "mlp":
        predictions = list(mlp_predictions(representation, index, labels, classes, passes, device, dtype))
    elif classifier == "finetuned":
        predictions = list(finetuned_predictions(representation, index, labels, classes, device, dtype))
    elif classifier == "knn":
        predictions = list(knn_predictions(representation, index, labels, passes, device))
    elif classifier == "linear":
        predictions = list(linear_predictions(representation, index, labels, passes, seed))
    else:
        fit_and_predict = logistic_predictions(representation, index, labels, passes, seed)

    def errors():
        predicted = fit_and_predict() if fit_and_predict else predictions
        return [error_rate(labels_of_pass, test_labels.numpy(), per_class) for labels_of_pass in predicted]

    return errors


def run_ahead(functions, workers):
    """The results of an iterable of functions, in its order; so many are computed at once, and no more are held."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for function in functions:
            waiting.append(pool.submit(function))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def load_checkpoints(paths, dataset):
    """(short name, checkpoint, encoder) of each path, and the data set to probe them on."""
    loaded = [(path, load_checkpoint(path)) for path in paths]
    short = [Path(path).name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    checkpoints = [(name, checkpoint, load_encoder(checkpoint, path))
                   for name, (path, checkpoint) in zip(names, loaded, strict=True)]
    for name, flag in (("dataset", "--dataset"), ("image_size", None)):
        values = sorted({str(checkpoint["config"][name]) for _, checkpoint, _ in checkpoints})
        if len(values) > 1 and not (flag and dataset):
            raise UserError(f"the checkpoints differ in {name} ({', '.join(values)}): probe them one by one"
                            + (f", or say with {flag} what to probe all of them on" if flag else ""), exit_code=2)
    return checkpoints, dataset or checkpoints[0][1]["config"]["dataset"]


def architectures(checkpoints):
    """{encoder: a config that has it}, with a log-variance if one has: then its rows are of both kinds at once."""
    found = {}
    for checkpoint in checkpoints:
        config = checkpoint["config"]
        if config["encoder"] not in found or config.get("probabilistic", True):
            found[config["encoder"]] = config
    return found


def choose_subsets(labels, sizes, seed, dataset):
    """{size: indices} for the sizes that the labels can give, and a note on each that they cannot."""
    subsets = {size: balanced_subset(labels, size, seed) for size in sorted(set(sizes), reverse=True)}
    notes = [f"{size:,} training images, as many of each class, are not what {dataset} can give: left out"
             for size, subset in subsets.items() if subset is None]
    subsets = {size: subset for size, subset in subsets.items() if subset is not None}
    if not subsets:
        subsets = {len(labels): torch.arange(len(labels))}
        notes.append(f"all {len(labels):,} training images are used instead")
    return subsets, notes


def probe(args):
    """Returns the rows of the table, dicts with what --json writes and a label, and the notes to print under it."""
    checkpoints, dataset = load_checkpoints(args.checkpoints, args.dataset)
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    image_size = checkpoints[0][1]["config"]["image_size"]
    images, labels, class_names = load_images(dataset, "train", args.data_dir, image_size)
    test_images, test_labels, _ = load_images(dataset, "test", args.data_dir, image_size)
    if len(class_names) < 2:
        raise UserError(f"'{dataset}' has one class, so nothing to classify: probe on other data with --dataset")
    subsets, notes = choose_subsets(labels, args.train_sizes, args.seed, dataset)
    used, positions = torch.cat(list(subsets.values())).unique(return_inverse=True)  # encode no image without need
    images, labels = images[used], labels[used]
    subsets = dict(zip(subsets, positions.split([len(subset) for subset in subsets.values()]), strict=True))

    def represent(name, method, encoder, config):
        def encoded(part):
            return [encode(part, split, config["mean"], config["std"], device, dtype)
                    for split in (images, test_images)]

        splits = encoded(encoder)
        kinds = [None] if splits[0][1] is None else [kind for kind in ("sample", "mu") if kind in args.features]
        network = encoder, config, images, test_images
        found = [Representation(name, method, kind, *splits, network) for kind in kinds]
        if "trunk" in args.features and hasattr(encoder, "mu"):  # a ResNet's features are its trunk's
            found.append(Representation(name, method, "trunk", *encoded(encoder.trunk)))
        return found

    representations = []
    if args.rows != "baselines":
        for name, checkpoint, encoder in checkpoints:
            representations += represent(name, checkpoint["method"], encoder, checkpoint["config"])
    if args.rows != "checkpoints":
        for kind, config in architectures(checkpoint for _, checkpoint, _ in checkpoints).items():
            encoder = random_encoder(images, config, args.seed, device, dtype)
            representations += represent(None, f"random encoder ({kind})", encoder, config)
        pixels = [(split.flatten(1).float() / 255, None) for split in (images, test_images)]
        representations.append(Representation(None, "raw pixels", None, *pixels))

    rows = []
    work = [(c, r, size) for c in args.classifiers for r in representations for size in subsets
            if c != "finetuned" or (r.network and not r.sampled)]  # one row an encoder
    without_linear = {size: "one of each class leaves none to choose the L2 weight on" for size in subsets
                      if size == len(class_names)}
    too_large = [size for size in subsets if size * images[0].numel() > LINEAR_PIXELS]
    work = [(c, r, size) for c, r, size in work if c != "linear" or not (
        size in without_linear or (size in too_large and r.method == "raw pixels"))]
    if "linear" in args.classifiers:
        notes += [f"linear, {size:,} labels: left out, {why}" for size, why in without_linear.items()]
        notes += [f"linear, {size:,} labels: raw pixels left out, whose fits would take long" for size in too_large]
    if not work:
        why = f"{notes[-1]}; give larger --train-sizes" if notes else "finetuned takes mu, which --features leaves out"
        raise UserError(f"nothing is left to evaluate: {why}", exit_code=2)
    errors_of_all = run_ahead((errors_of(classifier, representation, subsets[size], labels, test_labels, args.passes,
                                         args.seed, device, dtype, args.mean_per_class)
                               for classifier, representation, size in work), workers=torch.get_num_threads())
    warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are the protocols'
    progress = tqdm(errors_of_all, desc="classifiers", total=len(work), leave=False, disable=None)
    for (classifier, representation, size), errors in zip(work, progress, strict=True):
        rows.append({"checkpoint": representation.checkpoint, "method": representation.method,
                     "features": representation.features, "classifier": classifier, "train_size": size,
                     "error_mean": float(np.mean(errors)),
                     "error_std": float(np.std(errors, ddof=1)) if len(errors) > 1 else 0.0,
                     "passes": len(errors), "seed": args.seed, "dataset": dataset,
                     "mean_per_class": args.mean_per_class, "label": representation.label()})
    chance = 1 - 1 / len(class_names)
    kind = "error, mean over the classes," if args.mean_per_class else "error"
    notes.append(f"{dataset}: {kind} on {len(test_labels):,} test images, chance {chance:.3f}; z sampled: mean ± "
                 f"standard deviation over {args.passes} passes; seed {args.seed}")
    return rows, notes


def make_tables(rows):
    """The layout of VTE's Tables 1-3: for each classifier its title, the training sizes, and a line of cells, text, for
    each representation, (name, features)."""
    protocol = {
        "mlp": f"2048-2048-classes, Adam {MLP_LR:g}, {MLP_EPOCHS} epochs, batch {MLP_BATCH}, standardised features",
        "knn": f"K = {NEIGHBOURS}, uniform weights, Euclidean distance, unscaled features",
        "logistic": f"SAG, {LOGISTIC_ITERATIONS} iterations, L2 with C = {LOGISTIC_C:g}, standardised features",
        "finetuned": f"no frozen features: the encoder, from where the checkpoint left it, and the MLP on its mu, Adam "
                     f"{MLP_LR:g}, {MLP_EPOCHS} epochs, batch {MLP_BATCH}, crops and flips",
        "linear": f"L-BFGS, {LINEAR_ITERATIONS} iterations, unscaled features, L2 weight of {len(LINEAR_WEIGHTS)} from "
                  f"{LINEAR_WEIGHTS[-1]:g} to {LINEAR_WEIGHTS[0]:g} chosen on {LINEAR_VALIDATION:.0%} of the labels, "
                  "refit on all",
    }
    for classifier in dict.fromkeys(row["classifier"] for row in rows):
        lines = {}
        for row in (row for row in rows if row["classifier"] == classifier):
            deviation = f" ± {row['error_std']:.3f}" if row["passes"] > 1 else ""
            lines.setdefault(row["label"], {})[row["train_size"]] = f"{row['error_mean']:.3f}{deviation}"
        sizes = sorted({row["train_size"] for row in rows}, reverse=True)
        yield NAMES[classifier], protocol[classifier], sizes, lines


def print_tables(rows, notes):
    width = max(len(row["label"][0]) for row in rows)
    for title, protocol, sizes, lines in make_tables(rows):
        print(f"\n{title} ({protocol})")
        print(f"  {'training labels':{width + 11}}" + "".join(f"{size:>16,}" for size in sizes))
        for (name, features), cells in lines.items():
            shown = [cells.get(size, "-") for size in sizes]
            shown = "".join((cell if "±" in cell else cell + " " * 8).rjust(16) for cell in shown)
            print(f"  {name:{width}}  {features:9}{shown}")
    print()
    for note in notes:
        print(note)


def write_markdown(rows, notes, path):
    text = []
    for title, protocol, sizes, lines in make_tables(rows):
        text += [f"**{title}** ({protocol})", "",
                 "| error, by training labels | features | " + " | ".join(f"{size:,}" for size in sizes) + " |",
                 "|---|---|" + "---|" * len(sizes)]
        text += [f"| {name} | {features} | " + " | ".join(cells.get(size, "") for size in sizes) + " |"
                 for (name, features), cells in lines.items()]
        text.append("")
    write_page(path, "\n".join([*text, *(f"- {note}" for note in notes), ""]))


def between_marks(page, text, name="measured"):
    """The page with `text` in place of what stands between the lines <!-- name --> and <!-- /name -->; None without."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if begin not in page or end not in page.split(begin, 1)[1]:
        return None
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def write_page(path, text):
    """Writes a file; of a page with marks, only what is between them is replaced."""
    page = Path(path).read_text() if Path(path).is_file() else ""
    Path(path).write_text(between_marks(page, text) or text)


def write_json(rows, path):
    lines = [json.dumps({name: value for name, value in row.items() if name != "label"}) for row in rows]
    Path(path).write_text("[\n" + ",\n".join(lines) + "\n]\n")


# ---------------------------------------------------------------------------------------------------- equivariance


def draw_projective(n, size, generator):
    """n of the transformations that predictive transformation, AVT and VTE learn from. Returns what applies them,
    apply(images, index, rows, scale, shift, dtype), images[index] under the transformations `rows`, as `warp_batch`
    returns them; and what is to be told of each, {name: (n, k) float32}: t, the 8 normalised coefficients; the
    rotation, one of 4; and of the quadrilateral that the image becomes, in sides of the image, the scale (square root
    of its area) and the translation (of the mean of its corners, across and down)."""
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
    """The same of what STL learns from: a resized crop, colour jitter (on every image, in random order), or both. To be
    told are the crop's centre and its width and height, in sides of the image, and how far each adjustment of colour
    is of its range, -1 to 1."""
    import stl

    drawn, shared, targets = stl.sample_transformations(n, size, generator), stl.unchanged_transformations(n, size), {}
    if crop:
        shared["box"] = drawn["box"]
        top, left, height, width = (drawn["box"] / size).unbind(1)
        targets["crop position"] = torch.stack([left + width / 2, top + height / 2], 1) - 0.5
        targets["crop size"] = torch.stack([width, height], 1)
    if colour:
        strength = 2 * torch.rand(n, 4, generator=generator) - 1
        shared["factors"] += strength * torch.tensor([0.4, 0.4, 0.4, 0.1])
        shared["order"] = drawn["order"]
        targets |= zip(["brightness", "contrast", "saturation", "hue"], strength.split(1, 1), strict=True)
    own = {"flip": torch.zeros(n, dtype=torch.bool), "sigma": torch.zeros(n)}

    def apply(images, index, rows, scale, shift, dtype):
        chosen = [{name: values[rows].to(images.device) for name, values in of.items()} for of in (shared, own)]
        return stl.transform(images, index, *chosen, (255 * scale, shift), dtype)

    return apply, targets


FAMILIES = {"projective": draw_projective, "crop": partial(draw_crop_or_colour, colour=False),
            "colour": partial(draw_crop_or_colour, crop=False), "crop+colour": draw_crop_or_colour}


class Setting:
    """The transformations that all rows of a table are measured on: N training pairs of an image and the same
    transformed, and n test images under T transformations each. Two test images that follow each other share theirs, so
    that STL can read a transformation off the other one; they are also drawn together in the bootstrap.

    train, test: {name: (N, k)} and {name: (n * T, k)}, what is to be told of each transformation. train_index (N,),
    test_index (n * T,): which image. held_out (N,): the pairs that the ridge penalty is chosen on. weights (1 + B, n):
    of each test image in the bootstrap; the first row, all 1, is no resample."""

    def __init__(self, family, train_images, test_images, pairs, per_image, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.family, self.n, self.per_image = family, test_images - test_images % 2, per_image
        self.train_index = torch.arange(pairs) % train_images
        self.held_out = self.train_index < max(1, round(RIDGE_VALIDATION * min(pairs, train_images)))
        self.train_apply, self.train = FAMILIES[family](pairs, size, generator)
        apply, drawn = FAMILIES[family](self.n // 2 * per_image, size, generator)
        row = torch.arange(self.n * per_image)
        self.test_index = row // per_image
        shared = self.test_index // 2 * per_image + row % per_image
        self.test = {name: values[shared] for name, values in drawn.items()}
        self.test_apply = lambda images, index, rows, *rest: apply(images, index, shared[rows], *rest)

        drawn = torch.randint(0, self.n // 2, (BOOTSTRAP, self.n // 2), generator=generator)  # two images each
        counts = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
        self.weights = torch.cat([torch.ones(1, self.n).double(), counts.repeat_interleave(2, 1)])  # (1 + B, n)

    def told(self):
        """All that is to be told of each transformation: (N, k) and (n * T, k)."""
        return [torch.cat(list(targets.values()), 1) for targets in (self.train, self.test)]

    def per_image_sum(self, values):
        """(n * T,) -> (n,) float64"""
        return values.double().cpu().view(self.n, self.per_image).sum(1)

    def measured(self, statistic):
        """A statistic of image weights (1 + B, n) -> (1 + B,): of all images, and its 95 % interval when the images are
        drawn again with replacement."""
        values = statistic(self.weights)
        low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
        return {"value": values[0].item(), "low": low, "high": high}


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
    for number in best.unique().tolist():
        coefficients[:, best == number] = solve(kernel, targets, RIDGE_PENALTIES[number])[:, best == number]
    return coefficients


def regress(setting, train, test, targets, device, together=False):
    """Ridge regression from blocks of inputs and, if there are two, all products of the one with the other. train,
    test: lists of (N, D) and (n * T, D); targets (N, k). Returns predictions (n * T, k) float32 on the CPU.

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
    dual = ridge(kernel(exact, exact), targets - mean, setting.held_out.to(device), together).float()
    parts = zip(*(block.split(1000) for block in test), strict=True)
    return torch.cat([(kernel(part, train) @ dual + mean.float()).cpu() for part in parts])


def predict_transformations(setting, train, test, device):
    """What `regress` can tell of a transformation from blocks of features, train and test. Returns {(name, measure):
    interval}: accuracy of the rotation, the largest of its four outputs; of all else the squared error, summed over its
    numbers, and R2 = 1 - squared error / that of the training mean."""
    known, truth = (told.double() for told in setting.told())
    predicted = regress(setting, train, test, known, device).double()
    widths, measured = [values.shape[1] for values in setting.train.values()], {}
    columns = (values.split(widths, -1) for values in (predicted, truth, known.mean(0)))
    for name, guess, answer, mean in zip(setting.train, *columns, strict=True):
        if name == "rotation":
            right = setting.per_image_sum(guess.argmax(1) == answer.argmax(1)) / setting.per_image
            measured[name, "accuracy"] = setting.measured(lambda w, right=right: w @ right / w.sum(1))
            continue
        error = setting.per_image_sum((guess - answer).square().sum(1))
        total = setting.per_image_sum((answer - mean).square().sum(1))
        measured[name, "squared error"] = setting.measured(
            lambda w, error=error: w @ error / (w.sum(1) * setting.per_image))
        measured[name, "R2"] = setting.measured(lambda w, error=error, total=total: 1 - w @ error / (w @ total))
    return measured


def ridge_map(setting, x, tx, test_x, device):
    """An equivariant map for methods that have none: predicts f(t(x)) from f(x) and t. x, tx (N, D): the features of
    the training pairs; test_x (n, D). Returns (n, T, D).

    It is linear in the feature, and its matrix and its offset are affine in what is to be told of t: a ridge regression
    from f, t and all products of the two. f and t alone would not do: such a map adds the same offset to every image,
    while an equivariant representation acts on the feature by a matrix that depends on t."""
    told, test_told = setting.told()
    predicted = regress(setting, [x, told], [test_x[setting.test_index], test_told], tx, device, together=True)
    return predicted.unflatten(0, (setting.n, setting.per_image))


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


def retrieval(setting, predicted, candidates):
    """{measure: interval} of MRR, H@1 and H@5, and the share of each rank, a list of T."""
    chances = rank_distribution(predicted, candidates)  # (n, T, T)
    by_image, ranks = chances.mean(1), torch.arange(1, setting.per_image + 1)
    scores = {"MRR": by_image @ (1 / ranks.double()), "H@1": by_image[:, 0], "H@5": by_image[:, :5].sum(1)}
    measured = {name: setting.measured(lambda w, score=score: w @ score / w.sum(1)) for name, score in scores.items()}
    return measured, [round(share, 6) for share in by_image.mean(0).tolist()]


def movement(setting, x, tx):
    """How far features move under t, relative to how far images lie apart: mean |f(t(x)) - f(x)|^2 over the mean
    |f(x) - f(x')|^2 of two images. x (n, D), tx (n * T, D) of the test images. 0: invariant; 1: as far as to another
    image."""
    x, tx = x.double(), tx.double()
    moved = setting.per_image_sum((tx - x[setting.test_index]).square().sum(1)) / setting.per_image
    x = x - x.mean(0)

    def ratio(w):
        w = w / w.sum(1, keepdim=True)
        variance = w @ x.square().sum(1) - (w @ x).square().sum(1)
        return w @ moved / (2 * variance * len(x) / (len(x) - 1)).clamp(min=1e-12)

    return setting.measured(ratio)


def barber_agakov_map(checkpoint, path):
    """VTE-BA's decoder: from z_hat of x to phase one's code of t(x). It only sees t if steerable; if not, its
    prediction is the same for all t, and chance is what it must score."""
    from vte_ba import VTEBarberAgakov

    config = checkpoint["config"]
    encoder, phase_one = (build_encoder(config["encoder"], config["image_size"]) for _ in range(2))
    model = load_model(VTEBarberAgakov(encoder, phase_one, config["encoder"] == "alexnet",
                                       steerable=config.get("steerable", False)), checkpoint, path)

    def predict(setting, x, z):
        if "t" not in setting.test:  # it knows projective transformations only
            return
        z_hat = x.repeat_interleave(setting.per_image, 0)
        inputs = torch.cat([z_hat, setting.test["t"]], 1) if model.steerable else z_hat
        predicted, candidates = (rows.unflatten(0, (setting.n, -1)) for rows in (model.decoder(inputs), z))
        yield "decoder of z and t" if model.steerable else "decoder, which never sees t", predicted, candidates

    return model.phase_one, predict


def hypernetwork_map(checkpoint, path):
    """STL's: W(y_t(x')) f(x), with the code y_t from another image x' under the same t (eq. 5 and 7); also after the
    projector, where its loss compares."""
    import stl

    model, _ = stl.load_stl(path)

    def predict(setting, x, tx):
        if model.hypernetwork is None:
            return
        candidates = tx.unflatten(0, (setting.n, -1))  # (n, T, D)
        codes = stl.partner(model.encode_transformation(x[setting.test_index], tx).unflatten(0, (setting.n, -1)))
        # W(y_t) y for all T codes of an image: the product with y comes first and is shared by them.
        predicted = torch.cat([torch.einsum("nok,ntk->nto", torch.einsum("oik,ni->nok", model.hypernetwork.weight, few),
                                            of) for few, of in zip(x.split(50), codes.split(50), strict=True)])
        yield "hypernetwork", predicted, candidates
        projected = (model.equi_projector(values.flatten(0, 1)).unflatten(0, (setting.n, -1))
                     for values in (predicted, candidates))
        yield "hypernetwork, projected", *projected

    return None, predict


OWN_MAPS = {"vte_ba": barber_agakov_map, "stl": hypernetwork_map}  # by how the method's name begins


@torch.no_grad()
def measure(setting, original, transformed, own, device):
    """All measures of one row, dicts with measure, value, low and high. original, transformed: representations of x,
    (M, D) and (n, D), and of t(x), (N, D) and (n * T, D). own: pairs of a map of its own and the test features (n * T,
    D) that it is to predict."""
    x, test_x = original.draw("train")[setting.train_index], original.draw("test")
    tx, test_tx = transformed.draw("train"), transformed.draw("test")
    both, rows = ([x, tx], [test_x[setting.test_index], test_tx]), []
    sources = {"x and t(x)": both, "x and t(x), no products": [[torch.cat(blocks, 1)] for blocks in both],
               "t(x)": ([tx], [test_tx])}
    for source, blocks in sources.items():
        rows += [{"measure": name, "target": target, "from": source, **interval} for (target, name), interval
                 in predict_transformations(setting, *blocks, device).items()]
    maps = [("ridge", ridge_map(setting, x, tx, test_x, device), test_tx.unflatten(0, (setting.n, -1)))]
    for predict, wanted in own:
        maps += predict(setting, test_x, wanted)
    for name, predicted, candidates in maps:
        measured, shares = retrieval(setting, predicted, candidates)
        rows += [{"measure": score, "map": name, **interval} for score, interval in measured.items()]
        rows[-len(measured)]["ranks"] = shares
    return [*rows, {"measure": "moved", **movement(setting, test_x, test_tx)}]


def probe_equivariance(args):
    """Returns the rows, dicts with what --json writes and a label, and the notes to print under the tables."""
    checkpoints, dataset = load_checkpoints(args.checkpoints, args.dataset)
    paths = dict(zip([name for name, _, _ in checkpoints], args.checkpoints, strict=True))
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    size = checkpoints[0][1]["config"]["image_size"]
    pairs, per_image, generator = args.pairs, args.per_image, torch.Generator().manual_seed(args.seed)
    images, test_images = (load_images(dataset, split, args.data_dir, size)[0] for split in ("train", "test"))
    images = images[torch.randperm(len(images), generator=generator)[:pairs]]
    test_images = test_images[torch.randperm(len(test_images), generator=generator)[: args.images]]
    for split, few in (("training", images), ("test", test_images)):
        if len(few) < 10:
            raise UserError(f"'{dataset}' has {len(few)} {split} images: measuring equivariance takes 10 or more")
    test_images = test_images[: len(test_images) - len(test_images) % 2]

    def measured(setting, name, method, encoder, config, target_encoder=None, predict=None):
        torch.manual_seed(args.seed)  # a row does not depend on the rows above it

        def features(encoder, split, **which):
            return encode(encoder, split, config["mean"], config["std"], device, dtype, **which)

        pairs_of, views_of = ({"index": index, "apply": apply} for index, apply in (
            (setting.train_index, setting.train_apply), (setting.test_index, setting.test_apply)))
        x = features(encoder, images), features(encoder, test_images)
        tx = features(encoder, images, **pairs_of), features(encoder, test_images, **views_of)
        wanted = features(target_encoder, test_images, **views_of) if target_encoder else tx[1]
        for kind in [None] if x[0][1] is None else ["sample", "mu"]:
            original, transformed = (Representation(name, method, kind, *splits) for splits in (x, tx))
            own = [(predict, Representation(name, method, kind, wanted, wanted).draw("test"))] if predict else []
            row = {"checkpoint": name, "method": method, "features": kind, "transformations": setting.family,
                   "dataset": dataset, "test_images": setting.n, "per_image": per_image, "pairs": pairs,
                   "seed": args.seed, "label": original.label()}
            yield from ({**row, **found} for found in measure(setting, original, transformed, own, device))

    rows = []
    for family in dict.fromkeys(args.transformations or ("projective", "crop", "colour")):
        members = [(name, checkpoint, encoder) for name, checkpoint, encoder in checkpoints
                   if args.transformations or family == "projective" or checkpoint["method"].startswith("stl")]
        if not members:
            continue
        setting = Setting(family, len(images), len(test_images), pairs, per_image, size, args.seed)
        for name, checkpoint, encoder in tqdm(members if args.rows != "baselines" else [], desc=family, leave=False,
                                              disable=None):
            load = next((load for begin, load in OWN_MAPS.items() if checkpoint["method"].startswith(begin)), None)
            own, config = load(checkpoint, paths[name]) if load else (), checkpoint["config"]
            rows += measured(setting, name, checkpoint["method"], encoder, config, *own)
        if args.rows == "checkpoints":
            continue
        for kind, config in architectures(checkpoint for _, checkpoint, _ in members).items():
            encoder = random_encoder(images, config, args.seed, device, dtype)
            rows += measured(setting, None, f"random encoder ({kind})", encoder, config)
        pixels = nn.Sequential(nn.AdaptiveAvgPool2d(min(size, 32)), nn.Flatten())
        rows += measured(setting, None, "raw pixels", pixels, checkpoints[0][1]["config"])
    notes = [
        f"{dataset}: {len(test_images):,} test images, {per_image} transformations each, two images sharing theirs; "
        f"ridge regressions fitted on {pairs:,} pairs of {len(images):,} training images, the penalty chosen on "
        f"{RIDGE_VALIDATION:.0%} of these; no crops or flips; seed {args.seed}",
        "prediction: from the features of x and t(x) and their products, without which the two cannot be compared "
        "(--json has it without them too), or of t(x) alone; R² of 1 is perfect, of 0 the training mean",
        "MRR, H@1, H@5: f(t(x)) predicted from f(x) and t, ranked by cosine among those of all transformations of the "
        "same image; by a ridge regression on f(x), t and their products, or (its ...) by the method's own map",
        "moved: mean |f(t(x)) - f(x)|² over mean |f(x) - f(x')|²; 0 is invariant",
        f"last lines: half the widest 95 % interval of the column, of {BOOTSTRAP:,} bootstrap samples of the test "
        "images; it says nothing of training seeds",
    ]
    return rows, notes


def column(row):
    """The heading under which a row's value stands; None for what only --json tells."""
    if row["measure"] == "squared error" and row["target"] != "t":
        return None
    if row.get("from") == "x and t(x), no products":
        return None
    alone = ", t(x) alone" if row.get("from") == "t(x)" else ""
    if row["measure"] in ("squared error", "accuracy", "R2"):
        if row["measure"] == "squared error":
            return None if alone else "t error"
        return f"{row['target']}{'' if row['measure'] == 'accuracy' else ' R²'}{alone}"
    return row["measure"]


def line_of(row):
    """The line of a row, (name, features); retrieval by a map of the method's own has one to itself."""
    name, features = row["label"]
    return (name if row.get("map", "ridge") == "ridge" else f"{name}: its {row['map']}"), features


def make_equivariance_tables(rows):
    """For each family of transformations: a title, headings, and a line of cells, {heading: text}, for each (name,
    features)."""
    per_image = rows[0]["per_image"]
    chance = {"t error": CONSTANT_PREDICTOR_ERROR, "rotation": 0.25, "H@1": 1 / per_image, "H@5": 5 / per_image,
              "MRR": sum(1 / rank for rank in range(1, per_image + 1)) / per_image}
    explained = 1 - ROTATION_PREDICTOR_ERROR / CONSTANT_PREDICTOR_ERROR
    known = {"t error": ROTATION_PREDICTOR_ERROR, "t R²": explained, "rotation": 1.0}

    for family in dict.fromkeys(row["transformations"] for row in rows):
        found = [(line_of(row), column(row), row) for row in rows if row["transformations"] == family and column(row)]
        headings = list(dict.fromkeys(heading for _, heading, _ in found))
        lines, widest = {}, dict.fromkeys(headings, 0.0)
        for label, heading, row in found:
            lines.setdefault(label, {})[heading] = f"{round(row['value'], 3) + 0.0:.3f}"  # never -0.000
            widest[heading] = max(widest[heading], (row["high"] - row["low"]) / 2)
        nothing = {**{heading: 0.0 for heading in headings if heading.endswith("R²")}, **chance}
        yardsticks = {"knowing nothing": nothing, **({"knowing the rotation": known} if family == "projective" else {})}
        for name, values in yardsticks.items():
            lines[name, ""] = {heading: f"{values[base]:.3f}" for heading in headings
                               if (base := heading.removesuffix(", t(x) alone")) in values}
        lines["95 % interval, at most ±", ""] = {heading: f"{value:.3f}" for heading, value in widest.items()}
        yield f"{family} transformations", headings, lines


def print_equivariance(rows, notes):
    for title, headings, lines in make_equivariance_tables(rows):
        width = max(len(name) for name, _ in lines)
        stacked = [re.sub(r",? (R²|error|size|position|t\(x\))", r"\n\1", heading).split("\n") for heading in headings]
        across = [max(6, *map(len, words)) for words in stacked]
        print(f"\n{title}")
        for words in zip_longest(*stacked, fillvalue=""):
            shown = (word.rjust(wide) for word, wide in zip(words, across, strict=True))
            print(f"  {'':{width + 11}}" + "  ".join(shown))
        for (name, features), cells in lines.items():
            shown = (cells.get(heading, "-").rjust(wide) for heading, wide in zip(headings, across, strict=True))
            print(f"  {name:{width}}  {features:9}" + "  ".join(shown))
    print()
    for note in notes:
        print(note)


def write_equivariance_markdown(rows, notes, path):
    """A page is to be read at a glance: rows with z sampled are left to the terminal and --json, and all tables but the
    first and the notes are folded."""
    if any(row["features"] == "sample" for row in rows):
        rows = [row for row in rows if row["features"] != "sample"]
        notes = [*notes, "with z sampled: in what --json writes"]
    def folded(summary, lines):
        return [f"<details><summary>{summary}</summary>", "", *lines, "", "</details>", ""]

    text = []
    for title, headings, lines in make_equivariance_tables(rows):
        table = ["| | features | " + " | ".join(headings) + " |", "|---|---|" + "---|" * len(headings)]
        table += [f"| {name} | {features} | " + " | ".join(cells.get(heading, "") for heading in headings) + " |"
                  for (name, features), cells in lines.items()]
        title = title[0].upper() + title[1:]
        text += folded(title, table) if text else [f"**{title}**", "", *table, ""]
    write_page(path, "\n".join([*text, *folded("how it was measured", [f"- {note}" for note in notes])]))


LABEL_DEFAULTS = {"classifiers": ["mlp", "knn", "logistic"], "mean_per_class": False,
                  "train_sizes": [50000, 5000, 500], "features": ["sample", "mu"], "passes": 5}
EQUIVARIANCE_DEFAULTS = {"transformations": None, "images": 300, "per_image": 60, "pairs": 4000}


def parse_args():
    parser = Parser(description="Evaluate checkpoints, on labels or for equivariance, beside a random encoder and raw "
                                "pixels.",
                    epilog="example:\n  python probe.py pt.ckpt vte_ba.ckpt --train-sizes 5000 500 --json rows.json\n"
                           "  python probe.py --equivariance pt.ckpt vte_ba.ckpt --json equivariance.json")
    add = parser.add_argument
    add("checkpoints", nargs="+", type=file_path, metavar="CKPT",
        help="data set, encoder and sizes come from the checkpoint")
    add("--dataset", type=file_path, help="other data: digits, cifar10, stl10 or a folder (default: the checkpoint's)")
    add("--data-dir", type=file_path, default="data",
        help="where cifar10 and stl10 are downloaded to (default: %(default)s)")
    add("--seed", type=seed, default=0, help="of subsets, transformations, sampled z, MLP weights, the random encoder")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the encoder and the MLP")
    add("--json", type=file_path, metavar="FILE", help="also write the rows, as a list of objects")
    add("--markdown", type=file_path, metavar="FILE",
        help="also write the tables, as Markdown; in a page with the lines "
        "<!-- measured --> and <!-- /measured -->, between these")
    add("--rows", choices=["all", "checkpoints", "baselines"], default="all",
        help="baselines: the random encoder and raw pixels alone, for studies that make them once")
    add = parser.add_argument_group("on labels").add_argument
    add("--classifiers", nargs="+", choices=list(NAMES),
        help="default: VTE's three, mlp knn logistic; linear is STL's, 46 fits; finetuned trains the encoder too, for "
             "comparison")
    add("--mean-per-class", action="store_true", default=None,
        help="error as the mean over classes, for test sets out of balance")
    add("--train-sizes", nargs="+", type=positive(int), metavar="N",
        help="labelled images to train on; fewer is faster (default: 50000 5000 500)")
    add("--features", nargs="+", choices=["sample", "mu", "trunk"],
        help="of encoders with mu and sigma: z sampled, mu, or what both are computed from (default: sample mu)")
    add("--passes", type=positive(int), help="times z is sampled for the test images (default: 5)")
    add = parser.add_argument_group("equivariance").add_argument
    add("--equivariance", action="store_true", help="measure equivariance, in place of labels")
    add("--transformations", nargs="+", choices=list(FAMILIES),
        help="to measure all checkpoints under (default: projective, and for STL crop and colour too)")
    add("--images", type=positive(int), metavar="N", help="test images (default: 300)")
    add("--per-image", type=positive(int), metavar="N", help="transformations of each, to be told apart (default: 60)")
    add("--pairs", type=positive(int), metavar="N", help="training pairs for the ridge regressions (default: 4000)")
    args = parser.parse_args()
    for defaults, used in ((LABEL_DEFAULTS, not args.equivariance), (EQUIVARIANCE_DEFAULTS, args.equivariance)):
        for name, default in defaults.items():
            flag = f"--{name.replace('_', '-')}"
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif not used:
                parser.error(f"{flag} goes with --equivariance" if not args.equivariance else
                             f"{flag} is of the evaluation on labels, which --equivariance replaces: leave out one")
    for name in ("images", "per_image", "pairs"):
        if getattr(args, name) < 10:
            parser.error(f"--{name.replace('_', '-')} is to be 10 or more")
    return args


def main():
    args = parse_args()
    for path, suffix in ((args.json, ".json"), (args.markdown, ".md")):
        if path and (Path(path).suffix != suffix or not os.access(Path(path).resolve().parent, os.W_OK)):
            raise UserError(f"cannot write '{path}': give a file that ends in {suffix}, in a folder that is there and "
                            "can be written to", exit_code=2)
    rows, notes = (probe_equivariance if args.equivariance else probe)(args)
    if args.json:
        write_json(rows, args.json)
    if args.markdown:
        (write_equivariance_markdown if args.equivariance else write_markdown)(rows, notes, args.markdown)
    (print_equivariance if args.equivariance else print_tables)(rows, notes)


if __name__ == "__main__":
    run_command(main)
