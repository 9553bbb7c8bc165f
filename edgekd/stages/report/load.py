"""A report.json read back, and its samples: the record, or in words why it is none; nothing in it is believed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

from edgekd.core import serialization
from edgekd.core.artifact import File, RecordedFile, Weights
from edgekd.core.bench_result import BenchResult, Interval, Measurement
from edgekd.core.build_record import SCHEMA, BuildRecord
from edgekd.core.mixed_precision import ParetoFront
from edgekd.errors import ConfigError, StaleArtifact
from edgekd.stages.report.tables import percentages
from edgekd.utils.arrays import load_arrays

AGAIN = "make the report again: this one was changed, or cut off"
LONGEST_MS, LEAST, MOST = 1e9, 1e-9, 1e12  # eleven days; what no ratio or time is below, and no number beyond
ROUNDED = 1e-9  # by how much an end of an interval may pass its middle


class ListedFile(TypedDict):
    """One of the files of a report.json."""

    name: str
    sha256: str
    bytes: int | None
    what: str


class Route(TypedDict):
    """A route of knowledge in the notes of a method, which the page draws up a table of."""

    teacher: str
    student: str
    size: list[float]
    receptive: list[float]
    losses: list[float]
    dropped: int | None
    won: NotRequired[bool]


def read(path: Path) -> BuildRecord:
    """The record that a report.json holds. Files keep their recorded hash and size; they need not exist any more.

    Raises ConfigError if it cannot be read, or holds what no build can have written.
    """
    data = serialization.read_json(path, "name a report.json that edgekd wrote")
    schema = data.pop("schema", None) if isinstance(data, dict) else None
    if schema != SCHEMA:
        hint = "build again, or read the report with the edgekd that wrote it"
        raise ConfigError(f"`{path}` has schema {str(schema)[:20]}; this edgekd reads {SCHEMA}", hint=hint)
    try:
        files = serialization.from_json(list[ListedFile], data.pop("files", None), hint=AGAIN)
        sizes = {file["sha256"]: file["bytes"] for file in files}
        record = serialization.from_json(BuildRecord, data, path.parent, partial(recorded_file, sizes), AGAIN)
        for weights in (record.teacher, *record.students):
            serialization.from_json(list[Route], (weights.notes or {}).get("routes", []), hint=AGAIN)
    except ConfigError as error:
        raise ConfigError(f"`{path}` is not as edgekd writes it: {error.what}", hint=error.hint) from None
    errors = list(find_errors(record))
    if errors:
        more = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise ConfigError(f"`{path}` holds what cannot be: {errors[0]}{more}", hint=AGAIN)
    return record


def recorded_file(sizes: dict[str, int | None], path: Path, sha256: str) -> RecordedFile:
    return RecordedFile(path, sha256, sizes.get(sha256))


def find_errors(record: BuildRecord) -> Iterator[str]:
    """What has the right type, and cannot be: a negative time, more than 100 %, a choice that is not there."""
    counts = {key: getattr(record.data, key) for key in ("train", "valid", "test", "student_train", "calibration")}
    yield from (f"data.{key} is {count}" for key, count in counts.items() if count < (key in ("train", "test")))
    yield from (f"the step {name} took {s:g} s" for name, s in record.step_seconds.items() if s < 0)
    for weights in (record.teacher, *record.students):
        yield from training_errors(weights)
    for bench in record.benches:
        yield from (f"on {bench.title}, {what}" for what in bench_errors(bench))
    for frontier in record.pareto_fronts:
        yield from (f"of the mixes for {frontier.network}, {what}" for what in unmixed(frontier))


def training_errors(weights: Weights) -> Iterator[str]:
    for name, seconds in [("training", weights.seconds), *((phase.name, phase.seconds) for phase in weights.phases)]:
        if seconds < 0:
            yield f"{name} of {weights.name} took {seconds:g} s"
    if (weights.notes or {}).get("routes") == []:
        yield f"{weights.name} tells of routes, and has none"
    for share in (weights.valid_accuracy, *(phase.accuracy for phase in weights.phases)):
        if share is not None and not 0 <= share <= 1:
            yield f"{weights.name} has an accuracy of {share:g}, which is from 0 to 1"


def bench_errors(bench: BenchResult) -> Iterator[str]:
    for key in ("batch", "images"):
        count = bench.protocol.get(key, 1)
        if type(count) is not int or count < 1:
            yield f"`{key}` of the protocol is {str(count)[:20]}"
    if bench.seconds < 0:
        yield f"the comparison took {bench.seconds:g} s"
    if bench.aa_ratio:
        yield from interval_errors("the A/A control", bench.aa_ratio, above_zero=True)
    for m in bench.measurements:
        for name, value in m.metrics.items():
            yield from metric_errors(m, name, value)
        for name, interval in m.intervals.items():
            yield from interval_errors(f"`{name}` of {m.model.name}", interval, above_zero=timed(name))
        if m.speedup:
            yield from interval_errors(f"the speed-up of {m.model.name}", m.speedup, above_zero=True)


def timed(name: str) -> bool:
    return name.endswith("_ms") or name == "images_per_s"


def metric_errors(of: Measurement, name: str, value: float) -> Iterator[str]:
    if timed(name) and not 0 < value < LONGEST_MS:
        yield f"`{name}` of {of.model.name} is {value:g}, which is no time"
    if name in (*percentages(), "late_percent") and not 0 <= value <= 100:
        yield f"`{name}` of {of.model.name} is {value:g} %"


def interval_errors(what: str, interval: Interval, above_zero: bool) -> Iterator[str]:
    spare = ROUNDED * abs(interval.estimate)
    if not -MOST < interval.low - spare <= interval.estimate <= interval.high + spare < MOST:
        yield f"the interval of {what} is from {interval.low:g} to {interval.high:g} around {interval.estimate:g}"
    elif above_zero and interval.low < LEAST:
        yield f"the interval of {what} begins at {interval.low:g}"


def unmixed(frontier: ParetoFront) -> Iterator[str]:
    if not 0 <= frontier.selected < len(frontier.candidates):
        yield f"number {frontier.selected} was chosen of {len(frontier.candidates)}"
    if frontier.metric not in percentages():
        yield f"`{frontier.metric}` is no metric that judges"


def samples(file: File) -> dict[str, np.ndarray]:
    """Milliseconds of the calls of every model that was called, in a comparison whose samples.npz is `file`.

    Raises StaleArtifact if it is not the recorded file (ConfigError of a report that was read), ConfigError if it is
    not as a benchmark writes it.
    """
    try:
        path = File.checked(file.path, file.sha256).path
    except StaleArtifact as error:
        if not isinstance(file, RecordedFile):
            raise
        hint = "bring it again from where the report was made, or remove it: the report does without"
        raise ConfigError(error.what, hint=hint) from None
    names, model, ns = load_arrays(path, ("names", "model", "ns"))
    whole = [array.ndim == 1 and array.dtype.kind == kind for array, kind in ((names, "U"), (model, "i"))]
    if not all(whole) or ns.ndim != 1 or ns.dtype.kind not in "if" or len(ns) != len(model):
        raise ConfigError(f"`{path}` holds other arrays than a benchmark writes", hint=AGAIN)
    if not ((ns > 0) & (ns < 1e6 * LONGEST_MS)).all():
        raise ConfigError(f"`{path}` holds times that are none", hint=AGAIN)
    by_model = {str(name): ns[model == index] / 1e6 for index, name in enumerate(names)}
    return {name: ms for name, ms in by_model.items() if ms.size}


def at(place: Path) -> BuildRecord:
    """The record of a build: of its folder, or of its report.json."""
    return read(place / "report.json" if place.is_dir() else place)
