"""Results of a bundle that ran elsewhere: checked against it, and turned into numbers as those of this machine are."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core import serialization
from edgekd.core.artifact import File, Precision
from edgekd.core.bench_result import BenchResult, Contestant, Machine, Runtime
from edgekd.errors import ConfigError, EdgekdError, StaleArtifact
from edgekd.stages.bench import statistics
from edgekd.stages.bench.benchmark import RUNTIME, environment, read_back
from edgekd.stages.bench.config import BenchConfig, Scenario
from edgekd.stages.bench.measurements import judged, trials
from edgekd.stages.bench.runner import machine, nanoseconds
from edgekd.stages.device import schemas
from edgekd.stages.device.bundle import SCHEMA, Bundle
from edgekd.utils.arrays import load_array, load_arrays

RESULT, SAMPLES = "result.json", "samples.npz"
AGAIN = "run `sh run.sh` in the bundle on the device again, and bring the whole folder `results`"


@dataclass(frozen=True)
class Returned:
    """What a device made of a bundle: the files that `collect` of the runner lists."""

    result: File
    arrays: tuple[File, ...]  # samples.npz, and logits-I.npy of engine I

    def array(self, name: str) -> Path | None:
        return next((file.path for file in self.arrays if file.path.name == name), None)

    def read(self) -> dict[str, Any]:
        return read(self.result.path)


def named_file(name: str) -> bool:
    """Whether a result may have a file of this name."""
    return name in (RESULT, SAMPLES) or re.fullmatch(r"logits-\d+\.npy", name) is not None


def read(path: Path) -> dict[str, Any]:
    """A result.json. Raises ConfigError where it is none."""
    hint = "name the result.json that `sh run.sh` wrote in a bundle's folder `results`"
    found = serialization.read(path, hint)
    if not isinstance(found, dict) or not {"bundle", "bench", "verify", "files"} <= found.keys():
        raise ConfigError(f"`{path}` is no result of a bundle", hint=hint)
    if found.get("schema") != SCHEMA:
        raise ConfigError(
            f"`{path}` has schema {str(found.get('schema'))[:20]}; this edgekd reads {SCHEMA}",
            hint="use one edgekd to make the bundle and to read its result",
        )
    formed(schemas.Result, found, path)
    return found


def formed(kind: Any, found: Any, path: Path) -> None:
    """Raises ConfigError where what edgekd reads of a JSON file is missing, or of another type."""
    try:
        serialization.load(kind, found, hint=AGAIN)
    except ConfigError as error:
        raise ConfigError(f"`{path}` is not as the runner writes it: {error.what}", hint=error.hint) from None


def taken(folder: Path, bundle: Bundle) -> Returned:
    """The results in `folder`, if they are whole, of this bundle, and valid.

    Raises StaleArtifact where they are not as the device wrote them or of other files, EdgekdError where nothing was
    measured, or under conditions that spoil it.
    """
    path = folder / RESULT
    found = read(path)
    if found["bundle"] != bundle.manifest.sha256:
        raise StaleArtifact(
            f"`{path}` is a result of the bundle {str(found['bundle'])[:12]}, this is {bundle.manifest.sha256[:12]}",
            hint="results count for the files that were measured only: copy this bundle to the device and run it",
        )
    files = []
    for name, facts in found["files"].items():
        array = folder / name
        if not named_file(name) or not array.is_file() or array.is_symlink():
            raise StaleArtifact(f"`{name}` of the result is not in `{folder}`", hint=f"it is not whole: {AGAIN}")
        file = File.of(array)
        if file.sha256 != facts["sha256"]:
            raise StaleArtifact(f"`{array}` is not as the device wrote it", hint=f"it was changed, or cut off: {AGAIN}")
        files.append(file)
    for part in ("verify", "bench"):
        if not found[part]:
            raise EdgekdError(f"`{path}` has no `{part}`: the run on the device was cut off", hint=AGAIN)
    if found["bench"]["invalid"]:
        raise EdgekdError(
            f"the measurement on the device is not valid: {'; '.join(found['bench']['invalid'])}",
            hint=f"let the device cool down, check its power supply and its power mode; then {AGAIN}",
        )
    returned = Returned(File.of(path), tuple(files))
    same_models(found, bundle)
    return returned


def same_models(found: dict[str, Any], bundle: Bundle) -> None:
    """Raise StaleArtifact unless the files that were timed are those of the bundle."""
    manifest = bundle.read()
    engines = {engine["name"]: engine for engine in manifest["engines"]}
    models = found["bench"]["models"]
    for model in models:
        engine = engines.get(model["name"] if model is not models[-1] else model["name"].removesuffix(" again"))
        if engine is None or manifest["files"][engine["model"]]["sha256"] != model["sha256"]:
            raise StaleArtifact(f"`{model['name']}` of the result is no engine of this bundle", hint=AGAIN)
    names = [model["name"] for model in models]
    if len(set(names)) < len(names) or names[-1].removesuffix(" again") not in names[:-1]:
        raise StaleArtifact(f"the result is of {', '.join(names)}: one of them is there twice", hint=AGAIN)


def measured(out: Path, bundle: Bundle, returned: Returned, config: BenchConfig) -> BenchResult:
    """The comparison on the device: ratios, the A/A control and readings, all from its raw samples and answers.

    `config` says which metrics are read. The models are linked into `out`, the samples copied. Raises StaleArtifact
    where arrays do not fit each other, ConfigError where they are none.
    """
    manifest, found = bundle.read(), returned.read()
    bench = found["bench"]
    rows = {row["name"]: (index, row) for index, row in enumerate(manifest["engines"])}
    timed = [model["name"] for model in bench["models"]]  # engines that could be built, then the A/A control
    contestants = tuple(contestant(bundle, manifest, rows[name][1]) for name in timed[:-1])
    base = timed.index(timed[-1].removesuffix(" again"))
    samples = copied(out, returned)
    ns = calls(samples, timed, bench["protocol"]["blocks"])
    labels = File.of(bundle.folder / manifest["labels"]) if manifest["labels"] else None
    images = len(np.load(bundle.folder / manifest["inputs"], mmap_mode="r"))
    logits = [answers(returned, rows[name][0], (images, *shape(bundle, rows[name][1]))) for name in timed[:-1]]
    reference = next((c.name for c in contestants if (c.role, c.precision) == ("student", "fp32")), timed[0])
    seen = trials(contestants, ns, logits, labels, reference)
    drawn, wrong = energy(found), astray(found)
    floats = [model["precision"].removeprefix("int8+") for model in bench["models"]]
    aa, seen_here = judged(out, contestants, base, seen, ns, floats, config)
    measurements = [
        replace(m, readings=m.readings | drawn.get(one.name, {}), astray=wrong.get(one.name, ""))
        for one, m in zip(contestants, seen_here, strict=True)
    ]
    doubts = statistics.doubts(aa, dict(zip(timed, ns, strict=True)), bench)
    protocol = {
        "batch": 1,
        "scope": Scenario().holds(bench["runtime"]["name"]),
        "images": images,
        **{key: bench["protocol"][key] for key in ("blocks", "calls", "seed")},
    }
    return BenchResult(
        target=manifest["target"],
        not_measured="",
        machine=device(found),
        runtime=Runtime(**{key: bench["runtime"][key] for key in RUNTIME}),
        protocol=protocol | read_back(bench) | environment(bench) | circumstances(found),
        aa=aa,
        warnings=(*doubts, *remarks(manifest, found)),
        measurements=tuple(measurements),
        samples=samples,
        started=ended(returned),
        seconds=float(np.sum([n.sum() for n in ns])) / 1e9,
    )


def contestant(bundle: Bundle, manifest: dict[str, Any], row: dict[str, Any]) -> Contestant:
    precision: Precision = "int8" if "int8" in row["precisions"] else row["precisions"][0]
    file = File.checked(bundle.folder / row["model"], manifest["files"][row["model"]]["sha256"])
    facts = (row["role"], row["method"], precision, file, row["macs"], row["parameters"])
    return Contestant(row["name"], *facts, knows=row.get("knows", True), floats=row.get("floats", "fp32"))


def shape(bundle: Bundle, row: dict[str, Any]) -> tuple[int, ...]:
    """Of an engine's answer to one input, as the host has it."""
    return tuple(load_array(bundle.folder / row["expected"]).shape[1:])


def copied(out: Path, returned: Returned) -> File:
    path = returned.array(SAMPLES)
    if path is None:
        raise StaleArtifact(f"`{returned.result.path}` has no `{SAMPLES}`", hint=AGAIN)
    (out / SAMPLES).write_bytes(path.read_bytes())
    return File.of(out / SAMPLES)


def calls(samples: File, timed: list[str], blocks: int) -> list[np.ndarray]:
    """Nanoseconds of every model, (blocks, calls). Raises StaleArtifact where the arrays do not fit the result."""
    names, model, ns = load_arrays(samples.path, ("names", "model", "ns"))
    whole = all(array.ndim == 1 and array.dtype.kind == "i" for array in (model, ns)) and len(model) == len(ns)
    if not whole or names.tolist() != timed or not ((model >= 0) & (model < len(timed)) & (ns > 0)).all():
        raise StaleArtifact(f"`{SAMPLES}` of the result does not fit what it says of it", hint=AGAIN)
    counts = np.bincount(model, minlength=len(timed))
    if not counts.all() or (counts % blocks).any():
        raise StaleArtifact(f"`{SAMPLES}` of the result has not {blocks} whole blocks of each model", hint=AGAIN)
    return nanoseconds(samples, len(timed), blocks)


def answers(returned: Returned, index: int, expected: tuple[int, ...]) -> np.ndarray:
    """Of engine `index` to all inputs; nothing where they are not of the `expected` shape, or some are no numbers."""
    path = returned.array(f"logits-{index}.npy")
    logits = None if path is None else load_array(path)
    if logits is None or logits.dtype.kind != "f" or logits.shape[:1] != expected[:1]:
        raise StaleArtifact(f"the result has no answers of engine {index} to all {expected[0]} inputs", hint=AGAIN)
    usable = logits.shape == expected and np.isfinite(logits).all()
    return logits if usable else np.zeros((0, 0), np.float32)


def device(found: dict[str, Any]) -> Machine:
    """The machine; a board by its own name, as its processor is called alike on many, and a GPU by its."""
    own, doctor = machine(found["bench"]["machine"]), found.get("doctor") or {}
    model, gpu = (doctor.get("board") or {}).get("model"), (doctor.get("device") or {}).get("gpu")
    beside = f"{gpu}; {own.processor}" if gpu not in (None, "unknown") else own.processor
    return replace(own, processor=model or beside)


def circumstances(found: dict[str, Any]) -> dict[str, Any]:
    """What a report tells of a device beyond that of this machine."""
    told: dict[str, Any] = {"sessions": len(found["bench"]["sessions"])}
    doctor, points = found.get("doctor") or {}, found["bench"].get("points") or []
    if doctor.get("l4t"):
        told["l4t"] = doctor["l4t"]
    for key in ("power_mode", "gpu_hz", "temperatures_c"):
        if points and points[0]["before"].get(key):
            told[key] = points[0]["before"][key]
    told["locked_clocks"] = found["bench"]["locked"]
    compute = {m["name"]: float(np.median(m["compute_ms"])) for m in found["bench"]["models"] if m.get("compute_ms")}
    if compute:
        told["kernels_alone_ms"] = compute
    power = found.get("energy") or {}
    if power.get("sensor"):
        told["power"] = power["sensor"]
    elif power.get("reason"):
        told["power"] = f"not measured: {power['reason']}"
    return told


def energy(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Millijoules of one inference of every engine: of all that the module drew, and without what it draws idle."""
    seen = found.get("energy") or {}
    if seen.get("invalid"):
        return {}
    return {one["name"]: {"energy_mj": one["mj"], "net_energy_mj": one["net_mj"]} for one in seen.get("engines", ())}


def astray(found: dict[str, Any]) -> dict[str, str]:
    """Engines whose answers are not the host's, with the difference."""
    return {fact["name"]: fact["reason"] for fact in found["verify"]["engines"] if not fact["passes"]}


def remarks(manifest: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What a sceptic should know of a run on a device."""
    told = [difference["what"] for difference in (found.get("doctor") or {}).get("differs", ())]
    for fact in (found.get("build") or {}).get("engines", ()):
        if "error" in fact:
            told.append(f"{fact['name']} was not built on the device: {fact['error']}")
    told += [f"{name} does not answer as on the host: {reason}" for name, reason in astray(found).items()]
    if (found.get("energy") or {}).get("invalid"):
        told.append(f"energy is left out: {'; '.join(found['energy']['invalid'])}")
    best = (found["bench"].get("recommended") or {}).get("name")
    if best and not best.endswith(" int8") and any("int8" in row["precisions"] for row in manifest["engines"]):
        told.append(f"of the students that answer as on the host, the fastest is {best}, not INT8")
    threads = found["bench"]["runtime"]["threads"]
    if threads != manifest["threads"]:
        told.append(f"threads: {manifest['threads']} were asked for, {threads} in force")
    return told


def ended(returned: Returned) -> str:
    """When the result came here, UTC: a board without a battery does not know the time."""
    moment = datetime.fromtimestamp(returned.result.path.stat().st_mtime, UTC)
    return moment.isoformat(timespec="seconds")
