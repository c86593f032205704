"""Evaluates saved encoders: frozen features, an MLP, k-nearest neighbours and multinomial logistic regression.

The protocol of VTE (Sinaga, Basaruddin & Krisnadhi, ICPRAM 2022, section 4): class-balanced subsets of the training
labels; a probabilistic encoder's z is sampled, each test image is classified `--passes` times, and the mean error is
reported with its standard deviation over the passes (which says nothing about training seeds). Two rows and a column of
ours make the others readable: the mean mu in place of a sampled z, an untrained encoder of the same architecture (its
batch normalisation calibrated on training images), and the raw pixels.

    python probe.py pt.ckpt vte_ba.ckpt --train-sizes 5000 500 --json probe.json

--classifiers linear is the protocol of STL (Yu et al., NeurIPS 2024): linear classification by full-batch L-BFGS, with
the L2 weight chosen on a fifth of the labels, and a refit on all.

What the papers do not state and this script chose is printed with the table and defined by the constants below.
"""

import json
import os
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from tqdm import tqdm

from common import (
    Parser,
    UserError,
    build_encoder,
    choose_device,
    choose_precision,
    file_path,
    load_checkpoint,
    load_encoder,
    load_images,
    normalization,
    positive,
    reparameterize,
    run_command,
    seed,
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
NAMES = {"mlp": "MLP", "knn": "k-NN", "logistic": "logistic regression", "linear": "linear, L2 weight chosen"}


class Representation:
    """One row of the table: features of training and test images, mu (N, D) and log-variance (N, D) or None."""

    def __init__(self, checkpoint, method, features, train, test):
        self.checkpoint, self.method, self.features = checkpoint, method, features
        self.mu, self.logvar = {"train": train[0], "test": test[0]}, {"train": train[1], "test": test[1]}
        self.sampled = features == "sample"
        if not all(bool(self.draw(split).isfinite().all()) for split in ("train", "test")):
            raise UserError(f"the features of {checkpoint or method} are not finite: its weights are broken")

    def draw(self, split):
        mu, logvar = self.mu[split], self.logvar[split]
        return reparameterize(mu, logvar) if self.sampled else mu

    def label(self):
        name = f"{self.method} ({self.checkpoint})" if self.checkpoint else self.method
        return name, {"sample": "z sampled", "mu": "mu", None: ""}[self.features]


@torch.no_grad()
def encode(encoder, images, mean, std, device, dtype, batch_size=ENCODE_BATCH):
    """Images (N, 3, S, S) uint8 -> mu, logvar, (N, D) float32 on the CPU; no logvar (None) where nothing is sampled."""
    encoder = encoder.to(device, memory_format=torch.channels_last)
    images, (scale, shift) = images.to(device), normalization(mean, std, device)
    batches, outputs = torch.arange(len(images), device=device).split(batch_size), []
    for index in tqdm(batches, desc="encoding", leave=False, disable=None):
        batch = warp_batch(images, index, scale=scale, shift=shift, dtype=dtype)
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


def mlp_predictions(representation, index, labels, classes, passes, device, dtype):
    """Three layers, 2048-2048-classes (the paper's); sampled features are drawn anew in each epoch."""
    scaled = standardizer(representation.draw("train")[index])
    width = representation.mu["train"].shape[1]
    model = nn.Sequential(nn.Linear(width, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, classes))
    model, labels = model.to(device), labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=MLP_LR)
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


def vote_of_nearest(train, labels, queries, neighbours, pairs=KNN_PAIRS):
    """What KNeighborsClassifier predicts, on any device: train (N, D), labels (N,) from 0, queries (M, D) -> (M,). Of
    equally many votes the first class wins; which of equally near neighbours counts is left open, as there. pairs: how
    many distances are held at once."""
    classes = int(labels.max()) + 1
    last_to_first = torch.arange(classes - 1, -1, -1, device=train.device)
    norms, predicted = train.square().sum(1), []
    for part in queries.split(max(1, pairs // len(train))):
        distances = torch.addmm(norms, part, train.T, alpha=-2)  # squared, less what is the same for all neighbours
        nearest = labels[distances.topk(neighbours, largest=False).indices]
        votes = nn.functional.one_hot(nearest, classes).sum(1)
        predicted.append((votes * classes + last_to_first).argmax(1))
    return torch.cat(predicted)


def knn_predictions(representation, index, labels, passes, device):
    """scikit-learn's on the CPU; on a GPU the same, there."""
    train, neighbours = representation.draw("train")[index], min(NEIGHBOURS, len(index))
    model = KNeighborsClassifier(neighbours, algorithm="brute", n_jobs=-1)
    model.fit(train.numpy(), labels.numpy())
    train, labels = train.to(device), labels.to(device)
    for _ in range(passes):
        test = representation.draw("test")
        if device.type == "cpu":
            yield model.predict(test.numpy())
        else:
            yield vote_of_nearest(train, labels, test.to(device), neighbours).cpu().numpy()


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
        train, test = (encode(encoder, split, config["mean"], config["std"], device, dtype)
                       for split in (images, test_images))
        kinds = [None] if train[1] is None else ["sample", "mu"]
        return [Representation(name, method, kind, train, test) for kind in kinds]

    representations, untrained = [], {}
    for name, checkpoint, encoder in checkpoints:
        config = checkpoint["config"]
        representations += represent(name, checkpoint["method"], encoder, config)
        if config["encoder"] not in untrained or config.get("probabilistic", True):  # the rows of both kinds at once
            untrained[config["encoder"]] = config
    for kind, config in untrained.items():
        encoder = random_encoder(images, config, args.seed, device, dtype)
        representations += represent(None, f"random encoder ({kind})", encoder, config)
    pixels = [(split.flatten(1).float() / 255, None) for split in (images, test_images)]
    representations.append(Representation(None, "raw pixels", None, *pixels))

    rows = []
    work = [(c, r, size) for c in args.classifiers for r in representations for size in subsets]
    without_linear = {size: "one of each class leaves none to choose the L2 weight on" for size in subsets
                      if size == len(class_names)}
    too_large = [size for size in subsets if size * images[0].numel() > LINEAR_PIXELS]
    work = [(c, r, size) for c, r, size in work if c != "linear" or not (
        size in without_linear or (size in too_large and r is representations[-1]))]
    if "linear" in args.classifiers:
        notes += [f"linear, {size:,} labels: left out, {why}" for size, why in without_linear.items()]
        notes += [f"linear, {size:,} labels: raw pixels left out, whose fits would take long" for size in too_large]
    if not work:
        raise UserError(f"nothing is left to evaluate: {notes[-1]}; give larger --train-sizes", exit_code=2)
    errors_of_all = run_ahead((errors_of(classifier, representation, subsets[size], labels, test_labels, args.passes,
                                         args.seed, device, dtype, args.mean_per_class)
                               for classifier, representation, size in work), workers=os.cpu_count())
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
    Path(path).write_text("\n".join([*text, *(f"- {note}" for note in notes), ""]))


def write_json(rows, path):
    Path(path).write_text(json.dumps([{k: v for k, v in row.items() if k != "label"} for row in rows], indent=1) + "\n")


def parse_args():
    parser = Parser(description="Evaluate checkpoints on labels, beside a random encoder and raw pixels.",
                    epilog="example:\n  python probe.py pt.ckpt vte_ba.ckpt --train-sizes 5000 500 --json rows.json")
    add = parser.add_argument
    add("checkpoints", nargs="+", type=file_path, metavar="CKPT",
        help="data set, encoder and sizes come from the checkpoint")
    add("--classifiers", nargs="+", choices=list(NAMES), default=["mlp", "knn", "logistic"],
        help="default: VTE's three, mlp knn logistic; linear is STL's, 46 fits")
    add("--mean-per-class", action="store_true", help="error as the mean over classes, for test sets out of balance")
    add("--train-sizes", nargs="+", type=positive(int), default=[50000, 5000, 500], metavar="N",
        help="labelled images to train on; fewer is faster (default: 50000 5000 500)")
    add("--passes", type=positive(int), default=5, help="times z is sampled for the test images (default: 5)")
    add("--dataset", type=file_path, help="other data: digits, cifar10, stl10 or a folder (default: the checkpoint's)")
    add("--data-dir", type=file_path, default="data",
        help="where cifar10 and stl10 are downloaded to (default: %(default)s)")
    add("--seed", type=seed, default=0, help="of subsets, sampled z, MLP weights and the random encoder")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the encoder and the MLP")
    add("--json", type=file_path, metavar="FILE", help="also write the rows, as a list of objects")
    add("--markdown", type=file_path, metavar="FILE", help="also write the tables, as Markdown")
    return parser.parse_args()


def main():
    args = parse_args()
    for path, suffix in ((args.json, ".json"), (args.markdown, ".md")):
        if path and (Path(path).suffix != suffix or not os.access(Path(path).resolve().parent, os.W_OK)):
            raise UserError(f"cannot write '{path}': give a file that ends in {suffix}, in a folder that is there and "
                            "can be written to", exit_code=2)
    rows, notes = probe(args)
    if args.json:
        write_json(rows, args.json)
    if args.markdown:
        write_markdown(rows, notes, args.markdown)
    print_tables(rows, notes)


if __name__ == "__main__":
    run_command(main)
