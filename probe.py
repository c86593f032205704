"""Evaluates checkpoints on labels: an MLP, k-nearest neighbours and logistic regression on frozen features.

The protocol is VTE's (Sinaga, Basaruddin & Krisnadhi, ICPRAM 2022, section 4). Classifiers are trained on balanced
subsets of the training labels. A probabilistic encoder's z is sampled: each test image is classified `--passes` times.
The standard deviation is over these passes, and says nothing of training seeds.

    python probe.py pt.ckpt vte_ba.ckpt --train-sizes 5000 500 --json probe.json

Ours are the rows of mu in place of a sampled z, of an untrained encoder of the same architecture, and of raw pixels.
They make the others readable.

--classifiers linear is the protocol of STL (Yu et al., NeurIPS 2024) and of AugSelf (Lee et al., NeurIPS 2021): linear
classification by full-batch L-BFGS, its L2 weight chosen on a tenth of the labels, and a refit on all. finetuned trains
the encoder too. released is the MLP of the code that VTE's authors released, which for CIFAR-10 reads mu where the
paper says z.

    python probe.py stl.ckpt --transfer all --json transfer.json

is the row of STL's table of transfer, from the sets that are in --data-dir or can be downloaded to it. Splits are the
papers', but of Caltech101 and SUN397 ours. As in STL the error on pets, flowers102, caltech101 and aircraft is the mean
over classes.

What the papers do not state is in the constants below, and printed. equivariance.py asks checkpoints another question.
"""

import copy
import importlib.util
import json
import os
import shlex
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from common import (
    DRAWN,
    NAMED,
    TRANSFER,
    Parser,
    UserError,
    build_encoder,
    choose_device,
    choose_precision,
    export_encoder,
    image_side,
    keep_freed_memory,
    list_transfer,
    load_checkpoint,
    load_encoder,
    load_images,
    load_weights,
    number,
    positive_int,
    provenance,
    reparameterize,
    run_command,
    seed_int,
    write_atomically,
)
from minter_warp import normalization, sample_crops, warp_batch

MLP_EPOCHS, MLP_BATCH, MLP_LR = 30, 128, 1e-3  # Adam
RELEASED_BATCH, RELEASED_LR = 256, 0.05  # Adam too
NEIGHBOURS = 5  # the paper's
LOGISTIC_C, LOGISTIC_ITERATIONS = 1.0, 100  # the paper's 100 iterations of SAG; L2 weight 1 / C
LINEAR_WEIGHTS = np.logspace(-6, 5, 45)  # L2 weight beside the summed loss; each fit starts where the last one ended
LINEAR_ITERATIONS, LINEAR_GRADIENT, LINEAR_VALIDATION = 5000, 1e-4, 0.1  # the gradient's is ours: of any coordinate
PER_CLASS = ("pets", "flowers102", "caltech101", "aircraft")  # STL's errors there are means over classes
LINEAR_PIXELS = 10_000_000  # labels x dimensions; raw pixels beyond it are left out: 46 fits would take long
CALIBRATION_IMAGES, ENCODE_PIXELS = 2048, 500 * 32**2  # pixels of a batch
LARGEST_FEATURE = 1e17  # whose square float32 can still sum
CLASSIFIERS = {
    "mlp": ("MLP", f"2048-2048-classes, Adam {MLP_LR:g}, batch {MLP_BATCH}, standardised features"),
    "knn": ("k-NN", f"K = {NEIGHBOURS}, uniform weights, Euclidean distance, unscaled features"),
    "logistic": ("logistic regression", f"SAG, {LOGISTIC_ITERATIONS} iterations, L2 with C = {LOGISTIC_C:g}, "
                                        "standardised features"),
    "linear": ("linear, L2 weight chosen", f"L-BFGS, at most {LINEAR_ITERATIONS:,} iterations, until no gradient is "
               f"above {LINEAR_GRADIENT:g}, unscaled features, summed loss, L2 weight (of the bias too) of "
               f"{len(LINEAR_WEIGHTS)} from {LINEAR_WEIGHTS[0]:g} to {LINEAR_WEIGHTS[-1]:g} chosen on "
               f"{LINEAR_VALIDATION:.0%} of the labels, refit on all"),
    "finetuned": ("MLP, encoder trained too", "an MLP on mu and the encoder, from where the checkpoint left it, Adam, "
                  f"one cycle to {MLP_LR:g}, batch {MLP_BATCH}, crops and flips"),
    "released": ("MLP of the released code", f"200-200-classes with batch normalisation on mu, Adam {RELEASED_LR:g}, "
                 f"batch {RELEASED_BATCH}, crops and flips"),
}
FEATURES = {
    "sample": ("z sampled", "drawn from N(mu, sigma²)"),
    "mu": ("mu", "the mean of z"),
    "trunk": ("before mu", "what the encoder computes mu from"),
    "map2": ("map, 2 x 2", "NIN's last map of 192 channels, averaged to 2 x 2"),
    "map4": ("map, 4 x 4", "the same, averaged to 4 x 4"),
}


# ------------------------------------------------------------------------------------------------------- features


class Representation:
    """The features of one row: mu (N, D) and log-variance (N, D) or None, of training and of test images.

    features: sample, mu, trunk, or None where there is no choice. network: what `finetuned` trains, (encoder, config,
    training images, test images). Raises UserError where features are not finite."""

    def __init__(self, checkpoint, method, features, train, test, network=None):
        self.checkpoint, self.method, self.features, self.network = checkpoint, method, features, network
        self.mu, self.logvar = {"train": train[0], "test": test[0]}, {"train": train[1], "test": test[1]}
        self.sampled = features == "sample"
        if not all(bool((self.draw(split).abs() < LARGEST_FEATURE).all()) for split in ("train", "test")):  # nor NaN
            raise UserError(f"the features of {checkpoint or method} are not finite, or above {LARGEST_FEATURE:g}: its "
                            "weights are broken")

    def draw(self, split):
        mu, logvar = self.mu[split], self.logvar[split]
        return reparameterize(mu, logvar) if self.sampled else mu


def encode_batch(size):
    """How many images of this side are encoded at once: 500 of 32 pixels, fewer of larger ones."""
    return min(500, max(2, ENCODE_PIXELS // size**2))


@torch.no_grad()
def encode(encoder, images, mean, std, device, dtype, batch_size=None, index=None, apply=None):
    """Images (M, 3, S, S) uint8 -> mu, logvar, (N, D) float32 on the CPU; logvar is None of a deterministic encoder.

    index: (N,) which images, all by default. apply: transforms a batch of them (see `equivariance.draw_projective`).
    """
    encoder = encoder.to(device, memory_format=torch.channels_last)
    images, (scale, shift) = images.to(device), normalization(mean, std, device)
    index, outputs = torch.arange(len(images)) if index is None else index, []
    batch_size = batch_size or encode_batch(images.shape[-1])
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


def calibrated(encoder, images, config, device, dtype):
    """The encoder in eval mode, its batch normalisation with the statistics of (up to 2,048) images."""
    encoder = encoder.to(device, memory_format=torch.channels_last)
    images, normal = images[:CALIBRATION_IMAGES].to(device), normalization(config["mean"], config["std"], device)
    parts = torch.arange(len(images), device=device).split(encode_batch(images.shape[-1]))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        update_bn((warp_batch(images, part, scale=normal[0], shift=normal[1], dtype=dtype)
                   for part in parts if len(part) > 1), encoder)  # batch normalisation takes no batch of one image
    return encoder.eval()


def random_encoder(images, config, seed, device, dtype):
    """An untrained encoder, calibrated on training images."""
    torch.manual_seed(seed)
    encoder = build_encoder(config["encoder"], config["image_size"], config.get("probabilistic", True))
    return calibrated(encoder, images, config, device, dtype)


# Encoders that are not minTER's: torchvision:NAME, torchvision:NAME:WEIGHTS, timm:NAME, timm:NAME:pretrained, and
# FILE.py:FUNCTION, which returns a module. Without weights they are untrained. A file WEIGHTS.pt after one of these, a
# state dict, is loaded into it.


def is_foreign(name):
    return name.startswith(("torchvision:", "timm:")) or ".py:" in name


def load_foreign(name, weights, image_size, mean, std):
    """What a checkpoint and its encoder are, of an encoder that is not minTER's: features before the classifier, which
    is the last linear layer of torchvision's models. image_size, mean, std: None for what the library says. Raises
    UserError, also unless the features are (N, D)."""
    source, _, rest = name.rpartition(".py:") if ".py:" in name else name.partition(":")
    kind, _, pretrained = rest.partition(":")
    head = None
    try:
        if source == "torchvision":
            from torchvision import models

            encoder, known = models.get_model(kind, weights=pretrained or None), models.get_model_weights(kind)
            head = [layer for layer, module in encoder.named_modules() if isinstance(module, nn.Linear)][-1]
            parent, _, last = head.rpartition(".")
            setattr(encoder.get_submodule(parent), last, nn.Identity())
            about = known[pretrained or "DEFAULT"].transforms()
            theirs = about.crop_size[0], about.mean, about.std
        elif source == "timm":
            import timm

            encoder = timm.create_model(kind, pretrained=bool(pretrained), num_classes=0)
            about = timm.data.resolve_model_data_config(encoder)
            theirs = about["input_size"][-1], about["mean"], about["std"]
        else:
            spec = importlib.util.spec_from_file_location(Path(source).name, f"{source}.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            encoder, theirs = getattr(module, kind)(), (None, None, None)
        if weights is not None:
            if not Path(weights).is_file():
                raise UserError(f"there is no file '{weights}'")
            try:
                state = dict(torch.load(weights, map_location="cpu", weights_only=True))
            except Exception as error:
                raise UserError(f"'{weights}' holds no state dict of tensors that can be read") from error
            state = {key: value for key, value in state.items() if head is None or not key.startswith(f"{head}.")}
            load_weights(encoder, state, weights)
        size, mean, std = (given or found for given, found in zip((image_size, mean, std), theirs, strict=True))
        if None in (size, mean, std):
            raise UserError(f"{name} does not say what images it takes: give --image-size, --mean and --std", 2)
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(2, 3, size, size))
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{name} takes a package that is not here: pip install {error.name}", exit_code=2) from error
    except (Exception, SystemExit) as error:  # whatever is wrong in the code, the network or the weights of others
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"{name} cannot be loaded and run ({type(error).__name__}: {reason[:200]})") from error
    if not isinstance(features, torch.Tensor) or features.dim() != 2 or len(features) != 2 or not features.numel() \
            or not features.is_floating_point():
        found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise UserError(f"{name} returns {found} of 2 images: features (N, D), a tensor, are needed")
    config = {"encoder": "nin" if size <= 64 else "resnet18", "probabilistic": False,  # beside it, untrained
              "image_size": size, "mean": mean, "std": std, "dataset": None}
    return {"method": kind, "config": config, "model": None, "encoder": None}, encoder


def load_checkpoints(args):
    """[(short name, path, checkpoint, encoder)] of the arguments, and the data set to evaluate on. Raises UserError
    where they do not fit each other, or their data set is not to be found."""
    given, loaded = [], []
    for path in args.checkpoints:
        if given and is_foreign(given[-1][0]) and Path(path).suffix in (".pt", ".pth"):
            given[-1] = given[-1][0], path
        else:
            given.append((path, None))
    names = [" ".join(Path(part).name for part in parts if part) for parts in given]
    names = names if len(set(names)) == len(names) else [" ".join(filter(None, parts)) for parts in given]
    if len(set(names)) < len(names):
        raise UserError(f"'{max(names, key=names.count)}' is given twice", exit_code=2)
    for name, (path, weights) in zip(names, given, strict=True):
        if is_foreign(path):
            torch.manual_seed(args.seed)  # of weights, where it is untrained
            one = load_foreign(path, weights, args.image_size, args.mean, args.std)
        else:
            checkpoint = load_checkpoint(path)
            one = checkpoint, load_encoder(checkpoint, path)
        loaded.append((name, path, *one))
    configs = [checkpoint["config"] for _, _, checkpoint, _ in loaded]
    for name, flag in (("dataset", "--dataset"), ("image_size", None)):
        values = sorted({str(config[name]) for config in configs if config[name]})
        if len(values) > 1 and not (flag and args.dataset):
            raise UserError(f"the checkpoints differ in {name} ({', '.join(values)}): evaluate them one by one"
                            + (f", or all of them on what {flag} names" if flag else ""), exit_code=2)
    theirs, path = next(((config["dataset"], path) for config, (path, _) in zip(configs, given, strict=True)
                         if config["dataset"]), ("", given[0][0]))
    if not (args.dataset or theirs):
        raise UserError(f"{path} names no data: --dataset gives the images to evaluate on", exit_code=2)
    if not (args.dataset or theirs in NAMED or Path(theirs).is_dir()):
        raise UserError(f"there is no folder '{theirs}' here, which is where the data lay when '{path}' was "
                        "trained: --dataset DIR gives another", exit_code=2)
    return loaded, args.dataset or theirs


def architectures(checkpoints):
    """{encoder: a config that has it}, with a log-variance if one has: then its rows are of both kinds at once."""
    found = {}
    for _, _, checkpoint, _ in checkpoints:
        config = checkpoint["config"]
        if config["encoder"] not in found or config.get("probabilistic", True):
            found[config["encoder"]] = config
    return found


# ---------------------------------------------------------------------------------------------------- classifiers


class Settings(NamedTuple):
    passes: int  # times z is sampled for the test images
    seed: int
    device: torch.device
    dtype: torch.dtype  # what autocast computes in
    per_class: bool = False  # the error is the mean over classes
    epochs: int = MLP_EPOCHS  # of the MLPs
    validation: float | torch.Tensor = LINEAR_VALIDATION  # the share, or (N,) bool, of the training images


def standardizer(features):
    """Mean 0 and variance 1 in each dimension, measured on the training features."""
    mean, std = features.mean(0), features.std(0)
    std = torch.where(std > 0, std, 1.0)
    return lambda values: (values - mean) / std


def mlp(representation, labels):
    """Three layers, 2048-2048-classes: the paper's."""
    width, classes = representation.mu["train"].shape[1], int(labels.max()) + 1
    return nn.Sequential(nn.Linear(width, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, classes))


def mlp_predictions(representation, index, labels, settings):
    """Each epoch draws sampled features again."""
    device, dtype = settings.device, settings.dtype
    scaled = standardizer(representation.draw("train")[index])
    model, labels = mlp(representation, labels).to(device), labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=MLP_LR, fused=True)
    for _ in tqdm(range(settings.epochs), desc=f"MLP, {len(index):,} labels", leave=False, disable=None):
        features = scaled(representation.draw("train")[index]).to(device)
        for batch in torch.randperm(len(index)).to(device).split(MLP_BATCH):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(features[batch])
            loss = nn.functional.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return [model(scaled(representation.draw("test")).to(device)).argmax(1).cpu().numpy()
                for _ in range(settings.passes)]


def predictions_on_images(representation, index, labels, settings, head, batch_size, lr, finetuned):
    """An MLP on mu of the training images, cropped and flipped as in pretraining, and, finetuned, a copy of the encoder
    from where the checkpoint left it, which then learn together under one cycle of the learning rate."""
    device, dtype = settings.device, settings.dtype
    encoder, config, images, test_images = representation.network
    head, encoder = head.to(device), copy.deepcopy(encoder).to(device).requires_grad_(finetuned)
    images, test_images, labels = images[index].to(device), test_images.to(device), labels.to(device)
    size, (scale, shift) = images.shape[-1], normalization(config["mean"], config["std"], device)
    trained = [*head.parameters(), *(encoder.parameters() if finetuned else [])]
    optimizer = torch.optim.Adam(trained, lr=lr, fused=True)
    steps = settings.epochs * -(-len(index) // batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, cycle_momentum=False) if finetuned else None

    def logits(batch, training):
        encoder.train(training and finetuned)
        head.train(training)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = encoder(batch)
            return head(output[0] if isinstance(output, tuple) else output).float()

    for _ in tqdm(range(settings.epochs), desc=f"on images, {len(index):,} labels", leave=False, disable=None):
        crops = sample_crops(len(index), size).to(device)
        for chosen in torch.randperm(len(index)).to(device).split(batch_size):
            batch = warp_batch(images, chosen, crops[chosen], None, scale, shift, dtype)
            loss = nn.functional.cross_entropy(logits(batch, len(chosen) > 1), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if cycle:
                cycle.step()
    with torch.no_grad():
        parts = torch.arange(len(test_images), device=device).split(encode_batch(size))
        return [torch.cat([logits(warp_batch(test_images, part, scale=scale, shift=shift, dtype=dtype), False).argmax(1)
                           for part in parts]).cpu().numpy()]


def finetuned_predictions(representation, index, labels, settings):
    """What frozen features are compared with."""
    return predictions_on_images(representation, index, labels, settings, mlp(representation, labels), MLP_BATCH,
                                 MLP_LR, finetuned=True)


def released_predictions(representation, index, labels, settings):
    """The classifier of the code that VTE's authors released for CIFAR-10; all labels are learned from."""
    width, classes = representation.mu["train"].shape[1], int(labels.max()) + 1
    head = nn.Sequential(nn.Linear(width, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, 200),
                         nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, classes))
    return predictions_on_images(representation, index, labels, settings, head, RELEASED_BATCH, RELEASED_LR,
                                 finetuned=False)


def knn_predictions(representation, index, labels, settings):
    train, neighbours = representation.draw("train")[index], min(NEIGHBOURS, len(index))
    model = KNeighborsClassifier(neighbours, algorithm="brute", n_jobs=-1).fit(train.numpy(), labels.numpy())
    return [model.predict(representation.draw("test").numpy()) for _ in range(settings.passes)]


def logistic_predictions(representation, index, labels, settings):
    """Draws the features now and returns a function that fits and predicts, so that several fits can run at once."""
    train = representation.draw("train")[index]
    tests = [representation.draw("test") for _ in range(settings.passes)]

    def fit_and_predict():
        scaled = standardizer(train)
        model = LogisticRegression(solver="sag", C=LOGISTIC_C, max_iter=LOGISTIC_ITERATIONS,
                                   random_state=settings.seed)
        model.fit(scaled(train).numpy(), labels.numpy())
        return [model.predict(scaled(test).numpy()) for test in tests]

    return fit_and_predict


def hold_out(labels, share, seed):
    """(N,) bool: the share of each class of (N,) labels, one at least, that chooses the L2 weight; none of a class of
    one image."""
    labels, held_out = labels.numpy(), torch.zeros(len(labels), dtype=torch.bool)
    several = np.flatnonzero(np.bincount(labels)[labels] > 1)
    size = max(len(np.unique(labels[several])), round(share * len(several)))
    held_out[train_test_split(several, test_size=size, stratify=labels[several], random_state=seed)[1]] = True
    return held_out


def fit_linear(weights, features, labels, strength, curvature):
    """Minimises the summed cross-entropy + strength |weights|² from weights (C, D) on, and returns them; features
    (N, D), float64. L-BFGS moves each column in units of (curvature (D,) + 2 strength)^-1/2: the minimum is the same,
    reached in a tenth of the iterations."""
    columns, unit = features.T.contiguous(), (curvature + 2 * strength).rsqrt()  # (D, N): products twice as fast
    scaled = (weights / unit).requires_grad_()
    optimizer = torch.optim.LBFGS([scaled], max_iter=LINEAR_ITERATIONS, tolerance_grad=LINEAR_GRADIENT, history_size=30,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        weights = scaled * unit
        value = nn.functional.cross_entropy((weights @ columns).T, labels, reduction="sum")
        value = value + strength * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (scaled * unit).detach()


def linear_predictions(representation, index, labels, settings):
    """STL's and AugSelf's, on the features as they are; of ties the weakest weight. It is done in the right singular
    vectors of the training features beside a column of ones: neither the penalty nor the minimum changes by that."""
    def augmented(features):
        return nn.functional.pad(features.to(settings.device, torch.float64), (0, 1), value=1.0)

    present, labels = labels.unique(return_inverse=True)
    share = settings.validation
    held_out = share[index] if torch.is_tensor(share) else hold_out(labels, share, settings.seed)
    if held_out.all() or not held_out.any():  # a subset may lack one of the two
        held_out = hold_out(labels, LINEAR_VALIDATION, settings.seed)
    features, labels = augmented(representation.draw("train")[index]), labels.to(settings.device)
    held_out = held_out.to(settings.device)
    _, singular_values, basis = torch.linalg.svd(features, full_matrices=False)
    features, curvature = features @ basis.T, singular_values**2 / len(present)  # of the loss at zero, about
    weights, fewest = features.new_zeros(len(present), features.shape[1]), np.inf
    for strength in tqdm(LINEAR_WEIGHTS.tolist(), desc=f"linear, {len(index):,} labels", leave=False, disable=None):
        weights = fit_linear(weights, features[~held_out], labels[~held_out], strength, curvature)
        wrong = error_rate((features[held_out] @ weights.T).argmax(1).cpu().numpy(), labels[held_out].cpu().numpy(),
                           settings.per_class)
        if wrong < fewest:
            best, fewest = (strength, weights), wrong
    strength, weights = best
    weights = fit_linear(weights, features, labels, strength, curvature)
    return [present[(augmented(representation.draw("test")) @ basis.T @ weights.T).argmax(1).cpu()].numpy()
            for _ in range(settings.passes)]


PREDICTIONS = {"mlp": mlp_predictions, "knn": knn_predictions, "logistic": logistic_predictions,
               "linear": linear_predictions, "finetuned": finetuned_predictions,
               "released": released_predictions}
MLPS = ("mlp", "finetuned", "released")


def error_rate(predicted, labels, per_class):
    """The share of wrong predictions, of all images or, per_class, as the mean over the classes' own."""
    wrong = predicted != labels
    return float(np.mean([wrong[labels == label].mean() for label in np.unique(labels)] if per_class else wrong))


def errors_of(classifier, representation, index, train_labels, test_labels, settings):
    """A function that returns the error rate of each pass over the test images; one pass where nothing is sampled. All
    is done when this returns, but for logistic fits, which the function does: several can run at once."""
    torch.manual_seed(settings.seed)  # a row does not depend on the rows above it
    if not representation.sampled:
        settings = settings._replace(passes=1)
    predictions = PREDICTIONS[classifier](representation, index, train_labels[index], settings)

    def errors():
        of_passes = predictions() if callable(predictions) else predictions
        return [error_rate(predicted, test_labels.numpy(), settings.per_class) for predicted in of_passes]

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


# ------------------------------------------------------------------------------------------------------ the probe


def balanced_subset(labels, n, seed):
    """Indices of n images with equally many of each class (the first classes one more where n does not divide), or None
    where the labels cannot give them or n is less than one a class. A seed's smaller subsets lie within its larger."""
    if n == len(labels):
        return torch.arange(n)
    classes = labels.unique().tolist()  # without those that no image has
    if n < len(classes):
        return None
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shares = [n // len(classes) + (number < n % len(classes)) for number in range(len(classes))]
    chosen = [order[labels[order] == label][:share] for label, share in zip(classes, shares, strict=True)]
    return torch.cat(chosen) if sum(map(len, chosen)) == n else None


def choose_subsets(labels, sizes, seed, dataset):
    """{size: indices} for the sizes that the labels can give, and a note on each that they cannot."""
    subsets = {size: balanced_subset(labels, size, seed) for size in sorted(set(sizes), reverse=True)}
    notes = [f"{size:,} labels are left out: {dataset} has not so many in equal shares of its classes"
             for size, subset in subsets.items() if subset is None]
    subsets = {size: subset for size, subset in subsets.items() if subset is not None}
    classes = len(labels.unique())
    if sizes and max(sizes) < classes:
        raise UserError(f"--train-sizes {max(sizes)} is less than an image for each of the {classes} classes of "
                        f"{dataset}: give larger ones", exit_code=2)
    if not subsets:
        subsets = {len(labels): torch.arange(len(labels))}
        notes += [f"all {len(labels):,} training images are used instead"] if sizes else []
    return subsets, notes


def load_splits(args, checkpoints, dataset):
    """`Images` to train and to test on, what validates (see `Settings`), and a note on it. Raises UserError."""
    size = checkpoints[0][2]["config"]["image_size"]
    train, test = (load_images(dataset, split, args.data_dir, size) for split in ("train", "test"))
    if dataset in NAMED or dataset not in TRANSFER or Path(dataset).is_dir():
        return train, test, LINEAR_VALIDATION, []
    n, validation = len(train.labels), TRANSFER[dataset][1]
    share = f"{validation:.1%} of them" if validation else "its own validation split"
    if validation is None:
        validation = torch.arange(n) >= n - len(list_transfer(dataset, "val", args.data_dir)[0])
    ours = "; both are drawn with seed 0, as it has no splits" if dataset in DRAWN else ""
    return train, test, validation, [f"{dataset}: {n:,} training images, the L2 weight of linear chosen on {share}; "
                                     f"{len(test.labels):,} test images{ours}"]


def probe(args, device):
    """Returns rows, dicts that --json writes, tables, and the notes to print under them."""
    checkpoints, dataset = load_checkpoints(args)
    return evaluate(args, device, checkpoints, dataset, *load_splits(args, checkpoints, dataset))


def transfer(args, device):
    """What `probe` returns, of all of --transfer, as STL's table has it. What is not to be had is left out."""
    checkpoints, _ = load_checkpoints(args)
    rows, notes, left_out = [], [], []
    for name in dict.fromkeys(TRANSFER if "all" in args.transfer else args.transfer):
        try:
            if name not in NAMED and Path(name).is_dir():
                raise UserError(f"the folder '{name}' that is here has its name")
            of_set, _, about = evaluate(args, device, checkpoints, name, *load_splits(args, checkpoints, name))
        except UserError as error:
            left_out.append(f"{name} is left out: {error}")
            continue
        rows, notes = rows + of_set, notes + about
    if not rows:
        raise UserError("; ".join(left_out))
    errors = {}
    for row in rows:
        errors.setdefault(row_label(row), []).append(row["error_mean"])
    lines = [[*label, *(f"{error:.3f}" for error in [*of, np.mean(of)])] for label, of in errors.items()]
    headings = ["error, by data set", "features", *dict.fromkeys(row["dataset"] for row in rows), "mean"]
    return rows, [Table("linear, transfer", headings, lines)], [*dict.fromkeys(notes), *left_out]


def evaluate(args, device, checkpoints, dataset, train, test, validation, about_data):
    """What `probe` returns, of one data set, as `load_splits` has it."""
    dtype = choose_precision(args.precision, device)
    print(f"{dataset}: encoding, then fitting {', '.join(args.classifiers)}", flush=True)  # then minutes of silence
    per_class = args.mean_per_class or bool(about_data and dataset in PER_CLASS)
    present = train.labels.unique().tolist()
    if len(present) < 2:
        raise UserError(f"'{dataset}' has one class, so nothing to classify: evaluate on other data with --dataset")
    subsets, notes = choose_subsets(train.labels, args.train_sizes, args.seed, dataset)
    notes = about_data + notes
    absent = [name for label, name in enumerate(train.classes) if label not in present]
    if absent:
        lost = int((~torch.isin(test.labels, torch.tensor(present))).sum())
        notes.append(f"no training image is of {', '.join(absent)}: left out of chance and of balanced subsets"
                     + (f", and its test images, {lost:,}, count as errors" if lost else ""))
    used, positions = torch.cat(list(subsets.values())).unique(return_inverse=True)  # encode no image without need
    images, labels = train.images[used], train.labels[used]
    validation = validation[used] if torch.is_tensor(validation) else validation
    subsets = dict(zip(subsets, positions.split([len(subset) for subset in subsets.values()]), strict=True))

    def represent(name, method, encoder, config):
        def encoded(part):
            return [encode(part, split, config["mean"], config["std"], device, dtype)
                    for split in (images, test.images)]

        splits = encoded(encoder)
        kinds = [None] if splits[0][1] is None else [kind for kind in ("sample", "mu") if kind in args.features]
        network = encoder, config, images, test.images
        found = [Representation(name, method, kind, *splits, network) for kind in kinds]
        if "trunk" in args.features and hasattr(encoder, "mu"):  # a ResNet's features are its trunk's
            found.append(Representation(name, method, "trunk", *encoded(encoder.trunk)))
        for kind, side in (("map2", 2), ("map4", 4)):
            if kind in args.features and hasattr(encoder, "map_layers"):
                part = nn.Sequential(encoder.trunk[: encoder.map_layers], nn.AdaptiveAvgPool2d(side), nn.Flatten())
                found.append(Representation(name, method, kind, *encoded(part)))
        return found

    representations = []
    for name, _, checkpoint, encoder in checkpoints if args.rows != "baselines" else []:
        method, config = checkpoint["method"], checkpoint["config"]
        representations += represent(name, method, encoder, config)
        if args.calibrated:
            encoder = calibrated(copy.deepcopy(encoder), images, config, device, dtype)  # the row above has the other
            representations += represent(name, f"{method}, calibrated", encoder, config)
    if args.rows != "checkpoints":
        for kind, config in architectures(checkpoints).items():
            encoder = random_encoder(images, config, args.seed, device, dtype)
            representations += represent(None, f"random encoder ({kind})", encoder, config)
        if not args.transfer:
            pixels = [(split.flatten(1).float() / 255, None) for split in (images, test.images)]
            representations.append(Representation(None, "raw pixels", None, *pixels))

    too_few = [size for size in subsets if size == len(present)]
    too_many = [size for size in subsets if size * images[0].numel() > LINEAR_PIXELS and not args.transfer]

    def applies(classifier, representation, size):
        if classifier in ("finetuned", "released"):  # one row an encoder
            return representation.network is not None and not representation.sampled
        slow = size in too_many and representation.method == "raw pixels"
        return classifier != "linear" or not (size in too_few or slow)

    work = [(classifier, representation, size) for classifier in args.classifiers for representation in representations
            for size in subsets if applies(classifier, representation, size)]
    if "linear" in args.classifiers:
        notes += [f"linear, {size:,} labels: left out, one of each class leaves none to choose the L2 weight on"
                  for size in too_few]
        notes += [f"linear, {size:,} labels: raw pixels left out, whose fits would take long" for size in too_many]
    if not work:
        mu = "finetuned and released take mu, which --features leaves out"
        why = f"{notes[-1]}; give larger --train-sizes" if notes else mu
        raise UserError(f"nothing is left to evaluate: {why}", exit_code=2)
    settings = Settings(args.passes, args.seed, device, dtype, per_class, args.epochs, validation)
    errors_of_all = run_ahead((errors_of(classifier, representation, subsets[size], labels, test.labels, settings)
                               for classifier, representation, size in work), workers=torch.get_num_threads())
    warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are the protocols'
    progress = tqdm(errors_of_all, desc="classifiers", total=len(work), leave=False, disable=None)
    rows = [{"checkpoint": representation.checkpoint, "method": representation.method,
             "features": representation.features, "classifier": classifier, "train_size": size,
             "error_mean": float(np.mean(errors)),
             "error_std": float(np.std(errors, ddof=1)) if len(errors) > 1 else 0.0,
             "passes": len(errors), "seed": args.seed, "dataset": dataset, "mean_per_class": per_class}
            for (classifier, representation, size), errors in zip(work, progress, strict=True)]

    kind = ", the mean over classes," if per_class else ""
    about = [f"numbers are error rates{kind} on the {len(test.labels):,} test images of {dataset}; chance is "
             f"{1 - 1 / len(present):.3f}; seed {args.seed}", *explain_features(rows)]
    if any(row["features"] == "sample" for row in rows):
        about.append(f"±: the standard deviation over {args.passes} passes, each with another z")
    about += [": ".join(CLASSIFIERS[classifier]) + f", {args.epochs} epochs" * (classifier in MLPS)
              for classifier in dict.fromkeys(row["classifier"] for row in rows)]
    return rows, make_tables(rows), [*about, *notes]


# --------------------------------------------------------------------------------------------------- what is shown


class Table(NamedTuple):
    """Text: the headings of all columns, and lines of as many cells, "" where there is nothing."""

    title: str
    headings: list
    lines: list


def row_label(row):
    """(name, features): what the line of a row begins with. Retrieval by a map that a method has learned (see
    `equivariance.LEARNED_MAPS`) has a line to itself."""
    name = f"{row['method']} ({row['checkpoint']})" if row["checkpoint"] else row["method"]
    if row.get("map", "ridge") != "ridge":
        name = f"{name}: its {row['map']}"
    return name, FEATURES.get(row["features"], [row["features"] or ""])[0]


def explain_features(rows):
    shown = {row["features"] for row in rows}
    return [f"{name}: {what}" for kind, (name, what) in FEATURES.items() if kind in shown]


def make_tables(rows):
    """The layout of VTE's Tables 1-3: one `Table` a classifier, one column a number of training labels."""
    sizes, tables = sorted({row["train_size"] for row in rows}, reverse=True), []
    for classifier in dict.fromkeys(row["classifier"] for row in rows):
        cells = {}
        for row in (row for row in rows if row["classifier"] == classifier):
            deviation = f" ± {row['error_std']:.3f}" if row["passes"] > 1 else ""
            cells.setdefault(row_label(row), {})[row["train_size"]] = f"{row['error_mean']:.3f}{deviation}"
        headings = ["error, by training labels", "features", *(f"{size:,}" for size in sizes)]
        lines = [[*label, *(of.get(size, "") for size in sizes)] for label, of in cells.items()]
        tables.append(Table(CLASSIFIERS[classifier][0], headings, lines))
    return tables


def table_lines(table):
    """Markdown, its columns under each other."""
    rows = [table.headings, *table.lines]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in rows]


def print_tables(tables, notes):
    """Markdown that can also be read as it is."""
    for table in tables:
        print(f"\n{table.title}\n", *table_lines(table), sep="\n")
    print("", *(f"- {note}" for note in notes), sep="\n")


JSON_VERSION = 1  # of what EQUIVARIANCE.md describes; a field that changes its meaning raises it


def write_json(rows, path, made_with):
    """made_with: what `provenance` returns, and the seconds it took. One row a line."""
    lines = ",\n".join(map(json.dumps, rows))
    text = f'{{"version": {JSON_VERSION}, "made_with": {json.dumps(made_with)},\n"rows": [\n{lines}\n]}}\n'
    write_atomically(path, lambda file: file.write(text.encode()))


def read_rows(path):
    """The rows that `write_json` wrote, or in the older form, a bare list. Raises UserError."""
    try:
        content = json.loads(Path(path).read_text())
        rows = content["rows"] if isinstance(content, dict) else content
        for row in rows:
            row["method"], row["checkpoint"], row["features"]
        return rows
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"'{path}' is no file that --json of probe.py or equivariance.py wrote") from error


# --------------------------------------------------------------------------------------------------- command line


def evaluation_parser(description, example):
    """The flags of all evaluations of checkpoints."""
    parser = Parser(description=description, epilog=f"example:\n  {example}")
    add = parser.add_argument_group("what to evaluate").add_argument
    add("checkpoints", nargs="+", metavar="ENCODER",
        help="a checkpoint; or torchvision:NAME, timm:NAME or FILE.py:FUNCTION, whose features are (N, D), untrained "
        "unless a file WEIGHTS.pt follows, or torchvision:NAME:DEFAULT or timm:NAME:pretrained ask for weights")
    add("--dataset", help="other data: digits, stl10, what --transfer names, or a folder (default: the checkpoint's)")
    add("--data-dir", default="data", help="for what is downloaded, and for decoded folders")
    add("--image-size", type=image_side, help="of encoders that are no checkpoints (default: the library's)")
    add("--mean", nargs=3, type=number(float, 0, 1), metavar=tuple("RGB"),
        help="of each channel of images in [0, 1], for encoders that are no checkpoints (default: the library's)")
    add("--std", nargs=3, type=number(float, 0.001, 1), metavar=tuple("RGB"),
        help="the same of the standard deviation (default: the library's)")
    add("--rows", choices=["all", "checkpoints", "baselines"], default="all",
        help="baselines: the random encoder and raw pixels alone, for studies that make them once")
    add("--seed", type=seed_int, default=0, help="of subsets, transformations, sampled z, MLP, untrained encoders")
    add = parser.add_argument_group("where").add_argument
    add("--json", metavar="FILE", help="also write the rows, and what they were made with")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the encoder and the MLP")
    return parser


def run_evaluation(args, evaluate):
    """evaluate(args, device) -> rows (dicts for --json), tables, notes. Writes and prints them."""
    if args.json:  # before the measurement, not after
        if Path(args.json).suffix != ".json" or not os.access(Path(args.json).resolve().parent, os.W_OK):
            raise UserError(f"cannot write '{args.json}': give a file that ends in .json, in a folder that is there "
                            "and can be written to", exit_code=2)
        if Path(args.json).exists():  # only what a run of this kind wrote may be written over
            read_rows(args.json)
    keep_freed_memory()
    start, device = time.perf_counter(), choose_device(args.device)
    rows, tables, notes = evaluate(args, device)
    if args.json:
        write_json(rows, args.json, {**provenance(device), "seconds": round(time.perf_counter() - start, 1)})
    print_tables(tables, notes)


def parse_args():
    parser = evaluation_parser("Evaluate checkpoints on labels, beside a random encoder and raw pixels.",
                               "python probe.py pt.ckpt vte_ba.ckpt --train-sizes 5000 500 --json rows.json")
    add = parser.add_argument_group("labels").add_argument
    add("--transfer", nargs="+", choices=["all", *TRANSFER], metavar="SET",
        help="STL's table of transfer: linear, with all labels of these, of "
        f"{', '.join(TRANSFER)}; all is tens of gigabytes to download (default: none)")
    add("--classifiers", nargs="+", choices=list(CLASSIFIERS),
        help="linear is STL's, 46 fits; finetuned trains the encoder too; released is the MLP of VTE's code (default: "
        "VTE's three, mlp knn logistic)")
    add("--epochs", type=positive_int, default=MLP_EPOCHS, help="of mlp, finetuned and released")
    add("--train-sizes", nargs="+", type=positive_int, metavar="N",
        help="labelled images to train on; fewer is faster (default: 50000 5000 500)")
    add("--features", nargs="+", choices=list(FEATURES),
        help="of encoders with mu and sigma: z sampled, mu, what both are computed from, or maps (default: sample mu)")
    add("--calibrated", action="store_true", help="also rows whose batch normalisation has the statistics of training "
        "images as they are, in place of pretraining's crops and transformed ones")
    add("--passes", type=positive_int, default=5, help="times z is sampled for the test images")
    add("--mean-per-class", action="store_true", help="error as the mean over classes, for test sets out of balance")
    add("--export", metavar="FILE", help="no evaluation: write the checkpoint's encoder alone, as FILE.safetensors; "
        "--precision bf16 halves it")
    if "--equivariance" in sys.argv:
        rest = [flag for flag in sys.argv[1:] if flag != "--equivariance"]
        raise UserError(f"--equivariance has become a command: python equivariance.py {shlex.join(rest)}", exit_code=2)
    args = parser.parse_args()
    if args.transfer:
        if args.dataset or args.classifiers or args.train_sizes:
            raise UserError("--transfer has data and a protocol of its own: leave out --dataset, --classifiers and "
                            "--train-sizes", exit_code=2)
        args.dataset, args.classifiers, args.train_sizes = "cifar10", ["linear"], []
    else:
        args.classifiers = args.classifiers or ["mlp", "knn", "logistic"]
        args.train_sizes = args.train_sizes or [50000, 5000, 500]
    args.features = args.features or ["sample", "mu"]
    return args


def export(args):
    """Writes the encoder of one checkpoint."""
    if len(args.checkpoints) > 1 or Path(args.export).suffix != ".safetensors" or Path(args.export).exists():
        raise UserError(f"--export '{args.export}' takes one checkpoint, and a new file that ends in .safetensors", 2)
    checkpoint = load_checkpoint(args.checkpoints[0])
    load_encoder(checkpoint, args.checkpoints[0])  # checks its weights
    export_encoder(checkpoint, args.export, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    print(f"wrote {args.export}, {Path(args.export).stat().st_size / 1e6:.1f} MB: the encoder of {args.checkpoints[0]}")


def main():
    args = parse_args()
    if args.export is not None:
        export(args)
    else:
        run_evaluation(args, transfer if args.transfer else probe)


if __name__ == "__main__":
    run_command(main)
