"""The report says what was measured, in three formats, whatever the names in it look like."""

import dataclasses
import html
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
from hypothesis import given
from hypothesis import strategies as st

from edgekd.core import formatting, serialization
from edgekd.core.artifact import EpochRecord, File, OnnxModel, PhaseRecord, TensorSpec, Weights
from edgekd.core.bench_result import BenchmarkEntry, BenchResult, Interval, Machine, Measurement, Runtime
from edgekd.core.build_record import BuildRecord, DataFacts
from edgekd.core.gate import Decision, Gate
from edgekd.errors import ConfigError, StaleArtifact
from edgekd.stages.report import plots, provenance, tables
from edgekd.stages.report.report import read, report

EVIL = "<script>alert(1)</script>"
TRICKY = 'a|b `c` *d* [e](http://f) @g $h_1$ "i"'
MODELS = {  # name: role, method, precision, top-1, median ms, bytes
    "teacher fp32": ("teacher", "supervised", "fp32", 97.2, 1.843, 44_800),
    "student fp32": ("student", "kpn", "fp32", 96.4, 0.512, 11_300),
    "student int8": ("student", "kpn", "int8", 96.1, 0.2134, 3_700),
    "supervised fp32": ("baseline", "supervised", "fp32", 94.7, 0.5131, 11_300),
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
    contestant = BenchmarkEntry(
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
def record(tmp_path: Path) -> BuildRecord:
    home = tmp_path / "build"
    home.mkdir()
    cpu = BenchResult(
        target="cpu",
        not_measured="",
        machine=Machine("Fast & Cool CPU @ 2.40GHz", ("avx2", "avx512_vnni"), 2, 23.4, "Linux 6.1", "3.11.7"),
        runtime=Runtime("onnxruntime", "1.31.0", 1),
        protocol={
            "batch": 1,
            "rounds": 30,
            "calls_per_block": 35,
            "warmup_s": 2.0,
            "seed": 0,
            "conditions": {"load_1min": 0.3, "governor": None},
        },
        aa_ratio=Interval(0.9981, 1.0004, 1.0023),
        warnings=("load average 1.4 on 2 cores", f"drift of {EVIL}"),
        measurements=tuple(measurement(home, name) for name in MODELS),
        samples=samples(home),
        started="2026-11-20T10:11:12Z",
        seconds=61.2,
        selected="student int8",
    )
    board = BenchResult(
        "jetson", f"no board was named {EVIL}", None, None, {}, None, (), (), None, "2026-11-20T10:12:13Z", 0.0
    )
    spec = TensorSpec("image", (0, 1, 8, 8))
    return BuildRecord(
        name="digits",
        edgekd="0.1.0",
        created="2026-11-20T10:15:00Z",
        command="edgekd build digits --target cpu",
        config={"name": "digits", "distill": {"epochs": 20, "method": {"use": "kpn"}}, "note": EVIL},
        data=DataFacts("digits", ("zero", EVIL, TRICKY, LATIN), (1, 8, 8), 1077, 360, 360, 540, 128),
        teacher=weights(home, "teacher", "supervised", 0.9812, phase("train", 10, {"task": 0.1}, 0.9812)),
        students=(
            taught_by_projection(home),
            weights(home, "student", "supervised", 0.951, phase("train", 12, {"task": 0.3}, 0.951)),
            weights(home, "student", "kd", 0.959),
        ),
        models=tuple(
            OnnxModel(
                m.model.file,
                m.model.name,
                spec,
                (TensorSpec("logits", (1, 10)),),
                m.model.precision,
                18,
                9,
                2_784,
                12_480_000,
            )
            for m in cpu.measurements
        ),
        benches=(cpu, board),
        versions={"torch": "2.13.0", "onnxruntime": "1.31.0"},
        step_seconds={"teacher": 40.0, "distill": 93.4, "benchmark": 61.2},
    )


def with_names(record: BuildRecord, name: str) -> BuildRecord:
    """Everything that a user names is called `name`."""
    cpu = record.benches[0]
    renamed = [dataclasses.replace(m.model, name=f"{name} {i}") for i, m in enumerate(cpu.measurements)]
    ms = [dataclasses.replace(m, model=c, verdict=name) for m, c in zip(cpu.measurements, renamed, strict=True)]
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
    assert ("meta", "http-equiv", "Content-Security-Policy") in parser.seen and "default-src 'none'" in page


def test_the_routes_that_were_tried_are_in_markdown_too(record, tmp_path):
    student, *others = record.students
    routes = student.notes["routes"]
    won = [{**route, "won": route["dropped"] is None} for route in routes]
    for told, first in ((won, "**chosen**"), (routes, "–")):  # an older report does not say which won
        student = dataclasses.replace(student, notes={"routes": told})
        report(dataclasses.replace(record, students=(student, *others)), tmp_path / "out")
        _, comment, _ = texts(tmp_path / "out")
        assert "### Routes that were tried: student, taught by kpn" in comment
        lines = [line for line in comment.splitlines() if " of the teacher, " in line]
        assert lines[0] == f"- stage2.4 of the teacher, stage2.1 of the student: {first}; joint loss 0.912, 0.844"
        assert lines[2].endswith("dropped after period 1; joint loss 1.23") and len(lines) == 3


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
        c, r = m.model, m.metrics
        shown = [formatting.percent(r[k], 360).removesuffix(" %") for k in ("top1", "agreement")]
        shown += [formatting.figures(r[k]) for k in ("p50_ms", "p90_ms", "p99_ms")]
        shown += [formatting.file_size(c.file.bytes), formatting.count(c.macs), formatting.count(c.parameters)]
        shown += [formatting.interval(m.speedup)] if m.speedup else [m.verdict]
        (row,) = [line for line in comment.splitlines() if line.startswith(f"| {c.name} ")]
        rows = [part.partition("</tr>")[0] for part in page.split(f'<th scope="row">{c.name}')[1:]]
        assert all(text in row.replace("*", "") for text in shown)
        shown[-1:] = [formatting.ratio(m.speedup.estimate)] if m.speedup else []
        assert all(any(text in part for part in rows) for text in shown)
        assert told == serialization.to_json(m)
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
    assert "kpn against supervised: +1.7 points" in page and "conditions: load 1min" in page


def on_a_board_without_int8(record: BuildRecord) -> BuildRecord:
    """The student is the fastest in FP16, which the board builds from the FP32 file."""
    cpu = record.benches[0]
    kept = [m for m in cpu.measurements if m.model.precision == "fp32"]
    made = dataclasses.replace(kept[1].model, name="student fp16", precision="fp16")
    kept.insert(2, dataclasses.replace(kept[1], model=made, metrics=kept[1].metrics | {"p50_ms": 0.25}))
    nano = dataclasses.replace(cpu, target="jetson", measurements=tuple(kept), selected="student fp16")
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
    none = dataclasses.replace(record.benches[0], selected="")
    report(dataclasses.replace(record, benches=(none,)), tmp_path / "out")
    page, comment, _ = texts(tmp_path / "out")
    assert "no student is fit to be deployed" in page and "No student is fit to be deployed" in comment
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
    moved = dataclasses.replace(record.benches[0], aa_ratio=Interval(1.004, 1.0061, 1.008))
    page = report(dataclasses.replace(record, benches=(moved,)), tmp_path / "out").read_text(encoding="utf-8")
    assert "1.0061 (1.0040–1.0080)" in page and "does not hold 1" in page


def test_leaves_out_what_no_metric_read(record, tmp_path):
    cpu = record.benches[0]
    bare = tuple(dataclasses.replace(m, metrics={"p50_ms": m.metrics["p50_ms"]}) for m in cpu.measurements)
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
    assert serialization.to_json(again)["models"] == serialization.to_json(record)["models"]
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
        (formatting.figures(0.21345), "0.213"),
        (formatting.figures(1234.5), "1,234"),
        (formatting.figures(0), "0"),
        (formatting.count(12_480_000), "12.5 M"),
        (formatting.count(640), "640"),
        (formatting.file_size(3_700), "3.70 kB"),
        (formatting.file_size(12), "12 B"),
        (formatting.file_size(None), "size unknown"),
        (formatting.points(-0.04, 360), "±0.0"),
        (formatting.points(1.25, 5000), "+1.25"),
        (formatting.duration(3725), "1 h 2 min"),
        (formatting.setting(True), "yes"),
        (formatting.label("warmup_s"), "warmup, s"),
        (formatting.label("calls_per_block"), "calls per block"),
    ],
)
def test_writes_numbers_with_three_figures_and_a_unit(shown, text):
    assert shown == text


def test_the_report_says_how_ranges_were_found(record, tmp_path):
    from edgekd.core.build_record import SelectedRanges

    tried = {"minmax": 80.5, "percentile": 81.25}
    told = dataclasses.replace(record, ranges=(SelectedRanges("<kpn>", "cpu", "percentile", tried),))
    page = report(told, tmp_path).read_text(encoding="utf-8")
    assert "percentile, of minmax 80.50 %; percentile 81.25 % on validation images" in page
    assert "&lt;kpn&gt; on cpu" in page
    assert read(tmp_path / "report.json").ranges == told.ranges


def opened(page: str) -> str:
    """A page without what it folds away."""
    return re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)


def test_first_table_has_what_most_readers_want_and_a_folded_one_the_rest(record, tmp_path):
    cpu = record.benches[0]
    sure = {"p50_ms": Interval(0.2111, 0.2134, 0.2166)}
    ms = [dataclasses.replace(m, metrics=m.metrics | {"min_ms": 0.123}, intervals=sure) for m in cpu.measurements]
    page = report(
        dataclasses.replace(record, benches=(dataclasses.replace(cpu, measurements=tuple(ms)),)), tmp_path / "out"
    ).read_text(encoding="utf-8")
    heads = [h.strip() for h in re.findall(r'<th scope="col"[^>]*>([^<]+)', opened(page))]
    assert heads[:9] == ["model", "top-1", "median", "speed-up", "p99", "agreement", "file", "MACs", "precision"]
    assert "0.211–0.217" in opened(page)  # the interval of the median
    for rest in ("p90", "min", "taught by", "parameters"):
        assert f">{rest}" in page.partition("All figures")[2].partition("</details>")[0]


def test_decimal_points_of_a_column_stand_below_each_other():
    cells = tuple(map(tables.Cell, ("0.0363", "0.420", "12", "–", "1,234.5")))
    column = tables.aligned(tables.Column("p50_ms", "median", "ms", cells))
    assert [cell.fill for cell in column.cells] == ["", "3", ".0363", "", "363"]
    mixed = tables.Column("size", "file", "", (tables.Cell("4.34 MB"), tables.Cell("99 kB")))
    assert tables.aligned(mixed) == mixed


def test_gates_are_told_on_the_first_screen(record, tmp_path):
    found = Interval(0.1, 0.3, 0.5)
    outcomes = ("passed", "failed", "undecided", "passed")
    decisions = [
        Decision("cpu", Gate("accuracy_drop", max=0.5 + i), "student int8", o, found, EVIL)
        for i, o in enumerate(outcomes)
    ]
    told = dataclasses.replace(record, gates=tuple(decisions))
    page = report(told, tmp_path / "out").read_text(encoding="utf-8")
    first = page[page.index('class="state"') : page.index("<nav")]
    assert re.findall(r">(. \d gates? \w+)<", first) == ["✗ 1 gate failed", "? 1 gate undecided", "✓ 2 gates passed"]
    assert all(f"accuracy_drop at most {d.gate.max:g}</th>" in page for d in decisions)


def test_every_target_is_on_the_first_screen(record, tmp_path):
    cpu, board = record.benches
    slow = tuple(dataclasses.replace(m, metrics=m.metrics | {"p50_ms": 7.125}) for m in cpu.measurements)
    other = dataclasses.replace(cpu, target="openvino", measurements=slow)
    told = dataclasses.replace(record, benches=(cpu, other, board))
    page = report(told, tmp_path / "out").read_text(encoding="utf-8")
    first = page[page.index("Every target") : page.index("<nav")]
    rows = first.split('<th scope="row">')[1:]
    assert [row.partition("<")[0] for row in rows] == ["cpu", "openvino", "jetson"]
    assert "0.213" in rows[0] and "7.12" in rows[1] and "not measured: no board was named" in rows[2]


def test_other_ways_of_calling_stand_apart_with_what_a_call_holds(record, tmp_path):
    cpu = record.benches[0]
    held = {"scope": "inputs and outputs are bound", "overhead_of_the_loop_ns": 350}
    other = dataclasses.replace(cpu, scenario="inference only", selected="", protocol=cpu.protocol | held)
    page = report(dataclasses.replace(record, benches=(cpu, other)), tmp_path / "out").read_text(encoding="utf-8")
    part = page[page.index('<h2 id="ways"') : page.index('<h2 id="adds"')]
    assert "<h3>cpu, inference only</h3>" in part and "A call: inputs and outputs are bound" in part
    assert "The timing loop itself adds 350 ns to a call" in page
    assert page.count("avx512_vnni") == 1  # one machine, told once


def test_says_how_to_find_a_file_that_was_changed(record, tmp_path):
    page = report(record, tmp_path / "out").read_text(encoding="utf-8")
    assert provenance.build_hash(provenance.provenance(record)) in page and "edgekd verify DIR" in page


def test_all_plots_and_tables_have_names_for_those_who_do_not_see_them(record, tmp_path):
    page = report(record, tmp_path / "out").read_text(encoding="utf-8")
    parser = Tags()
    parser.feed(page)
    named = [tag for tag, key, value in parser.seen if key == "aria-label" and value]
    assert named.count("svg") == page.count("<svg") == 4  # accuracy against latency, every call, two lessons
    assert page.count('class="scroll"') == page.count('class="scroll" role="group" aria-label="')
    assert page.count("<table") == page.count('class="scroll"') and page.count('tabindex="0"') == page.count("<table")
    assert {"main", "nav", "header"} <= {tag for tag, _, _ in parser.seen}
    links = {value[1:] for tag, key, value in parser.seen if (tag, key) == ("a", "href")}
    assert links <= {value for _, key, value in parser.seen if key == "id"}


def luminance(colour: str) -> float:
    """Of WCAG 2: 0 to 1."""
    digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_stands_out_in_light_and_dark_and_in_print(record, tmp_path):
    page = report(record, tmp_path / "out").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--(\w+): #(\w+);", part)) for part in re.findall(r":root \{(.*?)\}", page, re.DOTALL)]
    assert len(schemes) == 3
    for colours in schemes:
        pairs = [(ink, paper) for ink in ("ink", "mute", "c1", "warn", "bad") for paper in ("paper", "card", "tint")]
        for ink, paper in pairs + [(f"c{i}", "paper") for i in range(1, 6)]:
            dark, light = sorted((luminance(colours[ink]), luminance(colours[paper])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1))
def test_the_front_holds_all_that_no_other_beats(dots):
    beaten = {a for a in dots for b in dots if b[0] <= a[0] and b[1] >= a[1] and b != a}
    assert plots.front(dots) == sorted(set(dots) - beaten)


def test_calls_are_drawn_with_the_control_below_its_twin():
    ms = [np.array([1.0, 1.1, 1.2, 9.0]), np.array([0.5]), np.array([1.0, 1.2, 1.3])]
    svg = plots.latency_distributions("calls", ["teacher", EVIL, "teacher again"], ms)
    told = [html.unescape(text) for text in re.findall(r">([^<>]+ ms)</text>", svg)]
    assert told == ["teacher: 1.10 ms", "teacher again (A/A control): 1.20 ms", f"{EVIL}: 0.500 ms"]


def test_names_without_room_have_letters_in_the_plot(record):
    cpu = record.benches[0]
    assert (
        "<text" in (few := plots.accuracy_against_latency("t", cpu.measurements, "top1", "top-1")) and ">A<" not in few
    )
    long = [dataclasses.replace(m.model, name=f"{'long-' * 20}{i}") for i, m in enumerate(cpu.measurements)]
    renamed = [dataclasses.replace(m, model=c) for m, c in zip(cpu.measurements, long, strict=True)]
    drawn = plots.accuracy_against_latency("t", renamed, "top1", "top-1")
    assert [drawn.count(f">{letter}<") for letter in "ABCDEF"] == [2, 2, 2, 2, 2, 0]  # at the dot, and below
    assert all(f"-long-{i}<" in drawn for i in range(5))  # both ends of a name are told


def test_what_cannot_be_seen_is_spelled_out(record, tmp_path):
    page = report(with_names(record, "a\u202eb\x1bc"), tmp_path / "out").read_text(encoding="utf-8")
    assert "a\\u202eb\\x1bc" in page and not {"\u202e", "\x1b"} & set(page)


def test_losses_of_all_sizes_are_drawn_on_one_scale(record):
    drawn = plots.training_curve("t", taught := record.students[0])
    assert "training loss (log)" in drawn and all(f">{r}<" in html.unescape(drawn) for r in grouped_names(taught))
    nothing = dataclasses.replace(taught, phases=(phase("train", 2, {"task": 0.0}, 0.5),))
    assert ">training loss<" in plots.training_curve("t", nothing)


def grouped_names(weights: Weights) -> set[str]:
    return {name.rpartition(":")[0] for p in weights.phases for name in p.losses if ":" in name}


def test_what_is_no_number_is_told_as_such():
    assert [formatting.figures(v) for v in (float("nan"), float("inf"))] == ["nan", "inf"]
