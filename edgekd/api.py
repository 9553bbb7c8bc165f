"""What `import edgekd` offers: nine functions on live networks, arrays and files, and the classes to extend it with.

    student = edgekd.distill(student, teacher, train=(images, labels), method=edgekd.methods.KD(), epochs=40)
    onnx = edgekd.export(student, "student.onnx", images=inputs)
    int8 = edgekd.quantize(onnx, "student.int8.onnx", calibration=inputs, target="cpu")
    print(edgekd.benchmark([onnx, int8], images=inputs, labels=labels))

Everything else in the package is private. The command line calls these functions.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from edgekd import _environment
from edgekd.core.config_file import ConfigSource

if TYPE_CHECKING:
    import numpy as np
    from torch import nn
    from torch.utils.data import Dataset as TorchDataset

    from edgekd.config import BuildConfig
    from edgekd.core.artifact import OnnxModel, PhaseRecord
    from edgekd.core.augment import Augment
    from edgekd.core.bench_result import BenchResult
    from edgekd.core.method import Method
    from edgekd.pipelines.build_result import BuildResult
    from edgekd.stages.explain.result import Explanation
    from edgekd.stages.lint.lint import Verdict
    from edgekd.stages.quantize.calibration_cache import CalibrationCache
    from edgekd.stages.report.method_comparison import Comparison
    from edgekd.training.trainer import TrainConfig

    Array: TypeAlias = "np.ndarray | Path | str"  # numbers, or an .npz or .npy file of them
    Samples: TypeAlias = "tuple[np.ndarray, np.ndarray] | TorchDataset[Any]"  # images and targets

_environment.prepare()

T = TypeVar("T")
CLASSES = {  # of the interfaces that are offered here, loaded when they are used
    "Batch": "edgekd.core.method",
    "BuildConfig": "edgekd.config",
    "BuildResult": "edgekd.pipelines.build_result",
    "Dataset": "edgekd.core.dataset",
    "EdgekdError": "edgekd.errors",
    "Method": "edgekd.core.method",
    "Phase": "edgekd.core.method",
    "Target": "edgekd.core.target",
    "Task": "edgekd.core.task",
    "TrainingContext": "edgekd.core.method",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in CLASSES:
        return getattr(import_module(CLASSES[name]), name)
    raise AttributeError(f"module 'edgekd.api' has no attribute '{name}'")


@dataclass(frozen=True, repr=False)
class Result(Generic[T]):
    """What a function found out. It prints as the command line does; as a path it is the file that was written."""

    value: T  # all the facts
    data: Any
    text: str
    path: Path | None = None

    def to_dict(self) -> Any:
        """Return the facts as plain JSON."""
        return self.data

    def __fspath__(self) -> str:
        if self.path is None:
            raise TypeError(f"{type(self.value).__name__} is not a file")
        return str(self.path)

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


Model: TypeAlias = "Result[OnnxModel] | Result[OnnxModel | CalibrationCache] | Path | str"  # an ONNX file


@dataclass(frozen=True, repr=False)
class DistilledModel:
    """A trained student, and how it was trained."""

    network: nn.Module
    valid_accuracy: float | None  # 0 to 1
    phases: tuple[PhaseRecord, ...]
    students: Mapping[str, nn.Module]  # all that the method trained, by name; `network` is the first of them

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain JSON."""
        from edgekd.core import serialization

        parameters = sum(p.numel() for p in self.network.parameters())
        phases = serialization.to_json(self.phases)
        return {"valid_accuracy": self.valid_accuracy, "parameters": parameters, "phases": phases}

    def __str__(self) -> str:
        facts = self.to_dict()
        accuracy = "unknown" if self.valid_accuracy is None else f"{100 * self.valid_accuracy:.1f} %"
        epochs = sum(phase.epochs for phase in self.phases)
        name = type(self.network).__name__
        return f"{name}: validation accuracy {accuracy}, {facts['parameters']:,} parameters, {epochs} epochs"

    __repr__ = __str__


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] = (),
    *,
    train: Samples,
    valid: Samples | None = None,
    method: Method | None = None,
    epochs: int = 40,
    config: TrainConfig | None = None,
    augment: Augment | None = None,
) -> DistilledModel:
    """Train a student with the help of a teacher.

    Both networks stay as they are; the student's weights are where training starts.

    Args:
        student: maps (N, C, H, W) float32 to class logits (N, K), or to maps (N, K, H, W).
        teacher: one network, or several for a method that learns from several.
        train: images and targets: arrays, or a torch Dataset of such pairs. Images are (N, C, H, W) float32 as the
            networks take them, or (N, H, W, C) uint8, which are scaled to mean 0 and deviation 1 per channel. Targets
            are class numbers (N,), -1 where unknown; or maps (N, K, H, W) float32, NaN where unknown.
        valid: the same, to choose with; None: a tenth of `train` is kept for it.
        method: such as `edgekd.methods.KPN()`; None: `edgekd.methods.KD()`, or supervised training without a teacher.
        epochs: what the method may use.
        config: batch size, learning rate, precision; None: the defaults of `TrainConfig`.
        augment: random changes to training images; None: no changes.

    Raises:
        ConfigError: if the method does not fit the networks.
        DataError: if the data do not fit each other.
    """
    from edgekd.pipelines.in_memory import distill_in_memory

    teachers = (teacher,) if not isinstance(teacher, Sequence) else tuple(teacher)
    trained, networks = distill_in_memory(student, teachers, train, valid, method, epochs, config, augment)
    weights = trained[0].weights
    return DistilledModel(networks[weights.name], weights.valid_accuracy, weights.phases, networks)


def export(
    network: nn.Module | DistilledModel,
    out: Path | str,
    *,
    images: Array,
    opset: int | None = None,
    jetpack: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Result[OnnxModel]:
    """Write a network as an ONNX file for batch 1, once onnxruntime answers as torch does.

    Args:
        network: a torch module, or what `distill` returned.
        out: the file to write, `*.onnx`.
        images: real network inputs to compare with, (N, C, H, W) float32.
        opset: of ai.onnx; None: 20, or what the JetPack reads.
        jetpack: of the device, instead of an opset.
        metadata: written into the file.

    Raises:
        ExportError: if the network cannot be exported.
        ParityError: if the file answers otherwise than torch.
    """
    from edgekd.core.artifact import File
    from edgekd.stages.export.checkpoint import check_onnx_name, load_images, opset_for
    from edgekd.stages.export.export import ExportConfig
    from edgekd.stages.export.export import export as export_network

    out = check_onnx_name(Path(out))
    module = network.network if isinstance(network, DistilledModel) else network
    config = ExportConfig(opset=opset_for(opset, jetpack))
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".edgekd-", dir=out.parent) as folder:  # beside it: a rename, not a copy
        inputs = load_images(Path(images)) if isinstance(images, (str, Path)) else images
        onnx = export_network(Path(folder), out.stem, module, inputs, None, config, metadata).single
        onnx.file.path.replace(out)
    return _file_result(replace(onnx, file=File.of(out)))


def quantize(
    model: Model,
    out: Path | str,
    *,
    calibration: Array,
    target: str | None = None,
    scheme: str | None = None,
    jetpack: str | None = None,
    **settings: Any,
) -> Result[OnnxModel | CalibrationCache]:
    """Quantize an FP32 ONNX file of any origin to INT8.

    Args:
        model: the FP32 file.
        out: the file to write: ONNX, or a calibration cache for the scheme `dla`.
        calibration: network inputs, (N, C, H, W) float32.
        target: whose INT8 scheme is used; None: `cpu`.
        scheme: the scheme itself, instead of a target: ort-x86, ort-arm, openvino, tensorrt, dla.
        jetpack: of the device, for a calibration cache.
        settings: fields of `quantize` in a configuration: method, keep_float, bias_correction, ...

    Raises:
        ModelError: if the file cannot be quantized.
        DataError: if the calibration inputs do not fit.
    """
    from edgekd.stages.quantize.file_api import SchemeChoice, quantize_by_name

    (path,) = _onnx_paths(model)
    with _as_file(calibration) as inputs:
        choice = SchemeChoice(target, scheme, jetpack)
        return _file_result(quantize_by_name(path, inputs, Path(out), choice, settings))


def benchmark(
    models: Sequence[Model],
    *,
    target: str = "cpu",
    images: Array | None = None,
    labels: Array | None = None,
    threads: int | Sequence[int] = 1,
    out: Path | str | None = None,
    smoke: bool = False,
    **settings: Any,
) -> Result[tuple[BenchResult, ...]]:
    """Compare the latency of ONNX files on one target, and their accuracy if there are labels.

    Args:
        models: the files; the others are compared with the first.
        target: where they run.
        images: network inputs, (N, C, H, W) float32; None: noise.
        labels: their classes, (N,); None: only latency is measured.
        threads: of the runtime; several for a table each.
        out: where raw samples are kept; None: nowhere.
        smoke: a few calls only; the numbers mean nothing.
        settings: fields of `bench` in a configuration: rounds, batches, scopes, rate, throughput, ...

    Raises:
        TargetUnavailable: if this machine cannot run the target.
    """
    from edgekd.core import serialization
    from edgekd.core.step_cache import StepCache
    from edgekd.stages.bench.compare_files import FileComparison, compare_all, smoke_config, table
    from edgekd.stages.bench.config import BenchConfig

    paths = _onnx_paths(*models)
    config: BenchConfig = serialization.from_json(BenchConfig, settings)
    counts = (threads,) if isinstance(threads, int) else tuple(threads)
    with _folder(out) as folder, _as_file(images) as inputs, _as_file(labels) as truth, StepCache(folder).locked():
        comparison = FileComparison(paths, target, smoke_config(config) if smoke else config, inputs, truth)
        results = compare_all(folder, comparison, counts)
        data = [serialization.to_json(result) for result in results]
        return Result(results, data[0] if len(data) == 1 else data, "\n\n".join(map(table, results)))


def explain(
    model: Model,
    reference: Model | None = None,
    *,
    images: Array | None = None,
    target: str = "cpu",
    jetpack: str | None = None,
    threads: int = 1,
) -> Result[Explanation]:
    """Explain why an INT8 file is not faster, or not accurate, and name the setting to change.

    Args:
        model: the INT8 file, of edgekd or of another tool.
        reference: the FP32 file that it was made from.
        images: network inputs, (N, C, H, W) float32; None: noise, and accuracy is not judged.
        target: cpu, openvino or jetson.
        jetpack: of the target jetson; None: 6.2.
        threads: of the runtime.
    """
    from edgekd.stages.explain.explain import explain as explain_file
    from edgekd.stages.explain.result import as_json, format_explanation

    path, *fp32 = _onnx_paths(*filter(None, (model, reference)))
    with _as_file(images) as inputs:
        explanation = explain_file(path, fp32[0] if fp32 else None, inputs, target, jetpack, threads)
    return Result(explanation, as_json(explanation), format_explanation(explanation))


def lint(model: Model, jetpack: str) -> Result[Verdict]:
    """Find what TensorRT of a JetPack will refuse in an ONNX file, or run slowly, with the fix."""
    from edgekd.stages.lint.lint import as_json, format_verdict
    from edgekd.stages.lint.lint import lint as lint_file

    (path,) = _onnx_paths(model)
    verdict = lint_file(path, jetpack)
    return Result(verdict, as_json(verdict), format_verdict(verdict))


def load_config(
    source: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    targets: Sequence[str] = (),
    smoke: bool = False,
) -> BuildConfig:
    """Load a configuration.

    Args:
        source: the name of a recipe, or a YAML file.
        overrides: single values: `{"student.epochs": 20}`, or `["student.epochs=20"]` in YAML.
        targets: device families, instead of those of the configuration.
        smoke: shrink everything, so that a build takes seconds; its numbers mean nothing.

    Raises:
        ConfigError: with every mistake at once.
    """
    from edgekd.config import load_source

    return load_source(ConfigSource.of(source, overrides, targets=tuple(targets), smoke=smoke))


def build(
    config: BuildConfig | ConfigSource | str | Path,
    *,
    out: Path | str | None = None,
    calib_root: Path | str = Path("calib_data"),
    bundles: bool = False,
    device: str | None = None,
    lock_clocks: bool = False,
    prune: bool = False,
) -> BuildResult:
    """Build INT8 students from a teacher, measure them on every target, and write the report.

    Steps that did not change are not rerun; where nothing changed, neither torch nor the configuration is loaded.

    Args:
        config: what `load_config` returned, or a recipe or YAML file.
        out: the folder of the build; None: `runs/NAME`.
        calib_root: where the calibration set is copied to.
        bundles: write a folder to send for every target.
        device: `ssh://user@host[:port]/folder`, where the only target is measured.
        lock_clocks: of the device, while it measures.
        prune: delete steps of earlier builds that this one did not use.

    Raises:
        EdgekdError: the subclass says what went wrong.
    """
    from edgekd.pipelines import unchanged

    source = ConfigSource.of(config) if isinstance(config, (str, Path)) else config
    folder = Path(out) if out else Path("runs") / _name(source)
    command = _command()
    request = {
        "config": unchanged.describe(source),
        "out": str(folder),
        "calib_root": str(calib_root),
        "bundles": bundles,
        "command": command,
        "environment": unchanged.environment(),
    }
    if not (device or lock_clocks or prune) and (result := unchanged.load_unchanged(folder, request)):
        return result
    from edgekd.config import load_source
    from edgekd.pipelines.build import build as run_build
    from edgekd.pipelines.build_result import build_result
    from edgekd.stages.device import ssh

    there = ssh.select_device(device, lock_clocks)
    loaded = load_source(source) if isinstance(source, ConfigSource) else source
    remembered = None if device or prune else request
    record = run_build(loaded, folder, Path(calib_root), command, bundles, there, prune, remembered)
    return build_result(record, folder)


def compare(
    config: BuildConfig | ConfigSource | str | Path,
    *,
    methods: Sequence[str] = (),
    seeds: int | None = None,
    baseline: str | None = None,
    jobs: int = 1,
    out: Path | str | None = None,
) -> Result[Comparison]:
    """Train one student by several methods and seeds with the same budget, and say which is better.

    Args:
        config: what `load_config` returned, or a recipe or YAML file.
        methods: names of methods, or of variants of the configuration; none: those of the configuration.
        seeds: per method; None: as configured.
        baseline: what the others are compared with; None: as configured, `kd`, or the first.
        jobs: how many are trained at a time.
        out: where compare.md, .json and .svg are written; None: `runs/NAME`.
    """
    from edgekd.config import load_source
    from edgekd.pipelines.compare import apply_options
    from edgekd.pipelines.compare import compare as run_compare
    from edgekd.stages.report.method_comparison import summary, text

    source = ConfigSource.of(config) if isinstance(config, (str, Path)) else config
    loaded = load_source(source) if isinstance(source, ConfigSource) else source
    loaded = apply_options(loaded, methods, seeds, baseline)
    folder = Path(out) if out else Path("runs") / loaded.name
    comparison = run_compare(loaded, folder, jobs, _command())
    return Result(comparison, summary(comparison), text(comparison), folder / "compare.md")


def _name(config: BuildConfig | ConfigSource) -> str:
    """Return the name of a configuration that need not be loaded yet."""
    return config.name


def _command() -> str:
    """Return the command that this process runs, for reports."""
    if Path(sys.argv[0]).name in ("edgekd", "__main__.py"):
        return shlex.join(["edgekd", *sys.argv[1:]])
    return shlex.join(["python", *filter(None, sys.argv)])


def _file_result(model: Any) -> Result[Any]:
    from edgekd.stages.quantize.file_api import format_result, to_json

    return Result(model, to_json(model), format_result(model), model.file.path)


def _onnx_paths(*models: Any) -> tuple[Path, ...]:
    """Return the paths of ONNX files; those of unknown origin are run in a process of their own first."""
    from edgekd.onnx.sandbox import probe_files

    probe_files(*(Path(model) for model in models if not isinstance(model, Result)))
    return tuple(Path(model) for model in models)


@contextmanager
def _as_file(array: Any) -> Iterator[Any]:
    """Yield the path of an array: its own, or that of a temporary file; None for None."""
    if array is None or isinstance(array, (str, os.PathLike)):
        yield None if array is None else Path(array)
        return
    import numpy as np

    with TemporaryDirectory(prefix="edgekd-") as folder:
        np.save(Path(folder, "array.npy"), np.asarray(array))
        yield Path(folder, "array.npy")


@contextmanager
def _folder(out: Path | str | None) -> Iterator[Path]:
    """Yield a folder to write to: `out`, or a temporary one."""
    if out is not None:
        yield Path(out)
        return
    with TemporaryDirectory(prefix="edgekd-") as folder:
        yield Path(folder)


__all__ = [
    *("distill", "export", "quantize", "benchmark", "explain", "lint", "compare", "build", "load_config"),
    *("ConfigError", "DistilledModel", "Result", *CLASSES),
]
