"""A report.json from anywhere: refused in words with exit code 2, or shown harmlessly; never a traceback."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from edgekd.cli.console import run
from edgekd.cli.main import app
from edgekd.core.artifact import File, RecordedFile
from edgekd.core.bench_result import Interval
from edgekd.core.build_record import BuildRecord, SelectedRanges
from edgekd.core.gate import Decision, Gate
from edgekd.core.mixed_precision import EvalScores, MixedPrecision, ParetoFront
from edgekd.errors import ConfigError, StaleArtifact
from edgekd.stages.report.change import Tolerance
from edgekd.stages.report.load import read, samples
from edgekd.stages.report.regressions import compare_builds, markdown, summary, text
from edgekd.stages.report.report import render, report
from edgekd.utils import arrays as arrays_module
from edgekd.utils.arrays import load_array, load_arrays
from tests.standins.edits import edit
from tests.test_regressions import bench, record, row, written

M = ("benches", 0, "measurements", 1)
PAINT = "\x1b[31mred\x1b]0;title\x07 \u202eevil\u2066 \x00\x85"
OUTCOMES: tuple[Any, ...] = ("passed", "undecided", "failed", "passed")
ROUTE = {"teacher": "a", "student": "b", "size": [8, 8], "receptive": [1, 1], "losses": [0.5], "dropped": None}


def whole() -> BuildRecord:
    """With every part that a report has something to say of."""
    marks = EvalScores(94.0, Interval(0.1, 0.5, 0.9), 31.0)
    mixed = ParetoFront(
        "kd", "cpu", "top1", 1.0, 95.0, 200, 200, (), (MixedPrecision((), marks, 0.0, None),), 0, "no machine"
    )
    gate = Decision("cpu", Gate("accuracy_drop", max=1.0), "kd int8", "passed", Interval(0.1, 0.2, 0.3), "0.2")
    ranges = SelectedRanges("kd", "cpu", "entropy", {"minmax": 94.0, "entropy": 95.0})
    made = record(bench(row("kd int8"), row("kd fp32")), pareto_fronts=(mixed,), gates=(gate,), ranges=(ranges,))
    made = replace(made, step_seconds={"teacher": 1.0})
    students = tuple(replace(w, notes={"routes": [ROUTE]}) for w in made.students)
    return replace(made, students=students)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return written(tmp_path / "build", whole())


def changed(home: Path, path: tuple[Any, ...], value: Any) -> Path:
    """The report.json with another value somewhere; none at all for `...`."""
    place = home / "report.json"
    edit(place, path, value)
    return place


def test_a_whole_one_is_read(home):
    found = read(home / "report.json")
    assert found.benches[0].measurements[1].metrics["p50_ms"] == 0.5
    assert found.students[0].notes == {"routes": [ROUTE]} and found.pareto_fronts[0].metric == "top1"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ((*M, "metrics", "p50_ms"), float("nan"), "NaN is no number"),
        ((*M, "metrics", "p50_ms"), float("-inf"), "-Infinity is no number"),
        ((*M, "metrics", "p50_ms"), -1.0, "`p50_ms` of kd int8 is -1, which is no time"),
        ((*M, "metrics", "p50_ms"), 0, "is 0, which is no time"),
        ((*M, "metrics", "p50_ms"), [1.0], "metrics.p50_ms is [1.0]: Input should be a valid number"),
        ((*M, "metrics", "top1"), 101, "`top1` of kd int8 is 101 %"),
        ((*M, "metrics"), [], "metrics is []: Input should be an object"),
        ((*M, "intervals", "p50_ms", "low"), 2.0, "the interval of `p50_ms` of kd int8 is from 2 to"),
        ((*M, "intervals", "p50_ms", "low"), -2.0, "begins at -2"),
        ((*M, "intervals", "memory_mb", "high"), 1e300, "the interval of `memory_mb` of kd int8 is from"),
        ((*M, "speedup", "low"), 0.0, "the interval of the speed-up of kd int8 begins at 0"),
        ((*M, "model", "role"), "judge", "role is \"judge\": Input should be 'teacher', 'student' or 'baseline'"),
        ((*M, "model", "macs"), "10", 'macs is "10": Input should be a valid integer'),
        ((*M, "model", "macs"), 10**30, "is too large a number"),
        ((*M, "model", "file"), ..., "model.file is missing"),
        ((*M, "model", "file"), "a.onnx", 'file is "a.onnx": Input should be'),
        ((*M, "model", "file", "name"), "../../.ssh/id_rsa", 'file.name is "../../.ssh/id_rsa"'),
        ((*M, "model", "file", "name"), "..", 'file.name is ".."'),
        ((*M, "model", "file", "name"), "/etc/passwd", 'file.name is "/etc/passwd"'),
        ((*M, "model", "file", "sha256"), "../x", 'file.sha256 is "../x"'),
        (("benches", 0, "protocol", "batch"), "many", "`batch` of the protocol is many"),
        (("benches", 0, "protocol", "images"), 0, "`images` of the protocol is 0"),
        (("benches", 0, "seconds"), -1.0, "the comparison took -1 s"),
        (("benches", 0, "aa_ratio", "estimate"), 9.0, "the interval of the A/A control"),
        (("benches", 0, "machine", "flags"), "avx2", 'machine.flags is "avx2": Input should be a valid array'),
        (("benches",), {}, "benches is {}: Input should be a valid array"),
        (("data", "train"), 0, "data.train is 0"),
        (("data", "classes"), 10, "data.classes is 10"),
        (("step_seconds", "teacher"), -1.0, "the step teacher took -1 s"),
        (("teacher", "seconds"), -1.0, "training of kd took -1 s"),
        (("teacher", "valid_accuracy"), 95.0, "has an accuracy of 95, which is from 0 to 1"),
        (("students", 0, "notes", "routes"), [1], "0 is 1: Input should be"),
        (("students", 0, "notes", "routes", 0, "losses"), ["low"], '0.losses.0 is "low"'),
        (("pareto_fronts", 0, "selected"), 7, "of the mixes for kd, number 7 was chosen of 1"),
        (("pareto_fronts", 0, "metric"), "charm", "`charm` is no metric"),
        (("name",), None, "name is null: Input should be a valid string"),
        (("name",), "\ud800", "surrogates not allowed"),
        (("files",), ..., "is null: Input should be a valid"),
        (("files", 0, "bytes"), "9", '0.bytes is "9"'),
        (("schema",), 1, "has schema 1; this edgekd reads 2"),
        (("schema",), ..., "has schema None; this edgekd reads 2"),
    ],
)
def test_what_a_hand_has_changed_is_named(path, value, says, home):
    with pytest.raises(ConfigError) as error:
        read(changed(home, path, value))
    assert says in error.value.what and error.value.hint and len(error.value.what) < 500


def test_a_report_of_an_older_edgekd_is_refused_with_what_to_do(tmp_path):
    """Schema 1 had other names: `contestant`, `readings`, `ships`."""
    bench = {"target": "cpu", "measurements": [{"contestant": {"name": "kd int8"}, "readings": {}}], "ships": "kd int8"}
    (tmp_path / "report.json").write_text(json.dumps({"schema": 1, "name": "digits", "benches": [bench], "files": []}))
    with pytest.raises(ConfigError, match="schema 1") as error:
        read(tmp_path / "report.json")
    assert "build again" in error.value.hint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": 2}',
        b'{"schema": 2, "files": [], "name": 1e999}',
        b"1",
    ],
)
def test_what_is_no_report_is_refused(content, tmp_path):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "report.json")
    assert error.value.hint


def test_one_that_was_cut_off_is_refused_wherever_that_was(home):
    content = (home / "report.json").read_text()
    for end in range(1, len(content) - 1, 97):
        (home / "report.json").write_text(content[:end])
        with pytest.raises(ConfigError, match="cannot be read"):
            read(home / "report.json")


def test_hundreds_of_mistakes_are_told_in_a_few_lines(home):
    data = json.loads((home / "report.json").read_text())
    with pytest.raises(ConfigError) as error:
        read(changed(home, ("benches",), [data["benches"][0] | {"target": 1}] * 500))
    assert "500 mistakes" in error.value.what and "and 480 more" in error.value.what


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inside for found in ((*path, key), *places(part, (*path, key)))]


@pytest.mark.parametrize(("template", "examples"), [("report.md.j2", 250), ("report.html.j2", 25)])
def test_whatever_is_changed_it_is_refused_in_words_or_can_be_told(template, examples, home):
    content, first = (home / "report.json").read_text(), written(home.parent / "first", whole())

    @settings(max_examples=examples, deadline=None)
    @given(path=st.sampled_from(places(json.loads(content))), value=JSON | st.just(...))
    def told(path: tuple[Any, ...], value: Any) -> None:
        (home / "report.json").write_text(content)
        try:
            found = read(changed(home, path, value))
        except ConfigError as error:
            assert error.hint
        else:
            assert render(template, found, [])
            for builds in ((home, first), (first, home)):
                both = compare_builds(*builds, Tolerance())
                assert text(both) and markdown(both) and json.dumps(summary(both), allow_nan=False)

    told()


def test_the_markdown_stands_alone_with_gates_behind_the_headline_and_whole_tables(home, tmp_path):
    gates = [Decision("cpu", Gate("accuracy_drop", max=n), "kd int8", o, None, "a | b") for n, o in enumerate(OUTCOMES)]
    made = replace(read(home / "report.json"), gates=tuple(gates))
    tokens = MarkdownIt("commonmark").enable("table").parse(render("report.md.j2", made, []))
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[:3] == ["digits", "Gates: 1 failed, 1 undecided, 2 passed", "cpu"]
    items = [tokens[i + 2].content for i, token in enumerate(tokens) if token.type == "list_item_open"]
    told = [item for item in items if "drop at most" in item]
    assert [item.partition(" on ")[0] for item in told] == ["**failed**", "**undecided**", "**passed**", "**passed**"]
    rows = [0]
    for token in tokens:
        rows += [0] if token.type == "tr_open" else []
        rows[-1] += token.type in ("th_open", "td_open")
    bench_rows = rows[1 : 1 + 1 + len(made.benches[0].measurements)]
    assert len(set(bench_rows)) == 1 and bench_rows[0] > 8
    html = [token.content for token in tokens if token.type.startswith("html")]
    html += [c.content for token in tokens for c in token.children or () if c.type == "html_inline"]
    assert set(html) <= {"<code>", "</code>"}


def kept(path: Path, **arrays: Any) -> File:
    np.savez(path, **arrays)
    return File.of(path)


GOOD = {"names": np.array(["a"]), "model": np.zeros(2, np.int32), "ns": np.array([5, 7])}


def test_samples_are_milliseconds_of_each_model_that_was_called(tmp_path):
    more = {"names": np.array(["a", "never called"])}
    ((name, ms),) = samples(kept(tmp_path / "samples.npz", **GOOD | more)).items()
    assert name == "a" and ms.tolist() == [5e-6, 7e-6]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ns": np.array([{}, {}])},
        {"ns": np.array([5, -7])},
        {"ns": np.array([5.0, np.nan])},
        {"ns": np.array([5.0, np.inf])},
        {"ns": np.array([[5, 7]])},
        {"ns": np.array([5])},
        {"ns": np.array(["5", "7"])},
        {"model": np.zeros(2)},
        {"names": np.array([1])},
        {"names": np.array("a")},
    ],
)
def test_other_arrays_are_refused(wrong, tmp_path):
    with pytest.raises(ConfigError, match="Object arrays|other arrays|times that are none"):
        samples(kept(tmp_path / "samples.npz", **GOOD | wrong))


class Harm:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


def test_pickles_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npy").write_bytes(pickle.dumps(Harm()))
    np.save(tmp_path / "b.npy", np.array([Harm()], object), allow_pickle=True)
    np.savez(tmp_path / "c.npz", names=np.array([Harm()], object))
    for path in (tmp_path / "a.npy", tmp_path / "b.npy"):
        with pytest.raises(ConfigError, match="holds no arrays"):
            load_array(path)
    with pytest.raises(ConfigError, match="holds no arrays"):
        load_arrays(tmp_path / "c.npz", ("names",))
    assert not (tmp_path / "harm").exists()


def test_an_array_that_claims_to_be_huge_is_refused(tmp_path, monkeypatch):
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1152921504606846976,), }"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ConfigError, match="holds no arrays"):
        load_array(tmp_path / "a.npy")
    with (
        zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("ns.npy", "w", force_zip64=True) as part,
    ):
        part.write(bytes(3 << 20))
    monkeypatch.setattr(arrays_module, "LARGEST", 2 << 20)
    with pytest.raises(ConfigError, match="would unpack to more than"):
        load_arrays(tmp_path / "b.npz", ("ns",))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_whatever_byte_of_an_archive_is_changed_it_is_read_or_refused_in_words(place, byte, cut, tmp_path):
    path = tmp_path / "samples.npz"
    np.savez_compressed(path, **GOOD)
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place] = byte
    path.write_bytes(content[:place] if cut else content)
    try:
        load_arrays(path, GOOD)
    except ConfigError as error:
        assert error.hint


def test_samples_that_changed_are_refused(tmp_path):
    file = kept(tmp_path / "samples.npz", **GOOD)
    file.path.write_bytes(b"other")
    with pytest.raises(StaleArtifact):
        samples(file)
    with pytest.raises(ConfigError, match="changed since it was recorded"):
        samples(RecordedFile(file.path, file.sha256, None))


def edgekd(monkeypatch: pytest.MonkeyPatch, *words: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["edgekd", *map(str, words)])
    return run(app)


def test_the_command_says_what_is_wrong_and_exits_with_2(home, monkeypatch, capsys):
    changed(home, ("students", 0, PAINT), 1)
    changed(home, (*M, "metrics", PAINT), "fast")
    assert edgekd(monkeypatch, "report", home) == 2
    said = capsys.readouterr().err
    assert "is not as edgekd writes it" in said and "hint: " in said
    assert "\\x1b[31mred\\x1b]0;title\\x07 \\u202eevil\\u2066 \\x00\\x85" in said and "\x1b" not in said


def test_names_neither_paint_a_terminal_nor_hide_in_a_report(tmp_path, monkeypatch, capsys):
    old, new = (
        written(tmp_path / folder, record(bench(row(PAINT, ms, sha=sha), selected=PAINT), name=PAINT, command=PAINT))
        for folder, ms, sha in (("old", 0.5, "b"), ("new", 1.0, "d"))
    )
    assert edgekd(monkeypatch, "report", "--compare", old, new, "--out", tmp_path / "out") == 3
    out, err = capsys.readouterr()
    assert "\\x1b[31mred" in out and not set(out + err) & set("\x1b\x07\x00\x85\u202e\u2066")
    report(read(new / "report.json"), new)
    for path in (new / "report.md", tmp_path / "out" / "regressions.md"):
        content = path.read_text(encoding="utf-8")
        assert "&#92;x1b&#91;31mred" in content
        assert not set(content) & set("\x1b\x07\x00\x85\u202e\u2066")
    assert edgekd(monkeypatch, "report", "--compare", old / "report.json", new / "report.json", "--json") == 3
    assert json.loads(capsys.readouterr().out)["exit_code"] == 3
    assert edgekd(monkeypatch, "report", "--compare", new, new, "--tolerance", "-1") == 2
    assert edgekd(monkeypatch, "report", new, "--json") == 2
