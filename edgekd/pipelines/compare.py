"""Train one student by many methods with the same budget and several seeds: the whole of `edgekd compare`."""

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
from edgekd.config import BuildConfig, check_at_least
from edgekd.core import plugins, serialization
from edgekd.core.dataset import PreparedDataset
from edgekd.core.method import Method
from edgekd.core.model import Model
from edgekd.core.step_cache import StepCache, code_key
from edgekd.core.target import Target
from edgekd.errors import ConfigError, TrainingError
from edgekd.methods.kd import KD
from edgekd.pipelines.build import (
    build_plan,
    build_probe,
    calibrate,
    dry_run_all,
    prepare_datasets,
    target_key,
    train_teachers,
)
from edgekd.pipelines.deploy import export_all, label_targets
from edgekd.pipelines.quantize import quantize_for_target
from edgekd.pipelines.run import BuildInputs, Run
from edgekd.stages.distill.dataset import export_test_inputs
from edgekd.stages.distill.evaluate import EvalResult, evaluate, evaluate_onnx
from edgekd.stages.distill.worker import TrainingRun, WorkerPool
from edgekd.stages.quantize.calibration_set import CalibrationSet
from edgekd.stages.report.method_comparison import Comparison, MethodRun, Teacher, publish, scored, summarize_methods
from edgekd.training.trained_model import TrainedModel

log = logging.getLogger(__name__)
PACKAGES = ("torch", "numpy")  # whose versions a result depends on


@dataclass(frozen=True)
class Entry:
    """A network that a method trains, under a label of its own."""

    label: str
    model: Model
    method: Method


@dataclass(frozen=True)
class TrainingInputs:
    """What all entries are trained and evaluated with."""

    dataset: PreparedDataset
    calibration: CalibrationSet
    teachers: tuple[TrainedModel, ...]


def compare(config: BuildConfig, out: Path, jobs: int, command: str) -> Comparison:
    """Train every entry with every seed, each in a process of its own; runs of an earlier comparison are used again.

    Writes compare.md, compare.json and compare.svg into `out`.

    Args:
        jobs: how many entries are trained at a time.
        command: the command that reproduces the comparison.

    Raises:
        EdgekdError: the subclass says what went wrong.
    """
    check_at_least(1, jobs=jobs)
    entries = list_entries(config)
    check_baseline(config, entries)
    if config.compare.int8:
        check_int8_target(config.targets[0])
    seeds = tuple(config.student.seed + n for n in range(config.compare.seeds))
    run = Run(config, StepCache(out / "steps"))
    with run.cache.locked():
        dataset, teacher_datasets = prepare_datasets(run)
        calibration = calibrate(run, dataset)
        dry_run_all(run, dataset, calibration, teacher_datasets, [(e.model, e.method) for e in entries])
        teachers = train_teachers(run, teacher_datasets)
        teacher_rows = []
        for t in teachers:
            evaluated = evaluate_trained(run, t, dataset)
            teacher_rows.append(Teacher(t.weights.name, evaluated.metrics, t.weights.parameters, evaluated.macs))
        rows = train_entries(run, TrainingInputs(dataset, calibration, teachers), entries, seeds, jobs)
        baseline = baseline_row(config, entries, list(rows))
        score = scored(rows[baseline][0].metrics)
        comparison = Comparison(
            name=config.name,
            edgekd=__version__,
            created=run.cache.latest,
            command=command,
            score=score,
            seeds=seeds,
            baseline=baseline,
            test=len(np.load(dataset.test.labels.path, mmap_mode="r")),
            results=summarize_methods(rows, baseline, score),
            teachers=tuple(teacher_rows),
            entries={
                e.label: {"model": serialization.to_json(e.model), "method": serialization.to_json(e.method)}
                for e in entries
            },
            config=serialization.to_json(config),
            versions={name: version(name) for name in PACKAGES},
            system=f"{platform.platform()}, Python {platform.python_version()}",
        )
        publish(comparison, out)
    return comparison


def apply_options(config: BuildConfig, names: Sequence[str], seeds: int | None, baseline: str | None) -> BuildConfig:
    """Return the configuration with what a command line says of its comparison; None and no names change nothing.

    Args:
        names: variants, or methods: with the settings that the configuration has for them, else with their defaults.

    Raises:
        ConfigError: for a name that is neither.
    """
    c = config.compare
    variants = {v.name: v for v in c.variants}
    if names:
        chosen = tuple(method for name in names if name not in variants for method in find_methods(name, config))
        c = replace(c, methods=chosen, variants=tuple(variants[name] for name in names if name in variants))
    seeds = c.seeds if seeds is None else seeds
    return replace(config, compare=replace(c, seeds=seeds, baseline=c.baseline if baseline is None else baseline))


def find_methods(name: str, config: BuildConfig) -> list[Method]:
    """Return the methods of a name: as the comparison lists them, else as the student's, else with their defaults."""
    for listed in (config.compare.methods or (), (config.student.method, *config.student.baselines)):
        if matching := [m for m in listed if plugins.name_of(m) == name]:
            return matching
    names = plugins.names("methods")
    if name not in names:
        variants = [v.name for v in config.compare.variants]
        raise plugins.unknown_name(f"there is no method and no variant `{name}`", name, [*variants, *names])
    try:
        return [serialization.from_json(Method, {"use": name})]  # type: ignore[type-abstract]
    except ConfigError as error:
        where = f"give them in a configuration: `compare: {{methods: [{{use: {name}, ...}}]}}`"
        raise ConfigError(
            f"`{name}` cannot be used with its defaults alone: {error.what}",
            hint=f"{error.hint}; {where}" if error.hint else where,
        ) from None


def list_entries(config: BuildConfig) -> tuple[Entry, ...]:
    """Return what is compared, each under a label of its own. Raise ConfigError if two have the same."""
    c, student = config.compare, config.student
    methods = (student.method, *student.baselines) if c.methods is None else c.methods
    entries = [Entry(label, student.model, m) for label, m in zip(labels(methods), methods, strict=True)]
    entries += [Entry(v.name, v.model or student.model, v.method) for v in c.variants]
    if not entries:
        raise ConfigError("compare has no entries", hint="name methods, such as `- {use: supervised}`")
    seen: set[str] = set()
    for entry in entries:
        if entry.label in seen:
            raise ConfigError(
                f"two entries are called `{entry.label}`",
                hint="keep one, or list one among compare.variants with another name",
            )
        seen.add(entry.label)
    return tuple(entries)


def labels(methods: Sequence[Method]) -> list[str]:
    """Return the methods' names, with the settings that differ where a method is there more than once."""
    names = [plugins.name_of(m) for m in methods]
    all_settings = [dict(flatten(serialization.to_json(m))) for m in methods]
    result = []
    for name, settings in zip(names, all_settings, strict=True):
        same_name = [s for n, s in zip(names, all_settings, strict=True) if n == name]
        differing = [key for key in settings if any(s.get(key) != settings[key] for s in same_name)]
        inside = [key.removesuffix("use") for key in differing if key.endswith(".use")]  # of other plug-ins
        shown = [k for k in differing if not any(k.startswith(above) and k != f"{above}use" for above in inside)]
        text = ", ".join(f"{key.removesuffix('.use')}={settings[key]}" for key in shown)
        result.append(f"{name}({text})" if text else name)
    return result


def flatten(settings: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Return dotted names and values as text; what is inside of another plug-in is named after it."""
    pairs: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            pairs += flatten(value, f"{above}{key}.")
        else:
            pairs.append((f"{above}{key}", value if isinstance(value, str) else json.dumps(value)))
    return pairs


def check_baseline(config: BuildConfig, entries: tuple[Entry, ...]) -> None:
    """Raise ConfigError unless the baseline is an entry, or one of an entry's students: `label/student`."""
    name = config.compare.baseline
    rows = [e.label + end for e in entries for end in ("", *[INT8] * config.compare.int8)]
    if name and name not in rows and name.removesuffix(INT8).rpartition("/")[0] not in rows:
        raise plugins.unknown_name(f"the baseline `{name}` is not among the entries", name, rows)


def baseline_row(config: BuildConfig, entries: tuple[Entry, ...], rows: list[str]) -> str:
    """Return the baseline's row; where none is named, that of plain distillation, or the first.

    Raises:
        ConfigError: if its entry made several students and it names none of them.
    """
    labels = [entry.label for entry in entries]
    usual = plugins.name_of(KD())
    name = config.compare.baseline or (usual if usual in labels else labels[0])
    if name not in rows:
        raise plugins.unknown_name(f"the baseline `{name}` is none of the trained students", name, rows)
    return name


def train_entries(
    run: Run, inputs: TrainingInputs, entries: tuple[Entry, ...], seeds: tuple[int, ...], jobs: int
) -> dict[str, tuple[MethodRun, ...]]:
    """Return the runs of every row, up to `jobs` trained at a time. One that fails ends all."""
    threads = max(1, torch.get_num_threads() // jobs)

    def prepare_thread() -> None:
        # what a thread starts inherits this: Ctrl-C is handled by the main thread, which ends the workers
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        torch.set_num_threads(threads)

    resource_tracker.ensure_running()  # of multiprocessing; started from a thread it would let Ctrl-C through there
    pool = ThreadPoolExecutor(jobs, initializer=prepare_thread)
    with WorkerPool(jobs, threads) as workers:
        # all entries with the first seed, then with the next: a mistake in the last entry shows early
        futures = {
            pool.submit(train_entry, run, inputs, entry, seed, workers): (entry, seed)
            for seed in seeds
            for entry in entries
        }
        try:
            for done, future in enumerate(as_completed(futures), 1):
                entry, seed = futures[future]
                text = ", ".join(f"{100 * (r.valid_accuracy or 0):.1f} %" for _, r in future.result())
                log.info("%s, seed %d: validation accuracy %s (%d of %d)", entry.label, seed, text, done, len(futures))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    pool.shutdown()
    rows: dict[str, list[MethodRun]] = {}
    for entry in entries:
        for future in (f for f, (e, _) in futures.items() if e is entry):
            for name, method_run in future.result():
                rows.setdefault(name, []).append(method_run)
    return {name: tuple(runs) for name, runs in rows.items()}


def train_entry(
    run: Run, inputs: TrainingInputs, entry: Entry, seed: int, workers: WorkerPool
) -> list[tuple[str, MethodRun]]:
    """Return the rows of one entry and seed: its students, each also as its INT8 file if the comparison wants that."""
    dataset = inputs.dataset
    name = re.sub(r"[^\w.=-]+", "-", entry.label).strip("-")  # part of a file's name
    probe = build_probe(run.config, entry.method, inputs.calibration)
    plan = build_plan(run.config, dataset, entry.method, seed)
    step = run.cache.depends_on(target_key(probe)).step
    try:
        training = step(
            f"train-{name}-seed{seed}",
            workers.distill,
            name,
            dataset,
            entry.model,
            entry.method,
            plan,
            inputs.teachers,
            probe,
        )
    except TrainingError as error:
        raise TrainingError(f"`{entry.label}`, seed {seed}: {error.what}", hint=error.hint) from None
    rows = []
    for t in training.students:
        row = entry.label + t.weights.name.removeprefix(name).replace("-", "/", 1)
        rows.append((row, make_run(t, training, seed, evaluate_trained(run, t, dataset, f"-seed{seed}"))))
        if run.config.compare.int8:
            evaluated = evaluate_int8(run, inputs, t, f"-seed{seed}")
            rows.append((f"{row}{INT8}", make_run(t, training, seed, evaluated)))
    return rows


def make_run(trained: TrainedModel, training: TrainingRun, seed: int, evaluated: EvalResult) -> MethodRun:
    """Return the record of one student."""
    w = trained.weights
    epochs = sum(phase.epochs for phase in w.phases)
    return MethodRun(
        seed=seed,
        metrics=evaluated.metrics,
        valid_accuracy=w.valid_accuracy,
        parameters=w.parameters,
        macs=evaluated.macs,
        sha256=w.file.sha256,
        notes=w.notes,
        epochs=epochs,
        epoch_seconds=w.seconds / max(epochs, 1),
        seconds=training.seconds,
        cpu_seconds=training.cpu_seconds,
        memory_bytes=training.memory_bytes,
        conditions=f"{training.processor}, threads: {training.threads}, trained at a time: {training.jobs}",
    )


INT8 = " int8"  # ends the name of a row that is of an INT8 file


def evaluate_trained(run: Run, trained: TrainedModel, dataset: PreparedDataset, suffix: str = "") -> EvalResult:
    """Return what the metrics say of a trained network on the test images."""
    cache = run.cache.depends_on(metrics_key())
    return cache.step(f"evaluate-{trained.weights.name}{suffix}", evaluate, trained, dataset, tuple(metrics_key()))


def check_int8_target(target: Target) -> None:
    """Raise ConfigError for a target whose INT8 files cannot be evaluated on this machine."""
    if "int8" not in target.deployment_plan.engines or target.scheme.format == "calibration_cache":
        raise ConfigError(
            f"compare.int8: no INT8 file is made for `{plugins.name_of(target)}`", hint="choose a target that has one"
        )


def evaluate_int8(run: Run, inputs: TrainingInputs, trained: TrainedModel, suffix: str) -> EvalResult:
    """Return what the metrics say of a network's INT8 file for the first target, in onnxruntime."""
    name, target = next(iter(label_targets(run.config.targets).items()))
    images = run.cache.step("test-inputs", export_test_inputs, inputs.dataset)
    build_inputs = BuildInputs(inputs.dataset, inputs.calibration, images, (trained,))
    exported = export_all(run, build_inputs, run.opset(target))
    files = quantize_for_target(run.on(name, target), build_inputs, exported).files
    (fp32,), (int8,) = exported.values(), files.values()
    step = run.cache.depends_on(metrics_key()).step
    name = f"evaluate-{trained.weights.name}{suffix}-int8"
    return step(name, evaluate_onnx, int8, fp32, images, inputs.dataset, tuple(metrics_key()))


def metrics_key() -> dict[str, object]:
    """Return the code of each metric."""
    return {name: code_key(plugins.modules("metrics")[name]) for name in plugins.names("metrics")}
