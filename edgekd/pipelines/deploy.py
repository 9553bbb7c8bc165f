"""From trained networks to one target: its INT8 files, the measurement, and the bundle for another machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from edgekd.config import BuildConfig
from edgekd.core import plugins
from edgekd.core.artifact import Exported, File, Weights, replace_files
from edgekd.core.bench_result import BenchmarkEntry, BenchResult, Role
from edgekd.core.dataset import Normalization
from edgekd.core.step_cache import code_key
from edgekd.core.target import Target
from edgekd.errors import ConfigError
from edgekd.pipelines.quantize import QuantizeResult, quantize_for_target
from edgekd.pipelines.run import BuildInputs, Run, TargetRun
from edgekd.stages.bench.benchmark import BenchmarkRequest, benchmark
from edgekd.stages.bench.cold_start import with_memory
from edgekd.stages.bench.config import BenchConfig, scenarios
from edgekd.stages.bench.gates import decisive
from edgekd.stages.bench.runner import runner_files
from edgekd.stages.bench.selection import select_model
from edgekd.stages.device import local, remote
from edgekd.stages.device.bundle import Bundle, BundleModel, BundleRequest, write_bundle
from edgekd.stages.device.results import RESULT, DeviceResult, build_bench_result, load_result, read_result
from edgekd.stages.device.ssh import Device, agent_path
from edgekd.stages.export.checkpoint import export_trained
from edgekd.utils import cpu

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeployOptions:
    """Options for deploying to other machines."""

    out: Path  # of the build: its folders `bundle-NAME` hold results
    bundles: bool  # write one for every target, not only for those that are measured elsewhere
    device: Device | None

    def results(self, name: str) -> Path:
        """Return the folder of the results that came back for a target."""
        return self.out / f"bundle-{name}" / "results"


@dataclass(frozen=True)
class TargetResult:
    """The result of deploying to one target."""

    bench: BenchResult  # the main table
    other_benches: tuple[BenchResult, ...]  # of the other scenarios
    int8: QuantizeResult
    bundle: Bundle | None


def label_targets(targets: tuple[Target, ...]) -> dict[str, Target]:
    """Return the targets by name, with their label where several have one name.

    Raises:
        ConfigError: if a target is there twice.
    """
    names = [plugins.name_of(t) for t in targets]
    labels = [f"{n}-{t.label}" if names.count(n) > 1 else n for n, t in zip(names, targets, strict=True)]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"a target is there twice: {', '.join(labels)}", hint="keep one, or give it other settings")
    return dict(zip(labels, targets, strict=True))


def export_all(run: Run, inputs: BuildInputs, opset: int) -> dict[str, Exported]:
    """Return the ONNX files of every network, by its name."""
    config, suffix = replace(run.config.export, opset=opset), run.opset_suffix(opset)
    return {
        t.weights.name: run.cache.step(f"export-{t.weights.name}{suffix}", export_trained, t, inputs.dataset, config)
        for t in inputs.networks
    }


def deploy(run: TargetRun, inputs: BuildInputs, exported: dict[str, Exported], options: DeployOptions) -> TargetResult:
    """Quantize the students of the chosen method for one target, and measure them, their teacher and the baselines.

    What cannot be measured here goes into a bundle, and to the device if there is one; a target whose runtime builds
    engines runs its bundle here. Results of the same bundle that are in the folder of the build already are used.
    """
    config, name, target = run.config, run.name, run.target
    for sentence in target.deployment_plan.instead:
        log.info("%s: %s", name, sentence)
    students = [t.weights for t in inputs.networks[1:]]
    chosen = [w.name for w in students if w.method == plugins.name_of(config.student.method)]
    int8 = quantize_for_target(run, inputs, {network: exported[network] for network in chosen})
    models = bundle_models(inputs, exported, int8, chosen)
    bundle, reason = None, target.unavailable_reason()
    has_results = (options.results(name) / RESULT).exists()
    if options.bundles or options.device or reason or builds_engines(target) or has_results:
        files = (inputs.calibration.images, inputs.inputs, inputs.dataset.test.labels, inputs.dataset.task)
        bare = replace(target, budget_ms=None)
        request = BundleRequest(config.name, name, bare, models, *files, config.bundle, config.bench)
        bundle = run.cache.depends_on(runner_files()).step(f"bundle-{name}", write_bundle, request)
    returned = bundle and fetch_or_run(run, bundle, options)
    if (returned or reason) and len(scenarios(config.bench)) > 1:
        log.warning("%s: bundles are timed with one image a call; other batches, scopes and loads are left out", name)
    if bundle and returned:
        bench = with_selection(read_bench(run, bundle, returned), target, students)
        return TargetResult(bench, (), int8, bundle)
    if reason:
        bench = not_measured_result(name, reason, target.deployment_plan.instead)
        return TargetResult(bench, (), int8, bundle)
    single = tuple(entry for model in models for entry in benchmark_entries(model))
    dynamic = {e.single.file: e.dynamic.file for e in (*exported.values(), *int8.files.values())}
    bench, *others = measure_here(run, inputs, single, dynamic)
    return TargetResult(with_selection(bench, target, students), tuple(others), int8, bundle)


def bundle_models(
    inputs: BuildInputs, exported: dict[str, Exported], int8: QuantizeResult, students: list[str]
) -> tuple[BundleModel, ...]:
    """Return every network with its files, the teacher first; those that are not among `students` are baselines."""
    models = []
    for trained in inputs.networks:
        name = trained.weights.name
        role: Role = "teacher" if trained is inputs.networks[0] else "student" if name in students else "baseline"
        models.append(
            BundleModel(
                name,
                role,
                trained.weights.method,
                trained.classes == inputs.dataset.classes,
                exported[name].single,
                int8.files[name].single if name in int8.files else None,
                int8.ranges.get(name),
            )
        )
    return tuple(models)


def measure_here(
    run: TargetRun, inputs: BuildInputs, single: tuple[BenchmarkEntry, ...], dynamic: dict[File, File]
) -> tuple[BenchResult, ...]:
    """Return the result of each scenario of the configuration, the main one first.

    Args:
        single: the files for calls with one image.
        dynamic: for each of these, the file for calls with several images.
    """
    dataset, bench, target = inputs.dataset, run.config.bench, replace(run.target, budget_ms=None)
    is_valid = partial(decisive, run.config.gates)
    cache = run.cache.depends_on(bench_key(target, bench), is_valid)
    # each scenario is a step of its own, which depends on what all of them have in common
    common = replace(bench, batches=(1,), scopes=("end_to_end",), rate=None, throughput=False)
    results = []
    for scenario in scenarios(bench):
        entries = single
        if scenario.batch > 1:
            entries = tuple(replace(entry, file=dynamic[entry.file]) for entry in single)
        request = BenchmarkRequest(
            entries,
            run.name,
            target,
            inputs.inputs,
            labels=dataset.test.labels if scenario.main else None,
            reference=next(entry.name for entry in entries if entry.role == "student"),
            config=common,
            scenario=scenario,
            normalize=Normalization(dataset.mean, dataset.std),
            task=dataset.task,
        )
        step = "-".join(filter(None, ("bench", run.name, scenario.slug)))
        results.append(cache.step(step, benchmark, request))
    cold = [r for scenario, r in zip(scenarios(bench), results, strict=True) if scenario.scope == "cold_start"]
    return (with_memory(results[0], cold[0]), *results[1:]) if cold else tuple(results)


def with_selection(bench: BenchResult, target: Target, students: Iterable[Weights]) -> BenchResult:
    """Return the result with the selected file: within the budget, the student of the best validation accuracy.

    A warning is logged where no file can be selected.
    """
    rows = [m.model.name for m in bench.measurements]
    accuracy = {row: w.valid_accuracy or 0.0 for row in rows for w in students if row.startswith(f"{w.name} ")}
    result = select_model(bench, target.budget_ms, accuracy)
    for warning in result.warnings[len(bench.warnings) :]:
        log.warning("%s: %s", bench.target, warning)
    return result


def adapt_to_device(run: Run, device: Device) -> BuildConfig:
    """Return the configuration with its target as the device needs it.

    Raises:
        ConfigError: if there is not exactly one target.
        EdgekdError: as `remote.probe` does.
    """
    targets = run.config.targets
    if len(targets) != 1:
        raise ConfigError(f"a device is for one target, here are {len(targets)}", hint="choose it with --target")
    info = run.cache.depends_on(File.of(agent_path())).step("device", remote.probe, device)
    return replace(run.config, targets=(targets[0].on(info.machine, info.flags),))


def builds_engines(target: Target) -> bool:
    """Return whether the target's runtime builds engines from ONNX files: it is measured by its bundle here, too."""
    return target.runtime == "tensorrt"


def fetch_or_run(run: TargetRun, bundle: Bundle, options: DeployOptions) -> DeviceResult | None:
    """Return the results of a bundle: from the device, the build's folder, or its run here; None without any."""
    home = options.results(run.name)
    if options.device:
        step = run.cache.depends_on(File.of(agent_path())).step
        returned = step(f"device-{run.name}", remote.measure, bundle, options.device)
        replace_files((*returned.arrays, returned.result), home)
        return returned
    if (home / RESULT).exists():
        if read_result(home / RESULT)["bundle"] == bundle.manifest.sha256:
            log.info("%s: measured elsewhere; the results are in `%s`", run.name, home)
            return load_result(home, bundle)
        log.info("%s: the results in `%s` are of an earlier bundle, and are not used", run.name, home)
    if builds_engines(run.target) and not run.target.unavailable_reason():
        return run.cache.depends_on(local.probe(bundle)).step(f"run-{run.name}", local.measure, bundle)
    return None


def read_bench(run: TargetRun, bundle: Bundle, returned: DeviceResult) -> BenchResult:
    """Return the measurements that came back with a bundle's results."""
    cache = run.cache.depends_on({"metrics": metrics_key(run.config.bench)})
    return cache.step(f"bench-{run.name}", build_bench_result, bundle, returned, run.config.bench)


def not_measured_result(name: str, reason: str, instead: tuple[str, ...]) -> BenchResult:
    """Return a result without numbers: the reason, and the commands that lead to them."""
    sentences = (
        f"not measured on device: {reason}",
        "With SSH: the same command with `--device ssh://user@host/folder`. Without: copy the folder "
        f"`bundle-{name}` to the device, type `sh run.sh` in it, bring its folder `results` back, and type "
        "`edgekd import-result results/result.json`",
        *instead,
    )
    return BenchResult(name, ". ".join(sentences), None, None, {}, None, (), (), None, started="", seconds=0.0)


def benchmark_entries(model: BundleModel) -> list[BenchmarkEntry]:
    """Return a network's entries: its FP32 file, then its INT8 file."""
    entries = []
    for file in filter(None, (model.fp32, model.int8)):
        facts = (model.role, model.method, file.precision, file.file, file.macs, file.parameters)
        name = f"{model.name} {file.precision}"
        entries.append(BenchmarkEntry(name, *facts, predicts_labels=model.predicts_labels))
    return entries


def metrics_key(config: BenchConfig) -> dict[str, object]:
    """Return what the numbers depend on beside the samples."""
    return {name: code_key(plugins.modules("metrics")[name]) for name in config.metrics}


def bench_key(target: Target, config: BenchConfig) -> dict[str, object]:
    """Return what a measurement depends on beside its arguments: processor, runtime, runner, metrics."""
    return {
        "runtime": version(target.runtime),
        "processor": cpu.name(),
        "runner": runner_files(),
        "metrics": metrics_key(config),
    }
