"""The batched warp against what one would use instead: agreement first, then images a second and megapixels a second.

    python benchmarks/warp.py --output results/warp-cpu.json --plot results/warp-cpu.png
    python benchmarks/warp.py --device cuda --output results/warp-cuda.json --plot results/warp-cuda.png
    python benchmarks/warp.py --quick --threads 1

warp: images in, images of the same type out, in each library's own layout. step: a training step's input from a uint8
data set, by index: random crop, flip, warp, normalise, to one contiguous (N, 3, S, S) batch of float32 or bfloat16.
backward: forward and backward of float32 images, the gradient that of the images, the coefficients or both.

Each peer is in the fastest form found. What can be made beforehand is not timed: its form of the coefficients, into
which the flip is folded, and for a step the data set with a margin of zeros, of which a crop is a view. Freed memory is
kept, so that no library waits for new pages. OpenCV, PIL and torchvision take one map a call and run in a loop, in one
thread; "opencv threads" spreads the loop over --threads, as ours and IPP spread the batch. kornia fills by its own
padding_mode="fill", which samples twice; grid_sample is the fastest form found in plain torch. Both are also compiled
by torch.compile, for fixed shapes, at size 32 and one N. What would take others more than half a second on the CPU is
timed on a part of N (column "on"); ours always on all of it. Contestants run in alternation, after a warm-up, and the
median is taken.
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
from common import (
    STATISTICS,
    Parser,
    UserError,
    choose_device,
    keep_freed_memory,
    positive_int,
    provenance,
    run_command,
)
from minter_warp import normalization, projective_warp, sample_coefficients, sample_crops, warp_batch
from minter_warp.ops import _C, CUDA_ARCHITECTURES

FILL = 128
LARGEST_BATCH = {"cpu": 2e9, "cuda": 4e9}  # bytes of the result
LARGEST_DATA_SET = 300e6  # bytes; beyond every cache
LONGEST, SHORTEST = 0.5, 0.01  # seconds of one sample of the time: fewer images above, several calls below
BUDGET = 0.3  # seconds of samples for each contestant
DETAILED = {"cpu": (32, 1024), "cuda": (32, 65536)}  # size and N where compiled peers and our other kernels are timed

# Largest difference in grey levels from ours that is accepted, where smooth images are read at least one pixel from the
# border (at the border itself the conventions differ: OpenCV, kornia and torchvision blend the fill in). All compute
# the same bilinear interpolation, so only rounding is left: of the coordinates to float32 (under 0.01 here), of the
# result to uint8 (IPP, OpenCV and torchvision round to nearest, PIL down, so 1 at most), and in older OpenCV of the
# coordinates to 1/32 of a pixel: 1/64 off at most on either axis, where neighbours differ by 100 grey levels or so.
LIMITS = {"kornia": 0.1, "grid_sample": 0.1, "ipp": 1.01, "opencv": 5, "opencv threads": 5, "pil": 1.01,
          "torchvision": 1.01}
GRADIENT_LIMIT = 0.01  # difference of gradients, relative in the Euclidean norm
MODULES = {"kornia": "kornia", "grid_sample": "torch", "opencv": "cv2", "opencv threads": "cv2", "pil": "PIL",
           "torchvision": "torchvision"}  # IPP has none
FLOATS_ONLY, BYTES_ONLY = ("kornia", "grid_sample"), ("pil", "torchvision")
ON_CPU_ONLY = ("ipp", "opencv", "opencv threads", "pil")
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
    """target: one of the kernels for this processor, other than the default."""
    p = problem
    if p.index is None:
        run = functools.partial(projective_warp, p.images, p.coefficients)
    else:
        run = functools.partial(warp_batch, p.images, p.index, p.crops, p.coefficients, p.scale, p.shift, p.dtype)
    if target is None:
        return run

    def run_on_target():
        _C.set_cpu_target(target)
        output = run()
        _C.set_cpu_target(_C.cpu_targets()[0])
        return output

    return run_on_target


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


def normalised_from_pixels(batch, problem):
    """(N, S, S, 3) uint8 array -> (N, 3, S, S) contiguous tensor."""
    planes = torch.from_numpy(batch).permute(0, 3, 1, 2)
    return normalised(planes.to(torch.float32, memory_format=torch.contiguous_format), problem)


def batched(problem, warp):
    """warp: float32 images to warped float32 images."""
    if problem.index is None:
        return lambda: warp(problem.images)
    return lambda: normalised(warp(take_crops(problem).float()), problem)


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
    return batched(problem, functools.partial(grid_sample_warp, coefficients=problem.unflipped()))


def for_integer_centres(coefficients):
    """The map from output to input where pixel centres are at whole numbers: (N, 8) -> (N, 3, 3) float64."""
    half = torch.tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]], dtype=torch.float64, device=coefficients.device)
    return (half.inverse() @ matrices(coefficients.double()) @ half).contiguous()


def kornia(problem):
    from kornia.geometry.transform import warp_perspective

    forward = for_integer_centres(problem.unflipped()).inverse().float()
    options = {"dsize": (problem.size, problem.size), "padding_mode": "fill",
               "fill_value": torch.full((3,), float(FILL), device=forward.device)}
    return batched(problem, lambda images: warp_perspective(images, forward, **options))


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


def opencv(problem, threads=1):
    import cv2

    maps, options = for_integer_centres(problem.unflipped()).numpy(), {
        "dsize": (problem.size, problem.size), "flags": cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR,
        "borderMode": cv2.BORDER_CONSTANT, "borderValue": (FILL,) * 3}

    def run():
        images = problem.views()
        batch = np.empty((len(images), problem.size, problem.size, 3), problem.pixels.dtype)

        def warp(start, stop):
            for image, map, output in zip(images[start:stop], maps[start:stop], batch[start:stop], strict=True):
                cv2.warpPerspective(image, map, dst=output, **options)

        in_shares(warp, len(images), threads)
        return batch if problem.index is None else normalised_from_pixels(batch, problem)

    return run


def opencv_threads(problem):
    return opencv(problem, torch.get_num_threads())


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
    """Intel IPP's ippiWarpBatch: a share of the batch a call, one matrix an image, channels last (three planes by
    themselves take it longer). It has less to do than the others: where the point read lies outside the outermost
    pixel centres nothing is written, whatever border it is told, and the pixel stays what it was in memory."""
    library, p, size, n = ipp_library(), problem, problem.size, len(problem.coefficients)
    itemsize, threads = p.pixels.itemsize, torch.get_num_threads()
    warp_share = getattr(library, f"ippiWarpBatch_{'8u' if itemsize == 1 else '32f'}_C3R_L")
    maps = for_integer_centres(p.unflipped()).numpy()
    fill = (ctypes.c_double * 3)(FILL, FILL, FILL)

    def items(addresses, row_bytes):
        """IppiBatchItem[n]: (n, 4) int64 of address, bytes from row to row, width, height."""
        return np.stack(np.broadcast_arrays(addresses, row_bytes, size, size), 1)

    def sources():
        corners = 0 if p.index is None else p.corners().numpy() @ p.pixels.strides[1:3]
        index = np.arange(n) if p.index is None else p.index.numpy()
        return items(p.pixels.ctypes.data + index * p.pixels.strides[0] + corners, p.pixels.strides[1])

    def outputs(batch):
        return items(batch.ctypes.data + np.arange(n) * batch.strides[0], batch.strides[1])

    def arguments(source, output, start, stop):
        """What all of its functions take first; transforms are IppBatchItem[n]: address, number of coefficients."""
        return (*(ctypes.c_void_p(array[start:].ctypes.data) for array in (source, output)),
                ctypes.c_ssize_t(stop - start), ctypes.c_void_p(transforms[start:].ctypes.data))

    def check(status):
        if status:
            raise UserError(f"Intel IPP refuses the batch with status {status}: leave ipp out of --peers")

    transforms = np.stack(np.broadcast_arrays(maps.ctypes.data + np.arange(n) * maps.strides[0], 9), 1)
    options = 1, 1 if itemsize == 1 else 13, 3, 2, 1, 6  # perspective, ipp8u or ipp32f, C3, linear, backward, constant
    source, output, prepared = sources(), outputs(np.empty((n, size, size, 3), p.pixels.dtype)), {}

    def prepare(start, stop):
        batch, length = arguments(source, output, start, stop), [ctypes.c_ssize_t() for _ in range(3)]
        spec_size, first_size, work_size = map(ctypes.byref, length)
        check(library.ippiWarpBatchGetSize_L(*batch, *options, 0, spec_size, first_size))
        spec, first = (ctypes.create_string_buffer(max(1, size.value)) for size in length[:2])
        check(library.ippiWarpBatchInit_L(*batch, *options, fill, 0, spec, first))
        check(library.ippiWarpBatchGetBufferSize_L(*batch, spec, work_size))
        prepared[start] = spec, ctypes.create_string_buffer(max(1, length[2].value)), fill

    in_shares(prepare, n, threads)

    def run():
        batch = np.empty((n, size, size, 3), p.pixels.dtype)
        source, output = sources(), outputs(batch)

        def warp(start, stop):
            check(warp_share(*arguments(source, output, start, stop), *prepared[start][:2]))

        in_shares(warp, n, threads)
        return batch if p.index is None else normalised_from_pixels(batch, p)

    return run


def pil(problem):
    from PIL import Image

    p, size = problem, problem.size
    maps = p.unflipped().tolist()

    def warp(image, map):
        return image.transform((size, size), Image.Transform.PERSPECTIVE, map, Image.Resampling.BILINEAR,
                               fillcolor=(FILL,) * 3)

    if p.index is None:
        images = [Image.fromarray(image) for image in p.pixels]
        return lambda: [warp(image, map) for image, map in zip(images, maps, strict=True)]

    def run():
        batch = np.empty((len(maps), size, size, 3), np.uint8)
        for output, image, map in zip(batch, p.views(), maps, strict=True):
            output[:] = warp(Image.fromarray(image), map)
        return normalised_from_pixels(batch, p)

    return run


def torchvision(problem):
    from torchvision.transforms.v2.functional import perspective

    p, size = problem, problem.size
    maps = p.unflipped().tolist()

    def run():
        if p.index is None:
            images = p.images
        else:
            images = [p.padded[at, :, down : down + size, right : right + size]
                      for at, (down, right) in zip(p.index.tolist(), p.corners().tolist(), strict=True)]
        batch = [perspective(image, None, None, fill=[FILL] * 3, coefficients=map)
                 for image, map in zip(images, maps, strict=True)]
        return batch if p.index is None else normalised(torch.stack(batch).float(), p)

    return run


PEERS = {"ipp": ipp, "opencv": opencv, "opencv threads": opencv_threads, "grid_sample": grid_sample, "kornia": kornia,
         "pil": pil, "torchvision": torchvision}


def installed(names, device):
    """{name: version} of the libraries that are here and run on this device; a note for each of the others."""
    found = {}
    for name in names:
        if device.type == "cuda" and name in ON_CPU_ONLY:
            print(f"note: {name} is left out, which runs on the CPU only")
        elif name == "opencv threads" and torch.get_num_threads() == 1:
            print("note: opencv threads is left out, there is one thread")
        else:
            try:
                if name == "ipp":
                    found[name] = ipp_library() and metadata.version(name)
                else:
                    found[name] = importlib.import_module(MODULES[name]).__version__
            except ImportError as error:
                print(f"note: {name} is left out ({error}); pip install '.[bench]' has it")
    return found


def contestants(setting, problem, peers):
    """{name: how to make its function}, ours first. Compiled ones and our other kernels at one size and N only."""
    others = [name for name in peers if name not in {"warp uint8": FLOATS_ONLY, "warp float32": BYTES_ONLY}.get(setting,
                                                                                                               ())]
    device = problem.images.device.type
    entries = {"ours": ours, **{name: PEERS[name] for name in others}}
    if (problem.size, len(problem.coefficients)) == DETAILED[device]:
        entries |= {f"{name}, compiled": functools.partial(compiled, make=PEERS[name])
                    for name in others if name in FLOATS_ONLY}
        if device == "cpu":
            entries |= {f"ours, {target}": functools.partial(ours, target=target) for target in _C.cpu_targets()[1:]}
    return entries


# --------------------------------------------------------------------------------------------------------- problems


def smooth_images(n, size, generator):
    """Random images without noise: 8 x 8 random grey levels, enlarged. (n, 3, size, size) uint8."""
    small = 255 * torch.rand(n, 3, 8, 8, generator=generator)
    images = F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False)
    return images.round().clamp(0, 255).to(torch.uint8)


def channels_last(images):
    """(N, 3, H, W) tensor -> (N, H, W, 3) array, on the CPU; None on CUDA."""
    return None if images.is_cuda else images.permute(0, 2, 3, 1).contiguous().numpy()


def make_problem(setting, data_set, padded, pixels, n, generator):
    """data_set: (M, 3, S, S) uint8. padded, pixels: as in Problem."""
    size, device, dtype = data_set.shape[-1], data_set.device, SETTINGS[setting]
    coefficients = sample_coefficients(n, size, generator).to(device)
    if setting.startswith("warp"):
        images = data_set[torch.arange(n, device=device) % len(data_set)].to(dtype)
        return Problem(images, coefficients, dtype, pixels=channels_last(images))
    index = torch.randint(0, len(data_set), (n,), generator=generator).to(device)
    crops = sample_crops(n, size, generator).to(device)
    return Problem(data_set, coefficients, dtype, index, crops, padded, pixels,
                   *normalization(*STATISTICS["cifar10"], device))


def with_margin(data_set):
    """(padded, pixels) of a data set, as in Problem."""
    padded = F.pad(data_set, (data_set.shape[-1] // 8,) * 4)
    return padded, channels_last(padded)


# -------------------------------------------------------------------------------------------------------- agreement


def as_tensor(output, count):
    """The first images of whatever a contestant returned, as (count, 3, S, S) float32 on the CPU."""
    output = output[:count]
    if isinstance(output, torch.Tensor):
        return output.float().cpu()
    if isinstance(output[0], torch.Tensor):
        return torch.stack(output).float().cpu()
    return torch.from_numpy(np.stack([np.asarray(image) for image in output])).permute(0, 3, 1, 2).float()


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
    outputs = {name: as_tensor(output, 64) for name, output in outputs.items()}
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
        data_set = smooth_images(64, size, generator).to(device)
        for setting in list(SETTINGS)[:3]:  # bfloat16 is rounded more coarsely than a grey level
            problem = make_problem(setting, data_set, *with_margin(data_set), 64, generator)
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


def fewer(name, make, problem, device):
    """How many of the images to time a contestant on: on CUDA all, but for torchvision's loop."""
    n = len(problem.coefficients)
    if name.startswith("ours") or name.endswith("compiled") or (device.type == "cuda" and name != "torchvision"):
        return n
    tried = min(n, 64)
    run = make(problem.first(tried))
    run()
    images = LONGEST * tried / seconds_of(run, 1, device)
    return n if n <= images else max(16, int(images) // 16 * 16)


def rows_of(setting, size, n, seconds, counts):
    """One row for each contestant of one problem; the first is ours."""
    rates = {name: counts[name] / each for name, each in seconds.items()}
    return [{"setting": setting, "library": name, "size": size, "n": n, "measured_on": counts[name],
             "seconds": seconds[name], "images_per_second": rate, "megapixels_per_second": rate * size * size / 1e6,
             "ours_over_it": rates["ours"] / rate} for name, rate in rates.items()]


def show(rows):
    first = rows[0]
    print(f"\n{first['setting']}, {first['size']} x {first['size']}, N = {first['n']:,}\n"
          f"{'':24}{'images/s':>12}{'megapixels/s':>14}{'ours / it':>11}{'on':>10}"
          + ("  of copies" if "share_of_copies" in first else ""))
    for row in rows:
        share = f"{row['share_of_copies']:11.1%}" if "share_of_copies" in row else ""
        print(f"{row['library']:24}{row['images_per_second']:12,.0f}{row['megapixels_per_second']:14,.1f}"
              f"{row['ours_over_it']:11.2f}{row['measured_on']:10,}{share}", flush=True)


def time_forward(setting, problem, peers, repeats, device, bandwidth):
    """(rows of the times, rows of the agreement of what is compiled with what is not)."""
    n, counts, runs, agreement = len(problem.coefficients), {}, {}, []
    for name, make in contestants(setting, problem, peers).items():
        try:
            counts[name] = fewer(name, make, problem, device)
            run = make(problem.first(counts[name]))
            output = run()
            if name.endswith("compiled") and problem.dtype != torch.bfloat16:
                eager = PEERS[name.split(",")[0]](problem.first(64))()
                agreement += compare(setting, problem, {"eager": eager, name: output})
            runs[name] = run
        except torch.OutOfMemoryError:
            print(f"note: {name} is left out, memory is short for N = {n:,} at size {problem.size}")
    if "ours" not in runs:
        return [], agreement
    rows = rows_of(setting, problem.size, n, median_seconds(runs, repeats, device), counts)
    if bandwidth:  # an image has to be read and written once
        moved = 3 * problem.size**2 * (problem.images.element_size() + problem.dtype.itemsize)
        rows[0]["share_of_copies"] = rows[0]["images_per_second"] * moved / bandwidth
    return rows, agreement


def time_backward(size, n, repeats, device):
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


# ---------------------------------------------------------------------------------------------------------- results


def draw(rows, path):
    """Images/s of each library against N for the warps and the step, and ours in megapixels/s against the size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes, names = sorted({row["size"] for row in rows}), dict.fromkeys(row["library"] for row in rows)
    colours = {name: f"C{i}" for i, name in enumerate(PEERS)} | {"ours": "black"}
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.7))
    for axis, setting in zip(axes, list(SETTINGS)[:3], strict=False):
        for name in filter(colours.get, names):  # those of a single N are in the tables
            points = [(row["n"], row["images_per_second"]) for row in rows
                      if (row["setting"], row["size"], row["library"]) == (setting, sizes[0], name)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colours[name])
        axis.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="images/s",
                 title=f"{setting}, {sizes[0]} × {sizes[0]}")
    for setting, style in zip(SETTINGS, ("-", "--", "-.", ":"), strict=True):
        best = [max(row["megapixels_per_second"] for row in rows
                    if (row["setting"], row["size"], row["library"]) == (setting, size, "ours")) for size in sizes]
        axes[3].plot(sizes, best, style, marker="o", markersize=4, color="black", label=setting)
    axes[3].set(xscale="log", ylim=0, xlabel="side in pixels", ylabel="megapixels/s", title="ours, at its best N")
    axes[3].set_xticks(sizes, map(str, sizes))
    axes[3].minorticks_off()
    axes[3].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    handles = [plt.Line2D([], [], color=colours[name], marker="o", label=name) for name in names if name in colours]
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncol=len(handles), frameon=False, fontsize=8)
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
    kept = keep_freed_memory()
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--sizes", type=positive_int, nargs="+", default=[32, 64, 96, 224], help="sides in pixels, 8 or more")
    add("--batches", type=positive_int, nargs="+", help="N (default: 64 1024 16384, on CUDA 1024 65536 1048576)")
    add("--threads", type=positive_int, default=torch.get_num_threads())
    add("--repeats", type=positive_int, default=15, help="samples of each time at most")
    add("--peers", choices=PEERS, nargs="*", default=list(PEERS), help="whom to compare with")
    add("--quick", action="store_true", help="size 32 with N of 64 and 1024, and no other backward, in a minute")
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
    sizes = [32] if args.quick else args.sizes
    if min(sizes) < 8:
        raise UserError("--sizes have to be 8 or more", exit_code=2)
    usual = [1024, 65536, 1048576] if device.type == "cuda" else [64, 1024, 16384]
    batches = [64, 1024] if args.quick else args.batches or usual
    torch.set_num_threads(args.threads)
    peers = installed(args.peers, device)
    if "opencv" in peers or "opencv threads" in peers:
        importlib.import_module("cv2").setNumThreads(1)
    bandwidth = copy_bandwidth(device) if device.type == "cuda" and not args.check else None
    record = {**provenance(device), "device": device.type, "cores": os.cpu_count(), "memory_kept": kept,
              "load_average_before": os.getloadavg()[0], "cpu_capability": torch.backends.cpu.get_cpu_capability(),
              "cpu_targets": _C.cpu_targets(), "build": _C.build_info(), "versions": peers,
              "copy_bytes_per_second": bandwidth}
    print(json.dumps(record, indent=1))
    agreement, rows = check_agreement(sizes, peers, device), []
    if args.check:
        return
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        count = min(50000, int(LARGEST_DATA_SET / (3 * size * size)))
        data_set = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8).to(device)
        padded, pixels = with_margin(data_set)
        for n, (setting, dtype) in ((n, item) for n in batches for item in SETTINGS.items()):
            large = 3 * n * size * size * dtype.itemsize
            if large > LARGEST_BATCH[device.type]:
                print(f"\nnote: {setting} of N = {n:,} at size {size} is left out, {large / 1e9:.1f} GB")
                continue
            problem = make_problem(setting, data_set, padded, pixels, n, generator)
            new, compared = time_forward(setting, problem, peers, args.repeats, device, bandwidth)
            if new:
                show(new)
            rows += new
            agreement += compared
            if args.output:  # what has been measured is there, whatever ends the rest
                write(args.output, record, rows, agreement)
    for size, n in [(32, 1024)] if args.quick else [(32, 1024), (96, 64)]:
        rows += time_backward(size, n, args.repeats, device)
    if args.output:
        write(args.output, record, rows, agreement)
    if args.plot:
        draw([row for row in rows if not row["setting"].startswith("backward")], args.plot)


if __name__ == "__main__":
    run_command(main)
