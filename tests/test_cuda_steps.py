"""The steps of the CUDA kernel, run on the host for one thread after the other, against the PyTorch reference: its
arithmetic, its indices, and what its barriers have to order, tested without a GPU. What is left for one is that the
barriers are there, and the few instructions that csrc/warp_host.h has in another form."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from test_fuzz import calls, reference, same
from torch.utils.cpp_extension import include_paths

from minter_warp import normalization, projective_warp_reference, sample_coefficients, sample_crops, warp_batch

ROOT = Path(__file__).resolve().parent.parent
TYPES = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2}
VARIANTS = ("global memory", "pixel by pixel", "fours", "fours, three channels")


@pytest.fixture(scope="module")
def steps(module_folder):
    library = module_folder / "warp_steps.so"
    command = ["c++", "-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC",
               f"-I{ROOT / 'csrc'}", *(f"-I{path}" for path in include_paths()), str(ROOT / "tests/warp_steps.cpp"),
               "-o", str(library)]
    if os.environ.get("MINTER_SANITIZE") == "1":
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def run(steps, images, coefficients, index, crop, window, scale, shift, fill, dtype, order="upwards", offset=0):
    """(result, variant of the kernel). offset: elements between a multiple of 16 bytes and the output."""
    batch = len(images if index is None else index)
    count = batch * images[0].numel()
    memory = torch.full((count + offset + 32,), 77, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    threads = torch.arange(steps.threads_of_a_block(), dtype=torch.int32)
    threads = {"upwards": threads, "downwards": threads.flip(0), "mixed": threads[torch.randperm(len(threads))]}[order]
    sizes, variant = (ctypes.c_int64 * 5)(len(images), batch, *images.shape[1:]), ctypes.c_int32()

    def pointer(tensor):
        return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())

    output = memory[offset : offset + count]
    failure = steps.warp_steps(
        *map(pointer, (images, index, crop, window, coefficients, scale, shift)), sizes,
        (ctypes.c_int64 * 4)(*images.stride()), ctypes.c_double(fill),
        int(coefficients is not None and coefficients.dtype == torch.float64), TYPES[images.dtype], TYPES[dtype],
        pointer(threads), pointer(output), ctypes.byref(variant))
    assert failure == 0
    assert (memory[:offset] == 77).all() and (memory[offset + count :] == 77).all()
    return output.view(batch, *images.shape[1:]).clone(), VARIANTS[variant.value]


@given(calls())
def test_any_call_gives_the_references_result(steps, call):
    assume(call["images"].dtype != torch.float64 and call["images"].numel() > 0 and call["dtype"] in TYPES)
    assume(call["index"] is None or len(call["index"]) > 0)
    call["images"] = call["images"].resolve_neg()
    result, _ = run(steps, **call)
    assert same(result, reference(**call), 0.01)  # grey levels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, variant", [
    ((3, 32, 32), "fours, three channels"), ((3, 30, 12), "fours, three channels"),
    ((3, 33, 32), "fours, three channels"), ((3, 96, 96), "fours, three channels"),
    ((3, 30, 128), "fours, three channels"), ((3, 20, 132), "pixel by pixel"), ((1, 28, 28), "fours"),
    ((4, 16, 20), "fours"), ((3, 33, 31), "pixel by pixel"), ((3, 128, 132), "global memory"),
    ((5, 12, 600), "global memory")])
def test_every_variant_in_any_order_of_threads(steps, shape, variant, dtype):
    """From uint8 images; the same bits whatever the order of the threads within a step: no two write to one place, and
    none reads what another writes."""
    generator = torch.Generator().manual_seed(0)
    images, n, side = torch.randint(0, 256, (6, *shape), dtype=torch.uint8, generator=generator), 12, min(shape[1:])
    coefficients, index = sample_coefficients(n, (shape[1], shape[2]), generator), torch.arange(n) % 6
    crops = sample_crops(n, side, generator)
    scale, shift = (None, None) if dtype == torch.uint8 else normalization([0.5] * shape[0], [0.2] * shape[0])
    call = (images, coefficients, index, crops, None, scale, shift, 128.0, dtype)
    results = [run(steps, *call, order) for order in ("upwards", "downwards", "mixed")]
    assert [name for _, name in results] == [variant] * 3
    assert all(torch.equal(result, results[0][0]) for result, _ in results)
    names = ("images", "coefficients", "index", "crop", "window", "scale", "shift", "fill", "dtype")
    expected = reference(**dict(zip(names, call, strict=True)))
    assert same(results[0][0], expected, 0.01 if scale is None else 0.01 * scale.max().item())


def test_float_images_and_an_output_that_begins_anywhere(steps):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(5, 3, 32, 32, generator=generator) * 255
    coefficients = sample_coefficients(5, 32, generator)
    expected = projective_warp_reference(images, coefficients)
    for offset, variant in [(0, "fours, three channels"), (4, "fours, three channels"), (1, "pixel by pixel")]:
        call = (images, coefficients, None, None, None, None, None, 128.0, torch.float32)
        result, name = run(steps, *call, offset=offset)
        assert name == variant and (result - expected).abs().max() < 0.01


@pytest.mark.parametrize("direction", ["columns", "rows"])
@pytest.mark.parametrize("size", [32, 36])
def test_what_is_in_fixed_point_is_as_exact_as_documented(size, direction, steps):
    """uint8 images that change as fast as can be: every second column or row black, the others white."""
    n, generator = 300, torch.Generator().manual_seed(2)
    stripes = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    stripes[..., ::2] = 255
    stripes = stripes if direction == "columns" else stripes.mT.contiguous()
    coefficients = sample_coefficients(n, size, generator)
    call = (stripes, coefficients, torch.zeros(n, dtype=torch.int64), None, None, None, None, 0.0, torch.float32)
    result, name = run(steps, *call)
    expected = projective_warp_reference(stripes.expand(n, 3, size, size).double(), coefficients.double(), 0.0)
    assert name == "fours, three channels"
    assert (result - expected).abs().max() < 0.01


def test_the_identity_a_shift_and_a_flip_are_exact(steps):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    identity, shift = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0]]), torch.tensor([[1.0, 0, 3, 0, 1, -2, 0, 0]])
    crops = torch.tensor([[0, 0, 1], [2, -3, 0]])
    for coefficients in (identity.expand(2, 8).contiguous(), shift.expand(2, 8).contiguous()):
        result, _ = run(steps, images, coefficients, None, crops, None, None, None, 9.0, torch.float32)
        assert torch.equal(result, warp_batch(images, torch.arange(2), crops, coefficients, fill=9.0))
