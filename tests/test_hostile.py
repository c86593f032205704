"""Broken and hostile files, and wrong flags: one sentence each, and never code run from a file."""

import contextlib
import copy
import importlib
import importlib.util
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import stl
from common import NIN, UserError, check_weights, load_checkpoint, load_encoder, load_images

ROOT = Path(__file__).resolve().parent.parent

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
    return NIN()


def refused(path, says="", of=load_checkpoint):
    """Loading ends in one sentence that names the file, soon."""
    start = time.perf_counter()
    with pytest.raises(UserError) as problem:
        of(path)
    message = str(problem.value)
    assert Path(path).name in message and says in message and "\n" not in message
    assert time.perf_counter() - start < 5
    return message


def rewritten(source, target, change, **options):
    """A copy of an archive of torch.save with other content, {name: bytes} after `change`, and right checksums."""
    with zipfile.ZipFile(source) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(target, "w", **options) as archive:
        for name, data in change(content).items():
            archive.writestr(name, data)


def test_a_file_cut_at_any_4_kib(tmp_path, encoder):
    path = tmp_path / "a.ckpt"
    weights = encoder.state_dict()
    torch.save({**plain_checkpoint(), "encoder": weights, "model": weights}, path)
    assert load_encoder(load_checkpoint(path), path) is not None
    size = path.stat().st_size
    assert size > 1e6
    for length in [size - 1, *range(size // 4096 * 4096, -1, -4096)]:
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


def test_pickles_with_flipped_bytes_and_right_checksums_run_nothing(tmp_path, monkeypatch):
    """Each is refused, or is still a checkpoint by all that is checked of one."""
    monkeypatch.chdir(tmp_path)
    torch.save(plain_checkpoint(), "good.ckpt")
    generator, accepted = random.Random(0), 0

    def flip(content):
        (name,) = [name for name in content if name.endswith("data.pkl")]
        data = bytearray(content[name])
        for _ in range(generator.choice([1, 1, 2, 5])):
            data[generator.randrange(len(data))] = generator.randrange(256)
        return {**content, name: bytes(data)}

    for _ in range(400):
        rewritten("good.ckpt", "bad.ckpt", flip)
        with contextlib.suppress(UserError):
            checkpoint = load_checkpoint("bad.ckpt")
            with contextlib.suppress(UserError):
                check_weights(NIN(), checkpoint["encoder"], "bad.ckpt", "NIN")
            accepted += 1
    assert accepted < 200 and sorted(os.listdir()) == ["bad.ckpt", "good.ckpt"]


class Calls:
    """Pickled, a call of anything."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def holding_itself():
    value = plain_checkpoint()
    value["config"]["self"] = value["config"]
    return value


HOSTILE = {  # what is saved in place of the encoder's weights, or by itself
    "a command": lambda: Calls(os.system, "touch went-off"),
    "an evaluation": lambda: Calls(eval, "open('went-off', 'w')"),
    "an import": lambda: Calls(importlib.import_module, "antigravity"),
    "a terabyte of zeros": lambda: Calls(bytearray, 10**12),
    "sparse": lambda: {"w": torch.zeros(10**6, 10**6, layout=torch.sparse_coo)},
    "meta": lambda: {"w": torch.empty(10**6, 10**6, device="meta")},
    "quantised": lambda: {"w": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.quint8)},
    "complex": lambda: {"w": torch.zeros(3, dtype=torch.complex64)},
    "expanded": lambda: {"w": torch.zeros(1).expand(10**6, 10**6)},
    "a parameter": lambda: {"w": torch.nn.Parameter(torch.zeros(3))},
    "a module": lambda: torch.nn.Linear(2, 2),
    "an array": lambda: {"w": np.zeros(3)},
    "a set": lambda: {"w": {1, 2}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_not_plain_is_not_loaded(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for whole in (False, True):
        value = HOSTILE[kind]()
        torch.save(value if whole else {**plain_checkpoint(), "encoder": value}, "bad.ckpt")
        refused("bad.ckpt", "holds more than tensors and plain values")
    assert os.listdir() == ["bad.ckpt"]


def test_archives_that_are_not_torch_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**plain_checkpoint(), "model": {"w": torch.zeros(10**6)}}, "good.ckpt")
    rewritten("good.ckpt", "compressed.ckpt", dict, compression=zipfile.ZIP_DEFLATED)  # 4 MB in some kilobytes
    assert os.path.getsize("compressed.ckpt") < 20_000

    def claim(content):
        """A storage that says it has 2^30 elements, of which there are ten."""
        (name,) = [name for name in content if name.endswith("data.pkl")]
        data = content[name].replace(b"J@B\x0f\x00t", b"J" + struct.pack("<i", 2**30) + b"t")
        assert data != content[name]
        return {**content, name: data}

    rewritten("good.ckpt", "claim.ckpt", claim)
    torch.save(plain_checkpoint(), "old.ckpt", _use_new_zipfile_serialization=False)
    Path("bomb.pkl").write_bytes(pickle.dumps(Calls(os.system, "touch went-off")))
    Path("two.ckpt").write_bytes(Path("bomb.pkl").read_bytes() + Path("good.ckpt").read_bytes())
    Path("old-two.ckpt").write_bytes(Path("old.ckpt").read_bytes() + Path("good.ckpt").read_bytes())
    torch.save(nested(50), "deep.ckpt")
    rewritten("deep.ckpt", "deeper.ckpt", lambda content: {
        name: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"." if name.endswith("data.pkl") else data
        for name, data in content.items()})
    torch.save({"w": [0] * 2**20}, "many.ckpt")
    torch.save(holding_itself(), "itself.ckpt")
    with zipfile.ZipFile("empty.ckpt", "w"):
        pass
    for name in ("compressed", "claim", "old", "two", "old-two", "deep", "deeper", "many", "itself", "empty"):
        refused(f"{name}.ckpt", "is no checkpoint of minTER")
    os.mkdir("folder.ckpt"), os.mkfifo("pipe.ckpt")
    for name in ("folder.ckpt", "pipe.ckpt", "missing.ckpt", "/dev/zero"):
        refused(name, "there is no checkpoint")
    assert not os.path.exists("went-off")


NAN = float("nan")
WRONG_VALUES = {
    "format_version": ["1", True, 1.0, NAN, -1, 10**30, None, 2],
    "method": [5, "", "a b", "clear \x1b[2J", "two\nlines", "x" * 65, None, ["stl"]],
    "epoch": ["3", True, 1.5, -1, 10**30, None],
    "encoder": [[], None, "nin", 7],
    "model": [[], None, "nin", 7],
    "config": [[], None, "nin", {}, {5: 1}, {"nested": {}}],
    "config.dataset": [5, "", "a\0b", "a\x1bb", "x" * 300, "a/" * 3000, None, ["digits"], torch.ones(3)],
    "config.encoder": ["vgg", 7, ["nin"], None, "NIN", torch.ones(3)],
    "config.image_size": [10**9, 10**30, -32, 0, 7, 1025, "32", 32.0, True, NAN, None, torch.tensor(32)],
    "config.mean": [[0.5] * 2, [0.5] * 4, [], [NAN] * 3, [1e300] * 3, ["a"] * 3, [True] * 3, 0.5, None,
                    (0.5, 0.5, 0.5), [[0.5]] * 3, torch.ones(3), {0: 0.5, 1: 0.5, 2: 0.5}],
    "config.std": [[0.5] * 2, [0] * 3, [0.0] * 3, [-0.2] * 3, [1e-320] * 3, [NAN] * 3, [float("inf")] * 3, None],
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
        assert f"its {inner} is" in message or "version 2" in message or "config" in (inner, *outer), message
    del target[inner]
    torch.save(checkpoint, path)
    refused(path, f"lacks {inner}")


def test_weights_are_those_of_the_encoder_or_refused(encoder, tmp_path):
    """In names, shapes and types, and all finite; wherever they are used."""
    good = encoder.state_dict()

    def broken(value, name="mu.weight"):
        weights = copy.deepcopy(good)
        weights[name].view(-1)[-1] = value
        return weights

    wrong = {
        "missing": {name: good[name] for name in good if name != "mu.bias"}, "more": {**good, "w": good["mu.bias"]},
        "not text": {**good, 5: good["mu.bias"]}, "none": {}, "no tensor": {**good, "mu.bias": [0.0] * 512},
        "shape": {**good, "mu.bias": torch.zeros(511)}, "scalar": {**good, "mu.bias": torch.tensor(0.0)},
        "float64": {**good, "mu.bias": good["mu.bias"].double()}, "int": {**good, "mu.bias": good["mu.bias"].long()},
    }
    path = tmp_path / "a.ckpt"
    checkpoint = plain_checkpoint()
    for name, weights in wrong.items():
        torch.save({**checkpoint, "encoder": weights}, path)
        refused(path, "do not fit the encoder 'nin' at image size 32", of=lambda p: load_encoder(load_checkpoint(p), p))
        with pytest.raises(UserError, match="do not fit NIN"):
            check_weights(encoder, weights, name, "NIN")
    for value in (NAN, float("inf")):
        for name in ("mu.weight", "trunk.0.1.running_var"):
            torch.save({**checkpoint, "encoder": broken(value, name)}, path)
            refused(path, f"{name} is infinite or NaN", of=lambda p: load_encoder(load_checkpoint(p), p))
    for settings in ({"image_size": 1024}, {"encoder": "alexnet", "image_size": 8}, {"encoder": "resnet18"},
                     {"probabilistic": False}):  # of which nothing is allocated before the shapes are compared
        changed = {**checkpoint, "encoder": good, "config": {**checkpoint["config"], **settings}}
        with pytest.raises(UserError, match="do not fit the encoder"):
            load_encoder(changed, path)
    for settings in ({"encoder": "resnet18"}, {"probabilistic": False}):
        with pytest.raises(UserError, match="has no log-variance"):
            load_encoder({**checkpoint, "config": {**checkpoint["config"], **settings}}, path, probabilistic=True)


def test_stl_checkpoints(tmp_path):
    encoder = common.build_encoder("nin", 32, probabilistic=False)
    model = stl.STL(encoder, losses=("inv",))
    checkpoint = {**plain_checkpoint(), "method": "stl_inv", "encoder": encoder.state_dict(),
                  "model": model.state_dict()}
    checkpoint["config"] |= {"preset": "code", "inv": 1.0, "equi": 0.0, "trans": 0.0, "probabilistic": False}
    path = tmp_path / "a.ckpt"

    def save(config=(), weights=()):
        torch.save({**checkpoint, "config": {**checkpoint["config"], **dict(config)},
                    "model": {**checkpoint["model"], **dict(weights)}}, path)
        return path

    assert stl.load_stl(save())[0].inv_projector is not None
    for preset in ("mine", None, 7, ["code"]):
        refused(save({"preset": preset}), "one of stl.py is needed", of=stl.load_stl)
    refused(save({"preset": torch.ones(2)}), "its config is not what", of=stl.load_stl)
    refused(save({"inv": torch.ones(2)}), "its config is not what", of=stl.load_stl)
    refused(save({"equi": 1.0}), "do not fit STL with the losses inv, equi", of=stl.load_stl)
    refused(save((), {"inv_projector.0.weight": torch.zeros(3)}), "do not fit STL", of=stl.load_stl)
    refused(save((), {"inv_projector.0.weight": torch.full((512, 512), NAN)}), "is infinite or NaN", of=stl.load_stl)


def test_a_hostile_checkpoint_on_the_command_line(tmp_path):
    torch.save({**plain_checkpoint(), "model": Calls(os.system, "touch went-off")}, tmp_path / "bad.ckpt")
    result = subprocess.run([sys.executable, ROOT / "probe.py", "bad.ckpt"], cwd=tmp_path, capture_output=True,
                            text=True, timeout=100)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "bad.ckpt" in result.stderr
    assert os.listdir(tmp_path) == ["bad.ckpt"]


def test_broken_logs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    figures = importlib.import_module("figures")
    path = tmp_path / "a.jsonl"
    for text in ("", "{", "[]", "7", '{"epoch": 1}', '{"epoch": 1, "loss": "low"}', "\xff", "[" * 10**5,
                 '{"epoch": 1, "loss": 1}\n{"epoch": 2}', '{"epoch": 1, "loss": [1]}',
                 '{"epoch": 1, "loss": 1' + "0" * 400 + "}"):
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


def exif_turned():
    picture = Image.new("RGB", (16, 8), RED)
    picture.paste(BLUE, (8, 0, 16, 8))  # red on the left; turned a quarter clockwise, red is on top
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture, "PNG", exif=exif)


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
    "thin.png": (lambda: encoded(Image.new("RGB", (1, 3000), RED), "PNG"), RED, 0),
    "one.bmp": (lambda: encoded(Image.new("RGB", (1, 1), RED), "BMP"), RED, 0),
}


@pytest.mark.parametrize("name", ODD)
def test_images_that_are_odd_are_decoded_by_the_rules(name, tmp_path, capfd):
    content, colour, tolerance = ODD[name]
    folder, _ = folder_with(tmp_path / name, content())
    image = load_images(str(folder), "train", image_size=8)[0][0]
    assert (image[:, 0, 0].int() - torch.tensor(colour)).abs().max() <= tolerance
    if name.startswith("turned"):
        assert image[:, 0, -1].tolist() == list(RED) and image[:, -1, 0].tolist() == list(BLUE)  # upright
    if name == "grey16.png":
        assert image[:, 0, -1].tolist() == [255] * 3
    assert capfd.readouterr().err == ""


def bomb(width, height):
    """A PNG of a few bytes that says it is this large."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
              chunk(b"IDAT", zlib.compress(bytes(10**6))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(went-off) (w) file closefile\nshowpage\n"
BAD = {
    "bomb.png": (bomb(10**5, 10**5), "pixels"), "smaller-bomb.png": (bomb(10_000, 10_000), "pixels, more than"),
    "zero.png": (b"", "it is none"), "zero.jpg": (b"", "it is none"), "text.jpg": (b"hello", "it is none"),
    "nulls.bmp": (bytes(5000), "it is none"), "script.png": (SCRIPT, "it is none"), "pdf.jpg": (b"%PDF-1.4\n", "none"),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is none"),
    "float.tif": (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "32-bit pixels"),
    "int.tif": (encoded(Image.new("I", (8, 8), 5), "TIFF"), "32-bit pixels"),
    "ico.png": (encoded(PLAIN.resize((16, 16)), "ICO"), "it is none"),  # of no kind that is read
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
        refused(file, "cannot read the image", of=lambda _: load_images(str(folder), "train", image_size=8))
    file.write_bytes(content)
    assert len(load_images(str(folder), "train", image_size=8)[0]) == 1


def test_links_are_followed_to_regular_files_only(tmp_path):
    """The rule: wherever they lead, out of the folder too; whatever is no regular file is refused, not waited for."""
    (tmp_path / "else").mkdir()
    PLAIN.save(tmp_path / "else" / "b.png")
    folder, file = folder_with(tmp_path / "a.png")
    file.symlink_to(tmp_path / "else" / "b.png")
    (folder / "train" / "dog").symlink_to(tmp_path / "else")  # a class of its own
    images, labels, classes = load_images(str(folder), "train", image_size=8)
    assert images[:, :, 0, 0].tolist() == [list(RED)] * 2 and classes == ["cat", "dog"] and labels.tolist() == [0, 1]

    def replace(make):
        file.unlink()
        make()
        message = refused(file, of=lambda _: load_images(str(folder), "train", image_size=8))
        assert "remove it" in message

    replace(lambda: file.symlink_to("nowhere"))
    replace(lambda: file.symlink_to("a.png"))  # itself
    replace(lambda: file.symlink_to("/dev/zero"))
    replace(lambda: os.mkfifo(file))
    replace(file.mkdir)


def test_names_that_are_odd(tmp_path, monkeypatch):
    folder, file = folder_with(tmp_path / "a.png", encoded(PLAIN, "PNG"))
    (file.parent / "notes.txt").write_text("no image, and ignored")
    os.rename(file, os.path.join(os.fsencode(file.parent), b"\xff\xfe.png"))  # no UTF-8
    assert len(load_images(str(folder), "train", image_size=8)[0]) == 1
    (file.parent / "two\nlines \x1b[2J.png").write_bytes(b"")
    message = refused(file.parent, of=lambda _: load_images(str(folder), "train", image_size=8))
    assert r"two\nlines \x1b[2J.png" in message and message.isprintable()
    (file.parent / "two\nlines \x1b[2J.png").unlink()

    def unreadable(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", unreadable)  # the tests may run as one who may read everything
    refused(folder / "train", "cannot list", of=lambda _: load_images(str(folder), "train", image_size=8))


def test_images_that_do_not_fit_into_memory(tmp_path, monkeypatch):
    folder, file = folder_with(tmp_path / "a.png", encoded(PLAIN, "PNG"))

    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match="do not fit into memory"):
        load_images(str(folder), "train", image_size=8)


def test_a_cache_is_read_like_any_other_file(tmp_path, monkeypatch):
    """Whatever is in its place runs nothing and is made anew."""
    monkeypatch.chdir(tmp_path)
    folder, _ = folder_with(tmp_path / "a.png", encoded(PLAIN, "PNG"))
    cache = tmp_path / "pets.train-8.cache"

    def load():
        images, _, _ = load_images(str(folder), "train", image_size=8)
        assert images.shape == (1, 3, 8, 8) and images.dtype == torch.uint8 and images[0, :, 0, 0].tolist() == list(RED)

    load()
    good = cache.read_bytes()
    fingerprint = torch.load(cache, weights_only=True)["fingerprint"]
    flipped = bytearray(good)
    flipped[good.index(bytes([RED[0]] * 20))] ^= 1
    contents = [good[: len(good) // 2], b"", bytes(flipped), pickle.dumps(Calls(os.system, "touch went-off"))]
    shape = 1, 3, 8, 8
    images = torch.zeros(shape, dtype=torch.uint8)
    for value in (Calls(os.system, "touch went-off"), 7, [], {}, {"fingerprint": fingerprint},
                  {"fingerprint": torch.ones(3), "images": images}, {"fingerprint": fingerprint, "images": 7},
                  *({"fingerprint": fingerprint, "images": bad} for bad in (
                      images.float(), images[0], images[:, :1], images[:0], images[:, :1, :1].clone().expand(shape)))):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        contents.append(buffer.getvalue())
    for content in contents:
        cache.write_bytes(content)
        load()
        assert cache.read_bytes() == good
    cache.unlink(), os.mkfifo(cache)
    load()
    cache.unlink(), cache.mkdir()
    load()  # with a note that it cannot be kept
    assert sorted(os.listdir()) == ["pets", "pets.train-8.cache"]


# -------------------------------------------------------------------------------------------------------------- flags

TEXT = ["", "x" * 300, "a/" * 3000, "a\x1b[2J", "two\nlines", "\udcff"]
WHOLE = ["0", "-1", "1.5", "1e3", "nan", "inf", "", " ", "x", "\u0661", "1_000", str(2**31), "9" * 5000]  # an Arabic 1
REAL = ["0", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "", "x", "\u0661", "1_0.0"]
WEIGHT = [value for value in REAL if value not in ("0", "1e-400")]
SEED = ["-1", "1.5", "nan", "", "x", "\u0661", "1_000", str(2**32), "9" * 5000]
CHOICE = ["", "x", "\u0661", "CPU", "two\nlines"]
SWITCH = ["1", "true", ""]  # --flag=value
WRONG = {
    "--dataset": TEXT, "--data-dir": TEXT, "--output": TEXT, "--pretrained": TEXT, "--json": TEXT, "--markdown": TEXT,
    "--plot": TEXT, "CKPT": TEXT, "LOG": TEXT, "JSON": TEXT, "--runs": TEXT, "--pages": TEXT, "--finished": TEXT,
    "--epochs": WHOLE, "--batch-size": WHOLE, "--image-size": [*WHOLE, "1025"], "--limit": WHOLE, "--passes": WHOLE,
    "--train-sizes": WHOLE, "--columns": WHOLE, "--pairs": WHOLE, "--n": WHOLE, "--repeats": WHOLE, "--sizes": WHOLE,
    "--batches": WHOLE, "--save-every": WHOLE, "--steps": WHOLE, "--images": WHOLE, "--workers": WHOLE,
    "--processes": WHOLE,
    "--jobs": WHOLE, "--minutes": REAL, "--seeds": SEED,
    "--threads": [*WHOLE, "1025"],
    "--lr": REAL, "--temperature": REAL,
    "--inv": WEIGHT, "--equi": WEIGHT, "--trans": WEIGHT, "--weight-decay": WEIGHT,
    "--seed": SEED,
    "--encoder": CHOICE, "--device": CHOICE, "--precision": CHOICE, "--critic": CHOICE, "--preset": CHOICE,
    "--batch": CHOICE, "--compile": CHOICE, "--data-on": CHOICE, "--classifiers": CHOICE, "--peers": CHOICE,
    "--architecture": CHOICE, "--scripts": CHOICE, "PICTURE": CHOICE, "what": CHOICE,
    "--rows": CHOICE, "--features": CHOICE, "--scale": CHOICE, "--methods": CHOICE, "family": CHOICE,
    "--from-scratch": SWITCH, "--steerable": SWITCH, "--mean-target": SWITCH, "--augmix": SWITCH,
    "--mean-per-class": SWITCH, "--quick": SWITCH,
    "--check": SWITCH, "--sync-bn": SWITCH, "--deterministic": SWITCH, "--resume": SWITCH,
    "--no-usual": SWITCH, "--equivariance": SWITCH, "--per-image": WHOLE, "--transformations": CHOICE,
}
SCRIPTS = sorted(str(path.relative_to(ROOT).with_suffix("")) for folder in (".", "results", "benchmarks")
                 for path in (ROOT / folder).glob("*.py") if "parse_args()" in path.read_text())


class Parsed(Exception):
    """Ends a script once its parser is made."""


def parsers_of(script):
    """The parsers of a script, its own and its subcommands', before any is used."""
    found = []

    def stop(parser, *args):
        found.append(parser)
        raise Parsed

    specification = importlib.util.spec_from_file_location(script.replace("/", "_"), ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT)])
        patch.setattr(sys, "argv", [f"{Path(script).name}.py"])
        specification.loader.exec_module(module)
        patch.setattr(common.Parser, "parse_args", stop)
        with pytest.raises(Parsed):
            getattr(module, "parse_args", module.main)()
    (parser,) = found
    subcommands = [action.choices for action in parser._actions if isinstance(action.choices, dict)
                   and all(isinstance(choice, common.Parser) for choice in action.choices.values())]
    return [parser, *(subcommand for choices in subcommands for subcommand in choices.values())]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_refuses_what_is_wrong(script, capsys):
    """The flags are the parser's own, so that one without a row in the table fails here."""
    tried = 0
    for parser in parsers_of(script):
        capsys.readouterr()  # what importing it may have said
        actions = [action for action in parser._actions if action.dest != "help"]
        names = {action: action.option_strings[-1] if action.option_strings else action.metavar or action.dest
                 for action in actions}
        needed = ["codes.ckpt" if action.choices is None else list(action.choices)[0] for action in actions
                  if not action.option_strings]
        for action, name in names.items():
            assert name in WRONG, f"{script} has a flag {name} without a row in WRONG"
            for value in WRONG[name]:
                given = [f"{name}={value}"] if action.option_strings else [value]
                with pytest.raises(SystemExit) as ended:
                    parser.parse_args([*(needed if action.option_strings else []), *given])
                message = capsys.readouterr().err
                assert ended.value.code == 2 and message.count("\n") == 1, (name, value, message)
                assert message.startswith(f"{Path(script).name}.py") and ": error: " in message and len(message) < 6000
                assert message.rstrip("\n").isprintable(), (name, value)
                tried += 1
    assert tried >= len(TEXT)


@pytest.mark.parametrize("command", [
    "predictive_transform.py --image-size 5 --dataset digits", "avt.py --encoder alexnet --image-size 31",
    "vte_ba.py", "vte_infonce.py --pretrained a.ckpt --from-scratch", "stl.py --inv 0 --equi 0 --trans 0",
    "probe.py", "probe.py a.ckpt --json a.txt", "results/figures.py", "results/figures.py curves",
    "benchmarks/forms.py critic --n 0", "benchmarks/resources.py --architecture 1.0",
    "benchmarks/warp.py --sizes 7", "benchmarks/warp.py --processes 2 --check", "avt.py --epoch", "avt.py ten",
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


def test_a_wrong_flag_in_a_process_of_its_own(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "avt.py", "--lr", "nan"], cwd=tmp_path, capture_output=True,
                            text=True, timeout=100)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == ("avt.py: error: argument --lr: 'nan' is not a number above 0 (--help lists what can be "
                             "given)\n")
