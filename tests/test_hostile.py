"""Other people's checkpoints, code, images and arrays: used as they are, or refused in a sentence."""

import io
import os
import pickle
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgekd.core import plugins
from edgekd.core.artifact import File
from edgekd.data.folder import LARGEST, Folder
from edgekd.errors import CheckpointError, ConfigError, DataError
from edgekd.models.python import Python
from edgekd.onnx import inspect
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.bench.compare_files import check_labels
from edgekd.training import checkpoint
from tests import zoo
from tests.standins.commands import command

# checkpoints


class Writes:
    """A pickle that writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_runs_only_if_it_is_trusted_and_else_names_what_it_wanted(tmp_path, capsys):
    """Through the command: exit code 2, and not a trace of what it would have done."""
    content = {"state_dict": zoo.Toy().state_dict(), "more": Writes(tmp_path / "harm")}
    torch.save(content, tmp_path / "evil.pt")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((4, 1, 8, 8), np.float32))
    words = ["export", "-o", tmp_path / "toy.onnx", "--model", "tests.zoo:Toy", "--checkpoint", tmp_path / "evil.pt"]
    words += ["--images", tmp_path / "x.npy", "--classes", "3"]
    code, said = command(capsys, *words)
    assert code == 2 and "posix.mkdir" in said and "would run code" in said and "allow_pickle: true" in said
    assert not (tmp_path / "harm").exists() and not (tmp_path / "toy.onnx").exists()
    code, said = command(capsys, *words, "--allow-pickle")
    assert code == 0, said
    assert (tmp_path / "harm").is_dir() and (tmp_path / "toy.onnx").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_of_the_old_kind_runs_nothing_either(protocol, tmp_path):
    content = {"state_dict": zoo.Toy().state_dict(), "more": Writes(tmp_path / "harm")}
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Writes(tmp_path / "harm"), protocol))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match="would run code"):
            checkpoint.load(zoo.Toy(), tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_a_build_takes_no_pickle_without_trust(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Path("evil.pt").open("wb") as stream:
        pickle.dump({"state_dict": Writes(tmp_path / "harm")}, stream, protocol=2)
    words = ["build", "digits", "--smoke", "--out", "out", "--set", "teacher.checkpoint=evil.pt"]
    code, said = command(capsys, *words)
    assert code == 2 and "posix.mkdir" in said and not Path("harm").exists()


def looping():
    content = {"model": {}}
    content["model"]["model"] = content
    return content


@pytest.mark.parametrize(
    "content",
    [
        looping,
        lambda: {1: torch.ones(2), "head.weight": 3},
        lambda: {k: v.to_sparse() for k, v in zoo.Toy().state_dict().items()},
        lambda: {k: torch.complex(v.float(), v.float()) for k, v in zoo.Toy().state_dict().items()},
        lambda: {k: v.to("meta") for k, v in zoo.Toy().state_dict().items()},
        lambda: {k: torch.zeros(1).expand(1 << 40) for k, v in zoo.Toy().state_dict().items()},
        lambda: torch.ones(3),
        lambda: [zoo.Toy().state_dict()],
    ],
)
def test_a_checkpoint_of_odd_things_is_refused_in_words(content, tmp_path):
    torch.save(content(), tmp_path / "c.pt")
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(zoo.Toy(), tmp_path / "c.pt")
    assert error.value.hint and error.value.exit_code == 2


class Bytes:
    """As many as a pickle asks for, which torch grants."""

    def __reduce__(self):
        return (bytearray, (1 << 20,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_fill_the_memory_is_read_only_if_it_is_trusted(zipped, tmp_path):
    path = tmp_path / "c.pt"
    content = {"model": zoo.Toy().state_dict(), "more": Bytes()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"it asks for `builtins.bytearray`"):
        checkpoint.load(zoo.Toy(), path)
    checkpoint.load(zoo.Toy(), path, allow_pickle=True)


def test_a_checkpoint_that_unpacks_is_read_only_if_it_is_trusted(tmp_path):
    torch.save(zoo.Toy().state_dict(), tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "c.pt") as whole, zipfile.ZipFile(tmp_path / "d.pt", "w") as packed:
        for part in whole.infolist():
            packed.writestr(part.filename, whole.read(part), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="d.pt` is compressed"):
        checkpoint.load(zoo.Toy(), tmp_path / "d.pt")
    checkpoint.load(zoo.Toy(), tmp_path / "d.pt", allow_pickle=True)


def broken(path):
    """A checkpoint of both kinds, cut off, emptied, and with bytes turned."""
    torch.save(zoo.Toy().state_dict(), path.with_suffix(".pt"))
    torch.save(zoo.Toy().state_dict(), path.with_suffix(".pth"), _use_new_zipfile_serialization=False)
    checkpoint.save(zoo.Toy(), path.with_suffix(".safetensors"))
    random = np.random.default_rng(0)
    for suffix in (".pt", ".pth", ".safetensors"):
        content = path.with_suffix(suffix).read_bytes()
        yield suffix, b""
        for size in (1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
            yield suffix, content[:size]
        for _ in range(40):
            spoilt = bytearray(content)
            for position in random.integers(0, min(len(content), 2000), 3):
                spoilt[position] = random.integers(0, 256)
            yield suffix, bytes(spoilt)
    yield ".safetensors", struct.pack("<Q", 1 << 62) + b"{}"
    yield ".safetensors", struct.pack("<Q", 100) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'


def test_a_damaged_checkpoint_is_read_or_refused_in_words(tmp_path):
    for number, (suffix, content) in enumerate(broken(tmp_path / "c")):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(content)
        try:
            checkpoint.load(zoo.Toy(), path)
        except CheckpointError as error:
            assert str(path) in error.what and error.hint
        path.unlink()


# a user's own code, which is trusted, but not to be without mistakes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise KeyError('x')", "KeyError: 'x' (own_module.py, line 1)"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0 (own_module.py, line 2)"),
        ("def f():\n    raise RuntimeError('no\\nway')", "RuntimeError: no way (own_module.py, line 2)"),
        ("f = type('F', (), {'__call__': lambda self: 1 / 0})()", "ZeroDivisionError"),
        ("def f():\n    return f()", "RecursionError"),
    ],
)
def test_a_module_may_raise_whatever_it_likes(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_module.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        Python("own_module:f").build(3, 1)
    sys.modules.pop("own_module", None)
    assert says in error.value.what and error.value.hint


def test_a_plug_in_of_another_package_that_breaks_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("import this_is_nowhere")
    places = dict(plugins.modules("models"))
    monkeypatch.setattr(plugins, "modules", lambda folder: {**places, "theirs": "broken_plugin"})
    with pytest.raises(ConfigError, match="the plug-in `theirs` of `broken_plugin` cannot be loaded: ModuleNotFound"):
        plugins.load("models", "theirs")


# images


@pytest.fixture
def root(tmp_path):
    """Two classes, 6 training and 2 test images each, 8x6, half grey."""
    for part, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            home = tmp_path / "data" / part / name
            home.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 6), (120, 120, 120)).save(home / f"{i:02d}.png")
    return tmp_path / "data"


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def claiming(width, height):
    """A PNG of that size, whose numbers are not there."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def as_png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


WHOLE = as_png(Image.effect_noise((64, 64), 50))
BAD = {
    "a bomb of 60,000 x 60,000": (claiming(60_000, 60_000), "decompression bomb"),
    "a bomb that Pillow lets through": (claiming(9_000, 9_000), "are more than 50 million"),
    "a bomb in a bomb": (as_png(Image.new("L", (8_000, 8_000))), "are more than 50 million"),
    "one row of many": (claiming(2**31 - 1, 1), "not whole, or no image"),
    "nothing": (b"", "not whole, or no image"),
    "a cut": (WHOLE[:800], "not whole, or no image"),
    "damage": (WHOLE[:100] + b"\xff" * 300 + WHOLE[400:], "not whole, or no image"),
    "text": (b"hello", "not whole, or no image"),
    "a program for a printer": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\nshowpage\n",
        "not whole, or no image",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_is_none_is_named(name, root):
    content, says = BAD[name]
    (root / "train/cat/00.png").write_bytes(content)
    with pytest.raises(DataError) as error:
        Folder(str(root), size=6).read(None)
    assert "1 of 12 images cannot be read" in error.value.what and error.value.exit_code == 2
    assert "train/cat/00.png" in error.value.what and says in error.value.what


def test_no_bomb_is_decoded(root):
    """It is refused by its header: what it would be unpacked to is never asked of the system."""
    bomb = as_png(Image.new("L", (12_000, 12_000)))
    (root / "train/cat/00.png").write_bytes(bomb)
    tracked = Path("/proc/self/clear_refs")
    peak = lambda: int(next(r for r in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in r).split()[1])  # noqa: E731
    if not tracked.exists():
        pytest.skip("the system does not count the memory of a process")
    tracked.write_text("5")
    before = peak()
    with pytest.raises(DataError):
        Folder(str(root)).read(None)
    assert LARGEST < 12_000**2 and peak() - before < 60_000  # kB; the picture would be 144,000


@pytest.mark.parametrize(
    ("make", "suffix", "value"),
    [
        (lambda: Image.new("L", (8, 6), 120), ".jpg", 120),
        (lambda: Image.new("RGB", (8, 6), (120,) * 3), ".tif", 120),
        (lambda: Image.fromarray(np.full((6, 8), 120 * 256 + 7, np.uint16)), ".png", 120),
        (lambda: Image.new("CMYK", (8, 6), (135, 135, 135, 0)), ".tif", 120),
        (lambda: Image.new("RGBA", (8, 6), (120, 120, 120, 30)), ".png", 120),
        (lambda: Image.new("LA", (8, 6), (120, 30)), ".png", 120),
        (lambda: Image.new("P", (8, 6), 3), ".gif", None),
        (lambda: Image.new("1", (8, 6), 1), ".png", 255),
    ],
)
@pytest.mark.parametrize("grey", [True, False])
def test_every_kind_of_picture_is_read_as_it_looks(make, suffix, value, grey, root):
    (root / "train/cat/00.png").unlink()
    image = make()
    if image.mode == "P":
        image.putpalette([c for grey in range(256) for c in (min(grey + 117, 255),) * 3])
        image.info["transparency"] = 0
        value = 120
    image.save(root / f"train/cat/00{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = Folder(str(root), grey=grey, valid_fraction=0.2).read(None)
    pixels = np.concatenate([content.train.images, content.valid.images])
    assert pixels.shape[1:] == (6, 8, 1 if grey else 3)
    assert {int(v) for v in np.unique(pixels)} <= {*range(118, 123), value}


def test_of_an_animation_the_first_picture_counts_and_a_wrong_name_does_not(root):
    frames = [Image.new("L", (8, 6), v) for v in (120, 10, 250)]
    frames[0].save(root / "train/cat/00.png", "GIF", save_all=True, append_images=frames[1:])  # no PNG at all
    assert set(np.unique(Folder(str(root), grey=True, valid_fraction=0.2).read(None).train.images)) == {120}


def test_numbers_without_black_and_white_are_refused(root):
    Image.fromarray(np.zeros((6, 8), np.float32)).save(root / "train/cat/99.tif")
    with pytest.raises(DataError, match=r"99.tif \(its pixels are numbers of 32 bits"):
        Folder(str(root)).read(None)


def test_links_that_lead_out_of_the_folder_are_followed_only_if_they_are_ones_own(root, tmp_path):
    """What they lead to would go into training arrays, calibration sets and bundles."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 6)).save(secret)
    (root / "train/cat/99.png").symlink_to(secret)
    with pytest.raises(DataError, match=r"train/cat/99.png` leads out of .*secret.png") as error:
        Folder(str(root)).fingerprint()
    assert "links: true" in error.value.hint
    assert len(Folder(str(root), valid_fraction=0.2, links=True).read(None).test.labels) == 4
    (root / "train/cat/99.png").unlink()
    (root / "train/cat/99.png").symlink_to(root / "train/dog/00.png")  # within it
    Folder(str(root), valid_fraction=0.2).read(None)
    for home in (root / "test/cat", root / "test"):
        home.rename(tmp_path / "moved")
        home.symlink_to(tmp_path / "moved")
        with pytest.raises(DataError, match="leads out of"):
            Folder(str(root)).fingerprint()
        Folder(str(root), links=True).fingerprint()
        home.unlink()
        (tmp_path / "moved").rename(home)
    other = tmp_path / "other"
    other.symlink_to(root)
    Folder(str(other)).fingerprint()  # the folder itself may be a link


@pytest.mark.parametrize(
    "make", [lambda p: os.mkfifo(p), lambda p: p.mkdir(), lambda p: p.symlink_to("nowhere"), lambda p: p.symlink_to(p)]
)
def test_what_is_no_file_is_not_waited_for(make, root):
    make(root / "train/cat/99.png")
    with pytest.raises(DataError, match="99.png` is no file"):
        Folder(str(root)).fingerprint()


def test_images_that_no_memory_holds_are_refused_before_they_are_kept(root, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 1000)
    with pytest.raises(DataError, match="the 12 images of `train` take 0.0 GB"):
        Folder(str(root)).read(None)


def test_inputs_of_objects_are_never_unpickled(tmp_path):
    evil = np.array([Writes(tmp_path / "harm")], dtype=object)
    spec = inspect.TensorSpec("image", (0, 1, 8, 8))
    np.save(tmp_path / "a.npy", evil)
    np.savez(tmp_path / "b.npz", image=evil)
    np.savez_compressed(tmp_path / "c.npz", image=evil)
    for name in ("a.npy", "b.npz", "c.npz"):
        with pytest.raises(DataError, match="not a readable"):
            load_calibration(tmp_path / name, spec)
    assert not (tmp_path / "harm").exists()


def header(shape, dtype="<f4"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("shape", ["(1099511627776, 1, 8, 8)", "(-4, 1, 8, 8)", "('a',)", "3", "(1,)*9", "(4, 1, 8, 8"])
def test_an_array_that_claims_what_it_does_not_hold_is_refused(shape, tmp_path):
    content = header(shape) + bytes(64)
    (tmp_path / "a.npy").write_bytes(content)
    for name, kind in (("b.npz", zipfile.ZIP_STORED), ("c.npz", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / name, "w", kind) as archive:
            archive.writestr("image.npy", content)
    for name in ("a.npy", "b.npz", "c.npz"):
        with pytest.raises(DataError, match="not a readable"):
            load_calibration(tmp_path / name, inspect.TensorSpec("image", (0, 1, 8, 8)))


@pytest.mark.parametrize("shape", ["(4,", "(4,), 'x': (", "(-4,)", "(1 << 40,)", "(1099511627776,)", "3"])
def test_labels_that_claim_what_they_do_not_hold_are_refused(shape, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 1, 8, 8), np.float32))
    (tmp_path / "labels.npy").write_bytes(header(shape, "<i8") + bytes(32))
    with pytest.raises(DataError, match="is not a readable .npy file of numbers"):
        check_labels(tmp_path / "labels.npy", File.of(tmp_path / "x.npy"), ())


def test_a_compressed_array_that_fills_the_memory_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", header("(4, 1, 8, 8)"))
        archive.getinfo("image.npy").file_size = 1 << 40
    with pytest.raises(DataError, match="unpacks to 1100 GB"):
        load_calibration(tmp_path / "c.npz", inspect.TensorSpec("image", (0, 1, 8, 8)))
