"""The commands as a user types them: real processes, small budgets, every kind of bad input."""

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import ON_THE_CPU, shared_forks
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from test_common import make_folder, write_checkpoint

import common
import minter_warp
import predictive_transform
import stl
import vte_infonce
from common import load_checkpoint, load_encoder, load_images
from minter_warp import normalization, warp_batch
from probe import balanced_subset, read_rows

ROOT = Path(__file__).resolve().parent.parent
FEW = ["--dataset", "digits", "--image-size", "8", "--limit", "256", "--epochs", "1", "--batch-size", "64",
       "--lr", "5e-4"]


def run(*command, cwd, code=0, environment=None):
    """Runs `python script ...` and checks its exit code; no traceback whatever happens. What an environment changes is
    read at import, so such a process starts from nothing; the others are forked."""
    script, *rest = map(str, command)
    if environment:
        result = subprocess.run([sys.executable, str(ROOT / script), *rest], cwd=cwd, capture_output=True, text=True,
                                env={**os.environ, **ON_THE_CPU, **environment}, timeout=200)
    else:
        result = shared_forks().run(script, *rest, cwd=cwd)
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode == code, (result.stdout, result.stderr)
    return result


def in_this_process(script, *flags, cwd):
    """The script as __main__, but here, with whatever the test has patched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        patch.syspath_prepend(str((ROOT / script).parent))  # as Python does
        runpy.run_path(str(ROOT / script), run_name="__main__")


def refused(script, *flags, cwd, code, says, environment=None):
    """The command ends with this code and one sentence that holds `says`, and writes no checkpoint. It runs as
    __main__, but in this process: any exception but its own exit fails the test."""
    before = {path: path.stat().st_mtime_ns for path in Path(cwd).rglob("*.ckpt")}
    message = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(message), pytest.raises(SystemExit) as ended:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        patch.syspath_prepend(str((ROOT / script).parent))  # as Python does
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    lines = [line for line in message.getvalue().splitlines() if line.strip()]
    assert len(lines) == 1 and "error: " in lines[0] and says in lines[0], message.getvalue()
    assert ended.value.code == code
    assert {path: path.stat().st_mtime_ns for path in Path(cwd).rglob("*.ckpt")} == before


ROWS = [  # name, script and its own flags, the method its checkpoint names
    ("avt", ["avt.py"], "avt"),
    ("nce1", ["vte_infonce.py", "--pretrained", "pt.ckpt"], "vte_infonce_separated"),
    ("nce2", ["vte_infonce.py", "--critic", "concatenated", "--pretrained", "pt.ckpt"], "vte_infonce_concatenated"),
    ("steerable", ["vte_ba.py", "--steerable", "--pretrained", "pt.ckpt"], "vte_ba_steerable"),
    ("mean", ["vte_ba.py", "--mean-target", "--pretrained", "pt.ckpt"], "vte_ba_mean_target"),
    ("scratch", ["vte_ba.py", "--from-scratch"], "vte_ba_from_scratch"),
    ("nce-scratch", ["vte_infonce.py", "--from-scratch"], "vte_infonce_separated_from_scratch"),
]


@pytest.fixture(scope="module")
def trained(module_folder):
    """Both phases and the probe, each one command in one folder; every step's result."""
    folder = module_folder / "vte"
    folder.mkdir()
    results = {
        "pt": run("predictive_transform.py", *FEW, "--epochs", 2, "--output", "pt.ckpt", cwd=folder),
        "ba": run("vte_ba.py", "--pretrained", "pt.ckpt", *FEW, "--output", "ba.ckpt", cwd=folder),
        "probe": run("probe.py", "pt.ckpt", "ba.ckpt", "--train-sizes", 50000, 100, "--passes", 2,
                     "--classifiers", "knn", "logistic", "--json", "rows.json", cwd=folder),
    }
    return folder, results


def test_both_phases_and_the_probe(trained):
    folder, results = trained
    log = [json.loads(line) for line in (folder / "pt.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [1, 2]
    for row in log:
        assert row["squared_error"] == pytest.approx(2 * row["loss"], rel=1e-5)
        assert row["constant_predictor"] == pytest.approx(4.108, abs=0.01)
        assert row["rotation_only"] == pytest.approx(0.571, abs=0.003)
        assert row["images_per_second"] > 0 and abs(row["logvar"]) < 2
    assert results["pt"].stdout.count("epoch ") == 2
    assert "to compare with: constant_predictor 4.1" in results["pt"].stdout
    (row,) = [json.loads(line) for line in (folder / "ba.jsonl").read_text().splitlines()]
    assert {"loss", "explained", "logvar", "epoch"} <= set(row)


def test_rows_are_the_same_made_together_or_apart_and_those_before_mu_are_what_they_say(trained):
    folder, _ = trained
    flags = ["--train-sizes", 60, "--classifiers", "knn", "logistic", "--passes", 2, "--precision", "fp32",
             "--features", "sample", "mu", "trunk", "map2", "--calibrated"]
    made = {}
    for rows in ("all", "checkpoints", "baselines"):
        run("probe.py", "ba.ckpt", *flags, "--rows", rows, "--json", f"{rows}.json", cwd=folder)
        made[rows] = read_rows(folder / f"{rows}.json")
    assert sorted(map(str, made["all"])) == sorted(map(str, made["checkpoints"] + made["baselines"]))
    assert {row["method"] for row in made["baselines"]} == {"random encoder (nin)", "raw pixels"}
    assert {row["method"] for row in made["checkpoints"]} == {"vte_ba", "vte_ba, calibrated"}
    checkpoint = load_checkpoint(folder / "ba.ckpt")
    encoder = load_encoder(checkpoint, "ba.ckpt")
    features, seen = {"trunk": [], "map2": []}, []
    encoder.trunk[5].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    for split in ("train", "test"):
        images, labels, *_ = load_images("digits", split, image_size=8)
        chosen = balanced_subset(labels, 60, 0) if split == "train" else torch.arange(len(labels))
        scale, shift = normalization(checkpoint["config"]["mean"], checkpoint["config"]["std"])
        with torch.no_grad():
            before_mu = encoder.trunk(warp_batch(images, chosen, scale=scale, shift=shift))
        features["trunk"].append((before_mu, labels[chosen]))
        maps = seen.pop()
        assert maps.shape[1:] == (192, 4, 4)
        quarters = maps.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
        features["map2"].append((quarters.flatten(1), labels[chosen]))
    for kind, ((train, train_labels), (test, test_labels)) in features.items():
        predicted = KNeighborsClassifier(5, algorithm="brute").fit(train.numpy(), train_labels).predict(test.numpy())
        (row,) = [row for row in made["checkpoints"] if (row["features"], row["classifier"], row["method"])
                  == (kind, "knn", "vte_ba")]
        assert row["error_mean"] == pytest.approx((predicted != test_labels.numpy()).mean(), abs=0.003)  # one tie


def test_a_calibrated_row_leaves_the_row_beside_it_as_it_is(trained):
    """Classifiers that read images run after all encoders were prepared."""
    folder, _ = trained
    flags = ["--classifiers", "released", "--epochs", 2, "--features", "mu", "--train-sizes", 60]
    flags += ["--rows", "checkpoints"]
    made = []
    for more in ([], ["--calibrated"]):
        run("probe.py", "ba.ckpt", *flags, *more, "--json", "released.json", cwd=folder)
        made.append(read_rows(folder / "released.json"))
    assert [len(rows) for rows in made] == [1, 2] and made[1][0] == made[0][0]
    assert made[1][0]["error_mean"] != made[1][1]["error_mean"]


def test_every_other_method_trains_and_is_probed_in_one_table(trained):
    folder, _ = trained
    for name, command, _ in ROWS:
        run(*command, *FEW, "--output", f"{name}.ckpt", cwd=folder)
    checkpoints = ["pt.ckpt", "ba.ckpt", *(f"{name}.ckpt" for name, _, _ in ROWS)]
    said = run("probe.py", *checkpoints, "--train-sizes", 40, 20, "--passes", 2, "--classifiers", "knn", "logistic",
               "--json", "all.json", cwd=folder)
    rows = read_rows(folder / "all.json")
    assert {(r["checkpoint"], r["method"]) for r in rows} >= {(f"{name}.ckpt", method) for name, _, method in ROWS}
    assert len(rows) == 2 * 2 * (2 * 9 + 3)
    text = re.sub(" +", " ", said.stdout)  # the paper's layout: a table for each classifier, a column for each size
    assert text.count("| error, by training labels | features | 40 | 20 |") == 2
    for row in rows:
        title = {"knn": "\n\nk-NN\n", "logistic": "\n\nlogistic regression\n"}[row["classifier"]]
        table = text.split(title)[1].split("\n\n")[0].splitlines()
        (line,) = [line for line in table if f"({row['checkpoint']})" in line or line.startswith(f"| {row['method']} |")
                   if ("z sampled" in line) == (row["features"] == "sample")]
        assert f"{row['error_mean']:.3f}" in line

    def log(name):
        return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()][-1]

    for name in ("nce1", "nce2", "nce-scratch"):
        row = log(name)
        assert row["ceiling"] == pytest.approx(4.1589, abs=1e-3)  # log 64
        assert row["bound"] == pytest.approx(row["ceiling"] - row["loss"], abs=1e-4)
    assert all(log(name)["z_std"] > 0 for name, _, _ in ROWS) and "squared_error" in log("avt")


@pytest.mark.parametrize("script, method", [("vte_ba.py", "vte_ba"), ("vte_infonce.py", "vte_infonce_separated")])
def test_an_untrained_phase_one_is_frozen_without_noise_and_normalised_on_transformed_images(script, method, tmp_path):
    flags = [script, *FEW, "--phase-one", "random", "--output", "a.ckpt"]
    out = run(*flags, cwd=tmp_path).stdout
    assert "next: " in out and "None" not in out
    checkpoint = load_checkpoint(tmp_path / "a.ckpt", f"{method}_random_phase_one")
    weights = {name.removeprefix("phase_one."): value for name, value in checkpoint["model"].items()
               if name.startswith("phase_one.")}
    config = checkpoint["config"]
    torch.manual_seed(config["seed"])
    common.NIN(8)  # the encoder that learns
    untrained = common.NIN(8).state_dict()
    for name, value in untrained.items():  # as it was made
        if "running" not in name and "num_batches" not in name and not name.startswith("logvar"):
            assert torch.equal(weights[name], value), name
    phase_one = common.load_weights(common.NIN(8), weights, "a.ckpt").eval()
    images = load_images("digits", "train", image_size=8).images[:256]
    seen = []
    phase_one.trunk[0][1].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    coefficients = minter_warp.sample_coefficients(256, 8, torch.Generator().manual_seed(1))
    batch = warp_batch(images, torch.arange(256), None, coefficients, *normalization(config["mean"], config["std"]))
    with torch.no_grad():
        _, logvar = phase_one(batch)
    assert seen[0].mean().abs() < 0.05 and seen[0].std() == pytest.approx(1, abs=0.1)
    assert logvar.max() < -20
    run(*flags[:-2], "--epochs", 2, "--resume", "--output", "a.ckpt", cwd=tmp_path)
    again = load_checkpoint(tmp_path / "a.ckpt")["model"]
    assert all(torch.equal(again[f"phase_one.{name}"], value) for name, value in weights.items())
    refused(script, *FEW, "--phase-one", "random", "--pretrained", "pt.ckpt", cwd=tmp_path, code=2,
            says="leave out --pretrained")
    refused(script, *FEW, "--phase-one", "random", "--from-scratch", cwd=tmp_path, code=2, says="leave out --phase-one")


@pytest.fixture(scope="module")
def stl_trained(module_folder):
    """STL with its own encoder, an odd last batch, and SimCLR; one epoch each on few digits."""
    folder = module_folder / "stl"
    folder.mkdir()
    few = ["--dataset", "digits", "--limit", 19, "--epochs", 1, "--batch-size", 16, "--image-size", 12]
    results = {
        "stl": run("stl.py", *few, "--output", "stl.ckpt", cwd=folder),
        "paper": run("stl.py", *few, "--epochs", 2, "--save-every", 2, "--encoder", "nin", "--preset", "paper",
                     "--output", "paper.ckpt", cwd=folder),
        "simclr": run("stl.py", *few, "--encoder", "nin", "--equi", 0, "--trans", 0, "--preset", "paper", "--augmix",
                      "--output", "simclr.ckpt", cwd=folder),
        "probe": run("probe.py", "stl.ckpt", "simclr.ckpt", "--train-sizes", 60, "--classifiers", "knn", "linear",
                     "--json", "rows.json", cwd=folder),
    }
    return folder, results


def test_stl_trains_and_is_probed_like_any_other(stl_trained):
    folder, results = stl_trained
    (row,) = [json.loads(line) for line in (folder / "stl.jsonl").read_text().splitlines()]
    assert row["loss"] == pytest.approx(row["inv"] + row["equi"] + 0.1 * row["trans"], rel=1e-3)
    assert 0 < row["code_spread"] < 1 and 0 < row["map_variation"] < 1.5
    (row,) = [json.loads(line) for line in (folder / "simclr.jsonl").read_text().splitlines()]
    assert row["loss"] == pytest.approx(row["inv"], rel=1e-5) and "equi" not in row and "code_spread" not in row
    rows = read_rows(folder / "rows.json")
    found = [(r["checkpoint"], r["method"], r["features"]) for r in rows if r["classifier"] == "linear"]
    rest = ["random encoder (resnet18)", "random encoder (nin)", "raw pixels"]
    trained = [("stl.ckpt", "stl", None), ("simclr.ckpt", "stl_inv", None)]  # no row with anything sampled
    assert found == [*trained, *[(None, name, None) for name in rest]]
    assert all(row["passes"] == 1 and row["error_std"] == 0 for row in rows)
    assert all(row["error_mean"] < 0.6 for row in rows if row["checkpoint"] is None)
    assert ("L-BFGS, at most 5,000 iterations, until no gradient is above 0.0001, unscaled features, summed loss, "
            "L2 weight (of the bias too) of 45 from 1e-06 to 100000 chosen on 10% of the labels, refit on all"
            ) in results["probe"].stdout


def test_stl_trains_as_the_paper_says(stl_trained):
    """SGD with momentum 0.9, weight decay 5e-4 and a cosine from 0.03 to 0 over the epochs; the paper's preset."""
    folder, _ = stl_trained
    checkpoint = torch.load(folder / "paper.ckpt", weights_only=True)
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["initial_lr"]) == (0.9, 5e-4, 0.03)
    assert group["lr"] == pytest.approx(0, abs=1e-9)  # after the last of two epochs
    assert any("momentum_buffer" in state for state in checkpoint["optimizer"]["state"].values())
    rows = [json.loads(line) for line in (folder / "paper.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["loss"] == pytest.approx(row["inv"] + row["equi"] + 0.2 * row["trans"], rel=1e-3)
    assert rows[0]["lr"] == pytest.approx(0.03) and rows[1]["lr"] == pytest.approx(0.015)
    shapes = [tuple(checkpoint["model"][f"transformation_encoder.{i}.weight"].shape) for i in (0, 3, 6)]
    assert shapes == [(512, 1024), (512, 512), (128, 512)]


def test_stl_checkpoints_hold_the_map_that_equivariance_is_measured_with(stl_trained):
    folder, _ = stl_trained
    checkpoint = torch.load(folder / "stl.ckpt", weights_only=True)
    assert checkpoint["model"]["hypernetwork.weight"].shape == (512, 512, 128)
    assert checkpoint["model"]["transformation_encoder.0.weight"].shape == (128, 1024)
    model, _ = stl.load_stl(folder / "stl.ckpt")
    views = torch.randn(2, 4, 3, 12, 12)
    with torch.no_grad():
        y1, y2 = model.encoder(views[0]), model.encoder(views[1])
        predicted = model.hypernetwork(model.encode_transformation(y1, y2), y1)
    assert predicted.shape == (4, 512) and predicted.isfinite().all()
    simclr, _ = stl.load_stl(folder / "simclr.ckpt")
    assert simclr.hypernetwork is None and simclr.encoder(views[0]).shape == (4, 512)


def test_pictures_of_stl(stl_trained):
    folder, _ = stl_trained
    run("study/figures.py", "codes", "stl.ckpt", "--pairs", 20, "--output", "codes.png", cwd=folder)
    run("study/figures.py", "curves", "stl.jsonl", "simclr.jsonl", "--output", "curves.png", cwd=folder)
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("codes.png", "curves.png"))
    refused("study/figures.py", "codes", "simclr.ckpt", cwd=folder, code=1, says="no transformation codes")


def test_linear_with_one_label_of_each_class_is_left_out(stl_trained):
    folder, _ = stl_trained
    out = run("probe.py", "simclr.ckpt", "--train-sizes", 10, "--classifiers", "linear", "knn", cwd=folder).stdout
    assert "linear, 10 labels: left out, one of each class leaves none to choose the L2 weight on" in out
    refused("probe.py", "simclr.ckpt", "--train-sizes", 10, "--classifiers", "linear", cwd=folder, code=2,
            says="give larger --train-sizes")


def test_wrong_commands_of_stl(trained, tmp_path):
    refused("stl.py", "--dataset", "digits", "--image-size", 4, cwd=tmp_path, code=2, says="from 8 to 1,024")
    refused("stl.py", "--dataset", "digits", "--limit", 1, cwd=tmp_path, code=2, says="larger than the 1 training")
    refused("stl.py", "--equi", 0, "--inv", 0, "--trans", 0, cwd=tmp_path, code=2, says="nothing is left to minimise")
    refused("stl.py", "--equi", "-1", cwd=tmp_path, code=2, says="'-1' is not a number of 0 or more")
    refused("stl.py", "--preset", "mine", cwd=tmp_path, code=2, says="mine")
    refused("study/figures.py", "codes", trained[0] / "pt.ckpt", cwd=tmp_path, code=1, says="one of stl.py is needed")


@pytest.mark.parametrize("sureness, reached", [(100.0, True), (1.0, False)])
def test_a_bound_at_its_ceiling_is_warned_of(sureness, reached, tmp_path, monkeypatch, recwarn):
    """With scores that tell every pair apart, all epochs reach log 4; half as sure, none does."""
    make_folder(tmp_path / "pets", n=4)
    loss = vte_infonce.vte_infonce_loss
    monkeypatch.setattr(vte_infonce, "vte_infonce_loss", lambda scores, z, logvar: loss(
        sureness * torch.eye(len(scores)) + 0 * scores, z, logvar))
    monkeypatch.setattr(sys, "argv", [
        "vte_infonce.py", "--from-scratch", "--dataset", str(tmp_path / "pets"), "--batch-size", "4", "--epochs", "2",
        "--image-size", "8", "--output", str(tmp_path / "a.ckpt")])
    vte_infonce.main()
    found = [str(warning.message) for warning in recwarn if "has reached its ceiling, log N = 1.39 nats" in
             str(warning.message)]
    assert bool(found) == reached


def test_checkpoints_describe_themselves(trained):
    folder, _ = trained
    pt, ba = (torch.load(folder / name, weights_only=True) for name in ("pt.ckpt", "ba.ckpt"))
    assert (pt["method"], pt["epoch"], ba["method"], ba["epoch"]) == ("predictive_transform", 2, "vte_ba", 1)
    assert ba["config"]["dataset"] == "digits" and ba["config"]["encoder"] == "nin" and ba["config"]["image_size"] == 8
    assert ba["config"]["mean"] == pt["config"]["mean"]
    for name, value in pt["encoder"].items():  # phase one, bit for bit, batch normalisation included
        assert torch.equal(ba["model"][f"phase_one.{name}"], value)
        assert torch.equal(ba["encoder"][name], ba["model"][f"encoder.{name}"])
    assert not torch.equal(ba["encoder"]["mu.weight"], pt["encoder"]["mu.weight"])


def test_probe_rows(trained):
    folder, results = trained
    rows = read_rows(folder / "rows.json")
    found = [(r["checkpoint"], r["method"], r["features"]) for r in rows if r["classifier"] == "knn"]
    assert found == [("pt.ckpt", "predictive_transform", "sample"), ("pt.ckpt", "predictive_transform", "mu"),
                     ("ba.ckpt", "vte_ba", "sample"), ("ba.ckpt", "vte_ba", "mu"),
                     (None, "random encoder (nin)", "sample"), (None, "random encoder (nin)", "mu"),
                     (None, "raw pixels", None)]
    assert len(rows) == 14 and all(row["train_size"] == 100 for row in rows)
    for row in rows:
        assert 0 < row["error_mean"] < 0.95 and row["error_std"] >= 0
        assert row["features"] == "sample" or (row["error_std"] == 0 and row["passes"] == 1)
    pixels = next(r for r in rows if r["method"] == "raw pixels" and r["classifier"] == "knn")
    assert pixels["error_mean"] < 0.25  # five neighbours among a hundred digits
    out = results["probe"].stdout
    assert "50,000 labels are left out: digits has not so many in equal shares of its classes" in out
    for stated in ("K = 5", "Euclidean", "SAG, 100 iterations", "C = 1", "seed 0", "over 2 passes"):
        assert stated in out


def test_an_exported_encoder_is_probed_like_its_checkpoint(trained):
    folder, _ = trained
    out = run("probe.py", "ba.ckpt", "--export", "ba.safetensors", cwd=folder).stdout
    assert "wrote ba.safetensors, 2." in out and "the encoder of ba.ckpt" in out
    flags = ["--classifiers", "knn", "--train-sizes", 20, "--rows", "checkpoints", "--json"]
    rows = {}
    for name in ("ba.ckpt", "ba.safetensors"):
        run("probe.py", name, *flags, "exported.json", cwd=folder)
        rows[name] = [{**row, "checkpoint": None} for row in read_rows(folder / "exported.json")]
    assert len(rows["ba.ckpt"]) == 2 and rows["ba.safetensors"] == rows["ba.ckpt"]
    refused("probe.py", "ba.ckpt", "pt.ckpt", "--export", "a.safetensors", cwd=folder, code=2, says="one checkpoint")
    for name in ("a.ckpt", "", "ba.safetensors"):  # the last is there
        refused("probe.py", "ba.ckpt", "--export", name, cwd=folder, code=2, says="a new file that ends in .safetens")
    half = run("probe.py", "ba.ckpt", "--export", "half.safetensors", "--precision", "bf16", cwd=folder).stdout
    assert "wrote half.safetensors, 1." in half
    out = run("equivariance.py", "ba.safetensors", "--images", 10, "--per-image", 10, "--pairs", 20, "--rows",
              "checkpoints", cwd=folder).stdout
    assert "vte_ba (ba.safetensors)" in out and "its decoder" not in out  # which was not exported
    refused("avt.py", *FEW, "--output", "a.safetensors", cwd=folder, code=2, says="training writes .ckpt")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(trained, tmp_path):
    few = ["predictive_transform.py", *FEW, "--limit", 64, "--device", "cpu"]
    for name in "ab":
        run(*few, "--seed", 1, "--output", f"{name}.ckpt", cwd=tmp_path)
    a, b = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    other, _ = trained  # seed 0, and as many steps do not make up for it
    other = torch.load(other / "pt.ckpt", weights_only=True)["model"]
    assert (a["encoder.mu.weight"] - other["encoder.mu.weight"]).abs().mean() > 0.01


# ------------------------------------------------------------------------------------------------- a user's own data


@pytest.fixture(scope="module")
def on_a_folder(module_folder):
    """A run on a folder without classes, given by a relative path."""
    folder = module_folder / "own"
    for i in range(6):
        (folder / "pets" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 20), (40 * i, 10, 200)).save(folder / "pets" / str(i % 2) / f"{i}.png")
    result = run("predictive_transform.py", "--dataset", "pets", *OWN, "--output", "pt.ckpt", cwd=folder)
    return folder, result


OWN = ["--image-size", 8, "--epochs", 1, "--batch-size", 3, "--precision", "fp32"]


def test_a_folder_without_classes_trains_and_cannot_be_evaluated(on_a_folder):
    folder, result = on_a_folder
    first = "predictive_transform: 6 images of pets of up to 20 pixels, resized to 8, nin, cpu, float32, seed 0"
    assert result.stdout.splitlines()[0] == first
    refused("probe.py", "pt.ckpt", cwd=folder, code=1, says="has no labelled train/ and test/ (or val/)")


def test_a_folder_given_relative_is_found_from_elsewhere_and_named_when_it_is_gone(on_a_folder, tmp_path):
    folder, _ = on_a_folder
    assert load_checkpoint(folder / "pt.ckpt")["config"]["dataset"] == str(folder / "pets")
    out = run("vte_ba.py", "--pretrained", folder / "pt.ckpt", *OWN, cwd=tmp_path).stdout
    assert f"6 images of {folder / 'pets'} of up to 20 pixels" in out
    assert out.endswith("vte_ba.ckpt --dataset '<a folder with classes>'\n")  # the next command: these have none
    try:
        (folder / "pets").rename(folder / "moved")
        refused("vte_ba.py", *OWN, "--output", "b.ckpt", "--pretrained", folder / "pt.ckpt", cwd=tmp_path, code=2,
                says="pets', where the checkpoint's data was: give another --dataset")
        refused("probe.py", folder / "pt.ckpt", cwd=tmp_path, code=2, says="--dataset DIR gives another")
        run("vte_ba.py", *OWN, "--epochs", 2, "--resume", "--dataset", folder / "moved", "--pretrained",
            folder / "pt.ckpt", cwd=tmp_path)  # the same images
    finally:
        (folder / "moved").rename(folder / "pets")


def test_images_as_large_as_they_are_trained_on_are_not_called_resized(tmp_path):
    make_folder(tmp_path / "pets", n=2, size=(8, 8))
    out = run("vte_ba.py", "--from-scratch", "--dataset", "pets", *OWN, cwd=tmp_path).stdout
    assert "4 images of pets, nin" in out


def test_a_copied_script_runs_without_the_compiled_part_and_warns_once(tmp_path, on_a_folder):
    """It needs common.py and the folder minter_warp/, and nothing else of this repository."""
    for name in ("vte_ba.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "minter_warp", tmp_path / "minter_warp", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    data, _ = on_a_folder
    command = [sys.executable, "vte_ba.py", "--dataset", data / "pets", *OWN, "--output", "deep/er/a.ckpt",
               "--pretrained", data / "pt.ckpt"]
    result = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, timeout=200,
                            env={**os.environ, **ON_THE_CPU})
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "vte_ba.py: warning: the compiled warp is not built, the slower PyTorch reference is used" in result.stderr
    assert "belongs to another copy" in result.stderr or "No module named" in result.stderr  # what is installed
    assert (tmp_path / "deep" / "er" / "a.ckpt").exists()


# ---------------------------------------------------------------------------------------------------------- encoders


class Tiny(torch.nn.Module):
    """An encoder of one's own."""

    def __init__(self, image_size, probabilistic):
        super().__init__()
        self.trunk = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * image_size**2, 16), torch.nn.ReLU())
        self.mu = torch.nn.Linear(16, 512)
        self.logvar = torch.nn.Linear(16, 512) if probabilistic else None

    forward = common.NIN.forward


def test_an_entry_of_encoders_adds_an_encoder_to_every_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(common.ENCODERS, "tiny", Tiny)
    few = ["--dataset", "digits", "--limit", 16, "--batch-size", 8, "--image-size", 8, "--epochs", 1]
    in_this_process("predictive_transform.py", *few, "--encoder", "tiny", "--output", "pt.ckpt", cwd=tmp_path)
    phase_two = ["--pretrained", "pt.ckpt"]
    for name, script, *flags in (
            ("avt", "avt.py", "--encoder", "tiny"), ("ba", "vte_ba.py", *phase_two),
            ("nce1", "vte_infonce.py", *phase_two), ("nce2", "vte_infonce.py", "--critic", "concatenated", *phase_two),
            ("stl", "stl.py", "--encoder", "tiny")):
        in_this_process(script, *flags, *few, "--output", f"{name}.ckpt", cwd=tmp_path)
        checkpoint = load_checkpoint(tmp_path / f"{name}.ckpt")
        assert checkpoint["config"]["encoder"] == "tiny" and "trunk.1.weight" in checkpoint["encoder"]
    in_this_process("probe.py", "ba.ckpt", "stl.ckpt", "--classifiers", "knn", "--train-sizes", 20, cwd=tmp_path)
    assert "random encoder (tiny)" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["predictive_transform.py", "avt.py", "vte_ba.py", "vte_infonce.py"])
def test_a_deterministic_encoder_is_one_sentence_in_a_script_that_samples(script, tmp_path):
    scratch = ["--from-scratch"] if script.startswith("vte") else []
    refused(script, *scratch, *FEW, "--encoder", "resnet18", cwd=tmp_path, code=2,
            says="--encoder resnet18 does not fit here: resnet18 is deterministic")


def test_an_encoder_of_ones_own_that_does_not_keep_the_contract_is_one_sentence(tmp_path, monkeypatch):
    class Deterministic(Tiny):
        def __init__(self, image_size, probabilistic):
            super().__init__(image_size, False)

    class OtherNames(Tiny):
        def __init__(self, image_size, probabilistic):
            super().__init__(image_size, False)
            self.spread = torch.nn.Linear(16, 512)

        def forward(self, images):
            hidden = self.trunk(images)
            return self.mu(hidden), self.spread(hidden)

    monkeypatch.setitem(common.ENCODERS, "sure", Deterministic)
    monkeypatch.setitem(common.ENCODERS, "other", OtherNames)
    says = "needs an encoder that returns (mu, logvar)"
    refused("avt.py", *FEW, "--encoder", "sure", cwd=tmp_path, code=1, says=says)
    refused("avt.py", *FEW, "--encoder", "other", "--recipe", "fast", cwd=tmp_path, code=2, says="called logvar")
    control = ["--phase-one", "random"]
    refused("vte_ba.py", *FEW, "--encoder", "other", *control, cwd=tmp_path, code=2, says="called logvar")
    in_this_process("avt.py", *FEW, "--encoder", "other", "--output", "other.ckpt", cwd=tmp_path)


# ------------------------------------------------------------------------------------------------------------ output


def epochs_of(text):
    return [line for line in text.splitlines() if line.startswith("epoch ")]


def test_an_epochs_line_is_short_and_says_nothing_twice(trained, stl_trained):
    for results, names in ((trained[1], ("pt", "ba")), (stl_trained[1], ("stl", "paper", "simclr"))):
        for name in names:
            for line in epochs_of(results[name].stdout):
                assert len(line) <= 100 and not {"loss", "constant_predictor", "ceiling"} & set(line.split()), line


LONG = {"squared_error": 123456.789, "explained": -12.345678, "logvar": -12.3456, "z_std": 123.45678, "bound": -6.2345,
        "inv": 12.3456, "equi": 12.3456, "trans": 12.3456, "code_spread": 0.0012345, "map_variation": 0.0012345}


@pytest.mark.parametrize("names, rate", [
    (["squared_error", "logvar", "z_std"], 123_456), (["squared_error", "explained", "logvar", "z_std"], 123_456),
    (["bound", "logvar", "z_std"], 123_456), (["inv", "equi", "trans", "code_spread", "map_variation"], 12_345)])
def test_an_epochs_line_stays_short_with_long_numbers(names, rate, tmp_path, monkeypatch, capsys):
    """Late in a long run, and with all that diverges or collapses."""
    class Diverged(predictive_transform.Run):
        def means(self):
            self.epoch, self.args.epochs, self._seen = 500, 500, rate * (time.perf_counter() - self._start)
            return {"loss": 123456.789, **{name: LONG[name] for name in names}}

    monkeypatch.setattr(predictive_transform, "Run", Diverged)
    monkeypatch.setattr(sys, "argv", ["predictive_transform.py", "--dataset", "digits", "--limit", "16", "--batch-size",
                                      "8", "--image-size", "8", "--epochs", "1", "--output", str(tmp_path / "a.ckpt")])
    predictive_transform.main()
    (line,) = epochs_of(capsys.readouterr().out)
    assert line.startswith("epoch 500/500") and all(name in line for name in names) and len(line) <= 100, line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_bar_is_of_the_whole_run(tmp_path, monkeypatch):
    shown, terminal = [], Terminal()

    class Watched(predictive_transform.Run):
        def step(self, *args):
            super().step(*args)
            shown.append((self._bar.initial, self._bar.n, self._bar.total))

    monkeypatch.setattr(predictive_transform, "Run", Watched)
    monkeypatch.setattr(sys, "stderr", terminal)
    for epochs, resumed, steps in ((1, [], [(0, 8, 16), (0, 16, 16)]), (3, ["--resume"], [
            (16, 24, 48), (16, 32, 48), (16, 40, 48), (16, 48, 48)])):
        monkeypatch.setattr(sys, "argv", [
            "predictive_transform.py", "--dataset", "digits", "--limit", "16", "--batch-size", "8", "--image-size", "8",
            "--epochs", str(epochs), *resumed, "--output", str(tmp_path / "a.ckpt")])
        shown.clear()
        predictive_transform.main()
        assert shown == steps and f"epoch {epochs}/{epochs}: " in terminal.getvalue()


def next_of(result, cwd):
    """The command that a run printed, as `run` takes it."""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("next: ")]
    python, script, *flags = shlex.split(line.removeprefix("next: "))
    assert python == "python"
    return [(cwd / script).resolve(), *flags]


def test_the_next_command_works_as_printed(tmp_path):
    """With the settings of phase one, a path with a space, and from a folder that is not the scripts'."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    settings = {"epochs": 1, "batch_size": 16, "lr": 2e-4, "limit": 48, "seed": 3}
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    first = run("predictive_transform.py", "--dataset", "digits", "--image-size", 8, *flags,
                "--output", folder / "pt.ckpt", cwd=folder)
    script, *flags = next_of(first, folder)
    assert script == ROOT / "vte_ba.py" and str(folder / "pt.ckpt") in flags
    second = run(script, *flags, cwd=folder)
    phases = [load_checkpoint(folder / name)["config"] for name in ("pt.ckpt", "vte_ba.ckpt")]
    for name in ("dataset", "encoder", "image_size", "data_dir", *settings):
        assert phases[1][name] == phases[0][name] == settings.get(name, phases[0][name])
    script, *flags = next_of(second, folder)
    assert script == ROOT / "probe.py" and flags == [str(folder / "pt.ckpt"), "vte_ba.ckpt"]
    run(script, *flags, "--classifiers", "knn", "--train-sizes", 20, cwd=folder)


def test_the_next_command_of_the_other_scripts(trained, stl_trained):
    assert next_of(trained[1]["ba"], trained[0]) == [ROOT / "probe.py", "pt.ckpt", "ba.ckpt"]
    assert next_of(stl_trained[1]["stl"], stl_trained[0]) == [ROOT / "probe.py", "stl.ckpt", "--classifiers", "knn",
                                                             "linear"]


TRAINING = ["predictive_transform", "avt", "vte_ba", "vte_infonce", "stl"]


@pytest.mark.parametrize("script", [*TRAINING, "probe", "equivariance"])
def test_help_has_an_example_and_every_flag_an_explanation_with_its_default(script, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    module = importlib.import_module(script)
    parsers = []
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common.Parser, "parse_args", lambda parser, *_: sys.exit(parsers.append(parser)))
        patch.setattr(sys, "argv", [f"{script}.py"])
        if script in TRAINING:
            module.parse_args()
        module.parse_args()
    (parser,) = parsers
    text = parser.format_help()
    assert f"example:\n  python {script}.py " in text
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            said = parser.formatter_class(script)._expand_help(action)
            assert len(said) > 4 and said in text, action
            optional = isinstance(action.default, bool) or action.dest in ("pretrained", "json", "export")
            assert optional or "default: " in said, (action.dest, said)
    if script in TRAINING:
        groups = [group.title for group in parser._action_groups]
        assert [title for title in groups if title in ("what to train", "how", "where")] == [
            "what to train", "how", "where"]
        assert "200 as in the paper" in text


# ------------------------------------------------------------------------------------------------------- what is wrong


def test_wrong_data(tmp_path):
    scratch = ["vte_ba.py", "--from-scratch", "--epochs", "1"]
    refused(*scratch, "--dataset", "cifar11", cwd=tmp_path, code=2, says="digits, cifar10, stl10, or a folder")
    (tmp_path / "nothing").mkdir()
    refused(*scratch, "--dataset", "nothing", cwd=tmp_path, code=1, says="'nothing' holds no images")
    folder = make_folder(tmp_path / "pets")
    (folder / "train" / "cat" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nonsense")
    refused(*scratch, "--dataset", "pets", "--batch-size", 2, cwd=tmp_path, code=1, says="pets/train/cat/2.png")
    nowhere = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    refused(*scratch, "--dataset", "cifar10", cwd=tmp_path, code=1, says="--dataset digits, which works offline",
            environment=nowhere)
    refused(*scratch, "--dataset", "digits", "--output", "nothing", cwd=tmp_path, code=2, says="'nothing' is a folder")
    refused(*scratch, "--dataset", "digits", "--limit", 100, cwd=tmp_path, code=2, says="larger than the 100 training")
    refused(*scratch, "--dataset", "digits", "--batch-size", 1, cwd=tmp_path, code=2, says="1 does not fit: give 2")
    refused(*scratch, "--dataset", "digits", "--sync-bn", "--device", "cpu", cwd=tmp_path, code=2, says="is for GPUs")


def test_cuda_asked_for_and_absent(tmp_path):
    refused("vte_ba.py", "--from-scratch", "--dataset", "digits", "--device", "cuda", cwd=tmp_path, code=1,
            says="no CUDA device here")


def test_wrong_checkpoints(trained, tmp_path):
    folder, _ = trained
    ba = ["vte_ba.py", *FEW]
    for script in ("vte_ba.py", "vte_infonce.py"):
        says = "python predictive_transform.py --dataset digits --output pt.ckpt"
        refused(script, *FEW, cwd=tmp_path, code=2, says=says)
        refused(script, "--pretrained", "a.ckpt", "--from-scratch", cwd=tmp_path, code=2, says="leave out --pretrained")
    refused(*ba, "--pretrained", "no.ckpt", cwd=tmp_path, code=1, says="there is no checkpoint 'no.ckpt'")
    refused(*ba, "--pretrained", folder / "ba.ckpt", cwd=tmp_path, code=1, says="one of predictive_transform is needed")
    refused(*ba, "--pretrained", folder / "pt.ckpt", "--encoder", "resnet18", cwd=tmp_path, code=2, says="with nin")
    refused(*ba, "--pretrained", folder / "pt.ckpt", "--image-size", 64, cwd=tmp_path, code=2, says="with 8")
    content = (folder / "pt.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 3])
    for script in (["probe.py"], [*ba, "--pretrained"]):
        refused(*script, "cut.ckpt", cwd=tmp_path, code=1, says="is truncated or damaged")
    write_checkpoint(tmp_path / "wrong.ckpt", encoder="nin")
    refused("probe.py", "wrong.ckpt", cwd=tmp_path, code=1, says="do not fit the NIN that it names")
    write_checkpoint(tmp_path / "other.ckpt", config={"encoder": "alexnet", "image_size": 32})
    refused("probe.py", "other.ckpt", cwd=tmp_path, code=1, says="is no checkpoint of minTER")


def test_an_existing_checkpoint_is_not_overwritten(trained):
    folder, _ = trained
    log = (folder / "pt.jsonl").read_text()
    refused("predictive_transform.py", *FEW, "--output", "pt.ckpt", cwd=folder, code=2, says="exists already")
    shutil.copy(folder / "pt.jsonl", folder / "lone.jsonl")  # a log is kept too
    refused("predictive_transform.py", *FEW, "--output", "lone.ckpt", cwd=folder, code=2, says="'lone.jsonl' exists")
    assert (folder / "pt.jsonl").read_text() == (folder / "lone.jsonl").read_text() == log
    refused("probe.py", "ba.ckpt", "--json", "pt.ckpt", cwd=folder, code=2, says="ends in .json")


def test_nothing_else_of_a_users_is_written_over(trained, tmp_path):
    """Another's JSON, another's log; and the temporary files of others stay."""
    (tmp_path / "a.json").write_text("[1]")
    refused("probe.py", trained[0] / "ba.ckpt", "--json", "a.json", cwd=tmp_path, code=1, says="is no file that")
    assert (tmp_path / "a.json").read_text() == "[1]"
    (tmp_path / "a.jsonl").write_text("1\n2\n")
    refused("avt.py", *FEW, "--resume", "--output", "a.ckpt", cwd=tmp_path, code=1, says="'a.jsonl' is no log of a run")
    refused("avt.py", *FEW, "--output", "new/", cwd=tmp_path, code=2, says="'new/' is a folder")
    for length in (245, 252, 300):  # 245 would do, but for the name while it is written
        refused("avt.py", *FEW, "--output", length * "x", cwd=tmp_path, code=1, says="File name too long")
    (tmp_path / "b.ckpt.mine.tmp").touch(), (tmp_path / "b.ckpt.7.tmp").touch()
    run("avt.py", *FEW, "--resume", "--output", "b.ckpt", cwd=tmp_path)
    assert (tmp_path / "b.ckpt.mine.tmp").exists() and not (tmp_path / "b.ckpt.7.tmp").exists()


def test_a_full_disk_behind_the_output_is_one_sentence_and_stops_no_training(trained, tmp_path):
    """/dev/full takes nothing."""
    for command in (["avt.py", *FEW, "--limit", "64", "--output", "a.ckpt"],
                    ["probe.py", trained[0] / "ba.ckpt", "--classifiers", "knn", "--train-sizes", "20"]):
        said = tmp_path / f"{command[0]}.err"
        code = shared_forks().wait(shared_forks().start(*command, cwd=tmp_path, output="/dev/full", error=said))
        assert "Traceback" not in said.read_text()
    assert (tmp_path / "a.ckpt").exists()
    assert code == 1 and said.read_text() == "probe.py: error: [Errno 28] No space left on device\n"


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    refused("predictive_transform.py", *FEW, "--lr", "1e30", cwd=tmp_path, code=1, says="in epoch 1")
    few = ["--dataset", "digits", "--limit", 64, "--batch-size", 64, "--encoder", "alexnet", "--output", "a.ckpt"]
    # A learning rate that breaks the weights in the one step of the first epoch: its loss was still a number.
    result = run("predictive_transform.py", *few, "--lr", "1e30", "--epochs", 3, cwd=tmp_path, code=1)
    assert "in epoch 2; the checkpoint of epoch 1 is kept in 'a.ckpt'" in result.stderr
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["epoch"] == 1


def test_pictures(trained):
    folder, _ = trained
    run("study/figures.py", "curves", "pt.jsonl", "ba.jsonl", "--output", "c.png", cwd=folder)
    assert (folder / "c.png").read_bytes().startswith(b"\x89PNG")
    refused("study/figures.py", "curves", "none.jsonl", cwd=folder, code=1, says="is no log")
    refused("study/figures.py", "curves", "pt.jsonl", "--output", "no/c.png", cwd=folder, code=1, says="cannot write")
