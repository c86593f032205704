"""Encoders, data, and checkpoints."""

import errno
import hashlib
import json
import os
import pickle
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import shared_forks
from PIL import Image

import common
from avt import AVT
from common import NIN, AlexNet, ResNet18, UserError, load_checkpoint, load_encoder, load_images, reparameterize
from predictive_transform import PredictiveTransform
from vte_ba import VTEBarberAgakov
from vte_infonce import SeparatedCritic, VTEInfoNCE

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("own_folder")


def make_folder(root, n=3, size=(20, 30), classes=("cat", "dog"), splits=("train", "test")):
    """Images whose colour says which they are."""
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", size, (10 * i, 50 * label, 200)).save(root / split / name / f"{i}.png")
    return root


# ------------------------------------------------------------------------------------------------------------ encoders


def parameters_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_encoders_have_the_papers_sizes():
    for encoder, trunk, hidden in ((NIN(), 561_360, 512), (AlexNet(), 2_469_696, 1024)):
        assert parameters_of(encoder.trunk) == trunk
        assert parameters_of(encoder.mu) == parameters_of(encoder.logvar) == hidden * 512 + 512
        mu, logvar = encoder(torch.randn(2, 3, 32, 32))
        assert mu.shape == logvar.shape == (2, 512)


def test_nin_is_the_table_layer_by_layer():
    kinds = {torch.nn.Conv2d: "conv", torch.nn.BatchNorm2d: "norm", torch.nn.ReLU: "relu", torch.nn.MaxPool2d: "max",
             torch.nn.AvgPool2d: "avg", torch.nn.Flatten: "flat"}
    leaves = [module for module in NIN().trunk.modules() if type(module) in kinds]
    block = ["conv", "norm", "relu"]
    assert [kinds[type(m)] for m in leaves] == 3 * block + ["max"] + 3 * block + ["avg", "flat"]
    convolutions = [m for m in leaves if isinstance(m, torch.nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convolutions] == [
        (3, 192, 5), (192, 160, 1), (160, 96, 1), (96, 192, 5), (192, 192, 1), (192, 8, 1)]
    assert all(m.bias is None and m.stride == (1, 1) for m in convolutions)


@pytest.mark.parametrize("image_size", [32, 33, 48, 64])
@pytest.mark.parametrize("encoder", [NIN, AlexNet])
def test_encoders_at_other_sizes(encoder, image_size):
    assert encoder(image_size)(torch.randn(2, 3, image_size, image_size))[0].shape == (2, 512)


@pytest.mark.parametrize("encoder", [NIN, AlexNet, ResNet18])
def test_a_deterministic_encoder_has_the_same_keys_without_a_log_variance(encoder):
    """Checkpoints are read by these keys."""
    module = encoder(32, probabilistic=False)
    assert module(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    names = {name.split(".")[0] for name in module.state_dict()}
    assert names == ({"trunk"} if encoder is ResNet18 else {"trunk", "mu"})


def test_an_encoder_that_does_not_fit_is_one_sentence():
    for name, size, says in (("alexnet", 31, "32 pixels or more"), ("resnet18", 32, "deterministic and z is sampled")):
        with pytest.raises(UserError, match=f"--encoder {name} does not fit here: .*{says}") as problem:
            common.build_encoder(name, size)
        assert problem.value.exit_code == 2


@pytest.mark.parametrize("model", [
    lambda encoder: PredictiveTransform(encoder), lambda encoder: AVT(encoder),
    lambda encoder: VTEBarberAgakov(NIN(8), encoder), lambda encoder: VTEBarberAgakov(encoder, NIN(8)),
    lambda encoder: VTEInfoNCE(NIN(8), encoder, SeparatedCritic()),
    lambda encoder: VTEInfoNCE(encoder, NIN(8), SeparatedCritic()),
])
def test_a_deterministic_encoder_is_refused_by_every_model_that_samples(model):
    images = torch.randn(2, 3, 8, 8)
    model = model(NIN(8, probabilistic=False))
    inputs = {PredictiveTransform: 1, VTEBarberAgakov: 3}.get(type(model), 2)
    with pytest.raises(UserError, match=r"\(mu, logvar\), not a tensor \(2, 512\)"):
        model(*[images] * inputs)


def test_reparameterize_draws_from_the_stated_normal():
    torch.manual_seed(0)
    mu, logvar = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.0, 2.0, -3.0])
    z = reparameterize(mu.expand(200_000, 3), logvar.expand(200_000, 3))
    std = torch.exp(logvar / 2)
    assert ((z.mean(0) - mu).abs() < 5 * std / 200_000**0.5).all()
    assert ((z.std(0) / std - 1).abs() < 5 / 400_000**0.5).all()
    mu.requires_grad_(), logvar.requires_grad_()
    torch.manual_seed(1)
    z = reparameterize(mu, logvar)
    z.sum().backward()  # dz/dmu = 1, dz/dlogvar = (z - mu) / 2
    assert torch.equal(mu.grad, torch.ones(3)) and torch.allclose(logvar.grad, ((z - mu) / 2).detach())


# ---------------------------------------------------------------------------------------------------------------- data


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert len(train.images) + len(test.images) == 1797
    assert train.images.shape[1:] == (3, 32, 32) and train.images.dtype == torch.uint8
    digits = load_digits()
    assert train.classes == list("0123456789") and train.largest == 8
    assert torch.equal(torch.cat([train.labels, test.labels]).bincount(), torch.from_numpy(digits.target).bincount())
    assert test.labels.bincount(minlength=10).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]  # a fifth of each
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    # The enlargement keeps what was there: shrunk again, each image is nearest to the original that has its label.
    shrunk = torch.nn.functional.avg_pool2d(test.images[:, :1].float(), 4).flatten(1) * 16 / 255
    nearest = torch.cdist(shrunk, torch.from_numpy(digits.data).float()).argmin(1)
    assert len(nearest.unique()) == len(nearest) and (digits.target[nearest] == test.labels.numpy()).all()
    few = load_images("digits", "train", limit=7)
    assert torch.equal(few.images, train.images[:7]) and torch.equal(few.labels, train.labels[:7])


def test_folder_of_images_of_any_size(tmp_path):
    folder = make_folder(tmp_path / "pets", n=3, size=(20, 30))
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    images, labels, classes, largest = load_images(str(folder), "train", image_size=16)
    assert images.shape == (6, 3, 16, 16) and classes == ["cat", "dog"] and largest == 30
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]  # the classes in turn: the first n are balanced
    assert images[:, :, 8, 8].tolist() == [[10 * i, 50 * label, 200] for i in range(3) for label in range(2)]
    assert torch.equal(load_images(str(folder), "unlabeled", image_size=16).images, images)
    half = Image.new("RGB", (40, 20))
    half.paste((255, 255, 255), (0, 0, 20, 20))
    half.save(folder / "train" / "cat" / "0.png")  # 40 x 20: the centre 20 x 20 is kept
    changed = load_images(str(folder), "train", image_size=16)
    columns = changed.images[0, 0, 8]
    assert columns[:7].min() == 255 and columns[9:].max() == 0 and changed.largest == 40


def colours(data):
    return sorted(data.images[:, :, 4, 4].tolist())


@pytest.mark.parametrize("where", ["", "photos/2024", "train", "train/holiday.jpg"])
def test_a_folder_without_classes_trains_and_is_not_evaluated(where, tmp_path):
    """Images at the top of a folder, below it, or in train/; a folder named like an image is a folder."""
    folder = tmp_path / "pets"
    (folder / where).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (9, 9), (10 * i, 0, 0)).save(folder / where / f"{i}.png")
    classes = ["holiday.jpg"] if where == "train/holiday.jpg" else []
    for split in ("unlabeled", "train+unlabeled"):
        data = load_images(str(folder), split, image_size=8)
        assert colours(data) == [[0, 0, 0], [10, 0, 0], [20, 0, 0]] and data.classes == classes
        assert data.labels is None or data.labels.tolist() == [0, 0, 0]
    for split in ("test",) if classes else ("train", "test"):
        with pytest.raises(UserError, match=r"'.*pets' has no labelled train/ and test/ \(or val/\) to evaluate on"):
            load_images(str(folder), split, image_size=8)


def test_val_serves_where_there_is_no_test_and_folders_within_a_class_belong_to_it(tmp_path):
    folder = make_folder(tmp_path / "pets", n=1, splits=("train", "val"))
    (folder / "train" / "cat" / "indoors" / "2024").mkdir(parents=True)
    Image.new("RGB", (9, 9), (99, 0, 0)).save(folder / "train" / "cat" / "indoors" / "2024" / "a.JPEG", quality=100)
    train, test = load_images(str(folder), "train", image_size=8), load_images(str(folder), "test", image_size=8)
    assert train.labels.tolist() == [0, 1, 0] and abs(train.images[2, 0, 4, 4] - 99.0) < 3
    assert colours(test) == [[0, 0, 200], [0, 50, 200]] and test.classes == ["cat", "dog"]
    Image.new("RGB", (9, 9), (7, 7, 7)).save((folder / "val").rename(folder / "test") / "dog" / "1.png")
    make_folder(folder.with_name("more"), n=1, splits=("val",))
    (folder.with_name("more") / "val").rename(folder / "val")
    assert len(load_images(str(folder), "test", image_size=8).images) == 3  # test/ goes before val/


def test_hidden_files_and_folders_are_no_images(tmp_path):
    folder = make_folder(tmp_path / "pets", n=1)
    for hidden in (".ipynb_checkpoints", "cat/.thumbnails", ".hidden/cat"):
        (folder / "train" / hidden).mkdir(parents=True)
        (folder / "train" / hidden / "0.png").write_text("no image")
    (folder / "train" / "cat" / "._0.png").write_text("no image, but what a file manager left")
    data = load_images(str(folder), "train", image_size=8)
    assert len(data.images) == 2 and data.classes == ["cat", "dog"]


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded."""
    names, decode = [], common.decode
    monkeypatch.setattr(common, "decode", lambda path, *how: names.append(os.path.basename(path)) or decode(path, *how))
    return names


def test_folder_cache_is_used_and_refreshed(tmp_path, decoded):
    folder = make_folder(tmp_path / "pets")

    def load():
        decoded.clear()
        data = load_images(str(folder), "train", image_size=8)
        return data, len(decoded)

    data, count = load()
    assert count == 6
    again, count = load()
    assert count == 0 and torch.equal(again.images, data.images) and torch.equal(again.labels, data.labels)
    assert again.largest == data.largest == 30
    (cache,) = (tmp_path / "data").iterdir()
    assert re.fullmatch(r"pets-[0-9a-f]{8}\.train-8\.cache", cache.name)
    assert load_images(str(folder), "train", image_size=9).images.shape[-1] == 9  # another size, another cache

    changed = folder / "train" / "dog" / "1.png"
    Image.new("RGB", (20, 30), (1, 2, 3)).save(changed)
    os.utime(changed, ns=(1, 1))
    data, count = load()
    assert count == 6 and data.images[3, :, 4, 4].tolist() == [1, 2, 3]
    assert torch.equal(data.images[[0, 1, 2, 4, 5]], again.images[[0, 1, 2, 4, 5]])
    changed.unlink()
    data, count = load()
    assert count == 5 and len(data.images) == 5
    cache.write_bytes(b"not a cache")
    assert load()[1] == 5 and load()[1] == 0
    states = torch.load(cache)["states"]
    for wrong in (torch.zeros(5, 3, 8, 8), torch.zeros(5, 3, 4, 4, dtype=torch.uint8)):
        torch.save({"states": states, "images": wrong, "longest": 8}, cache)
        assert load()[0].images.float().mean() > 0


def test_folders_of_one_name_have_a_cache_each(tmp_path, decoded):
    folders = [make_folder(tmp_path / place / "pets") for place in ("a", "b")]
    for folder in (*folders, *folders):
        load_images(str(folder), "train", str(tmp_path / "data"), 8)
    assert len(decoded) == 12 and len(list((tmp_path / "data").iterdir())) == 2


def test_files_that_changed_places_are_read_again(tmp_path):
    """Of one size and one date, as an unpacked archive may have them."""
    folder = make_folder(tmp_path / "pets", n=2)
    files = [folder / "train" / "dog" / f"{i}.bmp" for i in range(2)]
    for i, file in enumerate(files):
        Image.new("RGB", (8, 8), (200 + i, 0, 0)).save(file)
        os.utime(file, ns=(1, 1))
    before = load_images(str(folder), "train", image_size=8)
    files[0].rename(folder / "aside"), files[1].rename(files[0]), (folder / "aside").rename(files[1])
    after = load_images(str(folder), "train", image_size=8)
    reds = [data.images[data.labels == 1][:, 0, 0, 0].tolist() for data in (before, after)]
    assert reds[0] == [200, 0, 201, 10] and reds[1] == [201, 0, 200, 10]


def test_what_is_ignored_is_counted_and_unusual_suffixes_are_read(tmp_path):
    folder = make_folder(tmp_path / "pets", n=1, splits=("train",))
    dog = folder / "train" / "dog"
    (dog / "2020" / "may").mkdir(parents=True)
    for name in ("a.jfif", "b.JPE", "c.jp2", "d.avif", "e.pnm", "2020/may/f.png"):
        Image.new("RGB", (8, 8)).save(dog / "g.jpg" if name[2:] in ("jfif", "JPE") else dog / name)
        if (dog / "g.jpg").exists():
            (dog / "g.jpg").rename(dog / name)
    for name in ("cat/a.heic", "cat/b.heic", "dog/2020/readme", "loose.png"):
        (folder / "train" / name).write_bytes(b"")
    (folder / "train" / "dog" / ".hidden.txt").touch()
    with pytest.warns(UserWarning) as said:
        data = load_images(str(folder), "train", image_size=8)
    assert data.labels.bincount().tolist() == [1, 7]
    assert str(said[0].message) == (f"in '{folder}/train', 4 of 12 files are ignored: 2 .heic, 1 in no class folder, "
                                    "1 without a suffix")


def test_a_limit_decodes_no_more_than_it_needs_and_has_a_cache_of_its_own(tmp_path, decoded):
    folder = make_folder(tmp_path / "pets", n=4)
    few = load_images(str(folder), "train", image_size=8, limit=3)
    assert len(decoded) == 3 and few.labels.tolist() == [0, 1, 0]
    whole = load_images(str(folder), "train", image_size=8)
    assert len(decoded) == 3 + 8 and torch.equal(few.images, whole.images[:3])
    again = load_images(str(folder), "train", image_size=8, limit=3)
    assert len(decoded) == 11 and torch.equal(again.images, few.images)
    assert {path.name.partition(".")[2] for path in Path("data").iterdir()} == {"train-8.cache", "train-8-first3.cache"}


def test_folder_problems_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no data set 'cifar11': give --dataset digits, cifar10, stl10") as no:
        load_images("cifar11", "train")
    assert no.value.exit_code == 2
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    for folder in ("empty", "empty/train/cat"):
        with pytest.raises(UserError, match=r"holds no images \(.avif, .*it must hold train/<class>/\*"):
            load_images(str(tmp_path / folder), "unlabeled")
    folder = make_folder(tmp_path / "pets")
    (folder / "test" / "bird").mkdir()
    with pytest.raises(UserError, match="test/bird' has no counterpart in '.*train'"):
        load_images(str(folder), "test")

    loose = tmp_path / "loose"
    make_folder(loose, splits=("train",))
    (loose / "test").mkdir()
    Image.new("RGB", (8, 8)).save(loose / "test" / "0.png")  # of no class
    with pytest.raises(UserError, match="loose/test' holds no images"):
        load_images(str(loose), "test")

    def unreadable(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", unreadable)  # the tests may run as one who may read everything
    with pytest.raises(PermissionError, match="Permission denied: .*pets/train'"):  # which a command says
        load_images(str(folder), "train")


def test_all_images_that_cannot_be_read_are_listed_at_once(tmp_path):
    folder = make_folder(tmp_path / "pets", n=8)
    (folder / "train" / "dog" / "1.png").write_bytes((folder / "train" / "dog" / "1.png").read_bytes()[:40])
    (folder / "train" / "cat" / "2.png").unlink()
    (folder / "train" / "cat" / "2.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="^2 of 16 images cannot be read, repair or remove them: ") as two:
        load_images(str(folder), "train")
    assert "dog/1.png' (" in str(two.value) and "cat/2.png' (" in str(two.value) and "..." not in str(two.value)
    for i in range(8):
        (folder / "train" / "dog" / f"{i}.png").write_text("no image")
        (folder / "train" / "cat" / f"{i}.png").unlink()
        (folder / "train" / "cat" / f"{i}.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="^16 of 16 images cannot be read") as many:
        load_images(str(folder), "train")
    assert str(many.value).count(".png' (") == 10 and str(many.value).endswith("), ...")
    assert str(many.value).count("no image of a kind that is read") == 5


def test_links_are_followed_wherever_they_lead(tmp_path):
    folder = make_folder(tmp_path / "pets", n=1)
    (tmp_path / "else").mkdir()
    (folder / "train" / "dog").rename(tmp_path / "else" / "dog")
    (folder / "train" / "dog").symlink_to(tmp_path / "else" / "dog")  # a class
    (folder / "train" / "cat" / "0.png").rename(tmp_path / "else" / "0.png")
    (folder / "train" / "cat" / "0.png").symlink_to(tmp_path / "else" / "0.png")  # an image
    data = load_images(str(folder), "train", image_size=8)
    assert data.labels.tolist() == [0, 1] and colours(data) == [[0, 0, 200], [0, 50, 200]]


def test_cifar10_in_its_own_format(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    generator = np.random.default_rng(0)

    def write(name, value):
        (base / name).write_bytes(pickle.dumps(value))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    pixels = {f"data_batch_{k}": generator.integers(0, 256, (4, 3072), dtype=np.uint8) for k in range(1, 6)}
    pixels["test_batch"] = generator.integers(0, 256, (3, 3072), dtype=np.uint8)
    sums = {name: write(name, {"data": rows, "labels": list(range(len(rows)))}) for name, rows in pixels.items()}
    names = list("abcdefghij")
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in pixels if name != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names",
                                          "md5": write("batches.meta", {"label_names": names})})
    images, labels, classes, largest = load_images("cifar10", "train", tmp_path)
    assert images.shape == (20, 3, 32, 32) and labels.tolist() == 5 * [0, 1, 2, 3] and classes == names
    assert largest == 32
    assert torch.equal(images[4].flatten(), torch.from_numpy(pixels["data_batch_2"][0]))  # red plane, green, blue
    test = load_images("cifar10", "test", tmp_path)
    assert torch.equal(test.images.flatten(1), torch.from_numpy(pixels["test_batch"])) and len(test.labels) == 3
    few = load_images("cifar10", "unlabeled", tmp_path, limit=5)
    assert torch.equal(few.images, images[:5]) and few.labels.tolist() == [0, 1, 2, 3, 0]
    assert common.image_statistics("cifar10", images)[0] == (0.4914, 0.4822, 0.4465)


def test_stl10_in_its_own_format(tmp_path, monkeypatch):
    from torchvision.datasets import STL10

    base = tmp_path / STL10.base_folder
    base.mkdir()
    generator = np.random.default_rng(0)
    content = {"train_X.bin": generator.integers(0, 256, (4, 3, 96, 96), dtype=np.uint8),
               "train_y.bin": np.array([1, 10, 5, 2], dtype=np.uint8),
               "unlabeled_X.bin": generator.integers(0, 256, (6, 3, 96, 96), dtype=np.uint8),
               "test_X.bin": generator.integers(0, 256, (2, 3, 96, 96), dtype=np.uint8),
               "test_y.bin": np.array([3, 4], dtype=np.uint8)}
    sums = {}
    for name, array in content.items():
        (base / name).write_bytes(array.tobytes())
        sums[name] = hashlib.md5(array.tobytes()).hexdigest()
    (base / "class_names.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setattr(STL10, "train_list", [[n, sums[n]] for n in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")])
    monkeypatch.setattr(STL10, "test_list", [[n, sums[n]] for n in ("test_X.bin", "test_y.bin")])
    images, labels, classes, _ = load_images("stl10", "train", tmp_path, image_size=96)
    assert labels.tolist() == [0, 9, 4, 1] and classes == list("abcdefghij")
    assert torch.equal(images, torch.from_numpy(content["train_X.bin"]).transpose(2, 3))  # stored column by column
    unlabeled, labels, _, largest = load_images("stl10", "unlabeled", tmp_path)
    assert labels is None and unlabeled.shape == (6, 3, 32, 32) and largest == 96
    both = load_images("stl10", "train+unlabeled", tmp_path, limit=9)
    assert len(both.images) == 9 and torch.equal(both.images[4:], unlabeled[:5])
    picture = Image.fromarray(content["unlabeled_X.bin"][0].transpose(2, 1, 0))
    resized = torch.from_numpy(np.array(picture.resize((32, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert (unlabeled[0].int() - resized.int()).abs().max() <= 1
    assert load_images("stl10", "test", tmp_path).labels.tolist() == [2, 3]


def test_a_download_that_fails_says_what_works_offline(tmp_path, monkeypatch):
    from http.client import BadStatusLine
    from tarfile import ReadError
    from urllib.error import URLError

    import torchvision.datasets

    for dataset, class_name in (("cifar10", "CIFAR10"), ("stl10", "STL10")):
        for failure in (URLError("no route"), RuntimeError("File not found or corrupted."), EOFError(),
                        BadStatusLine("x"), ReadError("truncated")):
            def fail(*args, failure=failure, **kwargs):
                raise failure

            monkeypatch.setattr(torchvision.datasets, class_name, fail)
            with pytest.raises(UserError, match="--dataset digits, which works offline, or --dataset DIR"):
                load_images(dataset, "train", tmp_path)


def test_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (50, 3, 9, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, 2] = 128
    mean, std = common.image_statistics("a folder", images)
    values = images.double() / 255
    assert np.allclose(mean, values.mean((0, 2, 3))) and np.allclose(std[:2], values.std((0, 2, 3), unbiased=False)[:2])
    assert std[2] == pytest.approx(1 / 255)  # constant: no division by zero
    scale, shift = common.normalization(mean, std)
    normal = images.float() * scale[:, None, None] + shift[:, None, None]
    assert normal[:, :2].mean((0, 2, 3)).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------------- checkpoints


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = AlexNet()


def write_checkpoint(path, method="predictive_transform", encoder="alexnet", image_size=32, **changes):
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    config = {"encoder": encoder, "image_size": image_size, "dataset": "digits", "mean": [0.5] * 3, "std": [0.2] * 3}
    common.save_checkpoint(path, method, config, model, optimizer, 3, {"command": "python a.py", "gpu": None})
    if changes:
        torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return model


def test_checkpoint_round_trip_holds_plain_data_only(tmp_path):
    model = write_checkpoint(tmp_path / "a.ckpt")
    checkpoint = load_checkpoint(tmp_path / "a.ckpt", "predictive_transform")
    assert checkpoint["format_version"] == 1 and checkpoint["epoch"] == 3 and "optimizer" in checkpoint
    json.dumps([checkpoint["config"], checkpoint["made_with"]])
    images = torch.randn(2, 3, 32, 32)
    encoder = load_encoder(checkpoint, "a.ckpt")
    assert not encoder.training and torch.equal(encoder(images)[0], model.encoder(images)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]  # no temporary file is left


def test_an_exported_encoder_is_small_and_read_with_and_without_this_code(tmp_path):
    from safetensors.torch import load_file

    config = {"encoder": "alexnet", "image_size": 32, "dataset": "/home/me/pets", "output": "/home/me/a.ckpt",
              "mean": [0.5] * 3, "std": [0.2] * 3, "seed": 4}
    model = write_checkpoint(tmp_path / "a.ckpt", config=config)
    common.export_encoder(load_checkpoint(tmp_path / "a.ckpt"), tmp_path / "a.safetensors")
    weights = load_file(tmp_path / "a.safetensors")
    assert weights.keys() == model.encoder.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.encoder.state_dict().items())
    bytes_of_weights = sum(value.nbytes for value in weights.values())
    assert bytes_of_weights < (tmp_path / "a.safetensors").stat().st_size < bytes_of_weights + 10_000
    assert b"/home/me" not in (tmp_path / "a.safetensors").read_bytes()
    checkpoint = load_checkpoint(tmp_path / "a.safetensors", "predictive_transform")
    assert checkpoint["config"]["dataset"] == "pets" and checkpoint["config"]["seed"] == 4
    encoder, images = load_encoder(checkpoint, "a.safetensors"), torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images)[0], model.encoder(images)[0])
    common.export_encoder(load_checkpoint(tmp_path / "a.ckpt"), tmp_path / "half.safetensors", torch.bfloat16)
    for name, value in load_checkpoint(tmp_path / "half.safetensors")["encoder"].items():
        assert torch.equal(value, model.encoder.state_dict()[name].bfloat16().float() if value.dim() > 1 else
                           model.encoder.state_dict()[name])
    content = (tmp_path / "a.safetensors").read_bytes()
    for damaged in (content[:1000], content[:-4], b"", b"\xff" * 100):
        (tmp_path / "b.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="b.safetensors' is no checkpoint of minTER, or it is truncated"):
            load_checkpoint(tmp_path / "b.safetensors")


def test_features_of_ones_own_images(tmp_path):
    """Of tensors and of files, of another size than the encoder's, in batches that do not divide them."""
    model = write_checkpoint(tmp_path / "a.ckpt")
    folder = make_folder(tmp_path / "pets", size=(32, 32))
    files = sorted(folder.glob("*/*/*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    with torch.no_grad():
        expected = model.encoder((images / 255 - 0.5) / 0.2)[0]
    for given in (files, images, images.repeat_interleave(2, 2).repeat_interleave(2, 3)):
        features = common.load_features(tmp_path / "a.ckpt", given, batch_size=5)
        assert features.shape == (12, 512) and not features.requires_grad
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images, says", [
    (torch.rand(2, 3, 8, 8), r"uint8, not \(2, 3, 8, 8\) torch.float32"),
    (np.zeros((2, 3, 8, 8)), "paths of image files"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), r"not \(3, 8, 8\)"), ([], "list of files is empty"),
    (["none.png"], "no such file"), ("none.png", "no such file"), (Path("none.png"), "no such file")])
def test_features_of_what_is_no_image_are_refused(images, says, tmp_path):
    write_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=says):
        common.load_features(tmp_path / "a.ckpt", images)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
@pytest.mark.parametrize(("setting", "new_pages"), [({}, False), ({"MINTER_KEEP_MEMORY": "0"}, True)])
def test_freed_memory_is_kept_unless_told_otherwise(setting, new_pages, tmp_path):
    """64 MiB freed and asked for again, 4 times after the heap has settled: 16,384 page faults each time (32 of huge
    pages), or none."""
    code = """
import resource, torch, common
common.keep_freed_memory()
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    (tmp_path / "pages.py").write_text(code)
    result = shared_forks().run(tmp_path / "pages.py", cwd=tmp_path, environment=setting)
    assert result.returncode == 0, result.stderr
    assert (int(result.stdout) > 4 * 16) == new_pages


def test_memory_that_runs_out_is_one_sentence_and_other_errors_are_not_hidden(capsys):
    with pytest.raises(SystemExit) as exit_:
        common.run_command(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert exit_.value.code == 1
    assert "memory ran out; smaller or fewer images" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="size of tensor"):
        common.run_command(lambda: torch.ones(2) + torch.ones(3))


def test_provenance_says_what_made_a_result():
    made_with = common.provenance(torch.device("cpu"))
    assert made_with.keys() == {"command", "processor", "threads", "gpu", "python", "torch", "commit"}
    assert made_with["torch"] == torch.__version__ and made_with["gpu"] is None
    assert json.loads(json.dumps(made_with)) == made_with


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    write_checkpoint(path)
    before = path.read_bytes()

    def full(value, file):
        file.write(b"half a checkp")
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch.save says when the disk is full

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        write_checkpoint(path)

    def full_as_the_system_says(value, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            full(value, file)

    monkeypatch.setattr(torch, "save", full_as_the_system_says)
    with pytest.raises(OSError, match="No space left") as left:
        write_checkpoint(path)
    assert left.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number, written", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_without_fsync_is_no_error_and_a_failing_one_is(number, written, tmp_path, monkeypatch):
    def answers(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", answers)
    path = tmp_path / "a.txt"
    path.write_text("old")
    try:
        with common.writing(path):
            common.write_atomically(path, lambda file: file.write(b"new"))
    except UserError as error:
        assert not written and f"cannot write '{path}' ([Errno 5] Input/output error)" in str(error)
    assert path.read_text() == ("new" if written else "old") and len(list(tmp_path.iterdir())) == 1


def test_more_processes_than_gpus_are_refused_before_any_waits_for_the_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in "01":
        for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="this machine has 1 GPU, fewer than processes: .*nproc_per_node=1"):
            common.init_distributed(torch.device("cuda"))
    assert not torch.distributed.is_initialized()


def test_bad_checkpoints_get_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("good.ckpt")
    good = (tmp_path / "good.ckpt").read_bytes()
    broken = {"missing.ckpt": None, "truncated.ckpt": good[: len(good) // 2], "empty.ckpt": b"", "text.ckpt": b"hello"}
    for name, content in broken.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_checkpoint(name)
    for wrong in (7, {"encoder": {}}, {"state_dict": {}}):
        torch.save(wrong, "other.ckpt")
        with pytest.raises(UserError, match="is no checkpoint of minTER"):
            load_checkpoint("other.ckpt")
    write_checkpoint("future.ckpt", format_version=99)
    with pytest.raises(UserError, match="format version 99"):
        load_checkpoint("future.ckpt")
    with pytest.raises(UserError, match="is a checkpoint of predictive_transform; one of vte_ba is needed"):
        load_checkpoint("good.ckpt", "vte_ba")
    for changes in ({"encoder": "nin"}, {"image_size": 96}):  # the weights are AlexNet's at 32
        write_checkpoint("other.ckpt", **changes)
        with pytest.raises(UserError, match="do not fit the (NIN|AlexNet) that it names"):
            load_encoder(load_checkpoint("other.ckpt"), "other.ckpt")
