"""STL's family of transformations (minter_warp.views) against torchvision's, image by image: values, distributions,
alignment, AugMix."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from minter_warp import views


@pytest.fixture(scope="module")
def images():
    """40 colourful images, smooth and noisy, 32 x 32, with pure colours and greys among them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(40, 3, 32, 32, generator=generator)
    smooth = F.interpolate(torch.rand(40, 3, 4, 4, generator=generator), size=32, mode="bicubic").clamp(0, 1)
    images = torch.where(torch.arange(40)[:, None, None, None] % 2 == 0, noise, smooth)
    images[0], images[1] = 0.5, torch.tensor([1.0, 0, 0])[:, None, None]  # grey and red, on which hue is undefined or 0
    return (images * 255).round().to(torch.uint8)


def levels_apart(a, b):
    return (a - b).abs().max().item() * 255


# ------------------------------------------------------------------------------------ one image at a time, torchvision


@pytest.mark.parametrize("size", [32, 96])
def test_resized_crop_is_torchvisions(images, size):
    images = F.interpolate(images.float(), size=size, mode="nearest").to(torch.uint8)
    box = views.sample_transformations(40, size, torch.Generator().manual_seed(1))["box"]
    box[0] = torch.tensor([0, 0, size, size])
    ours = views.resized_crop(images, torch.arange(40), box, torch.full((3,), 1 / 255))
    for image, place, crop in zip(images, box.tolist(), ours, strict=True):
        assert levels_apart(crop, tv.resized_crop(image / 255, *place, size=[size, size], antialias=True)) < 1


def test_colour_jitter_is_torchvisions_in_every_order(images):
    images = images / 255
    sampled = views.sample_transformations(40, 32, torch.Generator().manual_seed(2))
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    orders = orders[[len(set(order)) == 4 for order in orders.tolist()]]
    assert len(orders) == 24
    apply = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    factors = sampled["factors"].clone()
    factors[:4] = torch.tensor([[1.4, 0.6, 1.4, 0.1], [0.6, 1.4, 0.6, -0.1], [1, 1, 1, 0], [1.4, 1.4, 1.4, 0.1]])
    for order in orders:
        ours = views.colour_jitter(images, factors, order.expand(40, 4))
        for image, factor, jittered in zip(images, factors.tolist(), ours, strict=True):
            for operation in order.tolist():
                image = apply[operation](image, factor[operation])
            assert levels_apart(jittered, image) < 1


def test_each_image_gets_its_own_order_and_factors(images):
    images = images / 255
    sampled = views.sample_transformations(40, 32, torch.Generator().manual_seed(3))
    together = views.colour_jitter(images, sampled["factors"], sampled["order"])
    for i in range(40):
        alone = views.colour_jitter(images[i : i + 1], sampled["factors"][i : i + 1], sampled["order"][i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-6)


@pytest.mark.parametrize("size, width", [(32, 3), (64, 5), (96, 9)])
def test_blur_is_torchvisions(images, size, width):
    images = F.interpolate(images / 255, size=size, mode="nearest")
    sigma = torch.linspace(0.1, 2, 40)
    sigma[:3] = 0  # no blur
    ours = views.gaussian_blur(images, sigma)
    assert torch.equal(ours[:3], images[:3])
    for image, blurred, s in zip(images[3:], ours[3:], sigma[3:].tolist(), strict=True):
        assert levels_apart(blurred, tv.gaussian_blur(image, [width, width], [s, s])) < 1


def test_a_whole_view_is_torchvisions_operations_one_after_the_other(images):
    generator = torch.Generator().manual_seed(4)
    drawn = views.sample_views(40, 32, generator)
    mean, std = torch.tensor([0.43, 0.42, 0.39]), torch.tensor([0.27, 0.26, 0.27])
    index = torch.randperm(40, generator=generator)
    ours = views.transform(images, index, drawn, (1 / std, -mean / std))
    apply = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    kinds = set()
    for i in range(40):
        image = tv.resized_crop(images[index[i]] / 255, *drawn["box"][i].tolist(), size=[32, 32])
        for operation in drawn["order"][i].tolist():
            image = apply[operation](image, drawn["factors"][i, operation].item())
        grey, flip, sigma = (drawn[name][i].item() for name in ("grey", "flip", "sigma"))
        image = tv.rgb_to_grayscale(image, 3) if grey else image
        image = tv.horizontal_flip(image) if flip else image
        image = tv.gaussian_blur(image, [3, 3], [sigma, sigma]) if sigma else image
        assert levels_apart(ours[i], tv.normalize(image, mean.tolist(), std.tolist())) < 1 / 0.26
        kinds.add((grey, flip, sigma > 0))
    assert len(kinds) >= 6  # of the 8 combinations


# ------------------------------------------------------------------------------------------------------ distributions


def same_distribution(ours, theirs):
    assert ks_2samp(np.asarray(ours), np.asarray(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("size", [32, 96])
def test_crops_are_distributed_as_torchvisions(size):
    n = 4000
    ours = views.sample_transformations(n, size, torch.Generator().manual_seed(0))["box"]
    torch.manual_seed(0)
    crop, blank = v2.RandomResizedCrop(size, scale=(0.2, 1.0)), torch.zeros(3, size, size)
    theirs = [crop.make_params([blank]) for _ in range(n)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    for column in range(4):
        same_distribution(ours[:, column], theirs[:, column])
    same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])
    assert (ours >= 0).all() and (ours[:, 0] + ours[:, 2]).max() == size and (ours[:, 1] + ours[:, 3]).max() == size


def test_colours_flips_and_blurs_are_distributed_as_torchvisions():
    n = 4000
    generator = torch.Generator().manual_seed(0)
    ours, per_image = views.sample_transformations(n, 32, generator), views.sample_flips_and_blurs(n, generator)
    torch.manual_seed(0)
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [jitter.make_params([]) for _ in range(n)]
    jittered = (ours["factors"] != torch.tensor([1.0, 1, 1, 0])).any(1)

    def share(values, p):
        assert values.float().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))

    share(jittered, 0.8), share(ours["grey"], 0.2), share(per_image["flip"], 0.5), share(per_image["sigma"] > 0, 0.5)
    for column, name in enumerate(["brightness", "contrast", "saturation", "hue"]):
        same_distribution(ours["factors"][jittered, column], [p[f"{name}_factor"] for p in theirs])
    same_distribution(per_image["sigma"][per_image["sigma"] > 0], torch.empty(n).uniform_(0.1, 2))
    code = (ours["order"] * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == 24 and (ours["order"].sort(1).values == torch.arange(4)).all()
    assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 50  # chi-squared with 23 degrees of freedom: p about 0.001
    independent = torch.stack([ours["grey"], jittered, per_image["flip"], per_image["sigma"] > 0]).double()
    assert (torch.corrcoef(independent) - torch.eye(4)).abs().max() < 0.07


# ------------------------------------------------------------------------------------------------------------- labels


def test_labels_have_mean_0_and_variance_1_as_transformations_are_drawn():
    drawn = views.sample_views(100_000, 96, torch.Generator().manual_seed(0))
    labels = views.transformation_labels(drawn, 96, list(views.LABELS))
    assert labels.shape == (100_000, 11)
    assert labels.mean(0).abs().max() < 0.02 and (labels.std(0) - 1).abs().max() < 0.02


def test_labels_are_these_numbers():
    two = {name: values.repeat_interleave(2, 0) for name, values in views.unchanged_transformations(1, 32).items()}
    two["box"][0] = torch.tensor([4, 8, 16, 20])  # top, left, height, width
    two["factors"][0] = torch.tensor([1.2, 0.8, 1.1, -0.05])
    two["grey"][0], two["flip"][0], two["sigma"][0] = True, True, 1.5
    labels = views.transformation_labels(two, 32, ["crop", "colour", "flip and blur"]).tolist()
    changed = [(18 / 32 - 0.5) / 0.093, (12 / 32 - 0.5) / 0.093, (20 / 32 - 0.725) / 0.152, (16 / 32 - 0.725) / 0.152,
               0.2 / 0.20656, -0.2 / 0.20656, 0.1 / 0.20656, -0.05 / 0.05164, 2.0, 1.0, (1.5 - 0.525) / 0.6527]
    unchanged = [0, 0, 0.275 / 0.152, 0.275 / 0.152, 0, 0, 0, 0, -0.5, -1, -0.525 / 0.6527]
    assert labels[0] == pytest.approx(changed, abs=1e-5) and labels[1] == pytest.approx(unchanged, abs=1e-5)
    assert views.transformation_labels(two, 32, ["colour"]).tolist()[0] == pytest.approx(changed[4:9], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- alignment


def test_pairs_share_their_transformation_and_neighbouring_pairs_do_not():
    drawn = views.sample_transformations(4, 32, torch.Generator().manual_seed(0))
    aligned = views.align(drawn, 7)
    for name, values in aligned.items():
        assert len(values) == 7
        for i in range(3):
            assert torch.equal(values[2 * i], values[2 * i + 1]), name
        assert torch.equal(values[6], drawn[name][3])
    for i in range(3):
        assert not torch.equal(aligned["box"][2 * i], aligned["box"][2 * i + 2])


def test_a_pair_shares_its_augmix_only_where_it_is_asked_to():
    for per_pair, shared in ((("augmix",), True), ((), False)):
        drawn = views.sample_views(200, 32, torch.Generator().manual_seed(0), per_pair, augmix=True)
        for name in ("operations", "strengths", "weights"):
            same = (drawn[name][::2] == drawn[name][1::2]).flatten(1).all(1).float().mean()
            assert same == 1 if shared else same < 0.02, name
    assert "operations" not in views.sample_views(2, 32, torch.Generator().manual_seed(0))


def test_augmix_comes_after_grayscale(images, monkeypatch):
    """A grey view is mixed from greys: were it the other way round, AugMix would see colours."""
    seen = []
    monkeypatch.setattr(views, "augmix", lambda batch, *drawn: seen.append(batch) or batch)
    drawn = views.sample_views(40, 32, torch.Generator().manual_seed(4), augmix=True)
    views.transform(images, torch.arange(40), drawn, (torch.ones(3), torch.zeros(3)))
    grey = seen[0].amax(1).sub(seen[0].amin(1)).amax((1, 2)) < 1e-6
    assert drawn["grey"].sum() > 3 and grey[drawn["grey"]].all()


# ------------------------------------------------------------------------------------------------------------- AugMix


TORCHVISIONS = {  # name in v2.AugMix: whether its magnitude has a sign; in the order of views.OPERATIONS
    "ShearX": True, "ShearY": True, "TranslateX": True, "TranslateY": True, "Rotate": True, "Posterize": False,
    "Solarize": False, "AutoContrast": False, "Equalize": False, "Brightness": True, "Color": True, "Contrast": True,
    "Sharpness": True}
MIX = v2.AugMix()


def torchvisions(name, images, strength):
    """What v2.AugMix makes of uint8 images by one operation, at one of its severity's three magnitudes or its
    negative, by torchvision.transforms.v2.functional."""
    magnitudes, signed = MIX._AUGMENTATION_SPACE[name]
    magnitudes = magnitudes(10, *images.shape[-2:])
    magnitude = 0.0 if magnitudes is None else float(magnitudes[abs(strength)])
    assert signed == TORCHVISIONS[name]
    return MIX._apply_image_or_video_transform(images, name, -magnitude if signed and strength < 0 else magnitude,
                                               interpolation=MIX.interpolation, fill=MIX._fill)


@pytest.mark.parametrize("size", [15, 32, 96])
@pytest.mark.parametrize("name", TORCHVISIONS)
def test_an_operation_of_augmix_is_torchvisions_at_each_images_own_strength(images, name, size):
    images = F.interpolate(images[:20].float(), size=size, mode="bilinear").to(torch.uint8)
    images[2], images[3] = 250, 255  # of few levels
    images[2, :, 0, :3] = torch.tensor([3, 200, 7], dtype=torch.uint8)
    operation = views.OPERATIONS[list(TORCHVISIONS).index(name)]
    strengths = [0, 1, 2, -2, -1]
    theirs = torch.stack([torchvisions(name, images, strength) for strength in strengths])
    for turn in range(5):  # each image at each strength
        own = [(i + turn) % 5 for i in range(20)]
        ours = operation(images, torch.tensor([float(strengths[which]) for which in own]))
        expected = theirs[own, torch.arange(20)]
        allowed = 0 if name in ("Posterize", "Solarize", "Equalize") else 1  # those compute in whole numbers
        assert ours.dtype == torch.uint8 and (ours.int() - expected.int()).abs().max() <= allowed
    always = views.OPERATIONS.index(operation) in views.WHATEVER_THE_STRENGTH
    assert always or torch.equal(torchvisions(name, images, 0), images)  # which `sample_augmix` leaves out


@pytest.mark.parametrize("block", [1, 2**19])  # so many images at once, and all
def test_augmix_is_its_chains_one_image_and_one_operation_after_the_other(images, monkeypatch, block):
    monkeypatch.setattr(views, "BLOCK", block)
    drawn = views.sample_augmix(40, torch.Generator().manual_seed(5))
    mixed, made = views.augmix(images / 255, **drawn), 0
    for i in range(40):
        total = drawn["weights"][i, 0] * images[i].float()
        for chain in range(3):
            levels = images[i : i + 1]
            for number, strength in zip(*(drawn[name][i, chain] for name in ("operations", "strengths")), strict=True):
                if number >= 0:
                    levels, made = views.OPERATIONS[number](levels, strength[None]), made + 1
            total += drawn["weights"][i, chain + 1] * levels[0].float()
        assert levels_apart(mixed[i], total / 255) < 0.01
    assert made > 120


def test_augmix_is_drawn_as_torchvision_draws_it(monkeypatch):
    """Of 2,000 images: how often each operation, at which magnitude, how many a chain, and the weights."""
    applied, weights, n = [], [], 2000
    monkeypatch.setattr(MIX, "_apply_image_or_video_transform",
                        lambda image, name, magnitude, **_: applied.append((name, magnitude)) or image)
    dirichlet = MIX._sample_dirichlet
    monkeypatch.setattr(MIX, "_sample_dirichlet", lambda params: weights.append(dirichlet(params)) or weights[-1])
    torch.manual_seed(0)
    lengths, blank = [], torch.zeros(1, 3, 27, 27, dtype=torch.uint8)
    for _ in range(n):
        MIX(blank)
        lengths.append(len(applied) - sum(lengths))
    ours = views.sample_augmix(n, torch.Generator().manual_seed(0))
    numbers, strengths = ours["operations"], ours["strengths"]
    original, chains = (torch.cat(found) for found in (weights[::2], weights[1::2]))
    for column in range(4):
        theirs = original[:, 0] if column == 0 else original[:, 1] * chains[:, column - 1]
        same_distribution(ours["weights"][:, column], theirs)
    assert torch.allclose(ours["weights"].sum(1), torch.ones(n))
    # Strength 0 is left out where it changes nothing, a third of these operations.
    always = torch.isin(numbers, torch.tensor(views.WHATEVER_THE_STRENGTH))
    assert ((strengths != 0) | always | (numbers < 0)).all()
    for number, (name, signed) in enumerate(TORCHVISIONS.items()):
        magnitudes = [magnitude for it, magnitude in applied if it == name and (magnitude or not signed)]
        chosen = strengths[numbers == number]
        assert len(chosen) == pytest.approx(len(magnitudes), abs=5 * math.sqrt(2 * len(magnitudes))), name
        if signed:
            unit = max(magnitudes) / 2
            theirs = [round(magnitude / unit) for magnitude in magnitudes]
            for strength in (-2, -1, 1, 2):
                share = (chosen == strength).float().mean()
                assert share == pytest.approx(theirs.count(strength) / len(theirs), abs=0.06)
    assert sum(lengths) / n == pytest.approx(6, abs=0.1)  # torchvision's, with strength 0
    expected = 2 * (4 + 9 * 2 / 3) / 13  # operations of a chain
    assert (numbers >= 0).sum() / (3 * n) == pytest.approx(expected, abs=0.03)
    assert [(numbers[:, :, step] >= 0).float().mean().item() for step in range(3)] == pytest.approx(
        [expected / 2 * share for share in (1, 2 / 3, 1 / 3)], abs=0.03)
