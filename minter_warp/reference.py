"""The warp in plain PyTorch: what the tests compare with, and what does the work where nothing is compiled."""

import torch


def projective_warp_reference(images, coefficients, fill=128.0, window=None):
    """`projective_warp` with points in float64, on any device, differentiable in both modes any number of times.

    images, coefficients, fill: as for `projective_warp`. window: as for `warp_batch`. Where the denominator is 0
    no point is read: the value is the fill, and its gradients are 0.
    """
    n, channels, height, width = images.shape
    a, b, c, d, e, f, g, h = coefficients.double().reshape(n, 8, 1, 1).unbind(1)
    x = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5  # (W,)
    y = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5  # (H, 1)
    denominator = g * x + h * y + 1  # (N, H, W)
    horizon = denominator == 0  # no point is read there, and no gradient is NaN
    denominator = torch.where(horizon, 1.0, denominator)
    u, v = (a * x + b * y + c) / denominator, (d * x + e * y + f) / denominator
    whole = torch.tensor([[0, 0, height, width]], device=images.device)
    top, left, rows, columns = (whole if window is None else window).reshape(-1, 4, 1, 1).unbind(1)
    bottom, right = (top + rows).clamp(max=height), (left + columns).clamp(max=width)
    top, left = top.clamp(min=0), left.clamp(min=0)
    inside = (u >= left) & (u < right) & (v >= top) & (v < bottom) & ~horizon  # False for NaN
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
    """Shifted views with black (0) beyond the border, then flipped: (N, C, H, W), (N, 3) -> (N, C, H, W). crops: rows
    from `sample_crops`."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + crops[:, :1]  # (N, H)
    columns = torch.arange(width, device=images.device).expand(crops.shape[0], -1)
    columns = torch.where(crops[:, 2:] != 0, width - 1 - columns, columns) + crops[:, 1:2]  # (N, W)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    n = torch.arange(images.shape[0], device=images.device)[:, None, None]
    views = images.movedim(1, 3)[n, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
    return torch.where(inside[:, None], views.movedim(3, 1), torch.zeros((), dtype=images.dtype, device=images.device))


def warp_batch_reference(images, index, crops=None, coefficients=None, scale=None, shift=None, dtype=torch.float32,
                         fill=128.0, window=None):
    """`warp_batch`, one step after the other."""
    batch = images.index_select(0, index).float()
    batch = batch if crops is None else crop_and_flip_reference(batch, crops)
    batch = batch if coefficients is None else projective_warp_reference(batch, coefficients, fill, window)
    batch = batch if scale is None else batch * scale[:, None, None]
    batch = batch if shift is None else batch + shift[:, None, None]
    return batch.round().clamp(0, 255).to(dtype) if dtype == torch.uint8 else batch.to(dtype)
