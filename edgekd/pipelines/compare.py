"""Teach one student by many methods with the same budget and several seeds: the whole of `edgekd compare`."""

from __future__ import annotations

import json
import logging
import platform
import re
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd import __version__
from edgekd.config import BuildConfig, at_least
from edgekd.core import plugins, serialization
from edgekd.core.artifact import File
from edgekd.core.dataset import Task
from edgekd.core.method import Method
from edgekd.core.model import Model
from edgekd.core.step_cache import Ledger, code
from edgekd.core.target import Target
from edgekd.errors import ConfigError, TrainingError
from edgekd.methods.kd import KD
from edgekd.pipelines.build import calibration, course, drawn_from, pricing, rehearse_all, tasks, teach
from edgekd.pipelines.deploy import export_all, named
from edgekd.pipelines.quantize import Material, quantized, readable
from edgekd.stages.distill.dataset import exam
from edgekd.stages.distill.evaluate import Graded, grade, grade_file
from edgekd.stages.distill.worker import Classroom, Taught
from edgekd.stages.quantize.calibration_set import CalibrationSet
from edgekd.stages.report.method_comparison import Comparison, Run, Teacher, publish, scored, standings
from edgekd.training.trained_model import Trained

log = logging.getLogger(__name__)
PACKAGES = ("torch", "numpy")  # whose versions a result depends on


@dataclass(frozen=True)
class Contender:
    label: str
    model: Model
    method: Method


def compare(config: BuildConfig, out: Path, jobs: int, command: str) -> Comparison:
    """Every contender with every seed, each in a process of its own; what was done before is not done again.

    Writes compare.md, compare.json and compare.svg into `out`. Raises EdgekdError.
    """
    at_least(1, jobs=jobs)
    entries = contenders(config)
    check_baseline(config, entries)
    if config.compare.int8:
        runs_int8(config.targets[0])
    seeds = tuple(config.student.seed + n for n in range(config.compare.seeds))
    ledger = Ledger(out / "steps")
    with ledger.locked():
        task, taught = tasks(ledger, config)
        calib = calibration(ledger, config, task)
        rehearse_all(ledger, config, task, calib, taught, [(e.model, e.method) for e in entries])
        teachers = teach(ledger, config, taught)
        known = tuple(
            Teacher(t.weights.name, g.readings, t.weights.parameters, g.macs)
            for t in teachers
            for g in [graded(ledger, t, task)]
        )
        rows = contest(ledger, config, task, calib, teachers, entries, seeds, jobs)
        baseline = baseline_row(config, entries, list(rows))
        score = scored(rows[baseline][0].readings)
        made = Comparison(
            name=config.name,
            edgekd=__version__,
            created=ledger.latest,
            command=command,
            score=score,
            seeds=seeds,
            baseline=baseline,
            test=len(np.load(task.test.labels.path, mmap_mode="r")),
            standings=standings(rows, baseline, score),
            teachers=known,
            contenders={
                e.label: {"model": serialization.dump(e.model), "method": serialization.dump(e.method)} for e in entries
            },
            config=serialization.dump(config),
            versions={name: version(name) for name in PACKAGES},
            system=f"{platform.platform()}, Python {platform.python_version()}",
        )
        publish(made, out)
    return made


def entered(config: BuildConfig, names: Sequence[str], seeds: int | None, baseline: str | None) -> BuildConfig:
    """The configuration with what a command line says of its comparison; None and no names leave it as it is.

    Each name is a rival, a method with the settings that the configuration has for it, or a method with its defaults.
    Raises ConfigError for a name that is none of these.
    """
    c = config.compare
    rivals = {r.name: r for r in c.rivals}
    if names:
        methods = tuple(m for name in names if name not in rivals for m in called(name, config))
        c = replace(c, methods=methods, rivals=tuple(rivals[name] for name in names if name in rivals))
    return replace(
        config,
        compare=replace(
            c,
            seeds=c.seeds if seeds is None else seeds,
            baseline=c.baseline if baseline is None else baseline,
        ),
    )


def called(name: str, config: BuildConfig) -> list[Method]:
    """The methods of that name: as the comparison lists them, else as the student's, else with their defaults."""
    for listed in (config.compare.methods or (), (config.student.method, *config.student.baselines)):
        if found := [m for m in listed if plugins.name_of(m) == name]:
            return found
    known = plugins.names("methods")
    if name not in known:
        rivals = [r.name for r in config.compare.rivals]
        raise plugins.unknown(f"there is no method and no rival `{name}`", name, [*rivals, *known])
    try:
        return [serialization.load(Method, {"use": name})]  # type: ignore[type-abstract]
    except ConfigError as error:
        where = f"give them in a configuration: `compare: {{methods: [{{use: {name}, ...}}]}}`"
        raise ConfigError(
            f"`{name}` cannot be used with its defaults alone: {error.what}",
            hint=f"{error.hint}; {where}" if error.hint else where,
        ) from None


def contenders(config: BuildConfig) -> tuple[Contender, ...]:
    """Who is compared, each under a label of its own. Raises ConfigError if two have the same."""
    c, student = config.compare, config.student
    methods = (student.method, *student.baselines) if c.methods is None else c.methods
    entries = [Contender(label, student.model, m) for label, m in zip(labels(methods), methods, strict=True)]
    entries += [Contender(r.name, r.model or student.model, r.method) for r in c.rivals]
    if not entries:
        raise ConfigError("compare has no contenders", hint="name methods, such as `- {use: supervised}`")
    seen: set[str] = set()
    for entry in entries:
        if entry.label in seen:
            raise ConfigError(
                f"two contenders are called `{entry.label}`",
                hint="keep one, or list one among compare.rivals with another name",
            )
        seen.add(entry.label)
    return tuple(entries)


def labels(methods: Sequence[Method]) -> list[str]:
    """Their names; with the settings that tell them apart where a method is there more than once."""
    names = [plugins.name_of(m) for m in methods]
    settings = [dict(flat(serialization.dump(m))) for m in methods]
    found = []
    for name, mine in zip(names, settings, strict=True):
        like = [s for n, s in zip(names, settings, strict=True) if n == name]
        differing = [key for key in mine if any(s.get(key) != mine[key] for s in like)]
        inside = [key.removesuffix("use") for key in differing if key.endswith(".use")]  # of other plug-ins
        telling = [k for k in differing if not any(k.startswith(above) and k != f"{above}use" for above in inside)]
        told = ", ".join(f"{key.removesuffix('.use')}={mine[key]}" for key in telling)
        found.append(f"{name}({told})" if told else name)
    return found


def flat(settings: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Dotted names and values as text; what is inside of another plug-in is named after it."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += flat(value, f"{above}{key}.")
        else:
            found.append((f"{above}{key}", value if isinstance(value, str) else json.dumps(value)))
    return found


def check_baseline(config: BuildConfig, entries: tuple[Contender, ...]) -> None:
    """Raises ConfigError unless the baseline is a contender, or one of a contender's students: `label/student`."""
    name = config.compare.baseline
    known = [e.label + end for e in entries for end in ("", *[INT8] * config.compare.int8)]
    if name and name not in known and name.removesuffix(INT8).rpartition("/")[0] not in known:
        raise plugins.unknown(f"the baseline `{name}` is not among the contenders", name, known)


def baseline_row(config: BuildConfig, entries: tuple[Contender, ...], rows: list[str]) -> str:
    """Its row; where none is named, that of plain distillation, or the first.

    Raises ConfigError if its contender made several students and none of them is meant.
    """
    labels = [entry.label for entry in entries]
    usual = plugins.name_of(KD())
    name = config.compare.baseline or (usual if usual in labels else labels[0])
    if name not in rows:
        raise plugins.unknown(f"the baseline `{name}` is none of the students that were taught", name, rows)
    return name


def contest(
    ledger: Ledger,
    config: BuildConfig,
    task: Task,
    calib: CalibrationSet,
    teachers: tuple[Trained, ...],
    entries: tuple[Contender, ...],
    seeds: tuple[int, ...],
    jobs: int,
) -> dict[str, tuple[Run, ...]]:
    """The runs of every row, up to `jobs` lessons at a time. One that fails ends all: the others go on next time."""
    threads = max(1, torch.get_num_threads() // jobs)

    def prepare_thread() -> None:
        # what a thread starts inherits this: Ctrl-C is heard by the main thread, which ends the lessons
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        torch.set_num_threads(threads)

    def one(entry: Contender, seed: int) -> list[tuple[str, Run]]:
        name = re.sub(r"[^\w.=-]+", "-", entry.label).strip("-")  # part of a file's name
        price = pricing(config, entry.method, calib)
        try:
            taught = ledger.given(drawn_from(price)).step(
                f"lesson-{name}-seed{seed}",
                Taught,
                room.teach,
                name,
                task,
                entry.model,
                entry.method,
                course(config, task, entry.method, seed),
                teachers,
                price,
            )
        except TrainingError as error:
            raise TrainingError(f"`{entry.label}`, seed {seed}: {error.what}", hint=error.hint) from None
        rows = []
        for t in taught.students:
            row = entry.label + t.weights.name.removeprefix(name).replace("-", "/", 1)
            rows.append((row, run(t, taught, seed, graded(ledger, t, task, f"-seed{seed}"))))
            if config.compare.int8:
                grades = graded_int8(ledger, config, task, calib, t, f"-seed{seed}")
                rows.append((f"{row}{INT8}", run(t, taught, seed, grades)))
        return rows

    resource_tracker.ensure_running()  # of multiprocessing; started from a thread it would let Ctrl-C through there
    pool = ThreadPoolExecutor(jobs, initializer=prepare_thread)
    with Classroom(jobs, threads) as room:
        # all contenders once, then again: a mistake in the last of them shows early
        futures = {pool.submit(one, entry, seed): (entry, seed) for seed in seeds for entry in entries}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                entry, seed = futures[future]
                told = ", ".join(f"{100 * (r.valid_accuracy or 0):.1f} %" for _, r in future.result())
                log.info("%s, seed %d: validation accuracy %s (%d of %d)", entry.label, seed, told, done, len(futures))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    pool.shutdown()
    rows: dict[str, list[Run]] = {}
    for entry in entries:
        for future in (f for f, (e, _) in futures.items() if e is entry):
            for name, made in future.result():
                rows.setdefault(name, []).append(made)
    return {name: tuple(runs) for name, runs in rows.items()}


def run(trained: Trained, taught: Taught, seed: int, grades: Graded) -> Run:
    """One student's record."""
    w = trained.weights
    epochs = sum(phase.epochs for phase in w.phases)
    return Run(
        seed=seed,
        readings=grades.readings,
        valid_accuracy=w.valid_accuracy,
        parameters=w.parameters,
        macs=grades.macs,
        sha256=w.file.sha256,
        notes=w.notes,
        epochs=epochs,
        epoch_seconds=w.seconds / max(epochs, 1),
        seconds=taught.seconds,
        cpu_seconds=taught.cpu_seconds,
        memory_bytes=taught.memory_bytes,
        conditions=f"{taught.processor}, threads: {taught.threads}, lessons at a time: {taught.jobs}",
    )


INT8 = " int8"  # ends the name of a row that is of an INT8 file


def graded(ledger: Ledger, trained: Trained, task: Task, suffix: str = "") -> Graded:
    known = ledger.given(metrics())
    return known.step(f"grade-{trained.weights.name}{suffix}", Graded, grade, trained, task, tuple(metrics()))


def runs_int8(target: Target) -> None:
    """Raises ConfigError for a target of which no INT8 file can be marked on this machine."""
    if "int8" not in target.delivery.engines or target.dialect.form == "cache":
        raise ConfigError(
            f"compare.int8: no INT8 file is made for `{plugins.name_of(target)}`", hint="choose a target that has one"
        )


def graded_int8(
    ledger: Ledger, config: BuildConfig, task: Task, calib: CalibrationSet, trained: Trained, suffix: str
) -> Graded:
    """As the INT8 file for the first target answers, in onnxruntime; all that `config.quantize` says of it is done."""
    name, target = next(iter(named(config.targets).items()))
    inputs = ledger.step("exam", File, exam, task)
    material = Material(task, calib, inputs, (trained,))
    exported = export_all(ledger, config, material, readable(config, target))
    files = quantized(ledger, config, name, target, material, exported).files
    (fp32,), (int8,) = exported.values(), files.values()
    known = ledger.given(metrics())
    step = f"grade-{trained.weights.name}{suffix}-int8"
    return known.step(step, Graded, grade_file, int8, fp32, inputs, task, tuple(metrics()))


def metrics() -> dict[str, object]:
    """The code of each: marks depend on it."""
    return {name: code(plugins.places("metrics")[name]) for name in plugins.names("metrics")}
