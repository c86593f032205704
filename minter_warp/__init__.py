"""Batched random projective warps for PyTorch, on the CPU and on CUDA, with gradients and torch.compile.

    import minter_warp
    coefficients = minter_warp.sample_coefficients(len(images), 32)  # (N, 8)
    warped = minter_warp.projective_warp(images, coefficients)  # (N, 3, 32, 32), the type of images

`minter_warp.views` holds the transformations of STL. Without the compiled part, `minter_warp._C`, the PyTorch reference
does the work.
"""

from minter_warp.ops import build_info, projective_warp, warp_batch
from minter_warp.reference import crop_and_flip_reference, projective_warp_reference, warp_batch_reference
from minter_warp.sampling import (
    coefficients_from_corners,
    coefficients_from_matrices,
    normalization,
    reference_errors,
    sample_coefficients,
    sample_corners,
    sample_crops,
    transformation_target,
)
