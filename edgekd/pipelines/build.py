"""The whole build, top to bottom. Read this file first."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import __version__
from edgekd.config import BuildConfig, unique_methods
from edgekd.core import plugins, serialization
from edgekd.core.artifact import Exported, File, Weights, replace_files
from edgekd.core.build_record import BuildRecord, DataFacts, Provenance, SelectedRanges
from edgekd.core.dataset import SPLITS, Normalization, PreparedDataset
from edgekd.core.method import Method
from edgekd.core.model import Model
from edgekd.core.step_cache import StepCache, code_key
from edgekd.errors import ConfigError
from edgekd.methods.supervised import Supervised
from edgekd.pipelines import unchanged
from edgekd.pipelines.build_result import build_result
from edgekd.pipelines.deploy import DeployOptions, TargetResult, adapt_to_device, deploy, export_all, label_targets
from edgekd.pipelines.run import BuildInputs, Run
from edgekd.pipelines.target_probe import BuildTargetProbe
from edgekd.stages.bench.gates import check, decide
from edgekd.stages.device.bundle import copy_bundle
from edgekd.stages.device.ssh import Device
from edgekd.stages.distill.dataset import export_test_inputs, prepare_dataset
from edgekd.stages.distill.distill import distill, load_pretrained, log_teacher_accuracy
from edgekd.stages.distill.setup import TrainingPlan, dry_run
from edgekd.stages.quantize.calibration_set import CalibrationSet, collect_calibration_set, user_file
from edgekd.stages.report.provenance import write_manifest
from edgekd.stages.report.publish import publish, rendered, templates
from edgekd.training.trained_model import TrainedModel
from edgekd.training.trainer import TrainConfig, resolve_precision

log = logging.getLogger(__name__)
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")  # whose versions a result depends on


def build(
    config: BuildConfig,
    out: Path,
    calib_root: Path,
    command: str,
    bundles: bool = False,
    device: Device | None = None,
    prune: bool = False,
    request: Mapping[str, Any] | None = None,
) -> BuildRecord:
    """Build INT8 students from a teacher, and measure them on every target; steps that did not change are not rerun.

    Args:
        config: what to build.
        out: the folder of the steps, the report, the artifacts and the bundles.
        calib_root: where the calibration set is copied to, in a folder of the build's name.
        command: the command that reproduces the build, for the report.
        bundles: write a bundle for every target, not only for those that this machine cannot run.
        device: where the only target is measured.
        prune: delete the steps of earlier builds that this one did not use.
        request: what `unchanged.load_unchanged` is asked, to recognise the next build of the same; None: it need not.

    Raises:
        EdgekdError: the subclass says what went wrong.
    """
    run = Run(config, StepCache(out / "steps"))
    options = DeployOptions(out, bundles, device)
    with run.cache.locked():
        unchanged.forget(out)
        if device:
            run = replace(run, config=adapt_to_device(run, device))  # before the hours of training
            config = run.config
        targets = label_targets(config.targets)
        check(config.gates, config.bench.metrics, targets, config.bench.scopes)
        dataset, teacher_datasets = prepare_datasets(run)
        test_inputs = run.cache.step("test-inputs", export_test_inputs, dataset)  # it is cheap, and may fail: early
        calibration = calibrate(run, dataset)
        replace_files((calibration.images, calibration.manifest), calib_root / config.name)
        dry_run_all(run, dataset, calibration, teacher_datasets, [(config.student.model, m) for m in methods(config)])
        teachers = train_teachers(run, teacher_datasets)
        students = train_students(run, dataset, calibration, teachers)
        inputs = BuildInputs(dataset, calibration, test_inputs, (teachers[0], *students))
        opsets = {run.opset(target) for target in config.targets}
        exported = {opset: export_all(run, inputs, opset) for opset in sorted(opsets)}
        results = {
            name: deploy(run.on(name, target), inputs, exported[run.opset(target)], options)
            for name, target in targets.items()
        }
        record = build_record(run, inputs, exported.values(), results, command)
        report = run.cache.depends_on(templates()).step("report", rendered, record)
        publish(report, out)
        for name, result in results.items():
            if result.bundle:
                log.info("bundle: %s", copy_bundle(result.bundle, out / f"bundle-{name}"))
        write_manifest(record, out, report.files, run.cache.written)
        if prune:
            run.cache.prune()
        if request is not None:
            unchanged.remember(run, request, build_result(record, out), calib_root / config.name)
    return record


def build_record(
    run: Run,
    inputs: BuildInputs,
    exported: Iterable[dict[str, Exported]],
    results: Mapping[str, TargetResult],
    command: str,
) -> BuildRecord:
    """Return what the report holds."""
    groups = (*exported, *(r.int8.files for r in results.values()))
    benches = tuple(bench for r in results.values() for bench in (r.bench, *r.other_benches))
    return BuildRecord(
        name=run.config.name,
        edgekd=__version__,
        created=run.cache.latest,
        command=command,
        config=serialization.to_json(run.config),
        data=data_facts(run.config, inputs.dataset),
        teacher=inputs.networks[0].weights,
        students=tuple(s.weights for s in inputs.networks[1:]),
        models=tuple(files.single for group in groups for files in group.values()),
        benches=benches,
        versions={name: version(name) for name in PACKAGES},
        step_seconds=dict(run.cache.seconds),
        gates=decide(run.config.gates, benches),
        pareto_fronts=tuple(front for r in results.values() for front in r.int8.pareto_fronts.values()),
        ranges=selected_ranges(results),
        provenance=build_provenance(run.cache, inputs.dataset, inputs.calibration),
    )


def selected_ranges(results: Mapping[str, TargetResult]) -> tuple[SelectedRanges, ...]:
    """Return how the ranges of every student were chosen, for every target."""
    return tuple(
        SelectedRanges(network, name, ranges.method, ranges.scores)
        for name, result in results.items()
        for network, ranges in result.int8.ranges.items()
    )


def distill_only(config: BuildConfig, out: Path) -> tuple[Weights, ...]:
    """Run the first half of `build`; return the teachers' weights, then those of every student."""
    run = Run(config, StepCache(out / "steps"))
    with run.cache.locked():
        dataset, teacher_datasets = prepare_datasets(run)
        calibration = calibrate(run, dataset)
        dry_run_all(run, dataset, calibration, teacher_datasets, [(config.student.model, m) for m in methods(config)])
        teachers = train_teachers(run, teacher_datasets)
        students = train_students(run, dataset, calibration, teachers)
        return tuple(t.weights for t in (*teachers, *students))


def prepare_datasets(run: Run) -> tuple[PreparedDataset, tuple[PreparedDataset, ...]]:
    """Return the student's data set, and that of each teacher. All inputs are normalized as the first teacher's are."""
    config = run.config
    limit, normalize = config.images_per_class, config.normalize
    sources = [t.data for t in (config.teacher, *config.extra_teachers)]
    prepared = []
    for name, source in zip(teacher_names(config), sources, strict=True):
        if source is not None:
            prepared.append(run.cache.step(f"data-{name}", prepare_dataset, source, limit, normalize, config.task))
            normalize = normalize or Normalization(prepared[0].mean, prepared[0].std)
    dataset = run.cache.step("data", prepare_dataset, config.data, limit, normalize, config.task)
    teacher_datasets = iter(prepared)
    return dataset, tuple(dataset if source is None else next(teacher_datasets) for source in sources)


def dry_run_all(
    run: Run,
    dataset: PreparedDataset,
    calibration: CalibrationSet,
    teacher_datasets: tuple[PreparedDataset, ...],
    entries: Iterable[tuple[Model, Method]],
) -> None:
    """Start every method with untrained networks.

    Raises:
        ConfigError: if a network and a method do not fit; before any training.
    """
    config = run.config
    teacher_specs = tuple(
        (c.model, ("",) * c.num_classes if c.checkpoint and c.num_classes else data.classes)
        for c, data in zip((config.teacher, *config.extra_teachers), teacher_datasets, strict=True)
    )
    for model, method in entries:
        plan = build_plan(config, dataset, method, config.student.seed)
        probe = build_probe(config, method, calibration)
        cache = run.cache.depends_on(target_key(probe))
        cache.step(f"dry-run-{plugins.name_of(method)}", dry_run, dataset, model, method, plan, teacher_specs, probe)


def teacher_names(config: BuildConfig) -> list[str]:
    """Return the names of the teachers in steps: teacher, teacher2, ..."""
    return ["teacher", *(f"teacher{n}" for n in range(2, 2 + len(config.extra_teachers)))]


def calibrate(run: Run, dataset: PreparedDataset) -> CalibrationSet:
    """Return the images that INT8 ranges are calibrated with."""
    config = run.config
    cache = run.cache.depends_on(user_file(config.calibration))
    return cache.step("calibration", collect_calibration_set, dataset, config.calibration, plugins.name_of(config.data))


def train_teachers(run: Run, datasets: tuple[PreparedDataset, ...]) -> tuple[TrainedModel, ...]:
    """Return the teachers, each from its checkpoint, or trained here on the labels of its data set."""
    config = run.config
    trained: list[TrainedModel] = []
    teachers = (config.teacher, *config.extra_teachers)
    for name, c, dataset in zip(teacher_names(config), teachers, datasets, strict=True):
        if c.checkpoint:
            path = Path(c.checkpoint)
            if not path.is_file():
                raise ConfigError(f"{name}.checkpoint: there is no file `{path}`", hint="check the path")
            source = (File.of(path), c.allow_pickle, c.num_classes)
            trained.append(run.cache.step(name, load_pretrained, name, dataset, c.model, *source))
            log_teacher_accuracy(trained[-1], dataset)
            continue
        augment = (c.data or config.data).augment
        train = resolve_train_config(c.train)
        plan = TrainingPlan(c.epochs, train, augment, c.seed, train_on_validation=c.train_on_validation)
        trained += run.cache.step(name, distill, name, dataset, c.model, Supervised(), plan, ())
    return tuple(trained)


def train_students(
    run: Run, dataset: PreparedDataset, calibration: CalibrationSet, teachers: tuple[TrainedModel, ...]
) -> tuple[TrainedModel, ...]:
    """Return the students of the chosen method, then the baselines."""
    config = run.config
    trained: list[TrainedModel] = []
    for method in methods(config):
        name, probe = plugins.name_of(method), build_probe(config, method, calibration)
        plan = build_plan(config, dataset, method, config.student.seed)
        step = run.cache.depends_on(target_key(probe)).step
        trained += step(f"distill-{name}", distill, name, dataset, config.student.model, method, plan, teachers, probe)
    return tuple(trained)


def methods(config: BuildConfig) -> list[Method]:
    """Return the chosen method, then the baselines; one without a teacher is always among them."""
    return unique_methods((config.student.method, *config.student.baselines, Supervised()))


def build_plan(config: BuildConfig, dataset: PreparedDataset, method: Method, seed: int) -> TrainingPlan:
    """Return how a student is trained: every method sees the same number of images."""
    c = config.student
    images = (c.labels_per_class, c.unlabelled, c.labelled_fraction)
    plan = TrainingPlan(c.epochs, resolve_train_config(c.train), config.data.augment, seed, *images)
    return plan.labelled(dataset.num_strata) if method.LABELS_ONLY else plan


def build_probe(config: BuildConfig, method: Method, calibration: CalibrationSet) -> BuildTargetProbe | None:
    """Return what measures latencies on the first target, for a method that needs it."""
    return (
        BuildTargetProbe(config.targets[0], calibration, config.export, config.quantize)
        if method.needs_target
        else None
    )


def target_key(probe: BuildTargetProbe | None) -> dict[str, object] | None:
    """Return what training depends on that needs the target: no method imports the code that makes INT8 files."""
    return {"code": code_key(BuildTargetProbe.__module__), "scheme": probe.target.scheme} if probe else None


def resolve_train_config(config: TrainConfig) -> TrainConfig:
    """Return the settings with the precision that `auto` means on this machine, so that the cache is keyed by it."""
    return replace(config, precision=resolve_precision(config.precision))


def data_facts(config: BuildConfig, dataset: PreparedDataset) -> DataFacts:
    """Return what the report says of the data."""
    counts = {name: len(np.load(getattr(dataset, name).labels.path, mmap_mode="r")) for name in SPLITS}
    few = config.student.labels_per_class
    labelled = counts["train"] if few is None else few * dataset.num_strata
    return DataFacts(
        source=plugins.name_of(config.data),
        classes=dataset.classes,
        shape=dataset.shape,
        student_train=labelled,
        calibration=config.calibration.images,
        **counts,
    )


def build_provenance(cache: StepCache, dataset: PreparedDataset, calibration: CalibrationSet) -> Provenance:
    """Return the hashes of what the build was made from."""
    arrays = [file for name in SPLITS for file in (getattr(dataset, name).images, getattr(dataset, name).labels)]
    entries = cache.entries
    return Provenance(
        data={file.path.name: file.sha256 for file in arrays},
        calibration={file.path.name: file.sha256 for file in (calibration.images, calibration.manifest)},
        code={name: entry["code"]["sha256"] for name, entry in entries.items()},
        systems=tuple(sorted({", ".join(entry["machine"].values()) for entry in entries.values()})),
    )
