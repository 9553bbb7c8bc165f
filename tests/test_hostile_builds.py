"""Other people's builds, bundles, caches and configurations: no name leads out, and no text is more than it seems."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edgekd.config import load_config
from edgekd.core import config_file
from edgekd.core.artifact import File
from edgekd.core.step_cache import StepCache
from edgekd.errors import CheckpointError, ConfigError, DataError, EdgekdError, ModelError, StaleArtifact
from edgekd.onnx import writer
from edgekd.stages.device.bundle import Bundle, copy_bundle
from edgekd.stages.report import provenance
from edgekd.stages.report.verify import verify
from edgekd.utils.paths import escapes_folder
from tests import test_report
from tests.standins.bundles import make_bundle
from tests.standins.commands import command
from tests.standins.networks import network

record = test_report.record  # a fixture


# builds and bundles


def sealed(home, **changes):
    """A build as small as one can be, as `verify` reads it: a report, what ships, a step, a bundle."""
    (home / "artifacts" / "cpu").mkdir(parents=True)
    (home / "steps" / "export-1").mkdir(parents=True)
    (home / "report.html").write_text("fine")
    measured = writer.to_bytes(network(), {})
    told = {"measured": {"cpu": {"files": {"s int8": hashlib.sha256(measured).hexdigest()}, "selected": "s int8"}}}
    stamp = provenance.build_hash(told)
    ships = writer.to_bytes(network(), {provenance.STAMP: stamp})
    (home / "artifacts" / "cpu" / "s-int8.onnx").write_bytes(ships)
    (home / "steps" / "export-1" / "s.onnx").write_bytes(measured)
    output = {"file": {"name": "s.onnx", "sha256": hashlib.sha256(measured).hexdigest()}}
    (home / "steps" / "export-1" / "step.json").write_text(json.dumps({"output": output}))
    make_bundle(home / "bundle-cpu")
    names = ["report.html", "artifacts/cpu/s-int8.onnx", "bundle-cpu/manifest.json"]
    content = {
        "schema": provenance.SCHEMA,
        "sha256": stamp,
        "provenance": told,
        "files": {name: File.of(home / name).sha256 for name in names},
        "steps": {"steps/export-1/step.json": File.of(home / "steps/export-1/step.json").sha256},
    }
    (home / "manifest.json").write_text(json.dumps(content | changes))
    return home


def renamed(home, change):
    found = json.loads((home / "manifest.json").read_text())
    change(found)
    (home / "manifest.json").write_text(json.dumps(found))


def test_a_whole_build_is_whole(tmp_path):
    assert verify(sealed(tmp_path / "b")).findings == ()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../secret", "lies outside"),
        ("/etc/passwd", "lies outside"),
        ("steps/../../secret", "lies outside"),
        ("a\\b", "lies outside"),
        ("a\0b", "lies outside"),
        ("", "lies outside"),
        ("link", "lies outside"),
        ("up/secret", "lies outside"),
        ("round", "is gone"),
        (".", "is gone"),
        ("x" * 5000, "lies outside"),
        ("pipe", "is gone"),
        ("\x1b[31m", "is gone"),
    ],
)
def test_no_name_in_a_manifest_leads_anywhere(name, says, tmp_path):
    home = sealed(tmp_path / "b")
    (tmp_path / "secret").write_text("secret")
    (home / "link").symlink_to(tmp_path / "secret")
    (home / "up").symlink_to(tmp_path)
    (home / "round").symlink_to(home / "round")
    os.mkfifo(home / "pipe")
    renamed(home, lambda found: found["files"].update({name: hashlib.sha256(b"secret").hexdigest()}))
    (finding,) = verify(home).findings
    assert finding.file == name and says in finding.what


def test_a_bundle_among_the_steps_and_the_lock_beside_them_belong_to_a_build(tmp_path):
    home, step = sealed(tmp_path / "b"), tmp_path / "b" / "steps" / "bundle-cpu-1"
    make_bundle(step)
    output = {"manifest": {"name": "manifest.json", "sha256": File.of(step / "manifest.json").sha256}}
    (step / "step.json").write_text(json.dumps({"output": output}))
    entry = {"steps/bundle-cpu-1/step.json": File.of(step / "step.json").sha256}
    renamed(home, lambda found: found["steps"].update(entry))
    (home / "steps" / "lock").write_text("1")
    assert verify(home).findings == ()
    (step / "more.py").write_text("more")
    assert [f.file for f in verify(home).findings] == ["steps/bundle-cpu-1/more.py"]


def test_what_was_added_to_a_build_is_found_and_results_of_a_device_are_not(tmp_path):
    home = sealed(tmp_path / "b")
    (home / "bundle-cpu" / "results").mkdir()
    (home / "bundle-cpu" / "results" / "result.json").write_text("{}")
    assert verify(home).findings == ()
    bundled, selected = ("numpy.py", "models/more.onnx"), ("cpu/other.onnx", "readme.txt")
    for name in (*(f"bundle-cpu/{name}" for name in bundled), *(f"artifacts/{name}" for name in selected)):
        (home / name).write_text("more")
        assert [(f.file, f.what) for f in verify(home).findings] == [(name, "was not made by this build")]
        (home / name).unlink()
    (home / "artifacts" / "cpu" / "link.onnx").symlink_to("/etc/passwd")
    assert [f.file for f in verify(home).findings] == ["artifacts/cpu/link.onnx"]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"output": ' + "[" * 900 + "]" * 900 + "}", "1", '{"output": 3}', "{"]
)
def test_an_entry_that_is_none_is_a_finding(text, tmp_path):
    home = sealed(tmp_path / "b")
    path = home / "steps" / "export-1" / "step.json"
    path.write_text(text)
    renamed(home, lambda found: found["steps"].update({"steps/export-1/step.json": File.of(path).sha256}))
    assert all("is no list of files" in f.what for f in verify(home).findings)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"a": 3}},
        {"files": [1]},
        {"steps": {"a": None}},
        {"provenance": {}},
        {"provenance": {"measured": {"cpu": {"files": [], "selected": "x"}}}},
        {"provenance": {"measured": []}},
        {"sha256": 5},
        {"schema": "1"},
        {"schema": [1]},
    ],
)
def test_a_manifest_of_other_things_is_refused_in_words(changes, tmp_path, capsys):
    home = sealed(tmp_path / "b", **changes)
    code, said = command(capsys, "verify", home)
    assert code == 2 and said.startswith("error: ") and "manifest.json" in said


def test_a_hostile_manifest_has_nothing_deleted_outside_of_its_build(record, tmp_path):
    """A build into that folder removes what the last one shipped, by the names in its manifest."""
    home = sealed(tmp_path / "b")
    (tmp_path / "precious").write_text("mine")
    listed = {f"artifacts/{name}": "0" * 64 for name in ("../../precious", "old.onnx")}
    renamed(home, lambda found: found["files"].update(listed))
    (home / "artifacts" / "old.onnx").write_text("old")
    provenance.write_manifest(replace(record, benches=record.benches[1:]), home, (), {})
    assert (tmp_path / "precious").exists() and not (home / "artifacts" / "old.onnx").exists()


def bundle_at(home):
    return Bundle(File.of(home / "manifest.json"))


def rewrite(home, change):
    renamed(home, change)
    return bundle_at(home)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"../x": {"sha256": "0" * 64, "bytes": 1}}),
        lambda m: m["files"].update({"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}),
        lambda m: m.update(inputs="../inputs.npy"),
        lambda m: m.update(inputs="elsewhere.npy"),
        lambda m: m["engines"][0].update(model="../x.onnx"),
        lambda m: m["engines"][0].update(cache=["a"]),
        lambda m: m["engines"][0].update(cache="../cache"),
        lambda m: m["engines"].append(3),
        lambda m: m.update(files=[]),
        lambda m: m.update(engines={}),
        lambda m: m.pop("target"),
    ],
)
def test_a_bundle_names_its_own_files_only(change, tmp_path):
    home = make_bundle(tmp_path / "bundle")
    bundle_at(home).read()
    with pytest.raises(ConfigError) as error:
        rewrite(home, change).read()
    assert error.value.hint


def test_a_bundle_with_links_is_neither_read_nor_put_in_place(tmp_path):
    home = make_bundle(tmp_path / "bundle")
    shutil.copy(home / "inputs.npy", tmp_path / "inputs.npy")
    (home / "inputs.npy").unlink()
    (home / "inputs.npy").symlink_to(tmp_path / "inputs.npy")
    with pytest.raises(ConfigError, match="`inputs.npy` .* is no file of this bundle"):
        bundle_at(home).read()
    home = make_bundle(tmp_path / "other")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("mine")
    (tmp_path / "out").symlink_to(tmp_path / "victim")
    with pytest.raises(StaleArtifact, match="leads out of"):
        copy_bundle(bundle_at(home), tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "models").symlink_to(tmp_path / "victim")
    with pytest.raises(StaleArtifact, match="leads out of"):
        copy_bundle(bundle_at(home), tmp_path / "there")
    assert [p.name for p in (tmp_path / "victim").iterdir()] == ["precious"]


REST = {"seconds": 1, "finished": "", "machine": {}, "code": {"sha256": ""}}


@pytest.mark.parametrize(
    "entry",
    [
        "[]",
        "3",
        "{}",
        "[" * 100_000,
        '{"output": 1}',
        json.dumps({"output": {"name": "../x", "sha256": "0" * 64}} | REST),
        json.dumps({"output": {"name": "/etc/passwd", "sha256": "0" * 64}} | REST),
        json.dumps({"output": {"name": 3, "sha256": 4}} | REST),
        json.dumps(
            {"output": {"name": "x", "sha256": "0" * 64}, "seconds": "1", "finished": 3, "machine": [], "code": 1}
        ),
    ],
)
def test_an_entry_of_the_ledger_that_was_written_by_somebody_else_is_put_aside(entry, tmp_path, caplog):
    cache = StepCache(tmp_path)

    def made(out) -> File:
        (out / "x").write_text("x")
        return File.of(out / "x")

    first = cache.step("s", made)
    home = first.path.parent
    (home / "step.json").write_text(entry)
    assert StepCache(tmp_path).step("s", made) == first
    assert "cannot be read" in caplog.text
    assert (home.with_name(f"{home.name}.unreadable") / "step.json").read_text() == entry


@pytest.mark.parametrize(
    ("name", "out"),
    [("a", False), ("a/b", False), ("..", True), ("a/../b", True), ("/a", True), ("", True), ("link/x", True)]
    + [("a\0", True), ("a\\b", True), ("round/x", False), ("...", False)],
)
def test_a_name_leads_out_or_not(name, out, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "link").symlink_to(tmp_path)
    (tmp_path / "home" / "round").symlink_to("round")
    assert escapes_folder(tmp_path / "home", name) is out
    assert escapes_folder(Path(os.path.relpath(tmp_path / "home")), name) is out


# configurations

DEEP = "[" * 3000 + "]" * 3000
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGED = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{'<<': [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)).replace(
    "'", ""
)
TEXTS = {
    "billion laughs": (LAUGHS, "holds more than 20,000 values"),
    "merged laughs": (MERGED, "holds more than 20,000 values"),
    "a list that holds itself": ("a: &a [*a]", "is nested too deeply"),
    "a table that holds itself": ("a: &a {b: *a}", "is nested too deeply"),
    "a key twice": ("a: 1\na: 2", "`a` is there twice"),
    "many keys, one twice": ("".join(f"k{i}: 1\n" for i in range(5000)) + "k77: 2", "`k77` is there twice"),
    "an object": ("a: !!python/object:os.system {}", "the tag `!!python/object:os.system` is not read"),
    "a call": ("a: !!python/object/apply:os.system ['touch harm']", "is not read"),
    "bytes": ("a: !!binary aGVsbG8=", "the tag `!!binary` is not read"),
    "a set": ("a: !!set {b, c}", "the tag `!!set` is not read"),
    "pairs": ("a: !!pairs [b: c]", "the tag `!!pairs` is not read"),
    "a tag of one's own": ("a: !mine 3", "the tag `!mine` is not read"),
    "a number by tag": ("a: !!int abc", "is no number"),
    "a truth by tag": ("a: !!bool perhaps", "is neither true nor false"),
    "a list by tag": ("a: !!seq {b: c}", "the tag `!!seq` is not read"),
    "a text by tag": ("a: !!str {b: c}", "the tag `!!str` is not read"),
    "no number": ("a: .nan", "is no number that a setting takes"),
    "without end": ("a: -.inf", "is no number that a setting takes"),
    "too large": ("a: 1e999", "is no number that a setting takes"),
    "too long": ("a: " + "9" * 5000, "is no number that a setting takes"),
    "beyond 64 bits": ("a: 0x1ffffffffffffffff", "is no number that a setting takes"),
    "deep": (f"a: {DEEP}", "is nested too deeply"),
    "deep tables": ("".join(" " * i + "a:\n" for i in range(330)), "is nested too deeply"),
    "aliases of aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)),
        "too deeply",
    ),
    "a number as key": ("1: a", "a key is not a text, but int `1`"),
    "nothing as key": ("a: {null: 1}", "a key is not a text, but null `null`"),
    "a list as key": ("? [a, b]\n: c", "a key is not a text, but seq"),
    "a table as key": ("{a: b}: c", "a key is not a text, but map"),
    "tabs": ("a:\n\tb: 1", "is not YAML"),
    "colours": ('a: "\\e[31m"', r"holds the character '\x1b'"),
    "a zero byte": ('a: "\\0"', r"holds the character '\x00'"),
    "half a letter": ('a: "\\ud800"', r"holds the character '\ud800'"),
    "a raw control character": ("a: \x07", "is not YAML"),
    "two documents": ("a: 1\n---\nb: 2", "is not YAML"),
    "a list": ("- a\n- b", "is not a table"),
    "a text": ("hello", "is not a table"),
    "nothing": ("", "is not a table"),
    "an alias of nothing": ("a: *b", "is not YAML"),
    "a strange version": ("%YAML 9.9\n---\na: 1", "is not YAML"),
    "a merge of a text": ("a: {<<: b}", "merges tables only"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_configuration_that_is_none_is_refused_with_its_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, says = TEXTS[name]
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config("c.yaml", (), (), False)
    assert says in error.value.what and "c.yaml" in error.value.what and error.value.hint
    assert len(error.value.what) < 300 and not Path("harm").exists()


def test_files_that_are_no_configuration_are_refused_quickly(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Path("large.yaml").open("wb") as stream:
        stream.truncate(100 << 20)
    Path("utf16.yaml").write_text("a: 1", encoding="utf-16")
    Path("folder.yaml").mkdir()
    os.mkfifo("pipe.yaml")
    says = {"large": "has more than 64 kB", "utf16": "is not a text in UTF-8", "folder": "no file", "pipe": "no file"}
    for name, words in says.items():
        code, said = command(capsys, "build", f"{name}.yaml")
        assert code == 2 and words in said, said


def test_aliases_and_merges_that_say_what_they_mean_are_read():
    text = "base: &base {epochs: 3, lr: 0.1}\none: *base\ntwo: {<<: *base, epochs: 5}\nthree: !!str 5\nfour: ! 6"
    found = config_file.parse_yaml(text, "here")
    base = {"epochs": 3, "lr": 0.1}
    assert found == {"base": base, "one": base, "two": base | {"epochs": 5}, "three": "5", "four": 6}


@pytest.mark.parametrize("change", ["a.b=!!timestamp x", "student.epochs=.nan", "name=[*a]", "name=../up", "name=a/b"])
def test_a_value_of_the_command_line_is_no_more_trusted(change, capsys):
    code, said = command(capsys, "build", "digits", "--set", change)
    assert code == 2 and said.startswith("error: ")


def test_every_error_of_what_a_user_gives_has_the_exit_code_2():
    assert {kind.exit_code for kind in (ConfigError, DataError, CheckpointError, ModelError)} == {2}
    assert EdgekdError.exit_code == 1
