"""Encoders that are not minTER's, by name: what is loaded, the commands on them, and every way to get it wrong."""

import sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from test_scripts import refused
from torchvision import models

import equivariance
import probe
from probe import load_foreign

CPU = torch.device("cpu")
FEW = ["--images", "10", "--per-image", "10", "--pairs", "40"]
DIGITS = ["--dataset", "digits", "--image-size", "8", "--mean", "0.5", "0.5", "0.5", "--std", "0.3", "0.3", "0.3"]
NETS = """
import torch
from torch import nn

def pixels():
    return nn.Flatten()

def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))

def maps():
    return nn.Conv2d(3, 4, 3)

class Pair(nn.Module):
    def forward(self, images):
        return images.flatten(1), images

def broken():
    raise KeyError("no such layer")

def leaving():
    raise SystemExit

class Changed(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images):
        return self.change(images.flatten(1))

def tiny():
    return Changed(lambda pixels: 2.0**-40 * pixels)

def huge():
    return Changed(lambda pixels: 1e30 * pixels)

def constant():
    return Changed(torch.ones_like)

def whole():
    return Changed(lambda pixels: pixels.long())

def nothing():
    return Changed(lambda pixels: pixels[:, :0])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    measure = script.probe if script is probe else script.probe_equivariance
    return measure(script.parse_args(), CPU)[0]


@pytest.mark.parametrize("name, layer, width", [("resnet18", "avgpool", 512),
                                                 ("mobilenet_v3_small", "classifier.2", 1024)])
def test_a_torchvision_model_gives_what_goes_into_its_classifier(name, layer, width):
    torch.manual_seed(0)
    whole, seen = models.get_model(name).eval(), []
    whole.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(1)))
    torch.manual_seed(0)
    checkpoint, encoder = load_foreign(f"torchvision:{name}", None, 32, None, None)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        whole(images)
        assert torch.equal(encoder(images), seen[0]) and seen[0].shape == (3, width)
    config = checkpoint["config"]
    assert (config["image_size"], list(config["mean"])) == (32, [0.485, 0.456, 0.406])  # ImageNet's
    assert checkpoint["method"] == name


def test_the_library_says_what_images_a_model_takes_and_weights_follow_it(folder):
    torch.manual_seed(1)
    trained = models.shufflenet_v2_x0_5(num_classes=7)  # another classifier, which is left out
    torch.save(trained.state_dict(), "mine.pt")
    checkpoint, encoder = load_foreign("torchvision:shufflenet_v2_x0_5", "mine.pt", None, None, None)
    assert checkpoint["config"]["image_size"] == 224 and list(checkpoint["config"]["std"]) == [0.229, 0.224, 0.225]
    assert torch.equal(encoder.conv1[0].weight, trained.conv1[0].weight)


def test_timm_gives_features_and_says_what_images_it_takes(monkeypatch):
    """A stand-in of the two functions that are called, where there is no timm."""
    def create_model(name, pretrained, num_classes):
        assert (name, num_classes) == ("resnet10t", 0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 9 if pretrained else 6))

    about = {"input_size": (3, 16, 16), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(
        create_model=create_model, data=SimpleNamespace(resolve_model_data_config=lambda model: about)))
    for name, width in (("timm:resnet10t", 6), ("timm:resnet10t:pretrained", 9)):
        checkpoint, encoder = load_foreign(name, None, None, None, [0.7] * 3)
        assert encoder[1].out_features == width and checkpoint["method"] == "resnet10t"
        assert [checkpoint["config"][key] for key in ("image_size", "mean", "std")] == [16, about["mean"], [0.7] * 3]


def test_a_function_in_a_file_is_measured_as_what_it_returns(folder, monkeypatch):
    """One that flattens images has the rows of raw pixels, in both commands."""
    rows = evaluate(equivariance, monkeypatch, "nets.py:pixels", *DIGITS, *FEW, "--transformations", "translation")
    rows += evaluate(probe, monkeypatch, "nets.py:pixels", *DIGITS, "--train-sizes", 100, "--classifiers", "knn")
    found, pixels = ([{name: value for name, value in row.items() if name not in ("method", "checkpoint")}
                      for row in rows if row["method"] == method] for method in ("pixels", "raw pixels"))
    assert found == pixels and len(found) == 22
    assert {row["checkpoint"] for row in rows if row["method"] == "pixels"} == {"nets.py:pixels"}
    assert any(row["method"] == "random encoder (nin)" for row in rows)  # untrained, beside it


def test_the_scale_of_features_changes_no_measure(folder, monkeypatch):
    for family in ("rotation", "translation"):
        rows = evaluate(equivariance, monkeypatch, "nets.py:pixels", "nets.py:tiny", *DIGITS, *FEW, "--compose",
                        "--transformations", family, "--rows", "checkpoints")
        of = [[row for row in rows if row["method"] == method] for method in ("pixels", "tiny")]
        assert len(of[0]) == len(of[1]) > 20
        for one, other in zip(*of, strict=True):
            for name in ("value", "low", "high"):
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), one


def test_the_interval_of_how_far_features_move_holds_it(folder, monkeypatch):
    rows = evaluate(equivariance, monkeypatch, "nets.py:pixels", *DIGITS, *FEW, "--transformations", "translation")
    moved = [row for row in rows if row["measure"] == "moved"]
    assert len(moved) > 3 and all(row["low"] < row["value"] < row["high"] for row in moved)


def test_a_file_of_weights_belongs_to_the_encoder_before_it(folder, monkeypatch):
    weights = {"1.weight": torch.randn(5, 192), "1.bias": torch.zeros(5)}
    torch.save(weights, "w.pt")

    def load(seed):
        names = ["nets.py:linear", "w.pt", "nets.py:linear"]
        monkeypatch.setattr(sys, "argv", ["probe.py", *names, *DIGITS, "--seed", seed])
        loaded, dataset = probe.load_checkpoints(probe.parse_args())
        assert [name for name, *_ in loaded] == ["nets.py:linear w.pt", "nets.py:linear"] and dataset == "digits"
        return [encoder[1].weight for *_, encoder in loaded]

    (first, untrained), (again, same), (_, other) = map(load, "110")
    assert torch.equal(first, weights["1.weight"]) and torch.equal(again, first) and not torch.equal(first, untrained)
    assert torch.equal(untrained, same) and not torch.equal(untrained, other)  # the seed's
    (folder / "a").mkdir(), (folder / "b").mkdir()
    for place in "ab":
        torch.save(weights, f"{place}/w.pt")
    names = ["nets.py:linear", "a/w.pt", "nets.py:linear", "b/w.pt"]
    monkeypatch.setattr(sys, "argv", ["probe.py", *names, *DIGITS])
    loaded, _ = probe.load_checkpoints(probe.parse_args())
    assert [name for name, *_ in loaded] == ["nets.py:linear a/w.pt", "nets.py:linear b/w.pt"]  # a row each


@pytest.mark.parametrize("encoder, flags, code, says", [
    (["nets.py:maps"], DIGITS, 1, "nets.py:maps returns (2, 4, 6, 6) of 2 images: features (N, D)"),
    (["nets.py:Pair"], DIGITS, 1, "nets.py:Pair returns tuple of 2 images"),
    (["nets.py:linear"], [*DIGITS, "--image-size", "16"], 1, "cannot be loaded and run (RuntimeError: mat1 and mat2"),
    (["nets.py:broken"], DIGITS, 1, "cannot be loaded and run (KeyError: 'no such layer')"),
    (["nets.py:absent"], DIGITS, 1, "has no attribute 'absent'"),
    (["none.py:build"], DIGITS, 1, "none.py:build cannot be loaded and run (FileNotFoundError"),
    (["nets.py:linear", "nets.pt"], DIGITS, 1, "there is no file 'nets.pt'"),
    (["nets.py:linear", "text.pt"], DIGITS, 1, "'text.pt' holds no state dict"),
    (["nets.py:leaving"], DIGITS, 1, "nets.py:leaving cannot be loaded and run (SystemExit"),
    (["nets.py:whole"], DIGITS, 1, "features (N, D), a tensor, are needed"),
    (["nets.py:nothing"], DIGITS, 1, "nets.py:nothing returns (2, 0) of 2 images"),
    (["nets.py:huge"], DIGITS, 1, "the features of nets.py:huge are not finite, or above 1e+17"),
    (["nets.py:constant"], DIGITS, 1, "nets.py:constant has the same features for all images"),
    (["nets.py:pixels", "nets.py:pixels"], DIGITS, 2, "'nets.py:pixels' is given twice"),
    (["nets.py:pixels"], DIGITS[2:], 2, "names no data: --dataset gives the images to evaluate on"),
    (["nets.py:pixels"], DIGITS[:2], 2, "does not say what images it takes: give --image-size, --mean and --std"),
    (["nets.py:pixels"], [*DIGITS, "--std", "0", "1", "1"], 2, "'0' is not a number"),
    (["torchvision:resnet1"], DIGITS, 1, "torchvision:resnet1 cannot be loaded and run (ValueError: Unknown model"),
    (["timm:resnet10t"], DIGITS, 2, "takes a package that is not here: pip install timm"),
    (["torchvision:resnet18:DEFAULT"], DIGITS, 1, "(URLError: <urlopen error no network>)"),
])
def test_what_is_no_encoder_is_one_sentence(folder, monkeypatch, encoder, flags, code, says):
    def no_network(*_, **__):
        raise URLError("no network")

    (folder / "text.pt").write_text("no weights")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    refused("equivariance.py", *encoder, *flags, *FEW, cwd=folder, code=code, says=says)
