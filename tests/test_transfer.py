"""STL's transfer sets, each from a few files in the format in which it is published, and its table of transfer."""

import hashlib
import json
import pickle
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from test_probe import command, make_folder, untrained

import common
import probe
from common import UserError, load_images

PARTS = {"train": 0, "val": 1, "test": 2}
SIZES = {"flowers102": (4, 4, 6), "dtd": (3, 3, 3), "aircraft": (3, 3, 3), "food101": (6, 0, 4), "pets": (6, 0, 4),
         "cars": (6, 0, 4), "mit67": (6, 0, 4), "cifar100": (20, 0, 10)}


def picture(path, label, part, number=0):
    """Of 10 x 12 pixels, in a colour that says what it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (60 * label, 60 * PARTS[part], 10 * number % 250)).save(path, quality=100, subsampling=0)


def spread(dataset):
    """(part, label, number) of each image, labels in turn."""
    for part, n in zip(PARTS, SIZES[dataset], strict=True):
        yield from ((part, i % 2, i // 2) for i in range(n))


def make_flowers102(root, monkeypatch):
    from torchvision.datasets import Flowers102

    ids, labels = {"trnid": [], "valid": [], "tstid": []}, []
    for part, label, number in spread("flowers102"):
        labels.append(label + 1)
        ids[Flowers102._splits_map[part]].append(len(labels))
        picture(root / f"flowers-102/jpg/image_{len(labels):05d}.jpg", label, part, number)
    savemat(root / "flowers-102/setid.mat", ids)
    savemat(root / "flowers-102/imagelabels.mat", {"labels": labels})
    sums = {key: (name, hashlib.md5((root / "flowers-102" / name).read_bytes()).hexdigest())
            for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    monkeypatch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, **sums})  # the published files' checksums


def lists(dataset, line):
    found = {}
    for part, label, number in spread(dataset):
        found.setdefault(part, []).append(line(part, label, number))
    return found.items()


def make_dtd(root, _):
    def line(part, label, number):
        name = ("banded", "zigzagged")[label]
        picture(root / f"dtd/dtd/images/{name}/{name}_{part}{number}.jpg", label, part, number)
        return f"{name}/{name}_{part}{number}.jpg"

    (root / "dtd/dtd/labels").mkdir(parents=True)
    for part, lines in lists("dtd", line):
        (root / f"dtd/dtd/labels/{part}1.txt").write_text("\n".join(lines) + "\n")


def make_aircraft(root, _):
    data = root / "fgvc-aircraft-2013b/data"

    def line(part, label, number):
        name = f"{PARTS[part]}{label}{number:05d}"
        picture(data / f"images/{name}.jpg", label, part, number)
        return f"{name} {('707-320', 'Boeing 717')[label]}"

    for part, lines in lists("aircraft", line):
        (data / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    (data / "variants.txt").write_text("707-320\nBoeing 717\n")


def make_food101(root, _):
    for part, names in lists("food101", lambda *image: image):
        found = {"waffles": [], "apple_pie": []}
        for _, label, number in names:
            name = ("apple_pie", "waffles")[label]
            found[name].append(f"{name}/{part}{number}")
            picture(root / f"food-101/images/{found[name][-1]}.jpg", label, part, number)
        (root / "food-101/meta").mkdir(exist_ok=True)
        (root / f"food-101/meta/{part}.json").write_text(json.dumps(found))


def make_pets(root, _):
    def line(part, label, number):
        name = f"{('Abyssinian', 'american_bulldog')[label]}_{PARTS[part]}{number}"
        picture(root / f"oxford-iiit-pet/images/{name}.jpg", label, part, number)
        return f"{name} {label + 1} {label + 1} 1"

    (root / "oxford-iiit-pet/annotations").mkdir(parents=True)
    for part, lines in lists("pets", line):
        name = "trainval" if part == "train" else part
        (root / f"oxford-iiit-pet/annotations/{name}.txt").write_text("\n".join(lines) + "\n")


def make_cars(root, _):
    folder, kinds = root / "stanford_cars", [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["Acura RL", "Audi R8"], dtype=object)})
    for part, images in lists("cars", lambda *image: image):
        annotations = np.zeros(len(images), dtype=kinds)
        for i, (_, label, number) in enumerate(images):
            picture(folder / f"cars_{part}/{i + 1:05d}.jpg", label, part, number)
            annotations[i] = 30, np.uint8(label + 1), f"{i + 1:05d}.jpg"
        path = "devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
        savemat(folder / path, {"annotations": annotations})


def make_mit67(root, _):
    def line(part, label, number):
        name = f"{('airport_inside', 'bar')[label]}/a {part}_{number}.jpg"
        picture(root / "mit67/Images" / name, label, part, number)
        return name

    for part, lines in lists("mit67", line):
        (root / f"mit67/{part.title()}Images.txt").write_text("\n".join(lines))


def make_cifar100(root, monkeypatch):
    from torchvision.datasets import CIFAR100

    def write(name, value):
        path = root / "cifar-100-python" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(value))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    for part, images in lists("cifar100", lambda *image: image):
        rows = np.array([[60 * label] * 1024 + [60 * PARTS[part]] * 1024 + [10 * number] * 1024
                         for _, label, number in images], dtype=np.uint8)
        labels = [label for _, label, _ in images]
        entry = write(part, {"data": rows, "fine_labels": labels, "coarse_labels": [0] * len(labels)})
        monkeypatch.setattr(CIFAR100, f"{part}_list", [entry])
    name, checksum = write("meta", {"fine_label_names": ["apple", "worm"], "coarse_label_names": ["fish"]})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": checksum})


def make_caltech101(root, _):
    for label, (name, n) in enumerate((("Faces", 33), ("airplanes", 41), ("BACKGROUND_Google", 2))):
        for i in range(n):
            picture(root / f"caltech101/101_ObjectCategories/{name}/image_{i + 1:04d}.jpg", label, "train", i)


def make_sun397(root, _):
    for label, (name, n) in enumerate((("a/abbey", 102), ("a/apse/indoor", 105))):
        for i in range(n):
            picture(root / f"SUN397/{name}/sun_{i:03d}x.jpg", label, "train", i)
    (root / "SUN397/ClassName.txt").write_text("/a/abbey\n/a/apse/indoor\n")


def make(dataset, root, monkeypatch):
    globals()[f"make_{dataset}"](root, monkeypatch)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


@pytest.mark.parametrize("dataset", SIZES)
def test_each_set_in_its_own_format(dataset, tmp_path, monkeypatch):
    make(dataset, tmp_path, monkeypatch)
    train, test = (load_images(dataset, split, tmp_path, 8) for split in ("train", "test"))
    names = {"flowers102": ["pink primrose", "hard-leaved pocket orchid"], "dtd": ["banded", "zigzagged"],
             "aircraft": ["707-320", "Boeing 717"], "food101": ["apple_pie", "waffles"], "cifar100": ["apple", "worm"],
             "pets": ["Abyssinian", "American Bulldog"], "cars": ["Acura RL", "Audi R8"],
             "mit67": ["airport_inside", "bar"]}
    own = [part for part, n in zip(PARTS, SIZES[dataset], strict=True) if n]
    for data, parts in ((train, own[:-1]), (test, ["test"])):
        assert data.images.shape[1:] == (3, 8, 8) and data.classes[:2] == names[dataset]
        expected = sorted((label, PARTS[part], number) for part, label, number in spread(dataset) if part in parts)
        label, part, number = (data.images[:, :, 4, 4] / torch.tensor([60, 60, 10])).round().int().T.tolist()
        assert sorted(zip(label, part, number, strict=True)) == expected and data.labels.tolist() == label
    if common.TRANSFER[dataset][1] is None:  # its own validation split comes last
        files, _ = common.list_transfer(dataset, "val", tmp_path)
        assert len(files) == SIZES[dataset][1]
        places = (train.images[:, 1, 4, 4].float() / 60).round().tolist()
        assert places == [0.0] * SIZES[dataset][0] + [1.0] * len(files)
    if dataset == "cifar100":
        return
    with pytest.raises(UserError, match=f"{dataset} is there to evaluate on, not to train") as error:
        load_images(dataset, "unlabeled", tmp_path, 8)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("dataset, train_each, test_each", [("caltech101", (30, 30), (3, 11)),
                                                            ("sun397", (50, 50), (50, 50))])
def test_sets_without_splits_are_drawn_from_once(dataset, train_each, test_each, tmp_path, monkeypatch):
    make(dataset, tmp_path, monkeypatch)
    (train, classes), (test, _) = (common.list_transfer(dataset, split, tmp_path) for split in ("train", "test"))
    assert len(classes) == 2
    for files, each in ((train, train_each), (test, test_each)):
        assert tuple(np.bincount([label for _, label in files])) == each
        assert all(Path(path).is_file() and classes[label] in str(path) for path, label in files)
    assert len({path for path, _ in train + test}) == sum(train_each) + sum(test_each)  # none in both
    assert train == common.list_transfer(dataset, "train", tmp_path)[0]
    assert [path for path, _ in train] != sorted(path for path, _ in train)
    data = load_images(dataset, "test", tmp_path, 8)
    assert data.labels.tolist() == (data.images[:, 0, 4, 4].float() / 60).round().int().tolist()


def test_images_are_enlarged_bicubically_and_decoded_once(tmp_path, monkeypatch):
    make("mit67", tmp_path, monkeypatch)
    generator = np.random.default_rng(0)
    for path in (tmp_path / "mit67/Images").rglob("*.jpg"):
        Image.fromarray(generator.integers(90, 160, (12, 12, 3), dtype=np.uint8)).save(path, "PNG")
    first = load_images("mit67", "train", tmp_path, 24)
    files, _ = common.list_transfer("mit67", "train", tmp_path)
    expected = np.array(Image.open(files[0][0]).resize((24, 24), Image.Resampling.BICUBIC))
    assert torch.equal(first.images[0].permute(1, 2, 0), torch.from_numpy(expected))
    resized = common.resize(torch.from_numpy(np.array(Image.open(files[0][0]))).permute(2, 0, 1)[None], 24)
    assert (resized[0].int() - first.images[0].int()).abs().max() <= 1
    monkeypatch.setattr(common, "decode", None)
    assert torch.equal(load_images("mit67", "train", tmp_path, 24).images, first.images)


@pytest.mark.parametrize("dataset", [name for name in common.TRANSFER])
def test_a_set_that_is_not_to_be_had_is_one_sentence(dataset, tmp_path):
    says = {"mit67": "mit67 has no download, put mit67/Images/<class>/.*TestImages.txt into '.*TrainImages.txt'",
            "cars": "cars has no download, put stanford_cars/, with .*withlabels.mat into '.*Dataset not found"}
    with pytest.raises(UserError, match=says.get(dataset, f"{dataset} could not be downloaded to or read from")) as no:
        load_images(dataset, "train", tmp_path, 8)
    assert "\n" not in str(no.value)


def test_the_table_of_transfer(tmp_path, monkeypatch, capsys):
    untrained(tmp_path / "a.ckpt")
    for dataset in ("cifar100", "flowers102", "mit67", "caltech101", "dtd"):
        make(dataset, tmp_path, monkeypatch)
    for part in ("train", "val"):  # of one class: what fails while it is evaluated takes no other set with it
        path = tmp_path / f"dtd/dtd/labels/{part}1.txt"
        path.write_text("".join(line for line in path.read_text().splitlines(True) if line.startswith("banded")))
    args = command(monkeypatch, tmp_path / "a.ckpt", "--transfer", "all", "--data-dir", tmp_path, "--features", "mu",
                   "--json", tmp_path / "a.json")
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    probe.run_evaluation(args, probe.transfer)
    shown = capsys.readouterr().out
    had = ["cifar100", "mit67", "flowers102", "caltech101"]  # in STL's order
    (line,) = [line for line in shown.splitlines() if line.startswith("| error, by data set")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["error, by data set", "features", *had, "mean"]
    rows = probe.read_rows(tmp_path / "a.json")
    assert [(row["dataset"], row["mean_per_class"]) for row in rows if row["checkpoint"]] == [
        ("cifar100", False), ("mit67", False), ("flowers102", True), ("caltech101", True)]
    assert {row["method"] for row in rows} == {"predictive_transform", "random encoder (nin)"}
    errors = [row["error_mean"] for row in rows if row["checkpoint"]]
    (line,) = [line for line in shown.splitlines() if "a.ckpt" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == [f"{error:.3f}" for error in [*errors, np.mean(errors)]]
    for name in set(common.TRANSFER).difference(had):
        assert shown.count(f"\n- {name} is left out: ") == 1
    assert ("flowers102: 8 training images, the L2 weight of linear chosen on its own validation split; 6 test images"
            in shown)
    assert "mit67: 6 training images, the L2 weight of linear chosen on 12.5% of them; 4 test images" in shown
    assert "both are drawn with seed 0, as it has no splits" in shown and shown.count("L-BFGS, at most 5,000") == 1


def test_a_list_without_images_is_one_sentence(tmp_path, monkeypatch):
    make("mit67", tmp_path, monkeypatch)
    (tmp_path / "mit67/TestImages.txt").write_text("")
    with pytest.raises(UserError, match="mit67' lists no images to test on"):
        common.load_images("mit67", "test", tmp_path)


def test_wrong_commands_of_transfer(tmp_path, monkeypatch):
    untrained(tmp_path / "a.ckpt")
    monkeypatch.chdir(tmp_path)
    for flags in (["--dataset", "digits"], ["--classifiers", "knn"], ["--train-sizes", 20]):
        with pytest.raises(UserError, match="leave out --dataset, --classifiers and --train-sizes") as error:
            command(monkeypatch, "a.ckpt", "--transfer", "dtd", *flags)
        assert error.value.exit_code == 2
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "a.ckpt", "--transfer", "imagenet")
    assert ended.value.code == 2
    args = command(monkeypatch, "a.ckpt", "--transfer", "dtd", "cars")
    with pytest.raises(UserError, match="dtd is left out: dtd could not be downloaded"):
        probe.transfer(args, torch.device("cpu"))
    make_folder(tmp_path / "dtd")
    with pytest.raises(UserError, match="dtd is left out: the folder 'dtd' that is here has its name"):
        probe.transfer(args, torch.device("cpu"))
    assert len(load_images("dtd", "train", image_size=8).images) == 18  # a folder goes before the set
