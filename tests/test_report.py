"""The report says what was measured, in three formats, whatever the names in it look like."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import markupsafe
import numpy as np
import pytest

from edgekd.core import plain
from edgekd.core.artifact import EpochRecord, File, OnnxModel, PhaseRecord, TensorSpec, Weights
from edgekd.core.errors import ConfigError, StaleArtifact
from edgekd.core.record import DataFacts, Record
from edgekd.core.trial import BenchResult, Contestant, Interval, Machine, Measurement, Runtime
from edgekd.stages.report import words
from edgekd.stages.report.report import read, report

EVIL = "<script>alert(1)</script>"
TRICKY = 'a|b `c` *d* [e](http://f) @g $h_1$ "i"'
MODELS = {  # name: role, method, precision, top-1, median ms, bytes
    "teacher fp32": ("teacher", "alone", "fp32", 97.2, 1.843, 44_800),
    "student fp32": ("student", "kpn", "fp32", 96.4, 0.512, 11_300),
    "student int8": ("student", "kpn", "int8", 96.1, 0.2134, 3_700),
    "alone fp32": ("baseline", "alone", "fp32", 94.7, 0.5131, 11_300),
    "kd fp32": ("baseline", "kd", "fp32", 95.6, 0.5117, 11_300),
}
LATIN = "ms, points, %, and a name that is not ASCII: 数字"


def file(home: Path, name: str, size: int = 100) -> File:
    place = home / name
    place.write_bytes(name.encode().ljust(size, b"."))
    return File.of(place)


def phase(name: str, epochs: int, losses: dict[str, float], accuracy: float) -> PhaseRecord:
    curve = tuple(
        EpochRecord(name, e, {k: v * (1 + 1 / (e + 1)) for k, v in losses.items()}, 1.5) for e in range(epochs)
    )
    return PhaseRecord(name, epochs, losses, accuracy, 1.5 * epochs, curve)


def weights(
    home: Path, name: str, method: str, accuracy: float, *phases: PhaseRecord, notes: dict | None = None
) -> Weights:
    return Weights(file(home, f"{name}-{method}.safetensors"), name, method, 2_784, accuracy, 93.4, phases, notes)


def taught_by_projection(home: Path) -> Weights:
    routes = ["stage2.4>stage2.1", "stage3.4>stage3.1", "stage1.4>stage1.1"]
    sides = [route.split(">") for route in routes]
    told = [
        {
            "teacher": t,
            "student": s,
            "size": [16 >> i, 16 >> i],
            "receptive": [60 + i, 24 + i],
            "losses": ls,
            "dropped": d,
        }
        for i, ((t, s), ls, d) in enumerate(
            zip(sides, ([0.9123, 0.8444], [0.9555, 0.8777], [1.2345]), (None, 2, 1), strict=True)
        )
    ]
    parts = [
        phase(
            f"search{k}",
            4,
            {f"{r}:{part}": 0.3 + 0.1 * i for i, r in enumerate(left) for part in ("task", "project")},
            a,
        )
        for k, left, a in ((1, routes, 0.71), (2, routes[:2], 0.83))
    ]
    notes = {"routes": told, "chosen": {"teacher": sides[0][0], "student": sides[0][1]}, "seen": LATIN}
    return weights(
        home, "student", "kpn", 0.9671, *parts, phase("joint", 8, {"task": 0.2, "project": 0.1}, 0.9671), notes=notes
    )


def samples(home: Path) -> File:
    rng = np.random.default_rng(0)
    names = [*MODELS, "teacher fp32 again"]
    medians = [m[4] for m in MODELS.values()] + [1.844]
    ns = np.concatenate([(m * 1e6 * (1 + 0.03 * rng.gamma(1.5, size=1050))).astype(np.int64) for m in medians])
    model, block = np.repeat(np.arange(len(names)), 1050), np.tile(np.arange(1050) // 35, len(names))
    np.savez_compressed(home / "samples.npz", names=np.array(names), model=model, ns=ns, block=block)
    return File.of(home / "samples.npz")


def measurement(home: Path, name: str, p99: bool = True) -> Measurement:
    role, method, precision, top1, ms, size = MODELS[name]
    ratio = 1.843 / ms
    contestant = Contestant(
        name, role, method, precision, file(home, f"{name.replace(' ', '-')}.onnx", size), 12_480_000, 2_784
    )
    readings = {"top1": top1, "agreement": 98.7, "p50_ms": ms, "p90_ms": 1.1 * ms} | (
        {"p99_ms": 1.3 * ms} if p99 else {}
    )
    if role == "teacher":
        return Measurement(contestant, readings, None, "the teacher")
    speedup = Interval(0.98 * ratio, ratio, 1.02 * ratio)
    return Measurement(
        contestant, readings, speedup, f"{ratio:.1f} times faster ({speedup.low:.1f}-{speedup.high:.1f})"
    )


@pytest.fixture
def record(tmp_path: Path) -> Record:
    home = tmp_path / "build"
    home.mkdir()
    cpu = BenchResult(
        target="cpu",
        not_measured="",
        machine=Machine("Fast & Cool CPU @ 2.40GHz", ("avx2", "avx512_vnni"), 2, 23.4, "Linux 6.1", "3.11.7"),
        runtime=Runtime("onnxruntime", "1.31.0", 1),
        protocol={
            "batch": 1,
            "blocks": 30,
            "calls_per_block": 35,
            "warmup_s": 2.0,
            "seed": 0,
            "conditions": {"load_1min": 0.3, "governor": None},
        },
        aa=Interval(0.9981, 1.0004, 1.0023),
        warnings=("load average 1.4 on 2 cores", f"drift of {EVIL}"),
        measurements=tuple(measurement(home, name) for name in MODELS),
        samples=samples(home),
        started="2026-11-20T10:11:12Z",
        seconds=61.2,
        ships="student int8",
    )
    board = BenchResult(
        "jetson", f"no board was named {EVIL}", None, None, {}, None, (), (), None, "2026-11-20T10:12:13Z", 0.0
    )
    spec = TensorSpec("image", (0, 1, 8, 8))
    return Record(
        name="digits",
        edgekd="0.1.0",
        created="2026-11-20T10:15:00Z",
        command="edgekd build digits --target cpu",
        config={"name": "digits", "distill": {"epochs": 20, "method": {"use": "kpn"}}, "note": EVIL},
        data=DataFacts("digits", ("zero", EVIL, TRICKY, LATIN), (1, 8, 8), 1077, 360, 360, 540, 128),
        teacher=weights(home, "teacher", "alone", 0.9812, phase("train", 10, {"task": 0.1}, 0.9812)),
        students=(
            taught_by_projection(home),
            weights(home, "student", "alone", 0.951, phase("train", 12, {"task": 0.3}, 0.951)),
            weights(home, "student", "kd", 0.959),
        ),
        models=tuple(
            OnnxModel(m.contestant.file, m.contestant.name, spec, 10, m.contestant.precision, 18, 9, 2_784, 12_480_000)
            for m in cpu.measurements
        ),
        benches=(cpu, board),
        versions={"torch": "2.13.0", "onnxruntime": "1.31.0"},
        step_seconds={"teacher": 40.0, "distill": 93.4, "benchmark": 61.2},
    )


def with_names(record: Record, name: str) -> Record:
    """Everything that a user names is called `name`."""
    cpu = record.benches[0]
    renamed = [dataclasses.replace(m.contestant, name=f"{name} {i}") for i, m in enumerate(cpu.measurements)]
    ms = [dataclasses.replace(m, contestant=c, verdict=name) for m, c in zip(cpu.measurements, renamed, strict=True)]
    machine = dataclasses.replace(cpu.machine, processor=name)
    cpu = dataclasses.replace(cpu, target=name, machine=machine, measurements=tuple(ms), protocol={name: name})
    students = tuple(dataclasses.replace(w, name=name, method=name) for w in record.students)
    return dataclasses.replace(
        record, name=name, command=name, benches=(cpu, record.benches[1]), students=students, versions={name: name}
    )


class Tags(HTMLParser):
    """Collects (tag, attribute, value) of all attributes; a tag without any has one empty attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.seen += [(tag, key, value or "") for key, value in attrs or [("", "")]]


def texts(out: Path) -> tuple[str, str, dict]:
    made = [(out / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md", "json")]
    return made[0], made[1], json.loads(made[2])


def test_writes_all_three_formats_and_leaves_nothing_half_done(record, tmp_path):
    page = report(record, tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    kept = f"samples-{record.benches[0].samples.sha256[:12]}.npz"
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json", "report.md", kept]


@pytest.mark.parametrize("name", ["digits", EVIL, TRICKY, LATIN])
def test_page_loads_nothing_and_runs_nothing(record, tmp_path, name):
    page = report(with_names(record, name), tmp_path / "out").read_text(encoding="utf-8")
    parser = Tags()
    parser.feed(page)
    assert not {tag for tag, _, _ in parser.seen} & {
        "script",
        "link",
        "img",
        "image",
        "iframe",
        "object",
        "embed",
        "base",
    }
    assert not [key for _, key, _ in parser.seen if key.startswith("on")]
    assert all(value.startswith("#") for _, key, value in parser.seen if key.endswith(("href", "src", "action")))
    styles = [value for _, key, value in parser.seen if key == "style"] + re.findall(
        r"<style>(.*?)</style>", page, re.DOTALL
    )
    assert not [style for style in styles if "@import" in style or re.search(r"url\((?!#)", style)]
    assert str(markupsafe.escape(name)) in page


def test_hostile_names_are_text_in_markdown_too(record, tmp_path):
    report(with_names(record, f"{EVIL} | @team"), tmp_path / "out")
    _, comment, _ = texts(tmp_path / "out")
    assert "<script" not in comment and "@team" not in comment
    rows = [line for line in comment.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(MODELS) and len({row.count("|") for row in rows}) == 1


def test_every_number_of_every_measurement_is_in_every_format(record, tmp_path):
    report(record, tmp_path / "out")
    page, comment, data = texts(tmp_path / "out")
    for m, told in zip(record.benches[0].measurements, data["benches"][0]["measurements"], strict=True):
        c, r = m.contestant, m.readings
        shown = [words.percent(r[k], 360).removesuffix(" %") for k in ("top1", "agreement")]
        shown += [words.figures(r[k]) for k in ("p50_ms", "p90_ms", "p99_ms")]
        shown += [words.file_size(c.file.bytes), words.count(c.macs), words.count(c.parameters)]
        shown += [words.interval(m.speedup)] if m.speedup else [m.verdict]
        (row,) = [line for line in comment.splitlines() if line.startswith(f"| {c.name} ")]
        section = page[page.index(f'<th scope="row">{c.name}') :].partition("</tr>")[0]
        for text in shown:
            assert text in row.replace("*", "") and text in section
        assert told == plain.dump(m)
        assert {"name": c.file.path.name, "sha256": c.file.sha256, "bytes": c.file.bytes} in [
            {k: f[k] for k in ("name", "sha256", "bytes")} for f in data["files"]
        ]


def test_first_screen_answers_which_file_how_accurate_how_fast_on_what(record, tmp_path):
    page = report(record, tmp_path / "out").read_text(encoding="utf-8")
    first = page[page.index('<section class="hero"') : page.index("</section>")].replace("&nbsp;", " ")
    for fact in (
        "student-int8.onnx", "3.70 kB", "96.1 % top-1", "−0.3 points to the FP32 student", "−1.1 points to the teacher",
        "98.7 %", "360 test images", "8.6 times faster (8.5-8.8)", "0.213 ms", "1.84 ms", "Fast &amp; Cool CPU",
        "onnxruntime 1.31.0", "1 thread",
    ):  # fmt: skip
        assert fact in first
    assert "kpn against alone: +1.7 points" in page and "conditions: load 1min" in page


def on_a_board_without_int8(record: Record) -> Record:
    """The student is the fastest in FP16, which the board builds from the FP32 file."""
    cpu = record.benches[0]
    kept = [m for m in cpu.measurements if m.contestant.precision == "fp32"]
    made = dataclasses.replace(kept[1].contestant, name="student fp16", precision="fp16")
    kept.insert(2, dataclasses.replace(kept[1], contestant=made, readings=kept[1].readings | {"p50_ms": 0.25}))
    nano = dataclasses.replace(cpu, target="jetson", measurements=tuple(kept), ships="student fp16")
    models = tuple(m for m in record.models if m.precision == "fp32")
    return dataclasses.replace(record, benches=(nano,), models=models)


def test_where_no_int8_ships_the_report_is_about_what_does(record, tmp_path):
    report(on_a_board_without_int8(record), tmp_path / "out")
    page, comment, _ = texts(tmp_path / "out")
    first = page[page.index('<section class="hero"') : page.index("</section>")]
    for text in (first, comment):
        assert "student-fp32.onnx" in text and "FP32, computed in FP16" in text and "0.250" in text
    assert "**Ship student-fp32.onnx**" in comment and "INT8" not in comment and "INT8" not in first
    assert "test top-1, FP16" in page and "half filled: FP16" in page and "filled: INT8" not in page
    row = page[page.index('<th scope="row">student fp16') :].partition("</tr>")[0]
    assert "ship this" in row


def test_where_no_student_is_fit_to_ship_none_is_said_to(record, tmp_path):
    none = dataclasses.replace(record.benches[0], ships="")
    report(dataclasses.replace(record, benches=(none,)), tmp_path / "out")
    page, comment, _ = texts(tmp_path / "out")
    assert "no student was found fit to ship" in page and "No student was found fit to ship" in comment
    assert "ship this" not in page.lower() and "**Ship" not in comment


def test_a_verdict_is_told_beside_the_ratio_only_where_it_says_more(record, tmp_path):
    cpu = record.benches[0]
    unsure = dataclasses.replace(cpu.measurements[1], verdict="no measurable difference")
    two = dataclasses.replace(cpu, measurements=(cpu.measurements[0], unsure, *cpu.measurements[2:]))
    report(dataclasses.replace(record, benches=(two,)), tmp_path / "out")
    rows = {line.split(" | ")[0]: line for line in texts(tmp_path / "out")[1].splitlines() if line.startswith("| ")}
    assert "3.60× (3.53–3.67): no measurable difference" in rows["| student fp32"]
    assert "8.64× (8.46–8.81)" in rows["| student int8"] and "faster" not in rows["| student int8"]


def test_what_was_not_measured_gives_the_reason_and_no_number(record, tmp_path):
    unmeasured = dataclasses.replace(record, benches=record.benches[1:])
    report(unmeasured, tmp_path / "out")
    page, comment, data = texts(tmp_path / "out")
    reason = "not measured: no board was named"
    assert reason in page and reason in comment and data["benches"][0]["not_measured"] == record.benches[1].not_measured
    assert "student-int8.onnx" in page and "faster (" not in page + comment and " ms" not in comment


def test_says_so_if_the_aa_control_moved(record, tmp_path):
    moved = dataclasses.replace(record.benches[0], aa=Interval(1.004, 1.0061, 1.008))
    page = report(dataclasses.replace(record, benches=(moved,)), tmp_path / "out").read_text(encoding="utf-8")
    assert "1.0061 (1.0040–1.0080)" in page and "it does not" in page


def test_leaves_out_what_no_metric_read(record, tmp_path):
    cpu = record.benches[0]
    bare = tuple(dataclasses.replace(m, readings={"p50_ms": m.readings["p50_ms"]}) for m in cpu.measurements)
    page = report(
        dataclasses.replace(record, benches=(dataclasses.replace(cpu, measurements=bare),)), tmp_path / "out"
    ).read_text(encoding="utf-8")
    assert "0.213" in page and "How accurate" in page and "top-1</div>" not in page and "kpn against" not in page


def test_renders_the_same_bytes_twice_and_again_from_json_when_the_files_are_gone(record, tmp_path):
    report(record, tmp_path / "one")
    report(record, tmp_path / "two")
    for model in record.models:
        model.file.path.unlink()
    record.benches[0].samples.path.unlink()
    again = read(tmp_path / "one" / "report.json")
    assert plain.dump(again)["models"] == plain.dump(record)["models"]
    report(again, tmp_path / "three")
    report(again, tmp_path / "one")
    for name in ("report.html", "report.md", "report.json"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in ("one", "two", "three")}) == 1


def test_says_so_if_raw_samples_are_gone_and_refuses_changed_ones(record, tmp_path):
    place = record.benches[0].samples.path
    place.write_bytes(b"other samples")
    with pytest.raises(StaleArtifact):
        report(record, tmp_path / "out")
    place.unlink()
    assert "raw latency samples are not here" in report(record, tmp_path / "other").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema": 99}', '{"schema": 1, "files": []}'])
def test_refuses_a_json_file_that_is_no_report(tmp_path, content):
    place = tmp_path / "report.json"
    if content is not None:
        place.write_text(content)
    with pytest.raises(ConfigError):
        read(place)


def test_works_without_torch(record, tmp_path):
    report(record, tmp_path / "out")
    program = (
        "import sys; sys.modules['torch'] = None\nfrom pathlib import Path\n"
        "from edgekd.stages.report.report import read, report\n"
        "report(read(Path(sys.argv[1]) / 'report.json'), Path(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, tmp_path / "out", tmp_path / "again"], check=True, env=environment)
    assert (tmp_path / "again" / "report.html").read_bytes() == (tmp_path / "out" / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (words.figures(0.21345), "0.213"), (words.figures(1234.5), "1,234"), (words.figures(0), "0"),
        (words.count(12_480_000), "12.5 M"), (words.count(640), "640"), (words.file_size(3_700), "3.70 kB"),
        (words.file_size(12), "12 B"), (words.file_size(None), "size unknown"), (words.points(-0.04, 360), "±0.0"),
        (words.points(1.25, 5000), "+1.25"), (words.duration(3725), "1 h 2 min"), (words.setting(True), "yes"),
        (words.label("warmup_s"), "warmup, s"), (words.label("calls_per_block"), "calls per block"),
    ],
)  # fmt: skip
def test_writes_numbers_with_three_figures_and_a_unit(shown, text):
    assert shown == text


def test_the_report_says_how_ranges_were_found(record, tmp_path):
    from edgekd.core.record import RangesFound

    tried = {"minmax": 80.5, "percentile": 81.25}
    told = dataclasses.replace(record, ranges=(RangesFound("<kpn>", "cpu", "percentile", tried),))
    html = report(told, tmp_path).read_text()
    assert "percentile, of minmax 80.50 %; percentile 81.25 % on validation images" in html
    assert "&lt;kpn&gt; on cpu" in html
    assert read(tmp_path / "report.json").ranges == told.ranges
