"""The whole build, top to bottom. Read this file first."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from edgekd import __version__
from edgekd.config import BuildConfig, unique
from edgekd.core import plugins, serialization
from edgekd.core.artifact import File, Weights, replace_files
from edgekd.core.build_record import DataFacts, Origins, RangesFound, Record
from edgekd.core.dataset import SPLITS, Scale, Task
from edgekd.core.formatting import unmeasured
from edgekd.core.method import Method
from edgekd.core.model import Model
from edgekd.core.step_cache import Ledger, code
from edgekd.errors import ConfigError
from edgekd.methods.supervised import Supervised
from edgekd.pipelines.deploy import Away, Delivered, deliver, export_all, fitted, named
from edgekd.pipelines.quantize import Material, readable
from edgekd.pipelines.target_probe import Priced
from edgekd.stages.bench.compare_files import table
from edgekd.stages.bench.gates import check, decide
from edgekd.stages.device.bundle import place
from edgekd.stages.device.ssh import Device
from edgekd.stages.distill.dataset import exam, prepare
from edgekd.stages.distill.distill import adopt, distill, introduce
from edgekd.stages.distill.setup import Course, Rehearsed, rehearse
from edgekd.stages.quantize.calibration_set import CalibrationSet, collect, own_file
from edgekd.stages.report.provenance import certify
from edgekd.stages.report.publish import Rendered, publish, rendered, templates
from edgekd.training.trained_model import Trained
from edgekd.training.trainer import TrainConfig, resolved

log = logging.getLogger(__name__)
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")  # whose versions a result depends on
Family = tuple[Trained, ...]  # what one method makes of one student


def build(
    config: BuildConfig,
    out: Path,
    calib_root: Path,
    command: str,
    bundles: bool = False,
    device: Device | None = None,
    prune: bool = False,
) -> Record:
    """From a teacher to a measured INT8 student on every target; what did not change is not made again.

    The report is written to `out`, and a bundle for every target that this machine cannot serve, or with `bundles` for
    all; the calibration set to `calib_root`. With a `device`, the only target is measured there. With `prune`, steps
    of earlier builds that this one had no use for are deleted when it is done. Raises EdgekdError.
    """
    ledger, away = Ledger(out / "steps"), Away(out, bundles, device)
    with ledger.locked():
        if device:
            config = fitted(ledger, config, device)  # before the hours of training
        targets = named(config.targets)
        check(config.gates, config.bench.metrics, targets, config.bench.scopes)
        task, taught = tasks(ledger, config)
        inputs = ledger.step("exam", File, exam, task)  # cheap, and may fail: before the hours of training
        calib = calibration(ledger, config, task)
        replace_files((calib.images, calib.manifest), calib_root / config.name)
        rehearse_all(ledger, config, task, calib, taught, [(config.student.model, m) for m in methods(config)])
        teachers = teach(ledger, config, taught)
        students = teach_students(ledger, config, task, calib, teachers)
        material = Material(task, calib, inputs, (teachers[0], *students))
        opsets = {readable(config, target) for target in config.targets}
        exported = {opset: export_all(ledger, config, material, opset) for opset in sorted(opsets)}
        delivered = {
            name: deliver(ledger, config, name, target, material, exported[readable(config, target)], away)
            for name, target in targets.items()
        }
        groups = (*exported.values(), *(d.low.files for d in delivered.values()))
        benches = tuple(bench for d in delivered.values() for bench in (d.bench, *d.beside))
        record = Record(
            name=config.name,
            edgekd=__version__,
            created=ledger.latest,
            command=command,
            config=serialization.dump(config),
            data=data_facts(config, task),
            teacher=teachers[0].weights,
            students=tuple(s.weights for s in students),
            models=tuple(made.single for group in groups for made in group.values()),
            benches=benches,
            versions={name: version(name) for name in PACKAGES},
            step_seconds=dict(ledger.seconds),
            gates=decide(config.gates, benches),
            frontiers=tuple(found for d in delivered.values() for found in d.low.frontiers.values()),
            ranges=ranges_found(delivered),
            origins=origins(ledger, task, calib),
        )
        made = ledger.given(templates()).step("report", Rendered, rendered, record)
        publish(made, out)
        for name, d in delivered.items():
            if d.bundle:
                log.info("bundle: %s", place(d.bundle, out / f"bundle-{name}"))
        certify(record, out, made.files, ledger.written)
        if prune:
            ledger.prune()
    return record


def ranges_found(delivered: dict[str, Delivered]) -> tuple[RangesFound, ...]:
    return tuple(
        RangesFound(network, name, found.method, found.tried)
        for name, d in delivered.items()
        for network, found in d.low.ranges.items()
    )


def distilled(config: BuildConfig, out: Path) -> tuple[Weights, ...]:
    """The first half of `build`: the teachers' weights, then those of every student."""
    ledger = Ledger(out / "steps")
    with ledger.locked():
        task, taught = tasks(ledger, config)
        calib = calibration(ledger, config, task)
        rehearse_all(ledger, config, task, calib, taught, [(config.student.model, m) for m in methods(config)])
        teachers = teach(ledger, config, taught)
        students = teach_students(ledger, config, task, calib, teachers)
        return tuple(t.weights for t in (*teachers, *students))


def tasks(ledger: Ledger, config: BuildConfig) -> tuple[Task, tuple[Task, ...]]:
    """What the student learns, and what each teacher learnt. All inputs are scaled alike, as the first teacher's."""
    limit, scale = config.images_per_class, config.scale
    sources = [t.data for t in (config.teacher, *config.more_teachers)]
    taught = []
    for name, source in zip(teacher_names(config), sources, strict=True):
        if source is not None:
            taught.append(ledger.step(f"data-{name}", Task, prepare, source, limit, scale))
            scale = scale or Scale(taught[0].mean, taught[0].std)
    task = ledger.step("data", Task, prepare, config.data, limit, scale)
    known = iter(taught)
    return task, tuple(task if source is None else next(known) for source in sources)


def rehearse_all(
    ledger: Ledger,
    config: BuildConfig,
    task: Task,
    calib: CalibrationSet,
    taught: tuple[Task, ...],
    entries: Iterable[tuple[Model, Method]],
) -> None:
    """Raises ConfigError where a network and a method do not go together, before any training."""
    teachers = (config.teacher, *config.more_teachers)
    cast = tuple(
        (c.model, ("",) * c.outputs if c.checkpoint and c.outputs else known.classes)
        for c, known in zip(teachers, taught, strict=True)
    )
    for model, method in entries:
        name, asked = f"rehearsal-{plugins.name_of(method)}", course(config, task, method, config.student.seed)
        price = pricing(config, method, calib)
        known = ledger.given(drawn_from(price))
        known.step(name, Rehearsed, rehearse, task, model, method, asked, cast, price)


def teacher_names(config: BuildConfig) -> list[str]:
    return ["teacher", *(f"teacher{n}" for n in range(2, 2 + len(config.more_teachers)))]


def calibration(ledger: Ledger, config: BuildConfig, task: Task) -> CalibrationSet:
    return ledger.given(own_file(config.calib)).step(
        "calib", CalibrationSet, collect, task, config.calib, plugins.name_of(config.data)
    )


def teach(ledger: Ledger, config: BuildConfig, taught: tuple[Task, ...]) -> tuple[Trained, ...]:
    """The teachers: each from its checkpoint, or trained here on the labels of its task."""
    made = []
    teachers = (config.teacher, *config.more_teachers)
    for name, c, task in zip(teacher_names(config), teachers, taught, strict=True):
        if c.checkpoint:
            path = Path(c.checkpoint)
            if not path.is_file():
                raise ConfigError(f"{name}.checkpoint: there is no file `{path}`", hint="check the path")
            made.append(ledger.step(name, Trained, adopt, name, task, c.model, File.of(path), c.trust, c.outputs))
            introduce(made[-1], task)
            continue
        augment = (c.data or config.data).augment
        course = Course(c.epochs, ready(c.train), augment, c.seed, with_validation=c.with_validation)
        made += ledger.step(name, Family, distill, name, task, c.model, Supervised(), course, ())
    return tuple(made)


def teach_students(
    ledger: Ledger, config: BuildConfig, task: Task, calib: CalibrationSet, teachers: tuple[Trained, ...]
) -> tuple[Trained, ...]:
    """The chosen method's students first, then the baselines'; one without a teacher is always among them."""
    c = config.student
    made: list[Trained] = []
    for method in methods(config):
        name, price = plugins.name_of(method), pricing(config, method, calib)
        made += ledger.given(drawn_from(price)).step(
            f"distill-{name}",
            Family,
            distill,
            name,
            task,
            c.model,
            method,
            course(config, task, method, c.seed),
            teachers,
            price,
        )
    return tuple(made)


def methods(config: BuildConfig) -> list[Method]:
    """The chosen one, then the baselines; one without a teacher is always among them."""
    return unique((config.student.method, *config.student.baselines, Supervised()))


def course(config: BuildConfig, task: Task, method: Method, seed: int) -> Course:
    """How a student is taught: all methods see equally many images."""
    c = config.student
    images = (c.labels_per_class, c.unlabelled, c.labelled_share)
    made = Course(c.epochs, ready(c.train), config.data.augment, seed, *images)
    return made.labelled(1 if task.dense else len(task.classes)) if method.LABELS_ONLY else made


def pricing(config: BuildConfig, method: Method, calib: CalibrationSet) -> Priced | None:
    """What measures latencies for a method that asks for them: the first target."""
    return Priced(config.targets[0], calib, config.export, config.quantize) if method.priced else None


def drawn_from(price: Priced | None) -> dict[str, object] | None:
    """What a lesson depends on that asks about INT8 files: no training imports what makes them."""
    return {"code": code(Priced.__module__), "dialect": price.target.dialect} if price else None


def ready(config: TrainConfig) -> TrainConfig:
    """With `auto` resolved, so that the ledger knows what was really used."""
    return replace(config, precision=resolved(config.precision))


def data_facts(config: BuildConfig, task: Task) -> DataFacts:
    counts = {name: len(np.load(getattr(task, name).labels.path)) for name in SPLITS}
    few = config.student.labels_per_class
    labelled = counts["train"] if few is None else few * (1 if task.dense else len(task.classes))
    return DataFacts(
        source=plugins.name_of(config.data),
        classes=task.classes,
        shape=task.shape,
        student_train=labelled,
        calibration=config.calib.images,
        **counts,
    )


def origins(ledger: Ledger, task: Task, calib: CalibrationSet) -> Origins:
    arrays = [file for name in SPLITS for file in (getattr(task, name).images, getattr(task, name).labels)]
    entries = ledger.entries.values()
    return Origins(
        data={file.path.name: file.sha256 for file in arrays},
        calibration={file.path.name: file.sha256 for file in (calib.images, calib.manifest)},
        code={name: entry["code"]["sha256"] for name, entry in ledger.entries.items()},
        systems=tuple(sorted({", ".join(entry["machine"].values()) for entry in entries})),
    )


def summary(record: Record) -> dict[str, object]:
    """What a machine wants to know of a build."""
    return {
        "name": record.name,
        "targets": {
            bench.title: {
                m.contestant.name: {"file": str(m.contestant.file.path), **m.readings, "verdict": m.verdict}
                for m in bench.measurements
            }
            for bench in record.benches
        },
        "ships": {bench.target: bench.ships for bench in record.benches if bench.ships},
        "not_measured": {bench.target: bench.not_measured for bench in record.benches if bench.not_measured},
        "warnings": {bench.title: bench.warnings for bench in record.benches if bench.warnings},
        "gates": [
            {"target": d.target, "gate": d.gate.words, "outcome": d.outcome, "why": d.reason} for d in record.gates
        ],
    }


def headline(record: Record) -> str:
    """What a person wants to know of a build: the comparison on every target, and the gates."""
    parts = [f"{b.title}: {unmeasured(b.not_measured)}" if b.not_measured else table(b) for b in record.benches]
    gates = [f"gate on {d.target}, {d.gate.words}: {d.outcome}, {d.reason}" for d in record.gates]
    return "\n\n".join([*parts, *filter(None, ["\n".join(gates)])])
