"""The batched warp against what one would use instead: agreement first, then images a second.

    python benchmarks/warp.py --output results/warp-cpu.json
    python benchmarks/warp.py --device cuda --output results/warp-cuda.json
    python benchmarks/warp.py --threads 1 --sizes 32 --batches 64 1024

warp: images in, a batch of the same type out, in each library's own layout. step: a training step's input from a uint8
data set, by index: random crop, flip, warp, normalise, to one contiguous (N, 3, S, S) batch of float32 or bfloat16.
backward: forward and backward of float32 images, the gradient that of the images, the coefficients or both.

Each peer is in the fastest form found. What can be made beforehand is not timed: its form of the coefficients, into
which the flip is folded, and for a step the data set with a margin of zeros, of which a crop is a view. Freed memory is
kept, so that nobody waits for new pages. OpenCV and PIL take one map a call and run in a loop in one thread; "opencv
threads" spreads the loop over --threads, as ours and IPP spread the batch. kornia fills by its own padding_mode="fill",
which samples twice; grid_sample is the fastest form found in plain torch. Both are also compiled by torch.compile, for
fixed shapes, at one size and N. On the CPU all but ours and IPP are timed on four million pixels at most (column "on"),
which favours them: a larger batch leaves the caches. Contestants run in alternation; the median is taken.
"""

import ctypes
import dataclasses
import functools
import importlib
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from common import Parser, UserError, choose_device, keep_freed_memory, positive_int, provenance, run_command
from minter_warp import normalization, projective_warp, sample_coefficients, sample_crops, warp_batch
from minter_warp.ops import _C, CUDA_ARCHITECTURES

FILL = 128
LARGEST_BATCH = {"cpu": 2e9, "cuda": 4e9}  # bytes of the result
LARGEST_DATA_SET = 300e6  # bytes; beyond every cache
BACKWARD_PIXELS = {"cpu": 2**20, "cuda": 2**24}  # of a batch
OTHERS_PIXELS = 2**22  # of a batch, for the slow on the CPU
SHORTEST = 0.01  # seconds of one sample of the time: several calls below
DETAILED = {"cpu": (32, 1024), "cuda": (32, 65536)}  # size and N where compiled peers and our other kernels are timed

# Largest difference in grey levels from ours that is accepted, where smooth images are read at least one pixel from the
# border (at the border itself the conventions differ: OpenCV and kornia blend the fill in). All compute the same
# bilinear interpolation, so only rounding is left: of the coordinates to float32 (under 0.01 here), of the result to
# uint8 (IPP and OpenCV to nearest, PIL down, so 1 at most), and in older OpenCV of the coordinates to 1/32 of a pixel:
# 1/64 off at most on either axis, where neighbours differ by 100 grey levels or so.
LIMITS = {"ipp": 1.01, "opencv": 5, "opencv threads": 5, "pil": 1.01, "grid_sample": 0.1, "kornia": 0.1}
GRADIENT_LIMIT = 0.01  # difference of gradients, relative in the Euclidean norm
MODULES = {"opencv": "cv2", "opencv threads": "cv2", "pil": "PIL", "grid_sample": "torch", "kornia": "kornia"}
ON_TENSORS = ("grid_sample", "kornia")  # float32, any device; the others on arrays, on the CPU
SETTINGS = {"warp uint8": torch.uint8, "warp float32": torch.float32, "step float32": torch.float32,
            "step bfloat16": torch.bfloat16}  # {name: type of the result}


@dataclasses.dataclass
class Problem:
    """What a contestant is given. warp: the images, each to be warped. step: the data set, which images and crops, and
    what to normalise to."""

    images: torch.Tensor  # (N or M, 3, S, S) uint8 or float32
    coefficients: torch.Tensor  # (N, 8) float32
    dtype: torch.dtype  # of the result
    index: torch.Tensor | None = None  # step: (N,) int64; None for warp
    crops: torch.Tensor | None = None  # step: (N, 3) int64, rows (down, right, flip)
    padded: torch.Tensor | None = None  # step: the data set (M, 3, S + 2 P, S + 2 P), zeros around, P = S // 8
    pixels: np.ndarray | None = None  # the same with the channels last, or for a warp (N, S, S, 3)
    scale: torch.Tensor | None = None  # step: (3,)
    shift: torch.Tensor | None = None

    @property
    def size(self):
        return self.images.shape[-1]

    def first(self, count):
        part = dataclasses.replace(self, coefficients=self.coefficients[:count])
        if self.index is None:
            pixels = None if self.pixels is None else self.pixels[:count]
            return dataclasses.replace(part, images=self.images[:count], pixels=pixels)
        return dataclasses.replace(part, index=self.index[:count], crops=self.crops[:count])

    def corners(self):
        """Upper left corner of each crop in `padded`: (N, 2) int64."""
        return self.crops[:, :2] + self.size // 8

    def unflipped(self):
        """(N, 8) coefficients that read from the crop before it is flipped: u becomes S - u."""
        if self.crops is None:
            return self.coefficients
        a, b, c, d, e, f, g, h = self.coefficients.unbind(1)
        flipped = torch.stack([self.size * g - a, self.size * h - b, self.size - c, d, e, f, g, h], 1)
        return torch.where(self.crops[:, 2:] != 0, flipped, self.coefficients)

    def views(self):
        """The images to warp, as N arrays (S, S, 3)."""
        if self.index is None:
            return list(self.pixels)
        return [self.pixels[at, down : down + self.size, right : right + self.size]
                for at, (down, right) in zip(self.index.tolist(), self.corners().tolist(), strict=True)]


# ------------------------------------------------------------------------------------------------------ contestants
# Each takes a problem and returns a function of no arguments, which is what is timed.


def ours(problem, target=None):
    """target: one of the kernels for this processor, in place of the default."""
    p = problem

    def run():
        if target:
            _C.set_cpu_target(target)
        if p.index is None:
            output = projective_warp(p.images, p.coefficients)
        else:
            output = warp_batch(p.images, p.index, p.crops, p.coefficients, p.scale, p.shift, p.dtype)
        if target:
            _C.set_cpu_target(_C.cpu_targets()[0])
        return output

    return run


def take_crops(problem):
    """(N, 3, S, S) uint8, in the fastest of six ways tried: one gather from padded images."""
    n, size, width = len(problem.index), problem.size, problem.padded.shape[-1]
    row, column = problem.corners()[:, :, None].unbind(1)  # (N, 1) each
    pixel = torch.arange(size, device=row.device)
    at = (row + pixel)[:, :, None] * width + (column + pixel)[:, None]  # (N, S, S)
    images = problem.padded.index_select(0, problem.index).flatten(2)
    return images.gather(2, at.view(n, 1, -1).expand(-1, 3, -1)).view(n, 3, size, size)


def normalised(batch, problem):
    return batch.mul_(problem.scale[:, None, None]).add_(problem.shift[:, None, None]).to(problem.dtype)


def on_tensors(problem, warp):
    """warp: float32 images to warped float32 images. The crops are not compiled on a CPU, where that is slower."""
    if problem.index is None:
        return lambda: warp(problem.images)
    take = take_crops if problem.images.is_cuda else torch.compiler.disable(take_crops)
    return lambda: normalised(warp(take(problem).float()), problem)


def matrices(coefficients):
    """(N, 8) -> (N, 3, 3)."""
    return F.pad(coefficients, (0, 1), value=1.0).view(-1, 3, 3)


def grid_sample_warp(images, coefficients):
    """A matrix product makes the grid, and a mask fills."""
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
    return on_tensors(problem, functools.partial(grid_sample_warp, coefficients=problem.unflipped()))


def for_integer_centres(coefficients):
    """The map from output to input where pixel centres are at whole numbers: (N, 8) -> (N, 3, 3) float64."""
    half = torch.tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]], dtype=torch.float64, device=coefficients.device)
    return (half.inverse() @ matrices(coefficients.double()) @ half).contiguous()


def kornia(problem):
    from kornia.geometry.transform import warp_perspective

    forward = for_integer_centres(problem.unflipped()).inverse().float()
    options = {"dsize": (problem.size, problem.size), "padding_mode": "fill",
               "fill_value": torch.full((3,), float(FILL), device=forward.device)}
    return on_tensors(problem, lambda images: warp_perspective(images, forward, **options))


def compiled(problem, make):
    return torch.compile(make(problem), dynamic=False)


@functools.cache
def workers(threads):
    return ThreadPoolExecutor(threads)


def in_shares(work, n, threads):
    """work(start, stop) on equal shares of n, each in a thread of its own."""
    if threads == 1:
        return work(0, n)
    limits = [n * i // threads for i in range(threads + 1)]
    list(workers(threads).map(work, limits[:-1], limits[1:]))


def on_pixels(problem, warp):
    """warp(batch): writes the warped images into an array (N, S, S, 3)."""
    p = problem

    def run():
        batch = np.empty((len(p.coefficients), p.size, p.size, 3), p.pixels.dtype)
        warp(batch)
        if p.index is None:
            return batch
        planes = torch.from_numpy(batch).permute(0, 3, 1, 2)
        return normalised(planes.to(torch.float32, memory_format=torch.contiguous_format), p)

    return run


def opencv(problem, threads=1):
    import cv2

    maps = for_integer_centres(problem.unflipped()).numpy()
    options = {"dsize": (problem.size, problem.size), "flags": cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR,
               "borderMode": cv2.BORDER_CONSTANT, "borderValue": (FILL,) * 3}

    def warp(batch):
        images = problem.views()

        def share(start, stop):
            for image, map, output in zip(images[start:stop], maps[start:stop], batch[start:stop], strict=True):
                cv2.warpPerspective(image, map, dst=output, **options)

        in_shares(share, len(images), threads)

    return on_pixels(problem, warp)


def pil(problem):
    from PIL import Image

    size, maps = (problem.size, problem.size), problem.unflipped().tolist()
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": (FILL,) * 3}

    def warp(batch):
        for output, image, map in zip(batch, problem.views(), maps, strict=True):
            output[:] = Image.fromarray(image).transform(size, Image.Transform.PERSPECTIVE, map, **options)

    return on_pixels(problem, warp)


@functools.cache
def ipp_library():
    """IPP's image processing for this processor. The library that would choose it looks for file names that the wheel
    does not have. Raises ImportError where there is no IPP."""
    kind = {"AVX512": "k0", "AVX2": "l9"}.get(torch.backends.cpu.get_cpu_capability(), "y8")
    files = {file.name.split(".")[0]: file.locate() for file in metadata.files("ipp") or []}
    try:
        ctypes.CDLL(files["libippcore"]).ippInit()
        return ctypes.CDLL(files[f"libippi{kind}"])
    except (KeyError, OSError) as error:
        raise ImportError(f"its libraries cannot be loaded: {error}") from error


def ipp(problem):
    """Intel IPP's ippiWarpBatch: one call for the share of a thread, one matrix an image, channels last (planes by
    themselves take it longer). It does less than the others: where the point read lies outside the outermost pixel
    centres nothing is written, whatever border it is told (a constant one too), and the pixel keeps what it was."""
    library, p, size, n = ipp_library(), problem, problem.size, len(problem.coefficients)
    kind, name = {1: (1, "8u"), 4: (13, "32f")}[p.pixels.itemsize]
    threads, maps = torch.get_num_threads(), for_integer_centres(p.unflipped()).numpy()
    options, uniform = (1, kind, 3, 2, 1, 7), 2 | 4  # perspective, type, channels, linear, backward, border left alone
    prepared = {}

    def sources():
        """IppiBatchItem[N]: (N, 4) int64 of address, bytes from row to row, width, height."""
        image, row, column, _ = p.pixels.strides
        if p.index is None:
            offsets = np.arange(n) * image
        else:
            offsets = p.index.numpy() * image + p.corners().numpy() @ (row, column)
        return np.stack(np.broadcast_arrays(p.pixels.ctypes.data + offsets, row, size, size), 1)

    def arguments(images, batch, start, stop):
        """What its functions begin with; the last is an IppBatchItem: address, coefficients of a map."""
        output = np.array([batch.ctypes.data + start * batch.strides[0], batch.strides[1], size, size])
        matrix = np.array([maps.ctypes.data + start * maps.strides[0], 9])
        return [images[start:].ctypes, output.ctypes, ctypes.c_ssize_t(stop - start), matrix.ctypes]

    def check(status):
        if status < 0:  # above are warnings, of an empty share for one
            raise UserError(f"Intel IPP refuses the batch with status {status}: leave ipp out of --peers")

    def prepare(start, stop):
        batch, lengths = arguments(sources(), p.pixels, start, stop), [ctypes.c_ssize_t() for _ in range(3)]
        of_spec, of_start, of_work = map(ctypes.byref, lengths)
        check(library.ippiWarpBatchGetSize_L(*batch, *options, uniform, of_spec, of_start))
        spec, beginning = (ctypes.create_string_buffer(length.value + 1) for length in lengths[:2])
        check(library.ippiWarpBatchInit_L(*batch, *options, None, uniform, spec, beginning))
        check(library.ippiWarpBatchGetBufferSize_L(*batch, spec, of_work))
        prepared[start, stop] = spec, ctypes.create_string_buffer(lengths[2].value + 1)

    def warp(batch):
        images, function = sources(), getattr(library, f"ippiWarpBatch_{name}_C3R_L")

        def share(start, stop):
            check(function(*arguments(images, batch, start, stop), *prepared[start, stop]))

        in_shares(share, n, threads)

    in_shares(prepare, n, threads)
    return on_pixels(p, warp)


PEERS = {"ipp": ipp, "opencv": opencv, "opencv threads": lambda problem: opencv(problem, torch.get_num_threads()),
         "pil": pil, "grid_sample": grid_sample, "kornia": kornia}


def installed(names, device):
    """{name: version} of the libraries that are here and run on this device; a note for each of the others."""
    found = {}
    for name in names:
        try:
            if device.type == "cuda" and name not in ON_TENSORS:
                raise ImportError("it runs on the CPU only")
            if name == "ipp":
                found[name] = ipp_library() and metadata.version(name)
            else:
                found[name] = importlib.import_module(MODULES[name]).__version__
        except ImportError as error:
            print(f"note: {name} is left out ({error}); pip install '.[bench]' installs the libraries")
    return found


def contestants(setting, problem, peers):
    """{name: how to make its function}, ours first. Compiled ones and our other kernels at one size and N only."""
    left_out = {"warp uint8": (*ON_TENSORS, "pil"), "warp float32": ("pil",)}.get(setting, ())  # PIL would only convert
    entries, device = {"ours": ours}, problem.images.device.type
    entries |= {name: PEERS[name] for name in peers if name not in left_out}
    if (problem.size, len(problem.coefficients)) == DETAILED[device]:
        entries |= {f"{name}, compiled": functools.partial(compiled, make=PEERS[name])
                    for name in ON_TENSORS if name in entries}
        if device == "cpu":
            entries |= {f"ours, {target}": functools.partial(ours, target=target) for target in _C.cpu_targets()[1:]}
    return entries


# --------------------------------------------------------------------------------------------------------- problems


def smooth_images(n, size, generator):
    """Random images without noise: 8 x 8 random grey levels, enlarged. (n, 3, size, size) uint8."""
    small = 255 * torch.rand(n, 3, 8, 8, generator=generator)
    images = F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False)
    return images.round().clamp(0, 255).to(torch.uint8)


def with_margin(data_set):
    """(data set, padded, pixels), as in Problem."""
    padded = F.pad(data_set, (data_set.shape[-1] // 8,) * 4)
    return data_set, padded, channels_last(padded)


def channels_last(images):
    """(N, 3, H, W) tensor -> (N, H, W, 3) array, on the CPU; None on CUDA."""
    return None if images.is_cuda else images.permute(0, 2, 3, 1).contiguous().numpy()


def make_problem(setting, data_set, n, generator):
    """data_set: (images, padded, pixels), all of M images, as in Problem."""
    data_set, padded, pixels = data_set
    size, device, dtype = data_set.shape[-1], data_set.device, SETTINGS[setting]
    coefficients = sample_coefficients(n, size, generator).to(device)
    if setting.startswith("warp"):
        images = data_set[torch.arange(n, device=device) % len(data_set)].to(dtype)
        return Problem(images, coefficients, dtype, pixels=channels_last(images))
    index = torch.randint(0, len(data_set), (n,), generator=generator).to(device)
    crops = sample_crops(n, size, generator).to(device)
    return Problem(data_set, coefficients, dtype, index, crops, padded, pixels,
                   *normalization(*common.STATISTICS["cifar10"], device))


# -------------------------------------------------------------------------------------------------------- agreement


def as_tensor(output):
    """The first 64 images of a result as (N, 3, S, S) float32 on the CPU."""
    if isinstance(output, np.ndarray):
        output = torch.from_numpy(output).permute(0, 3, 1, 2)
    return output[:64].float().cpu()


def distance_from_border(coefficients, size):
    """(N, 1, S, S): how many pixels the point read lies inside the image; outside it is negative."""
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) + 0.5] * 2, indexing="ij")
    a, b, c, d, e, f, g, h = coefficients.double().cpu()[:, :, None, None].unbind(1)
    denominator = g * x + h * y + 1
    u, v = (a * x + b * y + c) / denominator, (d * x + e * y + f) / denominator
    return torch.stack([u, size - u, v, size - v]).amin(0)[:, None]


def compare(setting, problem, outputs):
    """One row for each of the outputs, {name: of 64 images}: its difference from the first in grey levels. Raises
    UserError where it is more than rounding explains."""
    outputs = {name: as_tensor(output) for name, output in outputs.items()}
    expected, rows = outputs.pop(next(iter(outputs))), []
    unit = 1 if problem.scale is None else problem.scale.cpu()[:, None, None]
    distance = distance_from_border(problem.coefficients[:64], problem.size).expand_as(expected)
    for name, output in outputs.items():
        library = name.split(",")[0]
        compared = (distance if library == "ipp" else distance.abs()) >= 1
        apart = ((output - expected) / unit).abs()[compared]
        row = {"setting": setting, "library": name, "size": problem.size, "largest": apart.max().item(),
               "mean": apart.mean().item(), "limit": LIMITS[library],
               "share_of_pixels": compared.double().mean().item()}
        rows.append(row)
        print(f"{setting:14}{name:22}{row['size']:6}{row['largest']:10.4f}{row['mean']:10.5f}{row['limit']:8}"
              f"{row['share_of_pixels']:9.1%}", flush=True)
    bad = [f"{row['library']} ({setting}, size {row['size']}) by {row['largest']:.3g}"
           for row in rows if not row["largest"] <= row["limit"]]
    if bad:
        raise UserError(f"ours and others differ by more grey levels than rounding explains: {', '.join(bad)}")
    return rows


def check_agreement(sizes, peers, device):
    """Prints how far the others are from ours; returns it, or raises UserError."""
    rows = []
    print(f"difference from ours in grey levels, 64 smooth images:\n{'':36}{'size':>6}{'largest':>10}{'mean':>10}"
          f"{'limit':>8}{'pixels':>9}")
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        data_set = with_margin(smooth_images(64, size, generator).to(device))
        for setting in list(SETTINGS)[:3]:  # bfloat16 is rounded more coarsely than a grey level
            problem = make_problem(setting, data_set, 64, generator)
            entries = contestants(setting, problem, peers)
            rows += compare(setting, problem, {name: make(problem)() for name, make in entries.items()})
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
    """{name: median seconds of one call}; the runs take turns, after two calls to warm up."""
    warm = {name: min(seconds_of(run, 1, device), seconds_of(run, 1, device)) for name, run in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds_of(run, math.ceil(SHORTEST / warm[name]), device))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def rows_of(setting, size, n, seconds, counts):
    """One row for each contestant of one problem; the first is ours."""
    rates = {name: counts[name] / each for name, each in seconds.items()}
    return [{"setting": setting, "library": name, "size": size, "n": n, "measured_on": counts[name],
             "seconds": seconds[name], "images_per_second": rate, "ours_over_it": rates["ours"] / rate}
            for name, rate in rates.items()]


def show(rows):
    first = rows[0]
    print(f"\n{first['setting']}, {first['size']} x {first['size']}, N = {first['n']:,}\n"
          f"{'':24}{'images/s':>12}{'ours / it':>11}{'on':>11}")
    for row in rows:
        share = f"  {row['share_of_copies']:.1%} of a copy's bandwidth" if "share_of_copies" in row else ""
        print(f"{row['library']:24}{row['images_per_second']:12,.0f}{row['ours_over_it']:11.2f}{row['measured_on']:11,}"
              f"{share}", flush=True)


def time_forward(setting, problem, peers, repeats, device, bandwidth):
    """One row for each contestant. What is compiled has to agree with what is not."""
    n, counts, runs = len(problem.coefficients), {}, {}
    for name, make in contestants(setting, problem, peers).items():
        whole = device.type == "cuda" or name == "ipp" or name.startswith("ours")
        counts[name] = n if whole else min(n, OTHERS_PIXELS // problem.size**2)
        try:
            run = make(problem.first(counts[name]))
            output = run()
            if name.endswith("compiled") and problem.dtype == torch.float32:
                eager = PEERS[name.removesuffix(", compiled")](problem)
                compare(setting, problem, {"eager": eager(), name: output})
            runs[name] = run
        except torch.OutOfMemoryError:
            print(f"note: {name} is left out, memory is short for N = {n:,} at size {problem.size}")
    if "ours" not in runs:
        return []
    rows = rows_of(setting, problem.size, n, median_seconds(runs, repeats, device), counts)
    if bandwidth:  # an image has to be read and written once
        moved = 3 * problem.size**2 * (problem.images.element_size() + problem.dtype.itemsize)
        rows[0]["share_of_copies"] = rows[0]["images_per_second"] * moved / bandwidth
    return rows


def time_backward(size, n, repeats, device):
    """Forward and backward of ours and of grid_sample; their gradients have to agree."""
    rows, generator = [], torch.Generator().manual_seed(0)
    inputs = {"images": smooth_images(n, size, generator).float().to(device),
              "coefficients": sample_coefficients(n, size, generator).to(device)}
    grad = torch.randn(n, 3, size, size, generator=generator).to(device)

    def step(warp, wanted):
        given = {name: tensor.requires_grad_(name in wanted) for name, tensor in inputs.items()}
        return torch.autograd.grad(warp(**given), [given[name] for name in wanted], grad)

    for wanted in (("images",), ("coefficients",), ("images", "coefficients")):
        runs = {"ours": functools.partial(step, projective_warp, wanted),
                "grid_sample": functools.partial(step, grid_sample_warp, wanted)}
        apart = max(((b - a).norm() / a.norm()).item()
                    for a, b in zip(runs["ours"](), runs["grid_sample"](), strict=True))
        if not apart <= GRADIENT_LIMIT:
            raise UserError(f"the gradients of {' and '.join(wanted)} differ from grid_sample's by {apart:.2g} of "
                            "their norm")
        new = rows_of(f"backward to {' and '.join(wanted)}", size, n, median_seconds(runs, repeats, device),
                      dict.fromkeys(runs, n))
        new[1]["gradient_difference"] = apart
        show(new)
        rows += new
    return rows


def copy_bandwidth(device):
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds({"copy": lambda: target.copy_(source)}, 9, device)["copy"]


def main():
    kept = keep_freed_memory()
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--sizes", type=positive_int, nargs="+", default=[32, 64, 96, 224], help="sides in pixels, 8 or more")
    add("--batches", type=positive_int, nargs="+", help="N (default: 64 1024 16384, on CUDA 1024 65536 1048576)")
    add("--threads", type=positive_int, default=torch.get_num_threads())
    add("--repeats", type=positive_int, default=9, help="samples of each time")
    add("--peers", choices=PEERS, nargs="*", default=list(PEERS), help="whom to compare with")
    add("--check", action="store_true", help="see whether all agree, and time nothing")
    add("--output", help="JSON file for the figures")
    args = parser.parse_args()
    if _C is None:
        raise UserError("the compiled warp, which is what is measured here, is not built: `make setup` builds it")
    device = choose_device(args.device)
    if device.type == "cuda" and CUDA_ARCHITECTURES is None:
        raise UserError("the compiled warp is built without CUDA, so there is nothing to time on the GPU")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise UserError(f"cannot write '{args.output}': there is no such folder", exit_code=2)
    if min(args.sizes) < 8:
        raise UserError("--sizes have to be 8 or more", exit_code=2)
    batches = args.batches or ([1024, 65536, 1048576] if device.type == "cuda" else [64, 1024, 16384])
    torch.set_num_threads(args.threads)
    peers = installed([name for name in args.peers if name != "opencv threads" or args.threads > 1], device)
    if {"opencv", "opencv threads"} & set(peers):
        importlib.import_module("cv2").setNumThreads(1)
    bandwidth = copy_bandwidth(device) if device.type == "cuda" and not args.check else None
    record = {**provenance(device), "device": device.type, "cores": os.cpu_count(), "memory_kept": kept,
              "load_average_before": os.getloadavg()[0], "cpu_capability": torch.backends.cpu.get_cpu_capability(),
              "cpu_targets": _C.cpu_targets(), "build": _C.build_info(), "versions": peers,
              "copy_bytes_per_second": bandwidth}
    print(json.dumps(record, indent=1))
    agreement, rows = check_agreement(args.sizes, peers, device), []
    if args.check:
        return
    for size in args.sizes:
        generator = torch.Generator().manual_seed(0)
        count = min(50000, int(LARGEST_DATA_SET / (3 * size * size)))
        data_set = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8).to(device)
        data_set = with_margin(data_set)
        for n, (setting, dtype) in ((n, item) for n in batches for item in SETTINGS.items()):
            large = 3 * n * size * size * dtype.itemsize
            if large > LARGEST_BATCH[device.type]:
                print(f"\nnote: {setting} of N = {n:,} at size {size} is left out, {large / 1e9:.1f} GB")
                continue
            problem = make_problem(setting, data_set, n, generator)
            new = time_forward(setting, problem, peers, args.repeats, device, bandwidth)
            if new:
                show(new)
            rows += new
        rows += time_backward(size, max(1, BACKWARD_PIXELS[device.type] // size**2), args.repeats, device)
        if args.output:  # what has been measured is there, whatever ends the rest
            Path(args.output).write_text(json.dumps({**record, "agreement": agreement, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
