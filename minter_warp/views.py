"""STL's family of transformations: resized crop, colour jitter and grayscale, flip and blur, AugMix. A pair of images
shares some of them. All are drawn in closed form and applied to whole batches."""

import math

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from minter_warp.ops import warp_batch

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def sample_boxes(n, size, generator=None):
    """Resized crops, drawn as torchvision's RandomResizedCrop(scale=(0.2, 1)) draws them. size: side in pixels. Returns
    a dict of tensors on the generator's device: box (n, 4) int64, top, left, height, width."""
    draw = {"generator": generator, "device": generator.device if generator is not None else "cpu"}
    area = size * size * (0.2 + 0.8 * torch.rand(n, 10, **draw))
    aspect = torch.exp((2 * torch.rand(n, 10, **draw) - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width <= size) & (height <= size)
    first = fits.int().argmax(1, keepdim=True)  # the first of ten tries that fits
    width, height = (torch.where(fits.any(1), side.gather(1, first)[:, 0], size) for side in (width, height))
    corner = torch.rand(n, 2, **draw).clamp(max=1 - 1e-6)
    top, left = (corner[:, 0] * (size - height + 1)).floor(), (corner[:, 1] * (size - width + 1)).floor()
    return {"box": torch.stack([top, left, height, width], 1).long()}


def sample_colours(n, generator=None):
    """As torchvision's RandomApply(ColorJitter(0.4, 0.4, 0.4, 0.1), 0.8) and RandomGrayscale(0.2) draw them: factors
    (n, 4), brightness, contrast, saturation (1: unchanged) and hue (turns, 0: unchanged); order (n, 4) int64, in which
    these are applied; grey (n,) bool."""
    draw = {"generator": generator, "device": generator.device if generator is not None else "cpu"}
    is_hue = torch.arange(4, device=draw["device"]) == HUE
    unchanged = torch.where(is_hue, 0.0, 1.0)
    jitter = (2 * torch.rand(n, 4, **draw) - 1) * torch.where(is_hue, 0.1, 0.4)
    return {
        "factors": unchanged + torch.where(torch.rand(n, 1, **draw) < 0.8, jitter, 0.0),
        "order": torch.rand(n, 4, **draw).argsort(1),
        "grey": torch.rand(n, **draw) < 0.2,
    }


def sample_flips_and_blurs(n, generator=None):
    """flip (n,) bool with p = 0.5; sigma (n,) of the blur in pixels, U(0.1, 2) with p = 0.5 and 0, no blur,
    otherwise."""
    draw = {"generator": generator, "device": generator.device if generator is not None else "cpu"}
    sigma = 0.1 + 1.9 * torch.rand(n, **draw)
    return {"flip": torch.rand(n, **draw) < 0.5, "sigma": torch.where(torch.rand(n, **draw) < 0.5, sigma, 0.0)}


def sample_transformations(n, size, generator=None):
    """Crops and colours, all that STL learns by default: a dict of what `sample_boxes` and `sample_colours` return."""
    return {**sample_boxes(n, size, generator), **sample_colours(n, generator)}


def align(transformations, n):
    """For ceil(n / 2) pairs -> for n images: images 2i and 2i + 1 share transformation i."""
    return {name: values.repeat_interleave(2, 0)[:n] for name, values in transformations.items()}


def sample_views(n, size, generator=None, per_pair=()):
    """All parameters of a view of n images. per_pair: the groups, of "crop", "colour" and "flip and blur", that images
    2i and 2i + 1 share; the others are drawn for each image. Returns a dict of tensors, which `transform` takes."""
    def sample(group, sampler, *size):
        if group in per_pair:
            return align(sampler(-(-n // 2), *size, generator), n)
        return sampler(n, *size, generator)

    return {**sample("crop", sample_boxes, size), **sample("colour", sample_colours),
            **sample("flip and blur", sample_flips_and_blurs)}


def unchanged_transformations(n, size):
    """What `sample_views` returns, for n images that are left as they are."""
    return {"box": torch.tensor([[0, 0, size, size]]).repeat(n, 1),
            "factors": torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(n, 1),
            "order": torch.arange(4).repeat(n, 1), "grey": torch.zeros(n, dtype=torch.bool),
            "flip": torch.zeros(n, dtype=torch.bool), "sigma": torch.zeros(n)}


LABELS = {  # of each group: the mean and standard deviation of its numbers as they are drawn, which standardise them
    "crop": ((0.5, 0.5, 0.725, 0.725), (0.093, 0.093, 0.152, 0.152)),  # centre across and down, width, height, at 96 px
    "colour": ((1.0, 1.0, 1.0, 0.0, 0.2), (0.20656, 0.20656, 0.20656, 0.05164, 0.4)),  # the four factors; grey, 0 or 1
    "flip and blur": ((0.5, 0.525), (0.5, 0.6527)),  # flip, 0 or 1; sigma in pixels, 0 for none
}


def transformation_labels(parameters, size, groups):
    """What `sample_views` drew, as numbers of mean 0 and variance 1: (n, L), 4 of a crop (in sides of the image), 5 of
    the colours, 2 of flip and blur, those of `groups` beside each other. The order of the four adjustments of colour
    has no label."""
    top, left, height, width = (parameters["box"] / size).unbind(1)
    values = {
        "crop": torch.stack([left + width / 2, top + height / 2, width, height], 1),
        "colour": torch.cat([parameters["factors"], parameters["grey"][:, None]], 1),
        "flip and blur": torch.stack([parameters["flip"], parameters["sigma"]], 1),
    }
    return torch.cat([(values[group] - values[group].new_tensor(LABELS[group][0]))
                      / values[group].new_tensor(LABELS[group][1]) for group in groups], 1)


def resized_crop(images, index, box, scale=None):
    """(M, 3, S, S) uint8, (N,), (N, 4) -> (N, 3, S, S) float32: each box enlarged to the whole, bilinear. A crop is a
    projective map that sees only its window."""
    size = images.shape[3]
    top, left, height, width = box.float().unbind(1)
    zero = torch.zeros_like(top)
    coefficients = torch.stack([width / size, zero, left, zero, height / size, top, zero, zero], 1)
    return warp_batch(images, index, None, coefficients, scale, window=box)


def grayscale(images):
    """(N, 3, H, W) -> (N, 1, H, W)"""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def adjust_hue(images, turns):
    """images (N, 3, H, W) in [0, 1], turns (N, 1, 1, 1) of the colour circle."""
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    chroma = value - least
    divisor = torch.where(chroma > 0, chroma, 1.0)
    sextant = torch.where(value == red, (green - blue) / divisor,
                          torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor))
    channel = torch.arange(5.0, 0.0, -2.0, device=images.device)[:, None, None]  # 5, 3, 1 for red, green, blue
    distance = (sextant[:, None] + 6 * turns + channel) % 6  # (N, 3, H, W), round the hexagon
    return value[:, None] - chroma[:, None] * torch.minimum(distance, 4 - distance).clamp(0, 1)


def colour_jitter(images, factors, order):
    """images (N, 3, H, W) in [0, 1]; factors, order (N, 4): each image's four adjustments, in its own order."""
    for place in range(4):
        operation = order[:, place, None, None, None]
        factor = factors.gather(1, order[:, place : place + 1])[..., None, None]
        grey = grayscale(images)
        towards = torch.where(operation == CONTRAST, grey.mean((2, 3), keepdim=True), grey)
        towards = torch.where(operation == BRIGHTNESS, 0.0, towards)
        blended = (images * factor + towards * (1 - factor)).clamp(0, 1)
        images = torch.where(operation == HUE, adjust_hue(images, factor), blended)
    return images


def gaussian_blur(images, sigma):
    """images (N, 3, S, S), sigma (N,) in pixels, 0 for none. Reflected at the border; 9 pixels wide at S = 96."""
    radius = max(1, round((9 * images.shape[3] / 96 - 1) / 2))
    x = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (x / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(images.dtype)  # (N, 2 radius + 1)
    for axis in (2, 3):
        padded = F.pad(images, (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0), mode="reflect")
        images = sum(padded.narrow(axis, i, images.shape[axis]) * kernel[:, i, None, None, None] for i in range(len(x)))
    return images


class AlignedAugMix(v2.AugMix):
    """torchvision's AugMix with one set of mixing weights for all images of a call; it draws a set for each."""

    def _sample_dirichlet(self, params):
        return super()._sample_dirichlet(params[:1]).expand_as(params)


def augmix(images, together):
    """images (N, 3, H, W) in [0, 1]; every `together` images that follow each other are mixed alike. torchvision's
    operations take whole grey levels and one set of parameters, so this loops over the pairs."""
    levels, mix = (images * 255).round().to(torch.uint8), AlignedAugMix()
    return torch.cat([mix(pair) for pair in levels.split(together)]).float() / 255


def transform(images, index, parameters, normalize, dtype=torch.float32, augmix_together=None):
    """One view of a batch: images (M, 3, S, S) uint8, index (N,), parameters of N images as `sample_views` returns
    them, normalize = (scale, shift) for images in [0, 1], (3,) each. Returns (N, 3, S, S) of dtype."""
    views = resized_crop(images, index, parameters["box"], torch.full_like(normalize[0], 1 / 255))
    views = colour_jitter(views, parameters["factors"], parameters["order"])
    views = torch.where(parameters["grey"][:, None, None, None], grayscale(views), views)
    if augmix_together is not None:
        views = augmix(views, augmix_together)
    views = torch.where(parameters["flip"][:, None, None, None], views.flip(3), views)
    views = gaussian_blur(views, parameters["sigma"])
    return (views * normalize[0][:, None, None] + normalize[1][:, None, None]).to(dtype)
