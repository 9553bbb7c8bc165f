"""Bundle: one folder that a device needs to build, verify and measure the networks of a comparison by itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import __version__
from edgekd.core import serialization
from edgekd.core.artifact import ComputePrecision, File, OnnxModel
from edgekd.core.bench_result import Role
from edgekd.core.settings import Settings
from edgekd.core.target import Engine, Target
from edgekd.core.task import Task
from edgekd.errors import ConfigError, ModelError, StaleArtifact
from edgekd.onnx import session
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.runner import job, pack_runner
from edgekd.stages.device import schemas
from edgekd.stages.device.bundle_readme import RUN_SCRIPT, format_readme
from edgekd.stages.export.fp16 import bake
from edgekd.stages.lint.lint import format_verdict, lint
from edgekd.stages.quantize.calibration_cache import write_cache
from edgekd.stages.quantize.ranges import Ranges
from edgekd.targets._jetpack import table
from edgekd.utils.arrays import save_array
from edgekd.utils.paths import escapes_folder

SCHEMA = 2  # of bundles and results; the runner has the same number
MANIFEST = "manifest.json"
HINT_REBUILD = "build the bundle again; do not use it if it came from elsewhere"
AGREEMENT = {"fp32": 99.0, "fp16": 99.0, "int8": 98.0}  # percent of top classes that an engine must share with the host
CACHE_AGREEMENT = 95.0  # with a calibration cache TensorRT chooses what it computes in INT8, the host has FP32 outputs
FP16_IMAGES = 64  # calibration images on which an FP16 file is compared with the FP32 one
FP16_ERROR = 0.03  # mean error of FP16 as a fraction of the largest output; untrained MobileNets have up to 0.015
INT8_ERROR_FACTOR = 1.5  # FP16 on top of INT8 may err by this times the error of INT8: both round; 1.2 was measured


@dataclass(frozen=True)
class BundleConfig(Settings):
    """Settings of a bundle."""

    images: int = 1000  # of the test split, chosen at random, that a device answers and is timed with
    verify_images: int = 256  # of these, whose outputs must agree with those of this machine

    def __post_init__(self) -> None:
        if not 1 <= self.verify_images <= self.images:
            raise ConfigError(
                f"bundle.verify_images is {self.verify_images}, bundle.images {self.images}",
                hint="verify 1 image or more, and no more than there are",
            )


@dataclass(frozen=True)
class BundleModel:
    """One network of the comparison, as it was exported and quantized."""

    name: str
    role: Role
    method: str
    predicts_labels: bool  # its classes are those of the labels
    fp32: OnnxModel
    int8: OnnxModel | None = None
    ranges: Ranges | None = None  # where a calibration cache takes the place of an INT8 file


@dataclass(frozen=True)
class BundleRequest:
    """Models to measure on a device, the data for it, and how they are verified and timed."""

    name: str  # of the build
    target_name: str
    target: Target
    models: tuple[BundleModel, ...]
    calibration: File  # .npz with network inputs
    inputs: File  # .npy, (N, C, H, W) float32, of test data
    labels: File | None  # .npy, the targets of the task for the inputs
    task: Task
    config: BundleConfig
    protocol: BenchConfig


@dataclass(frozen=True)
class Bundle:
    """The folder of its manifest, which lists all other files with their hashes."""

    manifest: File

    @property
    def folder(self) -> Path:
        return self.manifest.path.parent

    def read(self) -> dict[str, Any]:
        """Return the manifest. Raises ConfigError if it is invalid, or lists files that are not in the folder."""
        path = self.manifest.path
        manifest: dict[str, Any] = serialization.read_json(path, HINT_REBUILD)
        if isinstance(manifest, dict) and manifest.get("schema") != SCHEMA:
            number = str(manifest.get("schema"))[:20]
            raise ConfigError(f"`{path}` has schema {number}; this edgekd reads schema {SCHEMA}", hint=HINT_REBUILD)
        try:
            serialization.from_json(schemas.Manifest, manifest, hint=HINT_REBUILD)
        except ConfigError as error:
            raise ConfigError(f"`{path}` is no manifest of a bundle: {error.what}", hint=HINT_REBUILD) from None
        engine_files = [engine.get(key) for engine in manifest["engines"] for key in ("model", "expected", "cache")]
        for name in map(str, filter(None, (*manifest["files"], manifest["inputs"], manifest["labels"], *engine_files))):
            if name not in manifest["files"] or escapes_folder(self.folder, name):
                raise ConfigError(f"`{name}` in `{path}` is no file of this bundle, with its hash", hint=HINT_REBUILD)
        return manifest


@dataclass(frozen=True)
class EngineSpec:
    """One engine in the manifest: the device builds it from a file of the bundle."""

    name: str
    role: Role
    method: str
    model: str
    precisions: tuple[str, ...]  # that layers may be computed in
    typed: bool
    dla: int | None
    cache: str | None
    expected: str
    agreement: float  # percent
    predicts_labels: bool
    macs: int
    parameters: int
    compute_precision: ComputePrecision = "fp32"  # that the runtime computes float operators in


def write_bundle(out: Path, request: BundleRequest) -> Bundle:
    """Write everything that a device of the target needs into `out`; equal builds give equal bytes.

    Raises:
        ModelError: if TensorRT would refuse a file, or a network does not take images of one size.
        ParityError: if FP16 changes a network's outputs.
    """
    target, task = request.target, request.task
    for folder in ("models", "expected"):
        shutil.rmtree(out / folder, ignore_errors=True)  # half of a file, if this was interrupted before
        (out / folder).mkdir(parents=True)
    images = choose_inputs(out, request.inputs, request.labels, request.config)
    verify_images = images[: request.config.verify_images]
    with np.load(request.calibration.path) as arrays:
        calibration = arrays[arrays.files[0]][:FP16_IMAGES]
    engines = [e for m in request.models for e in build_engine_specs(out, m, target, calibration, verify_images, task)]
    pack_runner(out / "runner.pyz")
    (out / "run.sh").write_text(RUN_SCRIPT)
    (out / "run.sh").chmod(0o755)
    remarks = lint_models(out, target)
    plan = target.deployment_plan
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "name": request.name,
        "target": request.target_name,
        "runtime": target.runtime,
        "threads": target.threads,
        "edgekd": __version__,
        "jetpack": plan.jetpack,
        "board": plan.board,
        "tensorrt": plan.tensorrt,
        "engines": [asdict(engine) for engine in engines],
        "inputs": "inputs.npy",
        "labels": None if request.labels is None else "labels.npy",
        "task": serialization.to_json(task),
        "verify_images": len(verify_images),
        "protocol": job({}, target, request.inputs, request.protocol)["protocol"],
        **target.options,
    }
    readme = format_readme(manifest, len(images), (*plan.why, *plan.instead), remarks)
    (out / "README.md").write_text(readme, encoding="utf-8")
    files = {str(path.relative_to(out)): File.of(path) for path in list_files(out)}
    manifest["files"] = {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in files.items()}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return Bundle(File.of(out / MANIFEST))


def choose_inputs(out: Path, inputs: File, labels: File | None, config: BundleConfig) -> np.ndarray:
    """Write inputs.npy and labels.npy: some of the test images, in random order, so that every class is among them.

    Returns (images, C, H, W) float32.
    """
    images = np.load(inputs.path, mmap_mode="r")
    indices = np.random.default_rng(0).permutation(len(images))[: config.images]
    save_array(out / "inputs.npy", np.ascontiguousarray(images[indices]))
    if labels is not None:
        save_array(out / "labels.npy", np.ascontiguousarray(np.load(labels.path)[indices]))
    return np.asarray(images[indices])


def build_engine_specs(
    out: Path, model: BundleModel, target: Target, calibration: np.ndarray, verify_images: np.ndarray, task: Task
) -> list[EngineSpec]:
    """Return the engines of one network, and write their files and expected outputs.

    A student is built in all precisions of the target; the teacher in those without INT8, a baseline in the first one.
    """
    plan = target.deployment_plan
    float_engines = tuple(engine for engine in plan.engines if engine != "int8")
    engines = {"teacher": float_engines, "baseline": float_engines[:1], "student": plan.engines}[model.role]
    specs = []
    for engine in engines:
        with_cache = engine == "int8" and target.scheme.format == "calibration_cache"
        path = write_model(out, model, engine, target, calibration)
        cache = out / "models" / f"{model.name}.cache" if with_cache else None
        if cache and model.ranges and plan.tensorrt:
            write_cache(path, cache, plan.tensorrt, model.ranges)
        expected = out / "expected" / f"{path.stem}.npy"
        if not expected.exists():
            save_array(expected, compute_outputs(path, verify_images))
        specs.append(
            EngineSpec(
                name=f"{model.name} {engine}",
                role=model.role,
                method=model.method,
                model=str(path.relative_to(out)),
                precisions=("int8", "fp16") if engine == "int8" and "fp16" in float_engines else (engine,),
                typed=plan.typed,
                dla=plan.dla,
                cache=str(cache.relative_to(out)) if cache else None,
                expected=str(expected.relative_to(out)),
                agreement=required_agreement(task, engine, with_cache),
                predicts_labels=model.predicts_labels,
                macs=model.fp32.macs,
                parameters=model.fp32.parameters,
            )
        )
        if engine == "fp32":
            for precision in target.compute_precisions[1:]:  # the same file, with the rounding that FP16 and bf16 have
                name, agreement = f"{model.name} fp32 ({precision} precision)", required_agreement(task, "fp16")
                specs.append(replace(specs[-1], name=name, compute_precision=precision, agreement=agreement))
    return specs


def required_agreement(task: Task, engine: Engine, with_cache: bool = False) -> float:
    """Return the percentage of top classes that must be the host's; 0 if the task has no classes."""
    if not task.class_logits:
        return 0.0
    return CACHE_AGREEMENT if with_cache else AGREEMENT[engine]


def write_model(out: Path, model: BundleModel, engine: Engine, target: Target, calibration: np.ndarray) -> Path:
    """Write the ONNX file that the device builds an engine from; several share it if flags choose the precision."""
    int8 = model.int8 if engine == "int8" and target.scheme.format != "calibration_cache" else None
    source = int8 or model.fp32
    in_fp16 = target.deployment_plan.typed and engine != "fp32"
    path = out / "models" / f"{model.name}-{engine if in_fp16 else source.precision}.onnx"
    if not path.exists():
        if open_sizes := [size for size in source.input.shape if not size]:
            raise ModelError(
                f"`{source.file.path.name}` has {len(open_sizes)} dimensions without a size, as {source.input.shape}",
                hint="a bundle holds networks for one image of one size: export it with batch 1",
            )
        if in_fp16:
            bake(source.file.path, path, calibration, fp16_tolerance(model.fp32, int8, calibration))
        else:
            shutil.copyfile(source.file.path, path)
    return path


def fp16_tolerance(fp32: OnnxModel, int8: OnnxModel | None, images: np.ndarray) -> float:
    """Return the mean error that FP16 may cause, as a fraction of the largest output; with INT8 it follows INT8's."""
    if int8 is None:
        return FP16_ERROR
    exact, rounded = (compute_outputs(model.file.path, images) for model in (fp32, int8))
    error = np.abs(rounded - exact).mean() / (np.abs(rounded).max() or 1.0)
    return max(FP16_ERROR, INT8_ERROR_FACTOR * float(error))


def compute_outputs(path: Path, images: np.ndarray) -> np.ndarray:
    """Return a file's outputs on this machine, unoptimised: optimisation computes FP16 scales of Q/DQ pairs wrongly."""
    return np.asarray(session.run_model(path, images, optimised=False, threads=1), np.float32)


def lint_models(out: Path, target: Target) -> tuple[str, ...]:
    """Return warnings of the lint for TensorRT about the files. Raises ModelError if TensorRT would refuse one."""
    if target.runtime != "tensorrt":
        return ()
    jetpack = target.deployment_plan.jetpack or table().jetpacks[-1].version
    verdicts = [lint(path, jetpack) for path in sorted((out / "models").glob("*.onnx"))]
    refusals = [verdict for verdict in verdicts if verdict.count("error")]
    if refusals:
        raise ModelError(
            "\n".join(format_verdict(verdict) for verdict in refusals),
            hint="change the network, or the JetPack; `edgekd lint` checks a single file",
        )
    findings = {f"{f.fact} [{f.rule}]": f for v in verdicts for f in v.findings}
    return tuple(f"{f.node}: {text}" for text, f in sorted(findings.items()))


def list_files(folder: Path) -> list[Path]:
    """Return the files of a bundle except its manifest; results and the step cache's entry do not belong to it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [p for p in files if p.name not in (MANIFEST, "step.json") and p.relative_to(folder).parts[0] != "results"]


def copy_bundle(bundle: Bundle, home: Path) -> Path:
    """Copy a bundle to where people look for it, its manifest last; results in that folder stay.

    Raises StaleArtifact if a file of the bundle changed since it was written, or links in `home` lead out of it.
    """
    files = bundle.read()["files"]
    for relative, record in files.items():
        if home.is_symlink() or escapes_folder(home, relative):
            raise StaleArtifact(f"`{home / relative}` leads out of `{home}`", hint=f"remove `{home}`, then build again")
        source, goal = File.checked(bundle.folder / relative, record["sha256"]).path, home / relative
        goal.parent.mkdir(parents=True, exist_ok=True)
        partial = goal.with_name(f"{goal.name}.partial")
        shutil.copy(source, partial)
        partial.replace(goal)
    for path in list_files(home):
        if str(path.relative_to(home)) not in files:
            path.unlink()
    partial = home / f"{MANIFEST}.partial"
    shutil.copyfile(bundle.manifest.path, partial).replace(home / MANIFEST)
    return home
