"""STL's family of transformations: resized crop, colour jitter and grayscale, flip and blur, AugMix. A pair of images
shares some of them. All are drawn in closed form and applied to whole batches."""

import math

import torch
import torch.nn.functional as F

from minter_warp.ops import projective_warp, warp_batch

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


def sample_views(n, size, generator=None, per_pair=(), augmix=False):
    """All parameters of a view of n images. per_pair: the groups, of "crop", "colour", "flip and blur" and "augmix",
    that images 2i and 2i + 1 share; the others are drawn for each image. augmix: with AugMix too. Returns a dict of
    tensors, which `transform` takes."""
    def sample(group, sampler, *size):
        if group in per_pair:
            return align(sampler(-(-n // 2), *size, generator), n)
        return sampler(n, *size, generator)

    return {**sample("crop", sample_boxes, size), **sample("colour", sample_colours),
            **sample("flip and blur", sample_flips_and_blurs), **(sample("augmix", sample_augmix) if augmix else {})}


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


# ---------------------------------------------------------------------------------------------------------- AugMix
#
# Each operation takes levels (N, 3, S, S) uint8 and a strength (N,) float32 for each image, 0 to 2 ninths of its range,
# with a sign where it has two directions. It returns levels, which are torchvision's within one.


def to_levels(values):
    """Of 0 to 255, cut off to uint8; by way of int16, which is several times as fast on a CPU."""
    return values.to(torch.int16).to(torch.uint8)


def warp_levels(levels, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """Bilinear, black outside; u = a x + b y + c, v = d x + e y + f, each a number or (N,)."""
    zero = torch.zeros(len(levels), device=levels.device)
    a, b, c, d, e, f = (zero + value for value in (a, b, c, d, e, f))
    # One more pixel of black around, with which the outermost blend.
    coefficients = torch.stack([a, b, c + 1 - a - b, d, e, f + 1 - d - e, zero, zero], 1)
    return projective_warp(F.pad(levels, (1, 1, 1, 1)), coefficients, fill=0.0)[:, :, 1:-1, 1:-1]


def shear_x(levels, strength):
    return warp_levels(levels, b=strength / 30)


def shear_y(levels, strength):
    return warp_levels(levels, d=strength / 30)


def translate_x(levels, strength):
    return warp_levels(levels, c=-(strength * levels.shape[3] / 27).trunc())


def translate_y(levels, strength):
    return warp_levels(levels, f=-(strength * levels.shape[3] / 27).trunc())


def rotate(levels, strength):
    angle, middle = strength * math.pi / 54, levels.shape[3] / 2
    cos, sin = angle.cos(), angle.sin()
    return warp_levels(levels, cos, -sin, middle * (1 - cos + sin), sin, cos, middle * (1 - cos - sin))


def posterize(levels, strength):
    """Keeps the first 4, 4 or 3 bits."""
    return levels & torch.where(strength.abs() > 1, 224, 240).to(torch.uint8)[:, None, None, None]


def solarize(levels, strength):
    """Inverts what reaches 255, less up to all of it."""
    threshold = (255 * (1 - strength.abs() / 9)).ceil().to(torch.int16)[:, None, None, None]
    return levels ^ (threshold - 1 - levels.to(torch.int16)).bitwise_right_shift_(15).to(torch.uint8)  # by 255 or 0


def autocontrast(levels, strength):
    """Stretches each channel to 0 and 255."""
    least, most = (values.float() for values in (levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)))
    flat = least == most
    return to_levels((levels.float() - torch.where(flat, 0, least)).mul_(255 / torch.where(flat, 255, most - least)))


def equalize(levels, strength):
    """Makes each channel's histogram even."""
    channels, pixels = levels.shape[0] * levels.shape[1], levels.shape[2] * levels.shape[3]
    first = 256 * torch.arange(channels, device=levels.device, dtype=torch.int32)  # of each channel's bins
    bins = levels.reshape(channels, pixels).int().add_(first[:, None]).flatten()
    histogram = torch.bincount(bins, minlength=256 * channels).view(channels, 256).float()  # whole numbers, all of it
    step = ((pixels - histogram.gather(1, levels.amax((2, 3)).reshape(channels, 1).long())) / 255).floor()
    below = histogram.cumsum(1) - histogram  # pixels of lower levels
    table = ((below + (step / 2).floor()) / step.clamp(min=1)).clamp_(max=255)
    table = to_levels(torch.where(step > 0, table, torch.arange(256.0, device=levels.device)))
    return table.flatten().index_select(0, bins).view(levels.shape)


def blend_levels(values, towards, strength):
    """values, float32, which are changed in place, away from `towards`, or nearer where strength is negative."""
    factor = (1 + strength / 10)[:, None, None, None]
    return to_levels(values.mul_(factor).add_(towards * (1 - factor)).clamp_(0, 255))


def brightness(levels, strength):
    return to_levels(levels.float().mul_((1 + strength / 10)[:, None, None, None]).clamp_(max=255))


def saturation(levels, strength):
    values = levels.float()
    return blend_levels(values, grayscale(values).floor_(), strength)


def contrast(levels, strength):
    values = levels.float()
    return blend_levels(values, grayscale(values).floor_().mean((1, 2, 3), keepdim=True), strength)


def sharpness(levels, strength):
    """Away from the mean of the 3 x 3 pixels around, in which the pixel itself weighs 5; not at the border."""
    values, sharpened = levels.to(torch.int16), levels.clone()
    middle, rows = values[:, :, 1:-1, 1:-1], values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    around = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(middle, alpha=4).float().div_(13).round_()
    sharpened[:, :, 1:-1, 1:-1] = blend_levels(middle.float(), around, strength)
    return sharpened


OPERATIONS = (shear_x, shear_y, translate_x, translate_y, rotate, posterize, solarize, autocontrast, equalize,
              brightness, saturation, contrast, sharpness)
BLOCK = 2**19  # numbers
WHATEVER_THE_STRENGTH = [OPERATIONS.index(operation) for operation in (posterize, solarize, autocontrast, equalize)]


def sample_augmix(n, generator=None):
    """AugMix (Hendrycks et al., ICLR 2020) as torchvision draws it by default: severity 3, three chains of one to three
    operations. operations (n, 3, 3) int64, by chain and step: the number of one of OPERATIONS, or -1, beyond a chain's
    end and where the operation's strength of 0 would change nothing. strengths (n, 3, 3), -2 to 2. weights (n, 4), of
    the image itself and of its chains, which add up to 1."""
    draw = {"generator": generator, "device": generator.device if generator is not None else "cpu"}
    operations = torch.randint(len(OPERATIONS), (n, 3, 3), **draw)
    depth = torch.randint(1, 4, (n, 3, 1), **draw)
    strengths = torch.randint(3, (n, 3, 3), **draw) * torch.where(torch.rand(n, 3, 3, **draw) < 0.5, -1.0, 1.0)
    chains = torch.empty(n, 3, device=draw["device"]).exponential_(generator=generator)  # Dirichlet(1, 1, 1)
    share = torch.rand(n, 1, **draw)
    changes = (strengths != 0) | torch.isin(operations, torch.tensor(WHATEVER_THE_STRENGTH, device=draw["device"]))
    used = (torch.arange(3, device=draw["device"]) < depth) & changes
    return {"operations": torch.where(used, operations, -1), "strengths": strengths,
            "weights": torch.cat([1 - share, share * chains / chains.sum(1, keepdim=True)], 1)}


def augmix(images, operations, strengths, weights):
    """images (N, 3, S, S) in [0, 1]; the rest is what `sample_augmix` drew for them. In each step of the chains, images
    with the same operation are changed together, in blocks that a processor's cache can hold: on one thread 7 times (32
    pixels) and 5 times (96) as fast as torchvision's on one pair after the other."""
    n, block = len(images), max(1, BLOCK // images[0].numel())
    levels = torch.cat([to_levels((part * 255).add_(0.5)) for part in images.split(block)])
    chains = 3 * list(levels)  # chain c of image i is item c N + i
    for step, numbers in enumerate(operations.permute(2, 1, 0).flatten(1).tolist()):
        strength = strengths[:, :, step].T.flatten()
        for number, operation in enumerate(OPERATIONS):
            chosen = [item for item, its in enumerate(numbers) if its == number]
            for items in (chosen[at : at + block] for at in range(0, len(chosen), block)):
                changed = operation(torch.stack([chains[item] for item in items]), strength[items])
                for item, value in zip(items, changed, strict=True):
                    chains[item] = value
    mixed, weights = torch.empty_like(images), weights[..., None, None, None] / 255
    for rows in (slice(at, at + block) for at in range(0, n, block)):
        total = torch.mul(levels[rows].float(), weights[rows, 0], out=mixed[rows])
        for chain in range(3):
            ends = torch.stack(chains[chain * n : (chain + 1) * n][rows])
            total.addcmul_(ends.float(), weights[rows, chain + 1])
    return mixed


def transform(images, index, parameters, normalize, dtype=torch.float32):
    """One view of a batch: images (M, 3, S, S) uint8, index (N,), parameters of N images as `sample_views` returns
    them, normalize = (scale, shift) for images in [0, 1], (3,) each. Returns (N, 3, S, S) of dtype."""
    views = resized_crop(images, index, parameters["box"], torch.full_like(normalize[0], 1 / 255))
    views = colour_jitter(views, parameters["factors"], parameters["order"])
    views = torch.where(parameters["grey"][:, None, None, None], grayscale(views), views)
    if "operations" in parameters:
        views = augmix(views, *(parameters[name] for name in ("operations", "strengths", "weights")))
    views = torch.where(parameters["flip"][:, None, None, None], views.flip(3), views)
    views = gaussian_blur(views, parameters["sigma"])
    return (views * normalize[0][:, None, None] + normalize[1][:, None, None]).to(dtype)
