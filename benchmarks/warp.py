"""The batched warp against what one would use instead: agreement first, then images a second and megapixels a second.

    python benchmarks/warp.py --output results/warp-cpu.json --plot results/warp-cpu.png
    python benchmarks/warp.py --device cuda --output results/warp-cuda.json --plot results/warp-cuda.png
    python benchmarks/warp.py --quick
    python benchmarks/warp.py --sizes 32 --batches 1024 --processes 11 --output results/warp-cpu-runs.json
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736 python benchmarks/warp.py

--processes does it all so many times, each time in a process of its own, and reports the medians and the extremes:
whether malloc reuses a library's temporaries or fetches them anew is settled by what else a process has allocated, and
lasts.
The last line has glibc keep all freed memory. As it is, what is larger than 32 MB is new memory each time, and how fast
that comes depends on the system more than on any library.

Two ways of ours: a new tensor for each result, as all others make (in memory of an earlier one that was freed, where it
is larger than 32 MB), and "out=": one and the same, written each time.

warp: images in, images out, each library with the type and the layout it likes best: uint8 for ours, PIL (a list of
images), OpenCV (a list of arrays) and torchvision; float32 for ours, kornia and grid_sample. step: a training step's
input from a uint8 data set, by index: random crop, flip, warp, normalise, to one contiguous (N, 3, S, S) batch of
float32 or bfloat16. backward: forward and backward of float32 images, the gradient that of the images, the coefficients
or both.

OpenCV, PIL and torchvision have one map for a call and run in a loop, in one thread but for what they do themselves,
where ours uses all of --threads: several workers would divide their time, and --threads 1 compares one core with one.
What would take others more than a second on the CPU is timed on a part of N (column "on"); ours always on all of it.
That favours the others at large N, where the memory of a whole batch is fetched from the system anew each time and that
of a small one is reused. Each library's form of the coefficients is made beforehand, outside the time. Each peer is in
the fastest form found, which for a step normalises the whole batch; opencv-each is OpenCV in the usual one, an image a
tensor and normalised by itself. kornia fills by its own padding_mode="fill", which samples twice; grid_sample is the
fastest form found in plain torch (a matrix product makes the grid, and a mask fills). Contestants run in alternation,
after a warm-up, and the median is taken. N x size is left out where the batch exceeds 4 GB in float32.
"""

import dataclasses
import functools
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import STATISTICS, Parser, UserError, choose_device, positive_int, provenance, run_command
from minter_warp import normalization, projective_warp, sample_coefficients, sample_crops, warp_batch
from minter_warp.ops import _C, CUDA_ARCHITECTURES

FILL = 128
LARGEST_BATCH = 4e9  # bytes in float32
LARGEST_DATA_SET = 600e6  # bytes
LONGEST, SHORTEST = 1.0, 0.01  # seconds of one sample of the time: fewer images above, several calls below
BUDGET = 0.5  # seconds of samples for each contestant

# Largest difference in grey levels from ours that is accepted, where smooth images are read at least one pixel from the
# border (at the border itself the conventions differ: OpenCV, kornia and torchvision blend the fill in). All compute
# the same bilinear interpolation, so only rounding is left: of the coordinates to float32 (under 0.01 here), of the
# result to uint8 (OpenCV and torchvision round to nearest, PIL down, so 1 at most), and in older OpenCV of the
# coordinates to 1/32 of a pixel: 1/64 off at most on either axis, where neighbours differ by 100 grey levels or so.
LIMITS = {"kornia": 0.1, "grid_sample": 0.1, "opencv": 5, "opencv-each": 5, "pil": 1.01, "torchvision": 1.01}
GRADIENT_LIMIT = 0.01  # difference of gradients, relative in the Euclidean norm
LABELS = {"opencv": "OpenCV", "opencv-each": "OpenCV, one by one", "pil": "PIL"}
MODULES = {"kornia": "kornia", "grid_sample": "torch", "opencv": "cv2", "opencv-each": "cv2", "pil": "PIL",
           "torchvision": "torchvision"}
LOOPS = ("opencv", "opencv-each", "pil", "torchvision")
RATIOS = ("ours_over_it", "ours_out_over_it")


@dataclasses.dataclass
class Problem:
    """What a contestant is given. warp: the batch of images. step: the data set, which images and crops, and what to
    normalise to."""

    images: torch.Tensor  # (N or M, 3, S, S) uint8 or float32
    coefficients: torch.Tensor  # (N, 8) float32
    pixels: np.ndarray | None = None  # step: the data set as (M, S, S, 3), for PIL and OpenCV
    index: torch.Tensor | None = None  # step: (N,) int64; None for warp
    crops: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32

    @property
    def size(self):
        return self.images.shape[-1]

    def first(self, count):
        coefficients = self.coefficients[:count]
        if self.index is None:
            return dataclasses.replace(self, images=self.images[:count], coefficients=coefficients)
        return dataclasses.replace(self, coefficients=coefficients, index=self.index[:count], crops=self.crops[:count])


# ------------------------------------------------------------------------------------------------------ contestants
# Each takes a problem and returns a function of no arguments, which is what is timed.


def ours(problem, target=None, reuse=False):
    """reuse: each call writes into one and the same tensor (out=), instead of a new one."""
    p = problem
    if p.index is None:
        out = torch.empty_like(p.images) if reuse else None
        run = functools.partial(projective_warp, p.images, p.coefficients, out=out)
    else:
        out = p.images.new_empty((len(p.index), *p.images.shape[1:]), dtype=p.dtype) if reuse else None
        run = functools.partial(warp_batch, p.images, p.index, p.crops, p.coefficients, p.scale, p.shift, p.dtype,
                                out=out)

    def run_on_target():
        _C.set_cpu_target(target)
        output = run()
        _C.set_cpu_target(default)
        return output

    default = _C.cpu_targets()[0]
    return run if target is None else run_on_target


def take_crop_flip(images, index, crops):
    """As minter_warp.crop_and_flip_reference does, in the fastest of six ways tried: one gather from padded images."""
    n, size, padding = len(index), images.shape[-1], images.shape[-1] // 8
    padded = F.pad(images.index_select(0, index), (padding,) * 4)
    pixel = torch.arange(size, device=images.device)
    rows, columns = pixel + crops[:, :1] + padding, torch.where(crops[:, 2:] != 0, size - 1 - pixel, pixel)
    at = rows[:, :, None] * (size + 2 * padding) + (columns + crops[:, 1:2] + padding)[:, None]  # (N, S, S)
    return padded.flatten(2).gather(2, at.view(n, 1, -1).expand(-1, 3, -1)).view(n, 3, size, size)


def normalised(batch, problem):
    return batch.mul_(problem.scale[:, None, None]).add_(problem.shift[:, None, None]).to(problem.dtype)


def batched(problem, warp):
    """warp: float32 images to warped float32 images."""
    p = problem
    if p.index is None:
        return lambda: warp(p.images)
    return lambda: normalised(warp(take_crop_flip(p.images, p.index, p.crops).float()), p)


def matrices(coefficients):
    """(N, 8) -> (N, 3, 3)."""
    return F.pad(coefficients, (0, 1), value=1.0).view(-1, 3, 3)


def grid_sample_warp(images, coefficients):
    n, _, height, width = images.shape
    options = {"device": images.device, "dtype": torch.float32}
    y, x = torch.meshgrid(torch.arange(height, **options) + 0.5, torch.arange(width, **options) + 0.5, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)]).view(3, -1)
    to_grid = torch.tensor([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]], **options)
    point = ((to_grid @ matrices(coefficients)).view(-1, 3) @ points).view(n, 3, height, width)
    grid = point[:, :2] / point[:, 2:]
    warped = F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    return torch.where(grid.abs().amax(1, keepdim=True) <= 1, warped, FILL)


def grid_sample(problem):
    return batched(problem, lambda images: grid_sample_warp(images, problem.coefficients))


def for_integer_centres(coefficients):
    """The map from output to input where pixel centres are at whole numbers: (N, 8) -> (N, 3, 3) float64."""
    half = torch.tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]], dtype=torch.float64, device=coefficients.device)
    return half.inverse() @ matrices(coefficients.double()) @ half


def kornia(problem):
    from kornia.geometry.transform import warp_perspective

    forward = for_integer_centres(problem.coefficients).inverse().float()
    options = {"dsize": (problem.size, problem.size), "padding_mode": "fill",
               "fill_value": torch.full((3,), float(FILL), device=forward.device)}
    return batched(problem, lambda images: warp_perspective(images, forward, **options))


def opencv(problem):
    import cv2

    p, size, padding = problem, problem.size, problem.size // 8
    maps = list(for_integer_centres(p.coefficients).numpy())
    options = {"dsize": (size, size), "flags": cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR,
               "borderMode": cv2.BORDER_CONSTANT, "borderValue": (FILL,) * 3}
    if p.index is None:
        images = list(p.images.permute(0, 2, 3, 1).contiguous().numpy())
        return lambda: [cv2.warpPerspective(image, map, **options) for image, map in zip(images, maps, strict=True)]

    def run():
        batch = np.empty((len(maps), size, size, 3), np.uint8)
        canvas = np.zeros((size + 2 * padding, size + 2 * padding, 3), np.uint8)
        inner = canvas[padding : padding + size, padding : padding + size]
        for output, map, at, (down, right, flip) in zip(batch, maps, p.index.tolist(), p.crops.tolist(), strict=True):
            inner[:] = p.pixels[at]
            image = canvas[padding + down : padding + down + size, padding + right : padding + right + size]
            cv2.warpPerspective(cv2.flip(image, 1) if flip else image, map, dst=output, **options)
        return normalised_from_pixels(batch, p)

    return run


def normalised_from_pixels(batch, problem):
    """(N, S, S, 3) uint8 array -> (N, 3, S, S) contiguous tensor."""
    planes = torch.from_numpy(batch).permute(0, 3, 1, 2)
    return normalised(planes.to(torch.float32, memory_format=torch.contiguous_format), problem)


def opencv_each(problem):
    """As a Dataset and its loader do: each image cropped, flipped, warped, made a tensor and normalised by itself."""
    import cv2
    from torchvision.transforms.functional import normalize, to_tensor

    p, size, padding = problem, problem.size, problem.size // 8
    maps = list(for_integer_centres(p.coefficients).numpy())
    std = 1 / (255 * p.scale)
    mean = -p.shift * std
    around = ((padding, padding), (padding, padding), (0, 0))

    def one(map, at, down, right, flip):
        image = np.pad(p.pixels[at], around)[padding + down :, padding + right :][:size, :size]
        warped = cv2.warpPerspective(cv2.flip(image, 1) if flip else image, map, (size, size),
                                     flags=cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT,
                                     borderValue=(FILL,) * 3)
        return normalize(to_tensor(warped), mean, std)

    return lambda: torch.stack([one(map, at, *crop) for map, at, crop in
                                zip(maps, p.index.tolist(), p.crops.tolist(), strict=True)]).to(p.dtype)


def pil(problem):
    from PIL import Image

    p, size = problem, problem.size
    maps = p.coefficients.tolist()

    def warp(image, map):
        return image.transform((size, size), Image.Transform.PERSPECTIVE, map, Image.Resampling.BILINEAR,
                               fillcolor=(FILL,) * 3)

    if p.index is None:
        images = [Image.fromarray(image) for image in p.images.permute(0, 2, 3, 1).contiguous().numpy()]
        return lambda: [warp(image, map) for image, map in zip(images, maps, strict=True)]

    def run():
        batch = np.empty((len(maps), size, size, 3), np.uint8)
        for output, map, at, (down, right, flip) in zip(batch, maps, p.index.tolist(), p.crops.tolist(), strict=True):
            image = Image.fromarray(p.pixels[at]).crop((right, down, right + size, down + size))  # black beyond
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
            output[:] = warp(image, map)
        return normalised_from_pixels(batch, p)

    return run


def torchvision(problem):
    from torchvision.transforms.v2 import functional

    p, size = problem, problem.size
    maps = p.coefficients.tolist()

    def warp(image, map):
        return functional.perspective(image, None, None, fill=[FILL] * 3, coefficients=map)

    if p.index is None:
        return lambda: [warp(image, map) for image, map in zip(p.images.unbind(), maps, strict=True)]

    def run():
        batch = []
        for map, at, (down, right, flip) in zip(maps, p.index.tolist(), p.crops.tolist(), strict=True):
            image = functional.crop(p.images[at], down, right, size, size)  # black beyond
            batch.append(warp(functional.horizontal_flip(image) if flip else image, map))
        return normalised(torch.stack(batch).float(), p)

    return run


PEERS = {"kornia": kornia, "grid_sample": grid_sample, "opencv": opencv, "opencv-each": opencv_each, "pil": pil,
         "torchvision": torchvision}
FLOAT_ONLY, STEP_ONLY = ("kornia", "grid_sample"), ("opencv-each",)


def installed(names, device):
    """Those of the libraries that are here and run on this device; a note for each of the others."""
    found = []
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            print(f"note: {name} is left out ({error}); pip install '.[bench]' has it")
            continue
        if device.type == "cuda" and name in ("opencv", "opencv-each", "pil"):
            print(f"note: {name} is left out, which runs on the CPU only")
            continue
        found.append(name)
    return found


# --------------------------------------------------------------------------------------------------------- problems


def smooth_images(n, size, generator):
    """Random images without noise: 8 x 8 random grey levels, enlarged. (n, 3, size, size) uint8."""
    small = 255 * torch.rand(n, 3, 8, 8, generator=generator)
    images = F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False)
    return images.round().clamp(0, 255).to(torch.uint8)


def warp_problem(data_set, n, generator, dtype):
    images = data_set[torch.arange(n, device=data_set.device) % len(data_set)].to(dtype)
    return Problem(images, sample_coefficients(n, images.shape[-1], generator).to(images.device))


def step_problem(data_set, pixels, n, generator, dtype):
    size, device = data_set.shape[-1], data_set.device
    index = torch.randint(0, len(data_set), (n,), generator=generator)
    scale, shift = normalization(*STATISTICS["cifar10"], device)
    return Problem(data_set, sample_coefficients(n, size, generator).to(device), pixels, index.to(device),
                   sample_crops(n, size, generator).to(device), scale, shift, dtype)


def pixels_of(data_set, peers):
    return data_set.permute(0, 2, 3, 1).contiguous().numpy() if {"opencv", "opencv-each", "pil"} & set(peers) else None


def problems(data_set, pixels, n, generator):
    """(setting, problem), one at a time."""
    for dtype in (torch.uint8, torch.float32):
        yield "warp", warp_problem(data_set, n, generator, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"step {str(dtype).removeprefix('torch.')}", step_problem(data_set, pixels, n, generator, dtype)


def contestants(setting, problem, peers):
    """{name: how to make its function}, ours first."""
    mine, floats = "ours", problem.images.is_floating_point()
    if setting == "warp":
        mine = "ours float32" if floats else "ours uint8"
        peers = [name for name in peers if (name in FLOAT_ONLY) == floats and name not in STEP_ONLY]
    return {mine: ours, **{name: PEERS[name] for name in peers}}


# -------------------------------------------------------------------------------------------------------- agreement


def as_tensor(output):
    """Whatever a contestant returned, as (N, 3, S, S) float32 on the CPU."""
    if not isinstance(output, list):
        return output.detach().float().cpu()
    if isinstance(output[0], torch.Tensor):
        return torch.stack(output).float().cpu()
    return torch.from_numpy(np.stack([np.asarray(image) for image in output])).permute(0, 3, 1, 2).float()


def away_from_border(coefficients, size):
    """(N, 1, S, S): whether the point read lies at least one pixel inside the image, or one outside."""
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) + 0.5] * 2, indexing="ij")
    a, b, c, d, e, f, g, h = coefficients.double().cpu()[:, :, None, None].unbind(1)
    denominator = g * x + h * y + 1
    u, v = (a * x + b * y + c) / denominator, (d * x + e * y + f) / denominator
    return (torch.stack([u, size - u, v, size - v]).amin(0).abs() >= 1)[:, None]


def check_agreement(sizes, peers, device):
    """Prints the largest and the mean difference from ours in grey levels; returns them, or raises UserError."""
    rows, bad = [], []
    print(f"difference from ours in grey levels, 64 smooth images:\n{'':16}{'size':>6}{'largest':>10}{'mean':>10}"
          f"{'limit':>8}{'pixels':>9}")
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        data_set = smooth_images(64, size, generator).to(device)
        for setting, problem in problems(data_set, pixels_of(data_set, peers), 64, generator):
            if problem.dtype == torch.bfloat16:
                continue
            entries = contestants(setting, problem, peers)
            outputs = {name: as_tensor(make(problem)()) for name, make in entries.items()}
            expected = outputs.pop(next(iter(entries)))
            unit = 1 if problem.scale is None else problem.scale.cpu()[:, None, None]
            compared = away_from_border(problem.coefficients, size).expand_as(expected)
            for name, output in outputs.items():
                apart = ((output - expected) / unit).abs()[compared]
                row = {"setting": setting, "library": name, "size": size, "largest": apart.max().item(),
                       "mean": apart.mean().item(), "limit": LIMITS[name],
                       "share_of_pixels": compared.double().mean().item()}
                rows.append(row)
                print(f"{setting.split()[0]:5}{name:11}{size:6}{row['largest']:10.4f}{row['mean']:10.5f}"
                      f"{LIMITS[name]:8}{row['share_of_pixels']:9.1%}")
                if not row["largest"] <= LIMITS[name]:
                    bad.append(f"{name} ({setting}, size {size}) by {row['largest']:.3g}")
    if bad:
        raise UserError(f"ours and others differ by more grey levels than rounding explains: {', '.join(bad)}")
    return rows


# ------------------------------------------------------------------------------------------------------------- time


def seconds_of(run, calls, device):
    """Seconds for each of so many calls."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def median_seconds(runs, repeats, device):
    """{name: median seconds of one call}; the runs take turns."""
    calls = {}
    for name, run in runs.items():
        estimate = seconds_of(run, 1, device)  # the warm-up
        if estimate < 0.2:
            estimate = seconds_of(run, 1, device)
        calls[name] = max(1, math.ceil(SHORTEST / estimate)), estimate
    expected = sum(number * estimate for number, estimate in calls.values())
    rounds = min(repeats, max(3, int(BUDGET * len(runs) / expected)))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(run, calls[name][0], device))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def fewer(name, make, problem, n, device):
    """How many of n images to time a contestant on."""
    if name.startswith("ours") or (device.type == "cuda" and name not in LOOPS):
        return n
    tried = min(n, 64)
    run = make(problem.first(tried))
    run()
    images = LONGEST * tried / seconds_of(run, 1, device)
    return n if n <= images else max(16, int(images) // 16 * 16)


def show(rows):
    first = rows[0]
    print(f"\n{first['setting']}, {first['size']} x {first['size']}, N = {first['n']:,}\n"
          f"{'':22}{'images/s':>12}{'megapixels/s':>14}{'ours / it':>11}{'out= / it':>11}{'on':>8}"
          + ("  share of floor" if "share_of_floor" in first else ""))
    for row in rows:
        ratios = "".join(f"{'' if row[name] is None else format(row[name], '.2f'):>11}" for name in RATIOS)
        floor = f"{row['share_of_floor']:16.1%}" if "share_of_floor" in row else ""
        print(f"{row['library']:22}{row['images_per_second']:12,.0f}{row['megapixels_per_second']:14,.1f}{ratios}"
              f"{row['measured_on']:8,}{floor}", flush=True)


def rows_of(setting, size, n, seconds, counts, moved=None):
    """One row for each contestant of one problem; the first is ours. moved: (bytes an image that have to be read and
    written, bytes/s that the device copies)."""
    rows, per_second = [], {name: counts[name] / each for name, each in seconds.items()}
    compared = next(iter(seconds))
    for name, rate in per_second.items():
        row = {"setting": setting, "library": name, "size": size, "n": n, "measured_on": counts[name],
               "seconds": seconds[name], "images_per_second": rate, "megapixels_per_second": rate * size * size / 1e6,
               "compared_with": compared,
               **{ratio: per_second[mine] / rate if mine in per_second and name != mine else None
                  for ratio, mine in zip(RATIOS, (compared, f"{compared}, out="), strict=True)}}
        if moved and name.startswith("ours"):
            row["share_of_floor"] = rate * moved[0] / moved[1]
        rows.append(row)
    return rows


def time_forward(setting, problem, n, peers, args, device, bandwidth):
    entries = contestants(setting, problem, peers)
    mine = next(iter(entries))
    if device.type == "cpu":  # CUDA's memory is kept by PyTorch in any case
        entries = {mine: ours, f"{mine}, out=": functools.partial(ours, reuse=True), **entries}
    if device.type == "cpu" and (problem.size, n) == (32, 1024):
        entries.update({f"{mine}, {target}": functools.partial(ours, target=target)
                        for target in _C.cpu_targets()[1:]})
    counts, runs = {}, {}
    for name, make in entries.items():
        try:
            counts[name] = fewer(name, make, problem, n, device)
            run = make(problem.first(counts[name]))
            run()
            runs[name] = run
        except torch.OutOfMemoryError:
            print(f"note: {name} is left out, memory is short for N = {n:,} at size {problem.size}")
    if not runs or not next(iter(runs)).startswith("ours"):
        return []
    moved = None
    if bandwidth:
        written = problem.images.dtype if problem.index is None else problem.dtype
        moved = 3 * problem.size**2 * (problem.images.element_size() + written.itemsize), bandwidth
    return rows_of(setting, problem.size, n, median_seconds(runs, args.repeats, device), counts, moved)


def time_backward(size, n, args, device):
    """Forward and backward of ours and of grid_sample; their gradients have to agree."""
    rows, generator = [], torch.Generator().manual_seed(0)
    images = smooth_images(n, size, generator).float().to(device)
    coefficients = sample_coefficients(n, size, generator).to(device)
    grad = torch.randn(n, 3, size, size, generator=generator).to(device)

    def step(warp, wanted):
        inputs = images.requires_grad_("images" in wanted), coefficients.requires_grad_("coefficients" in wanted)
        return torch.autograd.grad(warp(*inputs), [tensor for tensor in inputs if tensor.requires_grad], grad)

    for wanted in (("images",), ("coefficients",), ("images", "coefficients")):
        runs = {name: functools.partial(step, warp, wanted)
                for name, warp in {"ours": projective_warp, "grid_sample": grid_sample_warp}.items()}
        expected, others = runs["ours"](), runs["grid_sample"]()
        apart = [((b - a).norm() / a.norm()).item() for a, b in zip(expected, others, strict=True)]
        if not max(apart) <= GRADIENT_LIMIT:
            raise UserError(f"the gradients of {' and '.join(wanted)} differ from grid_sample's by {max(apart):.2g} of "
                            "their norm")
        new = rows_of(f"backward to {' and '.join(wanted)}", size, n, median_seconds(runs, args.repeats, device),
                      dict.fromkeys(runs, n))
        show(new)
        print(f"gradients differ by {max(apart):.1e} of their norm")
        new[1]["gradient_difference"] = max(apart)
        rows += new
    return rows


def copy_bandwidth(device):
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds({"copy": lambda: target.copy_(source)}, 9, device)["copy"]


# ---------------------------------------------------------------------------------------------------------- results


def circumstances(args, peers, device, bandwidth):
    versions = {"numpy": np.__version__}
    for name in peers:
        versions[MODULES[name]] = importlib.import_module(MODULES[name]).__version__
    return {
        **provenance(device), "device": device.type, "cores": os.cpu_count(), "threads": args.threads,
        "load_average_before": os.getloadavg()[0], "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_targets": _C.cpu_targets(), "build": _C.build_info(), "versions": versions,
        "environment": {name: value for name, value in os.environ.items()
                        if name.startswith(("MALLOC_", "OMP_", "GOMP_", "KMP_"))},
        **({"copy_bytes_per_second": bandwidth} if bandwidth else {}),
    }


def repeated(args, sizes):
    """What so many processes of this benchmark measure, one after the other: (head of the record, agreement, rows). In
    a row, numbers are medians; with "_range", their extremes; with "_of_each", all of them in order."""
    command = [sys.executable, __file__, "--device", args.device, "--threads", args.threads, "--repeats", args.repeats,
               "--sizes", *sizes, *(["--batches", *args.batches] if args.batches else []),
               *(["--quick"] if args.quick else []), "--peers", *args.peers]
    records, rows = [], {}
    for number in range(1, args.processes + 1):
        print(f"\nprocess {number} of {args.processes}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "record.json")
            done = subprocess.run([*map(str, command), "--output", str(path)], check=False)
            if done.returncode:
                raise UserError(f"process {number} of {args.processes} failed; what went wrong is said above")
            records.append(json.loads(path.read_text()))
        for row in records[-1]["rows"]:
            rows.setdefault(tuple(row[name] for name in ("setting", "library", "size", "n")), []).append(row)
    merged = []
    for measured in rows.values():
        row = {name: measured[0][name] for name in ("setting", "library", "size", "n", "measured_on")}
        row["processes"] = len(measured)
        for name in ("images_per_second", "megapixels_per_second", *RATIOS):
            values = [other[name] for other in measured if other[name] is not None]
            row[name] = statistics.median(values) if values else None
            if values:
                row[f"{name}_range"] = [min(values), max(values)]
            if values and name in RATIOS:
                row[f"{name}_of_each"] = values
        merged.append(row)
    head = {name: value for name, value in records[0].items() if name not in ("command", "agreement", "rows")}
    return {"processes": args.processes, **head}, records[0]["agreement"], merged


def show_repeated(rows):
    """Medians, and in brackets the least and the largest."""
    problem = None
    for row in rows:
        if problem != (problem := (row["setting"], row["size"], row["n"])):
            print(f"\n{row['setting']}, {row['size']} x {row['size']}, N = {row['n']:,}: medians of {row['processes']} "
                  f"processes, and extremes\n{'':22}{'images/s':>34}{'ours / it':>24}{'out= / it':>24}")
        low, high = row["images_per_second_range"]
        ratios = ["" if row[name] is None else "{:.1f} ({:.1f} to {:.1f})".format(row[name], *row[f"{name}_range"])
                  for name in RATIOS]
        speed = f"{row['images_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"
        print(f"{row['library']:22}{speed:>34}" + "".join(f"{ratio:>24}" for ratio in ratios))


def draw(rows, path):
    """Images/s of each library against N for the warp and the step, and ours in megapixels/s against the size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = min(row["size"] for row in rows)
    colours = {name: f"C{i}" for i, name in enumerate(PEERS)}

    reused = any(row["library"].endswith("out=") for row in rows)

    def drawn(name):
        return "," not in name or name.endswith("out=")

    def colour_of(name):
        return colours.get(name, "grey" if reused and not name.endswith("out=") else "black")

    def style_of(name):
        return "--" if "float32" in name else "-"

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.7))
    for axis, setting in zip(axes[:2], ("warp", "step float32"), strict=True):
        shown = [row for row in rows if row["setting"] == setting and row["size"] == size and drawn(row["library"])]
        for name in dict.fromkeys(row["library"] for row in shown):
            points = [(row["n"], row["images_per_second"]) for row in shown if row["library"] == name]
            axis.plot(*zip(*points, strict=True), style_of(name), marker="o", markersize=4, color=colour_of(name),
                      linewidth=2.2 if name.startswith("ours") else 1.4)
        axis.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="images/s",
                 title=f"{setting}, {size} × {size}")
    n = max(row["n"] for row in rows if row["size"] == max(row["size"] for row in rows))
    out = ", out=" if reused else ""
    kinds = [("warp", "ours uint8", "-"), ("warp", "ours float32", "--"), ("step float32", "ours", "-."),
             ("step bfloat16", "ours", ":")]
    for setting, name, style in kinds:
        points = sorted((row["size"], row["megapixels_per_second"]) for row in rows
                        if (row["setting"], row["library"], row["n"]) == (setting, name + out, n))
        label = setting + name.removeprefix("ours")
        axes[2].plot(*zip(*points, strict=True), style, marker="o", markersize=4, color="black", label=label)
    sizes = sorted({row["size"] for row in rows})
    axes[2].set(xscale="log", xlabel="side in pixels", ylabel="megapixels/s", title=f"ours{out}, N = {n:,}")
    axes[2].set_xticks(sizes, [str(side) for side in sizes])
    axes[2].minorticks_off()
    axes[2].set_ylim(0, 1.4 * axes[2].get_ylim()[1])  # room for the legend
    axes[2].legend(fontsize=8, loc="upper right", ncol=2)
    for axis in axes:
        axis.grid(alpha=0.3)
    names = dict.fromkeys(row["library"] for row in rows if drawn(row["library"]) and row["library"][:5] != "ours,")
    names.pop("ours", None)
    names = sorted(names, key=lambda name: not name.startswith("ours"))
    handles = [plt.Line2D([], [], color=colour_of(name), linestyle=style_of(name), marker="o", markersize=4,
                          label=LABELS.get(name, name)) for name in names]
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncol=len(handles), frameon=False, fontsize=8, columnspacing=1,
                  handlelength=1.6)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture '{path}' ({error})") from error


def write(path, record, rows, agreement):
    """JSON with one line for each row."""
    def lines(values):
        return "[\n" + ",\n".join(f"  {json.dumps(value)}" for value in values) + "\n ]"

    head = json.dumps(record, indent=1).removesuffix("\n}")
    try:
        Path(path).write_text(f'{head},\n "agreement": {lines(agreement)},\n "rows": {lines(rows)}\n}}\n')
    except OSError as error:
        raise UserError(f"cannot write '{path}' ({error.strerror}): give another --output") from error


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--sizes", type=positive_int, nargs="+", default=[32, 64, 96, 224], help="sides in pixels, 8 or more")
    add("--batches", type=positive_int, nargs="+", help="N (default: 64 1024 16384, on CUDA 65536 too at size 32)")
    add("--threads", type=positive_int, default=torch.get_num_threads())
    add("--repeats", type=positive_int, default=15, help="samples of each time at most")
    add("--peers", choices=PEERS, nargs="*", default=list(PEERS), help="whom to compare with")
    add("--quick", action="store_true", help="size 32 with N of 64 and 1024, and no other backward, in a minute")
    add("--processes", type=positive_int, default=1, help="how many measure it all, one after the other")
    add("--check", action="store_true", help="see whether all agree, and time nothing")
    add("--output", help="JSON file for the figures")
    add("--plot", help="PNG file for the picture")
    args = parser.parse_args()
    if _C is None:
        raise UserError("the compiled warp, which is what is measured here, is not built: `make setup` builds it")
    device = choose_device(args.device)
    if device.type == "cuda" and CUDA_ARCHITECTURES is None:
        raise UserError("the compiled warp is built without CUDA, so there is nothing to time on the GPU")
    for path in filter(None, (args.output, args.plot)):
        if not Path(path).resolve().parent.is_dir():
            raise UserError(f"cannot write '{path}': there is no such folder", exit_code=2)
    if args.processes > 1 and (args.check or args.plot):
        raise UserError("--processes goes with neither --check nor --plot", exit_code=2)
    sizes = [32] if args.quick else args.sizes
    if min(sizes) < 8:
        raise UserError("--sizes have to be 8 or more", exit_code=2)
    batches = [64, 1024] if args.quick else args.batches or [64, 1024, 16384]
    torch.set_num_threads(args.threads)
    peers = installed(args.peers, device)
    if {"opencv", "opencv-each"} & set(peers):
        importlib.import_module("cv2").setNumThreads(args.threads)
    command = {"command": provenance(device)["command"]}
    if args.processes > 1:
        head, agreement, rows = repeated(args, sizes)
        show_repeated(rows)
        if args.output:
            write(args.output, {**command, **head}, rows, agreement)
        return
    bandwidth = copy_bandwidth(device) if device.type == "cuda" and not args.check else None
    record = {**command, **circumstances(args, peers, device, bandwidth)}
    print(json.dumps(record, indent=1))
    agreement, rows = check_agreement(sizes, peers, device), []
    if args.check:
        return
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        count = min(50000, int(LARGEST_DATA_SET / (3 * size * size)))
        data_set = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8).to(device)
        pixels = pixels_of(data_set, peers)
        large = [65536] if device.type == "cuda" and size == 32 and not (args.batches or args.quick) else []
        for n in batches + large:
            if 12 * n * size * size > LARGEST_BATCH:
                print(f"\nnote: N = {n:,} at size {size} is left out, {12 * n * size * size / 1e9:.1f} GB in float32")
                continue
            for setting, problem in problems(data_set, pixels, n, generator):
                new = time_forward(setting, problem, n, peers, args, device, bandwidth)
                if new:
                    show(new)
                rows += new
                if args.output:  # what has been measured is there, whatever ends the rest
                    write(args.output, record, rows, agreement)
        del data_set, pixels, problem
    for size, n in [(32, 1024)] if args.quick else [(32, 1024), (96, 64)]:
        rows += time_backward(size, n, args, device)
    if args.output:
        write(args.output, record, rows, agreement)
    if args.plot:
        draw([row for row in rows if not row["setting"].startswith("backward")], args.plot)


if __name__ == "__main__":
    run_command(main)
