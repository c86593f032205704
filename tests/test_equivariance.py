"""The measurement of equivariance: representations with known answers, retrieval and ridge regression against slow
literal forms, chance, the bootstrap, the methods' own maps, and the command."""

import functools
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from test_scripts import ROOT, refused, run

import equivariance
import stl
from avt import AVT
from common import NIN, save_checkpoint
from equivariance import FAMILIES, EvaluationSet, measure, rank_distribution, ridge, ridge_map
from minter_warp import (
    coefficients_from_corners,
    projective_warp,
    reference_errors,
    sample_coefficients,
    sample_corners,
    transformation_target,
    warp_batch,
)
from minter_warp.views import transformation_labels, unchanged_transformations
from predictive_transform import PredictiveTransform
from probe import Representation, encode, read_rows, standardizer
from vte_ba import VTEBarberAgakov

CPU = torch.device("cpu")
PER_IMAGE = 20
CHANCE = {"MRR": sum(1 / rank for rank in range(1, PER_IMAGE + 1)) / PER_IMAGE, "H@1": 1 / PER_IMAGE,
          "H@5": 5 / PER_IMAGE}


def evaluation_set(family="projective", train_images=500, test_images=40, pairs=500, per_image=PER_IMAGE, size=32):
    return EvaluationSet(family, train_images, test_images, pairs, per_image, size, seed=0)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores(data, x, tx):
    """x, tx: pairs of (training, test) features. The measures of a deterministic representation, by their names."""
    original, transformed = (Representation("a.ckpt", "planted", None, *((features, None) for features in splits))
                             for splits in (x, tx))
    rows = measure(data, original, transformed, None, [], CPU)
    return {(row["measure"], row.get("target") or row.get("part"), row.get("from")): row for row in rows
            if row.get("map") != "t alone"}


def value(rows, measure, target=None, source="x and t(x)"):
    return rows[measure, target, source if target else None]["value"]


# ---------------------------------------------------------------------------------------- planted representations


def test_an_encoder_that_outputs_the_parameters_gets_full_marks():
    data = evaluation_set()
    content = noise(500, 8), noise(40, 8, seed=2)
    targets = data.joined_targets()
    x = [torch.cat([of, torch.zeros(len(of), targets[0].shape[1])], 1) for of in content]
    tx = [torch.cat([of[index], t], 1) for of, index, t in
          zip(content, (data.train_index, data.test_index), targets, strict=True)]
    rows = scores(data, x, tx)
    for source in ("x and t(x)", "t(x)"):
        assert value(rows, "accuracy", "rotation", source) == 1
        for name in ("t", "scale", "translation"):
            assert value(rows, "R2", name, source) > 0.999
        assert value(rows, "squared error", "t", source) < 0.005  # a constant: 4.11
    assert value(rows, "MRR") > 0.99 and value(rows, "H@1") > 0.98 and value(rows, "H@5") == 1


def test_an_invariant_encoder_knows_nothing_and_retrieves_as_chance_does():
    data = evaluation_set()
    content = noise(500, 8), noise(40, 8, seed=2)
    rows = scores(data, content, (content[0][data.train_index], content[1][data.test_index]))
    assert value(rows, "moved") == 0
    for name, chance in CHANCE.items():  # every candidate is as near as the true one
        assert value(rows, name) == pytest.approx(chance, abs=1e-12)
    for source in ("x and t(x)", "t(x)"):
        assert abs(value(rows, "accuracy", "rotation", source) - 0.25) < 0.07
        assert -0.05 < value(rows, "R2", "t", source) < 0.01
        assert value(rows, "squared error", "t", source) == pytest.approx(4.11, abs=0.25)


def test_a_random_encoder_is_chance_within_its_intervals_and_moves_as_far_as_to_another_image():
    data = evaluation_set(test_images=120)
    rows = scores(data, (noise(500, 16), noise(120, 16, seed=2)), (noise(500, 16, seed=3), noise(2400, 16, seed=4)))
    for name, chance in CHANCE.items():
        row = rows[name, None, None]
        assert row["low"] < chance < row["high"] and row["high"] - row["low"] < 0.05
    for source in ("x and t(x)", "t(x)"):
        for name in ("t", "scale", "translation"):
            assert -0.06 < value(rows, "R2", name, source) < 0.02
    assert value(rows, "moved") == pytest.approx(1, abs=0.08)


def test_an_encoder_that_turns_with_the_rotation_is_found_by_a_map_that_multiplies():
    """f(t(x)) = R(rotation) f(x), a representation of the quarter turns in three planes: what is known of t is worth
    nothing beside f(x) unless it acts on f(x)."""
    data = evaluation_set(train_images=800, pairs=800)
    quarter = torch.block_diag(*[torch.tensor([[0.0, -1], [1, 0]])] * 3)
    turns = torch.stack([torch.linalg.matrix_power(quarter, k) for k in range(4)])
    content = noise(800, 6), noise(40, 6, seed=2)
    tx = [torch.einsum("noi,ni->no", turns[targets["rotation"].argmax(1)], of[index]) for of, index, targets in
          zip(content, (data.train_index, data.test_index), (data.train_targets, data.test_targets), strict=True)]
    act = ridge_map(data, content[0][data.train_index], tx[0], CPU)
    predicted = act(content[1][data.test_index], data.joined_targets()[1])
    assert torch.nn.functional.cosine_similarity(predicted, tx[1]).min() > 0.98
    rows = scores(data, content, tx)
    # The true one is first, with all others of its rotation, which have the very same features.
    rotation = data.test_targets["rotation"].view(40, PER_IMAGE, 4)
    same = (rotation[:, :, None] * rotation[:, None]).sum((2, 3)).flatten().tolist()
    expected = np.mean([sum(1 / rank for rank in range(1, int(n) + 1)) / n for n in same])
    assert value(rows, "MRR") == pytest.approx(expected, abs=1e-3)
    assert value(rows, "H@1") == pytest.approx(np.mean([1 / n for n in same]), abs=1e-3)
    additive = Ridge(1e-3).fit(torch.cat([content[0], data.train_targets["rotation"]], 1), tx[0])
    weak = additive.predict(torch.cat([content[1][data.test_index], data.test_targets["rotation"]], 1))
    assert torch.nn.functional.cosine_similarity(torch.from_numpy(weak), tx[1]).mean() < 0.1


def test_a_transformation_that_shows_only_beside_the_original_takes_products():
    """Each feature of t(x) is that of x, or its opposite after an odd number of quarter turns: neither f(t(x)) nor a
    sum of f(x) and f(t(x)) tells the two kinds of turn apart, and f(x) f(t(x)) does."""
    data = evaluation_set(train_images=1000, pairs=1000, test_images=200)
    content = noise(1000, 4).sign(), noise(200, 4, seed=2).sign()
    flip = [1 - 2 * (targets["rotation"].argmax(1, keepdim=True) % 2)
            for targets in (data.train_targets, data.test_targets)]
    tx = [of[index] * sign for of, index, sign in
          zip(content, (data.train_index, data.test_index), flip, strict=True)]
    rows = scores(data, content, tx)
    assert abs(value(rows, "accuracy", "rotation") - 0.5) < 0.07  # one of two, of four
    sums = [torch.cat([of[index], after], 1) for of, index, after in
            zip(content, (data.train_index, data.test_index), tx, strict=True)]
    without_products = equivariance.predict_targets(data, sums[:1], sums[1:], CPU)["rotation", "accuracy"]["value"]
    for accuracy in (without_products, value(rows, "accuracy", "rotation", "t(x)")):
        assert abs(accuracy - 0.25) < 0.07


def test_sampled_features_are_measured_with_their_noise():
    data = evaluation_set()
    targets = data.joined_targets()

    def r2(kind, logvar):
        original = Representation("a", "planted", kind, *((torch.zeros(n, 15), torch.full((n, 15), logvar))
                                                         for n in (500, 40)))
        transformed = Representation("a", "planted", kind, *((t, torch.full_like(t, logvar)) for t in targets))
        torch.manual_seed(0)
        rows = {(row["measure"], row.get("target"), row.get("from")): row for row in
                measure(data, original, transformed, None, [], CPU) if row.get("map", "ridge") == "ridge"}
        return value(rows, "R2", "scale"), rows.get(("moved", None, None))

    exact, noisy = r2("mu", 0.0), r2("sample", 0.0)
    assert exact[0] > 0.999 and noisy[0] < 0.4  # the scale's standard deviation is 0.13, the noise's 1
    assert exact[1] is None and noisy[1]["value"] > 1  # originals that are all the same in mu lie apart when sampled


# ------------------------------------------------------------------------------------------------------------ shares

PARTS = ("invariant", "equivariant", "the same for all images", "image by image", "unexplained")
QUARTER = torch.tensor([[0.0, -1], [1, 0]])
TURNS = torch.stack([torch.linalg.matrix_power(torch.block_diag(*[QUARTER] * 4), k) for k in range(4)])  # (4, 8, 8)


def planted(data, weights):
    """Features of x, of t(x), of t(x) as f(x) and t tell, and as t alone tells, (training, test) each. They hold what t
    leaves, the rotation's own number, content turned in four planes, and noise, of total variances `weights`."""
    def observe(content, index, turns, seed):
        own = (torch.eye(4)[turns] - 0.25) / math.sqrt(0.75)  # four equally frequent points: variance 1
        turned = torch.einsum("noi,ni->no", TURNS[turns], content[index, 8:])
        parts = [content[index, :8], own, turned, noise(len(index), 8, seed=seed) / math.sqrt(8)]
        parts = [math.sqrt(weight) * part for weight, part in zip(weights, parts, strict=True)]
        return [torch.cat([part * (number in kept) for number, part in enumerate(parts)], 1)
                for kept in ((0, 1, 2, 3), (0, 1, 2), (1,))]

    found = []
    for seed, n, index, targets in ((1, 1 + int(data.train_index.max()), data.train_index, data.train_targets),
                                    (2, data.n, data.test_index, data.test_targets)):
        content = noise(n, 16, seed=seed) / math.sqrt(8)
        found.append([observe(content, torch.arange(n), torch.zeros(n, dtype=torch.long), seed + 20)[0],
                      *observe(content, index, targets["rotation"].argmax(1), seed + 10)])
    return list(zip(*found, strict=True))


def planted_shares(data, weights):
    """Four turns that are all there are leave a quarter of what is random to the image's mean over them."""
    invariant, same, turned, random = (weight / sum(weights) for weight in weights)
    stays = random / 4 * data.every
    return dict(zip(PARTS, (invariant + stays, same + turned, same, turned, random - stays), strict=True))


@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2, 1, 3, 2)])
@pytest.mark.parametrize("family", ["projective", "rotation"])
def test_the_shares_are_those_that_were_planted(family, weights):
    data = evaluation_set(family, train_images=10, pairs=10, test_images=200)
    features, by_map, by_t = (of[1].unflatten(0, (data.n, -1)) for of in planted(data, weights)[1:])
    shares = equivariance.variance_shares(data, features, by_map, by_t, torch.zeros(data.n).double())
    for part, share in planted_shares(data, weights).items():
        assert shares[part]["value"] == pytest.approx(share, abs=0.005 if max(weights) == 1 else 0.03), part
    assert sum(shares[part]["value"] for part in ("invariant", "equivariant", "unexplained")) == pytest.approx(1)
    if weights == (1, 0, 0, 0):
        assert shares["invariant"]["value"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("weights", [(0, 1, 0, 0), (0, 0, 1, 0), (2, 1, 3, 2)])
def test_ridge_maps_find_the_shares_that_were_planted(weights):
    data = evaluation_set("rotation", train_images=1500, pairs=1500, test_images=200)
    rows = scores(data, *planted(data, weights)[:2])
    for part, share in planted_shares(data, weights).items():
        assert value(rows, "share", part, None) == pytest.approx(share, abs=0.005 if max(weights) == 1 else 0.03), part
    if weights != (2, 1, 3, 2):  # what is the same for all images is found by t alone: no excess
        assert value(rows, "H@1") == 1
        assert value(rows, "excess H@1") == pytest.approx(0.75 * weights[2], abs=0.02)


def test_the_shares_have_no_bias_from_few_images_and_transformations():
    """Content a, an effect h of t that two images share, noise e, all of variance 1: over many draws the parts' mean is
    what was planted. Two images' means, had they counted, or T draws of t, had they not, would be told apart here."""
    data = evaluation_set("scale", test_images=10, per_image=10)
    data.n, data.per_image = 4, 3
    generator, found = torch.Generator().manual_seed(0), []
    data.weights = data.weights[:1, :4]
    data.with_interval = lambda statistic: statistic(data.weights)[0].item()
    for _ in range(2000):
        a, h, e = (torch.randn(shape, generator=generator) for shape in ((4, 1, 16), (2, 3, 16), (4, 3, 16)))
        y, by_t = a + h.repeat_interleave(2, 0) + e, h.repeat_interleave(2, 0)
        found.append(list(equivariance.variance_shares(data, y, 0.5 * by_t, by_t, torch.zeros(4).double()).values()))
    # of three units of variance; half of h predicted leaves a quarter of its variance
    mean, error = torch.tensor(found).mean(0), torch.tensor(found).std(0) / math.sqrt(len(found))
    expected = torch.tensor([1, 0.75, 1, -0.25, 1.25]) / 3
    assert ((mean - expected).abs() < 4 * error + 0.003).all(), (mean, error)  # a ratio's own bias is some 0.002
    assert error.max() < 0.004


def test_the_shares_intervals_hold_the_truth_as_often_as_they_say():
    inside = []
    for seed in range(60):
        data = EvaluationSet("projective", 10, 40, 10, 10, 32, seed)
        a, e = noise(40, 1, 3, seed=2 * seed + 1), noise(40, 10, 3, seed=2 * seed + 2)
        zeros = torch.zeros(40, 10, 3)
        row = equivariance.variance_shares(data, a + e, zeros, zeros, torch.zeros(40).double())["invariant"]
        inside.append(row["low"] < 0.5 < row["high"])
    assert 0.83 <= np.mean(inside) <= 1  # 95 % of 60, within 4 standard deviations


@pytest.mark.parametrize("family", ["projective", "rotation"])
def test_the_noise_of_sigma_is_a_known_part_of_what_is_unexplained(family):
    """All four turns are no excuse for noise: what it leaves in their mean is known, and taken out."""
    data = evaluation_set(family, train_images=300, pairs=300, test_images=200)
    x, tx, _, _ = planted(data, (2, 0, 1, 0))
    logvar = math.log(3 / 28)  # of 28 numbers: half of all variance
    torch.manual_seed(0)
    rows = measure(data, *(Representation("a", "planted", "sample", *((of, torch.full_like(of, logvar)) for of in both))
                           for both in (x, tx)), None, [], CPU)
    shares = {row["part"]: row["value"] for row in rows if row["measure"] == "share"}
    assert shares["noise of sigma"] == pytest.approx(0.5, abs=0.02)
    assert shares["invariant"] == pytest.approx(1 / 3, abs=0.03)
    drawn, exact = (of.unflatten(0, (data.n, -1)) for of in (
        tx[1] + math.exp(logvar / 2) * noise(*tx[1].shape, seed=5), tx[1]))
    exact = equivariance.variance_shares(data, drawn, exact, 0 * exact, torch.full((data.n,), 3.0).double())
    assert exact["unexplained"]["value"] == pytest.approx(0.5, abs=0.01)
    assert exact["equivariant"]["value"] == pytest.approx(1 / 6, abs=0.02)


def test_the_ceiling_is_what_the_noise_of_sigma_leaves():
    """Full marks where sigma is tiny; chance where t moves nothing but the noise."""
    data = evaluation_set(test_images=100)
    told = [targets[:, :8] for targets in data.joined_targets()]
    for scale, logvar, expected in ((1, -40.0, 1), (0, 0.0, CHANCE["H@1"])):
        pairs = [[(scale * of, torch.full_like(of, logvar)) for of in splits] for splits in (
            (torch.zeros(500, 8), torch.zeros(100, 8)), told)]
        torch.manual_seed(0)
        rows = measure(data, *(Representation("a", "planted", "sample", *splits) for splits in pairs), None, [], CPU)
        (found,) = [row["value"] for row in rows if row["measure"] == "H@1" and "ceiling" in row["map"]]
        assert found == pytest.approx(expected, abs=1e-9)


def test_features_that_do_not_vary_have_no_shares():
    data = evaluation_set()
    rows = scores(data, *([torch.full((n, 4), 0.1) for n in of] for of in ((500, 40), (500, 40 * PER_IMAGE))))
    assert [value(rows, "share", part, None) for part in PARTS] == [0] * 5
    assert not any("moved" in key for key in rows)  # relative to images that do not lie apart


# ------------------------------------------------------------------------------------------------------- composition


def test_turns_that_act_compose_and_turns_that_add_do_not():
    """f(gx) = R(g) f(x) + a(g) + noise of variance 1, which no map tells. Two maps in turn add R(h) a(g) + a(h) where
    one adds a(gh)."""
    data = evaluation_set("rotation", train_images=10, pairs=10, test_images=200)
    x = noise(200, 8)
    for scale in (0, 1):
        offset = scale * noise(4, 8, seed=3)

        def act(features, targets, offset=offset):
            which = targets.argmax(1)
            return torch.einsum("noi,ni->no", TURNS[which], features) + offset[which]

        by_map = act(x[data.test_index], data.joined_targets()[1])
        features = by_map + noise(800, 8, seed=5) / math.sqrt(8)
        found = equivariance.composition(data, act, x, *(of.unflatten(0, (200, 4)) for of in (by_map, features)))
        lacking = np.mean([(TURNS[h] @ offset[g] + offset[h] - offset[(g + h) % 4]).square().sum().item()
                           for g in range(4) for h in range(4)])
        fourth = sum(torch.linalg.matrix_power(TURNS[1], k) @ offset[1] for k in range(4)).square().sum().item()
        assert (fourth < 1e-9) and (lacking > 5) == (scale == 1)  # the four turns of a(g) add to nothing
        expected = dict(zip(equivariance.COMPOSITION, (1 + lacking, lacking, fourth), strict=True))
        for name, ratio in expected.items():
            assert found[name]["value"] == pytest.approx(ratio, rel=0.05, abs=1e-5), (scale, name)
    growing = equivariance.composition(data, lambda features, targets: 1.1 * act(features, targets), x,
                                       *(of.unflatten(0, (200, 4)) for of in (by_map, features)))
    assert growing["ρ(g)⁴ - 1"]["value"] > 0.5  # 1.1^4 is not 1
    exact = functools.partial(act, offset=1e-3 * offset)  # a map without an error: relative to the features' variance
    features = exact(x[data.test_index], data.joined_targets()[1]).unflatten(0, (200, 4))
    found = equivariance.composition(data, exact, x, features, features)
    variance = features.flatten(0, 1).var(0, correction=0).sum().item()
    assert found["two in turn"]["value"] == pytest.approx(lacking / variance, rel=1e-3)


def test_two_transformations_in_turn_are_the_product_of_their_maps():
    """t2(t1(x)) by translations alone: where nothing came in from outside, the sum of both shifts; and a map that adds
    the shift to a feature composes as well as it predicts."""
    data = evaluation_set("translation", test_images=10, per_image=10)
    images = torch.randint(0, 256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    views = data.apply_twice(images, data.test_index, torch.arange(100), torch.ones(3), torch.zeros(3), torch.float32)
    shifts = (32 * data.test_targets["translation"]).round().int().view(10, 10, 2)
    both = (shifts + shifts.roll(-1, 1)).view(100, 2)
    for view, image, (across, down) in zip(views, images[data.test_index], both.tolist(), strict=True):
        assert torch.equal(view[:, 8:24, 8:24], image[:, 8 - down : 24 - down, 8 - across : 24 - across].float())
    told = data.joined_targets()[1]
    x, spread = noise(10, 2), noise(100, 2, seed=2)
    rho = x[data.test_index] + told
    found = equivariance.composition(data, lambda features, targets: features + targets, x, rho.view(10, 10, 2),
                                     (rho + spread).view(10, 10, 2), x[data.test_index] + both / 32 + 3 * spread)
    assert found["two in turn"]["value"] == pytest.approx(9, rel=1e-4) and len(found) == 1


# --------------------------------------------------------------------------------------------------------- retrieval


def literal_scores(data, predicted, candidates):
    """MRR, H@1, H@5, PRE, query after query; candidates equally near to the prediction take all orders alike."""
    ranks, apart = [], []
    known, told = (targets.double().numpy() for targets in data.joined_targets())
    told = (told / known.std(0, ddof=1)).reshape(*candidates.shape[:2], -1)
    for guesses, truths, t in zip(predicted.double().numpy(), candidates.double().numpy(), told, strict=True):
        for j, guess in enumerate(guesses):
            cosine = [guess @ truth / np.linalg.norm(guess) / np.linalg.norm(truth) for truth in truths]
            nearer = sum(c > cosine[j] + 1e-9 for c in cosine)
            tied = sum(abs(c - cosine[j]) <= 1e-9 for c in cosine)
            ranks.append([nearer + place for place in range(1, tied + 1)])
            first = [i for i, c in enumerate(cosine) if c >= max(cosine) - 1e-9]
            apart.append(np.mean([np.mean((t[i] - t[j]) ** 2) for i in first]))
    return {"PRE": np.mean(apart), "MRR": np.mean([np.mean([1 / rank for rank in of]) for of in ranks]),
            "H@1": np.mean([np.mean([rank <= 1 for rank in of]) for of in ranks]),
            "H@5": np.mean([np.mean([rank <= 5 for rank in of]) for of in ranks])}


@pytest.mark.parametrize("closeness", [0.0, 0.5, 3.0])
def test_retrieval_is_its_literal_form_with_ties(closeness):
    data = evaluation_set(test_images=24)
    candidates = noise(24, PER_IMAGE, 5)
    candidates[:, 3] = candidates[:, 7]
    candidates[::2, 4:9] = 2 * candidates[::2, :1]  # as near as each other, whatever their length
    predicted = noise(24, PER_IMAGE, 5, seed=2) + closeness * candidates
    measured, shares = equivariance.retrieval(data, predicted, candidates)
    for name, expected in literal_scores(data, predicted, candidates).items():
        assert measured[name].mean().item() == pytest.approx(expected, abs=1e-5 if name == "PRE" else 1e-9)
    assert sum(shares) == pytest.approx(1, abs=1e-5) and len(shares) == PER_IMAGE


def test_chance_of_60_is_what_a_random_and_a_constant_map_score():
    data = evaluation_set(test_images=200, per_image=60)
    candidates = noise(200, 60, 8)
    for predicted, tolerance in ((noise(200, 60, 8, seed=2), 0.006), (noise(200, 1, 8).expand(-1, 60, -1), 1e-9)):
        measured, shares = equivariance.retrieval(data, predicted, candidates)
        exact = {"MRR": sum(1 / rank for rank in range(1, 61)) / 60, "H@1": 1 / 60, "H@5": 5 / 60}
        assert {name: round(chance, 3) for name, chance in exact.items()} == {"MRR": 0.078, "H@1": 0.017, "H@5": 0.083}
        for name, chance in exact.items():
            assert measured[name].mean().item() == pytest.approx(chance, abs=tolerance)
        assert shares == pytest.approx([1 / 60] * 60, abs=max(tolerance, 1e-6))  # rounded to six digits
        assert measured["PRE"].mean().item() == pytest.approx(2 * 59 / 60, abs=0.1)


def test_ranks_are_of_the_own_image_s_candidates():
    """Perfect predictions are first, those of the next image are not."""
    candidates = noise(6, 10, 32)
    assert rank_distribution(3 * candidates, candidates)[0][:, :, 0].eq(1).all()
    assert rank_distribution(candidates.roll(1, 0), candidates)[0][:, :, 0].mean() < 0.3


def test_pre_is_how_far_the_transformation_ranked_first_is_from_the_true_one():
    """None where it is the true one; where it is always the next, of numbers 0, 1, 2, ..., one step, and back once."""
    data = evaluation_set("scale", test_images=6, per_image=10)
    told = torch.arange(10.0).repeat(6)[:, None]
    data.joined_targets = lambda: (3 * torch.tensor([[-1.0], [0], [1]]), told)  # of standard deviation 3
    candidates = noise(6, 10, 32)
    for predicted, expected in ((candidates, 0), (candidates.roll(-1, 1), (9 * 1 + 81) / 10 / 9)):
        measured, _ = equivariance.retrieval(data, predicted, candidates)
        assert measured["PRE"].tolist() == pytest.approx([expected] * 6, abs=1e-6)


# --------------------------------------------------------------------------------------------------- ridge regression


def test_ridge_is_scikit_learn_s_with_the_penalty_that_validates_best():
    x, held_out = noise(120, 10).double(), torch.arange(120) % 4 == 0
    y = torch.stack([x[:, 0], 0.2 * x[:, 1] + noise(120, seed=2), noise(120, seed=3)], 1).double()
    unit = (x @ x.T).diagonal().mean().item()
    fit = ~held_out
    errors = torch.stack([torch.from_numpy((Ridge(p * unit, fit_intercept=False).fit(x[fit], y[fit]).predict(
        x[held_out]) - y[held_out].numpy()) ** 2).sum(0) for p in equivariance.RIDGE_PENALTIES])
    best = errors.argmin(0)
    assert best[0] < best[2]  # a column that follows from x, and pure noise
    for together, chosen in ((False, best), (True, errors.sum(1).argmin().expand(3))):
        of_kernel = x.T @ ridge(x @ x.T, y, held_out, together, dual=True)
        for weights in (of_kernel, ridge(x, y, held_out, together)):
            for column, number in enumerate(chosen.tolist()):
                reference = Ridge(equivariance.RIDGE_PENALTIES[number] * unit, fit_intercept=False).fit(x, y[:, column])
                assert weights[:, column].numpy() == pytest.approx(reference.coef_, abs=1e-8)


def test_the_fitted_map_is_ridge_regression_on_all_products_of_feature_and_transformation(monkeypatch):
    monkeypatch.setattr(equivariance, "RIDGE_PENALTIES", [0.1])
    data = evaluation_set(train_images=60, test_images=10, pairs=100)
    x, tx, test_x = noise(60, 4)[data.train_index], noise(100, 3, seed=2), noise(10, 4, seed=3)
    targets, test_targets = data.joined_targets()
    assert targets.shape == (100, 15)  # t 8, rotation 4, scale 1, translation 2
    scaled, standard = standardizer(x), standardizer(targets)
    d, test_d = standard(targets), standard(test_targets)

    def products(f, d):
        f = torch.cat([torch.ones(len(f), 1), scaled(f) / math.sqrt(4)], 1).double()
        d = torch.cat([torch.ones(len(d), 1), d / math.sqrt(15)], 1).double()
        return torch.einsum("nf,nd->nfd", f, d).flatten(1)

    inputs = products(x, d)
    penalty = 0.1 * inputs.square().sum(1).mean().item()
    literal = Ridge(penalty, fit_intercept=False).fit(inputs, (tx - tx.mean(0)).double())
    expected = literal.predict(products(test_x[data.test_index], test_d)) + tx.mean(0).numpy()
    act = ridge_map(data, x, tx, CPU)
    for features in (test_x[data.test_index], test_x):  # each image's, for all of its transformations
        assert act(features, test_targets).numpy() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("width", [4, 300])
def test_one_block_is_ridge_regression_from_it_however_wide(monkeypatch, width):
    monkeypatch.setattr(equivariance, "RIDGE_PENALTIES", [0.1])
    train, test, targets = noise(100, width), noise(30, width, seed=2), noise(100, 3, seed=3)
    inputs, test_inputs = (torch.cat([torch.ones(len(of), 1), standardizer(train)(of) / math.sqrt(width)], 1).double()
                           for of in (train, test))
    penalty = 0.1 * inputs.square().sum(1).mean().item()
    literal = Ridge(penalty, fit_intercept=False).fit(inputs, (targets - targets.mean(0)).double())
    found = equivariance.regress(torch.arange(100) < 20, [train], targets, CPU)([test])
    assert found.numpy() == pytest.approx(literal.predict(test_inputs) + targets.mean(0).numpy(), abs=1e-4)


# ------------------------------------------------------------------------------------------- intervals, movement


def test_intervals_are_those_of_resampling_pairs_of_images():
    """Of a mean: value +- 1.96 standard errors, of 150 independent pairs whose two images agree."""
    data = evaluation_set(test_images=300)
    by_pair = noise(150).double() + 5
    by_image = by_pair.repeat_interleave(2)
    interval = data.with_interval(lambda w: w @ by_image / w.sum(1))
    assert interval["value"] == pytest.approx(by_image.mean().item())
    half = 1.96 * by_pair.std().item() / math.sqrt(150)
    assert interval["high"] - interval["value"] == pytest.approx(half, rel=0.12)
    assert interval["value"] - interval["low"] == pytest.approx(half, rel=0.12)
    assert data.weights.sum(1).eq(300).all()


def test_r2_and_its_error_are_their_definitions():
    data = evaluation_set("colour", test_images=20)
    train, test = noise(500, 6), noise(400, 6, seed=2)
    train[:, 0] += data.train_targets["hue"][:, 0]
    test[:, 0] += data.test_targets["hue"][:, 0]
    measured = equivariance.predict_targets(data, [train], [test], CPU)
    truth = data.test_targets["hue"][:, 0].double()
    error, total = (measured["hue", "squared error"]["value"],
                    (truth - data.train_targets["hue"].double().mean()).square().mean().item())
    assert measured["hue", "R2"]["value"] == pytest.approx(1 - error / total, abs=1e-9)
    assert 0.1 < measured["hue", "R2"]["value"] < 0.5  # the signal's variance is 1/3, the noise's 1: 0.25
    assert measured["hue", "R2"]["low"] < measured["hue", "R2"]["value"] < measured["hue", "R2"]["high"]


def test_the_mse_of_a_group_is_the_mean_over_its_numbers():
    """Of features that say nothing: that of the training mean."""
    data = evaluation_set("crop+colour", test_images=20)
    measured = equivariance.predict_targets(data, [torch.zeros(500, 2)], [torch.zeros(400, 2)], CPU)
    known, truth = (targets.double().numpy() for targets in data.joined_targets())  # 4 of a crop, 4 of the colours
    errors = ((truth - known.mean(0)) ** 2).mean(0)
    for group, columns in (("crop", slice(4)), ("colour", slice(4, 8)), ("all", slice(8))):
        assert measured[group, "MSE"]["value"] == pytest.approx(errors[columns].mean(), abs=1e-6)
    assert ("colour", "MSE") not in equivariance.predict_targets(
        evaluation_set("crop"), [noise(500, 2)], [noise(800, 2)], CPU)


def test_the_kind_is_told_by_features_that_hold_it_and_guessed_from_noise():
    """f(t(x)) is f(x) plus the kind: a code that takes the difference tells it exactly."""
    data = evaluation_set("single")
    content, kinds = (noise(500, 5), noise(40, 5, seed=2)), (data.train_targets["kind"], data.test_targets["kind"])
    indices = data.train_index, data.test_index
    held = [torch.cat([of[index], kind], 1) for of, index, kind in zip(content, indices, kinds, strict=True)]
    rows = scores(data, [torch.cat([of, 0 * of], 1) for of in content], held)
    assert value(rows, "accuracy", "kind") == value(rows, "accuracy", "kind", "t(x)") == 1
    guessed = equivariance.predict_targets(data, [noise(500, 16)], [noise(800, 16, seed=2)], CPU)["kind", "accuracy"]
    assert guessed["value"] == pytest.approx(0.2, abs=0.07)

    added = [of[index] + kind for of, index, kind in zip(content, indices, kinds, strict=True)]
    represented = (Representation("a", "planted", None, *((of, None) for of in both)) for both in (content, added))
    rows = measure(data, *represented, None, [(lambda *_: [], lambda x, tx: tx - x, None)], CPU)
    accuracy = {(row["from"], row.get("map")): row["value"] for row in rows if row["measure"] == "accuracy"}
    assert accuracy["x and t(x)", "code of t"] == 1 and accuracy["t(x)", None] < 0.6


def test_movement_is_its_literal_form():
    data = evaluation_set(test_images=10)
    x, tx = noise(10, 3), noise(10 * PER_IMAGE, 3, seed=2)
    moved = np.mean([(tx[i] - x[i // PER_IMAGE]).square().sum().item() for i in range(len(tx))])
    apart = np.mean([(x[i] - x[j]).square().sum().item() for i in range(10) for j in range(10) if i != j])
    assert equivariance.movement(data, x, tx)["value"] == pytest.approx(moved / apart, rel=1e-6)


# ------------------------------------------------------------------------------------------------- transformations


def test_drawing_corners_left_every_seed_as_it_was():
    coefficients = sample_coefficients(5, (32, 48), torch.Generator().manual_seed(3))
    before = [-1.06266415, -0.05543195, 52.52496719, -0.08746889, -0.78081495, 28.2924633, -0.0061349, 5.28322562e-5]
    assert coefficients[0].tolist() == pytest.approx(before, rel=1e-6)
    turns, corners = sample_corners(5, (32, 48), torch.Generator().manual_seed(3))
    assert torch.equal(coefficients_from_corners(corners, (32, 48)).float(), coefficients)
    assert turns.tolist()[0] == 2  # a and e are about -1


def test_the_targets_of_a_projective_map_are_its_geometry():
    apply, targets, _ = FAMILIES["projective"](4000, 32, torch.Generator().manual_seed(0))
    turns, corners = sample_corners(4000, 32, torch.Generator().manual_seed(0))
    assert torch.equal(targets["rotation"].argmax(1), turns)
    assert targets["translation"].numpy() == pytest.approx((corners.mean(1) / 32 - 0.5).numpy(), abs=1e-6)
    assert targets["translation"].abs().max() < 0.125 + 1e-6  # four corners moved by 4 pixels of 32
    assert (targets["scale"] > 0.8 - 0.25).all() and (targets["scale"] < 1.2 + 0.25).all()
    assert targets["scale"].mean() == pytest.approx(1, abs=0.02)
    constant = (targets["t"] - targets["t"].mean(0)).square().sum(1).mean()
    assert constant == pytest.approx(4.11, abs=0.1)
    square = torch.tensor([[[8.0, 0], [24, 0], [24, 16], [8, 16]]], dtype=torch.float64)  # half the side, 8 px up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equivariance, "sample_corners", lambda *_: (torch.zeros(1, dtype=torch.long), square))
        _, targets, _ = FAMILIES["projective"](1, 32, None)
    assert targets["scale"].tolist() == [[0.5]] and targets["translation"].tolist() == [[0, -0.25]]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_views_are_of_the_transformations_that_the_targets_describe(family):
    """Two images that follow each other share theirs, pixels follow the targets, and x itself is untouched."""
    data = evaluation_set(family, test_images=6, per_image=10)
    by_pair = data.joined_targets()[1].view(3, 2, data.per_image, -1)
    assert torch.equal(by_pair[:, 0], by_pair[:, 1]) and torch.equal(by_pair[0], by_pair[1]) == data.every
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[1] = images[0]
    flat, none = torch.nn.Flatten(), ((0.0,) * 3, (1 / 255,) * 3)  # grey levels as they are
    views, _ = encode(flat, images, *none, CPU, torch.float32, 7, data.test_index, data.test_apply)
    views = views.view(6, data.per_image, 3, 32, 32)
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0, 0], views[0, 1])
    if family == "rotation":  # each of the four, exactly
        exact = torch.stack([images[2].float().rot90(-turns, (1, 2)) for turns in range(4)])
        assert torch.equal(views[2], exact) and data.test_targets["rotation"][8:12].equal(torch.eye(4))
    elif family == "translation":  # by whole pixels: what moved in is grey
        for view, (across, down) in zip(views[2], (32 * data.test_targets["translation"][20:30]).round().int().tolist(),
                                        strict=True):
            expected = torch.full((3, 40, 40), 128.0)
            expected[:, 4 + down : 36 + down, 4 + across : 36 + across] = images[2]
            assert torch.equal(view, expected[:, 4:36, 4:36])
    elif family == "scale":  # a ramp has that slope, the other way round
        ramp = (4 * torch.arange(32)).to(torch.uint8).expand(6, 3, 32, 32)
        views, _ = encode(flat, ramp, *none, CPU, torch.float32, 7, data.test_index, data.test_apply)
        slope = views.view(6, 10, 3, 32, 32)[2, :, 0, 16].diff()[:, 10:20].mean(1) / 4
        assert (1 / slope).numpy() == pytest.approx(data.test_targets["scale"][20:30, 0].numpy(), abs=2e-3)
    elif family == "projective":
        t = data.test_targets["t"][20:30].double()  # of image 2
        t = t * torch.tensor([1, 1, 20, 1, 1, 20, 0.015, 0.015]) + torch.tensor([0, 0, 16, 0, 0, 16.0, 0, 0])
        expected = projective_warp(images[2:3].expand(10, -1, -1, -1).float(), t)
        assert (views[2] - expected).abs().gt(0.5).float().mean() < 0.01  # pixels on the border may fall either way
    elif family == "colour":
        brighter = views[2].mean((1, 2, 3)).sub(images[2].float().mean())
        assert torch.corrcoef(torch.stack([brighter, data.test_targets["brightness"][20:30, 0]]))[0, 1] > 0.8
    else:
        assert set(data.test_targets) >= {"crop position", "crop size"} and data.test_targets["crop size"].max() <= 1
        if family == "single":  # the crop is whole unless it is the kind, and each adjustment nothing
            changed = torch.cat([data.test_targets[name] for name in equivariance.COLOURS], 1) != 0
            assert torch.equal(changed, data.test_targets["kind"][:, 1:] > 0)
            whole = data.test_targets["crop size"].eq(1).all(1)
            assert whole[data.test_targets["kind"][:, 0] == 0].all() and not whole.all()


def views_of(images, family, border, n=200, fill=128.0):
    """images[0] under n transformations, in grey levels, and which of its pixels read a point inside of the image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equivariance, "warp_batch", partial(warp_batch, fill=fill))
        apply, *_ = FAMILIES[family](n, images.shape[3], torch.Generator().manual_seed(3), border)
    return apply(images, torch.zeros(n, dtype=torch.long), torch.arange(n), torch.ones(3), torch.zeros(3),
                 torch.float32)


@pytest.mark.parametrize("family", ["projective", "scale", "translation"])
def test_borders_show_the_same_inside_and_no_corner_outside(family):
    images = torch.randint(1, 255, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    grey, reflected = views_of(images, family, "grey"), views_of(images, family, "reflect")
    outside = views_of(torch.zeros_like(images), family, "grey") == 128
    assert outside.float().mean() > 0.05 and grey[outside].eq(128).all()
    assert (grey - reflected)[~outside].abs().max() < 0.05  # grey levels
    flat = torch.full_like(images, 77)
    assert (views_of(flat, family, "reflect") - 77).abs().max() < 1e-3
    for side in (8, 32, 33):  # nothing outside is ever read
        assert views_of(flat[..., :1, :1].expand(1, 3, side, side), family, "inside", n=20_000 // side).eq(77).all()


def test_a_reflected_image_goes_on_as_in_mirrors():
    """A ramp of 32 columns, moved 5 pixels to the right and to the left, and 50, beyond the mirror's own edge."""
    ramp, columns = torch.arange(32.0).expand(1, 1, 32, 32), torch.arange(32)
    for shift in (5, -5, 50):
        moved = equivariance.reflected_warp(ramp, torch.tensor([[1.0, 0, -shift, 0, 1, 0, 0, 0]]))
        mirror = torch.cat([torch.arange(32), torch.arange(31, -1, -1)])
        assert torch.allclose(moved[0, 0, 7], mirror[(columns - shift) % 64].float(), atol=1e-4)


def test_inside_is_a_zoom_after_the_transformation():
    """Of a ramp: its middle, enlarged, at the same place in all views; x itself is whole."""
    coefficients = torch.tensor([[1.1, 0.1, -2, 0.05, 0.9, 3, 0.002, -0.001]], dtype=torch.float64)
    images = 4 * torch.arange(32.0).expand(1, 1, 32, 32) + 2 * torch.arange(32.0)[:, None]
    small = projective_warp(images, equivariance.zoom(coefficients, 32, 0.5))
    whole = projective_warp(images, coefficients)[0, 0, 8:24, 8:24]
    assert torch.allclose(small[0, 0].view(16, 2, 16, 2).mean((1, 3)), whole, atol=0.05)


def test_the_penalty_is_chosen_on_images_of_its_own():
    data = evaluation_set(train_images=50, pairs=170)
    fit, held_out = (set(data.train_index[rows].tolist()) for rows in (~data.held_out, data.held_out))
    assert not fit & held_out and len(held_out) == 10 and len(fit) == 40
    assert evaluation_set(test_images=41).n == 40


# --------------------------------------------------------------------------------------------------- the methods' own


def save(path, method, model, encoder="nin", **config):
    config = {"encoder": encoder, "image_size": 8, "dataset": "digits", "mean": [0.5] * 3, "std": [0.3] * 3, **config}
    save_checkpoint(path, method, config, model, torch.optim.SGD(model.parameters(), lr=0.1), 1, {})
    return {"method": method, "config": config, "model": model.state_dict()}


def barber_agakov(steerable, seed=0):
    torch.manual_seed(seed)
    return VTEBarberAgakov(NIN(8), NIN(8), steerable=steerable).eval()


def small_stl():
    torch.manual_seed(1)
    return stl.STL(NIN(8, probabilistic=False)).eval()


@torch.no_grad()
@pytest.mark.parametrize("steerable", [False, True])
def test_the_decoder_s_prediction_is_of_phase_one_and_chance_unless_it_sees_t(tmp_path, steerable):
    data, model = evaluation_set(test_images=10, size=8), barber_agakov(steerable)
    checkpoint = save(tmp_path / "ba.ckpt", "vte_ba", model, steerable=steerable)
    target, predict, read = equivariance.barber_agakov_map(checkpoint, "ba.ckpt")
    images = torch.rand(3, 3, 8, 8)
    assert read is None and torch.equal(target(images)[0], model.phase_one(images)[0])
    x, z = noise(10, 512), noise(10 * PER_IMAGE, 512, seed=2)
    ((name, predicted, candidates),) = predict(data, x, z)
    assert torch.equal(candidates[3, 4], z[3 * PER_IMAGE + 4])
    inputs = torch.cat([x[3], data.test_targets["t"][3 * PER_IMAGE + 4]]) if steerable else x[3]
    assert torch.allclose(predicted[3, 4], model.decoder(inputs[None])[0], atol=1e-5)
    assert ("never sees t" in name) != steerable
    if not steerable:
        measured, _ = equivariance.retrieval(data, predicted, candidates)
        for measure, chance in CHANCE.items():
            assert measured[measure].mean().item() == pytest.approx(chance, abs=1e-9)
    assert list(predict(evaluation_set("crop", test_images=10), x, z)) == []


@torch.no_grad()
def test_the_hypernetwork_takes_the_code_from_the_other_image(tmp_path):
    data, model = evaluation_set("crop", test_images=10, size=8), small_stl()
    checkpoint = save(tmp_path / "stl.ckpt", "stl", model, preset="code", inv=1.0, equi=1.0, trans=0.1,
                      probabilistic=False)
    target, predict, read = equivariance.hypernetwork_map(checkpoint, tmp_path / "stl.ckpt")
    x, tx = noise(10, 512), noise(10 * PER_IMAGE, 512, seed=2)
    (name, predicted, candidates), (projected, after, goal) = predict(data, x, tx)
    assert target is None and (name, projected) == ("hypernetwork", "hypernetwork, projected")
    for image, other in ((4, 5), (5, 4)):
        code = model.encode_transformation(x[other][None], tx[other * PER_IMAGE + 7][None])
        assert torch.equal(code, read(x[other][None], tx[other * PER_IMAGE + 7][None]))
        expected = model.hypernetwork(code, x[image][None])[0]
        assert torch.allclose(predicted[image, 7], expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
        assert torch.equal(candidates[image, 7], tx[image * PER_IMAGE + 7])
        assert torch.allclose(goal[image, 7], model.equi_projector(candidates[image, 7][None])[0], atol=1e-4)
        assert torch.allclose(after[image, 7], model.equi_projector(predicted[image, 7][None])[0], atol=1e-4)


# ------------------------------------------------------------------------------------------------------- the controls


def test_under_turns_the_steerable_control_gets_full_marks_and_the_invariant_one_chance(tmp_path, monkeypatch):
    save(tmp_path / "ba.ckpt", "vte_ba", barber_agakov(False), steerable=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["equivariance.py", "ba.ckpt", "--transformations", "rotation", "--rows",
                                     "baselines", "--images", "130", "--pairs", "500"])
    rows, _, _ = equivariance.probe_equivariance(equivariance.parse_args(), CPU)

    def found(method, measure, **of):
        (row,) = [row for row in rows if row["method"].startswith(method) and row["measure"] == measure
                  and all(row.get(name) == value for name, value in of.items()) and row["features"] != "sample"]
        assert row["per_image"] == 4
        return row["value"]

    for score, chance in (("MRR", (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4), ("H@1", 1 / 4)):
        assert found("steerable", score, map="ridge") == 1
        assert found("invariant", score, map="ridge") == pytest.approx(chance, abs=1e-12)
        for other in ("random encoder", "raw pixels"):
            assert chance < found(other, score, map="ridge") <= 1
    assert found("invariant", "share", part="invariant") == pytest.approx(1, abs=1e-9)
    assert found("invariant", "moved") == pytest.approx(0, abs=1e-9)
    assert found("steerable", "share", part="unexplained") < 0.25 * found("random", "share", part="unexplained")


@torch.no_grad()
def test_a_turn_of_the_image_permutes_the_steerable_control():
    control, images = equivariance.FourTurns(8, 0), torch.rand(2, 3, 8, 8)
    stacked, turned = (control(of).unflatten(1, (4, -1)) for of in (images, images.rot90(1, (2, 3))))
    assert torch.allclose(turned, stacked.roll(-1, 1), atol=1e-6) and not torch.allclose(turned, stacked, atol=1e-4)
    average = stacked.mean(1)
    assert torch.allclose(equivariance.average_of_turns(stacked.flatten(1)), average, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- the blocks


@torch.no_grad()
def test_the_blocks_are_the_outputs_of_the_trunk_s_own(monkeypatch, tmp_path):
    """Each block's rows are those of an encoder that ends there, the classifier's those of scikit-learn's k-NN."""
    torch.manual_seed(0)
    encoder, images = NIN(8).eval(), torch.rand(4, 3, 8, 8)
    blocks, seen = equivariance.Blocks(encoder.trunk), []
    for part in encoder.trunk:
        if isinstance(part, torch.nn.Sequential):
            part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    side = {0: 8, 1: 8, 2: 8, 3: 4, 4: 4, 5: 4}
    found = blocks(images).split([4 * width for width in (192, 160, 96, 192, 192, 8)], 1)
    for number, (output, pooled) in enumerate(zip(seen, found, strict=True)):
        half = side[number] // 2
        quarters = [output[:, :, i : i + half, j : j + half].mean((2, 3)) for i in (0, half) for j in (0, half)]
        assert torch.allclose(pooled, torch.stack(quarters, 2).flatten(1), atol=1e-5)

    save(tmp_path / "ba.ckpt", "vte_ba", barber_agakov(False), steerable=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first.py").write_text("""
from torch import nn
from common import load_checkpoint, load_encoder

def block():
    encoder = load_encoder(load_checkpoint("ba.ckpt"), "ba.ckpt")
    return nn.Sequential(*encoder.trunk[:2], nn.AdaptiveAvgPool2d(2), nn.Flatten())
""")
    monkeypatch.setattr("sys.argv", ["equivariance.py", "ba.ckpt", "first.py:block", "--image-size", "8", "--mean",
                                     *["0.5"] * 3, "--std", *["0.3"] * 3, "--rows", "checkpoints", "--layers",
                                     "--transformations", "scale", *FEW])
    rows, tables, _ = equivariance.probe_equivariance(equivariance.parse_args(), CPU)
    of_blocks = [row for row in rows if "block" in row]
    assert [row["block"] for row in of_blocks if row["measure"] == "k-NN error"] == [1, 2, 3, 4, 5, 6]
    second, alone = ({row["part"]: row["value"] for row in of if row["measure"] == "share"} for of in (
        [row for row in of_blocks if row["block"] == 2], [row for row in rows if row["method"] == "block"]))
    assert second == pytest.approx(alone, abs=1e-4)
    assert tables[-1].headings[2:] == ["k-NN error", "invariant", "equivariant", "the same for all images"]
    assert [line[1] for line in tables[-1].lines[:6]] == [f"block {number}" for number in range(1, 7)]


@torch.no_grad()
def test_the_hypernetwork_fed_by_labels_takes_them_from_the_transformation(tmp_path, monkeypatch):
    """The code of test image 4 under t: from the labels of no transformation and of t as it was drawn."""
    seen, draw = [], equivariance.sample_transformations
    monkeypatch.setattr(equivariance, "sample_transformations", lambda *args: seen.append(draw(*args)) or seen[-1])
    data = evaluation_set("crop", test_images=10, size=8)
    torch.manual_seed(1)
    model = stl.STL(NIN(8, probabilistic=False), losses=("inv", "equi"), code="labels", learn="all").eval()
    checkpoint = save(tmp_path / "a.ckpt", "stl_labels", model, preset="code", inv=1.0, equi=1.0, code="labels",
                      learn="all", probabilistic=False)
    _, predict, read = equivariance.hypernetwork_map(checkpoint, tmp_path / "a.ckpt")
    x, tx = noise(10, 512), noise(10 * PER_IMAGE, 512, seed=2)
    (_, predicted, candidates), (name, _, _) = predict(data, x, tx)
    assert read is None
    unchanged = unchanged_transformations(1, 8)
    moved = {**unchanged, "box": seen[1]["box"][2 * PER_IMAGE + 7][None]}  # images 4 and 5 are the third pair
    labels = [transformation_labels(which, 8, ("crop", "colour", "flip and blur")) for which in (unchanged, moved)]
    expected = model.hypernetwork(model.encode_transformation(*labels), x[4][None])[0]
    assert torch.allclose(predicted[4, 7], expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    assert name == "hypernetwork, projected" and torch.equal(candidates[4, 7], tx[4 * PER_IMAGE + 7])
    both = evaluation_set("colour", test_images=10, size=8)
    strengths = torch.cat([both.test_targets[name] for name in ("brightness", "contrast", "saturation", "hue")], 1)
    found = transformation_labels(both.test_parameters, 8, ("colour",))
    assert torch.allclose(found[:, :4], strengths * 0.4 / 0.20656, atol=2e-4)  # hue: .1 / .05164 is the same
    assert list(predict(evaluation_set("projective", test_images=10, size=8), x, tx)) == []  # no labels of these


# --------------------------------------------------------------------------------------------------------- the command


FEW = ["--images", "10", "--per-image", "12", "--pairs", "60"]


@pytest.fixture(scope="module")
def measured(module_folder):
    """Untrained models at the digits' own 8 pixels, measured in one command."""
    folder = module_folder
    save(folder / "ba.ckpt", "vte_ba", barber_agakov(False), steerable=False)
    save(folder / "stl.ckpt", "stl", small_stl(), preset="code", inv=1.0, equi=1.0, trans=0.1, probabilistic=False)
    result = run("equivariance.py", "ba.ckpt", "stl.ckpt", "--transformations", "projective", "crop", *FEW, "--compose",
                 "--json", "rows.json", cwd=folder)
    return folder, result.stdout, read_rows(folder / "rows.json")


def test_the_command_measures_every_row(measured):
    folder, printed, rows = measured
    representations = {(row["checkpoint"], row["method"], row["features"]) for row in rows}
    assert representations == {("ba.ckpt", "vte_ba", "sample"), ("ba.ckpt", "vte_ba", "mu"), ("stl.ckpt", "stl", None),
                               (None, "random encoder (nin)", "sample"), (None, "random encoder (nin)", "mu"),
                               (None, "steerable control", None), (None, "invariant control", None),
                               (None, "raw pixels", None)}
    for row in rows:
        assert row["low"] <= row["value"] <= row["high"] or row["low"] == pytest.approx(row["high"]), row
        assert row["test_images"] == 10 and row["per_image"] == 12 and row["dataset"] == "digits"
    learned = {(row["transformations"], row["map"]) for row in rows
               if row.get("map", "ridge") not in ("ridge", "t alone", "ceiling, mu of t(x)")}
    assert learned == {(family, name) for family in ("projective", "crop")
                       for name in ("code of t", "hypernetwork", "hypernetwork, projected")} | {("projective",
                                                                                    "decoder, which never sees t")}
    (blind,) = [row for row in rows if row.get("map") == "decoder, which never sees t" and row["measure"] == "MRR"
                and row["features"] == "mu"]
    assert blind["value"] == pytest.approx(sum(1 / rank for rank in range(1, 13)) / 12, abs=1e-9)
    assert blind["low"] == pytest.approx(blind["high"]) and len(blind["ranks"]) == 12
    for shown in ("knowing the rotation", "its hypernetwork, projected", "its decoder, which never sees t",
                  "95 % interval, at most", "Crop transformations", "z sampled", "the same for all images"):
        assert shown in printed
    written = json.loads((folder / "rows.json").read_text())
    assert written["made_with"]["seconds"] > 0 and "equivariance.py ba.ckpt" in written["made_with"]["command"]


def printed_tables(printed):
    """{title: {first cell and features: {heading: cell}}}"""
    tables = {}
    for title, text in re.findall(r"\n([^\n]+)\n\n(\|.*?)\n(?=\n)", printed, re.DOTALL):
        headings, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        tables[title] = {tuple(line[:2]): dict(zip(headings, line, strict=True)) for line in lines}
    return tables


def test_the_tables_hold_the_rows(measured):
    _, printed, rows = measured
    tables = printed_tables(printed)
    assert list(tables) == [f"{family} transformations, {question}" for family in ("Projective", "Crop")
                            for question in ("shares of the variance of f(t(x))", "predicted from x and t(x)",
                                             "predicted from t(x) alone", "retrieval and movement",
                                             "does the map compose")]
    assert all(len(line) <= 6 for table in tables.values() for line in table.values())
    line = "vte_ba (ba.ckpt)", "mu"
    for question, heading, name, target, source in (
            ("predicted from x and t(x)", "t R²", "R2", "t", "x and t(x)"),
            ("predicted from t(x) alone", "t R²", "R2", "t", "t(x)"),
            ("shares of the variance of f(t(x))", "invariant", "share", "invariant", None),
            ("predicted from t(x) alone", "rotation", "accuracy", "rotation", "t(x)"),
            ("retrieval and movement", "excess H@1", "excess H@1", None, None),
            ("retrieval and movement", "moved", "moved", None, None)):
        (row,) = [row for row in rows if (row["measure"], row.get("target") or row.get("part"), row.get("from")) == (
            name, target, source) and row["checkpoint"] == "ba.ckpt" and row["features"] == "mu"
            and row["transformations"] == "projective"]
        assert tables[f"Projective transformations, {question}"][line][heading] == f"{row['value']:.3f}"
    crop = tables["Crop transformations, predicted from x and t(x)"]
    assert ("knowing the rotation", "") not in crop
    assert crop["knowing nothing", ""]["crop position R²"] == "0.000"


def test_what_knowing_nothing_and_the_rotation_score_is_computed(measured):
    errors = reference_errors()
    tables = printed_tables(measured[1])
    predicted, retrieved = (tables[f"Projective transformations, {question}"] for question in (
        "predicted from x and t(x)", "retrieval and movement"))
    explained = 1 - errors["rotation_only"] / errors["constant_predictor"]
    assert predicted["knowing the rotation", ""]["t R²"] == f"{explained:.3f}"
    assert predicted["knowing nothing", ""]["rotation"] == "0.250"
    assert retrieved["knowing nothing", ""]["H@1"] == f"{1 / 12:.3f}" and ("knowing the rotation", "") not in retrieved


def test_the_same_seed_measures_the_same_whatever_stands_beside(measured, monkeypatch):
    folder, _, rows = measured
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["equivariance.py", "stl.ckpt", *FEW, "--compose", "--rows", "checkpoints"])
    again, _, _ = equivariance.probe_equivariance(equivariance.parse_args(), CPU)
    before, found = ([row["value"] for row in of if row["checkpoint"] == "stl.ckpt"
                      and row["transformations"] == "projective"] for of in (rows, again))
    assert found == pytest.approx(before, abs=1e-6) and len(found) > 10
    families = {(row["checkpoint"], row["transformations"]) for row in again}
    assert {family for name, family in families if name == "stl.ckpt"} == {"projective", "crop", "colour"}  # by default


@pytest.mark.parametrize("flags, says", [
    (["--classifiers", "knn"], "unrecognized arguments: --classifiers"),
    (["--per-image", 4], "argument --per-image: '4' is not a number from 10 to 1,000,000"),
    (["--json", "table.txt"], "give a file that ends in .json"),
    (["--json", "no/folder.json"], "in a folder that is there"),
    (["--transformations", "shear"], "invalid choice"),
])
def test_wrong_flags_are_one_sentence(tmp_path, flags, says):
    refused("equivariance.py", "pt.ckpt", *flags, cwd=tmp_path, code=2, says=says)


def test_the_flag_that_the_command_was_names_the_command(tmp_path):
    refused("probe.py", "--equivariance", "pt.ckpt", "--images", 20, cwd=tmp_path, code=2,
            says="python equivariance.py pt.ckpt --images 20")


def test_too_few_images_and_foreign_weights_are_one_sentence(tmp_path):
    for split, n in (("train", 12), ("test", 4)):
        for label in "ab":
            (tmp_path / "tiny" / split / label).mkdir(parents=True)
            for i in range(n):
                picture = np.full((8, 8, 3), 9 * i, dtype=np.uint8)
                Image.fromarray(picture).save(tmp_path / "tiny" / split / label / f"{i}.png")
    save(tmp_path / "ba.ckpt", "vte_ba", barber_agakov(False))
    refused("equivariance.py", "ba.ckpt", "--dataset", "tiny", cwd=tmp_path, code=1,
            says="has 8 test images: measuring equivariance takes 10 or more")
    save(tmp_path / "other.ckpt", "vte_ba", barber_agakov(True), steerable=False)
    refused("equivariance.py", "other.ckpt", "--images", 10, "--per-image", 10, "--pairs", 20, cwd=tmp_path, code=1,
            says="do not fit the VTEBarberAgakov")


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "study"))
    import figures

    return figures


def test_the_region_that_is_seen_is_where_the_corners_read(figures):
    for size in (32, 8):
        _, corners = sample_corners(50, size, torch.Generator().manual_seed(0))
        coefficients = coefficients_from_corners(corners, size)
        seen = figures.seen_region(transformation_target(coefficients, size), size)
        a, b, c, d, e, f, g, h = coefficients.unbind(1)
        for number, (x, y) in enumerate([(0, 0), (size, 0), (size, size), (0, size)]):
            u, v = (a * x + b * y + c) / (g * x + h * y + 1), (d * x + e * y + f) / (g * x + h * y + 1)
            assert torch.stack([u, v], 1).numpy() == pytest.approx(seen[:, number].numpy(), abs=1e-6)


def test_transformations_are_decoded_as_the_methods_do(figures, tmp_path):
    torch.manual_seed(2)
    models = {"predictive_transform": PredictiveTransform(NIN(8)).eval(), "avt": AVT(NIN(8)).eval()}
    images = torch.randint(0, 256, (5, 3, 8, 8)).to(torch.uint8)
    coefficients = sample_coefficients(5, 8, torch.Generator().manual_seed(0))
    for method, model in models.items():
        with torch.no_grad():
            model.encoder.logvar.bias.fill_(-60)  # no noise: the sampled z is mu
            normal, moved = ((picture.float() / 255 - 0.5) / 0.3 for picture in
                             (images, projective_warp(images.float(), coefficients)))
            expected = (model(moved) if method == "predictive_transform" else model(normal, moved))[0]
        save(tmp_path / "a.ckpt", method, model)
        found = figures.decode_transformations(tmp_path / "a.ckpt", images, coefficients)
        assert found[0] == method and torch.allclose(found[1], expected, atol=1e-4)


def test_the_pictures_are_drawn_and_refuse_what_they_cannot_draw(figures, measured, monkeypatch):
    folder, _, _ = measured
    save(folder / "pt.ckpt", "predictive_transform", PredictiveTransform(NIN(8)))
    save(folder / "avt.ckpt", "avt", AVT(NIN(8)))
    monkeypatch.chdir(folder)
    for name, *flags in (("shares", "rows.json", "--features", "sample"),
                         ("decoded", "pt.ckpt", "avt.ckpt", "--columns", "3")):
        monkeypatch.setattr("sys.argv", ["figures.py", name, *flags, "--output", f"{name}.png"])
        figures.main()
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    refused("study/figures.py", "shares", "rows.json", "--transformations", "scale", cwd=folder, code=1,
            says="rows.json: no shares under scale transformations")
    refused("study/figures.py", "shares", "avt.ckpt", cwd=folder, code=1,
            says="is no file that --json of probe.py or equivariance.py wrote")
    refused("study/figures.py", "decoded", "ba.ckpt", cwd=folder, code=1, says="decodes no transformation")
