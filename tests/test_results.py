"""What a board sends back becomes a comparison: every engine, its energy, its board, and all that speaks against it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekd.core import serialization
from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchResult
from edgekd.errors import ConfigError, EdgekdError, StaleArtifact
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.device.bundle import SCHEMA, Bundle
from edgekd.stages.device.results import build_bench_result, load_result, read_result
from edgekd_runner.bundle import SCHEMA as RUNNER_SCHEMA
from tests.standins.bundles import CLASSES, engine, make_bundle
from tests.standins.edits import edit

HOW = BenchConfig(rounds=3, metrics=("top1", "agreement", "p50_ms"))
MS = {"teacher fp32": 4.0, "teacher fp16": 2.0, "student fp32": 2.0, "student fp16": 0.5, "student int8": 1.0}
POINT = {"power_mode": {"name": "25W", "id": 1}, "gpu_hz": {"gpu": 918_000_000}, "temperatures_c": {"tj": 51.5}}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    rows = [engine(n, n.split()[0], f"{n.split()[0]}.onnx", predicts_labels=True, precisions=kinds(n)) for n in MS]
    home = make_bundle(tmp_path / "bundle", "tensorrt", rows, jetpack="6.2", board="orin-nano", tensorrt="10.3.0")
    return Bundle(File.of(home / "manifest.json"))


def kinds(name: str) -> list[str]:
    return ["int8", "fp16"] if name.endswith("int8") else [name.split()[1]]


def brought(home: Path, bundle: Bundle, **changes: Any) -> Path:
    """A folder `results` as the runner of a Jetson writes it; the student in INT8 answers otherwise for two images."""
    home.mkdir()
    manifest, names = bundle.read(), [*MS, "teacher fp32 again"]
    labels = np.load(bundle.folder / "labels.npy")
    files = {f"logits-{i}.npy": np.eye(CLASSES, dtype=np.float32)[labels] for i in range(len(MS))}
    files["logits-4.npy"][:2] = np.roll(files["logits-4.npy"][:2], 1, axis=1)
    files["logits-1.npy"][0] = np.nan  # FP16 that overflows
    random = np.random.default_rng(0)
    calls = [random.normal(1e6 * MS[name.removesuffix(" again")], 1e3, (8, 10)).astype(np.int64) for name in names]
    for name, array in files.items():
        np.save(home / name, array)
    which = np.repeat(np.arange(len(names)), 80)
    rounds = np.tile(np.repeat(np.arange(8), 10), len(names))
    np.savez(home / "samples.npz", ns=np.concatenate(calls).ravel(), round=rounds, model=which, names=names)
    models = [
        {
            "name": name,
            "sha256": manifest["files"][f"models/{name.split()[0]}.onnx"]["sha256"],
            "compute_precision": "+".join(kinds(name.removesuffix(" again"))),
            "warmup": {"steady": True},
            "compute_ms": [0.1, 0.2, 0.3],
        }
        for name in names
    ]
    machine = {
        "processor": "ARMv8 Processor rev 1 (v8l)",
        "flags": [],
        "cores": 6,
        "memory_gib": 7.4,
        "system": "Linux",
    }
    machine |= {"python": "3.10.12", "affinity": None, "cpu_quota": None, "governor": "schedutil"}
    quiet = {"load_before": [0.1], "load_after": [0.1], "others_percent": 1.0, "steal_percent": 0.0, "throttled": None}
    bench = {
        "machine": machine,
        "conditions": quiet,
        "models": models,
        "processes": [{}],
        "locked": True,
        "invalid": [],
    }
    bench |= {"runtime": {"name": "tensorrt", "version": "10.3.0", "threads": 1, "sm": "8.7"}}
    bench |= {
        "protocol": manifest["protocol"] | {"rounds": 8, "calls_per_round": 10},
        "operating_points": [{"before": POINT}],
    }
    bench |= {"recommended": {"name": "student fp16", "reason": "the fastest of 2 that pass"}}
    verified = [
        {"name": name, "index": i, "passes": i != 1, "reason": "some are no numbers"} for i, name in enumerate(MS)
    ]
    power = [{"name": name, "mj": 10 * ms, "net_mj": 4 * ms} for name, ms in MS.items()]
    found = {
        "schema": SCHEMA,
        "bundle": bundle.manifest.sha256,
        "doctor": {
            "board": {"model": "NVIDIA Jetson Orin Nano"},
            "l4t": "36.4.3",
            "differences": [{"what": "1 GiB free"}],
        },
        "build": {"engines": [{"name": "other int8", "error": "memory ran out"}]},
        "verify": {"engines": verified},
        "bench": bench,
        "energy": {"sensor": {"kind": "INA3221", "rails": ["VDD_IN"]}, "engines": power, "invalid": []},
        "files": {p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in home.iterdir()},
    }
    (home / "result.json").write_text(json.dumps(found | changes))
    return home


def comparison(tmp_path: Path, bundle: Bundle, **changes: Any) -> BenchResult:
    (tmp_path / "out").mkdir()
    returned = load_result(brought(tmp_path / "results", bundle, **changes), bundle)
    return build_bench_result(tmp_path / "out", bundle, returned, HOW)


def test_every_engine_is_a_row_with_the_precision_that_it_ran_in(bundle, tmp_path):
    result = comparison(tmp_path, bundle)
    rows = {m.model.name: m for m in result.measurements}
    assert list(rows) == list(MS)
    assert {n: m.model.precision for n, m in rows.items()} == {n: n.split()[1] for n in MS}
    assert (rows["student fp16"].compute_precision, rows["student int8"].compute_precision) == ("fp16", "fp16")
    for name, ms in MS.items():
        assert rows[name].metrics["p50_ms"] == pytest.approx(ms, rel=1e-2)
        if name != "teacher fp32":
            assert rows[name].speedup.estimate == pytest.approx(4.0 / ms, rel=1e-2)
    assert "8.0 times faster" in rows["student fp16"].verdict
    assert result.aa_ratio.low < 1 < result.aa_ratio.high


def test_accuracy_and_agreement_come_from_the_answers_of_the_device(bundle, tmp_path):
    rows = {m.model.name: m.metrics for m in comparison(tmp_path, bundle).measurements}
    assert rows["student fp32"]["top1"] == 100 and "agreement" not in rows["student fp32"]
    assert rows["student fp16"]["agreement"] == 100
    assert rows["student int8"]["top1"] == rows["student int8"]["agreement"] == pytest.approx(100 * 10 / 12)
    assert "top1" not in rows["teacher fp16"]  # its answers are no numbers


def test_the_board_its_power_mode_and_its_energy_are_told(bundle, tmp_path):
    result = comparison(tmp_path, bundle)
    assert result.machine.processor == "NVIDIA Jetson Orin Nano" and result.target == "jetson"
    assert result.measurements[3].metrics["energy_mj"] == 5.0
    assert result.measurements[3].metrics["net_energy_mj"] == 2.0
    assert result.protocol["power_mode"] == {"name": "25W", "id": 1} and result.protocol["l4t"] == "36.4.3"
    assert result.protocol["locked_clocks"] and result.protocol["kernels_alone_ms"]["student fp16"] == 0.2
    assert serialization.from_json(BenchResult, serialization.to_json(result), tmp_path / "out") == result


def test_a_workstation_is_told_with_its_gpu(bundle, tmp_path):
    seen = {"board": {"model": None}, "device": {"gpu": "NVIDIA RTX 4090"}, "differences": []}
    assert comparison(tmp_path, bundle, doctor=seen).machine.processor.startswith("NVIDIA RTX 4090; ARMv8 Processor")


def test_what_speaks_against_the_numbers_is_a_warning(bundle, tmp_path):
    said = "\n".join(comparison(tmp_path, bundle).warnings)
    for words in (
        "1 GiB free",
        "other int8 was not built on the device: memory ran out",
        "teacher fp16 does not answer as on the host: some are no numbers",
        "the fastest is student fp16, not INT8",
    ):
        assert words in said


def test_energy_that_is_not_valid_is_left_out_with_its_reason(bundle, tmp_path):
    result = comparison(tmp_path, bundle, energy={"engines": [], "invalid": ["student int8: a brake"]})
    assert "energy_mj" not in result.measurements[0].metrics
    assert "energy is left out: student int8: a brake" in result.warnings


@pytest.mark.parametrize(("file", "content"), [("samples.npz", {"ns": [1]}), ("logits-0.npy", [[1.0]])])
def test_arrays_that_do_not_fit_the_result_are_refused(file, content, bundle, tmp_path):
    home = brought(tmp_path / "results", bundle)
    np.savez(home / file, **content) if file.endswith("z") else np.save(home / file, content)
    found = json.loads((home / "result.json").read_text())
    found["files"][file]["sha256"] = hashlib.sha256((home / file).read_bytes()).hexdigest()
    (home / "result.json").write_text(json.dumps(found))
    (tmp_path / "out").mkdir()
    with pytest.raises(EdgekdError, match="holds no arrays|outputs of engine 0"):
        build_bench_result(tmp_path / "out", bundle, load_result(home, bundle), HOW)


def test_a_file_of_a_result_stays_in_its_folder(bundle, tmp_path):
    home = brought(tmp_path / "results", bundle)
    found = json.loads((home / "result.json").read_text())
    found["files"]["../bundle/labels.npy"] = {"sha256": "0" * 64, "bytes": 1}
    (home / "result.json").write_text(json.dumps(found))
    with pytest.raises(EdgekdError, match="is not in"):
        load_result(home, bundle)


def rewritten(home: Path, path: tuple[Any, ...], value: Any) -> Path:
    """The result.json with another value somewhere, or without it for `...`."""
    edit(home / "result.json", path, value)
    return home


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("schema",), SCHEMA + 1, f"has schema {SCHEMA + 1}; this edgekd reads schema {SCHEMA}"),
        (("bundle",), ["0"], 'bundle is ["0"]: Input should be a valid string'),
        (("files",), ["samples.npz"], 'files is ["samples.npz"]: Input should be an object'),
        (("files", "samples.npz"), "abc", 'files.samples.npz is "abc"'),
        (("files", "samples.npz", "sha256"), ..., "files.samples.npz.sha256 is missing"),
        (("verify", "engines"), {}, "verify.engines is {}"),
        (("verify", "engines", 0, "passes"), "yes", 'verify.engines.0.passes is "yes"'),
        (("bench",), [], "bench is []"),
        (("bench", "invalid"), ..., "bench.invalid is missing"),
        (("bench", "models"), [], "bench.models is []: List should have at least 2 items"),
        (("bench", "models", 0, "compute_ms"), [-1.0], "compute_ms.0 is -1.0: Input should be greater than"),
        (("bench", "models", 0, "compute_ms"), [float("nan")], "NaN is no number"),
        (("bench", "protocol", "rounds"), 0, "bench.protocol.rounds is 0"),
        (("bench", "protocol", "rounds"), "8", 'bench.protocol.rounds is "8"'),
        (("bench", "runtime", "name"), "mine", 'bench.runtime.name is "mine"'),
        (("bench", "runtime", "threads"), [1], "bench.runtime.threads is [1]"),
        (("bench", "machine", "cores"), -6, "bench.machine.cores is -6"),
        (("bench", "machine", "flags"), None, "bench.machine.flags is null"),
        (("bench", "conditions", "load_before"), "idle", 'bench.conditions.load_before is "idle"'),
        (("bench", "operating_points"), [1], "bench.operating_points.0 is 1"),
        (("energy", "engines", 0, "mj"), float("inf"), "Infinity is no number"),
        (("energy", "engines", 0, "mj"), "5", 'energy.engines.0.mj is "5"'),
        (("doctor", "board"), "Orin", 'doctor.board is "Orin"'),
    ],
)
def test_a_result_that_a_hand_has_changed_is_refused_with_the_place(path, value, says, bundle, tmp_path):
    home = rewritten(brought(tmp_path / "results", bundle), path, value)
    with pytest.raises(ConfigError) as error:
        load_result(home, bundle)
    assert says in error.value.what and error.value.hint and len(error.value.what) < 500


def test_a_bundle_and_a_result_of_an_older_edgekd_are_refused_with_their_schema_and_the_remedy(bundle, tmp_path):
    home = rewritten(brought(tmp_path / "results", bundle), ("schema",), 1)
    with pytest.raises(ConfigError, match="schema 1; this edgekd reads schema 2") as error:
        load_result(home, bundle)
    assert "build the bundle again" in error.value.hint
    manifest = json.loads(bundle.manifest.path.read_text()) | {"schema": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="schema 1; this edgekd reads schema 2") as error:
        Bundle(File.of(tmp_path / "manifest.json")).read()
    assert "build the bundle again" in error.value.hint
    assert SCHEMA == RUNNER_SCHEMA


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"bundle": 1, "bench": 1, "verify": 1}'])
def test_what_is_no_result_is_refused(content, tmp_path):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_result(tmp_path / "result.json")
    assert error.value.hint


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["teacher fp32", "teacher fp32"], "one of them is there twice"),
        (["teacher fp32", "student fp32"], "one of them is there twice"),
        (["teacher fp32 again", "teacher fp32"], "`teacher fp32 again` of the result is no engine"),
        (["../evil", "teacher fp32 again"], "`../evil` of the result is no engine"),
    ],
)
def test_models_that_are_not_those_of_the_bundle_with_one_control_are_refused(names, says, bundle, tmp_path):
    home = brought(tmp_path / "results", bundle)
    models = {m["name"]: m for m in json.loads((home / "result.json").read_text())["bench"]["models"]}
    chosen = [models.get(name, models["teacher fp32"]) | {"name": name} for name in names]
    with pytest.raises(StaleArtifact, match=says):
        load_result(rewritten(home, ("bench", "models"), chosen), bundle)


def sealed_again(home: Path) -> Path:
    """With the hashes of the arrays as they are now."""
    found = json.loads((home / "result.json").read_text())
    for name in found["files"]:
        found["files"][name]["sha256"] = hashlib.sha256((home / name).read_bytes()).hexdigest()
    (home / "result.json").write_text(json.dumps(found))
    return home


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ns", lambda ns: -ns),
        ("ns", lambda ns: ns * 0),
        ("ns", lambda ns: ns.astype(float)),
        ("ns", lambda ns: ns[:-1]),
        ("ns", lambda ns: ns.reshape(2, -1)),
        ("ns", lambda ns: ns.astype(object)),
        ("model", lambda model: model - 1),
        ("model", lambda model: model + 2**40),
        ("model", lambda model: model.astype(float)),
        ("model", lambda model: model * 0),
        ("names", lambda names: names[:-1]),
        ("names", lambda names: np.arange(len(names))),
        ("names", lambda names: names.astype(object)),
    ],
)
def test_samples_of_another_kind_are_refused(name, change, bundle, tmp_path):
    home = brought(tmp_path / "results", bundle)
    with np.load(home / "samples.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    np.savez(home / "samples.npz", **arrays | {name: change(arrays[name])})
    (tmp_path / "out").mkdir()
    with pytest.raises(EdgekdError, match="does not fit|whole rounds|Object arrays") as error:
        build_bench_result(tmp_path / "out", bundle, load_result(sealed_again(home), bundle), HOW)
    assert error.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits[:-1],
        lambda logits: logits[0, 0],
        lambda logits: logits.astype(object),
        lambda logits: logits.astype(str),
        lambda logits: logits.astype(complex),
    ],
)
def test_answers_of_another_kind_are_refused(change, bundle, tmp_path):
    home = brought(tmp_path / "results", bundle)
    np.save(home / "logits-0.npy", change(np.load(home / "logits-0.npy")))
    (tmp_path / "out").mkdir()
    with pytest.raises(EdgekdError, match="outputs of engine 0|Object arrays"):
        build_bench_result(tmp_path / "out", bundle, load_result(sealed_again(home), bundle), HOW)


def test_answers_of_another_shape_are_no_answers(bundle, tmp_path):
    home = brought(tmp_path / "results", bundle)
    np.save(home / "logits-3.npy", np.load(home / "logits-3.npy")[:, :2])
    (tmp_path / "out").mkdir()
    result = build_bench_result(tmp_path / "out", bundle, load_result(sealed_again(home), bundle), HOW)
    assert "top1" not in result.measurements[3].metrics and "top1" in result.measurements[2].metrics


def test_an_array_behind_a_link_is_not_taken(bundle, tmp_path):
    home = brought(tmp_path / "results", bundle)
    (home / "samples.npz").rename(tmp_path / "elsewhere.npz")
    (home / "samples.npz").symlink_to(tmp_path / "elsewhere.npz")
    with pytest.raises(StaleArtifact, match="is not in"):
        load_result(home, bundle)


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just([]) | st.just({})


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inside for found in ((*path, key), *places(part, (*path, key)))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_changed_in_a_result_it_is_refused_in_words_or_told(data, bundle, tmp_path):
    for folder in ("results", "out"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    home = brought(tmp_path / "results", bundle)
    path = data.draw(st.sampled_from(places(json.loads((home / "result.json").read_text()))))
    rewritten(home, path, data.draw(JSON | st.just(...)))
    (tmp_path / "out").mkdir()
    try:
        result = build_bench_result(tmp_path / "out", bundle, load_result(home, bundle), HOW)
    except EdgekdError as error:
        assert error.hint
        return
    assert serialization.from_json(BenchResult, serialization.to_json(result), tmp_path / "out") == result
