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
from edgekd.core.artifact import File, Floats, OnnxModel
from edgekd.core.bench_result import Role
from edgekd.core.settings import Settings
from edgekd.core.target import Engine, Target
from edgekd.errors import ConfigError, ModelError, StaleArtifact
from edgekd.onnx import session
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.runner import job
from edgekd.stages.device import schemas
from edgekd.stages.device.bundle_readme import RUN, readme
from edgekd.stages.export.fp16 import bake
from edgekd.stages.lint.lint import described, lint
from edgekd.stages.quantize.calibration_cache import write_cache
from edgekd.stages.quantize.ranges import Ranges
from edgekd.targets._jetpack import table
from edgekd.utils.arrays import save_array
from edgekd.utils.paths import leads_out

SCHEMA = 1  # of manifest.json, which the runner reads
MANIFEST = "manifest.json"
REFUSED = "make the bundle again; do not use it if it came from elsewhere"
AGREEMENT = {"fp32": 99.0, "fp16": 99.0, "int8": 98.0}  # percent of top classes that must be the host's: of an engine
CACHED = 95.0  # built from a cache: TensorRT chooses where it computes in INT8, the host knows the FP32 answers only
BAKED_WITH = 64  # calibration images that an FP16 file is compared with the FP32 one on
MOVED = 0.03  # share of the largest answer that FP16 may move one by; untrained MobileNets were seen to move by 0.015
NOISE = 1.5  # times what INT8 moves answers by, that FP16 may move those of INT8: two roundings meet, 1.2 was seen


@dataclass(frozen=True)
class BundleConfig(Settings):
    images: int = 1000  # of the test split, chosen at random, that a device answers and is timed with
    checked: int = 256  # of these, whose answers must be those of this machine

    def __post_init__(self) -> None:
        if not 1 <= self.checked <= self.images:
            raise ConfigError(
                f"bundle.checked is {self.checked}, bundle.images {self.images}",
                hint="check 1 image or more, and no more than there are",
            )


@dataclass(frozen=True)
class Sent:
    """One network of the comparison, as it was exported and quantized."""

    name: str
    role: Role
    method: str
    knows: bool  # it answers for the classes of the labels
    fp32: OnnxModel
    int8: OnnxModel | None = None
    ranges: Ranges | None = None  # where a calibration cache takes the place of an INT8 file


@dataclass(frozen=True)
class Bundle:
    """The folder of its manifest, which names all other files with their hashes."""

    manifest: File

    @property
    def folder(self) -> Path:
        return self.manifest.path.parent

    def read(self) -> dict[str, Any]:
        """The manifest. Raises ConfigError where it is none, or names files that are not in the folder."""
        path = self.manifest.path
        found: dict[str, Any] = serialization.read(path, REFUSED)
        try:
            serialization.load(schemas.Manifest, found, hint=REFUSED)
        except ConfigError as error:
            raise ConfigError(f"`{path}` is no manifest of a bundle: {error.what}", hint=REFUSED) from None
        used = [row.get(key) for row in found["engines"] for key in ("model", "expected", "cache")]
        for name in map(str, filter(None, (*found["files"], found["inputs"], found["labels"], *used))):
            if name not in found["files"] or leads_out(self.folder, name):
                raise ConfigError(f"`{name}` in `{path}` is no file of this bundle, with its hash", hint=REFUSED)
        return found


@dataclass(frozen=True)
class Row:
    """One engine: the device builds it from a file of the bundle. The fields are those of the manifest."""

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
    knows: bool
    macs: int
    parameters: int
    floats: Floats = "fp32"  # what the runtime is asked to compute float operations in


def bundle(
    out: Path,
    name: str,
    target_name: str,
    target: Target,
    networks: tuple[Sent, ...],
    calibration: File,
    inputs: File,
    labels: File | None,
    runner: File,
    config: BundleConfig,
    protocol: BenchConfig,
) -> Bundle:
    """Write everything that a device of `target` needs into `out`; equal builds give equal bytes.

    `calibration` is .npz with network inputs; `inputs` is .npy, (N, C, H, W) float32, of test data, `labels` theirs.
    `runner` is the program that runs there. Raises ModelError where TensorRT would refuse a file, or a network does not
    take images of one size; ParityError where FP16 changes a network's answers.
    """
    for folder in ("models", "expected"):
        shutil.rmtree(out / folder, ignore_errors=True)  # half of a file, if this was interrupted before
        (out / folder).mkdir(parents=True)
    images = choose(out, inputs, labels, config)
    checked = images[: config.checked]
    with np.load(calibration.path) as arrays:
        real = arrays[arrays.files[0]][:BAKED_WITH]
    rows = [row for sent in networks for row in rows_of(out, sent, target, real, checked, labels)]
    shutil.copyfile(runner.path, out / "edgekd_runner.py")
    (out / "run.sh").write_text(RUN)
    (out / "run.sh").chmod(0o755)
    remarks = linted(out, target)
    delivery = target.delivery
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "name": name,
        "target": target_name,
        "runtime": target.runtime,
        "threads": target.threads,
        "edgekd": __version__,
        "jetpack": delivery.jetpack,
        "board": delivery.board,
        "tensorrt": delivery.tensorrt,
        "engines": [asdict(row) for row in rows],
        "inputs": "inputs.npy",
        "labels": None if labels is None else "labels.npy",
        "checked": len(checked),
        "protocol": job({}, target, inputs, protocol)["protocol"],
        **target.options,
    }
    (out / "README.md").write_text(
        readme(manifest, len(images), (*delivery.why, *delivery.instead), remarks), encoding="utf-8"
    )
    files = {str(path.relative_to(out)): File.of(path) for path in files_in(out)}
    manifest["files"] = {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in files.items()}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return Bundle(File.of(out / MANIFEST))


def choose(out: Path, inputs: File, labels: File | None, config: BundleConfig) -> np.ndarray:
    """Write inputs.npy and labels.npy: some of the test images, in random order, so that every class is among them."""
    images = np.load(inputs.path, mmap_mode="r")
    chosen = np.random.default_rng(0).permutation(len(images))[: config.images]
    save_array(out / "inputs.npy", np.ascontiguousarray(images[chosen]))
    if labels is not None:
        save_array(out / "labels.npy", np.ascontiguousarray(np.load(labels.path)[chosen]))
    return np.asarray(images[chosen])


def rows_of(
    out: Path, sent: Sent, target: Target, real: np.ndarray, checked: np.ndarray, labels: File | None
) -> list[Row]:
    """The engines of one network, their files and the answers that are expected of them.

    A student is built in all ways of the target; the teacher in those without INT8, a baseline in the first of them.
    """
    delivery = target.delivery
    floats = tuple(engine for engine in delivery.engines if engine != "int8")
    engines = {"teacher": floats, "baseline": floats[:1], "student": delivery.engines}[sent.role]
    dense = labels is not None and np.load(labels.path, mmap_mode="r").ndim > 1
    rows = []
    for engine in engines:
        cached = engine == "int8" and target.dialect.form == "cache"
        path = model_file(out, sent, engine, target, real)
        cache = out / "models" / f"{sent.name}.cache" if cached else None
        if cache and sent.ranges and delivery.tensorrt:
            write_cache(path, cache, delivery.tensorrt, sent.ranges)
        expected = out / "expected" / f"{path.stem}.npy"
        if not expected.exists():
            save_array(expected, answers(path, checked))
        rows.append(
            Row(
                name=f"{sent.name} {engine}",
                role=sent.role,
                method=sent.method,
                model=str(path.relative_to(out)),
                precisions=("int8", "fp16") if engine == "int8" and "fp16" in floats else (engine,),
                typed=delivery.typed,
                dla=delivery.dla,
                cache=str(cache.relative_to(out)) if cache else None,
                expected=str(expected.relative_to(out)),
                agreement=0.0 if dense else CACHED if cached else AGREEMENT[engine],
                knows=sent.knows,
                macs=sent.fp32.macs,
                parameters=sent.fp32.parameters,
            )
        )
        if engine == "fp32":
            for other in target.floats[1:]:  # the same file, with the rounding that FP16 and bf16 have
                name = f"{sent.name} fp32 ({other} precision)"
                rows.append(replace(rows[-1], name=name, floats=other, agreement=0.0 if dense else AGREEMENT["fp16"]))
    return rows


def model_file(out: Path, sent: Sent, engine: Engine, target: Target, real: np.ndarray) -> Path:
    """The ONNX file that the device builds an engine from; one file serves several where flags choose the precision."""
    int8 = sent.int8 if engine == "int8" and target.dialect.form != "cache" else None
    source = int8 or sent.fp32
    baked = target.delivery.typed and engine != "fp32"
    path = out / "models" / f"{sent.name}-{engine if baked else source.precision}.onnx"
    if not path.exists():
        if fixed := [size for size in source.input.shape if not size]:
            raise ModelError(
                f"`{source.file.path.name}` has {len(fixed)} dimensions without a size, as {source.input.shape}",
                hint="a bundle holds networks for one image of one size: export it with batch 1",
            )
        if baked:
            bake(source.file.path, path, real, tolerance(sent.fp32, int8, real) if int8 else MOVED)
        else:
            shutil.copyfile(source.file.path, path)
    return path


def tolerance(fp32: OnnxModel, int8: OnnxModel, images: np.ndarray) -> float:
    """What FP16 may add to INT8, as a share of the largest answer: no more than INT8 itself moved answers by."""
    exact, rounded = (answers(model.file.path, images) for model in (fp32, int8))
    moved = np.abs(rounded - exact).mean() / (np.abs(rounded).max() or 1.0)
    return max(MOVED, NOISE * float(moved))


def answers(path: Path, images: np.ndarray) -> np.ndarray:
    """Of the operators as they stand in the file: optimisation computes FP16 scales of Q/DQ pairs wrongly."""
    return np.asarray(session.answers(path, images, optimised=False, threads=1), np.float32)


def linted(out: Path, target: Target) -> tuple[str, ...]:
    """What a lint for TensorRT remarks on the bundle's files. Raises ModelError where TensorRT would refuse one."""
    if target.runtime != "tensorrt":
        return ()
    jetpack = target.delivery.jetpack or table().jetpacks[-1].version
    verdicts = [lint(path, jetpack) for path in sorted((out / "models").glob("*.onnx"))]
    refused = [verdict for verdict in verdicts if verdict.count("error")]
    if refused:
        raise ModelError(
            "\n".join(described(verdict) for verdict in refused),
            hint="change the network, or the JetPack; `edgekd lint` judges a single file",
        )
    found = {f"{f.fact} [{f.rule}]": f for v in verdicts for f in v.findings}
    return tuple(f"{f.node}: {text}" for text, f in sorted(found.items()))


def files_in(folder: Path) -> list[Path]:
    """What a bundle consists of beside its manifest; the ledger's own entry and results are none of it."""
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [p for p in inside if p.name not in (MANIFEST, "step.json") and p.relative_to(folder).parts[0] != "results"]


def place(made: Bundle, home: Path) -> Path:
    """Copy a bundle to where people look for it, its manifest last; results that are there already stay.

    Raises StaleArtifact if a file of the bundle changed since it was made, or links there lead elsewhere.
    """
    wanted = made.read()["files"]
    for relative, facts in wanted.items():
        if home.is_symlink() or leads_out(home, relative):
            raise StaleArtifact(f"`{home / relative}` leads out of `{home}`", hint=f"remove `{home}`, then build again")
        source, goal = File.checked(made.folder / relative, facts["sha256"]).path, home / relative
        goal.parent.mkdir(parents=True, exist_ok=True)
        partial = goal.with_name(f"{goal.name}.partial")
        shutil.copy(source, partial)
        partial.replace(goal)
    for path in files_in(home):
        if str(path.relative_to(home)) not in wanted:
            path.unlink()
    partial = home / f"{MANIFEST}.partial"
    shutil.copyfile(made.manifest.path, partial).replace(home / MANIFEST)
    return home
