"""Results of a bundle that ran on a device: checked against the bundle, and turned into a benchmark result."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core import serialization
from edgekd.core.artifact import File, Precision
from edgekd.core.bench_result import BenchmarkEntry, BenchResult, Machine, Runtime
from edgekd.core.task import Task
from edgekd.errors import ConfigError, EdgekdError, StaleArtifact
from edgekd.stages.bench import statistics
from edgekd.stages.bench.benchmark import RUNTIME, environment, read_back
from edgekd.stages.bench.config import BenchConfig, Scenario
from edgekd.stages.bench.measurements import Baseline, Observed, collect_samples, measure_entries
from edgekd.stages.bench.runner import machine, nanoseconds
from edgekd.stages.device import schemas
from edgekd.stages.device.bundle import SCHEMA, Bundle
from edgekd.utils.arrays import load_array, load_arrays

RESULT, SAMPLES = "result.json", "samples.npz"
HINT_RUN_AGAIN = "run `sh run.sh` in the bundle on the device again, and copy back the whole folder `results`"
HINT_OTHER_SCHEMA = "build the bundle again with this edgekd, run it on the device, and import its result"
AGAIN = " again"  # ends the name of the A/A control


@dataclass(frozen=True)
class DeviceResult:
    """What a device measured of a bundle: the files that the runner's `collect` lists."""

    result: File
    arrays: tuple[File, ...]  # samples.npz, and logits-I.npy of engine I

    def array(self, name: str) -> Path | None:
        """Return the path of an array; None if the device did not write it."""
        return next((file.path for file in self.arrays if file.path.name == name), None)

    def read(self) -> dict[str, Any]:
        """Return the content of result.json. Raises ConfigError if it is invalid."""
        return read_result(self.result.path)


def is_result_file(name: str) -> bool:
    """Return whether a result may have a file of this name."""
    return name in (RESULT, SAMPLES) or re.fullmatch(r"logits-\d+\.npy", name) is not None


def read_result(path: Path) -> dict[str, Any]:
    """Return the content of a result.json. Raises ConfigError if it is invalid, or has the schema of another edgekd."""
    hint = "name the result.json that `sh run.sh` wrote in a bundle's folder `results`"
    result = serialization.read_json(path, hint)
    if not isinstance(result, dict) or not {"bundle", "bench", "verify", "files"} <= result.keys():
        raise ConfigError(f"`{path}` is no result of a bundle", hint=hint)
    if result.get("schema") != SCHEMA:
        number = str(result.get("schema"))[:20]
        raise ConfigError(f"`{path}` has schema {number}; this edgekd reads schema {SCHEMA}", hint=HINT_OTHER_SCHEMA)
    check_schema(schemas.Result, result, path)
    return result


def check_schema(schema: Any, content: Any, path: Path) -> None:
    """Raise ConfigError if what edgekd reads of a JSON file is missing, or of another type."""
    try:
        serialization.from_json(schema, content, hint=HINT_RUN_AGAIN)
    except ConfigError as error:
        raise ConfigError(f"`{path}` is not as the runner writes it: {error.what}", hint=error.hint) from None


def load_result(folder: Path, bundle: Bundle) -> DeviceResult:
    """Return the results in `folder`, if they are complete, of this bundle, and valid.

    Raises:
        StaleArtifact: if they changed since the device wrote them, or are of other files.
        EdgekdError: if nothing was measured, or under conditions that make it invalid.
    """
    path = folder / RESULT
    result = read_result(path)
    if result["bundle"] != bundle.manifest.sha256:
        raise StaleArtifact(
            f"`{path}` is a result of the bundle {str(result['bundle'])[:12]}, this is {bundle.manifest.sha256[:12]}",
            hint="results count for the files that were measured only: copy this bundle to the device and run it",
        )
    files = []
    for name, record in result["files"].items():
        array = folder / name
        if not is_result_file(name) or not array.is_file() or array.is_symlink():
            hint = f"it is incomplete: {HINT_RUN_AGAIN}"
            raise StaleArtifact(f"`{name}` of the result is not in `{folder}`", hint=hint)
        file = File.of(array)
        if file.sha256 != record["sha256"]:
            hint = f"it was changed, or cut off: {HINT_RUN_AGAIN}"
            raise StaleArtifact(f"`{array}` is not as the device wrote it", hint=hint)
        files.append(file)
    for part in ("verify", "bench"):
        if not result[part]:
            raise EdgekdError(f"`{path}` has no `{part}`: the run on the device was cut off", hint=HINT_RUN_AGAIN)
    if result["bench"]["invalid"]:
        raise EdgekdError(
            f"the measurement on the device is not valid: {'; '.join(result['bench']['invalid'])}",
            hint=f"let the device cool down, check its power supply and its power mode; then {HINT_RUN_AGAIN}",
        )
    check_same_models(result, bundle)
    return DeviceResult(File.of(path), tuple(files))


def check_same_models(result: dict[str, Any], bundle: Bundle) -> None:
    """Raise StaleArtifact unless the files that were timed are those of the bundle."""
    manifest = bundle.read()
    engines = {engine["name"]: engine for engine in manifest["engines"]}
    models = result["bench"]["models"]
    for model in models:
        engine = engines.get(model["name"] if model is not models[-1] else model["name"].removesuffix(AGAIN))
        if engine is None or manifest["files"][engine["model"]]["sha256"] != model["sha256"]:
            raise StaleArtifact(f"`{model['name']}` of the result is no engine of this bundle", hint=HINT_RUN_AGAIN)
    names = [model["name"] for model in models]
    if len(set(names)) < len(names) or names[-1].removesuffix(AGAIN) not in names[:-1]:
        raise StaleArtifact(f"the result is of {', '.join(names)}: one of them is there twice", hint=HINT_RUN_AGAIN)


def build_bench_result(out: Path, bundle: Bundle, device_result: DeviceResult, config: BenchConfig) -> BenchResult:
    """Return the comparison on the device: ratios, the A/A control and metrics, all from its raw samples and outputs.

    The models are linked into `out`, the samples copied.

    Args:
        out: The folder of the comparison.
        bundle: What ran on the device.
        device_result: What came back.
        config: Says which metrics are computed.

    Raises:
        StaleArtifact: if arrays do not fit each other.
        ConfigError: if they are no arrays of numbers.
    """
    manifest, result = bundle.read(), device_result.read()
    bench = result["bench"]
    engines = {engine["name"]: (index, engine) for index, engine in enumerate(manifest["engines"])}
    names = [model["name"] for model in bench["models"]]  # engines that could be built, then the A/A control
    entries = tuple(load_entry(bundle, manifest, engines[name][1]) for name in names[:-1])
    samples_file = copy_samples(out, device_result)
    ns = load_timings(samples_file, names, bench["protocol"]["rounds"])
    labels = File.of(bundle.folder / manifest["labels"]) if manifest["labels"] else None
    images = len(np.load(bundle.folder / manifest["inputs"], mmap_mode="r"))
    shapes = [(images, *output_shape(bundle, engines[name][1])) for name in names[:-1]]
    outputs = [load_outputs(device_result, engines[n][0], shape) for n, shape in zip(names[:-1], shapes, strict=True)]
    reference = next((e.name for e in entries if (e.role, e.precision) == ("student", "fp32")), names[0])
    samples = collect_samples(entries, ns, outputs, labels, reference)
    task = serialization.from_json(Task, manifest["task"])  # type: ignore[type-abstract]
    baseline = Baseline(names.index(names[-1].removesuffix(AGAIN)), ns, config.seed)
    precisions = [model["compute_precision"].removeprefix("int8+") for model in bench["models"]]
    energies, mismatches = read_energy(result), find_mismatches(result)
    measurements = tuple(
        replace(m, metrics=m.metrics | energies.get(m.model.name, {}), mismatch=mismatches.get(m.model.name, ""))
        for m in measure_entries(out, entries, Observed(samples, precisions, baseline), config, task)
    )
    warnings = statistics.find_warnings(baseline.aa_ratio, dict(zip(names, ns, strict=True)), bench)
    protocol = {
        "batch": 1,
        "scope": Scenario().describe_call(bench["runtime"]["name"]),
        "images": images,
        **{key: bench["protocol"][key] for key in ("rounds", "calls_per_round", "seed")},
    }
    return BenchResult(
        target=manifest["target"],
        not_measured="",
        machine=describe_machine(result),
        runtime=Runtime(**{key: bench["runtime"][key] for key in RUNTIME}),
        protocol=protocol | read_back(bench) | environment(bench) | describe_conditions(result),
        aa_ratio=baseline.aa_ratio,
        warnings=(*warnings, *find_warnings(manifest, result)),
        measurements=measurements,
        samples=samples_file,
        started=arrival_time(device_result),
        seconds=float(np.sum([n.sum() for n in ns])) / 1e9,
    )


def load_entry(bundle: Bundle, manifest: dict[str, Any], engine: dict[str, Any]) -> BenchmarkEntry:
    """Return the benchmark entry of an engine in the manifest."""
    precision: Precision = "int8" if "int8" in engine["precisions"] else engine["precisions"][0]
    file = File.checked(bundle.folder / engine["model"], manifest["files"][engine["model"]]["sha256"])
    return BenchmarkEntry(
        engine["name"],
        engine["role"],
        engine["method"],
        precision,
        file,
        engine["macs"],
        engine["parameters"],
        predicts_labels=engine.get("predicts_labels", True),
        compute_precision=engine.get("compute_precision", "fp32"),
    )


def output_shape(bundle: Bundle, engine: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape of an engine's output for one input, as the host has it."""
    return tuple(load_array(bundle.folder / engine["expected"]).shape[1:])


def copy_samples(out: Path, device_result: DeviceResult) -> File:
    path = device_result.array(SAMPLES)
    if path is None:
        raise StaleArtifact(f"`{device_result.result.path}` has no `{SAMPLES}`", hint=HINT_RUN_AGAIN)
    (out / SAMPLES).write_bytes(path.read_bytes())
    return File.of(out / SAMPLES)


def load_timings(samples: File, names: list[str], rounds: int) -> list[np.ndarray]:
    """Return (rounds, calls) nanoseconds of every model. Raises StaleArtifact if the arrays do not fit the result."""
    recorded, model, ns = load_arrays(samples.path, ("names", "model", "ns"))
    valid = all(array.ndim == 1 and array.dtype.kind == "i" for array in (model, ns)) and len(model) == len(ns)
    if not valid or recorded.tolist() != names or not ((model >= 0) & (model < len(names)) & (ns > 0)).all():
        raise StaleArtifact(f"`{SAMPLES}` of the result does not fit its result.json", hint=HINT_RUN_AGAIN)
    counts = np.bincount(model, minlength=len(names))
    if not counts.all() or (counts % rounds).any():
        raise StaleArtifact(
            f"`{SAMPLES}` of the result has not {rounds} whole rounds of each model", hint=HINT_RUN_AGAIN
        )
    return nanoseconds(samples, len(names), rounds)


def load_outputs(device_result: DeviceResult, index: int, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Return the outputs of engine `index` for all inputs; () if they have another shape, or are not finite.

    Raises StaleArtifact if they are missing, or not for all inputs.
    """
    path = device_result.array(f"logits-{index}.npy")
    logits = None if path is None else load_array(path)
    if logits is None or logits.dtype.kind != "f" or logits.shape[:1] != shape[:1]:
        raise StaleArtifact(
            f"the result lacks outputs of engine {index} for all {shape[0]} inputs", hint=HINT_RUN_AGAIN
        )
    usable = logits.shape == shape and np.isfinite(logits).all()
    return (logits,) if usable else ()


def describe_machine(result: dict[str, Any]) -> Machine:
    """Return the machine, named by its board or its GPU where there is one: many boards have the same processor."""
    host, doctor = machine(result["bench"]["machine"]), result.get("doctor") or {}
    board, gpu = (doctor.get("board") or {}).get("model"), (doctor.get("device") or {}).get("gpu")
    processor = f"{gpu}; {host.processor}" if gpu not in (None, "unknown") else host.processor
    return replace(host, processor=board or processor)


def describe_conditions(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of a device beyond what it says of this machine."""
    bench, doctor, power = result["bench"], result.get("doctor") or {}, result.get("energy") or {}
    conditions: dict[str, Any] = {"processes": len(bench["processes"])}
    if doctor.get("l4t"):
        conditions["l4t"] = doctor["l4t"]
    points = bench.get("operating_points") or []
    for key in ("power_mode", "gpu_hz", "temperatures_c"):
        if points and points[0]["before"].get(key):
            conditions[key] = points[0]["before"][key]
    conditions["locked_clocks"] = bench["locked"]
    compute_ms = {m["name"]: float(np.median(m["compute_ms"])) for m in bench["models"] if m.get("compute_ms")}
    if compute_ms:
        conditions["kernels_alone_ms"] = compute_ms
    if power.get("sensor"):
        conditions["power"] = power["sensor"]
    elif power.get("reason"):
        conditions["power"] = f"not measured: {power['reason']}"
    return conditions


def read_energy(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return millijoules of one inference by engine: of the whole module, and net of its idle power."""
    energy = result.get("energy") or {}
    if energy.get("invalid"):
        return {}
    return {e["name"]: {"energy_mj": e["mj"], "net_energy_mj": e["net_mj"]} for e in energy.get("engines", ())}


def find_mismatches(result: dict[str, Any]) -> dict[str, str]:
    """Return engine -> how its outputs differ from the host's, for those that failed `verify`."""
    return {engine["name"]: engine["reason"] for engine in result["verify"]["engines"] if not engine["passes"]}


def find_warnings(manifest: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Return what limits the validity of a run on a device."""
    bench, energy = result["bench"], result.get("energy") or {}
    warnings = [difference["what"] for difference in (result.get("doctor") or {}).get("differences", ())]
    for engine in (result.get("build") or {}).get("engines", ()):
        if "error" in engine:
            warnings.append(f"{engine['name']} was not built on the device: {engine['error']}")
    warnings += [f"{name} does not answer as on the host: {why}" for name, why in find_mismatches(result).items()]
    if energy.get("invalid"):
        warnings.append(f"energy is left out: {'; '.join(energy['invalid'])}")
    best = (bench.get("recommended") or {}).get("name")
    if best and not best.endswith(" int8") and any("int8" in engine["precisions"] for engine in manifest["engines"]):
        warnings.append(f"of the students that answer as on the host, the fastest is {best}, not INT8")
    threads = bench["runtime"]["threads"]
    if threads != manifest["threads"]:
        warnings.append(f"threads: {manifest['threads']} were asked for, {threads} in force")
    return warnings


def arrival_time(device_result: DeviceResult) -> str:
    """Return when the result came here, UTC: a board without a battery does not know the time."""
    moment = datetime.fromtimestamp(device_result.result.path.stat().st_mtime, UTC)
    return moment.isoformat(timespec="seconds")
