"""The warp: against PIL, against the PyTorch reference, its gradients, its training form, what must never happen."""

import functools
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.autograd import gradcheck

import minter_warp
from minter_warp import (
    coefficients_from_corners,
    coefficients_from_matrices,
    crop_and_flip_reference,
    normalization,
    projective_warp,
    projective_warp_reference,
    reference_errors,
    sample_coefficients,
    sample_corners,
    sample_crops,
    transformation_target,
    warp_batch,
)
from minter_warp.ops import _C

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
IDENTITY = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0]])


EXACT = {"cpu": 0.02, "cuda": 0.03}  # grey levels, as documented


def random_images(n, height=32, width=32, channels=3, dtype=torch.uint8, seed=0):
    images = torch.randint(0, 256, (n, channels, height, width), generator=torch.Generator().manual_seed(seed))
    return images.to(dtype)


def draw(n, size, seed=0):
    return sample_coefficients(n, size, torch.Generator().manual_seed(seed))


def warp_by_pil(image, coefficients, fill=(128, 128, 128)):
    """image: (3, H, W) uint8. The coefficients are the same float32 numbers, which PIL reads as doubles."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    data = [float(c) for c in coefficients]
    kind, filter = Image.Transform.PERSPECTIVE, Image.Resampling.BILINEAR
    warped = picture.transform(picture.size, kind, data, filter, fillcolor=fill)
    return torch.from_numpy(np.array(warped)).permute(2, 0, 1)


def grey_levels_apart(a, b):
    return (a.int() - b.int()).abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size, n", [((32, 32), 1000), ((33, 47), 200), ((1, 1), 20), ((7, 96), 100), ((2, 5), 100)])
def test_every_pixel_is_within_one_grey_level_of_pil(size, n, device):
    images, coefficients = random_images(n, *size), draw(n, size)
    expected = torch.stack([warp_by_pil(image, row) for image, row in zip(images, coefficients, strict=True)])
    for warp in (projective_warp, projective_warp_reference):
        warped = warp(images.to(device), coefficients.to(device)).cpu()
        assert warped.dtype == torch.uint8 and warped.shape == images.shape
        assert grey_levels_apart(warped, expected) <= 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_horizon_inside_the_image_does_what_pil_does(device):
    # The denominator changes sign between the columns of the image: beyond the horizon the map is mirrored, and PIL
    # reads whatever lies inside.
    coefficients = torch.tensor([[-0.5, 0, 0, 0, -0.5, 0, -1 / 16.25, 0], [-1, 0, 16, 0.1, -1, 2, -1 / 20.3, -1 / 50.1],
                                 [-0.6, 0.1, 1, 0.2, -0.8, -1, -0.07, 0.02]])
    x, y = torch.arange(32) + 0.5, (torch.arange(32) + 0.5)[:, None]
    denominator = coefficients[:, 6, None, None] * x + coefficients[:, 7, None, None] * y + 1
    images = random_images(3)
    expected = torch.stack([warp_by_pil(image, row) for image, row in zip(images, coefficients, strict=True)])
    for behind, shown in zip(denominator < 0, (expected != 128).any(1), strict=True):
        assert 0 < behind.sum() < 1024 and (behind & shown).sum() > 50
    for warp in (projective_warp, projective_warp_reference):
        assert grey_levels_apart(warp(images.to(device), coefficients.to(device)).cpu(), expected) <= 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_point_on_the_border_is_inside_or_outside_as_in_pil(device):
    """u is mathematically 32, the first value outside: what each form makes of it depends on its last rounding, and a
    product with 1 / denominator or a fused multiply-add rounds another way than PIL's division."""
    g = torch.arange(2, 2000, dtype=torch.float32)
    coefficients = torch.zeros(len(g), 8)
    coefficients[:, 2], coefficients[:, 4], coefficients[:, 6] = 32 * (g / 2 + 1), 1, g  # u = c / (g x + 1), x = 1/2
    images = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8).expand(len(g), -1, -1, -1)
    expected = torch.stack([warp_by_pil(images[0], row) for row in coefficients])
    for warp in (projective_warp, projective_warp_reference):
        assert torch.equal(warp(images.to(device), coefficients.to(device)).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_read_out_of_bounds(device):
    """An image of ones within a sea of other values: whatever the map, only ones and the fill come out."""
    sea = torch.full((4, 3, 40, 40), 9e9, device=device)
    sea[1:3, :, 4:36, 4:36] = 1
    images = sea[1:3, :, 4:36, 4:36]
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 100.0, 1e10, 1e30, 1e38):
        for _ in range(20):
            coefficients = (IDENTITY + scale * torch.randn(2, 8, generator=generator)).to(device)
            warped = projective_warp(images, coefficients, 2.0)
            assert ((warped - 1).abs().minimum((warped - 2).abs()) < 1e-5).all()
            gradient = torch.ones_like(warped)
            into, _ = torch.ops.minter.warp_backward(gradient, images, coefficients, *4 * [None], True, False)
            assert into.isfinite().all()
    crops = torch.randint(-60, 61, (50, 3), generator=generator).to(device)
    index = torch.randint(0, 2, (50,), generator=generator).to(device)
    batch = warp_batch(images, index, crops)
    assert ((batch == 0) | (batch == 1)).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_index_out_of_range_is_nan_on_cuda():
    images, index = random_images(2).cuda(), torch.tensor([0, 2, -1, 1]).cuda()
    batch = warp_batch(images, index)
    assert batch[1:3].isnan().all() and torch.equal(batch[[0, 3]], images.float())


@pytest.mark.parametrize("device", DEVICES)
def test_where_the_map_is_undefined_the_value_is_the_fill(device):
    # g x + 1 is exactly zero in column 7 (x = 7.5), where u and v are infinite or, with a zero numerator, not a number.
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device)
    coefficients = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    coefficients[:, 6] = -1 / 7.5
    assert (coefficients[:, 6] * 7.5 + 1 == 0).all()
    for warp in (projective_warp, projective_warp_reference):
        assert (warp(images, coefficients.to(device))[..., 7] == 128).all()
    for bad in (math.nan, math.inf, -math.inf, 1e38, -1e38):
        for k in range(8):
            broken = IDENTITY.repeat(2, 1)
            broken[:, k] = bad
            for warp in (projective_warp, projective_warp_reference):
                warped = warp(images, broken.to(device), 77.0)
                assert ((warped == 77) | (warped == 0)).all()
                if math.isnan(bad):
                    assert (warped == 77).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(32, 32), (17, 40), (96, 96)])
def test_compiled_equals_reference_in_float32(size, device):
    images = random_images(64, *size, dtype=torch.float32).to(device) / 255
    coefficients = draw(64, size).to(device)
    for fill in (128.0, -3.5, 0.0):
        difference = projective_warp(images, coefficients, fill) - projective_warp_reference(images, coefficients, fill)
        assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_strides_types_and_empty_batches(device):
    images, coefficients = random_images(8, dtype=torch.float32).to(device), draw(8, 32).to(device)
    expected = projective_warp_reference(images, coefficients)
    layouts = {
        "channels_last": images.contiguous(memory_format=torch.channels_last),
        "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": images.repeat_interleave(2, 0)[::2],
        "cut out": torch.nn.functional.pad(images, (3, 2, 1, 4))[:, :, 1:33, 3:35],
    }
    for name, laid_out in layouts.items():
        assert torch.allclose(projective_warp(laid_out, coefficients), expected, atol=1e-3), name
        assert torch.equal(projective_warp(laid_out.to(torch.uint8), coefficients),
                           projective_warp(images.to(torch.uint8), coefficients)), name
    expanded = images[:1].expand(8, -1, -1, -1)
    assert torch.allclose(projective_warp(expanded, coefficients),
                          projective_warp_reference(expanded.contiguous(), coefficients), atol=1e-3)
    columns = coefficients.T.contiguous().T
    assert not columns.is_contiguous()
    assert torch.equal(projective_warp(images, columns), projective_warp(images, coefficients))
    assert projective_warp(images[:0], coefficients[:0]).shape == (0, 3, 32, 32)
    assert projective_warp(images[:, :0], coefficients).shape == (8, 0, 32, 32)
    assert projective_warp(images[..., :0], coefficients).shape == (8, 3, 32, 0)
    assert warp_batch(images, torch.empty(0, dtype=torch.int64, device=device)).shape == (0, 3, 32, 32)
    one_channel = images[:, :1]
    assert torch.allclose(projective_warp(one_channel, coefficients), expected[:, :1], atol=1e-3)
    half = projective_warp(images.half(), coefficients)
    assert half.dtype == torch.float16 and torch.allclose(half.float(), expected, atol=0.1)


def test_the_identity_and_a_quarter_turn_are_exact():
    images = random_images(4)
    assert torch.equal(projective_warp(images, IDENTITY.repeat(4, 1)), images)
    turn = torch.tensor([[0.0, 1, 0, -1, 0, 32, 0, 0]]).repeat(4, 1)  # (x, y) reads (y, 32 - x): a turn clockwise
    assert torch.equal(projective_warp(images, turn), images.rot90(-1, (2, 3)))


def test_wrong_arguments_get_a_clear_exception():
    images, coefficients = random_images(2), IDENTITY.repeat(2, 1)
    for bad in ((images[0], coefficients), (images, coefficients[:1]), (images, coefficients[:, :6])):
        with pytest.raises(ValueError, match=r"images \(N, C, H, W\) and coefficients \(N, 8\)"):
            projective_warp(*bad)
    with pytest.raises(TypeError, match="uint8 or float32"):
        projective_warp(images.long(), coefficients)
    with pytest.raises(TypeError, match="floating-point coefficients"):
        projective_warp(images, coefficients.long())
    for index in (torch.tensor([0, 2]), torch.tensor([-1])):
        with pytest.raises(RuntimeError, match="out of range"):
            warp_batch(images, index)
    for index, crops in (([0, 1], torch.zeros(2, 2)), ([0], torch.zeros(2, 3)), ([0, 1], torch.zeros(2, 3))):
        with pytest.raises(RuntimeError, match="crop has the wrong"):
            warp_batch(images, torch.tensor(index), crops)


# --------------------------------------------------------------------------------------------------- the training form


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, in its jvp
# On the CPU source points are float32, some millionths of a pixel off: 5e-5 where slopes are up to 1 / std a pixel.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)])
def test_training_form_equals_its_parts_one_after_the_other(size, dtype, tolerance, device):
    images, n = random_images(50, *size).to(device), 200
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, 50, (n,), generator=generator).to(device)
    crops = sample_crops(n, 32, generator).to(device)
    coefficients = draw(n, size).to(device)
    mean, std = (0.49, 0.48, 0.44), (0.2, 0.21, 0.19)
    tolerance = tolerance if device == "cpu" else max(tolerance, EXACT[device] / (255 * min(std)))
    m, s = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    for k in (coefficients, None):
        result = warp_batch(images, index, crops, k, *normalization(mean, std, device), dtype)
        batch, allowed = crop_and_flip_reference(images[index].float(), crops), tolerance
        if k is not None:  # the reference, and by how much each pixel changes along a row of the source
            x, y = torch.arange(size[1], device=device) + 0.5, torch.arange(size[0], device=device)[:, None] + 0.5
            to_the_right = torch.zeros(n, 8, device=device)
            to_the_right[:, 2] = 1
            batch, change = torch.func.jvp(functools.partial(projective_warp_reference, batch), (k,), (to_the_right,))
            slope = change * (k[:, 6, None, None] * x + k[:, 7, None, None] * y + 1)[:, None]
            # uint8 images are blended along a row by a fraction rounded to 2^-15: half of that, times the slope
            allowed = tolerance + 2**-16 * slope.abs() / (255 * s)
        assert result.dtype == dtype
        assert ((result.float() - (batch / 255 - m) / s).abs() <= allowed).all()


def random_problem(seed):
    """Anything a user may give: odd sizes, strides, any number of channels, crops beyond the image, windows, horizons,
    maps that are not numbers; as arguments of warp_batch, but for the type of the output."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values):
        return values[torch.randint(len(values), (1,), generator=generator).item()]

    height, width, channels = pick([1, 2, 5, 16, 31, 64]), pick([1, 3, 16, 17, 32, 40, 150]), pick([1, 2, 3, 3, 4, 7])
    images = torch.randint(0, 256, (5, channels, height, width), generator=generator).to(torch.uint8)
    images = images.float() if pick([False, True]) else images
    layout = pick(["plain", "plain", "channels_last", "cut out"])
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "cut out":
        images = torch.nn.functional.pad(images, (1, 2, 1, 3))[:, :, 1 : 1 + height, 1 : 1 + width]
    n = pick([1, 6])
    index = torch.randint(0, 5, (n,), generator=generator)
    reach = torch.tensor([height // 2 + 1, width // 2 + 1])
    crops = ((2 * torch.rand(n, 2, generator=generator) - 1) * reach).round().long()
    crops = torch.cat([crops, torch.randint(0, 2, (n, 1), generator=generator)], 1) if pick([False, True]) else None
    corner = (torch.rand(n, 2, generator=generator) * torch.tensor([height, width])).long()
    extent = (torch.rand(n, 2, generator=generator) * (torch.tensor([height, width]) - corner + 0.99)).long()
    window = torch.cat([corner, extent], 1) if pick([False, False, True]) else None
    coefficients = sample_coefficients(n, (height, width), generator)
    kind = pick(["as sampled", "as sampled", "wild", "whole numbers", "broken"])
    if kind == "wild":
        coefficients += torch.randn(n, 8, generator=generator) * torch.tensor([0.3, 0.3, 3, 0.3, 0.3, 3, 0.05, 0.05])
    elif kind == "whole numbers":  # many points on the border itself
        coefficients = coefficients.round()
    elif kind == "broken":
        coefficients[0, pick(list(range(8)))] = pick([math.nan, math.inf, 1e30])
    coefficients = coefficients.double() if pick([False, True]) else coefficients
    scale = torch.rand(channels, generator=generator) + 0.5
    shift = torch.randn(channels, generator=generator)
    return images, index, crops, coefficients, scale, shift, pick([128.0, 0.0, -3.5, 300.0]), window


@pytest.mark.parametrize("device", DEVICES)
def test_anything_a_user_may_give_equals_the_reference(device):
    for seed in range(300):
        images, index, crops, coefficients, scale, shift, fill, window = (
            value.to(device) if isinstance(value, torch.Tensor) else value for value in random_problem(seed))
        expected = images[index].float()
        expected = expected if crops is None else crop_and_flip_reference(expected, crops)
        expected = projective_warp_reference(expected, coefficients, fill, window)
        plain = warp_batch(images, index, crops, coefficients, None, None, torch.float32, fill, window)
        limit = 0.01 if device == "cpu" else EXACT[device]  # grey levels; what is filled differs by far more
        assert (plain - expected).abs().max() < limit, seed
        normal = warp_batch(images, index, crops, coefficients, scale, shift, torch.float32, fill, window)
        expected = expected * scale[:, None, None] + shift[:, None, None]
        assert (normal - expected).abs().max() < 1.5 * limit, seed


@pytest.mark.parametrize("device", DEVICES)
def test_a_window_beyond_the_image_is_cut_to_it(device):
    image = random_images(1, 8, 8, dtype=torch.float32).to(device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    far = 2**63 - 1
    for window, filled in (((-2, -2, 6, 6), 48), ((5, 5, 6, 6), 55), ((-far, -far, far, far), 64),
                           ((0, 0, far, far), 0), ((3, 3, -1, 4), 64), ((-3, 2, 20, 4), 32)):
        rows = torch.tensor([window], device=device)
        warped = warp_batch(image, index, None, IDENTITY.to(device), fill=-1.0, window=rows)
        assert (warped[0, 0] == -1).sum() == filled, window
        kept = warped != -1
        assert torch.equal(warped[kept], image[kept]), window
        if max(window) < far:
            assert torch.equal(warped, projective_warp_reference(image, IDENTITY.to(device), -1.0, rows)), window


def steep_maps(n, size):
    """Maps that turn and shrink by up to 60 about the centre: the steepest of them are left to float64."""
    generator = torch.Generator().manual_seed(3)
    slopes = 60 ** torch.rand(n, 1, generator=generator) * torch.randn(n, 4, generator=generator) / 2
    (a, b, d, e), half = slopes.unbind(1), size / 2
    return torch.stack([a, b, half - half * (a + b), d, e, half - half * (d + e), 0 * a, 0 * a], 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [32, 96, 256])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_hardest_images_are_as_exact_as_documented(device, size, dtype):
    """Black and white by turns, in both directions, under drawn and under steep maps."""
    board = 255 * ((torch.arange(size)[:, None] + torch.arange(size)) % 2)
    images = board.expand(1, 3, size, size).to(dtype).to(device)
    for coefficients in (draw(40, size), steep_maps(40, size)):
        index, coefficients = torch.zeros(40, dtype=torch.int64, device=device), coefficients.to(device)
        result = warp_batch(images, index, None, coefficients)
        expected = projective_warp_reference(images.double().expand(40, -1, -1, -1), coefficients)
        assert (result - expected).abs().max() < EXACT[device]


@pytest.mark.parametrize("device", DEVICES)
def test_above_256_pixels_points_are_float64(device):
    images = random_images(4, 40, 600, dtype=torch.float32).to(device)
    coefficients = draw(4, (40, 600)).to(device)
    difference = projective_warp(images, coefficients) - projective_warp_reference(images, coefficients)
    assert difference.abs().max() < 1e-4


def results_of_targets(make_results):
    """What make_results() returns with each of the processor's instruction sets."""
    results = {}
    current, *targets = _C.cpu_targets()
    assert current in targets and "portable" in targets
    try:
        for target in targets:
            _C.set_cpu_target(target)
            assert _C.cpu_targets()[0] == target
            results[target] = make_results()
    finally:
        _C.set_cpu_target(current)
    return results


def assert_same_bits(results):
    """But for those of NaN, whose sign is the compiler's."""
    for target, rows in results.items():
        for ours, portable in zip(rows, results["portable"], strict=True):
            assert torch.equal(ours.isnan(), portable.isnan()), target
            ours, portable = (torch.where(row.isnan(), 0, row).view(torch.uint8) for row in (ours, portable))
            assert torch.equal(ours, portable), target


def test_every_instruction_set_gives_the_same_bits():
    with pytest.raises(ValueError, match="this processor has no 'mmx'"):
        _C.set_cpu_target("mmx")

    def rows():
        for seed in range(150):
            images, index, crops, coefficients, scale, shift, fill, window = random_problem(seed)
            for dtype in (torch.float32, torch.bfloat16):
                yield warp_batch(images, index, crops, coefficients, scale, shift, dtype, fill, window)
            if images.dtype == torch.uint8:
                yield projective_warp(images[index], coefficients, fill)
            floats = images[index].float().contiguous()
            grad = torch.rand(floats.shape, generator=torch.Generator().manual_seed(seed))
            yield from torch.ops.minter.warp_backward(
                grad, floats, coefficients, None, crops, window, scale, True, True)

    assert_same_bits(results_of_targets(lambda: list(rows())))


@pytest.mark.parametrize("size", [(8, 16), (33, 47), (24, 224), (8, 256), (8, 257)])
def test_every_instruction_set_gives_the_same_bits_of_extreme_numbers(size):
    """Zeros of either sign, what is too small to be halved without loss, too large, and not a number."""
    images = random_images(3, *size) // 128 * 255
    index, coefficients = torch.tensor([2, 0, 1, 0]), draw(4, size)
    coefficients[0] = IDENTITY[0]
    coefficients[1] = IDENTITY[0] + torch.tensor([0, 0, 0.5, 0, 0, 0.25, 0, 0])

    def rows():
        for scale in (1.0, 0.0, -0.0, -2.0, 1e-39, 3e38, math.inf, math.nan):
            for shift in (0.0, -0.0, 1e-39, -math.inf, math.nan):
                for fill in (0.0, -0.0, 127.5, math.nan):
                    for dtype in (torch.float32, torch.bfloat16):
                        yield warp_batch(images, index, None, coefficients, torch.full((3,), scale),
                                         torch.full((3,), shift), dtype, fill)
        for fill in (0.5, 1.5, 254.5, 300.0, -1.0, math.nan):
            yield projective_warp(images[index], coefficients, fill)

    assert_same_bits(results_of_targets(lambda: list(rows())))


def test_gradients_with_windows_crops_and_flips_are_the_reference_s():
    for seed in range(60):
        images, index, crops, coefficients, _, _, fill, window = random_problem(seed)
        if not coefficients.isfinite().all():
            continue
        images, coefficients = images[index].float() / 255, coefficients.float()
        coefficients = sample_coefficients(len(index), images.shape[2:], torch.Generator().manual_seed(seed))
        grads = []
        for compiled in (True, False):
            pixels, k = images.clone().requires_grad_(), coefficients.clone().requires_grad_()
            if compiled:
                warped = torch.ops.minter.warp(pixels, k, None, crops, window, None, None, fill, torch.float32)
            else:
                views = pixels if crops is None else crop_and_flip_reference(pixels, crops)
                warped = projective_warp_reference(views, k, fill, window)
            weight = torch.rand(warped.shape, generator=torch.Generator().manual_seed(seed))
            grads.append(torch.autograd.grad((warped * weight).sum(), [pixels, k]))
        for ours, reference in zip(*grads, strict=True):
            assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max().clamp(min=1e-3), seed


def test_crop_and_flip_are_torchvisions():
    from torchvision.transforms import functional

    images, n = random_images(20), 20
    crops = sample_crops(n, 32, torch.Generator().manual_seed(2))
    expected = []
    for image, (down, right, flip) in zip(images, crops.tolist(), strict=True):
        cropped = functional.crop(functional.pad(image, 4), 4 + down, 4 + right, 32, 32)
        expected.append(functional.hflip(cropped) if flip else cropped)
    expected = torch.stack(expected)
    assert torch.equal(warp_batch(images, torch.arange(n), crops), expected.float())
    assert torch.equal(crop_and_flip_reference(images, crops), expected)
    far = torch.tensor([[2**62, 0, 0], [-(2**63), 5, 1], [0, 2**63 - 1, 0], [0, -(2**63), 1]])
    assert (warp_batch(images, torch.arange(4), far) == 0).all()


def test_crops_are_uniform_and_flips_fair():
    crops = sample_crops(90_000, 32, torch.Generator().manual_seed(0))
    assert crops.dtype == torch.int64 and crops.shape == (90_000, 3)
    for column in (0, 1):  # 10,000 expected of each of the nine shifts, standard deviation 94
        counts = (crops[:, column] + 4).bincount(minlength=9)
        assert len(counts) == 9 and (counts - 10_000).abs().max() < 5 * 94
    assert abs(crops[:, 2].float().mean() - 0.5) < 5 * 0.5 / 300 and set(crops[:, 2].tolist()) == {0, 1}


# ----------------------------------------------------------------------------------------------------------- gradients


def small_problem(dtype=torch.float64, n=3, size=(5, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 2, *size, generator=generator, dtype=torch.float64)
    coefficients = draw(n, size, seed).double()
    coefficients = coefficients + 0.01 * torch.rand(n, 8, generator=generator, dtype=torch.float64)  # off the kinks
    return images.to(dtype).requires_grad_(), coefficients.to(dtype).requires_grad_()


@pytest.mark.parametrize("warp", [projective_warp_reference, projective_warp])
def test_gradcheck(warp):
    # The step is small enough not to carry a point across a pixel boundary, where bilinear interpolation has a kink.
    images, coefficients = small_problem()
    assert gradcheck(lambda i, c: warp(i, c, 0.5), (images, coefficients), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_compiled_gradients_are_the_reference_s(dtype, tolerance, device):
    images = random_images(16, 32, 32).to(device, dtype) / 255
    coefficients = draw(16, 32).to(device, dtype)
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    gradients = []
    for warp in (projective_warp, projective_warp_reference):
        i, c = images.clone().requires_grad_(), coefficients.clone().requires_grad_()
        (warp(i, c, 0.3) * weights).sum().backward()
        assert i.grad.dtype == dtype and c.grad.dtype == dtype
        gradients.append((i.grad, c.grad))
    for compiled, reference in zip(*gradients, strict=True):
        assert (compiled - reference).abs().max() <= tolerance * reference.abs().max()


def test_gradient_of_the_training_form_reaches_the_coefficients():
    images, index = random_images(10), torch.tensor([3, 3, 9, 0])
    crops, coefficients = sample_crops(4, 32, torch.Generator().manual_seed(3)), draw(4, 32)
    scale, shift = normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    weights = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for built in (True, False):
        c = coefficients.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("minter_warp.ops.compiled_for", lambda images, built=built: built)
            (warp_batch(images, index, crops, c, scale, shift) * weights).sum().backward()
        gradients.append(c.grad)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[1].abs().max()


@pytest.mark.parametrize("warp", [projective_warp_reference, projective_warp])
def test_a_pixel_on_the_horizon_has_no_gradient_and_spoils_none(warp):
    """g x + 1 is 0 in column 7 of the first image, where the value is the fill."""
    images = random_images(2, dtype=torch.float64).requires_grad_()
    coefficients = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0.2, 0, 1, 0.3, 0, 0]], dtype=torch.float64)
    coefficients[0, 6] = -1 / 7.5
    coefficients.requires_grad_()
    warped = warp(images, coefficients)
    assert (warped[0, :, :, 7] == 128).all()
    warped.sum().backward()
    whole = coefficients.grad.clone()
    assert whole.isfinite().all() and images.grad.isfinite().all() and (whole.abs().sum(1) > 0).all()
    coefficients.grad = None
    warp(images, coefficients)[:, :, :, torch.arange(32) != 7].sum().backward()  # without that column
    assert torch.allclose(coefficients.grad[0], whole[0], rtol=1e-12)


FUNCTION_TRANSFORMS = {
    "grad": lambda f, k: torch.func.grad(lambda k: f(k).sum())(k),
    "vjp": lambda f, k: torch.func.vjp(f, k)[1](torch.ones_like(f(k)))[0],
    "jacrev": lambda f, k: torch.func.jacrev(f)(k),
    "each": lambda f, k: torch.func.vmap(torch.func.grad(lambda row: f(row[None].expand(len(k), 8)).sum()))(k),
}
FORWARD = {
    "jvp": lambda f, k: torch.func.jvp(f, (k,), (torch.ones_like(k),)),
    "jacfwd": lambda f, k: torch.func.jacfwd(f)(k),
    "hessian": lambda f, k: torch.func.hessian(lambda k: f(k).sum())(k),
    "second derivative": lambda f, k: torch.func.jacrev(torch.func.jacrev(lambda k: f(k).sum()))(k),
    "dual": lambda f, k: dual(f, k),
    "dual into out": lambda f, k: dual(lambda k: projective_warp(torch.ones(len(k), 1, 4, 4), k, out=torch.empty(
        len(k), 1, 4, 4)), k),
}


def dual(function, k):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(k, torch.ones_like(k)))


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("form", ["projective_warp", "warp_batch"])
def test_function_transforms_are_the_references_or_raise(form):
    images, coefficients = (tensor.detach() for tensor in small_problem(torch.float32))
    index, crops = torch.tensor([2, 0, 1]), sample_crops(3, 4, torch.Generator().manual_seed(0))

    def compiled(k):
        return projective_warp(images, k) if form == "projective_warp" else warp_batch(images, index, crops, k)

    def reference(k):
        taken = images if form == "projective_warp" else crop_and_flip_reference(images[index], crops)
        return projective_warp_reference(taken, k)

    for name, transform in FUNCTION_TRANSFORMS.items():
        ours, expected = transform(compiled, coefficients), transform(reference, coefficients)
        assert expected.abs().max() > 1, name
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()), name
    for name, transform in FORWARD.items():
        with pytest.raises((RuntimeError, ValueError), match="jvp|no second derivative|has no gradient"):
            transform(compiled, coefficients)
            raise AssertionError(name)
    over_images = torch.func.grad(lambda i: projective_warp(i, coefficients).square().sum())(images)
    expected = torch.func.grad(lambda i: projective_warp_reference(i, coefficients).square().sum())(images)
    assert torch.allclose(over_images, expected, rtol=1e-3, atol=1e-3)


def test_only_the_gradients_asked_for_and_no_second_derivative():
    images, coefficients = small_problem()
    warped = projective_warp(images.detach(), coefficients)
    (gradient,) = torch.autograd.grad(warped.sum(), coefficients, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    projective_warp(images, coefficients.detach()).sum().backward()
    assert images.grad is not None and coefficients.grad is None
    assert not projective_warp(random_images(3, 5, 6), coefficients).requires_grad  # uint8 has no gradient


# ------------------------------------------------------------------------------------------ into a tensor that is there


@pytest.mark.parametrize("device", DEVICES)
def test_out_gets_what_a_new_tensor_would(device):
    coefficients = draw(5, 32).to(device)
    for dtype in (torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        images = random_images(5, dtype=dtype).to(device)
        out = torch.full_like(images, 77)
        memory = out.data_ptr()
        assert projective_warp(images, coefficients, 3.0, out=out) is out and out.data_ptr() == memory
        assert torch.equal(out, projective_warp(images, coefficients, 3.0))
    images, index = random_images(9).to(device), torch.tensor([8, 0, 3, 3, 1], device=device)
    crops = sample_crops(5, 32).to(device)
    arguments = images, index, crops, coefficients, *normalization((0.5,) * 3, (0.2,) * 3, device)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((5, 3, 32, 32), 77, dtype=dtype, device=device)
        assert warp_batch(*arguments, out=out) is out
        assert torch.equal(out, warp_batch(*arguments, dtype=dtype))


def test_an_out_that_does_not_fit_is_refused_and_left_alone():
    images, coefficients = random_images(4), draw(4, 32)
    out = torch.full_like(images, 77)
    for wrong, message in [(out[:3], "out must be contiguous, \\(4, 3, 32, 32\\)"), (out.float(), "uint8"),
                           (out.transpose(2, 3), "contiguous"), (torch.empty_like(images, device="meta"), "meta"),
                           (out[0], "contiguous")]:
        with pytest.raises(ValueError, match=message):
            projective_warp(images, coefficients, out=wrong)
    with pytest.raises(TypeError, match="out must be a tensor, not list"):
        projective_warp(images, coefficients, out=[])
    with pytest.raises(TypeError, match="out must be a tensor, not list"):
        warp_batch(images, torch.arange(4), out=[1])
    for wrong in (out.float()[:3], out.long(), out.double(), out.half()):
        with pytest.raises(ValueError, match="float32 or torch.bfloat16 or torch.uint8"):
            warp_batch(images, torch.arange(4), out=wrong)
    with pytest.raises(ValueError, match="a negative view"):
        warp_batch(images, torch.arange(4), out=torch._neg_view(out.float()))
    with pytest.raises(RuntimeError, match="uint8 output takes no scale"):
        warp_batch(images, torch.arange(4), None, coefficients, torch.ones(3), out=out)
    with pytest.raises(ValueError, match="has no gradient"):
        projective_warp(images.float(), coefficients.clone().requires_grad_(), out=out.float())
    with torch.no_grad():
        projective_warp(images.float(), coefficients.clone().requires_grad_(), out=out.float())
    assert (out == 77).all()


def test_a_gradient_that_needs_what_out_held_is_refused():
    images, weights = random_images(4, dtype=torch.float32), torch.ones(3, 1, 1, requires_grad=True)
    out = projective_warp(images, draw(4, 32))
    loss = (out * weights).sum()
    projective_warp(images, draw(4, 32, seed=1), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_out_that_shares_memory_with_what_is_read_is_refused():
    both = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    both[:4] = random_images(4, 8, 8)
    before = both.clone()
    for images, out in [(both[:4], both[:4]), (both[:4], both[1:]), (both[1:], both[:4])]:
        with pytest.raises(RuntimeError, match="shares memory"):
            projective_warp(images, draw(4, 8), out=out)
    coefficients = torch.zeros(3 * 64 + 8)
    with pytest.raises(RuntimeError, match="shares memory"):
        projective_warp(torch.zeros(1, 3, 8, 8), coefficients[-8:][None], out=coefficients[8:].view(1, 3, 8, 8))
    assert torch.equal(both, before)
    projective_warp(both[:2], draw(2, 8), out=both[2:4])  # next to each other
    assert torch.equal(both[2:4], projective_warp(before[:2], draw(2, 8)))


# ------------------------------------------------------------------------------------------- compile, autocast, opcheck


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    images, coefficients = small_problem(torch.float32)
    images, coefficients = images.detach().to(device), coefficients.detach().to(device)
    index, crops = torch.tensor([2, 0], device=device), sample_crops(2, 32).to(device)
    scale, shift = torch.ones(2, device=device), torch.zeros(2, device=device)
    window = torch.tensor([[1, 0, 3, 4], [0, 2, 5, 2]], device=device)
    samples = [
        (images.requires_grad_(), coefficients.requires_grad_(), None, None, None, None, None, 1.0, torch.float32),
        (images.detach().to(torch.uint8), coefficients.detach(), None, None, None, None, None, 1.0, torch.uint8),
        (images.detach().to(torch.uint8), coefficients[:2].detach().requires_grad_(), index, crops, window, scale,
         shift, 1.0, torch.bfloat16),
        (images.detach().to(torch.uint8), None, index, crops, None, scale, shift, 1.0, torch.float32),
    ]
    for sample in samples:
        torch.library.opcheck(torch.ops.minter.warp, sample)
    for *sample, dtype in samples[1:]:
        sample = [value.detach() if isinstance(value, torch.Tensor) else value for value in sample]
        out = torch.empty(len(sample[2]) if sample[2] is not None else 3, 2, 5, 6, dtype=dtype, device=device)
        torch.library.opcheck(torch.ops.minter.warp_out, (*sample, out))
    grad = torch.rand_like(images)
    torch.library.opcheck(torch.ops.minter.warp_backward,
                          (grad, images.detach(), coefficients.detach(), None, None, None, None, True, True))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break_and_runs_under_autocast(device):
    images, coefficients = random_images(8, dtype=torch.float32).to(device), draw(8, 32).to(device)

    def loss(images, coefficients):
        warped = projective_warp(images, coefficients)
        return (warped * torch.linspace(-1, 1, 32, device=images.device)).square().mean()

    gradients, losses = [], []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        i, c = images.clone().requires_grad_(), coefficients.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            value = function(i, c)
        value.backward()
        losses.append(value.item())
        gradients.append((i.grad, c.grad))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for compiled, eager in zip(*gradients, strict=True):
        assert torch.allclose(compiled, eager, rtol=1e-3, atol=1e-5 * eager.abs().max().item())
    out = torch.empty_like(images)
    torch.compile(projective_warp, fullgraph=True)(images, coefficients, out=out)
    assert torch.equal(out, projective_warp(images, coefficients))
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(projective_warp(images, coefficients), projective_warp(images.clone(), coefficients))
        assert projective_warp(images, coefficients).dtype == torch.float32


def calls_of_many_sizes():
    """(function, arguments) of a warp and a training step, at other batch sizes, heights and widths each time."""
    for n in range(2, 13):
        size, generator = (14 + n, 30 - n), torch.Generator().manual_seed(n)
        coefficients = sample_coefficients(n, size, generator)
        images = torch.rand(n, 3, *size, generator=generator)
        index, crops = torch.randint(0, 7 + n, (n,), generator=generator), sample_crops(n, 16, generator)
        stored, normalize = random_images(7 + n, *size), normalization((0.5,) * 3, (0.2,) * 3)
        yield {"warp": (images, coefficients), "step": (stored, index, crops, coefficients, *normalize)}


@pytest.mark.skipif(_C is None, reason="the extension is not built")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["warp", "step"])
def test_two_graphs_serve_every_batch_size_height_and_width(name, dynamic, gradient):
    function, place = {"warp": (projective_warp, 1), "step": (warp_batch, 3)}[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for arguments in calls_of_many_sizes():
        *arguments, gradients = *arguments[name], []
        for form in (compiled, function):
            arguments[place] = arguments[place].detach().clone().requires_grad_(gradient)
            result = form(*arguments)
            if gradient:
                result.square().sum().backward()
                gradients.append(arguments[place].grad)
        assert torch.equal(compiled(*arguments), function(*arguments))
        assert not gradient or torch.allclose(*gradients, rtol=1e-4, atol=1e-4 * gradients[1].abs().max().item())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:`isinstance.treespec", "ignore:.*LeafSpec")
def test_export_with_a_dynamic_batch(strict):
    class Step(torch.nn.Module):
        def forward(self, images, index, crops, coefficients):
            return projective_warp(warp_batch(images, index, crops, coefficients), coefficients)

    batch, stored = torch.export.Dim("batch", min=1, max=512), torch.export.Dim("stored", min=1)

    def arguments(m, n):
        generator = torch.Generator().manual_seed(n)
        index = torch.randint(0, m, (n,), generator=generator)
        return random_images(m), index, sample_crops(n, 32, generator), sample_coefficients(n, 32, generator)

    sizes = ({0: stored}, {0: batch}, {0: batch}, {0: batch})
    exported = torch.export.export(Step(), arguments(9, 5), dynamic_shapes=sizes, strict=strict).module()
    for m, n in ((1, 1), (9, 5), (20, 64)):
        assert torch.equal(exported(*arguments(m, n)), Step()(*arguments(m, n)))


# -------------------------------------------------------------------------------------------------- the transformations


def corners_of(size):
    height, width = size
    return torch.tensor([[0.0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64)


def apply_map(coefficients, points):
    """points: (N, P, 2) -> (N, P, 2), by the definition of the coefficients."""
    a, b, c, d, e, f, g, h = coefficients.double().unbind(-1)
    x, y = points.double().unbind(-1)
    column = [v[:, None] for v in (a, b, c, d, e, f, g, h)]
    a, b, c, d, e, f, g, h = column
    return torch.stack([a * x + b * y + c, d * x + e * y + f], -1) / (g * x + h * y + 1)[..., None]


def test_coefficients_solve_the_8_by_8_system():
    size = (24, 40)
    generator = torch.Generator().manual_seed(0)
    moved = corners_of(size) + 6 * torch.rand(50, 4, 2, generator=generator, dtype=torch.float64)
    rows = []
    for quadrilateral in moved:  # unknowns a..h: for every corner (x, y) -> (X, Y)
        matrix, right = [], []
        for (x, y), (X, Y) in zip(quadrilateral.tolist(), corners_of(size).tolist(), strict=True):
            matrix += [[x, y, 1, 0, 0, 0, -X * x, -X * y], [0, 0, 0, x, y, 1, -Y * x, -Y * y]]
            right += [X, Y]
        rows.append(np.linalg.solve(np.array(matrix), np.array(right)))
    assert np.allclose(coefficients_from_corners(moved, size).numpy(), np.array(rows), atol=1e-9)


def warp_by_matrix(image, matrix):
    """cv2.warpPerspective(image, matrix, flags=INTER_LINEAR), written out: the output at (x, y) is the image, whose
    pixels lie at whole numbers, at matrix^-1 (x, y, 1). NaN where a neighbour lies outside."""
    height, width = image.shape[1:]
    warped = np.full(image.shape, np.nan)
    for y in range(height):
        for x in range(width):
            u, v, w = np.linalg.inv(matrix) @ (x, y, 1)
            u, v = u / w, v / w
            left, top = math.floor(u), math.floor(v)
            if 0 <= left < width - 1 and 0 <= top < height - 1:
                right, down = u - left, v - top
                above, below = image[:, top, left : left + 2], image[:, top + 1, left : left + 2]
                row = above * (1 - down) + below * down  # (C, 2)
                warped[:, y, x] = row[:, 0] * (1 - right) + row[:, 1] * right
    return warped


def test_matrices_map_input_to_output_with_pixel_centres_at_whole_numbers():
    image = random_images(1, 10, 13, dtype=torch.float64)
    shift = torch.tensor([[1.0, 0, 3], [0, 1, 2], [0, 0, 1]])[None]
    shifted = projective_warp(image, coefficients_from_matrices(shift))
    assert torch.equal(shifted[..., 2:, 3:], image[..., :-2, :-3])
    double = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 1]])[None]  # the pixel at (0, 0) stays where it is
    doubled = projective_warp(image, coefficients_from_matrices(double))
    assert torch.equal(doubled[..., ::2, ::2], image[..., :5, :7])
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([[0.3, 0.3, 3], [0.3, 0.3, 3], [0.01, 0.01, 0.3]], dtype=torch.float64)
    matrices = torch.eye(3, dtype=torch.float64) + spread * torch.randn(30, 3, 3, generator=generator).double()
    warped = projective_warp(image.expand(30, -1, -1, -1), coefficients_from_matrices(matrices)).numpy()
    expected = np.stack([warp_by_matrix(image[0].numpy(), matrix) for matrix in matrices.numpy()])
    seen = ~np.isnan(expected)
    assert seen.mean() > 0.3 and np.abs(warped - expected)[seen].max() < 1e-9


def test_matrices_keep_their_type_and_gradient_and_what_is_no_map_is_refused():
    matrices = torch.eye(3).repeat(2, 1, 1)
    matrices[:, 2, 2] = 7  # a multiple is the same map
    coefficients = coefficients_from_matrices(matrices.requires_grad_())
    assert coefficients.dtype == torch.float32 and coefficients_from_matrices(matrices[:0]).shape == (0, 8)
    assert torch.allclose(coefficients[:, 0], torch.tensor(7.0))
    coefficients.sum().backward()
    assert matrices.grad.isfinite().all() and matrices.grad.abs().sum() > 0
    for wrong in (torch.eye(3), torch.ones(2, 8), torch.eye(3).long()[None], torch.ones(1, 2, 3)):
        with pytest.raises(ValueError, match=r"takes \(N, 3, 3\) floats"):
            coefficients_from_matrices(wrong)
    # The inverse of the last one maps the corner at (-0.5, -0.5), where pixels lie at whole numbers, to infinity.
    no_maps = [torch.zeros(3, 3), torch.ones(3, 3), torch.full((3, 3), math.nan), torch.diag(torch.tensor([1.0, 1, 0])),
               torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0.5]]).inverse()]
    for wrong in no_maps:
        with pytest.raises(ValueError, match="no inverse, or its inverse maps the corner"):
            coefficients_from_matrices(torch.stack([torch.eye(3).to(wrong), wrong]))


def test_sampled_transformations_have_the_stated_distribution():
    n = 40_000
    coefficients = draw(n, 32)
    assert coefficients.shape == (n, 8) and coefficients.dtype == torch.float32 and coefficients.isfinite().all()
    # Where do the corners go? Invert each map as a 3 x 3 matrix.
    matrices = torch.cat([coefficients.double(), torch.ones(n, 1, dtype=torch.float64)], 1).reshape(n, 3, 3).inverse()
    homogeneous = torch.cat([corners_of((32, 32)), torch.ones(4, 1, dtype=torch.float64)], 1) @ matrices.transpose(1, 2)
    moved = homogeneous[..., :2] / homogeneous[..., 2:]  # (n, 4, 2)
    # Averaged over the four corners, shifts are small beside the scaled square: its angle tells the rotation.
    top = moved[:, 1] - moved[:, 0] + moved[:, 2] - moved[:, 3]
    turns = (torch.atan2(top[:, 1], top[:, 0]) / (math.pi / 2)).round().long() % 4
    assert ((turns.bincount(minlength=4) - n / 4).abs() < 5 * math.sqrt(n * 3 / 16)).all()
    # Undo the rotation; each coordinate is then 16 +- 16 s plus its own integer shift.
    home = moved.gather(1, ((torch.arange(4) - turns[:, None]) % 4)[..., None].expand(n, 4, 2)) - 16
    signs = corners_of((32, 32)) / 16 - 1
    offsets = home * signs  # 16 s + sign * shift, s common to an image
    spread = offsets[:, 0, 0] - offsets[:, 2, 1]  # difference of two independent shifts: an integer in [-8, 8]
    assert (spread - spread.round()).abs().max() < 1e-3 and spread.abs().max() < 8.001
    assert abs(spread.var() - 2 * (81 - 1) / 12) < 0.3  # variance of an integer uniform on -4..4 is 20 / 3
    scale = offsets.mean((1, 2)) / 16  # mean of eight shifts adds a standard deviation of sqrt(20 / 3 / 8) / 16 = 0.057
    assert abs(scale.mean() - 1) < 0.002
    assert abs(scale.var() - (0.4**2 / 12 + 20 / 3 / 8 / 256)) < 3e-4
    shifts = offsets[:, 0, 0] - offsets[:, 0, 1]  # x against y of one corner: independent
    assert abs(shifts.var() - 40 / 3) < 0.3


def test_reference_errors_are_those_of_twenty_million_draws_and_of_the_best_predictors():
    errors = reference_errors()
    assert errors["constant_predictor"] == pytest.approx(4.106, rel=0.01)
    assert errors["rotation_only"] == pytest.approx(0.572, rel=0.01)
    for size in (96, (28, 40)):  # a size at which shifts are no whole pixels, and one that is not square
        assert reference_errors(size, 2**16) == pytest.approx(reference_errors(n=2**16), rel=1e-9)
    # By hand, from other draws: the rotation is the quarter that (a, b) of the target point to.
    target = transformation_target(draw(100_000, 32), 32).double()
    turns = (torch.atan2(target[:, 1], target[:, 0]) / (math.pi / 2)).round().long() % 4
    means = torch.stack([target[turns == k].mean(0) for k in range(4)])
    assert (target - target.mean(0)).square().sum(1).mean() == pytest.approx(errors["constant_predictor"], rel=0.02)
    assert (target - means[turns]).square().sum(1).mean() == pytest.approx(errors["rotation_only"], rel=0.02)


def test_the_outline_tells_no_more_than_the_mean_over_its_four_turns():
    """From other draws and by solving the eight equations: corners in the order of their angles, beginning at each."""
    _, corners = sample_corners(100_000, 32, torch.Generator().manual_seed(5))
    target = transformation_target(coefficients_from_corners(corners, 32), 32)
    x, y = (corners - corners.mean(1, keepdim=True)).unbind(-1)
    clockwise = corners.gather(1, torch.atan2(y, x).argsort(1)[..., None].expand(-1, -1, 2))
    u, v = torch.tensor([0.0, 32, 32, 0]).double(), torch.tensor([0.0, 0, 32, 32]).double()
    guesses = []
    for first in range(4):
        x, y = clockwise.roll(first, 1).unbind(-1)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        rows = [torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], -1),
                torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], -1)]
        solved = torch.linalg.solve(torch.cat(rows, 1), torch.cat([u, v]).expand(len(x), 8))
        guesses.append(transformation_target(solved, 32))
    error = (target - torch.stack(guesses).mean(0)).square().sum(1).mean()
    assert error == pytest.approx(reference_errors()["outline_only"], rel=0.02)
    assert error == pytest.approx(3.75, abs=0.06)  # of a heavy tail: two standard errors


def test_the_quarter_turns_are_those_of_the_corners():
    turns, corners = sample_corners(1000, 32, torch.Generator().manual_seed(0))
    top = corners[:, 1] - corners[:, 0] + corners[:, 2] - corners[:, 3]
    assert torch.equal((torch.atan2(top[:, 1], top[:, 0]) / (math.pi / 2)).round().long() % 4, turns)
    assert torch.equal(coefficients_from_corners(corners, 32).float(), draw(1000, 32))


@pytest.mark.parametrize("size", [16, 96, 28, (32, 64), (96, 48)])
def test_the_target_has_the_same_distribution_at_every_size(size):
    at_32 = transformation_target(draw(1000, 32), 32)
    assert torch.allclose(transformation_target(draw(1000, size), size), at_32, atol=2e-4)


def test_target_is_the_formula_at_32():
    coefficients = draw(10, 32)
    offset = torch.tensor([0, 0, 16.0, 0, 0, 16, 0, 0])
    divisor = torch.tensor([1, 1, 20, 1, 1, 20, 0.015, 0.015])
    assert torch.allclose(transformation_target(coefficients, 32), (coefficients - offset) / divisor)


def test_sampling_is_reproducible_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    assert torch.equal(draw(5, 32, seed=7), draw(5, 32, seed=7)) and not torch.equal(draw(5, 32, 7), draw(5, 32, 8))
    assert torch.equal(state, torch.random.get_rng_state())


# --------------------------------------------------------------------------------------------------------- the fallback


def test_without_the_extension_everything_still_works_and_says_so(monkeypatch, recwarn):
    monkeypatch.setattr("minter_warp.ops._C", None)
    monkeypatch.setattr("minter_warp.ops.why_not_compiled", "No module named 'minter_warp._C'")
    assert minter_warp.build_info() is None
    images, coefficients = random_images(4), draw(4, 32)
    for _ in range(2):
        assert torch.equal(projective_warp(images, coefficients), projective_warp_reference(images, coefficients))
        out = torch.empty_like(images)
        assert projective_warp(images, coefficients, out=out) is out
        assert torch.equal(out, projective_warp_reference(images, coefficients))
    arguments, out = (images, torch.tensor([1, 2]), sample_crops(2, 32), coefficients[:2]), torch.empty(2, 3, 32, 32)
    assert torch.equal(warp_batch(*arguments), warp_batch(*arguments, out=out)) and out.isfinite().all()
    out = torch.empty(2, 3, 32, 32, dtype=torch.uint8)
    expected = warp_batch(*arguments, fill=300.0).round().clamp(max=255)
    assert torch.equal(warp_batch(*arguments, fill=300.0, out=out), expected)
    said = [str(warning.message) for warning in recwarn]
    assert all("is not built" in message and "(No module named 'minter_warp._C')" in message for message in said)
    assert {warning.filename for warning in recwarn} == {__file__}  # Python shows it once for a line that calls
    with pytest.raises((RuntimeError, IndexError)):
        warp_batch(images, torch.tensor([-1]))  # refused as in the compiled form, not counted from the end


def test_a_build_without_cuda_leaves_the_gpu_to_the_reference(monkeypatch):
    monkeypatch.setattr("minter_warp.ops.CUDA_ARCHITECTURES", None)

    class OnGPU:
        is_cuda = True

    class OnCPU:
        is_cuda = False

    assert minter_warp.ops.compiled_for(OnCPU())
    with pytest.warns(UserWarning, match="built without CUDA"):
        assert not minter_warp.ops.compiled_for(OnGPU())


def test_the_build_says_what_it_holds():
    info = minter_warp.build_info()
    if os.environ.get("MINTER_SANITIZE") == "1":
        assert "/build/sanitized/" in _C.__file__
    assert info["compiler"] and info["torch"].startswith("2.")
    if torch.cuda.is_available():
        assert info["cuda_architectures"]
