"""What every method shares: encoders, data, processes, the command line, the training run, checkpoints.

Nothing here knows a method. Copy this file and the folder `minter_warp/` beside any one script and that script runs.
"""

import argparse
import collections
import contextlib
import ctypes
import datetime
import errno
import hashlib
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from minter_warp import normalization, sample_coefficients, sample_crops, warp_batch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(Exception):
    """One sentence for the user: what was wrong and what to do. Exit code 1; 2 when the command itself was wrong."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


# ------------------------------------------------------------------------------------------------------- encoders
#
# An encoder is a module made by `Encoder(image_size, probabilistic)` that takes images (N, 3, S, S), normalised, and
# returns features (N, 512) float32: a tensor if deterministic; if probabilistic a pair, mu and the log-variance of z.
# VTE's methods need a probabilistic one; --recipe fast and --phase-one random also `log_variance_head`.
# STL takes a deterministic one. A line in `ENCODERS` adds it to every script.


def gaussian(output):
    """An encoder's output as (mu, logvar). Raises UserError for that of a deterministic encoder."""
    if isinstance(output, torch.Tensor):
        raise UserError("this method samples z and needs an encoder that returns (mu, logvar), not a tensor "
                        f"{tuple(output.shape)}")
    return output


def log_variance_head(encoder):
    """The layer that ends in the log-variance: `encoder.logvar`. Raises UserError where there is none."""
    head = getattr(encoder, "logvar", None)
    if getattr(head, "bias", None) is None:
        raise UserError("--recipe fast and --phase-one random need an encoder whose log-variance ends in a layer with "
                        f"a bias, called logvar: {type(encoder).__name__} has none", exit_code=2)
    return head


def reparameterize(mu, logvar):
    """z = mu + sigma * epsilon with epsilon ~ N(0, I) and sigma = exp(logvar / 2) (VTE eq. 15, 17)."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


class NIN(nn.Module):
    """Network-in-Network (VTE Table 5): images (N, 3, S, S) -> mu, logvar, both (N, 512); deterministic: mu alone."""

    map_layers = 6  # of the trunk: up to its last map of 192 channels, before eight are made of them

    def __init__(self, image_size=32, probabilistic=True, features=512):
        super().__init__()

        def block(inputs, outputs, kernel):
            convolution = nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        self.trunk = nn.Sequential(
            block(3, 192, 5), block(192, 160, 1), block(160, 96, 1), nn.MaxPool2d(3, 2, 1),  # 32 -> 16
            block(96, 192, 5), block(192, 192, 1), block(192, 8, 1), nn.AvgPool2d(3, 2, 1),  # 16 -> 8
            nn.Flatten(),
        )
        side = math.ceil(math.ceil(image_size / 2) / 2)
        self.mu = nn.Linear(8 * side * side, features)
        self.logvar = nn.Linear(8 * side * side, features) if probabilistic else None

    def forward(self, images):
        hidden = self.trunk(images)
        mu = self.mu(hidden).float()
        return mu if self.logvar is None else (mu, self.logvar(hidden).float())


class AlexNet(nn.Module):
    """AlexNet for small images (VTE Table 6): images (N, 3, S, S), S >= 32 -> mu, logvar, both (N, 512); deterministic:
    mu alone. No normalisation layers. The table's last two blocks, which cannot chain as printed, are 384-256-256."""

    def __init__(self, image_size=32, probabilistic=True, features=512):
        super().__init__()
        if image_size < 32:
            raise ValueError("alexnet takes images of 32 pixels or more")

        def block(inputs, outputs, kernel, padding):
            return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.ReLU())

        self.trunk = nn.Sequential(
            block(3, 64, 11, 2), nn.MaxPool2d(3, 2),  # 32 -> 26 -> 12
            block(64, 192, 5, 2), nn.MaxPool2d(3, 2),  # 12 -> 5
            block(192, 384, 3, 1), block(384, 256, 3, 1), block(256, 256, 3, 1), nn.MaxPool2d(3, 2),  # 5 -> 2
            nn.Flatten(),
        )
        side = image_size - 6
        for _ in range(3):
            side = (side - 3) // 2 + 1
        self.mu = nn.Linear(256 * side * side, features)
        self.logvar = nn.Linear(256 * side * side, features) if probabilistic else None

    forward = NIN.forward


class ResNet18(nn.Module):
    """torchvision's ResNet-18 without its classifier, deterministic: images (N, 3, S, S) -> (N, 512). Residual branches
    begin at zero; at 64 pixels and below the stem is one 3 x 3 convolution of stride 1 without pooling."""

    def __init__(self, image_size=96, probabilistic=False):
        super().__init__()
        if probabilistic:
            raise ValueError("resnet18 is deterministic and z is sampled: give one with a log-variance, nin or alexnet")
        from torchvision.models import resnet18

        self.trunk = resnet18(zero_init_residual=True)
        self.trunk.fc = nn.Identity()
        if image_size <= 64:
            self.trunk.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.trunk.maxpool = nn.Identity()

    def forward(self, images):
        return self.trunk(images).float()


ENCODERS = {"nin": NIN, "alexnet": AlexNet, "resnet18": ResNet18}


def build_encoder(name, image_size=32, probabilistic=True):
    """An untrained encoder. Raises UserError where it cannot be of this size, or probabilistic."""
    try:
        return ENCODERS[name](image_size, probabilistic)
    except ValueError as error:
        raise UserError(f"--encoder {name} does not fit here: {error}", exit_code=2) from error


# ----------------------------------------------------------------------------------------------------------- data

STATISTICS = {  # mean and standard deviation of each channel, of images in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "stl10": ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27)),
}
TRANSFER = {  # STL's sets in its order: torchvision's class; the share of the training images that validates, or None
    "cifar10": ("CIFAR10", 0.1), "cifar100": ("CIFAR100", 0.1), "food101": ("Food101", 0.1),
    "mit67": (None, 670 / 5360), "pets": ("OxfordIIITPet", 740 / 3680), "flowers102": ("Flowers102", None),
    "caltech101": ("Caltech101", 505 / 3030), "cars": ("StanfordCars", 1650 / 8144),
    "aircraft": ("FGVCAircraft", None), "dtd": ("DTD", None), "sun397": ("SUN397", 3970 / 19850),
}  # where it is None, the set has a validation split of its own
DRAWN = {"caltech101": (30, None), "sun397": (50, 100)}  # [:30] of each class to train on, [30:None] to test
BY_HAND = {"mit67": "mit67/Images/<class>/*, mit67/TrainImages.txt and mit67/TestImages.txt",
           "cars": "stanford_cars/, with cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat"}
NAMED = ("digits", "cifar10", "cifar100", "stl10")  # to train on, too; others are a folder, or else of TRANSFER
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # others may start programs
IMAGE_SUFFIXES = set(".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation: PIL.Image.Transpose
DECODING = "4"  # a cache made by other rules is decoded again
LAYOUT = "train/<class>/* and test/<class>/*, or any images, to train only"


class Images(NamedTuple):
    """A decoded data set. images: (N, 3, S, S) uint8. labels: (N,) int64, or None. classes: their names. largest: the
    longest side of any image before it was resized."""

    images: torch.Tensor
    labels: torch.Tensor | None
    classes: list
    largest: int


def load_images(dataset, split, data_dir="data", image_size=32, limit=None):
    """Decodes a data set, or its first `limit` images, into `Images`.

    dataset: of NAMED, a folder, or of TRANSFER. split: "train" or "test", both with labels, or what to pretrain on,
    "unlabeled" or "train+unlabeled": the training images where a set has no unlabeled ones. Raises UserError, OSError.
    """
    if dataset == "digits":
        data = load_digits_split(split, image_size)
    elif dataset in NAMED:
        data = load_torchvision(dataset, split, data_dir, image_size)
    elif dataset and Path(dataset).is_dir():
        return load_files(*list_images(Path(dataset), split), Path(dataset), split, data_dir, image_size, limit)
    elif dataset in TRANSFER and split.endswith("unlabeled"):
        raise UserError(f"{dataset} is there to evaluate on, not to train: give another --dataset", exit_code=2)
    elif dataset in TRANSFER:
        files, classes = list_transfer(dataset, split, data_dir)
        return load_files(files, classes, Path(data_dir, dataset), split, data_dir, image_size, limit, "BICUBIC")
    else:
        raise UserError(f"there is no data set '{dataset}': give --dataset digits, cifar10, stl10, or a folder with "
                        f"{LAYOUT}", exit_code=2)
    labels = data.labels if data.labels is None else data.labels[:limit]
    return data._replace(images=data.images[:limit], labels=labels)


def load_digits_split(split, image_size):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey, enlarged; every fifth of each class is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    test = np.zeros(len(digits.target), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(digits.target == label)[4::5]] = True
    chosen = test if split == "test" else ~test
    grey = torch.from_numpy(digits.images[chosen] * (255 / 16))[:, None]  # (N, 1, 8, 8), 16 grey levels
    images = F.interpolate(grey, size=(image_size, image_size), mode="bicubic", align_corners=False)
    images = images.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return Images(images, torch.from_numpy(digits.target[chosen]).long(), [str(i) for i in digits.target_names], 8)


def resize(images, image_size, chunk=4096):
    """(N, 3, H, W) uint8 -> (N, 3, image_size, image_size), as PIL resizes: smaller ones bilinear with antialiasing,
    larger ones bicubic."""
    if images.shape[2:] == (image_size, image_size):
        return images
    size, mode = (image_size, image_size), "bicubic" if image_size > min(images.shape[2:]) else "bilinear"
    return torch.cat([F.interpolate(part.float(), size=size, mode=mode, antialias=True, align_corners=False)
                      .round().clamp(0, 255).to(torch.uint8) for part in images.split(chunk)])


@contextlib.contextmanager
def from_torchvision(dataset, data_dir):
    """What goes wrong in here, of the network, the archive or the disk, becomes one sentence."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if dataset in BY_HAND:
            raise UserError(f"{dataset} has no download, put {BY_HAND[dataset]} into '{data_dir}' ({reason})") from None
        raise UserError(f"{dataset} could not be downloaded to or read from '{data_dir}' ({reason}): try again, or use "
                        "--dataset digits, which works offline, or --dataset DIR with images of your own") from error


def load_torchvision(dataset, split, data_dir, image_size):
    """CIFAR-10, CIFAR-100 or STL-10, downloaded into data_dir and checked by torchvision."""
    import torchvision.datasets

    with from_torchvision(dataset, data_dir):
        if dataset == "stl10":
            data = torchvision.datasets.STL10(data_dir, split=split, download=True)
            images, labels = torch.from_numpy(data.data), data.labels
        else:
            data = getattr(torchvision.datasets, TRANSFER[dataset][0])(data_dir, train=split != "test", download=True)
            images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), data.targets
    labels = None if split.endswith("unlabeled") and dataset == "stl10" else torch.as_tensor(labels).long()
    return Images(resize(images, image_size), labels, list(data.classes), images.shape[-1])


def list_transfer(dataset, split, data_dir):
    """Of a transfer set of files, downloaded into data_dir by torchvision: [(path, label)], class names.

    split: "test"; "val", the validation split of a set that has one; all else is its training images, these last.
    Caltech101 and SUN397 have no splits there: `DRAWN` says how many of each class, drawn with seed 0. Raises
    UserError."""
    from torchvision import datasets

    kind, share = TRANSFER[dataset]
    names = [split] if split in ("val", "test") else ["train", "val"] if share is None else ["train"]
    with from_torchvision(dataset, data_dir):
        if dataset == "mit67":
            folder = Path(data_dir, dataset, "Images")
            lines = (folder.parent / f"{names[0].title()}Images.txt").read_text().splitlines()
            classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
            return [(folder / line, classes.index(line.partition("/")[0])) for line in lines if line], classes
        if dataset == "pets":
            data = datasets.OxfordIIITPet(data_dir, "test" if split == "test" else "trainval", download=True)
            return list(zip(data._images, data._labels, strict=True)), data.classes
        if dataset == "caltech101":
            data = datasets.Caltech101(data_dir, download=True)
            folder, classes = Path(data.root, "101_ObjectCategories"), data.categories
            files = [(folder / classes[label] / f"image_{number:04d}.jpg", label)
                     for number, label in zip(data.index, data.y, strict=True)]
        else:
            settings = [{}] if dataset in DRAWN else [{"split": name} for name in names]
            parts = [getattr(datasets, kind)(data_dir, download=dataset not in BY_HAND, loader=str, **part)
                     for part in settings]
            files, classes = [(path, int(label)) for part in parts for path, label in part], parts[0].classes
    if dataset in DRAWN:
        of_class, (train, test), files = {}, DRAWN[dataset], sorted(files)
        for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist():
            of_class.setdefault(files[i][1], []).append(files[i])
        part = slice(train, test) if split == "test" else slice(train)
        files = [file for paths in of_class.values() for file in paths[part]]
    return files, classes


def decode(path, image_size, resampling="BILINEAR"):
    """One image file as ((3, image_size, image_size) uint8, its longest side): shorter side resized, centre cropped.

    Of an animation the first frame; upright by its EXIF orientation; grey, palette and CMYK become RGB; transparency is
    dropped; 16 bits are scaled to 8. Raises what PIL raises, and ValueError for too many pixels and 32-bit ones."""
    from PIL import ExifTags, Image, ImageOps

    if not os.path.isfile(path):  # nor one that waits for ever
        raise ValueError("no such file")
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
        sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        if image.mode in ("I", "F") and not sixteen:
            raise ValueError("32-bit pixels, whose range is unknown")
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF is no reason to refuse the pixels
            image = image.transpose(UPRIGHT[image.getexif()[ExifTags.Base.Orientation]])
        if sixteen:  # PIL would cut them off at 255
            image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).clip(0, 255).astype(np.uint8))
        longest = max(image.size)
        image = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling[resampling])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), longest


def list_images(folder, split):
    """Image files of a folder: [(path, label or None)], class names. The classes take turns, so that the first n are
    balanced. Folders within a class are walked; hidden files and folders are not. Raises OSError, UserError."""
    def entries(root):
        return sorted((entry for entry in os.scandir(root) if not entry.name.startswith(".")), key=lambda e: e.name)

    def walk(root):
        for entry in entries(root):
            yield from walk(entry.path) if entry.is_dir() else [entry.path]

    root = training = folder / "train" if (folder / "train").is_dir() else folder
    classes = [entry.name for entry in entries(training) if entry.is_dir()] if training != folder else []
    if split == "test":
        root = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), training)
    if split in ("train", "test") and (not classes or (split == "test" and root == training)):
        raise UserError(f"'{folder}' has no labelled train/ and test/ (or val/) to evaluate on: give a --dataset with "
                        "train/<class>/* and test/<class>/*")
    found, ignored = [], collections.Counter()
    for entry in entries(root) if classes else []:
        if not entry.is_dir():
            ignored["in no class folder"] += 1
        elif entry.name not in classes:
            raise UserError(f"'{entry.path}' has no counterpart in '{training}': move or remove it")
    numbers = {name: number for number, name in enumerate(classes) if (root / name).is_dir()}
    for name, label in (numbers if classes else {"": None}).items():
        paths = list(walk(root / name))
        images = [path for path in paths if Path(path).suffix.lower() in IMAGE_SUFFIXES]
        ignored.update(Path(path).suffix or "without a suffix" for path in set(paths).difference(images))
        found += [(turn, label, path) for turn, path in enumerate(images)]
    if not found:
        raise UserError(f"'{root}' holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): it must hold {LAYOUT}")
    if ignored:
        kinds, files = ", ".join(f"{count:,} {kind}" for kind, count in ignored.most_common(5)), ignored.total()
        warnings.warn(f"in '{root}', {files:,} of {len(found) + files:,} files are ignored: {kinds}", stacklevel=2)
    return [(path, label) for _, label, path in sorted(found)], classes


def load_files(files, classes, folder, split, data_dir, image_size, limit=None, resampling="BILINEAR"):
    """Images of [(path, label or None)], resized and cropped to squares. They are cached in data_dir, and decoded again
    when a file is new or has changed."""
    if not files:
        raise UserError(f"'{folder}' lists no images to {'test' if split == 'test' else 'train'} on")
    files, folder = files[:limit], folder.resolve()
    part = f"{'test' if split == 'test' else 'train'}-{image_size}{f'-first{limit}' if limit else ''}"
    place = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    cache = Path(data_dir, f"{folder.name}-{place}.{part}.cache")

    def state(path):
        with contextlib.suppress(OSError):  # a broken link is named when it is decoded
            found = os.stat(path)
            return f"{DECODING} {os.path.relpath(path, folder)} {found.st_size} {found.st_mtime_ns} {found.st_ino}"

    def attempt(path):
        try:
            return decode(path, image_size, resampling)
        except Exception as error:
            return "no image of a kind that is read" if "cannot identify" in str(error) else str(error)

    states = [state(path) for path, _ in files]
    labels = torch.tensor([label for _, label in files]) if classes else None
    with contextlib.suppress(Exception):  # whatever is wrong with a cache, the images are still there
        known = load_plain(cache)
        images, longest = known["images"], known["longest"]
        if known["states"] == states and images.shape == (len(files), 3, image_size, image_size) \
                and images.dtype == torch.uint8 and type(longest) is int:
            return Images(images, labels, classes, longest)
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without Python's lock
        warnings.simplefilter("ignore")  # PIL's
        results = list(tqdm(pool.map(attempt, [path for path, _ in files]), total=len(files),
                            desc=f"decoding {split} images", leave=False, disable=None))
    broken = [f"'{path}' ({why})" for (path, _), why in zip(files, results, strict=True) if isinstance(why, str)]
    if broken:
        raise UserError(f"{len(broken)} of {len(files)} images cannot be read, repair or remove them: "
                        + ", ".join(broken[:10]) + (", ..." if len(broken) > 10 else ""))
    images, longest = torch.stack([image for image, _ in results]), max(side for _, side in results)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        contents = {"states": states, "images": images, "longest": longest}
        write_atomically(cache, lambda file: torch.save(contents, file))
    except OSError as error:
        warnings.warn(f"decoded images are not cached, '{cache}' cannot be written ({error.strerror})", stacklevel=2)
    return Images(images, labels, classes, longest)


def image_statistics(dataset, images):
    """Mean and standard deviation of each channel, in [0, 1]: the customary ones of a known set, else measured."""
    if dataset in STATISTICS:
        return STATISTICS[dataset]
    histogram = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)]).double()
    histogram /= histogram.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64, device=histogram.device) / 255
    mean = (histogram * levels).sum(1)
    std = ((histogram * levels**2).sum(1) - mean**2).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())  # of a constant image: no division by zero


# ------------------------------------------------------------------------------------------------------ processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device):
    """Joins the processes of torchrun, if there are: NCCL for CUDA, gloo for the CPU. Returns this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)) > gpus:  # every rank says so, before any waits
                raise UserError(f"this machine has {gpus} GPU{'s' * (gpus > 1)}, fewer than processes: give torchrun "
                                f"--nproc_per_node={gpus}, or --device cpu")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend, bound = ("nccl", {"device_id": device}) if device.type == "cuda" else ("gloo", {})
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=6), **bound)  # downloads may take long
    return device


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 first, then one process per node, then everyone: only the first downloads and decodes."""
    turn = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn if world_size() > 1 else 0):
        dist.barrier()
    yield
    for _ in range(2 - turn if world_size() > 1 else 0):
        dist.barrier()


def gather(rows):
    """(n, ...) of each rank -> (K n, ...) of all K ranks, with gradients."""
    if world_size() == 1:
        return rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch 2.14, whose new form older versions lack
        return torch.cat(differentiable.all_gather(rows.contiguous()))


def rows_of_this_rank(n, device):
    """Where this rank's n rows are among those that `gather` returns: (n,) int64."""
    return rank() * n + torch.arange(n, device=device)


def average(values):
    """The mean over all ranks, without gradients."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values / world_size()


# --------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, and whose errors are one sentence."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            silent = action.default is None or action.default is False  # help says what None means
            return action.help if silent else super()._get_help_string(action)

    def __init__(self, **kwargs):
        super().__init__(formatter_class=self.Help, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists what can be given)\n")


def number(kind, least, most=math.inf):
    """An argparse type: kind is int or float."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most or math.isinf(value):
            above = "above 0" if 0 < least < 1 else f"of {least:g} or more"
            limits = above if most == math.inf else f"from {least:g} to {most:,}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a number {limits}")
        return value

    parse.__name__ = kind.__name__  # which argparse names where kind(text) fails
    return parse


positive_int, positive_float = number(int, 1, 2**31 - 1), number(float, sys.float_info.min)
non_negative_float, seed_int = number(float, 0), number(int, 0, 2**32 - 1)
image_side = number(int, 8, 1024)

FAST = {"epochs": 20, "batch_size": 64, "lr": 1e-3}  # ours: results/recipe.json
FAST_LOGVAR = -8.0  # what sigma begins with, by the bias of the log-variance
FAST_KERNELS = 30  # times --lr: Muon's learning rate
ADAM_ADVICE = "Adam's, at the peak with --recipe fast (default: 1e-4; fast: 1e-3)"


def training_parser(description, example, output, lr=None, lr_advice=ADAM_ADVICE):
    """The flags that every training script has. lr: the default where a script has one recipe only, its own."""
    parser = Parser(description=description, epilog=f"example:\n  {example}")
    add = parser.add_argument_group("what to train").add_argument
    add("--dataset", help=f"digits (offline), cifar10, stl10, or a folder with {LAYOUT} (default: cifar10)")
    add("--data-dir", default="data", help="for what is downloaded, and for decoded folders")
    add("--image-size", type=image_side,
        help="images are resized to this side (default: 32; for stl.py on stl10 96)")
    add("--limit", type=positive_int, metavar="N", help="train on the first N images only, for tries (default: all)")
    add("--encoder", choices=list(ENCODERS),
        help="both phases of VTE need the same (default: nin; alexnet on stl10)" if lr is None else
        "(default: resnet18)")
    add("--output", default=output, help="checkpoint to write; the log goes beside it, as .jsonl")
    add = parser.add_argument_group("how").add_argument
    if lr is None:
        add("--recipe", choices=["paper", "fast"], default="paper",
            help="fast, ours: Muon for the encoder, one cycle of the learning rate, sigma begins small; for few epochs")
    else:
        parser.set_defaults(recipe="paper")
    add("--epochs", type=positive_int,
        help="10 to 20 show whether it learns (default: 200 as in the paper" + (")" if lr else "; fast: 20)"))
    add("--batch-size", type=positive_int,
        help="of all processes together (default: 256" + (")" if lr else "; 512 on stl10; fast: 64)"))
    add("--lr", type=positive_float, default=lr, help=lr_advice)
    add("--seed", type=seed_int, default=0, help="of weights, order, transformations and noise; vary it for error bars")
    add("--resume", action="store_true", help="go on from --output after its last finished epoch, if it is there")
    add("--save-every", type=positive_int, default=1, metavar="EPOCHS", help="epochs between checkpoints")
    add = parser.add_argument_group("where").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 autocast where the hardware has it; fp32 if a loss looks noisy")
    add("--compile", choices=["off", "inductor", "cudagraphs"], default="off",
        help="torch.compile of the model, on CUDA also as CUDA graphs")
    add("--sync-bn", action="store_true", help="torchrun on GPUs: batch normalisation over all processes' batches")
    add("--deterministic", action="store_true",
        help="on a GPU: the same seed gives the same bits, slower; a CPU's always does")
    return parser


def defaults_of(recipe, dataset):
    """Settings of a recipe where they are not given."""
    return FAST if recipe == "fast" else {"epochs": 200, "batch_size": 512 if dataset == "stl10" else 256, "lr": 1e-4}


def run_command(main):
    """Runs a script's main: a UserError becomes one sentence and its exit code."""
    with contextlib.suppress(AttributeError):  # of a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal may have no ±
    sys.stderr = sys.stderr or open(os.devnull, "w")  # whoever started this closed it
    warnings.formatwarning = lambda message, *_: f"{Path(sys.argv[0]).name}: warning: {message}\n"
    warnings.filterwarnings("once", category=UserWarning, append=True)  # not once for each line that warns
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: memory ran out; smaller or fewer images, or smaller batches, need "
              f"less ({str(error)[:200]})", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # of a file, or of the output: whoever read it has gone, or its disk is full
        with contextlib.suppress(OSError):  # of a notebook, whose output is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        if error.errno == errno.EPIPE:
            sys.exit(128 + signal.SIGPIPE)
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; of a training, what the last finished epoch wrote is kept", file=sys.stderr)
        sys.exit(130)


def keep_freed_memory():
    """Tells glibc to keep freed memory. By default it returns a step's activations to the system and gets new pages,
    zeroed, in the next step: a third of a step on a CPU. The process then stays as large as it ever was.
    MINTER_KEEP_MEMORY=0 leaves glibc as it is. Elsewhere nothing happens. Returns whether it is kept."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "gnu_get_libc_version") or os.environ.get("MINTER_KEEP_MEMORY") == "0":
        return False
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    return True


def choose_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch finds no CUDA device here: use --device cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def choose_precision(name, device):
    """float32 or bfloat16: what autocast computes convolutions and products in. With float32, TF32 is switched off:
    PyTorch takes it on CUDA for convolutions unless told otherwise."""
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        else:  # emulated bfloat16 is slower than float32
            checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            name = "bf16" if any(getattr(torch.cpu, check, bool)() for check in checks) else "fp32"
    if name == "fp32":
        torch.backends.cudnn.allow_tf32 = False
    return torch.bfloat16 if name == "bf16" else torch.float32


def provenance(device):
    """What a result is made with: command, hardware, versions, commit of this code. Plain values."""
    processor, commit = platform.processor(), None
    with contextlib.suppress(OSError, AttributeError):  # Linux
        processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).resolve().parent,
                                capture_output=True, text=True).stdout.strip()
    return {"command": shlex.join(["python", *sys.argv]), "processor": processor, "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "python": platform.python_version(), "torch": str(torch.__version__), "commit": commit}


# ------------------------------------------------------------------------------------------------- a training run

class MuonAdam(torch.optim.Adam):
    """Adam, but for kernels and matrices Muon (Jordan et al. 2024): five Newton-Schulz steps make their momentum nearly
    orthogonal, so that all directions are learned at one rate."""

    def __init__(self, kernels, others, lr, muon_lr):
        super().__init__([{"params": others, "lr": lr}, {"params": kernels, "lr": muon_lr}], fused=True)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[1]
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(parameter)  # Adam looks for a step
            momentum = state["momentum"]
            momentum.mul_(0.95).add_(parameter.grad)
            update = (parameter.grad + 0.95 * momentum).flatten(1)  # (outputs, inputs)
            rows, columns = update.shape
            update = update / update.norm().clamp(min=1e-7)
            update = update.T if rows > columns else update
            for _ in range(5):
                gram = update @ update.T
                update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
            update = update.T if rows > columns else update
            parameter.sub_(update.reshape(parameter.shape), alpha=group["lr"] * max(1, rows / columns) ** 0.5)
            parameter.grad = None  # Adam leaves those without a gradient
        super().step()


MAY_CHANGE_ON_RESUME = {
    "epochs", "device", "data_dir", "compile", "deterministic", "save_every", "resume", "output", "pretrained"}


class Run:
    """One training run: device, precision, seeds, images, batches, log, checkpoints, processes. It knows no method and
    no loss.

    pretrained: the checkpoint (a dict) this run builds on; its data set, sizes and normalisation are the defaults.
    constants: numbers to compare metrics with, {name: value}. split: the images to train on.

    Every epoch reseeds from (seed, method, epoch), and the model's noise from the rank too, so resuming is bit-exact.
    """

    def __init__(self, method, args, pretrained=None, constants=None, split="unlabeled"):
        keep_freed_memory()
        self.method, self.args, self.constants = method, args, dict(constants or {})
        self.output, self.log = Path(args.output), Path(args.output.removesuffix(".ckpt") + ".jsonl")
        self.resumed_from = self._check_output()  # a checkpoint, or None
        given = (pretrained or {}).get("config", {})
        if args.dataset is None:
            args.dataset = given.get("dataset") or (self.resumed_from or {}).get("config", {}).get("dataset", "cifar10")
            if args.dataset not in NAMED and not Path(args.dataset).is_dir():
                raise UserError(f"there is no folder '{args.dataset}', where the checkpoint's data was: give another "
                                "--dataset", exit_code=2)
        args.encoder = args.encoder or given.get("encoder", "alexnet" if args.dataset == "stl10" else "nin")
        args.image_size = args.image_size or given.get("image_size", 32)
        for name, value in defaults_of(args.recipe, args.dataset).items():
            setattr(args, name, getattr(args, name) or value)
        for name in ("encoder", "image_size") if pretrained else ():
            if getattr(args, name) != given[name]:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} does not fit --pretrained "
                                f"'{args.pretrained}', which was trained with {given[name]}", exit_code=2)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if args.batch_size % processes or args.batch_size < 2 * processes:
            raise UserError(f"--batch-size {args.batch_size} does not fit: give 2 or more for each process, and a "
                            f"multiple of their number, {processes}", exit_code=2)
        self.size = args.image_size
        self.device = init_distributed(choose_device(args.device))
        if args.sync_bn and self.device.type == "cpu":
            raise UserError("--sync-bn is for GPUs: leave it out", exit_code=2)
        self.dtype = choose_precision(args.precision, self.device)
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        with rank_zero_first():
            data = load_images(args.dataset, split, args.data_dir, self.size, args.limit)
        if not args.batch_size <= len(data.images):
            raise UserError(f"--batch-size {args.batch_size} is larger than the {len(data.images)} training images: "
                            "give a smaller one, or more images", exit_code=2)
        self.labelled = args.dataset in NAMED or data.labels is not None
        mean, std = (given["mean"], given["std"]) if pretrained else image_statistics(args.dataset, data.images)
        folder = {} if args.dataset in NAMED else {"dataset": str(Path(args.dataset).resolve())}
        self.config = {**vars(args), **folder, "images": len(data.images), "processes": processes, "mean": list(mean),
                       "std": list(std)}
        self._check_settings()
        try:
            self.images = data.images.to(self.device)  # (N, 3, S, S) uint8
        except torch.OutOfMemoryError as error:
            raise UserError(f"{len(data.images):,} images take {data.images.nbytes >> 20:,} MiB, more than the GPU has "
                            "free: give a smaller --image-size or a --limit") from error
        self.scale, self.shift = normalization(mean, std, self.device)
        self.generator = torch.Generator(self.device)
        torch.manual_seed(args.seed)  # of the weights
        self.stopped_by, self.made_with = None, provenance(self.device)
        resized = f" of up to {data.largest} pixels, resized to {self.size}" * (data.largest > self.size)
        where = self.device.type + f" x {processes}" * (processes > 1)
        self.say(f"{method}: {len(data.images):,} images of {args.dataset}{resized}, {args.encoder}, {where}, "
                 f"{str(self.dtype).removeprefix('torch.')}, seed {args.seed}")
        if self.constants:
            self.say("to compare with: " + ", ".join(f"{name} {value:.3f}" for name, value in self.constants.items()))

    def say(self, text):
        if rank() == 0:
            with tqdm.external_write_mode(), contextlib.suppress(OSError):  # whoever read it has gone; a full disk
                print(text, flush=True)

    def _check_output(self):
        """Before hours of training, not after: the checkpoint can be written, and writing it loses nothing."""
        try:
            if self.output.is_dir() or self.args.output.endswith(os.sep):
                raise UserError(f"--output '{self.args.output}' is a folder: give the name of a file", exit_code=2)
            if self.output.suffix.lower() == ".safetensors":
                raise UserError(f"--output '{self.output}': training writes .ckpt, of which probe.py --export makes "
                                ".safetensors", exit_code=2)
            for path in (self.output, self.log):
                if path.exists() and not self.args.resume:
                    raise UserError(f"'{path}' exists already: give another --output, or remove it, or go on from it "
                                    "with --resume", exit_code=2)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.output.parent, prefix=f"{self.output.name}.", suffix=".tmp"):
                pass  # its name is as long as that of a checkpoint while it is written
            lines = self.log.read_bytes().splitlines(keepends=True) if self.log.exists() else []
            rows = [json.loads(line) for line in lines if line.endswith(b"\n")]  # a full disk leaves a part of the last
            if not all("epoch" in row for row in rows):
                raise ValueError("no epoch")
        except OSError as error:
            raise UserError(f"cannot write '{self.output}' ({error.strerror}): give another --output") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"'{self.log}' is no log of a run: move it away, or give another --output") from error
        return load_checkpoint(self.output, self.method) if self.args.resume and self.output.exists() else None

    def _check_settings(self):
        """A resumed run is the run that was stopped."""
        earlier = {"recipe": "paper", "phase_one": "trained", "code": "learned", "learn": "crop+colour",
                   "predict": 0.0}  # before there were others
        given = {**earlier, **(self.resumed_from or {"config": self.config})["config"]}
        for name, value in self.config.items():
            moved = name == "dataset" and not {value, given.get(name)} & set(NAMED)
            if name not in MAY_CHANGE_ON_RESUME and given.get(name) != value and not moved:
                raise UserError(f"'{self.output}' was trained with {name.replace('_', ' ')} {given.get(name)}, not "
                                f"{value}: --resume takes the settings it began with", exit_code=2)

    def prepare(self, model):
        """Moves the model to the device, in the layout its convolutions are fastest in; under torchrun, for all ranks
        together (DistributedDataParallel)."""
        model = model.to(self.device, memory_format=torch.channels_last)
        if self.args.recipe == "fast":
            nn.init.constant_(log_variance_head(model.encoder).bias, FAST_LOGVAR)
        if self.resumed_from:
            load_model(model, self.resumed_from, self.output)
        if self.args.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.args.compile != "off":
            model.compile(mode="reduce-overhead" if self.args.compile == "cudagraphs" else None, dynamic=False)
        if world_size() > 1:
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        return model

    def optimizer(self, model):
        """Adam without weight decay at a constant rate, the papers'; see --recipe for the other."""
        model = getattr(model, "module", model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.args.recipe == "fast":  # with Muon for the log-variance too, one image's sigma ran away
            logvar = set(model.encoder.logvar.parameters())
            kernels = [weights for weights in model.encoder.parameters() if weights.dim() > 1 and weights not in logvar]
            chosen = set(kernels)
            others = [weights for weights in trained if weights not in chosen]
            return MuonAdam(kernels, others, self.args.lr, FAST_KERNELS * self.args.lr)
        return torch.optim.Adam(trained, lr=self.args.lr, fused=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def seed_of(self, *parts):
        """A seed of 63 bits for one purpose."""
        text = repr((self.args.seed, self.method, *parts))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def epochs(self, model, optimizer, schedule=None):
        """Yields the number of each epoch to train, 1, 2, ...; after each, logs its means, sets the next learning rate
        and writes the checkpoint. schedule: of the epochs. The fast recipe has one cycle over all steps instead."""
        n, total = len(self.images), self.args.epochs
        self._steps, self._cycle = -(-n // self.args.batch_size), None
        if self.args.recipe == "fast":
            rates = [group["lr"] for group in optimizer.param_groups]
            self._cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total * self._steps,
                                                              cycle_momentum=False)
        self._trained = getattr(model, "module", model), optimizer, schedule
        gigabytes = 3 * sum(weights.nbytes for weights in model.parameters()) / 1e9  # with Adam's two moments
        if gigabytes > 1:
            self.say(f"a checkpoint will take up to {gigabytes:.1f} GB; probe.py --export makes some megabytes of it")
        main = threading.current_thread() is threading.main_thread()  # only there signals can be caught
        with self._locked_output():
            finished = self._restore()
            if finished >= total:
                self.say(f"'{self.output}' has {finished} epochs already, and --epochs is {total}")
            before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM) if main}
            self._bar = tqdm(total=total * n, initial=finished * n, unit=" images", leave=False,
                             disable=True if rank() else None)
            try:
                for self.epoch in range(finished + 1, total + 1):
                    self._bar.set_description(f"epoch {self.epoch}/{total}")
                    self._start = self._shown = time.perf_counter()
                    self.generator.manual_seed(self.seed_of(self.epoch))
                    torch.manual_seed(self.seed_of(self.epoch, "noise", rank()))
                    if self._cycle is not None:
                        self._cycle.last_epoch = (self.epoch - 1) * self._steps
                    self._sums, self._seen = {}, 0
                    model.train()
                    yield self.epoch
                    self._finish_epoch()
            finally:
                self._bar.close()
                for number, handler in before.items():
                    signal.signal(number, handler)

    @contextlib.contextmanager
    def _locked_output(self):
        """One run at a time writes an output. The system drops the lock of a process that ends, however it ends."""
        if rank() or fcntl is None:
            yield
            return
        with writing(self.output):  # another user's lock, say
            lock = open(f"{self.log}.lock", "ab+", buffering=0)  # outputs a and a.ckpt have one log
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise UserError(f"'{self.output}' is being written by {lock.read().decode() or 'another process'}: "
                                "wait for it, or give another --output") from error
            except OSError:  # a file system without locks
                pass
            try:
                there = self._check_output()  # another run may have ended while this one loaded its data
                if (there or {}).get("epoch") != (self.resumed_from or {}).get("epoch"):
                    raise UserError(f"'{self.output}' was written by another run just now: start again")
                with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
                    lock.truncate(0)
                    lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                yield
            finally:
                Path(lock.name).unlink(missing_ok=True)

    def _note(self, number, frame):
        """SIGINT and SIGTERM end the run after its step; one more ends it at once."""
        self.stopped_by = number
        signal.signal(number, signal.SIG_DFL)

    def _restore(self):
        """Goes back to the last checkpoint of a resumed run, and drops what the log has beyond it. Returns how many
        epochs are finished."""
        (_, optimizer, schedule), checkpoint, self.resumed_from = self._trained, self.resumed_from, None
        self._saved = checkpoint["epoch"] if checkpoint else 0
        if checkpoint:
            trained_for = checkpoint["config"].get("epochs")
            if (schedule or self._cycle) and trained_for != self.args.epochs:
                raise UserError(f"'{self.output}' was trained with epochs {trained_for}, not {self.args.epochs}: its "
                                "learning rate follows from their number", exit_code=2)
            if checkpoint.get("position"):  # weights of a part of an epoch, which older code saved
                raise UserError(f"'{self.output}' was saved within an epoch by an older version: train it again")
            try:
                optimizer.load_state_dict(checkpoint["optimizer"])  # the learning rate too
                if any(value.dim() and value.shape != parameter.shape for parameter, state in optimizer.state.items()
                       for value in state.values() if isinstance(value, torch.Tensor)):
                    raise ValueError("shapes")
            except Exception as error:
                raise UserError(f"the optimizer's state in '{self.output}' does not fit: train it again") from error
            if schedule is not None:
                schedule.last_epoch = self._saved
            self.say(f"going on from '{self.output}', epoch {self._saved}")
        if rank() == 0 and self.args.resume:
            lines = self.log.read_bytes().splitlines(keepends=True) if self.log.exists() else []
            with writing(self.log):
                write_atomically(self.log, lambda file: file.write(b"".join(lines[: self._saved])))
            for file in self.output.parent.iterdir():
                if re.fullmatch(re.escape(self.output.name) + r"\.\d+\.tmp", file.name):  # of a process that was killed
                    file.unlink(missing_ok=True)
        return self._saved

    def batches(self, *samplers, together=1):
        """All images once, in random order, in batches: (images, index, *drawn), all on the device, where images[index]
        are the batch and drawn is what each sampler(n, size, generator) drew for it, a tensor of n rows or a dict of
        them. Everything is drawn at once for the whole epoch.

        A last batch of one image, which batch normalisation cannot take, is left out. Each of several ranks gets an
        equal share of every batch, a multiple of `together`; what cannot be shared is left out.
        """
        n, ranks = len(self.images), world_size()
        if ranks > 1 and self.args.batch_size % (ranks * together):
            raise UserError(f"--batch-size {self.args.batch_size} cannot be shared by {ranks} processes in pairs: give "
                            f"a multiple of {ranks * together}", exit_code=2)
        order = torch.randperm(n, generator=self.generator, device=self.device)
        drawn = [sampler(n, self.size, self.generator) for sampler in samplers]

        def rows(values, share):
            return {name: rows(value, share) for name, value in values.items()} if isinstance(values, dict) \
                else values[share]

        for start in range(0, n, self.args.batch_size):
            share = min(self.args.batch_size, n - start)
            if ranks > 1:
                share = share // ranks // together * together
            if share > 1:
                share = slice(start + rank() * share, start + (rank() + 1) * share)
                if self.args.compile == "cudagraphs":
                    torch.compiler.cudagraph_mark_step_begin()
                yield self.images, order[share], *(rows(values, share) for values in drawn)

    def step(self, loss, metrics, count):
        """Adds a step's loss and metrics, scalars on the device, to the epoch's means. Waits for the device only to
        show the loss in the progress bar, twice a second at most. Ends the run if a signal asked for it."""
        for name, value in (("loss", loss), *metrics.items()):
            total, images = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value.detach().float() * count, images + count
        if self._cycle is not None:
            self._cycle.step()
        self._seen += count * world_size()
        self._bar.update(count * world_size())
        if not self._bar.disable and time.perf_counter() - self._shown > 0.5:
            self._shown = time.perf_counter()
            self._bar.set_postfix_str(f"loss {loss.item():.4f}")
        if self.stopped_by is not None:
            flags = sys.argv if "--resume" in sys.argv else [*sys.argv, "--resume"]
            command = "torchrun ..." if world_size() > 1 else "python"
            if rank() == 0:
                self._bar.close()
                print(f"stopped in epoch {self.epoch}; to go on after epoch {self._saved}: {command} "
                      f"{shlex.join(flags)}", file=sys.stderr)
            sys.exit(128 + self.stopped_by)

    def means(self):
        """The mean of each metric over the images of this epoch so far, over all ranks; waits for the device."""
        return {name: average(total).item() / images for name, (total, images) in self._sums.items()}

    def _finish_epoch(self):
        model, optimizer, schedule = self._trained
        means, learning_rate, seconds = self.means(), optimizer.param_groups[0]["lr"], time.perf_counter() - self._start
        bad = [f"the {name} became {value}" for name, value in means.items() if not math.isfinite(value)]
        if not all(values.isfinite().all() for values in model.state_dict().values()):
            bad.append("weights became infinite or NaN")
        if bad:
            kept = f"; the checkpoint of epoch {self._saved} is kept in '{self.output}'" if self._saved else ""
            raise UserError(f"{bad[0]} in epoch {self.epoch}{kept}: try a lower --lr or --precision fp32")
        if schedule is not None:
            schedule.step()
        row = {"epoch": self.epoch, **means, **self.constants, "lr": learning_rate,
               "images_per_second": self._seen / seconds, "seconds": seconds}
        if rank() == 0:
            with writing(self.log), open(self.log, "a") as log:
                log.write(json.dumps(row) + "\n")
            if self.epoch % self.args.save_every == 0 or self.epoch == self.args.epochs:
                with writing(self.output):
                    save_checkpoint(self.output, self.method, self.config, model, optimizer, self.epoch,
                                    self.made_with)
        if self.epoch % self.args.save_every == 0:
            self._saved = self.epoch
        shown = "  ".join(f"{name} {value:{'.3f' if abs(value) < 1 else '.3g'}}" for name, value in means.items()
                          if name != "loss")  # in 100 characters, also STL's five
        self.say(f"epoch {self.epoch}/{self.args.epochs}  {shown}  {row['images_per_second']:,.0f} img/s")

    def finish(self, script, *flags, same=()):
        """Says what was written and the next command, which has the settings named in `same` where they are not the
        defaults. Leaves the process group."""
        usual = {**vars(training_parser("", "", "").parse_args([])), **defaults_of(self.args.recipe, self.args.dataset)}
        for name in same:
            if getattr(self.args, name) != usual[name]:
                flags += f"--{name.replace('_', '-')}", str(getattr(self.args, name))
        if script == "probe.py" and not self.labelled:
            flags += "--dataset", "<a folder with classes>"
        script = os.path.relpath(Path(__file__).resolve().with_name(script))
        self.say(f"wrote {self.output} and {self.log}\nnext: {shlex.join(['python', script, *flags])}")
        if world_size() > 1:
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- checkpoints

FORMAT_VERSION = 1


@contextlib.contextmanager
def writing(path):
    """OSError in here becomes one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write '{path}' ({error}); what was saved before it is kept: mend that, and go on with "
                        "--resume") from error


def write_atomically(path, write):
    """write(file) by way of a temporary file: the path holds the old contents or the new, whole, never a part."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
        if os.name != "nt":  # the new name is to survive a power cut, too; Windows has no such call
            folder = os.open(Path(path).parent, os.O_RDONLY)
            sync(folder)
            os.close(folder)
    except RuntimeError as error:  # torch.save's of a full disk; its context is what the system said
        known = isinstance(error.__context__, OSError)
        raise error.__context__ if known else OSError(errno.EIO, str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync(descriptor):
    """fsync, where the file system has it: some network and shared ones answer EINVAL."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def save_checkpoint(path, method, config, model, optimizer, epoch, made_with):
    """A plain dict of tensors and plain values; `encoder` is what the probe evaluates. epoch: how many are finished."""
    checkpoint = {"format_version": FORMAT_VERSION, "method": method, "config": config, "epoch": epoch,
                  "encoder": model.encoder.state_dict(), "model": model.state_dict(),
                  "optimizer": optimizer.state_dict(), "made_with": made_with}
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load_plain(path):
    """What torch.save or `export_encoder` wrote, tensors and plain values only, on the CPU; never runs code from the
    file. Raises OSError, or anything else where the file is damaged or of another kind."""
    if Path(path).suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
            return {**json.loads(file.metadata()["minter"]), "encoder": weights, "model": weights}
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:  # torch does not look at the checksums
            raise ValueError("a checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, method=None):
    """Reads a checkpoint and checks all of it but the weights, which `load_weights` does. method: the only one that
    will do. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint '{path}'")
    try:
        checkpoint = load_plain(path)
        config = checkpoint["config"]
        version, name, encoder = checkpoint["format_version"], checkpoint["method"], config["encoder"]
        whole = (type(encoder) is type(config["dataset"]) is type(name) is str and 8 <= config["image_size"] <= 1024
                 and type(config["image_size"]) is type(checkpoint["epoch"]) is int and checkpoint["epoch"] >= 0
                 and all(len(config[name]) == 3 and all(map(math.isfinite, config[name])) for name in ("mean", "std"))
                 and min(config["std"]) > 0 and checkpoint["encoder"].keys() and checkpoint["model"].keys())
    except PermissionError as error:
        raise UserError(f"cannot read '{path}' ({error.strerror})") from error
    except ImportError as error:
        raise UserError(f"reading '{path}' takes a package that is not here: pip install safetensors") from error
    except Exception:
        whole, version = False, FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise UserError(f"'{path}' has format version {version}; this code reads {FORMAT_VERSION}")
    if not whole:
        raise UserError(f"'{path}' is no checkpoint of minTER, or it is truncated or damaged; train it again")
    if encoder not in ENCODERS:
        raise UserError(f"'{path}' has an encoder '{encoder}', which ENCODERS in common.py lacks: add it there")
    if method is not None and name != method:
        raise UserError(f"'{path}' is a checkpoint of {name}; one of {method} is needed here")
    return checkpoint


def load_weights(module, weights, path):
    """Loads a state dict into the module. Raises UserError unless names, shapes and types fit, and all is finite."""
    expected = module.state_dict()
    if weights.keys() != expected.keys() or any(
            not isinstance(value, torch.Tensor) or (value.shape, value.dtype, value.layout)
            != (expected[name].shape, expected[name].dtype, expected[name].layout) for name, value in weights.items()):
        raise UserError(f"the weights in '{path}' do not fit the {type(module).__name__} that it names")
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"the weights in '{path}' are broken: {broken[0]} is infinite or NaN; train it again")
    module.load_state_dict(weights)
    return module


def load_encoder(checkpoint, path, probabilistic=False):
    """The encoder of a checkpoint, in eval mode on the CPU. probabilistic: only one with a log-variance will do. Raises
    UserError."""
    config = checkpoint["config"]
    if probabilistic and not config.get("probabilistic", True):
        raise UserError(f"the encoder in '{path}' has no log-variance, which is needed here")
    encoder = build_encoder(config["encoder"], config["image_size"], config.get("probabilistic", True))
    return load_weights(encoder, checkpoint["encoder"], path).eval()


def untrained_phase_one(run, images=2048):
    """Phase two's control: a phase one that was never trained, in eval mode. z is its mu, without noise; its batch
    normalisation has the statistics of so many training images, transformed."""
    encoder = build_encoder(run.args.encoder, run.size).to(run.device)
    nn.init.zeros_(log_variance_head(encoder).weight)
    nn.init.constant_(encoder.logvar.bias, -30.0)
    generator = torch.Generator(run.device).manual_seed(run.seed_of("phase one"))
    order = torch.randperm(len(run.images), generator=generator, device=run.device)[:images]

    def batches():
        for index in order.split(256):
            if len(index) > 1:  # batch normalisation takes no batch of one image
                crops = sample_crops(len(index), run.size, generator)
                coefficients = sample_coefficients(len(index), run.size, generator)
                yield warp_batch(run.images, index, crops, coefficients, run.scale, run.shift)

    update_bn(batches(), encoder)
    return encoder.eval()


def export_encoder(checkpoint, path, dtype=torch.float32):
    """Writes the encoder alone, with its settings as metadata, for `load_checkpoint` and for whoever has safetensors.
    dtype: of kernels and matrices; bfloat16 halves the file. Raises UserError, OSError."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError("exporting takes a package that is not here: pip install safetensors") from error

    metadata = {name: checkpoint[name] for name in ("format_version", "method", "epoch")}
    config = {name: value for name, value in checkpoint["config"].items()
              if name not in ("output", "pretrained", "data_dir")}  # folders of this machine are no one else's business
    metadata["config"] = {**config, "dataset": Path(config["dataset"]).name}
    weights = {name: value.to(dtype if value.dim() > 1 else value.dtype).contiguous()
               for name, value in checkpoint["encoder"].items()}
    content = save(weights, {"minter": json.dumps(metadata)})
    write_atomically(path, lambda file: file.write(content))


@torch.no_grad()
def load_features(path, images, device="cpu", batch_size=32):
    """The features of images by the encoder of a checkpoint: mu where it has one. images: (N, 3, H, W) uint8, or paths
    of image files, which are resized to what the encoder was trained on. Returns (N, 512) float32 on the CPU. Raises
    UserError."""
    checkpoint = load_checkpoint(path)
    config, encoder = checkpoint["config"], load_encoder(checkpoint, path).to(device)
    size = config["image_size"]
    if isinstance(images, torch.Tensor):
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise UserError(f"images must be (N, 3, H, W) uint8, not {tuple(images.shape)} {images.dtype}")
        images = resize(images, size)
    else:
        files = [images] if isinstance(images, str | os.PathLike) else list(images)
        if not files:
            raise UserError("no images are given: the list of files is empty")
        try:
            images = torch.stack([decode(file, size)[0] for file in files])
        except Exception as error:
            raise UserError(f"images must be paths of image files, or a tensor (N, 3, H, W) uint8 ({error})") from error
    scale, shift = (values[:, None, None] for values in normalization(config["mean"], config["std"], device))
    outputs = [encoder(batch.to(device) * scale + shift) for batch in images.split(batch_size)]
    return torch.cat([(output if isinstance(output, torch.Tensor) else output[0]).cpu() for output in outputs])


def load_model(model, checkpoint, path):
    """`model` with all that the checkpoint holds, in eval mode. Raises UserError where it does not fit."""
    if checkpoint["model"] is checkpoint.get("encoder"):
        raise UserError(f"'{path}' holds an encoder alone, and its whole checkpoint is needed here")
    return load_weights(model, checkpoint["model"], path).eval()
