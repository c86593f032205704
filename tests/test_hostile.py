"""Broken and hostile files, and wrong flags: one sentence each, and never code run from a file."""

import copy
import importlib
import io
import math
import os
import pickle
import random
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import shared_forks
from PIL import Image, ImageOps

import common
import stl
from common import NIN, UserError, load_checkpoint, load_encoder, load_images, load_weights

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("own_folder")

# -------------------------------------------------------------------------------------------------------- checkpoints


def plain_checkpoint():
    weights = {"w": torch.arange(300.0), "b": torch.ones(3), "n": torch.tensor(7)}
    config = {"dataset": "digits", "encoder": "nin", "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3, "lr": 1e-4}
    return {"format_version": 1, "method": "predictive_transform", "config": config, "epoch": 3, "encoder": weights,
            "model": {f"encoder.{name}": value for name, value in weights.items()},
            "optimizer": {"state": {}, "param_groups": []}}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return NIN(8)


def refused(path, says="", of=load_checkpoint):
    """Loading ends in one sentence that names the file."""
    with pytest.raises(UserError) as problem:
        of(path)
    message = str(problem.value)
    assert Path(path).name in message and says in message and "\n" not in message
    return message


def test_a_file_cut_at_any_64_kib(tmp_path, encoder):
    path = tmp_path / "a.ckpt"
    weights = encoder.state_dict()
    checkpoint = plain_checkpoint()
    torch.save({**checkpoint, "config": {**checkpoint["config"], "image_size": 8}, "encoder": weights,
                "model": weights}, path)
    assert load_encoder(load_checkpoint(path), path) is not None
    size = path.stat().st_size
    assert size > 1e6
    for length in [size - 1, *range(size // 2**16 * 2**16, -1, -(2**16))]:
        os.truncate(path, length)
        refused(path, "truncated")


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_flipped_bytes_are_found_or_change_nothing(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(plain_checkpoint(), path)
    content, found = path.read_bytes(), 0
    positions = range(0, len(content), 5)
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            loaded = load_checkpoint(path)
        except UserError:
            found += 1
        else:
            assert same(plain_checkpoint(), loaded), position  # padding between the parts of the archive
    assert found > len(positions) / 2


class Calls:
    """Pickled, a call of anything."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_with_flipped_bytes_and_right_checksums_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(plain_checkpoint(), "good.ckpt")
    with zipfile.ZipFile("good.ckpt") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in content if name.endswith("data.pkl")]
    generator, refusals = random.Random(0), 0
    for _ in range(200):
        data = bytearray(content[pickled])
        for _ in range(generator.choice([1, 1, 2, 5])):
            data[generator.randrange(len(data))] = generator.randrange(256)
        with zipfile.ZipFile("bad.ckpt", "w") as archive:
            for name, value in {**content, pickled: bytes(data)}.items():
                archive.writestr(name, value)
        try:
            checkpoint = load_checkpoint("bad.ckpt")
            load_weights(NIN(8), checkpoint["encoder"], "bad.ckpt")
        except UserError:
            refusals += 1
    assert refusals == 200 and sorted(os.listdir()) == ["bad.ckpt", "good.ckpt"]


HOSTILE = {  # what is saved in place of the encoder's weights, or by itself
    "a command": lambda: Calls(os.system, "touch went-off"),
    "an evaluation": lambda: Calls(eval, "open('went-off', 'w')"),
    "an import": lambda: Calls(importlib.import_module, "antigravity"),
    "a module": lambda: torch.nn.Linear(2, 2),
    "an array": lambda: {"w": np.zeros(3)},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_not_plain_is_not_loaded(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for whole in (False, True):
        value = HOSTILE[kind]()
        torch.save(value if whole else {**plain_checkpoint(), "encoder": value}, "bad.ckpt")
        refused("bad.ckpt", "is no checkpoint of minTER")
    assert os.listdir() == ["bad.ckpt"]


def test_files_of_other_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(plain_checkpoint(), "old.ckpt", _use_new_zipfile_serialization=False)
    Path("bomb.ckpt").write_bytes(pickle.dumps(Calls(os.system, "touch went-off")))
    Path("text.ckpt").write_text("hello")
    torch.save(7, "number.ckpt"), torch.save({"state_dict": {}}, "other.ckpt")
    with zipfile.ZipFile("empty.ckpt", "w"):
        pass
    for name in ("old", "bomb", "text", "number", "other", "empty"):
        refused(f"{name}.ckpt", "is no checkpoint of minTER")
    os.mkdir("folder.ckpt")
    for name in ("folder.ckpt", "missing.ckpt"):
        refused(name, "there is no checkpoint")
    assert not os.path.exists("went-off")


NAN = float("nan")
WRONG_VALUES = {
    "format_version": ["1", None, 2], "epoch": ["3", None], "encoder": [[], None, "nin", 7], "model": [[], None, 7],
    "config": [[], None, "nin", {}], "config.dataset": [5, None, ["digits"]],
    "config.encoder": ["vgg", 7, ["nin"], None, "NIN"], "config.image_size": [10**9, -32, 0, "32", NAN, None],
    "config.mean": [[0.5] * 2, [0.5] * 4, [], [NAN] * 3, ["a"] * 3, 0.5, None],
    "config.std": [[0.5] * 2, [0.0] * 3, [-0.2] * 3, [NAN] * 3, [math.inf] * 3, None],
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_values_in_a_checkpoint(name, tmp_path):
    path = tmp_path / "a.ckpt"
    *outer, inner = name.split(".")
    for value in WRONG_VALUES[name]:
        checkpoint = plain_checkpoint()
        target = checkpoint["config"] if outer else checkpoint
        target[inner] = value
        torch.save(checkpoint, path)
        message = refused(path)
        assert any(says in message for says in ("is no checkpoint of minTER", "has format version", "ENCODERS"))
    del target[inner]
    torch.save(checkpoint, path)
    refused(path, "is no checkpoint of minTER")


def test_weights_are_those_of_the_encoder_or_refused(encoder, tmp_path):
    """In names, shapes and types, and all finite."""
    good = encoder.state_dict()

    def broken(value, name):
        weights = copy.deepcopy(good)
        weights[name].view(-1)[-1] = value
        return weights

    wrong = {
        "missing": {name: good[name] for name in good if name != "mu.bias"}, "more": {**good, "w": good["mu.bias"]},
        "not text": {**good, 5: good["mu.bias"]}, "none": {}, "no tensor": {**good, "mu.bias": [0.0] * 512},
        "shape": {**good, "mu.bias": torch.zeros(511)}, "scalar": {**good, "mu.bias": torch.tensor(0.0)},
        "float64": {**good, "mu.bias": good["mu.bias"].double()}, "int": {**good, "mu.bias": good["mu.bias"].long()},
    }
    for name, weights in wrong.items():
        with pytest.raises(UserError, match=f"the weights in '{name}' do not fit the NIN"):
            load_weights(encoder, weights, name)
    for value in (NAN, math.inf):
        for name in ("mu.weight", "trunk.0.1.running_var"):
            with pytest.raises(UserError, match=f"{name} is infinite or NaN"):
                load_weights(encoder, broken(value, name), "a.ckpt")
    assert same(dict(encoder.state_dict()), dict(good))
    path, checkpoint = tmp_path / "a.ckpt", plain_checkpoint()
    for settings in ({"image_size": 96}, {"image_size": 8, "encoder": "alexnet"}, {"probabilistic": False}):
        with pytest.raises(UserError, match="fit"):
            load_encoder({**checkpoint, "encoder": good, "config": {**checkpoint["config"], **settings}}, path)
    for settings in ({"encoder": "resnet18", "probabilistic": False}, {"probabilistic": False}):
        with pytest.raises(UserError, match="has no log-variance"):
            load_encoder({**checkpoint, "config": {**checkpoint["config"], **settings}}, path, probabilistic=True)


def test_stl_checkpoints(tmp_path):
    encoder = common.build_encoder("nin", 8, probabilistic=False)
    model = stl.STL(encoder, losses=("inv",))
    checkpoint = {**plain_checkpoint(), "method": "stl_inv", "encoder": encoder.state_dict(),
                  "model": model.state_dict()}
    checkpoint["config"] |= {"image_size": 8, "preset": "code", "inv": 1.0, "equi": 0.0, "trans": 0.0,
                             "probabilistic": False}
    path = tmp_path / "a.ckpt"

    def save(config=(), weights=()):
        torch.save({**checkpoint, "config": {**checkpoint["config"], **dict(config)},
                    "model": {**checkpoint["model"], **dict(weights)}}, path)
        return path

    assert stl.load_stl(save())[0].inv_projector is not None
    for value in ("mine", None, 7):
        for name in ("preset", "code", "learn"):
            refused(save({name: value}), "one of stl.py is needed", of=stl.load_stl)
    refused(save({"equi": 1.0}), "do not fit the STL", of=stl.load_stl)
    refused(save((), {"inv_projector.0.weight": torch.zeros(3)}), "do not fit the STL", of=stl.load_stl)
    refused(save((), {"inv_projector.0.weight": torch.full((512, 512), NAN)}), "is infinite or NaN", of=stl.load_stl)


def test_a_hostile_checkpoint_on_the_command_line(tmp_path):
    torch.save({**plain_checkpoint(), "model": Calls(os.system, "touch went-off")}, tmp_path / "bad.ckpt")
    result = shared_forks().run("probe.py", "bad.ckpt", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "bad.ckpt" in result.stderr
    assert os.listdir(tmp_path) == ["bad.ckpt"]


def test_broken_logs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "study")
    figures = importlib.import_module("figures")
    path = tmp_path / "a.jsonl"
    for text in ("", "{", "[]", "7", '{"epoch": 1}', '{"epoch": 1, "loss": "low"}', "\xff",
                 '{"epoch": 1, "loss": 1}\n{"epoch": 2}', '{"epoch": 1, "loss": [1]}'):
        path.write_bytes(text.encode("latin1"))
        refused(path, of=figures.read_log)
    path.write_text('{"epoch": 1, "loss": 0.5}\n')
    assert figures.read_log(path) == [{"epoch": 1, "loss": 0.5}]


# ------------------------------------------------------------------------------------------------------------- images

RED, BLUE = (200, 30, 20), (10, 20, 210)


def folder_with(path, content=None):
    """A data folder whose only training image is the file `path`: (folder, file)."""
    folder = Path(path) if not Path(path).suffix else Path(path).parent
    file = folder / "pets" / "train" / "cat" / Path(path).name
    file.parent.mkdir(parents=True)
    if content is not None:
        file.write_bytes(content)
    return folder / "pets", file


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey16(kind, **options):
    values = np.full((8, 8), 257 * 100, dtype=np.uint16)
    values[:, 4:] = 65535
    return encoded(Image.fromarray(values), kind, **options)


def exif_turned(kind="PNG", orientation=(3, 1, 6), width=None):
    """Red on the left, blue on the right; by its EXIF turned a quarter clockwise, so red is on top. orientation, width:
    (type, count, value) as they stand in the file, whatever they say."""
    picture = Image.new("RGB", (16, 8), RED)
    picture.paste(BLUE, (8, 0, 16, 8))
    entries = [(0x0100, *width)] if width else []
    entries.append((0x0112, *orientation))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    exif += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return encoded(picture, kind, exif=exif)


def two_frames(kind, **options):
    return encoded(Image.new("RGB", (8, 8), RED), kind, save_all=True,
                   append_images=[Image.new("RGB", (8, 8), BLUE)], **options)


def transparent():
    picture = Image.new("RGBA", (8, 8), (*RED, 0))
    return encoded(picture, "PNG")


PLAIN = Image.new("RGB", (8, 8), RED)
ODD = {  # name: content, the colour in the upper left, and how far off it may be
    "plain.png": (lambda: encoded(PLAIN, "PNG"), RED, 0),
    "png.jpg": (lambda: encoded(PLAIN, "PNG"), RED, 0),
    "jpeg.gif": (lambda: encoded(PLAIN, "JPEG"), RED, 4),
    "UPPER.PNG": (lambda: encoded(PLAIN, "PNG"), RED, 0),
    "cmyk.jpg": (lambda: encoded(PLAIN.convert("CMYK"), "JPEG"), RED, 4),
    "cmyk.tif": (lambda: encoded(PLAIN.convert("CMYK"), "TIFF"), RED, 1),
    "palette.png": (lambda: encoded(PLAIN.quantize(4), "PNG"), RED, 1),
    "palette-transparent.png": (lambda: encoded(PLAIN.quantize(4), "PNG", transparency=b"\0\1\2\3"), RED, 1),
    "grey-alpha.png": (lambda: encoded(Image.new("LA", (8, 8), (90, 0)), "PNG"), (90,) * 3, 0),
    "bits.png": (lambda: encoded(Image.new("1", (8, 8), 1), "PNG"), (255,) * 3, 0),
    "transparent.png": (transparent, RED, 0),
    "grey16.png": (lambda: grey16("PNG"), (100,) * 3, 0),
    "grey16.tif": (lambda: grey16("TIFF"), (100,) * 3, 0),
    "grey16.pgm": (lambda: b"P5 8 8 65535\n" + struct.pack(">H", 257 * 100) * 64, (100,) * 3, 0),
    "grey16-big-endian.tif": (lambda: encoded(Image.frombytes("I;16B", (8, 8), struct.pack(">H", 25700) * 64), "TIFF"),
                              (100,) * 3, 0),
    "animated.gif": (lambda: two_frames("GIF"), RED, 4),
    "animated.png": (lambda: two_frames("PNG"), RED, 0),
    "animated.webp": (lambda: two_frames("WEBP", lossless=True), RED, 4),
    "pages.tiff": (lambda: two_frames("TIFF"), RED, 0),
    "turned.png": (exif_turned, RED, 0),
    "turned-with-a-width-in-text.png": (lambda: exif_turned(width=(2, 3, 0x3631)), RED, 0),
    "turned-with-a-width-in-text.jpg": (lambda: exif_turned("JPEG", width=(2, 3, 0x3631)), RED, 20),
    "orientation-in-text.png": (lambda: exif_turned(orientation=(2, 2, 0x36)), RED, 0),
    "orientation-99.png": (lambda: exif_turned(orientation=(3, 1, 99)), RED, 0),
    "thin.png": (lambda: encoded(Image.new("RGB", (1, 3000), RED), "PNG"), RED, 0),
    "one.bmp": (lambda: encoded(Image.new("RGB", (1, 1), RED), "BMP"), RED, 0),
}


@pytest.mark.parametrize("name", ODD)
def test_images_that_are_odd_are_decoded_by_the_rules(name, tmp_path, capfd):
    content, colour, tolerance = ODD[name]
    folder, _ = folder_with(tmp_path / name, content())
    image = load_images(str(folder), "train", image_size=8).images[0]
    assert (image[:, 0, 0].int() - torch.tensor(colour)).abs().max() <= tolerance
    if name.startswith("turned"):
        assert (image[:, 0, -1].int() - torch.tensor(RED)).abs().max() <= tolerance  # upright
        assert (image[:, -1, 0].int() - torch.tensor(BLUE)).abs().max() <= tolerance
    if name == "grey16.png":
        assert image[:, 0, -1].tolist() == [255] * 3
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pil_turns_it(orientation, tmp_path):
    content = exif_turned(orientation=(3, 1, orientation))
    with Image.open(io.BytesIO(content)) as image:
        image.paste((0, 255, 0), (1, 1, 5, 3))  # of no symmetry
        image.save(tmp_path / "a.png", exif=image.getexif())
    with Image.open(tmp_path / "a.png") as image:
        expected = ImageOps.exif_transpose(image)
    found, longest = common.decode(tmp_path / "a.png", 8)
    fitted = ImageOps.fit(expected, (8, 8), Image.Resampling.BILINEAR)
    assert (found.permute(1, 2, 0).numpy() == np.asarray(fitted)).all() and longest == 16


def bomb(width, height):
    """A PNG of a few bytes that says it is this large."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
              chunk(b"IDAT", zlib.compress(bytes(10**6))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


NONE = "no image of a kind that is read"
SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(went-off) (w) file closefile\nshowpage\n"
BAD = {
    "bomb.png": (bomb(10**5, 10**5), "pixels"), "smaller-bomb.png": (bomb(10_000, 10_000), "pixels, more than"),
    "zero.png": (b"", NONE), "zero.jpg": (b"", NONE), "text.jpg": (b"hello", NONE),
    "nulls.bmp": (bytes(5000), NONE), "script.png": (SCRIPT, NONE), "pdf.jpg": (b"%PDF-1.4\n", NONE),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NONE),
    "float.tif": (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "32-bit pixels"),
    "int.tif": (encoded(Image.new("I", (8, 8), 5), "TIFF"), "32-bit pixels"),
    "ico.png": (encoded(PLAIN.resize((16, 16)), "ICO"), NONE),  # of no kind that is read
}


@pytest.mark.parametrize("name", BAD)
def test_images_that_are_bad_are_named(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    content, says = BAD[name]
    folder, file = folder_with(tmp_path / name, content)
    message = refused(file, says, of=lambda _: load_images(str(folder), "train", image_size=8))
    assert str(file) in message and capfd.readouterr().err == ""
    assert not os.path.exists("went-off")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_truncated_images_are_named(kind, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    folder, file = folder_with(tmp_path / f"a.{kind.lower()}")
    for share in (0.02, 0.2, 0.5, 0.9):
        file.write_bytes(content[: int(share * len(content))])
        refused(file, "cannot be read", of=lambda _: load_images(str(folder), "train", image_size=8))
    file.write_bytes(content)
    assert len(load_images(str(folder), "train", image_size=8).images) == 1


def test_names_that_are_no_utf_8_are_read(tmp_path):
    folder, file = folder_with(tmp_path / "a.png", encoded(PLAIN, "PNG"))
    (file.parent / "notes.txt").write_text("no image, and ignored")
    os.rename(file, os.path.join(os.fsencode(file.parent), b"\xff\xfe.png"))
    assert len(load_images(str(folder), "train", image_size=8).images) == 1


def test_a_cache_runs_nothing_and_a_damaged_one_is_made_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = folder_with(tmp_path / "a.png", encoded(PLAIN, "PNG"))

    def load():
        images = load_images(str(folder), "train", image_size=8).images
        assert images.shape == (1, 3, 8, 8) and images.dtype == torch.uint8 and images[0, :, 0, 0].tolist() == list(RED)

    load()
    (cache,) = Path("data").iterdir()
    good = cache.read_bytes()
    flipped = bytearray(good)
    flipped[good.index(bytes([RED[0]] * 20))] ^= 1
    for content in (good[: len(good) // 2], b"", bytes(flipped), pickle.dumps(Calls(os.system, "touch went-off"))):
        cache.write_bytes(content)
        load()
        assert cache.read_bytes() == good
    for value in (Calls(os.system, "touch went-off"), 7, [], {"states": torch.ones(3), "images": torch.ones(3)}):
        torch.save(value, cache)
        load()
        assert cache.read_bytes() == good
    cache.unlink(), cache.mkdir()
    with pytest.warns(UserWarning, match="decoded images are not cached, 'data/pets-.*train-8.cache' cannot be"):
        load()
    cache.rmdir(), cache.parent.rmdir(), cache.parent.touch()
    with pytest.warns(UserWarning, match="decoded images are not cached, 'data/pets-.*train-8.cache' cannot be"):
        load()
    assert sorted(os.listdir()) == ["data", "pets"]


# -------------------------------------------------------------------------------------------------------------- flags

NOT_NUMBERS = ["", " ", "x", "nan", "inf", "-inf", "1e400", "9" * 5000]


@pytest.mark.parametrize("kind, good, wrong", [
    (common.positive_int, ["1", "256", str(2**31 - 1)], ["0", "-1", "1.5", "1e3", str(2**31)]),
    (common.seed_int, ["0", str(2**32 - 1)], ["-1", "1.5", str(2**32)]),
    (common.image_side, ["8", "1024"], ["0", "7", "1025", "32.0"]),
    (common.positive_float, ["1e-4", "3"], ["0", "-1", "1e-400"]),
    (common.non_negative_float, ["0", "5e-4"], ["-1", "-1e-9"]),
])
def test_numbers_out_of_range_are_one_sentence(kind, good, wrong, capsys):
    parser = common.Parser(prog="a.py")
    parser.add_argument("--flag", type=kind)
    for text in good:
        assert parser.parse_args([f"--flag={text}"]).flag == float(text)
    for text in NOT_NUMBERS + wrong:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([f"--flag={text}"])
        message = capsys.readouterr().err
        assert ended.value.code == 2 and message.count("\n") == 1 and message.startswith("a.py: error: argument --flag")


@pytest.mark.parametrize("command", [
    "predictive_transform.py --image-size 5 --dataset digits", "avt.py --lr nan",
    "avt.py --dataset digits --encoder alexnet --image-size 31", "avt.py --dataset digits --encoder resnet18",
    "vte_ba.py", "vte_infonce.py --pretrained a.ckpt --from-scratch", "stl.py --inv 0 --equi 0 --trans 0",
    "probe.py", "probe.py a.ckpt --json a.txt", "equivariance.py", "study/figures.py", "study/figures.py curves",
    "benchmarks/warp.py --sizes 7", "benchmarks/train.py step --scripts none", "avt.py --epoch", "avt.py ten",
])
def test_wrong_commands_end_with_2_and_one_sentence(command, tmp_path, monkeypatch, capsys):
    import runpy

    script, *flags = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.count("\n") == 1 and ": error: " in message, message
    assert os.listdir() == []
