"""The operator: what it takes, its fake kernels and its gradient. The kernels are in csrc/."""

import warnings
from pathlib import Path

import torch  # before the compiled part, which is linked to it

from minter_warp.reference import projective_warp_reference, warp_batch_reference

try:
    import minter_warp._C as _C  # registers torch.ops.minter.warp

    if Path(_C.__file__).parent != Path(__file__).parent:  # which an editable installation finds for a copied folder
        raise ImportError(f"{_C.__file__} belongs to another copy of minter_warp")
    why_not_compiled = None
except ImportError as error:
    _C, why_not_compiled = None, str(error)


def build_info():
    """How the compiled part was built: a dict of compiler, torch and cuda_architectures (None: without CUDA). Returns
    None where there is no compiled part."""
    return None if _C is None else _C.build_info()


CUDA_ARCHITECTURES = None if _C is None else _C.build_info()["cuda_architectures"]


def compiled_for(images):
    """Whether the compiled warp takes these images. Where it does not, a warning says why."""
    how = "`pip install --no-build-isolation -e .` in minTER's folder builds it"
    if _C is None:
        missing = f"the compiled warp is not built, the slower PyTorch reference is used ({why_not_compiled})"
    elif images.is_cuda and CUDA_ARCHITECTURES is None:
        missing = "the compiled warp is built without CUDA, the slower PyTorch reference is used on the GPU"
    else:
        return True
    if not torch.compiler.is_compiling():
        warnings.warn(f"{missing}; {how}", stacklevel=3)
    return False


def differentiated(*tensors):
    """Whether a derivative with respect to one of the tensors (or None) can be asked for, in either direction."""
    forwards = torch.autograd.forward_ad._current_level >= 0
    backwards = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return forwards or backwards


def check_out(out, shape, dtypes, inputs):
    """Raises TypeError or ValueError unless the result, of shape and one of dtypes, can be written into `out`."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out must be a tensor, not {type(out).__name__}")
    negative = not torch.compiler.is_compiling() and out.is_neg()  # which a compiled graph cannot ask
    fits = tuple(out.shape) == tuple(shape) and out.dtype in dtypes and out.device == inputs[0].device
    if not fits or not out.is_contiguous() or negative:
        types = " or ".join(map(str, dtypes))
        raise ValueError(f"out must be contiguous, {tuple(shape)} {types} on {inputs[0].device}, not "
                         f"{tuple(out.shape)} {out.dtype} on {out.device}{', a negative view' if negative else ''}")
    if differentiated(*inputs, out):
        raise ValueError("a warp into out has no gradient: omit out, or detach the tensors")


def projective_warp(images, coefficients, fill=128.0, out=None):
    """Warps each image by its own projective map, as PIL's Image.transform(PERSPECTIVE, BILINEAR, fillcolor) does.

    images: (N, C, H, W), uint8 or float32, with any strides. float64 works too; float16 and bfloat16 are computed in
    float32. coefficients: (N, 8) floats (a, b, c, d, e, f, g, h), the map from output to input. The output pixel with
    its centre at (x, y) reads the point u = (a x + b y + c) / (g x + h y + 1), v = (d x + e y + f) / (g x + h y + 1).
    All four are in pixels, and pixel centres lie at + 0.5. fill: value outside the image, by default the grey of images
    in 0..255; those in [0, 1] want 0.5. Nothing is blended with it: the outermost pixels reach to the edge, as PIL's do
    (OpenCV and kornia blend the last half pixel). out: contiguous tensor that the result is written into, or None.

    Returns (N, C, H, W) of the type of images, contiguous. Differentiable once with respect to float images and
    coefficients, unless out is given: backwards, and under torch.func.grad, vjp, jacrev and vmap (one call an item).
    Forward-mode and second derivatives raise; `projective_warp_reference` has them.

    float64 decides which pixels are filled. Elsewhere points are float32 for images of up to 256 pixels a side, and
    uint8 images blend in fixed point, in steps of 1 / 32768 pixel. The CPU stays within 0.02 grey levels of the float64
    reference (0.017 at worst, in a search over maps of a chequerboard); on CUDA the tests allow 0.03. Raises ValueError
    for shapes and devices that do not fit, TypeError for types, RuntimeError where memory does not suffice.
    """
    if not isinstance(images, torch.Tensor) or not isinstance(coefficients, torch.Tensor):
        raise TypeError(f"projective_warp takes tensors, not {type(images).__name__} and {type(coefficients).__name__}")
    if images.dim() != 4 or coefficients.shape != (images.shape[0], 8):
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

    images: the data set, (M, C, H, W) uint8 or float32. index: (N,) int64, which images. crops: (N, 3) int64 from
    `sample_crops`, or None. coefficients: (N, 8) as for `projective_warp`, or None for no warp. scale, shift: (C,)
    float32 from `normalization`: output = value * scale + shift. dtype: float32 or bfloat16, or uint8 (rounded) without
    scale and shift. fill: value outside the image, before scale and shift. window: (N, 4) int64 rows (top, left,
    height, width), what the warp sees of each cropped and flipped image; coordinates stay those of the image. None: all
    of it. out: as for `projective_warp`; its type replaces dtype.

    Returns (N, C, H, W) of dtype. Raises ValueError, TypeError and RuntimeError for arguments that do not fit. An index
    out of range raises on the CPU. On CUDA the compiled form would have to wait for it, so that image is NaN.
    """
    if window is not None and coefficients is None:
        raise ValueError("warp_batch takes a window with coefficients only")
    if out is not None:
        dtypes = dict.fromkeys((torch.float32, torch.bfloat16, images.dtype))
        check_out(out, (index.shape[0], *images.shape[1:]), tuple(dtypes), (images, coefficients, scale, shift))
        dtype = out.dtype
    if coefficients is not None:
        double = coefficients.dtype == torch.float64
        coefficients = (coefficients if double else coefficients.float()).contiguous()
    if compiled_for(images):
        return _compiled_warp(images, coefficients, index, crops, window, scale, shift, fill, dtype, out)
    batch = warp_batch_reference(images, index, crops, coefficients, scale, shift, dtype, fill, window)
    return batch if out is None else out.copy_(batch)


def _compiled_warp(images, coefficients, index, crops, window, scale, shift, fill, dtype, out):
    if out is None:
        warp = Warp.apply if differentiated(images, coefficients, scale, shift) else torch.ops.minter.warp
        return warp(images, coefficients, index, crops, window, scale, shift, fill, dtype)
    torch.ops.minter.warp_out(images, coefficients, index, crops, window, scale, shift, fill, out)
    torch.autograd.graph.increment_version(out)  # autograd refuses a gradient that needs the former values
    return out


if _C is not None:

    def _check_devices(images, *others):
        if any(other is not None and other.device != images.device for other in others):
            raise ValueError("minter::warp: all tensors must be on one device")

    @torch.library.register_fake("minter::warp")
    def _(images, coefficients, index, crop, window, scale, shift, fill, dtype):
        _check_devices(images, coefficients, index, crop, window, scale, shift)
        batch = images.shape[0] if index is None else index.shape[0]  # not len(), which would fix a symbolic size
        return images.new_empty((batch, *images.shape[1:]), dtype=dtype)

    @torch.library.register_fake("minter::warp_out")
    def _(images, coefficients, index, crop, window, scale, shift, fill, out):
        _check_devices(images, coefficients, index, crop, window, scale, shift, out)

    @torch.library.register_fake("minter::warp_backward")
    def _(grad, images, coefficients, index, crop, window, scale, images_needed, coefficients_needed):
        _check_devices(images, grad, coefficients, index, crop, window, scale)
        return (images.new_empty(grad.shape if images_needed else (0,)),
                images.new_empty((grad.shape[0], 8) if coefficients_needed else (0,), dtype=torch.float64))

    def _save_for_backward(ctx, inputs, output):
        images, coefficients, index, crop, window, scale, shift, _fill, _dtype = inputs
        if any(tensor is not None and tensor.requires_grad for tensor in (scale, shift)):
            raise ValueError("minter::warp: scale and shift have no gradient; detach them")
        ctx.save_for_backward(images, coefficients, index, crop, window, scale)

    def _warp_backward(ctx, grad):
        images, coefficients, index, crop, window, scale = ctx.saved_tensors
        real = torch.float64 if images.dtype == torch.float64 else torch.float32
        need_images, need_coefficients = ctx.needs_input_grad[:2]
        grad_images, grad_coefficients = WarpBackward.apply(
            grad.to(real).contiguous(), images, coefficients, index, crop, window, scale, need_images,
            need_coefficients)
        return (grad_images if need_images else None,
                grad_coefficients.to(coefficients.dtype) if need_coefficients else None,
                None, None, None, None, None, None, None)

    def _no_second_derivative(ctx, *grads):
        raise RuntimeError("the compiled warp has no second derivative; use projective_warp_reference for one")

    torch.library.register_autograd("minter::warp", _warp_backward, setup_context=_save_for_backward)
    torch.library.register_autograd("minter::warp_backward", _no_second_derivative)

    class Warp(torch.autograd.Function):
        """The operator and its gradient once more: torch.func refuses, and forward mode ignores, those above."""

        generate_vmap_rule = True

        @staticmethod
        def forward(images, coefficients, index, crop, window, scale, shift, fill, dtype):
            return torch.ops.minter.warp(images, coefficients, index, crop, window, scale, shift, fill, dtype)

        setup_context = staticmethod(_save_for_backward)
        backward = staticmethod(_warp_backward)

    class WarpBackward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(grad, images, coefficients, index, crop, window, scale, images_needed, coefficients_needed):
            return torch.ops.minter.warp_backward(
                grad, images, coefficients, index, crop, window, scale, images_needed, coefficients_needed)

        setup_context = staticmethod(lambda ctx, inputs, output: None)
        backward = staticmethod(_no_second_derivative)
