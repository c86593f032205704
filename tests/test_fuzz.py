"""The compiled warp under generated calls: each gives the reference's result, or a clear exception, and never a crash.

`make test` tries some hundreds of calls, the same each time; `make fuzz` 60,000, others each time, and prints
how to repeat one that fails; `make sanitize` some thousands with the C++ code under sanitizers.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from minter_warp import (
    crop_and_flip_reference,
    projective_warp,
    projective_warp_reference,
    sample_coefficients,
    warp_batch,
)
from minter_warp.ops import _C, CUDA_ARCHITECTURES

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")
shared = {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
settings.register_profile("test", derandomize=True, database=None, max_examples=250, **shared)
settings.register_profile("fuzz", max_examples=10_000, **shared)
settings.register_profile("sanitize", max_examples=600, **shared)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and CUDA_ARCHITECTURES else [])
CLEAR = (ValueError, TypeError, RuntimeError)  # NotImplementedError is a RuntimeError
IDENTITY = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0])
FAR = 2**40  # beyond this a window is cut, in C++ as below, so that no sum overflows

sides = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 85, 128, 129, 255, 256, 257]))
small_sides = st.integers(1, 12)
steps = st.one_of(st.integers(-20, 20), st.sampled_from([2**31, -(2**31), 2**62, -(2**63), 2**63 - 1]))
numbers = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")]),
                    st.floats(-2, 2, width=32), st.floats(width=32))


def lay_out(images, layout):
    """The same values in another layout; the expanded and overlapping ones have values of their own."""
    n, channels, height, width = images.shape
    if layout == "channels_last":
        return images.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return images.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "cut out":
        return torch.nn.functional.pad(images, (3, 2, 1, 4))[:, :, 1 : 1 + height, 3 : 3 + width]
    if layout == "every second":
        return images.repeat_interleave(2, 3)[..., ::2]
    if layout == "one image":
        return images[:1].expand(images.shape)
    if layout == "one channel" and channels:
        return images[:, :1].expand(images.shape)
    if layout == "one pixel" and images.numel():
        return images[:1, :1, :1, :1].expand(images.shape)
    if layout == "overlapping" and images.numel():
        line = (torch.arange(n + channels + 2 * height + width) % 256).to(images)
        return line.as_strided(images.shape, (1, 1, 2, 1))
    if layout == "far strides":  # where there is one of something, the stride says nothing
        strides = [2**50 if size == 1 else stride for size, stride in zip(images.shape, images.stride(), strict=True)]
        return images.as_strided(images.shape, strides)
    if layout == "negative" and images.is_floating_point():
        return torch._neg_view(-images)
    return images


LAYOUTS = ["plain", "plain", "channels_last", "transposed", "cut out", "every second", "one image", "one channel",
           "one pixel", "overlapping", "far strides", "negative"]
ARGUMENTS = ("images", "coefficients", "index", "crop", "window", "scale", "shift", "fill", "dtype")


def rows_of(strategy, n, columns):
    return st.lists(st.lists(strategy, min_size=columns, max_size=columns), min_size=n, max_size=n)


@st.composite
def calls(draw, sides=sides, gentle=False):
    """Arguments of torch.ops.minter.warp that it is to accept. gentle: nothing infinite, not a number or far away."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 4)), draw(st.integers(1 if gentle else 0, 7)), draw(sides), draw(sides)
    dtype = draw(st.sampled_from([torch.float32, torch.float64] if gentle else
                                 [torch.uint8, torch.uint8, torch.float32, torch.float64]))
    values = torch.randint(0, 256, shape, generator=generator).to(dtype)
    images = lay_out(values, draw(st.sampled_from(LAYOUTS)))
    batch = draw(st.integers(0, 5))
    index = torch.tensor(draw(st.lists(st.integers(0, len(images) - 1), min_size=batch, max_size=batch)),
                         dtype=torch.int64) if draw(st.booleans()) else None
    n, size = len(images) if index is None else batch, (max(shape[2], 1), max(shape[3], 1))

    kind = draw(st.sampled_from(["drawn", "wild"] if gentle else ["drawn", "wild", "steep", "whole", "any", "none"]))
    coefficients = sample_coefficients(n, size, generator)
    if kind == "wild":
        spread = torch.tensor([0.3, 0.3, 3, 0.3, 0.3, 3, 0.05, 0.05])
        coefficients += spread * torch.randn(n, 8, generator=generator)
    elif kind == "steep":  # up to a million pixels from one to the next, and the centre of one of them lies inside
        slopes = 10 ** (6 * torch.rand(n, 1, generator=generator)) * torch.randn(n, 4, generator=generator)
        x, y, u, v = (side * torch.rand(n, generator=generator) for side in (size[1], size[0], size[1], size[0]))
        a, b, d, e = slopes.unbind(1)
        x, y = x.floor() + 0.5, y.floor() + 0.5
        coefficients = torch.stack([a, b, u - a * x - b * y, d, e, v - d * x - e * y, 0 * u, 0 * u], 1)
    elif kind == "whole":  # many points on the border itself
        coefficients = coefficients.round()
    elif kind == "any":
        coefficients = torch.tensor(draw(rows_of(numbers, n, 8))).reshape(n, 8)
    coefficients = None if kind == "none" else coefficients.to(draw(st.sampled_from([torch.float32, torch.float64])))

    def whole_numbers(columns):
        step = st.integers(-5, 12) if gentle else steps
        rows = draw(rows_of(step, n, columns)) if draw(st.booleans()) else None
        return None if rows is None else torch.tensor(rows, dtype=torch.int64).reshape(n, columns)

    crop, window = whole_numbers(3), whole_numbers(4)
    outputs = {torch.uint8: [torch.uint8, torch.float32, torch.bfloat16], torch.float64: [torch.float64],
               torch.float32: [torch.float32] if gentle else [torch.float32, torch.bfloat16]}
    output = draw(st.sampled_from(outputs[dtype]))
    scale = shift = None
    if output != torch.uint8:
        scale, shift = (torch.rand(shape[1], generator=generator) + 0.5 if draw(st.booleans()) else None for _ in "ab")
    fill = draw(st.floats(-300, 300, width=32) if gentle else numbers)
    return dict(zip(ARGUMENTS, (images, coefficients, index, crop, window, scale, shift, fill, output), strict=True))


def reference(images, coefficients, index, crop, window, scale, shift, fill, dtype):
    """The same in PyTorch, in float32 or float64."""
    batch = images if index is None else images[index]
    if batch.numel() == 0:
        return batch.new_empty(batch.shape, dtype=dtype)
    batch = batch if batch.dtype == torch.float64 else batch.float()
    batch = batch if crop is None else crop_and_flip_reference(batch, crop)
    coefficients = IDENTITY.to(batch.device).expand(len(batch), 8) if coefficients is None else coefficients
    batch = projective_warp_reference(batch, coefficients, fill, None if window is None else window.clamp(-FAR, FAR))
    if dtype == torch.uint8:
        return torch.where(batch.isnan(), 0.0, batch).round().clamp(0, 255).to(dtype)
    batch = batch if scale is None else batch * scale[:, None, None]
    batch = batch if shift is None else batch + shift[:, None, None]
    return batch.to(dtype)


def on(device, call):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def same(ours, expected, tolerance):
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return False
    if ours.dtype == torch.uint8:
        return not ours.numel() or (ours.int() - expected.int()).abs().max() <= 1
    relative = 2**-7 if ours.dtype == torch.bfloat16 else 1e-6
    return torch.allclose(ours, expected, rtol=relative, atol=tolerance, equal_nan=True)


def run_call(call, through):
    """Through minter_warp's functions where they can say what the call says, else through the operator. out: into a
    tensor that is there already."""
    if through == "out":
        count = len(call["images"] if call["index"] is None else call["index"])
        out = torch.full((count, *call["images"].shape[1:]), 77, dtype=call["dtype"], device=call["images"].device)
        arguments = {name: value for name, value in call.items() if name != "dtype"}
        torch.ops.minter.warp_out(*arguments.values(), out)
        return out
    plain = all(call[name] is None for name in ("index", "crop", "window", "scale", "shift"))
    if through == "function" and plain and call["coefficients"] is not None and call["dtype"] == call["images"].dtype:
        return projective_warp(call["images"], call["coefficients"], call["fill"])
    windowless = call["window"] is None or call["coefficients"] is not None
    if through == "function" and call["index"] is not None and windowless:
        return warp_batch(call["images"], call["index"], call["crop"], call["coefficients"], call["scale"],
                          call["shift"], call["dtype"], call["fill"], call["window"])
    return torch.ops.minter.warp(*call.values())


@given(calls(), st.sampled_from(["operator", "function", "out"]), st.sampled_from(DEVICES))
def test_a_valid_call_gives_the_references_result(call, through, device):
    before = call["images"].clone()
    result = run_call(on(device, call), through)
    # In grey levels, as documented; on the CPU half of that up to 128 pixels a side (points are float32), but for uint8
    # images, which are blended along a row by 2^-15 of a pixel, rounded.
    exact = {"cpu": 0.02, "cuda": 0.03}[device]
    if device == "cpu" and max(call["images"].shape[2:]) <= 128:
        exact = 0.01 + (255 / 2**16 if call["images"].dtype == torch.uint8 else 0)
    exact *= 1 if call["scale"] is None else max([1, *call["scale"].tolist()])
    tolerance = 1e-9 if call["images"].dtype == torch.float64 else exact
    assert same(result.cpu(), reference(**call), tolerance) and result.is_contiguous()
    assert torch.equal(call["images"], before)


# --------------------------------------------------------------------------------------------------------- gradients


def off_the_kinks(call):
    """No point within a thousandth of a pixel of where bilinear interpolation has a kink, and its gradient a jump."""
    height, width = call["images"].shape[2:]
    a, b, c, d, e, f, g, h = call["coefficients"].detach().double()[:, :, None, None].unbind(1)
    x, y = torch.arange(width) + 0.5, (torch.arange(height) + 0.5)[:, None]
    w = g * x + h * y + 1
    places = torch.stack([(a * x + b * y + c) / w, (d * x + e * y + f) / w]) - 0.5
    limit = torch.tensor([width, height])[:, None, None, None]
    near = (places - places.round()).abs() < 1e-3
    return not (near & (places > -1) & (places < limit)).any() and bool(w.abs().min() > 1e-2)


@given(calls(small_sides, gentle=True), st.sampled_from([("images",), ("coefficients",), ("images", "coefficients")]),
       st.integers(0, 2**32 - 1), st.sampled_from(DEVICES))
def test_gradients_are_the_references(call, wanted, seed, device):
    assume(len(call["coefficients"]) > 0 and off_the_kinks(call))
    if call["index"] is not None:
        wanted = ("coefficients",)
    gradients, call = [], on(device, call)
    for form in (torch.ops.minter.warp, reference):
        inputs = {name: call[name].detach().clone().requires_grad_() for name in wanted}
        output = form(*{**call, **inputs}.values())
        weights = torch.rand(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)
        gradients.append(torch.autograd.grad((output * weights).sum(), list(inputs.values())))
    single = call["images"].dtype == torch.float32 or call["coefficients"].dtype == torch.float32
    for ours, expected in zip(*gradients, strict=True):
        largest = expected.abs().max().clamp(min=1).item()
        assert same(ours, expected, (1e-3 if single else 1e-9) * largest), (ours - expected).abs().max()


@given(calls(small_sides), st.booleans(), st.booleans())
def test_gradients_of_anything_do_not_crash(call, images_too, coefficients_too):
    images, real = call["images"], torch.float64 if call["images"].dtype == torch.float64 else torch.float32
    images_too = images_too and call["index"] is None and images.is_floating_point()
    n = len(images) if call["index"] is None else len(call["index"])
    grad = torch.ones(n, *images.shape[1:], dtype=real)
    given_ = [call[name] for name in ("images", "coefficients", "index", "crop", "window", "scale")]
    into_images, into_coefficients = torch.ops.minter.warp_backward(grad, *given_, images_too, coefficients_too)
    assert into_images.shape == (grad.shape if images_too else (0,))
    assert into_coefficients.shape == ((n, 8) if coefficients_too else (0,))
    if images_too:  # each pixel hands its weight, scaled by 1.5 at most, to what it was made of, and makes none
        assert (into_images >= -1e-6).all() and into_images.sum() <= 1.501 * grad.sum()


# -------------------------------------------------------------------------------------------------- what is refused


def misaligned(tensor):
    size = max(1, tensor.numel()) * tensor.element_size()
    raw = torch.frombuffer(bytearray(size + 1), dtype=tensor.dtype, offset=1, count=max(1, tensor.numel()))
    return raw[: tensor.numel()].reshape(tensor.shape)


def not_contiguous(tensor):
    tensor = torch.cat([tensor, tensor]) if len(tensor) == 1 else tensor  # one element is contiguous anyhow
    return torch.stack([tensor, tensor], -1)[..., 0]


SPOILED = [  # argument, what is done to it
    ("images", lambda t: t[0]), ("images", lambda t: t[None]), ("images", lambda t: t.sum()),
    ("images", lambda t: t.long()), ("images", lambda t: t.half()), ("images", lambda t: t > 0),
    ("images", lambda t: t.to(torch.complex64)), ("images", lambda t: t.contiguous().to_sparse()),
    ("images", lambda t: None), ("images", lambda t: [1.0]), ("images", lambda t: t.to("meta")),
    ("images", lambda t: misaligned(t) if t.dtype != torch.uint8 else None),
    ("coefficients", lambda t: t[:, :7]), ("coefficients", lambda t: torch.cat([t, t])),
    ("coefficients", lambda t: t[None]), ("coefficients", lambda t: t[0]), ("coefficients", lambda t: t.long()),
    ("coefficients", lambda t: t.half()), ("coefficients", lambda t: t.to(torch.complex64)),
    ("coefficients", not_contiguous), ("coefficients", misaligned), ("coefficients", lambda t: t.to("meta")),
    ("coefficients", lambda t: t.to_sparse()), ("coefficients", lambda t: 1.0),
    ("index", lambda t: t[None]), ("index", lambda t: t[0]), ("index", lambda t: t.int()), ("index", lambda t: t * 1.0),
    ("index", not_contiguous), ("index", misaligned), ("index", lambda t: t.to("meta")), ("index", lambda t: t + 4),
    ("index", lambda t: t - 4), ("index", lambda t: t + 2**62), ("index", lambda t: torch.cat([t, t])),
    *((name, spoil) for name in ("crop", "window") for spoil in (
        lambda t: t[:, :2], lambda t: torch.cat([t, t]), lambda t: t[0], lambda t: t.int(), lambda t: t * 1.0,
        not_contiguous, misaligned, lambda t: t.to("meta"))),
    *((name, spoil) for name in ("scale", "shift") for spoil in (
        lambda t: torch.cat([t, t]), lambda t: t[None], lambda t: t.sum(), lambda t: t.double(), lambda t: t.long(),
        not_contiguous, misaligned, lambda t: t.to("meta"), lambda t: t.clone().requires_grad_())),
    ("dtype", lambda t: torch.int64), ("dtype", lambda t: torch.float16), ("dtype", lambda t: torch.complex64),
    ("dtype", lambda t: torch.bool), ("dtype", lambda t: None), ("fill", lambda t: None),
    ("fill", lambda t: "grey"), ("fill", lambda t: [1.0, 2.0, 3.0]),
    *((name, lambda t: t.cuda()) for name in ARGUMENTS[:7] if torch.cuda.is_available()),
]


@st.composite
def full_calls(draw):
    """Calls with a value for every argument, of two images and more, so that each can be spoiled."""
    call = draw(calls(small_sides, gentle=True))
    channels = call["images"].shape[1]
    n, generator = draw(st.integers(2, 4)), torch.Generator().manual_seed(0)
    call["images"] = torch.rand(4, *call["images"].shape[1:], generator=generator).to(call["dtype"])
    call["coefficients"] = sample_coefficients(n, (9, 9), generator)
    call["index"] = torch.arange(n)
    call["crop"], call["window"] = torch.zeros(n, 3, dtype=torch.int64), torch.ones(n, 4, dtype=torch.int64)
    call["scale"], call["shift"] = torch.ones(channels), torch.zeros(channels)
    return call


def refused(operator, *arguments):
    with pytest.raises(CLEAR) as problem:
        operator(*arguments)
    assert "minter::warp" in str(problem.value) and "INTERNAL ASSERT" not in str(problem.value)


@given(full_calls(), st.sampled_from(SPOILED))
def test_a_spoiled_call_gets_a_clear_exception(call, spoiled):
    torch.ops.minter.warp(*call.values())  # as it is it would do
    name, spoil = spoiled
    refused(torch.ops.minter.warp, *{**call, name: spoil(call[name])}.values())


SPOILED_GRADIENTS = [
    lambda t: t[:-1], lambda t: t[0], lambda t: t[..., :-1], lambda t: t.half(), lambda t: t.long(), not_contiguous,
    lambda t: t.double() if t.dtype == torch.float32 else t.float(), lambda t: None, lambda t: t.to("meta"),
    lambda t: t.to_sparse(), lambda t: torch.cat([t, t]), misaligned,
]


@given(full_calls(), st.one_of(st.sampled_from(SPOILED), st.sampled_from(SPOILED_GRADIENTS)), st.booleans())
def test_a_spoiled_backward_call_gets_a_clear_exception(call, spoiled, coefficients_too):
    n, images = len(call["index"]), call["images"]
    call = {"grad": images[:n].clone(), **{name: call[name] for name in ARGUMENTS[:6]}}
    name, spoil = spoiled if isinstance(spoiled, tuple) else ("grad", spoiled)
    assume(name in call)
    torch.ops.minter.warp_backward(*call.values(), False, coefficients_too)
    refused(torch.ops.minter.warp_backward, *call.values(), True, coefficients_too)  # taken by index
    bad = spoil(call[name])
    assume(not (isinstance(bad, torch.Tensor) and bad.requires_grad))  # a gradient that nobody will ask for
    refused(torch.ops.minter.warp_backward, *{**call, name: bad}.values(), False, coefficients_too)


giants = st.one_of(st.sampled_from([0, 1, 2, 3]), st.integers(4, 50).map(lambda power: 2**power))


@given(st.tuples(giants, giants, giants, giants), st.sampled_from([torch.uint8, torch.float32, torch.float64]),
       st.booleans())
def test_astronomic_sizes_are_refused_or_empty(shape, dtype, with_coefficients):
    """Expanded from one element: what they would take is to be neither allocated nor walked over."""
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    assume((elements == 0 or elements > 2**50) and not (with_coefficients and shape[0] > 1000))
    try:
        images = torch.zeros(1, dtype=dtype).expand(*(max(1, size) for size in shape))
        images = images[tuple(slice(0, size) for size in shape)]
    except RuntimeError:  # torch itself makes no tensor of so many elements
        assume(False)
    coefficients = IDENTITY.repeat(shape[0], 1) if with_coefficients else None
    real = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.zeros(1, dtype=real).expand(images.shape)
    backward = grad, images, coefficients, None, None, None, None, dtype != torch.uint8, with_coefficients
    if elements:
        refused(torch.ops.minter.warp, images, coefficients, None, None, None, None, None, 0.0, dtype)
        refused(torch.ops.minter.warp_backward, *backward)
    else:
        output = torch.ops.minter.warp(images, coefficients, None, None, None, None, None, 0.0, dtype)
        assert output.shape == shape
        torch.ops.minter.warp_backward(*backward)


def test_functions_name_what_is_wrong():
    images, coefficients = torch.zeros(2, 3, 4, 4), IDENTITY.repeat(2, 1)
    for bad in ((None, coefficients), (images.numpy(), coefficients), (images, [1.0] * 8), (images, None)):
        with pytest.raises(TypeError, match="projective_warp takes tensors"):
            projective_warp(*bad)
    with pytest.raises(ValueError, match="are on cpu and coefficients on meta"):
        projective_warp(images, coefficients.to("meta"))
    with pytest.raises(ValueError, match="one device"):
        warp_batch(images, torch.tensor([0]).to("meta"))
    assert projective_warp(images.to("meta"), coefficients.to("meta")).shape == images.shape
    with pytest.raises(ValueError, match="negative"):  # numpy's negative strides never become a tensor
        torch.from_numpy(images.numpy()[::-1])
