"""What every method shares: encoders, transformations, data, the training run, checkpoints.

Nothing here knows a method. Copy this file beside any one script and that script runs; without the compiled extension
(`minter_warp`, built by setup.py) the warp falls back to the PyTorch reference below.
"""

import argparse
import contextlib
import datetime
import errno
import hashlib
import itertools
import json
import math
import os
import pickletools
import re
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import time
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    import minter_warp  # registers torch.ops.minter.warp
except ImportError as error:
    minter_warp, minter_warp_missing = None, str(error)
CUDA_ARCHITECTURES = minter_warp and minter_warp.build_info()["cuda_architectures"]


def printable(text):
    """Names come off disks: what a terminal would act on is shown as an escape, and all of it on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """One sentence for the user: what was wrong and what to do. Exit code 1; 2 when the command itself was wrong."""

    def __init__(self, message, exit_code=1):
        super().__init__(printable(message))
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


ENCODERS = ("nin", "alexnet", "resnet18")
MAX_IMAGE_SIZE = 1024  # beyond it NIN's heads alone would take gigabytes


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
    if not torch.compiler.is_compiling() and text not in noted and processes()[0] == 0:
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


def check_out(out, shape, dtypes, inputs):
    """Raises TypeError and ValueError unless the result of a warp may be written into this tensor, of one of dtypes."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is to be a tensor, not {type(out).__name__}")
    negative = not torch.compiler.is_compiling() and out.is_neg()  # which cannot be asked while compiling
    fits = tuple(out.shape) == tuple(shape) and out.dtype in dtypes and out.device == inputs[0].device
    if not fits or not out.is_contiguous() or negative:
        types = " or ".join(map(str, dtypes))
        raise ValueError(f"out is to be contiguous, {tuple(shape)} {types} on {inputs[0].device}, not "
                         f"{tuple(out.shape)} {out.dtype} on {out.device}{', a negative view' if negative else ''}")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (*inputs, out)):
        raise ValueError("a warp into out has no gradient: leave out away, or detach the tensors")


def projective_warp(images, coefficients, fill=128.0, out=None):
    """Warps each image by its own projective map, as PIL's Image.transform(PERSPECTIVE, BILINEAR, fillcolor) does.

    images: (N, C, H, W), uint8 or float32 (float64 also; half types are computed in float32), any strides.
    coefficients: (N, 8), (a, b, c, d, e, f, g, h) with u = (ax + by + c) / (gx + hy + 1) and
    v = (dx + ey + f) / (gx + hy + 1) from the centre (x, y) of an output pixel to the point (u, v) read, pixel centres
    at + 0.5. fill: value outside the image. out: what to write the result into and return, contiguous, sharing no
    memory with what is read; None for a new tensor (on the CPU, one of more than 32 MiB is in memory that is kept for
    later ones when it is freed, csrc/memory.cpp, and cannot be resized in place). Returns the type and shape of images,
    contiguous; without out, differentiable with respect to float images and the coefficients, once and backwards (to
    forward mode, torch.func.jvp, it is constant). Which pixels are filled is decided in float64; up to 256 pixels a
    side the points are otherwise in float32, and along a row uint8 images are blended in fixed point, 1 / 32768 of a
    pixel (on CUDA along a column, where they have three channels and up to 32 pixels a side): within 0.02 grey levels
    of the reference's float64 on the CPU (.015 measured, black and white by turns); on CUDA, where it is not measured
    yet, the tests allow 0.03. Raises ValueError and TypeError, and RuntimeError for more elements than there is memory
    for.
    """
    if not isinstance(images, torch.Tensor) or not isinstance(coefficients, torch.Tensor):
        raise TypeError(f"projective_warp takes tensors, not {type(images).__name__} and {type(coefficients).__name__}")
    if images.dim() != 4 or coefficients.shape != (len(images), 8):
        raise ValueError(f"projective_warp takes images (N, C, H, W) and coefficients (N, 8), "
                         f"not {tuple(images.shape)} and {tuple(coefficients.shape)}")
    if images.dtype not in (torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"projective_warp takes uint8 or float32 images, not {images.dtype}")
    if not coefficients.is_floating_point():
        raise TypeError(f"projective_warp takes floating-point coefficients, not {coefficients.dtype}")
    if images.device != coefficients.device:
        raise ValueError(f"images are on {images.device} and coefficients on {coefficients.device}; move one of them")
    if out is not None:
        check_out(out, images.shape, (images.dtype,), (images, coefficients))
    if images.dtype in (torch.float16, torch.bfloat16):
        warped = projective_warp(images.float(), coefficients, fill)
        return warped.to(images.dtype) if out is None else out.copy_(warped)
    if not compiled_for(images):
        warped = projective_warp_reference(images, coefficients, fill)
        return warped if out is None else out.copy_(warped)
    if coefficients.dtype not in (torch.float32, torch.float64):
        coefficients = coefficients.float()
    return _compiled_warp(images, coefficients.contiguous(), None, None, None, None, None, fill, images.dtype, out)


def warp_batch(images, index, crops=None, coefficients=None, scale=None, shift=None, dtype=torch.float32, fill=128.0,
               window=None, out=None):
    """What a training step needs, in one pass over the output: take, crop and flip, warp, normalise.

    images: the data set, (M, C, H, W) uint8 (float32 also). index: (N,) int64, which images. crops: (N, 3) int64 from
    `sample_crops`, or None. coefficients: (N, 8), or None for no warp. scale, shift: (C,) float32 from `normalization`,
    output = value * scale + shift. dtype: float32 or bfloat16 (or uint8, rounded, without scale and shift). window:
    (N, 4) int64 rows (top, left, height, width), all that the warp sees of each cropped and flipped image, in whose
    coordinates it stays; None for everything. out: as for `projective_warp`, its type in place of dtype. Returns
    (N, C, H, W). Raises ValueError, TypeError and RuntimeError for arguments that do not fit. An index out of range
    raises on the CPU; on CUDA the compiled form, which would have to wait for it, makes that image NaN.
    """
    if window is not None and coefficients is None:
        raise ValueError("warp_batch takes a window with coefficients only")
    if out is not None:
        dtypes = dict.fromkeys((torch.float32, torch.bfloat16, images.dtype))
        check_out(out, (len(index), *images.shape[1:]), tuple(dtypes), (images, coefficients, scale, shift))
        dtype = out.dtype
    if coefficients is not None:
        double = coefficients.dtype == torch.float64
        coefficients = (coefficients if double else coefficients.float()).contiguous()
    if compiled_for(images):
        return _compiled_warp(images, coefficients, index, crops, window, scale, shift, fill, dtype, out)
    batch = images.index_select(0, index).float()
    batch = batch if crops is None else crop_and_flip_reference(batch, crops)
    batch = batch if coefficients is None else projective_warp_reference(batch, coefficients, fill, window)
    batch = batch if scale is None else batch * scale[:, None, None]
    batch = batch if shift is None else batch + shift[:, None, None]
    batch = batch.round().clamp(0, 255).to(dtype) if dtype == torch.uint8 else batch.to(dtype)
    return batch if out is None else out.copy_(batch)


def _compiled_warp(images, coefficients, index, crops, window, scale, shift, fill, dtype, out):
    if out is None:
        return torch.ops.minter.warp(images, coefficients, index, crops, window, scale, shift, fill, dtype)
    torch.ops.minter.warp_out(images, coefficients, index, crops, window, scale, shift, fill, out)
    torch.autograd.graph.increment_version(out)  # a gradient that needs what was there before is refused, not wrong
    return out


def normalization(mean, std, device="cpu"):
    """(scale, shift) for `warp_batch`, each (C,) float32: grey levels 0..255 to (value / 255 - mean) / std."""
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


if minter_warp is not None:

    def _check_devices(images, *others):
        if any(other is not None and other.device != images.device for other in others):
            raise ValueError("minter::warp: all tensors are to be on one device")

    @torch.library.register_fake("minter::warp")
    def _(images, coefficients, index, crop, window, scale, shift, fill, dtype):
        _check_devices(images, coefficients, index, crop, window, scale, shift)
        return images.new_empty((len(images) if index is None else len(index), *images.shape[1:]), dtype=dtype)

    @torch.library.register_fake("minter::warp_out")
    def _(images, coefficients, index, crop, window, scale, shift, fill, out):
        _check_devices(images, coefficients, index, crop, window, scale, shift, out)

    @torch.library.register_fake("minter::warp_backward")
    def _(grad, images, coefficients, index, crop, window, scale, images_needed, coefficients_needed):
        _check_devices(images, grad, coefficients, index, crop, window, scale)
        return (images.new_empty(grad.shape if images_needed else (0,)),
                images.new_empty((len(grad), 8) if coefficients_needed else (0,), dtype=torch.float64))

    def _save_for_backward(ctx, inputs, output):
        images, coefficients, index, crop, window, scale, shift, _fill, _dtype = inputs
        if any(tensor is not None and tensor.requires_grad for tensor in (scale, shift)):
            raise ValueError("minter::warp: scale and shift have no gradient; detach them")
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


# ------------------------------------------------------------------------------------------------------ processes


def processes():
    """(rank of this process, how many train together): (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def join_processes(device):
    """Joins those that torchrun started, on this process's device: NCCL for CUDA, gloo for the CPU. Returns the
    device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            here = int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1))
            if here > gpus:  # all of them say so, before any waits for the others
                raise UserError(f"{here} processes were started on a machine with {gpus} GPU{'s' * (gpus > 1)}: give "
                                f"torchrun --nproc_per_node={gpus}, or --device cpu")
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend, bound = ("nccl", {"device_id": device}) if device.type == "cuda" else ("gloo", {})
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=6), **bound)  # downloads may take long
    return device


@contextlib.contextmanager
def first_process_first():
    """What downloads or writes caches is done by one process, then by one of each other node, then by the rest, who
    find it done."""
    rank, count = processes()
    turn = 0 if rank == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn if count > 1 else 0):
        dist.barrier()
    yield
    for _ in range(2 - turn if count > 1 else 0):
        dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)  # what every process asks of every row
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
        return value

    backward = forward  # each process's value is in the sum of every process


def gather(rows):
    """(n, ...) of each process -> (K n, ...) of all K in the order of their ranks, with gradients: each process gets
    the sum of what all of them ask of its rows. One process keeps its rows."""
    return rows if processes()[1] == 1 else _Gather.apply(rows.contiguous())


def own_rows(n, device):
    """Where this process's n rows are among what `gather` returns: (n,) int64."""
    return processes()[0] * n + torch.arange(n, device=device)


def average(value):
    """The mean over all processes, with gradients."""
    return value if processes()[1] == 1 else _Sum.apply(value) / processes()[1]


def pool_moments(mean, variance):
    """Mean and biased variance of all processes' rows together, from those of each, which has as many as any other."""
    if processes()[1] == 1:
        return mean, variance
    mean_of_all = average(mean)
    return mean_of_all, average(variance + (mean - mean_of_all).square())


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch.nn.SyncBatchNorm for the CPU, which it refuses: batch normalisation over the batches of all processes."""

    def _check_input_dim(self, values):
        pass

    def forward(self, values):
        if not self.training:
            return super().forward(values)
        dims, shape = [0, *range(2, values.dim())], (1, -1, *[1] * (values.dim() - 2))
        real = values.float()
        mean, variance = pool_moments(real.mean(dims), real.var(dims, unbiased=False))
        with torch.no_grad():
            count = processes()[1] * values.numel() / values.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (real * scale.view(shape) + shift.view(shape)).to(values.dtype)


def synchronise_batch_norm(module, device):
    """Every batch normalisation in it is made to see the batches of all processes."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                other = SyncBatchNorm(child.num_features, child.eps, child.momentum)
                other.load_state_dict(child.state_dict())
                setattr(parent, name, other.train(child.training).requires_grad_(child.weight.requires_grad))
    return module


def is_synchronised(norm):
    return isinstance(norm, SyncBatchNorm | nn.SyncBatchNorm)


# ----------------------------------------------------------------------------------------------------------- data

STATISTICS = {  # mean and standard deviation of each channel, of images in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "stl10": ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27)),
}
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
DECODING = "2"  # of `decode`: images cached by another rule are decoded anew
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
    """One image file as (3, image_size, image_size) uint8: shorter side resized, centre cropped.

    The content says what kind of image it is, not the name. Of an animation the first frame; upright, as its EXIF tag
    says; grey, palette and CMYK become RGB; transparency is dropped, as by torchvision; 16 bits are scaled to 8. Raises
    what PIL raises, and ValueError for more pixels than PIL holds to be safe and for pixels of 32 bits."""
    from PIL import Image, ImageOps

    with Image.open(path, formats=IMAGE_FORMATS) as image:  # no others: some of PIL's start other programs
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
        sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        if image.mode in ("I", "F") and not sixteen:
            raise ValueError("32-bit pixels, of which nothing says how bright they are")
        image = ImageOps.exif_transpose(image)
        if sixteen:  # PIL would cut them off at 255
            image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).clip(0, 255).astype(np.uint8))
        image = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def visible(folder):
    """Entries in order of their names, without the hidden ones that editors and file managers leave."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list the folder '{os.fspath(folder)}' ({error.strerror})") from error
    return sorted(entries, key=lambda entry: entry.name)


def load_folder(folder, split, image_size):
    """Images of folder/split/<class>/*, cached beside the folder; the cache is made anew when any file changes. Files
    are images by their suffix; all others are ignored. Links are followed wherever they lead, to regular files only."""
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
            if not stat.S_ISREG(state.st_mode):  # a pipe would be waited for, a device read without end
                raise UserError(f"cannot read the image '{file.path}' (it is no regular file): remove it")
            files.append((position, classes.index(entry.name), file.path, f"{state.st_size} {state.st_mtime_ns}"))
    if not files:
        raise UserError(f"'{folder}/{split}' holds no images: it is to hold one folder a class, with "
                        f"{', '.join(sorted(IMAGE_SUFFIXES))} files")
    files.sort(key=lambda file: file[:2])
    listing = [f"{Path(path).relative_to(folder)} {state}" for _, _, path, state in files]
    listing = "\0".join([DECODING, *classes, *listing]).encode(errors="surrogateescape")
    fingerprint = hashlib.sha256(listing).hexdigest()
    labels = torch.tensor([label for _, label, _, _ in files])

    cache = folder.resolve().with_name(f"{folder.resolve().name}.{split}-{image_size}.cache")
    shape = (len(files), 3, image_size, image_size)
    with contextlib.suppress(Exception):  # whatever is wrong with a cache, the images are still there
        cached = load_plain(cache)
        if (cached["fingerprint"], cached["images"].shape, cached["images"].dtype) == (fingerprint, shape, torch.uint8):
            return cached["images"], labels, classes

    def decoded(path):
        try:
            return decode(path, image_size)
        except Exception as error:
            reason = "it is none, or of no kind that is read" if "cannot identify" in str(error) else error
            raise UserError(f"cannot read the image '{path}' ({reason}): repair or remove it") from error

    try:
        images = torch.empty(shape, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(f"{len(files):,} images of {image_size} x {image_size} pixels do not fit into memory: give a "
                        "smaller --image-size") from error
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without Python's lock
        warnings.simplefilter("ignore")  # PIL's: what matters of them is decided in `decode`
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
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help lists what can be given)\n")


def number(kind, text):
    """kind(text), int or float, of plain digits only: Python's also take underscores and those of other scripts."""
    if not text.isascii() or "_" in text:
        raise ValueError
    return kind(text)


def positive(kind, most=None):
    most = most or (2**31 - 1 if kind is int else sys.float_info.max)

    def parse(text):
        value = number(kind, text)
        if not 0 < value <= most:
            limit = f" and at most {most:,}" if kind is int else ""
            raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0{limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


def non_negative(text):
    value = number(float, text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of 0 or more")
    return value


def seed(text):
    value = number(int, text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to 2^32 - 1")
    return value


def usable_path(text):
    """Whether a path can be opened and shown: UTF-8 without control characters, its names short enough to add to."""
    try:
        names = [name.encode() for name in text.split("/")]
    except UnicodeEncodeError:
        return False
    return 0 < len(text) < 4000 and max(map(len, names)) <= 200 and not re.search(r"[\0-\x1f\x7f-\x9f]", text)


def file_path(text):
    if not usable_path(text):
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is no path: it is empty, too long or has control characters")
    return text


VTE_HELP = {
    "encoder": "default: the paper's, alexnet for stl10 and nin for all else; both must be the same in both phases",
    "image_size": "images are resized to this side; 32 as in the paper by default",
    "batch_size": "default: 512 for stl10, 256 for all else; of all processes together under torchrun",
    "lr": "Adam's; 1e-4 for long runs as in the paper, 5e-4 for runs of few epochs; sigma can diverge above that",
}


def training_parser(description, example, output, encoders=("nin", "alexnet"), lr=1e-4, advice=VTE_HELP):
    """The flags that every training script has. advice: what to say of those whose defaults are a paper's."""
    parser = Parser(description=description, epilog=f"example:\n  {example}")
    add = parser.add_argument
    add("--dataset", type=file_path,
        help="digits (offline), cifar10, stl10, or a folder with train/<class>/ and test/<class>/")
    add("--data-dir", type=file_path, default="data",
        help="where cifar10 and stl10 are downloaded to (default: %(default)s)")
    add("--encoder", choices=encoders, help=advice["encoder"])
    add("--image-size", type=positive(int, MAX_IMAGE_SIZE), help=advice["image_size"])
    add("--epochs", type=positive(int), default=200, help="200 as in the paper; 10 to 20 show whether it learns")
    add("--batch-size", type=positive(int), help=advice["batch_size"])
    add("--lr", type=positive(float), default=lr, help=advice["lr"])
    add("--seed", type=seed, default=0, help="of weights, order, transformations and noise; vary it for error bars")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 autocast where the hardware has it; fp32 if a loss looks noisy")
    add("--compile", choices=["auto", "off", "inductor", "cudagraphs"], default="auto",
        help="torch.compile of the model, on CUDA also as CUDA graphs; auto: off, until measured to be faster")
    add("--data-on", choices=["auto", "device", "host"], default="auto",
        help="where the images are kept; auto: on the device if they take at most half of its free memory")
    add("--sync-bn", action="store_true", help="under torchrun: batch normalisation over the batches of all processes")
    add("--deterministic", action="store_true", help="on a GPU: the same seed gives the same bits, slower; a CPU's "
        "always does")
    add("--limit", type=positive(int), metavar="N", help="train on the first N images only, for tries")
    add("--output", type=file_path, default=output,
        help="checkpoint to write, the log goes beside it (default: %(default)s)")
    add("--save-every", type=positive(int), default=1, metavar="EPOCHS", help="epochs between checkpoints (default: 1)")
    add("--resume", action="store_true", help="go on from --output where it was left, if it is there")
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


UNTIED = (  # settings that a resumed run may change
    "epochs", "device", "data_on", "data_dir", "compile", "deterministic", "save_every", "resume", "output",
    "pretrained",
)
MAY_BE_HELD = 0.5  # of the device's free memory, by the images


class Run:
    """One training run: device, precision, seeds, images, batches, log, checkpoints, processes. It knows no method and
    no loss.

    pretrained: the checkpoint (a dict) this run builds on; its data set, sizes and normalisation are the defaults.
    yardsticks: constants logged beside the metrics, {name: value}. split: the images to train on.

    All that is random in an epoch follows from seed, method and the epoch's number, and the noise in the model also
    from the process: a run that is resumed goes on as if it had never stopped.
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
        self.method, self.args, self.yardsticks = method, args, yardsticks or {}
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if args.batch_size < 2 * started:
            raise UserError(f"--batch-size {args.batch_size} is too small: batch normalisation takes 2 or more in each "
                            "process", exit_code=2)
        if args.batch_size % started:
            raise UserError(f"--batch-size {args.batch_size} cannot be shared by {started} processes: give a multiple",
                            exit_code=2)
        self.device = join_processes(choose_device(args.device))
        self.rank, self.processes = processes()
        self.dtype = choose_precision(args.precision, self.device)
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.output = Path(args.output)
        self.log = Path(args.output.removesuffix(".ckpt") + ".jsonl")
        self.left = self._check_output()  # the checkpoint to go on from, or None
        with first_process_first():
            images, _, _ = load_images(args.dataset, split, args.data_dir, args.image_size)
        images = images[: args.limit]
        if len(images) < 2:
            raise UserError("one image is too few to train on: give a larger --limit or more images", exit_code=2)
        if args.batch_size > len(images):
            raise UserError(f"--batch-size {args.batch_size} is larger than the {len(images)} training images: "
                            f"give at most --batch-size {len(images)}", exit_code=2)
        mean, std = (given["mean"], given["std"]) if pretrained else image_statistics(args.dataset, images)
        self.config = {**vars(args), "images": len(images), "processes": self.processes,
                       "mean": list(mean), "std": list(std)}
        self._check_settings()
        self._place(images)
        self.scale, self.shift = normalization(mean, std, self.device)
        self.size = args.image_size
        self.generator = torch.Generator(self.device)
        torch.manual_seed(args.seed)  # of the weights
        self.stopped_by = None
        self.say(f"{method}: {len(images):,} images of {args.dataset}, {args.encoder}, {self.device.type}"
                 + (f" x {self.processes}" if self.processes > 1 else "")
                 + f", {str(self.dtype).removeprefix('torch.')}, seed {args.seed}")

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def _check_output(self):
        """Before hours of training, not after: the checkpoint can be written, and writing it loses nothing."""
        left = None
        if self.args.resume and self.output.exists():
            left = load_checkpoint(self.output, self.method)
            if not isinstance(left.get("optimizer"), dict) and left["epoch"] < self.args.epochs:
                raise UserError(f"'{self.output}' holds no state of its optimiser: it cannot be resumed")
        for path in (self.output, self.log):
            if path.exists() and not self.args.resume:
                raise UserError(f"'{path}' exists already: give another --output, or remove it, or go on from it with "
                                "--resume", exit_code=2)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output.parent):
                pass
        except OSError as error:
            raise UserError(f"cannot write '{self.output}' ({error.strerror}): give another --output") from error
        return left

    def _check_settings(self):
        """A resumed run is the run that was left."""
        given = self.left["config"] if self.left else self.config
        for name, value in self.config.items():
            moved = name == "dataset" and not {value, given.get(name)} & {"digits", "cifar10", "stl10"}  # a folder
            if name not in UNTIED and given.get(name) != value and not moved:
                raise UserError(f"'{self.output}' was trained with {name.replace('_', ' ')} {given.get(name)}, not "
                                f"{value}: --resume takes the settings it began with", exit_code=2)

    def _place(self, images):
        """The images on the device, or where they do not fit in page-locked memory of the host."""
        where = self.args.data_on
        if where == "auto":
            on_host = self.device.type == "cuda" and images.nbytes > MAY_BE_HELD * torch.cuda.mem_get_info()[0]
            where = "host" if on_host else "device"
        self.on_device = where == "device"
        self.images = images.to(self.device) if self.on_device else images  # (N, 3, S, S) uint8
        if not self.on_device and self.device.type == "cuda":
            self.images, self.copy_stream = images.pin_memory(), torch.cuda.Stream(self.device)

    def prepare(self, model):
        """Moves the model to the device, in the layout its convolutions are fastest in; under torchrun, for all
        processes together (DistributedDataParallel)."""
        model = model.to(self.device, memory_format=torch.channels_last)
        if self.left:
            load_model(model, self.left, self.output)
        if self.processes > 1 and self.args.sync_bn:
            model = synchronise_batch_norm(model, self.device)
        if self.args.compile in ("inductor", "cudagraphs"):
            model.compile(mode="reduce-overhead" if self.args.compile == "cudagraphs" else None, dynamic=False)
        if self.processes > 1:
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        return model

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def seed_of(self, *parts):
        """A seed of 63 bits for one purpose."""
        text = repr((self.args.seed, self.method, *parts))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def epochs(self, model, optimizer, schedule=None):
        """Yields the numbers of the epochs that are left, 1, 2, ...; after each, logs its means, sets the next learning
        rate and writes the checkpoint."""
        self._trained = getattr(model, "module", model), optimizer, schedule
        first, position = self._go_on()
        if first > self.args.epochs and position:
            raise UserError(f"'{self.output}' was left within epoch {first}: give --epochs {first} or more",
                            exit_code=2)
        if first > self.args.epochs:
            self.say(f"'{self.output}' has all of its {self.args.epochs} epochs already")
        self._check_space()
        with self._signals():
            for epoch in range(first, self.args.epochs + 1):
                self.epoch, self._start = epoch, time.perf_counter()
                self.generator.manual_seed(self.seed_of(epoch))
                torch.manual_seed(self.seed_of(epoch, "noise", self.rank))
                self._sums, self._seen, self._done, self._spent = {}, 0, 0, 0.0
                self._position = position
                self._bar = tqdm(total=len(self.images), desc=f"epoch {epoch}/{self.args.epochs}", unit=" images",
                                 leave=False, disable=True if self.rank else None)
                self._shown = self._start
                model.train()
                yield epoch
                self._bar.close()
                self._finish_epoch()
                position = None
        self._bar = None

    def _go_on(self):
        """The epoch to begin with, and where in it (None: at its start). What the log says beyond that is dropped."""
        model, optimizer, schedule = self._trained
        finished, position = 0, None
        if self.left:
            finished, position = self.left["epoch"], self.left.get("position")
            if schedule is not None and self.left["config"].get("epochs") != self.args.epochs:
                raise UserError(f"'{self.output}' was trained with epochs {self.left['config'].get('epochs')}, not "
                                f"{self.args.epochs}: its learning rate follows from their number", exit_code=2)
            own = [dict(group) for group in optimizer.param_groups]
            try:  # of a run that has all its epochs it may have been left out
                optimizer.load_state_dict(self.left.get("optimizer") or optimizer.state_dict())
                fits = all(value.shape in (parameter.shape, ()) for parameter, state in optimizer.state.items()
                           for value in state.values() if isinstance(value, torch.Tensor))
            except Exception:
                fits = False
            if not fits:
                raise UserError(f"the state of the optimiser in '{self.output}' does not fit it: train it again")
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)  # the settings are the command's
            with warnings.catch_warnings():  # PyTorch expects steps of the optimiser between
                warnings.simplefilter("ignore")
                for _ in range(finished if schedule is not None else 0):
                    schedule.step()
            self.say(f"going on from '{self.output}', epoch {finished}" + (" and a part" if position else ""))
        if len(gather(torch.tensor([finished], device=self.device)).unique()) > 1:
            raise UserError(f"the processes find different checkpoints in '{self.output}': give an --output in a "
                            "folder that all of them share")
        self.left, self._saved = None, finished
        if self.rank == 0 and self.args.resume:
            lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
            try:
                if len(lines) > finished:
                    write_atomically(self.log, lambda file: file.write("".join(lines[:finished]).encode()))
            except OSError as error:
                raise cannot_write(self.log, error) from error
            for remains in self.output.parent.glob(f"{self.output.name}.*.tmp"):  # of a process that was killed
                remains.unlink(missing_ok=True)
        return finished + 1, position

    def _check_space(self):
        """Weights, their optimiser's state, and the checkpoint before, beside each other."""
        model = self._trained[0]
        needed = sum(8 * p.numel() for p in model.parameters() if p.requires_grad)
        needed += sum(value.nbytes for value in model.state_dict().values())
        free = shutil.disk_usage(self.output.parent).free
        if free < needed:
            raise UserError(f"'{self.output.parent}' has {free >> 20} MiB left and a checkpoint takes {needed >> 20}: "
                            "make room, or give another --output")

    @contextlib.contextmanager
    def _signals(self):
        """SIGINT and SIGTERM end the run after the step that is being made; one more, a second later or more (some
        terminals and launchers send each twice), ends it at once."""
        first = []

        def note(number, frame):
            if self.stopped_by is None:
                self.stopped_by = number
                first.append(time.monotonic())
            elif time.monotonic() - first[0] > 1:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def batches(self, *samplers, together=1):
        """All images once, in random order, in batches: (images, index, *drawn), all on the device, where images[index]
        are the batch and drawn is what each sampler(n, size, generator) drew for it, a tensor of n rows or a dict of
        them. Everything is drawn at once for the whole epoch.

        A last batch of one image, which batch normalisation cannot take, is left out. Of several processes each gets
        its share of every batch, all equally many and a multiple of `together`; what cannot be shared is left out.
        """
        n, device = len(self.images), self.device
        if self.args.batch_size % (self.processes * together) and self.processes > 1:
            raise UserError(f"--batch-size {self.args.batch_size} cannot be shared by {self.processes} processes in "
                            f"pairs: give a multiple of {self.processes * together}", exit_code=2)
        order = torch.randperm(n, generator=self.generator, device=device)
        drawn = [sampler(n, self.size, self.generator) for sampler in samplers]
        shares = []
        for start in range(0, n, self.args.batch_size):
            share = min(self.args.batch_size, n - start)
            if self.processes > 1:
                share = share // self.processes // together * together
            if share > 1:
                shares.append(slice(start + self.rank * share, start + (self.rank + 1) * share))
        if self._position:
            shares = self._return_to(shares)

        def rows(values, share):
            return {name: rows(value, share) for name, value in values.items()} if isinstance(values, dict) \
                else values[share]

        for share, (images, index) in zip(shares, self._fetched(order, shares), strict=True):
            if self.args.compile == "cudagraphs":
                torch.compiler.cudagraph_mark_step_begin()
            yield images, index, *(rows(values, share) for values in drawn)

    def _fetched(self, order, shares):
        """(images, index) of each share; from the host they are copied while the batches before are computed with."""
        if self.on_device:
            yield from ((self.images, order[share]) for share in shares)
            return
        order, cuda = order.cpu(), self.device.type == "cuda"

        def fetch(share):
            rows = torch.empty(share.stop - share.start, *self.images.shape[1:], dtype=torch.uint8, pin_memory=cuda)
            torch.index_select(self.images, 0, order[share], out=rows)
            if not cuda:
                return rows, None
            with torch.cuda.stream(self.copy_stream):
                return rows.to(self.device, non_blocking=True), self.copy_stream.record_event()

        # of the stream, since it has an index
        on_device = {"initializer": torch.cuda.set_device, "initargs": (self.copy_stream.device,)} if cuda else {}
        with ThreadPoolExecutor(1, **on_device) as thread:
            left, coming = iter(shares), deque()
            while True:
                coming.extend(thread.submit(fetch, share) for share in itertools.islice(left, 2 - len(coming)))
                if not coming:
                    return
                batch, ready = coming.popleft().result()
                if ready is not None:
                    ready.wait()
                    batch.record_stream(torch.cuda.current_stream())
                yield batch, torch.arange(len(batch), device=self.device)

    def step(self, loss, metrics, count):
        """Adds a step's loss and metrics, scalars on the device, to the epoch's means. Waits for the device only to
        show the loss in the progress bar, twice a second at most. Ends the run if a signal asked for it."""
        names = ("loss", *metrics)
        values = torch.stack([value.detach().float() for value in (loss, *metrics.values())])
        total, images = self._sums.get(names, (torch.zeros_like(values), 0))
        self._sums[names] = total.add(values, alpha=count), images + count
        self._seen += count * self.processes
        self._done += 1
        self._bar.update(count * self.processes)
        if not self._bar.disable and time.perf_counter() - self._shown > 0.5:
            self._shown = time.perf_counter()
            self._bar.set_postfix_str(f"loss {loss.item():.4f}")
        if self.stopped_by is not None:
            self._stop()

    def means(self):
        """The mean of each metric over the images of this epoch so far, over all processes; waits for the device."""
        totals = {}
        for names, (values, images) in self._sums.items():
            values = average(values).tolist()
            for name, value in zip(names, values, strict=True):
                total, seen = totals.get(name, (0.0, 0))
                totals[name] = total + value, seen + images
        return {name: total / images for name, (total, images) in totals.items()}

    def _finish_epoch(self):
        model, optimizer, schedule = self._trained
        means, rate = self.means(), optimizer.param_groups[0]["lr"]
        seconds = self._spent + time.perf_counter() - self._start
        bad = [f"the {name} became {value}" for name, value in means.items() if not math.isfinite(value)]
        if not self._finite():
            bad.append("weights became infinite or NaN")
        if bad:
            kept = f"; the checkpoint of epoch {self._saved} is kept in '{self.output}'" if self._saved else ""
            raise UserError(f"{bad[0]} in epoch {self.epoch}{kept}: try a lower --lr or --precision fp32")
        if schedule is not None:
            schedule.step()
        row = {"epoch": self.epoch, **means, **self.yardsticks, "lr": rate, "images_per_second": self._seen / seconds,
               "seconds": seconds}
        if self.rank == 0:
            try:
                with open(self.log, "a") as log:
                    log.write(json.dumps(row) + "\n")
            except OSError as error:
                raise cannot_write(self.log, error) from error
            if self.epoch % self.args.save_every == 0 or self.epoch == self.args.epochs:
                self._save(self.epoch)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        shown += "".join(f"  {name} {value:g}" for name, value in self.yardsticks.items())
        self.say(f"epoch {self.epoch}/{self.args.epochs}  {shown}  {row['images_per_second']:.0f} images/s")

    def _finite(self):
        return all(values.isfinite().all() for values in self._trained[0].state_dict().values())

    def _save(self, epoch, position=None):
        model, optimizer, _ = self._trained
        try:
            save_checkpoint(self.output, self.method, self.config, model, optimizer, epoch, position)
        except OSError as error:
            raise cannot_write(self.output, error) from error
        self._saved = epoch

    def _stop(self):
        """Saves the run within its epoch and ends it. Several processes notice a signal at different steps, so they
        end with what the last checkpoint holds; so does a run whose weights are broken."""
        self._bar.close()
        if self.processes == 1 and self._finite():
            self._save(self.epoch - 1, {
                "device": self.device.type, "batches": self._done, "seen": self._seen,
                "seconds": self._spent + time.perf_counter() - self._start,
                "sums": [(list(names), values.cpu(), images) for names, (values, images) in self._sums.items()],
                "noise": [torch.get_rng_state(),
                          torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None],
            })
        if self.rank == 0:
            flags = sys.argv if "--resume" in sys.argv else [*sys.argv, "--resume"]
            command = "torchrun ..." if self.processes > 1 else "python"
            print(f"stopped in epoch {self.epoch}; to go on: {command} {shlex.join(flags)}", file=sys.stderr)
        sys.exit(128 + self.stopped_by)

    def _return_to(self, shares):
        """Back to where `_stop` left the epoch; the batches that are left."""
        at, self._position = self._position, None
        try:
            if at["device"] != self.device.type:
                raise UserError(f"'{self.output}' was left within an epoch on {at['device']}, which draws other random "
                                f"numbers than {self.device.type}: go on there, with --device")
            self._done, self._seen, self._spent = int(at["batches"]), int(at["seen"]), float(at["seconds"])
            self._sums = {tuple(names): (values.to(self.device), int(images)) for names, values, images in at["sums"]}
            torch.set_rng_state(at["noise"][0])
            if self.device.type == "cuda" and at["noise"][1] is not None:
                torch.cuda.set_rng_state(at["noise"][1], self.device)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"where '{self.output}' was left within its epoch cannot be read from it: train it "
                            "again") from error
        self._bar.update(self._seen)
        return shares[self._done :]

    def finish(self, next_command):
        self.say(f"wrote {self.output} and {self.log}\nnext: {next_command}")
        if self.processes > 1:
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- checkpoints

FORMAT_VERSION = 1


def cannot_write(path, error):
    return UserError(f"cannot write '{path}' ({error}); what was there before is kept: mend that, and go on with "
                     "--resume")


def write_atomically(path, write):
    """write(file) by way of a temporary file: the path holds the old contents or the new, whole, never a part."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(Path(path).parent, os.O_RDONLY)  # the new name is to survive a power cut, too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except RuntimeError as error:  # how torch.save reports a disk that is full, after what the system said of it
        system = error.__context__
        if isinstance(system, OSError):
            raise OSError(system.errno, system.strerror) from error
        raise OSError(errno.EIO, str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_atomically(value, path):
    write_atomically(path, lambda file: torch.save(value, file))


def save_checkpoint(path, method, config, model, optimizer, epoch, position=None):
    """A plain dict of tensors and plain values; `model.encoder` is what the probe evaluates. epoch: how many are
    finished; position: where in the next one, if not at its start."""
    save_atomically({"format_version": FORMAT_VERSION, "method": method, "config": config, "epoch": epoch,
                     "encoder": model.encoder.state_dict(), "model": model.state_dict(),
                     "optimizer": optimizer.state_dict(), "position": position}, path)


PLAIN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {kind}Storage" for kind in "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()}


def load_plain(path):
    """What torch.save wrote, dense tensors and plain values only, on the CPU. Never runs code from the file, nor takes
    more memory than its size explains. Raises OSError; any other exception where the file is anything else.

    weights_only=True alone also builds sparse, quantised and endless tensors, unpacks what was compressed, and takes
    flipped bytes for weights: hence the checks of the archive before, and of the tensors after."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if (min(entry.header_offset for entry in entries) != 0  # or torch would read what comes before
                    or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                    or sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size):
                raise ValueError("it is no archive as torch.save writes them")
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
            for entry in entries:
                if entry.filename.endswith("data.pkl"):
                    if entry.file_size > 2**20:  # of a checkpoint here some tens of kilobytes
                        raise ValueError("it holds too many values")
                    for operation, argument, _ in pickletools.genops(archive.read(entry)):
                        if operation.name == "GLOBAL" and argument not in PLAIN:
                            raise ValueError(f"it holds {argument}")
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a damaged file may look like: it is an error below or nothing
            value = torch.load(file, map_location="cpu", weights_only=True)
    todo, seen = [value], {}
    while todo:
        part = todo.pop()
        if id(part) in seen:  # a hostile file's may hold itself
            continue
        seen[id(part)] = part
        if isinstance(part, (dict, list, tuple)):
            todo += part.values() if isinstance(part, dict) else part
        elif isinstance(part, torch.Tensor) and part.nbytes > part.untyped_storage().nbytes():
            raise ValueError("a tensor is larger than what is stored of it")
    return value


def three_numbers(values, least, most):
    return len(values) == 3 and all(type(value) in (int, float) and least <= value <= most for value in values)


def plain_setting(name, value):
    values = value if type(value) is list else [value]
    return type(name) is str and all(type(value) in (str, int, float, bool, type(None)) for value in values)


CHECKPOINT = {  # what a checkpoint has to hold; `check_weights` is for the state dicts, once it is known of what
    "format_version": (int, lambda value: 0 <= value < 2**31),
    "method": (str, lambda value: re.fullmatch("[a-z0-9_]{1,64}", value)),
    "config": (dict, lambda value: all(plain_setting(*item) for item in value.items())),
    "epoch": (int, lambda value: 0 <= value < 2**31),
    "encoder": (dict, lambda value: True),
    "model": (dict, lambda value: True),
}
CONFIG = {  # and its config
    "dataset": (str, usable_path),
    "encoder": (str, lambda value: value in ENCODERS),
    "image_size": (int, lambda value: 8 <= value <= MAX_IMAGE_SIZE),
    "mean": (list, lambda value: three_numbers(value, -100, 100)),
    "std": (list, lambda value: three_numbers(value, 1e-4, 100)),
}


def check_values(values, table, path):
    """Raises UserError unless values holds every name of table, {name: (type, test)}, with a value that passes."""
    missing = [name for name in table if name not in values]
    if missing:
        raise UserError(f"'{path}' is no checkpoint of minTER: it lacks {', '.join(missing)}")
    for name, (kind, fits) in table.items():
        value = values[name]
        if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
            raise UserError(f"'{path}' is no checkpoint of minTER: its {name} is not what training writes")


def load_checkpoint(path, method=None):
    """Reads and checks all of a checkpoint but its weights, see `check_weights`; never runs code from it. method: the
    only one acceptable. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint '{path}'")
    try:
        checkpoint = load_plain(path)
    except PermissionError as error:
        raise UserError(f"cannot read '{path}' ({error.strerror})") from error
    except Exception as error:
        raise UserError(f"'{path}' is no checkpoint of minTER: it is truncated or damaged, or holds more than tensors "
                        "and plain values, which is not loaded; train it again") from error
    check_values(checkpoint if isinstance(checkpoint, dict) else {}, CHECKPOINT, path)
    if checkpoint["format_version"] != FORMAT_VERSION:
        raise UserError(f"'{path}' has format version {checkpoint['format_version']}; this code reads {FORMAT_VERSION}")
    check_values(checkpoint["config"], CONFIG, path)
    if method is not None and checkpoint["method"] != method:
        raise UserError(f"'{path}' is a checkpoint of {checkpoint['method']}; one of {method} is needed here")
    return checkpoint


def check_weights(module, weights, path, what):
    """Raises UserError unless weights, a dict from the file at path, is a state dict of the module in names, shapes and
    types, and finite. what: the module in words. The module may be on the meta device, to allocate nothing."""
    def kind(tensor):
        return isinstance(tensor, torch.Tensor) and (tensor.shape, tensor.dtype, tensor.layout)

    expected = module.state_dict()
    if weights.keys() != expected.keys() or any(kind(weights[name]) != kind(expected[name]) for name in expected):
        raise UserError(f"the weights in '{path}' do not fit {what}")
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"the weights in '{path}' are broken: {broken[0]} is infinite or NaN; train it again")


def load_encoder(checkpoint, path, probabilistic=False):
    """The encoder of a checkpoint, in eval mode on the CPU. probabilistic: only one with a log-variance will do. Raises
    UserError."""
    config = checkpoint["config"]
    settings = config["encoder"], config["image_size"], config.get("probabilistic", True) is not False
    what = f"the encoder '{settings[0]}' at image size {settings[1]} that it names"
    if probabilistic and (settings[0] == "resnet18" or not settings[2]):
        raise UserError(f"the encoder in '{path}' has no log-variance, which is needed here")
    try:
        with torch.device("meta"):
            expected = build_encoder(*settings)
    except RuntimeError as error:  # AlexNet at a size that leaves nothing
        raise UserError(f"the weights in '{path}' do not fit {what}") from error
    check_weights(expected, checkpoint["encoder"], path, what)
    encoder = build_encoder(*settings)
    encoder.load_state_dict(checkpoint["encoder"])
    return encoder.eval()


def load_model(model, checkpoint, path):
    """`model` with all that the checkpoint holds, in eval mode on the CPU. Raises UserError where it does not fit."""
    check_weights(model, checkpoint["model"], path, f"the model of {checkpoint['method']} that it names")
    model.load_state_dict(checkpoint["model"])
    return model.eval()
