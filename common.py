"""What every method shares: encoders, transformations, data, the training run, checkpoints.

Nothing here knows a method. Copy this file beside any one script and that script runs; without the compiled extension
(`minter_warp`, built by setup.py) the warp falls back to the PyTorch reference below.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    import minter_warp  # registers torch.ops.minter.warp
except ImportError as error:
    minter_warp, minter_warp_missing = None, str(error)
CUDA_ARCHITECTURES = minter_warp and minter_warp.build_info()["cuda_architectures"]


class UserError(Exception):
    """One sentence for the user: what was wrong and what to do. Exit code 1; 2 when the command itself was wrong."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


# ------------------------------------------------------------------------------------------------------- encoders


def reparameterize(mu, logvar):
    """z = mu + sigma * epsilon with epsilon ~ N(0, I) and sigma = exp(logvar / 2) (VTE eq. 15, 17)."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


class NIN(nn.Module):
    """Network-in-Network (VTE Table 5): images (N, 3, S, S) -> mu, logvar, both (N, 512) float32. With
    probabilistic=False it has no second head and returns mu alone."""

    def __init__(self, image_size=32, features=512, probabilistic=True):
        super().__init__()

        def block(inputs, outputs, kernel):
            convolution = nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

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
    """AlexNet for small images (VTE Table 6): images (N, 3, S, S) with S >= 32 -> mu, logvar, both (N, 512) float32.
    No normalisation layers. The table's last two blocks, which cannot be chained as printed, are 384-256-256. With
    probabilistic=False it has no second head and returns mu alone."""

    def __init__(self, image_size=32, features=512, probabilistic=True):
        super().__init__()

        def block(inputs, outputs, kernel, padding):
            return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.ReLU(inplace=True))

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

    def forward(self, images):
        hidden = self.trunk(images)
        mu = self.mu(hidden).float()
        return mu if self.logvar is None else (mu, self.logvar(hidden).float())


class ResNet18(nn.Module):
    """torchvision's ResNet-18 without its classifier, deterministic: images (N, 3, S, S) -> (N, 512) float32. Residual
    branches begin at zero; at 64 pixels and below the stem is one 3 x 3 convolution of stride 1 without pooling."""

    def __init__(self, image_size=96):
        super().__init__()
        from torchvision.models import resnet18

        self.trunk = resnet18(zero_init_residual=True)
        self.trunk.fc = nn.Identity()
        if image_size <= 64:
            self.trunk.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.trunk.maxpool = nn.Identity()

    def forward(self, images):
        return self.trunk(images).float()


def build_encoder(name, image_size=32, probabilistic=True):
    """probabilistic: with a log-variance beside mu (nin, alexnet); resnet18 never has one."""
    if name == "resnet18":
        return ResNet18(image_size)
    return {"nin": NIN, "alexnet": AlexNet}[name](image_size, probabilistic=probabilistic)


# ------------------------------------------------------------------------------------------------ transformations

# The squared error, summed over the 8 normalised coefficients, of two predictors that have learned nothing of interest:
# the mean of all transformations, and the mean of those with the right rotation.
CONSTANT_PREDICTOR_ERROR = 4.11
ROTATION_PREDICTOR_ERROR = 0.577


def coefficients_from_corners(corners, size):
    """The perspective coefficients under which an image's corners come to lie at `corners`.

    corners: (N, 4, 2) float64, (x, y) in pixels, where the top left, top right, bottom right and bottom left corner of
    the image go. size: side in pixels, or (height, width). Returns (N, 8) float64: the map from output to input, in the
    convention of `projective_warp`. Closed form: the map of the unit square to a quadrilateral (Heckbert 1989, 2.2.3),
    inverted by its adjugate.
    """
    height, width = (size, size) if isinstance(size, int) else size
    (x0, x1, x2, x3), (y0, y1, y2, y3) = corners[..., 0].unbind(-1), corners[..., 1].unbind(-1)
    dx1, dx2, sx = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    dy1, dy2, sy = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    area = dx1 * dy2 - dx2 * dy1
    g, h = (sx * dy2 - dx2 * sy) / area, (dx1 * sy - sx * dy1) / area
    a, b, c = x1 - x0 + g * x1, x3 - x0 + h * x3, x0
    d, e, f = y1 - y0 + g * y1, y3 - y0 + h * y3, y0
    to_x = torch.stack([e - f * h, c * h - b, b * f - c * e], -1) * width
    to_y = torch.stack([f * g - d, a - c * g, c * d - a * f], -1) * height
    to_w = torch.stack([d * h - e * g, b * g - a * h], -1)
    return torch.cat([to_x, to_y, to_w], -1) / (a * e - b * d)[..., None]


def sample_corners(n, size, generator=None):
    """Random projective transformations as AVT and VTE draw them: the corners are scaled about the centre by
    U(0.8, 1.2), rotated by 0, 90, 180 or 270 degrees, and each is then moved by an integer in [-4, 4] pixels of a
    32-pixel image on either axis. The centre is size / 2 (AVT's code adds half a pixel).

    size: side in pixels, or (height, width); the shifts grow with it. generator: its device is where all is drawn.
    Returns quarter_turns (n,) int64, 0 to 3, and corners (n, 4, 2) float64, for `coefficients_from_corners`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    draw = {"generator": generator, "device": generator.device if generator is not None else "cpu"}
    quarter_turns = torch.randint(0, 4, (n, 1), **draw)
    scale = 0.8 + 0.4 * torch.rand(n, 1, 1, dtype=torch.float64, **draw)
    shift = torch.randint(-4, 5, (n, 4, 2), **draw)

    corner = torch.arange(4, device=scale.device)  # top left, top right, bottom right, bottom left
    right, down = (corner == 1) | (corner == 2), corner >= 2
    unit = (torch.stack([right, down], -1).to(scale) - 0.5) * scale + 0.5  # (n, 4, 2), the image being the unit square
    unit = unit.gather(1, ((corner + quarter_turns) % 4)[..., None].expand(n, 4, 2)) + shift / 32
    return quarter_turns[:, 0], torch.stack([unit[..., 0] * width, unit[..., 1] * height], -1)


def sample_coefficients(n, size, generator=None):
    """(n, 8) float32 coefficients of random transformations (`sample_corners`), for `projective_warp`, on the
    generator's device. size: side in pixels, or (height, width)."""
    _, corners = sample_corners(n, size, generator)
    return coefficients_from_corners(corners, size).float()


def transformation_target(coefficients, size):
    """What the decoders regress: the coefficients, centred and scaled. (N, 8) -> (N, 8); at 32 x 32 the divisors are
    those of AVT, and at any other size they scale so that the distribution stays the same."""
    height, width = (size, size) if isinstance(size, int) else size
    a, b, c, d, e, f, g, h = coefficients.unbind(-1)
    c, f = (c - width / 2) / (20 * width / 32), (f - height / 2) / (20 * height / 32)
    g, h = g / (0.015 * 32 / width), h / (0.015 * 32 / height)
    return torch.stack([a, b * height / width, c, d * width / height, e, f, g, h], -1)


def sample_crops(n, size, generator=None):
    """RandomCrop(size, padding=size / 8) and a random horizontal flip: (n, 3) int64 rows (rows down, columns right,
    flip) for `warp_batch`, on the generator's device."""
    draw = {"generator": generator, "device": generator.device if generator is not None else "cpu"}
    shift = torch.randint(-(size // 8), size // 8 + 1, (n, 2), **draw)
    return torch.cat([shift, torch.randint(0, 2, (n, 1), **draw)], 1)


def projective_warp_reference(images, coefficients, fill=128.0, window=None):
    """`projective_warp` in plain PyTorch, points in float64: the same result, differentiable, on any device. The test
    oracle, and the fallback when the extension is not built. window: as for `warp_batch`."""
    n, channels, height, width = images.shape
    a, b, c, d, e, f, g, h = coefficients.double().reshape(n, 8, 1, 1).unbind(1)
    x = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5  # (W,)
    y = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5  # (H, 1)
    denominator = g * x + h * y + 1  # (N, H, W)
    u, v = (a * x + b * y + c) / denominator, (d * x + e * y + f) / denominator
    whole = torch.tensor([[0, 0, height, width]], device=images.device)
    top, left, rows, columns = (whole if window is None else window).reshape(-1, 4, 1, 1).unbind(1)
    bottom, right = (top + rows).clamp(max=height), (left + columns).clamp(max=width)
    top, left = top.clamp(min=0), left.clamp(min=0)
    inside = (u >= left) & (u < right) & (v >= top) & (v < bottom)  # False for NaN
    u, v = torch.where(inside, u, 0.5) - 0.5, torch.where(inside, v, 0.5) - 0.5

    pixels = images if images.is_floating_point() else images.float()
    x0, y0 = u.detach().floor(), v.detach().floor()
    fx, fy = (u - x0).to(pixels.dtype)[:, None], (v - y0).to(pixels.dtype)[:, None]  # (N, 1, H, W)

    def tap(row, column):
        row, column = row.clamp(top, bottom - 1).clamp(0, height - 1), column.clamp(left, right - 1).clamp(0, width - 1)
        at = (row * width + column).long().flatten(1)[:, None].expand(n, channels, height * width)
        return pixels.flatten(2).gather(2, at).reshape(n, channels, height, width)

    above = tap(y0, x0) * (1 - fx) + tap(y0, x0 + 1) * fx
    below = tap(y0 + 1, x0) * (1 - fx) + tap(y0 + 1, x0 + 1) * fx
    warped = torch.where(inside[:, None], above * (1 - fy) + below * fy, fill)
    return warped if images.is_floating_point() else warped.round().clamp(0, 255).to(images.dtype)


def crop_and_flip_reference(images, crops):
    """Shifted views with black (0) beyond the border, then flipped: (N, C, H, W), (N, 3) -> (N, C, H, W)."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + crops[:, :1]  # (N, H)
    columns = torch.arange(width, device=images.device).expand(len(crops), -1)
    columns = torch.where(crops[:, 2:] != 0, width - 1 - columns, columns) + crops[:, 1:2]  # (N, W)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    n = torch.arange(len(images), device=images.device)[:, None, None]
    views = images.movedim(1, 3)[n, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
    return torch.where(inside[:, None], views.movedim(3, 1), torch.zeros((), dtype=images.dtype, device=images.device))


noted = set()


def note_once(text):
    """One line on stderr, the first time only (and not from within torch.compile, which cannot print)."""
    if not torch.compiler.is_compiling() and text not in noted:
        noted.add(text)
        print(f"note: {text}", file=sys.stderr)


def compiled_for(images):
    """Whether the compiled warp takes these images; where it does not, a note says so once."""
    if minter_warp is None:
        note_once(f"the compiled warp is not built, using the slower PyTorch form ({minter_warp_missing}); "
                  "`make setup` or `pip install --no-build-isolation .` builds it")
        return False
    if images.is_cuda and CUDA_ARCHITECTURES is None:
        note_once("the compiled warp is built without CUDA, using the slower PyTorch form on the GPU; with nvcc there, "
                  "`pip install --no-build-isolation .` builds it with CUDA")
        return False
    return True


def projective_warp(images, coefficients, fill=128.0):
    """Warps each image by its own projective map, as PIL's Image.transform(PERSPECTIVE, BILINEAR, fillcolor) does.

    images: (N, C, H, W), uint8 or float32 (float64 also; half types are computed in float32), any strides.
    coefficients: (N, 8), (a, b, c, d, e, f, g, h) with u = (ax + by + c) / (gx + hy + 1) and
    v = (dx + ey + f) / (gx + hy + 1) from the centre (x, y) of an output pixel to the point (u, v) read, pixel centres
    at + 0.5. fill: value outside the image. Returns the type and shape of images, contiguous; differentiable with
    respect to float images and the coefficients (once). Which pixels are filled is decided in float64; up to 256 pixels
    a side the points are otherwise float32, within 0.01 grey levels of the reference's float64. Raises ValueError and
    TypeError.
    """
    if images.dim() != 4 or coefficients.shape != (len(images), 8):
        raise ValueError(f"projective_warp takes images (N, C, H, W) and coefficients (N, 8), "
                         f"not {tuple(images.shape)} and {tuple(coefficients.shape)}")
    if images.dtype in (torch.float16, torch.bfloat16):
        return projective_warp(images.float(), coefficients, fill).to(images.dtype)
    if images.dtype not in (torch.uint8, torch.float32, torch.float64):
        raise TypeError(f"projective_warp takes uint8 or float32 images, not {images.dtype}")
    if not coefficients.is_floating_point():
        raise TypeError(f"projective_warp takes floating-point coefficients, not {coefficients.dtype}")
    if images.device != coefficients.device:
        raise ValueError(f"images are on {images.device} and coefficients on {coefficients.device}; move one of them")
    if not compiled_for(images):
        return projective_warp_reference(images, coefficients, fill)
    if coefficients.dtype not in (torch.float32, torch.float64):
        coefficients = coefficients.float()
    return torch.ops.minter.warp(images, coefficients.contiguous(), None, None, None, None, None, fill, images.dtype)


def warp_batch(images, index, crops=None, coefficients=None, scale=None, shift=None, dtype=torch.float32, fill=128.0,
               window=None):
    """What a training step needs, in one pass over the output: take, crop and flip, warp, normalise.

    images: the data set, (M, C, H, W) uint8 (float32 also). index: (N,) int64, which images. crops: (N, 3) int64 from
    `sample_crops`, or None. coefficients: (N, 8), or None for no warp. scale, shift: (C,) float32 from `normalization`,
    output = value * scale + shift. dtype: float32 or bfloat16. window: (N, 4) int64 rows (top, left, height, width),
    all that the warp sees of each cropped and flipped image, in whose coordinates it stays; None for everything.
    Returns (N, C, H, W). An index out of range raises on the CPU; on CUDA the compiled form, which would have to wait
    for it, makes that image NaN.
    """
    if window is not None and coefficients is None:
        raise ValueError("warp_batch takes a window with coefficients only")
    if coefficients is not None:
        double = coefficients.dtype == torch.float64
        coefficients = (coefficients if double else coefficients.float()).contiguous()
    if compiled_for(images):
        return torch.ops.minter.warp(images, coefficients, index, crops, window, scale, shift, fill, dtype)
    batch = images.index_select(0, index).float()
    batch = batch if crops is None else crop_and_flip_reference(batch, crops)
    batch = batch if coefficients is None else projective_warp_reference(batch, coefficients, fill, window)
    batch = batch if scale is None else batch * scale[:, None, None]
    batch = batch if shift is None else batch + shift[:, None, None]
    return batch.to(dtype)


def normalization(mean, std, device="cpu"):
    """(scale, shift) for `warp_batch`, each (C,) float32: grey levels 0..255 to (value / 255 - mean) / std."""
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


if minter_warp is not None:

    @torch.library.register_fake("minter::warp")
    def _(images, coefficients, index, crop, window, scale, shift, fill, dtype):
        return images.new_empty((len(images) if index is None else len(index), *images.shape[1:]), dtype=dtype)

    @torch.library.register_fake("minter::warp_backward")
    def _(grad, images, coefficients, index, crop, window, scale, images_needed, coefficients_needed):
        return (images.new_empty(grad.shape if images_needed else (0,)),
                images.new_empty((len(grad), 8) if coefficients_needed else (0,), dtype=torch.float64))

    def _save_for_backward(ctx, inputs, output):
        images, coefficients, index, crop, window, scale, _shift, _fill, _dtype = inputs
        ctx.save_for_backward(images, coefficients, index, crop, window, scale)

    def _warp_backward(ctx, grad):
        images, coefficients, index, crop, window, scale = ctx.saved_tensors
        real = torch.float64 if images.dtype == torch.float64 else torch.float32
        need_images, need_coefficients = ctx.needs_input_grad[:2]
        grad_images, grad_coefficients = torch.ops.minter.warp_backward(
            grad.to(real).contiguous(), images, coefficients, index, crop, window, scale, need_images,
            need_coefficients)
        return (grad_images if need_images else None,
                grad_coefficients.to(coefficients.dtype) if need_coefficients else None,
                None, None, None, None, None, None, None)

    def _no_second_derivative(ctx, *grads):
        raise RuntimeError("the compiled warp has no second derivative; use projective_warp_reference for one")

    torch.library.register_autograd("minter::warp", _warp_backward, setup_context=_save_for_backward)
    torch.library.register_autograd("minter::warp_backward", _no_second_derivative)


# ----------------------------------------------------------------------------------------------------------- data

STATISTICS = {  # mean and standard deviation of each channel, of images in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "stl10": ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27)),
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def load_images(dataset, split, data_dir="data", image_size=32):
    """Decodes a data set into one tensor.

    dataset: "digits", "cifar10", "stl10", or a folder with train/<class>/* and test/<class>/*. split: "train" or
    "test", both with labels, or what to pretrain on, "unlabeled" or "train+unlabeled": the training images where a set
    has no unlabeled ones. Returns images (N, 3, image_size, image_size) uint8, labels (N,) int64 or None, class names.
    The images of a folder come one class after the other in turn, so that the first n are balanced. Raises UserError.
    """
    if dataset == "digits":
        return load_digits_split(split, image_size)
    if dataset in ("cifar10", "stl10"):
        return load_torchvision(dataset, split, data_dir, image_size)
    if not Path(dataset).is_dir():
        raise UserError(f"unknown data set '{dataset}': give digits, cifar10, stl10, or a folder that holds "
                        "train/<class>/ and test/<class>/", exit_code=2)
    return load_folder(Path(dataset), "test" if split == "test" else "train", image_size)


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
    return images, torch.from_numpy(digits.target[chosen]).long(), [str(name) for name in digits.target_names]


def resize(images, image_size, chunk=4096):
    """(N, 3, H, W) uint8 -> (N, 3, image_size, image_size): bilinear with antialiasing, as PIL resizes."""
    if images.shape[2:] == (image_size, image_size):
        return images
    size = (image_size, image_size)
    return torch.cat([F.interpolate(part.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
                      .round().clamp(0, 255).to(torch.uint8) for part in images.split(chunk)])


def load_torchvision(dataset, split, data_dir, image_size):
    """CIFAR-10 or STL-10, downloaded into data_dir and checked by torchvision."""
    from http.client import HTTPException
    from tarfile import TarError

    import torchvision.datasets

    name = {"cifar10": "CIFAR-10", "stl10": "STL-10"}[dataset]
    try:
        if dataset == "cifar10":
            data = torchvision.datasets.CIFAR10(data_dir, train=split != "test", download=True)
            images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), data.targets
        else:
            data = torchvision.datasets.STL10(data_dir, split=split, download=True)
            images, labels = torch.from_numpy(data.data), data.labels
    except (OSError, RuntimeError, EOFError, HTTPException, TarError) as error:  # URLError is an OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} could not be downloaded into or read from '{data_dir}' ({reason}): try again, or use "
                        "--dataset digits, which works offline, or --dataset DIR with images of your own") from error
    labels = None if split.endswith("unlabeled") and dataset == "stl10" else torch.as_tensor(labels).long()
    return resize(images, image_size), labels, list(data.classes)


def decode(path, image_size):
    """One image file as (3, image_size, image_size) uint8: upright, shorter side resized, centre cropped."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def visible(folder):
    """Entries in order of their names, without the hidden ones that editors and file managers leave."""
    return sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda e: e.name)


def load_folder(folder, split, image_size):
    """Images of folder/split/<class>/*, cached beside the folder; the cache is made anew when any file changes."""
    for needed in ("train", split):
        if not (folder / needed).is_dir():
            raise UserError(f"'{folder}' has no folder '{needed}/': it is to hold train/<class>/ and test/<class>/")
    classes = [entry.name for entry in visible(folder / "train") if entry.is_dir()]
    files = []  # (position within its class, class, path, state)
    for entry in visible(folder / split):
        if not entry.is_dir():
            continue
        if entry.name not in classes:
            raise UserError(f"'{folder}/{split}/{entry.name}' has no counterpart in '{folder}/train/'")
        found = [file for file in visible(entry) if Path(file.name).suffix.lower() in IMAGE_SUFFIXES]
        for position, file in enumerate(found):
            try:
                state = file.stat()
            except OSError as error:  # a broken link
                raise UserError(f"cannot read the image '{file.path}' ({error.strerror}): remove it") from error
            files.append((position, classes.index(entry.name), file.path, f"{state.st_size} {state.st_mtime_ns}"))
    if not files:
        raise UserError(f"'{folder}/{split}' holds no images: it is to hold one folder a class, with "
                        f"{', '.join(sorted(IMAGE_SUFFIXES))} files")
    files.sort(key=lambda file: file[:2])
    listing = [f"{Path(path).relative_to(folder)} {state}" for _, _, path, state in files]
    fingerprint = hashlib.sha256("\n".join([*classes, *listing]).encode()).hexdigest()
    labels = torch.tensor([label for _, label, _, _ in files])

    cache = folder.resolve().with_name(f"{folder.resolve().name}.{split}-{image_size}.cache")
    with contextlib.suppress(Exception):  # whatever is wrong with a cache, the images are still there
        cached = torch.load(cache, weights_only=True)
        if cached["fingerprint"] == fingerprint:
            return cached["images"], labels, classes

    def decoded(path):
        try:
            return decode(path, image_size)
        except Exception as error:
            raise UserError(f"cannot read the image '{path}' ({error}): repair or remove it") from error

    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without the interpreter lock
        try:
            results = pool.map(decoded, [path for _, _, path, _ in files])
            progress = tqdm(results, total=len(files), desc=f"decoding {split} images", leave=False, disable=None)
            for i, image in enumerate(progress):
                images[i] = image
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    try:
        save_atomically({"fingerprint": fingerprint, "images": images}, cache)
    except OSError as error:
        print(f"note: the decoded images are not cached ({error})", file=sys.stderr)
    return images, labels, classes


def image_statistics(dataset, images):
    """Mean and standard deviation of each channel, in [0, 1]: the customary ones of a known set, else measured."""
    if dataset in STATISTICS:
        return STATISTICS[dataset]
    histogram = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)]).double()
    histogram /= histogram.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64, device=histogram.device) / 255
    mean = (histogram * levels).sum(1)
    std = ((histogram * levels**2).sum(1) - mean**2).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())  # a constant image is not to divide by zero


# ---------------------------------------------------------------------------------------------------- the command


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists what can be given)\n")


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
        return value

    parse.__name__ = kind.__name__
    return parse


def non_negative(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of 0 or more")
    return value


def seed(text):
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to 2^32 - 1")
    return value


VTE_HELP = {
    "encoder": "default: the paper's, alexnet for stl10 and nin for all else; both must be the same in both phases",
    "image_size": "images are resized to this side; 32 as in the paper by default",
    "batch_size": "default: 512 for stl10, 256 for all else; smaller for few images",
    "lr": "Adam's; 1e-4 for long runs as in the paper, 5e-4 for runs of few epochs; sigma can diverge above that",
}


def training_parser(description, example, output, encoders=("nin", "alexnet"), lr=1e-4, advice=VTE_HELP):
    """The flags that every training script has. advice: what to say of those whose defaults are a paper's."""
    parser = Parser(description=description, epilog=f"example:\n  {example}")
    add = parser.add_argument
    add("--dataset", help="digits (offline), cifar10, stl10, or a folder with train/<class>/ and test/<class>/")
    add("--data-dir", default="data", help="where cifar10 and stl10 are downloaded to (default: %(default)s)")
    add("--encoder", choices=encoders, help=advice["encoder"])
    add("--image-size", type=positive(int), help=advice["image_size"])
    add("--epochs", type=positive(int), default=200, help="200 as in the paper; 10 to 20 show whether it learns")
    add("--batch-size", type=positive(int), help=advice["batch_size"])
    add("--lr", type=positive(float), default=lr, help=advice["lr"])
    add("--seed", type=seed, default=0, help="of weights, order, transformations and noise; vary it for error bars")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 autocast where the hardware has it; fp32 if a loss looks noisy")
    add("--limit", type=positive(int), metavar="N", help="train on the first N images only, for tries")
    add("--output", default=output, help="checkpoint to write, the log goes beside it (default: %(default)s)")
    return parser


def run_command(main):
    """Runs a script's main: a UserError becomes one sentence and its exit code."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; what the last finished epoch wrote is kept", file=sys.stderr)
        sys.exit(130)


def choose_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch finds no CUDA device here: use --device cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def choose_precision(name, device):
    """float32 or bfloat16: what autocast computes convolutions and products in."""
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        else:  # emulated bfloat16 is slower than float32
            checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            name = "bf16" if any(getattr(torch.cpu, check, bool)() for check in checks) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


class Run:
    """One training run: device, precision, seeds, images, batches, log, checkpoints. It knows no method and no loss.

    pretrained: the checkpoint (a dict) this run builds on; its data set, sizes and normalisation are the defaults.
    yardsticks: constants logged beside the metrics, {name: value}. split: the images to train on.
    """

    def __init__(self, method, args, pretrained=None, yardsticks=None, split="unlabeled"):
        given = pretrained["config"] if pretrained else {}
        args.dataset = args.dataset or given.get("dataset", "cifar10")
        args.encoder = args.encoder or given.get("encoder", "alexnet" if args.dataset == "stl10" else "nin")
        args.image_size = args.image_size or given.get("image_size", 32)
        args.batch_size = args.batch_size or (512 if args.dataset == "stl10" else 256)
        for name in ("encoder", "image_size"):
            if pretrained and getattr(args, name) != given[name]:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} does not fit --pretrained "
                                f"'{args.pretrained}', which was trained with {given[name]}", exit_code=2)
        if args.image_size < 8:
            raise UserError(f"--image-size {args.image_size} is too small: give 8 or more", exit_code=2)
        if args.image_size < 32 and args.encoder == "alexnet":
            raise UserError("--encoder alexnet takes images of 32 pixels or more", exit_code=2)
        if args.batch_size < 2:
            raise UserError("--batch-size 1 is too small: batch normalisation takes 2 or more", exit_code=2)
        self.method, self.args, self.yardsticks = method, args, yardsticks or {}
        self.device = choose_device(args.device)
        self.dtype = choose_precision(args.precision, self.device)
        self.output = Path(args.output)
        self.log = Path(args.output.removesuffix(".ckpt") + ".jsonl")
        self._check_output()
        images, _, _ = load_images(args.dataset, split, args.data_dir, args.image_size)
        images = images[: args.limit]
        if len(images) < 2:
            raise UserError("one image is too few to train on: give a larger --limit or more images", exit_code=2)
        if args.batch_size > len(images):
            raise UserError(f"--batch-size {args.batch_size} is larger than the {len(images)} training images: "
                            f"give at most --batch-size {len(images)}", exit_code=2)
        self.images = images.to(self.device)  # (N, 3, S, S) uint8
        mean, std = (given["mean"], given["std"]) if pretrained else image_statistics(args.dataset, images)
        self.config = {**vars(args), "mean": list(mean), "std": list(std)}
        self.scale, self.shift = normalization(mean, std, self.device)
        self.size = args.image_size
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        print(f"{method}: {len(images):,} images of {args.dataset}, {args.encoder}, {self.device.type}, "
              f"{str(self.dtype).removeprefix('torch.')}, seed {args.seed}")

    def _check_output(self):
        """Before hours of training, not after: the checkpoint can be written, and writing it loses nothing."""
        for path in (self.output, self.log):
            if path.exists():
                raise UserError(f"'{path}' exists already: give another --output, or remove it", exit_code=2)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output.parent):
                pass
        except OSError as error:
            raise UserError(f"cannot write '{self.output}' ({error.strerror}): give another --output") from error

    def prepare(self, model):
        """Moves the model to the device, in the layout its convolutions are fastest in."""
        return model.to(self.device, memory_format=torch.channels_last)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def epochs(self, model, optimizer):
        """Yields 1, 2, ...; after each epoch logs its means and writes the checkpoint."""
        for epoch in range(1, self.args.epochs + 1):
            self.epoch, self._sums, self._seen, self._start = epoch, {}, 0, time.perf_counter()
            self._bar = tqdm(total=len(self.images), desc=f"epoch {epoch}/{self.args.epochs}", unit=" images",
                             leave=False, disable=None)
            self._shown = self._start
            model.train()
            yield epoch
            self._bar.close()
            self._finish_epoch(model, optimizer)
        self._bar = None

    def batches(self):
        """Index tensors on the device: all images once, in random order. A last batch of one image, which batch
        normalisation cannot take, is left out."""
        order = torch.randperm(len(self.images), generator=self.generator, device=self.device)
        for index in order.split(self.args.batch_size):
            if len(index) > 1:
                yield index

    def step(self, loss, metrics, count):
        """Adds a step's loss and metrics, scalars on the device, to the epoch's means. Waits for the device only to
        show the loss in the progress bar, twice a second at most."""
        for name, value in {"loss": loss, **metrics}.items():
            total, images = self._sums.get(name, (0, 0))
            self._sums[name] = total + value.detach().float() * count, images + count
        self._seen += count
        self._bar.update(count)
        if not self._bar.disable and time.perf_counter() - self._shown > 0.5:
            self._shown = time.perf_counter()
            self._bar.set_postfix_str(f"loss {loss.item():.4f}")

    def mean(self, name):
        """The mean of a metric over the images of this epoch so far; waits for the device."""
        total, images = self._sums[name]
        return (total / images).item()

    def means(self):
        return {name: self.mean(name) for name in self._sums}

    def _finish_epoch(self, model, optimizer):
        means = self.means()
        seconds = time.perf_counter() - self._start
        bad = [f"the {name} became {value}" for name, value in means.items() if not math.isfinite(value)]
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            bad.append("weights became infinite or NaN")
        if bad:
            kept = f"; the checkpoint of epoch {self.epoch - 1} is kept in '{self.output}'" if self.epoch > 1 else ""
            raise UserError(f"{bad[0]} in epoch {self.epoch}{kept}: try a lower --lr or --precision fp32")
        row = {"epoch": self.epoch, **means, **self.yardsticks, "images_per_second": self._seen / seconds,
               "seconds": seconds}
        try:
            with open(self.log, "a") as log:
                log.write(json.dumps(row) + "\n")
            save_checkpoint(self.output, self.method, self.config, model, optimizer, self.epoch)
        except OSError as error:
            raise UserError(f"cannot write '{self.output}' ({error}); what was there before is kept") from error
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        shown += "".join(f"  {name} {value:g}" for name, value in self.yardsticks.items())
        print(f"epoch {self.epoch}/{self.args.epochs}  {shown}  {row['images_per_second']:.0f} images/s", flush=True)

    def finish(self, next_command):
        print(f"wrote {self.output} and {self.log}\nnext: {next_command}")


# ---------------------------------------------------------------------------------------------------- checkpoints

FORMAT_VERSION = 1


def save_atomically(value, path):
    """torch.save by way of a temporary file: the path holds the old contents or the new, whole, never a part."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # how torch.save reports a disk that is full
        raise OSError(errno.EIO, str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, method, config, model, optimizer, epoch):
    """A plain dict of tensors and plain values; `model.encoder` is what the probe evaluates."""
    save_atomically({"format_version": FORMAT_VERSION, "method": method, "config": config, "epoch": epoch,
                     "encoder": model.encoder.state_dict(), "model": model.state_dict(),
                     "optimizer": optimizer.state_dict()}, path)


def load_checkpoint(path, method=None):
    """Reads and checks a checkpoint; never runs code from it. method: the only one acceptable. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint '{path}'")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read '{path}' ({error.strerror})") from error
    except Exception as error:
        raise UserError(f"'{path}' is no checkpoint of minTER: it is truncated, or holds more than tensors and plain "
                        "values, which is not loaded; train it again") from error
    keys = {"format_version": int, "method": str, "config": dict, "epoch": int, "encoder": dict, "model": dict}
    settings = ("dataset", "encoder", "image_size", "mean", "std")
    if (not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), kind) for k, kind in keys.items())
            or not all(name in checkpoint["config"] for name in settings)):
        raise UserError(f"'{path}' is no checkpoint of minTER: it lacks some of {', '.join(keys)}, or its config some "
                        f"of {', '.join(settings)}")
    if checkpoint["format_version"] != FORMAT_VERSION:
        raise UserError(f"'{path}' has format version {checkpoint['format_version']}; this code reads {FORMAT_VERSION}")
    if method is not None and checkpoint["method"] != method:
        raise UserError(f"'{path}' is a checkpoint of {checkpoint['method']}; one of {method} is needed here")
    return checkpoint


def load_encoder(checkpoint, path):
    """The encoder of a checkpoint, in eval mode on the CPU. Raises UserError where its weights do not fit."""
    config = checkpoint["config"]
    try:
        encoder = build_encoder(config["encoder"], config["image_size"], config.get("probabilistic", True))
        encoder.load_state_dict(checkpoint["encoder"])
    except Exception as error:
        raise UserError(f"the weights in '{path}' do not fit the encoder '{config.get('encoder')}' at image size "
                        f"{config.get('image_size')} that it names") from error
    return encoder.eval()


def load_model(model, checkpoint, path):
    """`model` with all that the checkpoint holds, in eval mode on the CPU. Raises UserError where it does not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except Exception as error:
        raise UserError(f"the weights in '{path}' do not fit the model of {checkpoint['method']} that it "
                        "names") from error
    return model.eval()
