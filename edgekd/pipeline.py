"""The whole build, top to bottom. Read this file first."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from edgekd import __version__
from edgekd.configuration import BuildConfig, unique
from edgekd.core import plain, plugins, processor
from edgekd.core.artifact import File, Weights
from edgekd.core.errors import ConfigError
from edgekd.core.ledger import Ledger, code
from edgekd.core.onnx_facts import Exported
from edgekd.core.record import DataFacts, Record
from edgekd.core.target import Target
from edgekd.core.task import SPLITS, Task
from edgekd.core.trial import BenchResult, Contestant, Role
from edgekd.learn.trainer import TrainConfig, resolved
from edgekd.methods.alone import Alone
from edgekd.stages.benchmark import BenchConfig, benchmark, runner_path
from edgekd.stages.calibrate import CalibrationSet, collect
from edgekd.stages.carry import export_trained
from edgekd.stages.compare import table
from edgekd.stages.distill import Course, Trained, adopt, distill
from edgekd.stages.prepare import exam, prepare
from edgekd.stages.quantize import quantize
from edgekd.stages.report import report

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")  # whose versions a result depends on
Family = tuple[Trained, ...]  # what one method makes of one student


def build(config: BuildConfig, out: Path, calib_root: Path, command: str) -> Record:
    """From a teacher to a measured INT8 student on every target; what did not change is not made again.

    The report is written to `out`, the calibration set to `calib_root`. Raises EdgekdError.
    """
    ledger = Ledger(out / "steps")
    with ledger.locked():
        task = ledger.step("data", Task, prepare, config.data, config.images_per_class)
        inputs = ledger.step("exam", File, exam, task)  # cheap, and may fail: before the hours of training
        calib = ledger.step("calib", CalibrationSet, collect, task, config.calib, plugins.name_of(config.data))
        replace_files((calib.images, calib.manifest), calib_root / config.name)
        teacher = teach(ledger, config, task)
        students = teach_students(ledger, config, task, teacher)
        exported = {
            t.weights.name: ledger.step(f"export-{t.weights.name}", Exported, export_trained, t, task, config.export)
            for t in (teacher, *students)
        }
        results = [
            deliver(ledger, config, target, task, calib, inputs, (teacher, *students), exported)
            for target in config.targets
        ]
        record = Record(
            name=config.name,
            edgekd=__version__,
            created=ledger.latest,
            command=command,
            config=plain.dump(config),
            data=data_facts(config, task),
            teacher=teacher.weights,
            students=tuple(s.weights for s in students),
            models=(*(e.single for e in exported.values()), *(int8.single for _, int8s in results for int8 in int8s)),
            benches=tuple(bench for bench, _ in results),
            versions={name: version(name) for name in PACKAGES},
            step_seconds=dict(ledger.seconds),
        )
        publish(ledger.given(templates()).step("report", Rendered, rendered, record), out)
    return record


def distilled(config: BuildConfig, out: Path) -> tuple[Weights, ...]:
    """The first half of `build`: the teacher's weights, then those of every student."""
    ledger = Ledger(out / "steps")
    with ledger.locked():
        task = ledger.step("data", Task, prepare, config.data, config.images_per_class)
        teacher = teach(ledger, config, task)
        return tuple(t.weights for t in (teacher, *teach_students(ledger, config, task, teacher)))


def teach(ledger: Ledger, config: BuildConfig, task: Task) -> Trained:
    """The teacher: from its checkpoint, or trained on labels here."""
    c = config.teacher
    if c.checkpoint:
        path = Path(c.checkpoint)
        if not path.is_file():
            raise ConfigError(f"teacher.checkpoint: there is no file `{path}`", hint="check the path")
        return ledger.step("teacher", Trained, adopt, "teacher", task, c.model, File.of(path), c.trust)
    course = Course(c.epochs, ready(c.train), config.data.augment, c.seed, with_validation=c.with_validation)
    (made,) = ledger.step("teacher", Family, distill, "teacher", task, c.model, Alone(), course, ())
    return made


def teach_students(ledger: Ledger, config: BuildConfig, task: Task, teacher: Trained) -> tuple[Trained, ...]:
    """The chosen method's students first, then the baselines'; one without a teacher is always among them."""
    c = config.student
    course = Course(c.epochs, ready(c.train), config.data.augment, c.seed, c.labels_per_class)
    made: list[Trained] = []
    for method in unique((c.method, *c.baselines, Alone())):
        name = plugins.name_of(method)
        made += ledger.step(f"distill-{name}", Family, distill, name, task, c.model, method, course, (teacher,))
    return tuple(made)


def deliver(
    ledger: Ledger,
    config: BuildConfig,
    target: Target,
    task: Task,
    calib: CalibrationSet,
    inputs: File,
    networks: tuple[Trained, ...],
    exported: dict[str, Exported],
) -> tuple[BenchResult, list[Exported]]:
    """Quantize the chosen method's students for one target, and measure them against everything else."""
    name = plugins.name_of(target)
    chosen = [t.weights.name for t in networks[1:] if t.weights.method == plugins.name_of(config.student.method)]
    int8s = {
        n: ledger.step(
            f"quantize-{n}-{name}", Exported, quantize, exported[n], calib.images, target.dialect, config.quantize
        )
        for n in chosen
    }
    contestants = []
    for trained in networks:
        n, method = trained.weights.name, trained.weights.method
        role: Role = "teacher" if trained is networks[0] else "student" if n in int8s else "baseline"
        contestants.append(contestant(role, method, exported[n]))
        if n in int8s:
            contestants.append(contestant(role, method, int8s[n]))
    reference = next(c.name for c in contestants if c.role == "student")
    bench = ledger.given(circumstances(target, config.bench)).step(
        f"bench-{name}",
        BenchResult,
        benchmark,
        tuple(contestants),
        name,
        target,
        inputs,
        task.test.labels,
        reference,
        config.bench,
    )
    return bench, list(int8s.values())


def contestant(role: Role, method: str, model: Exported) -> Contestant:
    single = model.single
    name = single.name.removesuffix("-int8")
    return Contestant(
        f"{name} {single.precision}", role, method, single.precision, single.file, single.macs, single.parameters
    )


def ready(config: TrainConfig) -> TrainConfig:
    """With `auto` resolved, so that the ledger knows what was really used."""
    return replace(config, precision=resolved(config.precision))


def data_facts(config: BuildConfig, task: Task) -> DataFacts:
    counts = {name: len(np.load(getattr(task, name).labels.path)) for name in SPLITS}
    few = config.student.labels_per_class
    return DataFacts(
        source=plugins.name_of(config.data),
        classes=task.classes,
        shape=task.shape,
        student_train=counts["train"] if few is None else few * len(task.classes),
        calibration=config.calib.images,
        **counts,
    )


def circumstances(target: Target, config: BenchConfig) -> dict[str, object]:
    """What a measurement depends on beside its arguments: another machine, runtime, runner or metric measures anew."""
    return {
        "missing": target.missing(),
        "runtime": None if target.missing() else version(target.runtime),
        "processor": processor.name(),
        "runner": File.of(runner_path()),
        "metrics": {name: code(plugins.places("metrics")[name]) for name in config.metrics},
    }


def replace_files(files: Iterable[File], home: Path) -> None:
    """Copy files to where people look for them, each whole or not at all."""
    home.mkdir(parents=True, exist_ok=True)
    for file in files:
        partial = home / f"{file.path.name}.partial"
        shutil.copyfile(file.path, partial)
        partial.replace(home / file.path.name)


@dataclass(frozen=True)
class Rendered:
    """The report in all its forms, with the raw samples."""

    files: tuple[File, ...]


def rendered(out: Path, record: Record) -> Rendered:
    report(record, out)
    return Rendered(tuple(File.of(path) for path in sorted(out.iterdir()) if path.is_file()))


def templates() -> list[File]:
    """What the report is filled into; no module imports them, so the ledger has to be told."""
    return [File.of(path) for path in sorted(Path(report.__code__.co_filename).parent.glob("*.j2"))]


def publish(made: Rendered, out: Path) -> None:
    replace_files(made.files, out)
    current = {file.path.name for file in made.files}
    for old in out.glob("samples-*.npz"):
        if old.name not in current:
            old.unlink()


def summary(record: Record) -> dict[str, object]:
    """What a machine wants to know of a build."""
    return {
        "name": record.name,
        "targets": {
            bench.target: {
                m.contestant.name: {"file": str(m.contestant.file.path), **m.readings, "verdict": m.verdict}
                for m in bench.measurements
            }
            for bench in record.benches
        },
        "not_measured": {bench.target: bench.not_measured for bench in record.benches if bench.not_measured},
    }


def headline(record: Record) -> str:
    """What a person wants to know of a build: the comparison on every target."""
    return "\n\n".join(
        f"{b.target}: not measured: {b.not_measured}" if b.not_measured else table(b) for b in record.benches
    )
