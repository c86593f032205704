"""The probe: its subsets, its classifiers on representations with known answers, its rows."""

import json
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import probe
from common import NIN, UserError, save_checkpoint
from predictive_transform import PredictiveTransform
from probe import Representation, Settings, balanced_subset, choose_subsets, errors_of

SETTINGS = Settings(passes=5, seed=0, device=torch.device("cpu"), dtype=torch.float32, epochs=3)


def planted(separation, noise_logvar, n=600, classes=3, dimensions=8, features="sample", seed=0):
    """Class means `separation` apart along the axes, and the encoder's sigma: training and test features, labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2 * n) % classes
    mu = separation * torch.eye(dimensions)[labels] + 0.1 * torch.randn(2 * n, dimensions, generator=generator)
    logvar = torch.full_like(mu, noise_logvar)
    train, test = (mu[:n], logvar[:n]), (mu[n:], logvar[n:])
    return Representation("a.ckpt", "planted", features, train, test), labels[:n], labels[n:]


def run(classifier, representation, train_labels, test_labels, **settings):
    index, settings = torch.arange(len(train_labels)), SETTINGS._replace(**settings)
    return errors_of(classifier, representation, index, train_labels, test_labels, settings)()


@pytest.mark.parametrize("classifier", ["mlp", "knn", "logistic", "linear"])
def test_separable_classes_are_told_apart_and_random_features_are_chance(classifier):
    assert max(run(classifier, *planted(5.0, -8.0))) < 0.01
    chance = run(classifier, *planted(0.0, 0.0))
    assert len(chance) == 5 and all(0.55 < error < 0.78 for error in chance)  # 2/3, with 600 test images


@pytest.mark.parametrize("classifier", ["knn", "logistic"])
def test_sampling_noise_costs_what_it_should_and_mu_is_free_of_it(classifier):
    sampled = run(classifier, *planted(2.0, 0.0))  # unit noise, means 2 sqrt 2 apart: overlapping
    exact = run(classifier, *planted(2.0, 0.0, features="mu"))
    assert len(exact) == 1 and exact[0] < 0.01  # deterministic: one pass
    assert len(set(sampled)) > 1  # each pass draws its own z
    # The best possible classifier errs with probability P(some of two other coordinates exceeds its own): 0.14.
    assert 0.10 < np.mean(sampled) < 0.27


def test_knn_is_the_majority_of_five():
    """Against a brute-force vote."""
    representation, labels, test_labels = planted(0.8, -20.0, features="mu")
    distances = torch.cdist(representation.mu["test"].double(), representation.mu["train"].double())
    votes = labels[distances.topk(5, largest=False).indices]
    counts = torch.nn.functional.one_hot(votes, 3).sum(1)
    error = (counts.argmax(1) != test_labels).double().mean().item()  # ties go to the smaller label, as in scikit-learn
    assert run("knn", representation, labels, test_labels)[0] == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize("per_class", [False, True])
def test_linear_is_the_minimum_at_the_weight_that_validates_best(per_class, monkeypatch):
    """Against Newton's method from zero at each of the 45 weights: the sum of cross-entropies + w (|W|² + |b|²), on
    features of different scales and means."""
    representation, labels, test_labels = planted(0.25, -20.0, n=300, features="mu")
    for split in ("train", "test"):
        representation.mu[split] = 3 + representation.mu[split] * torch.logspace(-1, 1, 8)
    train, test = (np.c_[representation.mu[split].double().numpy(), np.ones(300)] for split in ("train", "test"))
    truth, fits, fit = labels.numpy(), [], probe.fit_linear

    def minimum(features, target, weight):
        def objective(flat):
            w = flat.reshape(3, 9)
            logits = features @ w.T
            logits -= logits.max(1, keepdims=True)
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            loss = -np.log(p[np.arange(len(target)), target]).sum() + weight * (w**2).sum()
            gap = p - np.eye(3)[target]
            hessian = [[features.T @ (features * (p[:, c] * ((c == d) - p[:, d]))[:, None]) for d in range(3)]
                       for c in range(3)]
            return loss, (gap.T @ features + 2 * weight * w).ravel(), np.block(hessian) + 2 * weight * np.eye(27)

        flat = np.zeros(27)
        for _ in range(60):  # each step is halved until it descends
            loss, gradient, hessian = objective(flat)
            if np.abs(gradient).max() < 1e-8:
                break
            step = np.linalg.solve(hessian, gradient)
            while np.abs(step).max() > 1e-14 and objective(flat - step)[0] > loss:
                step = step / 2
            flat = flat - step
        assert np.abs(gradient).max() < 1e-7
        return flat.reshape(3, 9), loss

    def recorded(weights, features, labels, weight, curvature):
        result = fit(weights, features, labels, weight, curvature)
        loss = torch.nn.functional.cross_entropy(features @ result.T, labels, reduction="sum")
        fits.append((weight, (loss + weight * result.square().sum()).item(), len(features), weights, result))
        return result

    monkeypatch.setattr(probe, "fit_linear", recorded)
    (error,) = run("linear", representation, labels, test_labels, per_class=per_class)
    held_out = probe.hold_out(labels, 0.1, 0).numpy()
    assert np.bincount(truth[held_out]).tolist() == [10, 10, 10]
    wrong = []
    for weight, (found, loss, n, *_) in zip(np.logspace(-6, 5, 45), fits, strict=False):
        best, least = minimum(train[~held_out], truth[~held_out], weight)
        assert found == pytest.approx(weight) and n == 270 and loss == pytest.approx(least, rel=1e-7, abs=1e-5)
        wrong.append(probe.error_rate((train[held_out] @ best.T).argmax(1), truth[held_out], per_class))
    chosen = int(np.argmin(wrong))  # the first, which is the weakest
    assert len(fits) == 46 and wrong.count(min(wrong)) > 1 and len(set(wrong)) > 2
    weight, loss, n, start, _ = fits[-1]
    best, least = minimum(train, truth, weight)
    assert weight == pytest.approx(np.logspace(-6, 5, 45)[chosen]) and n == 300
    assert loss == pytest.approx(least, rel=1e-7, abs=1e-5) and start is fits[chosen][-1]
    assert all(after[3] is before[4] for before, after in zip(fits[:44], fits[1:45], strict=True))
    expected = probe.error_rate((test @ best.T).argmax(1), test_labels.numpy(), per_class)
    assert error == pytest.approx(expected, abs=1e-9) and 0 < expected < 0.6


@pytest.mark.parametrize("images_of, held_out_of", [
    ([50, 30, 20], [5, 3, 2]), ([2, 2, 2], [1, 1, 1]), ([30, 1, 20], [3, 0, 2]), ([3, 0, 4], [1, 0, 1])])
def test_a_tenth_of_each_class_is_held_out_and_a_class_of_one_image_is_fitted(images_of, held_out_of):
    labels = torch.arange(3).repeat_interleave(torch.tensor(images_of))
    held_out = probe.hold_out(labels, 0.1, seed=0)
    assert labels[held_out].bincount(minlength=3).tolist() == held_out_of
    assert torch.equal(held_out, probe.hold_out(labels, 0.1, seed=0))
    assert sum(images_of) < 50 or not torch.equal(held_out, probe.hold_out(labels, 0.1, seed=1))


def test_a_validation_split_of_the_data_is_what_chooses_and_absent_classes_are_never_predicted(monkeypatch):
    representation, labels, test_labels = planted(5.0, -8.0, n=90, features="mu")
    seen, fit = [], probe.fit_linear
    monkeypatch.setattr(probe, "fit_linear", lambda weights, features, *rest: (
        seen.append((len(features), len(weights))), fit(weights, features, *rest))[1])
    own = torch.arange(90) >= 60
    assert run("linear", representation, 2 * labels, 2 * test_labels, validation=own) == [0.0]
    assert seen == 45 * [(60, 3)] + [(90, 3)]


def test_a_strong_weight_is_chosen_where_features_are_noise():
    """40 labels, 200 useless dimensions and a weak one: without the L2 weight the classifier overfits."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 2
    features = torch.randn(2000, 200, generator=generator)
    features[:, 0] = 3 * (2 * labels - 1) + torch.randn(2000, generator=generator)
    representation = Representation("a.ckpt", "planted", "mu", (features[:400], None), (features[400:], None))
    index = torch.arange(80)
    chosen, logistic = (errors_of(classifier, representation, index, labels[:400], labels[400:], SETTINGS)()[0]
                        for classifier in ("linear", "logistic"))
    assert chosen < min(0.1, logistic)


def test_the_error_by_classes_weighs_each_class_alike():
    labels = np.array([0] * 90 + [1] * 10)
    assert probe.error_rate(np.zeros(100, dtype=int), labels, per_class=False) == pytest.approx(0.1)
    assert probe.error_rate(np.zeros(100, dtype=int), labels, per_class=True) == pytest.approx(0.5)


def test_balanced_subsets():
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[order]
    sixty, thirty, ten = (balanced_subset(labels, n, seed=0) for n in (60, 30, 10))
    assert labels[sixty].bincount().tolist() == [20, 20, 20] and len(sixty.unique()) == 60
    assert set(thirty.tolist()) < set(sixty.tolist()) and set(ten.tolist()) < set(thirty.tolist())
    assert labels[ten].bincount().tolist() == [4, 3, 3]
    assert balanced_subset(labels, 63, seed=0) is None  # class 2 has but 20
    assert balanced_subset(labels, 2, seed=0) is None  # not one of each
    assert balanced_subset(labels, 100, seed=0).tolist() == list(range(100))  # all there is
    assert not torch.equal(balanced_subset(labels, 30, seed=1).sort().values, thirty.sort().values)
    assert (2 * labels)[balanced_subset(2 * labels, 7, seed=0)].bincount().tolist() == [3, 0, 2, 0, 2]  # 1, 3: empty


def test_sizes_that_the_data_cannot_give_are_left_out_with_a_note():
    labels = torch.arange(100) % 2
    subsets, notes = choose_subsets(labels, [50000, 40, 10, 10], 0, "pets")
    assert list(subsets) == [40, 10] and len(notes) == 1 and "50,000" in notes[0] and "left out" in notes[0]
    with pytest.raises(UserError, match="--train-sizes 2 is less than an image for each of the 3 classes of pets"):
        choose_subsets(torch.arange(9) % 3, [2, 1], 0, "pets")
    subsets, notes = choose_subsets(labels, [50000, 5000], 0, "pets")
    assert list(subsets) == [100] and "all 100 training images are used" in notes[-1]


def test_random_encoder_is_calibrated_on_the_images():
    images = torch.randint(0, 256, (300, 3, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    config = {"encoder": "nin", "image_size": 12, "mean": [0.5] * 3, "std": [0.25] * 3}
    arguments = (images, config, 0, torch.device("cpu"), torch.float32)
    encoder = probe.random_encoder(*arguments)
    assert not encoder.training
    assert {norm.momentum for norm in encoder.modules() if isinstance(norm, torch.nn.BatchNorm2d)} == {0.1}  # finetuned
    weights = dict(encoder.named_parameters())
    torch.manual_seed(0)
    assert all(torch.equal(weights[name], value) for name, value in NIN(12).named_parameters())  # untrained
    first = encoder.trunk[0]
    normal = (images.float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = first[0](normal)
    assert torch.allclose(first[1].running_mean, expected.mean((0, 2, 3)), atol=1e-3)
    assert torch.allclose(first[1].running_var, expected.var((0, 2, 3)), rtol=0.02)
    before = encoder(normal[:8])[0]
    first[1].running_mean.add_(3.0)
    images, config, _, *where = arguments
    assert torch.allclose(probe.calibrated(encoder, images, config, *where)(normal[:8])[0], before, atol=1e-4)


def test_large_images_are_encoded_in_smaller_batches():
    """A step's memory is that of 500 images of 32 pixels at any size; every image is encoded once."""
    pixels = []

    class Mean(torch.nn.Module):
        def forward(self, images):
            pixels.append(images[:, 0].numel())
            return images.mean((2, 3))

    for size, n in ((32, 1001), (96, 120), (224, 25)):
        pixels.clear()
        images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
        mu, _ = probe.encode(Mean(), images, (0, 0, 0), (1, 1, 1), torch.device("cpu"), torch.float32)
        assert torch.allclose(mu, images.float().mean((2, 3)) / 255, atol=1e-5)
        assert max(pixels) <= 500 * 32**2 and len(pixels) <= n * size**2 / (500 * 32**2) + 2


def test_encode_normalises_and_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    encoder = NIN().eval()
    images = torch.randint(0, 256, (7, 3, 32, 32)).to(torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    mu, logvar = probe.encode(encoder, images, mean, std, torch.device("cpu"), torch.float32, batch_size=3)
    normal = (images.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        expected = encoder(normal)
    assert torch.allclose(mu, expected[0], atol=1e-4) and torch.allclose(logvar, expected[1], atol=1e-4)

    class Deterministic(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    features, nothing = probe.encode(Deterministic(), images, mean, std, torch.device("cpu"), torch.float32)
    assert nothing is None and torch.allclose(features, normal.mean((2, 3)), atol=1e-4)


def test_broken_weights_are_named():
    mu = torch.zeros(4, 2)
    with pytest.raises(UserError, match="features of a.ckpt are not finite"):
        Representation("a.ckpt", "vte_ba", "mu", (mu / 0, mu), (mu, mu))
    with pytest.raises(UserError, match="not finite"):
        Representation("a.ckpt", "vte_ba", "sample", (mu, mu + 1000), (mu, mu))
    for broken in (mu / 0, mu + torch.inf, mu - 1e20):  # of the test images alone
        with pytest.raises(UserError, match="not finite"):
            Representation("a.ckpt", "vte_ba", "mu", (mu, mu), (broken, mu))


ROW = {"checkpoint": "a.ckpt", "method": "stl", "features": None, "classifier": "linear", "error_mean": 0.25,
       "error_std": 0.0, "passes": 1}


def test_a_cell_that_was_left_out_is_empty(capsys):
    rows = [{**ROW, "train_size": 500}, {**ROW, "train_size": 5000, "error_std": 0.01, "passes": 2},
            {**ROW, "train_size": 500, "checkpoint": None, "method": "raw pixels"}]
    tables = probe.make_tables(rows)
    probe.print_tables(tables, ["a note"])
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "raw pixels" in line]
    assert [cell.strip() for cell in line.split("|")] == ["", "raw pixels", "", "", "0.250", ""]
    assert len({len(line) for line in shown.splitlines() if line.startswith("|")}) == 1  # columns are aligned
    assert "| 0.250 ± 0.010 | 0.250 |" in shown and "\n- a note\n" in shown


def test_what_json_holds_is_read_again_and_the_older_list_too(tmp_path):
    rows, path = [{**ROW, "train_size": size} for size in (500, 50)], tmp_path / "rows.json"
    probe.write_json(rows, path, {"commit": "abc"})
    assert json.loads(path.read_text()) == {"version": 1, "made_with": {"commit": "abc"}, "rows": rows}
    assert path.read_text().count("\n") == 5  # one row a line
    assert probe.read_rows(path) == rows
    path.write_text(json.dumps(rows))
    assert probe.read_rows(path) == rows
    for wrong in ("{", "{}", "3", "[3]", '[{"loss": 1}]', '{"rows": 3}', '"rows"', '{"rows": null}', '["method"]'):
        path.write_text(wrong)
        with pytest.raises(UserError, match="is no file that --json of probe.py or equivariance.py wrote"):
            probe.read_rows(path)
    with pytest.raises(UserError, match="none.json' is no file"):
        probe.read_rows(tmp_path / "none.json")


def test_fits_side_by_side_come_in_order_and_few_ahead():
    started = []

    def functions():
        for i in range(20):
            started.append(i)
            yield lambda i=i: (time.sleep(0.002 * (i % 3)), i)[1]

    for i, result in enumerate(probe.run_ahead(functions(), workers=2)):
        assert result == i and len(started) <= i + 3


def colours(n, seed=0):
    """Images (n, 3, 16, 16) uint8 whose class, one of 3, is the channel that is brightest."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 128, (n, 3, 16, 16), generator=generator)
    images[torch.arange(n), labels] += 64
    return images.to(torch.uint8), labels


def test_finetuning_learns_and_leaves_the_encoder_alone(monkeypatch):
    monkeypatch.setattr(probe, "MLP_BATCH", 16)
    torch.manual_seed(0)
    (images, labels), (test_images, test_labels) = colours(96), colours(60, seed=1)
    encoder, config = NIN(16), {"mean": [0.4] * 3, "std": [0.2] * 3}
    with torch.no_grad():
        for parameter in encoder.mu.parameters():  # frozen, these features are of no use
            parameter.zero_()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    network = encoder, config, images, test_images
    representation = Representation("a", "pt", "mu", *([(torch.zeros(n, 512), None) for n in (96, 60)]), network)
    (error,) = run("finetuned", representation, labels, test_labels, epochs=4)
    for classifier in ("mlp", "released"):
        (frozen,) = run(classifier, representation, labels, test_labels)
        assert error < 0.1 and frozen > 0.6
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_the_released_mlp_learns_from_the_encoders_mu_of_cropped_images():
    """An encoder whose mu is each channel's mean tells the colours apart; its statistics stay as they were."""
    class Means(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, images):
            seen.append(images)
            mu = self.norm(images).mean((2, 3))
            return mu, torch.full_like(mu, 5.0)  # noise that mu is free of

    seen, (images, labels), (test_images, test_labels) = [], colours(600), colours(60, seed=1)
    encoder, config = Means().eval(), {"mean": [0.4] * 3, "std": [0.2] * 3}
    network = encoder, config, images, test_images
    representation = Representation("a", "pt", "mu", *([(torch.zeros(n, 3), None) for n in (600, 60)]), network)
    (error,) = run("released", representation, labels, test_labels, epochs=10)
    assert error < 0.05 and encoder.norm.num_batches_tracked == 0
    assert [len(batch) for batch in seen] == 10 * [256, 256, 88] + [60]
    black = -torch.tensor(config["mean"]) / torch.tensor(config["std"])
    assert (seen[0] == black[:, None, None]).all(1).any()  # crops reach beyond the border


# --------------------------------------------------------------------------------------------------------- the command


def make_folder(folder, classes=("cat", "dog", "eel"), n=6):
    """Pictures of 8 pixels, a grey level for each class."""
    for split in ("train", "test"):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                grey = np.full((8, 8, 3), 80 * number + 5 * i, dtype=np.uint8)
                Image.fromarray(grey).save(folder / split / name / f"{i}.png")
    return folder


def untrained(path, **config):
    torch.manual_seed(0)
    model = PredictiveTransform(NIN(8))
    config = {"encoder": "nin", "image_size": 8, "dataset": "digits", "mean": [0.5] * 3, "std": [0.3] * 3, **config}
    save_checkpoint(path, "predictive_transform", config, model, torch.optim.SGD(model.parameters(), 0.1), 1, {})


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, flags)])
    return probe.parse_args()


def test_an_empty_class_is_named_once_and_is_no_chance(tmp_path, monkeypatch):
    make_folder(tmp_path / "pets")
    untrained(tmp_path / "a.ckpt", dataset=str(tmp_path / "pets"))
    args = command(monkeypatch, tmp_path / "a.ckpt", "--classifiers", "knn", "linear", "--train-sizes", 12, 4, 2)
    shutil.rmtree(tmp_path / "pets" / "train" / "dog")
    (tmp_path / "pets" / "train" / "dog").mkdir()  # a folder, and nothing in it
    rows, _, notes = probe.probe(args, torch.device("cpu"))
    assert {(row["classifier"], row["train_size"]) for row in rows} == {
        ("knn", 12), ("knn", 4), ("knn", 2), ("linear", 12), ("linear", 4)}
    (note,) = [note for note in notes if "dog" in note]
    assert "no training image is of dog" in note and "its test images, 6, count as errors" in note
    assert "on the 18 test images" in notes[0] and "chance is 0.500" in notes[0]
    pixels = next(row for row in rows if row["method"] == "raw pixels" and row["classifier"] == "knn")
    assert pixels["train_size"] == 12 and pixels["error_mean"] == pytest.approx(1 / 3)  # the dogs


def test_a_data_set_that_is_not_where_it_was_trained_on_is_one_sentence(tmp_path, monkeypatch):
    untrained(tmp_path / "a.ckpt", dataset="data/pets")
    args = command(monkeypatch, tmp_path / "a.ckpt", "--classifiers", "knn", "--train-sizes", 6)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no folder 'data/pets' here.*a.ckpt.*--dataset DIR gives another") as error:
        probe.probe(args, torch.device("cpu"))
    assert error.value.exit_code == 2
    make_folder(tmp_path / "data" / "pets")
    rows, tables, notes = probe.probe(args, torch.device("cpu"))
    assert len(rows) == 5 and [table.title for table in tables] == ["k-NN"]
    shutil.move(tmp_path / "data" / "pets", tmp_path / "moved")
    args.dataset = str(tmp_path / "moved")
    again, _, _ = probe.probe(args, torch.device("cpu"))
    assert [row["error_mean"] for row in again] == [row["error_mean"] for row in rows]


def test_what_the_numbers_are_is_said_once(tmp_path, monkeypatch, capsys):
    untrained(tmp_path / "a.ckpt")
    args = command(monkeypatch, tmp_path / "a.ckpt", "--classifiers", "knn", "--train-sizes", 20, "--passes", 2,
                   "--json", tmp_path / "a.json")
    probe.run_evaluation(args, probe.probe)
    shown = capsys.readouterr().out
    for said in ("numbers are error rates on the 355 test images of digits; chance is 0.900", "mu: the mean of z",
                 "z sampled: drawn from N(mu, sigma²)", "k-NN: K = 5", "over 2 passes", "seed 0"):
        assert shown.count(said) == 1, said
    assert "before mu" not in shown  # no row has it
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["made_with"]["seconds"] > 0 and written["made_with"]["gpu"] is None
    assert {"command", "processor", "threads", "python", "torch", "commit"} < written["made_with"].keys()
    assert len(written["rows"]) == 5 and list(written["rows"][0]) == [
        "checkpoint", "method", "features", "classifier", "train_size", "error_mean", "error_std", "passes", "seed",
        "dataset", "mean_per_class"]


def test_equivariance_is_another_command(monkeypatch):
    with pytest.raises(UserError, match="python equivariance.py 'my pt.ckpt' --images 20") as error:
        command(monkeypatch, "--equivariance", "my pt.ckpt", "--images", 20)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
