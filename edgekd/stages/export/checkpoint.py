"""Carry a trained network into ONNX: from the pipeline's artefacts, or from a user's own checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from edgekd.core import plugins, serialization
from edgekd.core.artifact import Exported, File, OnnxModel, TensorSpec
from edgekd.core.config_file import parse
from edgekd.core.dataset import Task
from edgekd.core.model import Model
from edgekd.errors import ConfigError
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.export.export import ExportConfig, export
from edgekd.targets import _jetpack
from edgekd.training import checkpoint as checkpoint_module
from edgekd.training.trained_model import Trained, built


def export_trained(out: Path, trained: Trained, task: Task, config: ExportConfig) -> Exported:
    """The ONNX files of a trained network, compared with torch on validation images."""
    images = task.inputs(task.valid.load().images[: config.images])
    answer = (len(trained.classes), *task.answer(1)[2:])
    facts = {"classes": "\n".join(trained.classes), "mean": str(task.mean), "std": str(task.std)}
    return export(out, trained.weights.name, trained.network(), images, answer, config, facts)


def export_checkpoint(
    out: Path, model: str, checkpoint: Path, images: Path, classes: int, config: ExportConfig, trust: bool
) -> OnnxModel:
    """Write the ONNX file `out`, for batch 1, of a checkpoint that edgekd did not make; only once it is proven.

    `model` is `family:key=value,...` or `package.module:function`; `images` holds real network inputs to compare with.
    """
    if out.suffix != ".onnx":
        raise ConfigError(f"`{out}` is no name for an ONNX file", hint="end it with .onnx")
    if not images.is_file():
        raise ConfigError(f"there is no file `{images}`", hint="give real network inputs: .npz or .npy, (N, C, H, W)")
    inputs = load_calibration(images, TensorSpec("image", (0, 0, 0, 0)))
    network = built(described(model), classes, inputs.shape[1])
    checkpoint_module.load(network, checkpoint, trust)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".edgekd-", dir=out.parent) as folder:  # beside it: a rename, not a copy
        made = export(Path(folder), out.stem, network, inputs, (classes,), config).single
        made.file.path.replace(out)
    return replace(made, file=File.of(out))


def opset_for(opset: int | None, jetpack: str | None) -> int:
    """The opset to export with: as said, or the highest up to the usual one that TensorRT of a JetPack reads."""
    usual = ExportConfig().opset
    if jetpack is None:
        return usual if opset is None else opset
    if opset is not None:
        raise ConfigError("a JetPack has its own opset", hint="give --opset or --jetpack, not both")
    return min(usual, _jetpack.jetpack(jetpack).opset[1])


def described(text: str) -> Model:
    """The model that `resnet:depth=8,width=8` or `package.module:function` names."""
    name, _, rest = text.partition(":")
    if name not in plugins.names("models") and rest.isidentifier():
        return serialization.load(Model, {"use": "python", "function": text})  # type: ignore[type-abstract]
    pairs = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    settings = {key: parse(value, f"--model {text}") for key, value in pairs.items()}
    return serialization.load(Model, {"use": name, **settings})  # type: ignore[type-abstract]
