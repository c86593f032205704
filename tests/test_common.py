"""Encoders, data, and checkpoints."""

import errno
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import NIN, AlexNet, UserError, load_checkpoint, load_encoder, load_images, reparameterize


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

    images, labels, names = load_images("digits", "train")
    test_images, test_labels, _ = load_images("digits", "test")
    assert len(images) + len(test_images) == 1797 and images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
    digits = load_digits()
    assert names == list("0123456789")
    assert torch.equal(torch.cat([labels, test_labels]).bincount(), torch.from_numpy(digits.target).bincount())
    assert test_labels.bincount(minlength=10).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]  # a fifth of each
    assert torch.equal(images[:, 0], images[:, 2])
    # The enlargement keeps what was there: shrunk again, each image is nearest to the original that has its label.
    shrunk = torch.nn.functional.avg_pool2d(test_images[:, :1].float(), 4).flatten(1) * 16 / 255
    nearest = torch.cdist(shrunk, torch.from_numpy(digits.data).float()).argmin(1)
    assert len(nearest.unique()) == len(nearest) and (digits.target[nearest] == test_labels.numpy()).all()


def test_folder_of_images_of_any_size(tmp_path):
    folder = make_folder(tmp_path / "pets", n=3, size=(20, 30))
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    images, labels, names = load_images(str(folder), "train", image_size=16)
    assert images.shape == (6, 3, 16, 16) and names == ["cat", "dog"]
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]  # the classes in turn: the first n are balanced
    assert images[:, :, 8, 8].tolist() == [[10 * i, 50 * label, 200] for i in range(3) for label in range(2)]
    assert torch.equal(load_images(str(folder), "unlabeled", image_size=16)[0], images)
    half = Image.new("RGB", (40, 20))
    half.paste((255, 255, 255), (0, 0, 20, 20))
    half.save(folder / "train" / "cat" / "0.png")  # 40 x 20: the centre 20 x 20 is kept
    columns = load_images(str(folder), "train", image_size=16)[0][0, 0, 8]
    assert columns[:7].min() == 255 and columns[9:].max() == 0


def test_folder_cache_is_used_and_refreshed(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "pets")
    decoded = []
    decode = common.decode
    monkeypatch.setattr(common, "decode", lambda path, size: decoded.append(path) or decode(path, size))

    def load():
        decoded.clear()
        images, labels, _ = load_images(str(folder), "train", image_size=8)
        return images, labels, len(decoded)

    images, labels, count = load()
    assert count == 6
    again, labels_again, count = load()
    assert count == 0 and torch.equal(again, images) and torch.equal(labels_again, labels)
    assert [path.name for path in tmp_path.iterdir() if path != folder] == ["pets.train-8.cache"]
    assert load_images(str(folder), "train", image_size=9)[0].shape[-1] == 9  # another size, another cache

    changed = folder / "train" / "dog" / "1.png"
    Image.new("RGB", (20, 30), (1, 2, 3)).save(changed)
    os.utime(changed, ns=(1, 1))
    images, _, count = load()
    assert count == 6 and images[3, :, 4, 4].tolist() == [1, 2, 3]
    changed.unlink()
    assert len(load()[0]) == 5
    (tmp_path / "pets.train-8.cache").write_bytes(b"not a cache")
    assert len(load()[0]) == 5 and load()[2] == 0
    torch.save({"fingerprint": "of another state", "images": torch.zeros(5, 3, 8, 8)}, tmp_path / "pets.train-8.cache")
    assert load()[0].float().mean() > 0


def test_folder_problems_are_named(tmp_path):
    with pytest.raises(UserError, match="unknown data set 'cifar11'.*digits, cifar10, stl10") as problem:
        load_images("cifar11", "train")
    assert problem.value.exit_code == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder 'train/'"):
        load_images(str(tmp_path / "empty"), "train")
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        load_images(str(tmp_path / "empty"), "train")
    folder = make_folder(tmp_path / "pets")
    (folder / "train" / "dog" / "1.png").write_bytes((folder / "train" / "dog" / "1.png").read_bytes()[:40])
    with pytest.raises(UserError, match="cannot read the image '.*dog/1.png'"):
        load_images(str(folder), "train")
    (folder / "train" / "dog" / "1.png").unlink()
    (folder / "train" / "dog" / "1.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="cannot read the image '.*dog/1.png'"):
        load_images(str(folder), "train")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "test" / "cat" / "._0.png").write_text("no image, but what a file manager left")
    assert load_images(str(folder), "test")[2] == ["cat", "dog"]
    (folder / "test" / "bird").mkdir()
    with pytest.raises(UserError, match="bird' has no counterpart"):
        load_images(str(folder), "test")


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
    images, labels, classes = load_images("cifar10", "train", tmp_path)
    assert images.shape == (20, 3, 32, 32) and labels.tolist() == 5 * [0, 1, 2, 3] and classes == names
    assert torch.equal(images[4].flatten(), torch.from_numpy(pixels["data_batch_2"][0]))  # red plane, green, blue
    test_images, test_labels, _ = load_images("cifar10", "test", tmp_path)
    assert torch.equal(test_images.flatten(1), torch.from_numpy(pixels["test_batch"])) and len(test_labels) == 3
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
    images, labels, classes = load_images("stl10", "train", tmp_path, image_size=96)
    assert labels.tolist() == [0, 9, 4, 1] and classes == list("abcdefghij")
    assert torch.equal(images, torch.from_numpy(content["train_X.bin"]).transpose(2, 3))  # stored column by column
    unlabeled, labels, _ = load_images("stl10", "unlabeled", tmp_path)
    assert labels is None and unlabeled.shape == (6, 3, 32, 32)
    picture = Image.fromarray(content["unlabeled_X.bin"][0].transpose(2, 1, 0))
    resized = torch.from_numpy(np.array(picture.resize((32, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert (unlabeled[0].int() - resized.int()).abs().max() <= 1
    assert load_images("stl10", "test", tmp_path)[1].tolist() == [2, 3]


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
    common.save_checkpoint(path, method, config, model, optimizer, 3)
    if changes:
        torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return model


def test_checkpoint_round_trip_holds_plain_data_only(tmp_path):
    model = write_checkpoint(tmp_path / "a.ckpt")
    checkpoint = load_checkpoint(tmp_path / "a.ckpt", "predictive_transform")
    assert checkpoint["format_version"] == 1 and checkpoint["epoch"] == 3 and "optimizer" in checkpoint
    json.dumps(checkpoint["config"])
    images = torch.randn(2, 3, 32, 32)
    encoder = load_encoder(checkpoint, "a.ckpt")
    assert not encoder.training and torch.equal(encoder(images)[0], model.encoder(images)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]  # no temporary file is left


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


def test_more_processes_than_gpus_are_refused_before_any_waits_for_the_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in "01":
        for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="2 processes were started on a machine with 1 GPU: .*nproc_per_node=1"):
            common.join_processes(torch.device("cuda"))
    assert not torch.distributed.is_initialized()


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch bomb-went-off",))


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
    torch.save({"format_version": 1, "method": Bomb()}, "bomb.ckpt")
    with pytest.raises(UserError, match="more than tensors and plain"):
        load_checkpoint("bomb.ckpt")
    assert not (tmp_path / "bomb-went-off").exists()
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
        with pytest.raises(UserError, match="do not fit the encoder"):
            load_encoder(load_checkpoint("other.ckpt"), "other.ckpt")
