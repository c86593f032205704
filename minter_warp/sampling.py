"""The projective family of transformations: drawn at random, as coefficients for the warp and as regression targets."""

import functools

import torch


def coefficients_from_corners(corners, size):
    """The coefficients of the map that moves an image's corners to `corners`.

    corners: (N, 4, 2) float64, (x, y) in pixels, where the top left, top right, bottom right and bottom left corner of
    the image go. size: side in pixels, or (height, width). Returns (N, 8) float64 for `projective_warp`: the map from
    output to input. Closed form: the map of the unit square to a quadrilateral (Heckbert 1989, section 2.2.3), inverted
    by its adjugate. Three corners on one line give infinities or NaN.
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


def coefficients_from_matrices(matrices):
    """Matrices of cv2.warpPerspective and kornia.geometry.warp_perspective -> coefficients for `projective_warp`.

    matrices: (N, 3, 3) floats. They map input to output, (x, y, 1) to a multiple of (x', y', 1), in pixels with centres
    at whole numbers. Returns (N, 8) of their type: the map from output to input, with centres at + 0.5.

    The warped images are equal but for the outline: `projective_warp` does not blend it with what is outside.

    Raises ValueError for another shape or type, for a matrix without an inverse, and for one whose inverse maps the
    output's corner (0, 0) to infinity: coefficients have 1 there, not 0.
    """
    if matrices.dim() != 3 or matrices.shape[1:] != (3, 3) or not matrices.is_floating_point():
        raise ValueError(f"coefficients_from_matrices takes (N, 3, 3) floats, not {tuple(matrices.shape)} "
                         f"{matrices.dtype}")
    centre = torch.eye(3, dtype=torch.float64, device=matrices.device)
    centre[:2, 2] = 0.5  # whole-number centres to + 0.5
    forward = centre @ matrices.double() @ centre.inverse()
    inverse, _ = torch.linalg.inv_ex(forward)
    last, length = inverse[:, 2:, 2:], inverse.norm(dim=(1, 2))
    rounding = 1e-12  # the inverse of a singular matrix, and what would be 0 in it, are this but for rounding
    if not ((forward.norm(dim=(1, 2)) * length < 1 / rounding) & (last.abs().flatten() > rounding * length)).all():
        raise ValueError("a matrix has no inverse, or its inverse maps the corner (0, 0) to infinity")
    return (inverse / last).flatten(1)[:, :8].to(matrices.dtype)


def sample_corners(n, size, generator=None, family="projective"):
    """Where n random projective transformations move the corners of an image, drawn as AVT and VTE draw them.
    Everything draws from here: training, `reference_errors`, equivariance.py. Another family goes here.

    The corners are scaled about the centre by U(0.8, 1.2) and rotated by 0, 90, 180 or 270 degrees. Each is then
    shifted on either axis by an integer in [-4, 4], in pixels of a 32-pixel image: shifts grow with the image. The
    centre is size / 2 (AVT's code adds half a pixel).

    size: side in pixels, or (height, width). generator: everything is drawn with it, on its device; None for the
    default one. family: projective, or a part of it alone: scale; translation, all corners alike; rotation, the four
    turns one after the other, nothing of which is random. Returns quarter_turns (n,) int64, 0 to 3, and corners (n, 4,
    2) float64, (x, y) in pixels, for `coefficients_from_corners`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    draw = {"generator": generator, "device": generator.device if generator is not None else "cpu"}
    quarter_turns = torch.randint(0, 4, (n, 1), **draw)
    scale = 0.8 + 0.4 * torch.rand(n, 1, 1, dtype=torch.float64, **draw)
    shift = torch.randint(-4, 5, (n, 4, 2), **draw)
    if family != "projective":
        turns = torch.arange(n, device=scale.device)[:, None] % 4
        quarter_turns = turns if family == "rotation" else torch.zeros_like(turns)
        scale = scale if family == "scale" else torch.ones_like(scale)
        shift = shift[:, :1] if family == "translation" else torch.zeros_like(shift)

    corner = torch.arange(4, device=scale.device)  # top left, top right, bottom right, bottom left
    right, down = (corner == 1) | (corner == 2), corner >= 2
    unit = (torch.stack([right, down], -1).to(scale) - 0.5) * scale + 0.5  # (n, 4, 2), the image being the unit square
    unit = unit.gather(1, ((corner + quarter_turns) % 4)[..., None].expand(n, 4, 2)) + shift / 32
    return quarter_turns[:, 0], torch.stack([unit[..., 0] * width, unit[..., 1] * height], -1)


def sample_coefficients(n, size, generator=None):
    """The coefficients of n random transformations, drawn by `sample_corners`: (n, 8) float32 for `projective_warp`, on
    the generator's device. size: side in pixels, or (height, width)."""
    _, corners = sample_corners(n, size, generator)
    return coefficients_from_corners(corners, size).float()


def transformation_target(coefficients, size):
    """What the decoders regress: the coefficients, centred and scaled, (N, 8) -> (N, 8). At 32 x 32 the divisors are
    AVT's. At other sizes they scale with the image, so that the targets have the same distribution.

    size: side in pixels, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    a, b, c, d, e, f, g, h = coefficients.unbind(-1)
    c, f = (c - width / 2) / (20 * width / 32), (f - height / 2) / (20 * height / 32)
    g, h = g / (0.015 * 32 / width), h / (0.015 * 32 / height)
    return torch.stack([a, b * height / width, c, d * width / height, e, f, g, h], -1)


def sample_crops(n, size, generator=None):
    """torchvision's RandomCrop(size, padding=size / 8) and RandomHorizontalFlip: (n, 3) int64 for `warp_batch`, on the
    generator's device. A row is (pixels down, pixels right, flip 0 or 1); black lies beyond the border. size: side in
    pixels."""
    draw = {"generator": generator, "device": generator.device if generator is not None else "cpu"}
    shift = torch.randint(-(size // 8), size // 8 + 1, (n, 2), **draw)
    return torch.cat([shift, torch.randint(0, 2, (n, 1), **draw)], 1)


def normalization(mean, std, device="cpu"):
    """(scale, shift) for `warp_batch`, which map grey levels 0..255 to (value / 255 - mean) / std.

    mean, std: C numbers each, of images in [0, 1]. Returns two (C,) float32 tensors on device.
    """
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


@functools.cache
def reference_errors(size=32, n=2**19):
    """The transformation's squared error, summed over the 8 targets, for three predictors that have learned little.

    constant_predictor gives the mean of all targets. outline_only knows the four corners, but not which of them was the
    top left one: it gives the mean over the four turns, which are equally likely. rotation_only knows the rotation, and
    gives the mean of the targets that have it. size: side in pixels, or (height, width). n: number of draws, always the
    same ones; a quarter of them for outline_only. Returns a dict of three floats.
    """
    quarter_turns, corners = sample_corners(n, size, torch.Generator().manual_seed(0))
    t = transformation_target(coefficients_from_corners(corners, size), size)  # (n, 8) float64

    def spread(rows):
        return (rows - rows.mean(0)).square().sum().item()

    turned = torch.cat([corners[: n // 4].roll(turns, 1) for turns in range(4)])
    turned = transformation_target(coefficients_from_corners(turned, size), size).unflatten(0, (4, -1))
    return {"constant_predictor": spread(t) / n, "outline_only": spread(turned) / (n // 4 * 4),
            "rotation_only": sum(spread(t[quarter_turns == turns]) for turns in range(4)) / n}
