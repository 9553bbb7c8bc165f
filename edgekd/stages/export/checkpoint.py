"""Export a trained network to ONNX: from the pipeline's artefacts, or from a user's checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgekd.core import plugins, serialization
from edgekd.core.artifact import Exported, File, OnnxModel, TensorSpec
from edgekd.core.config_file import parse_yaml
from edgekd.core.dataset import PreparedDataset
from edgekd.core.model import Model
from edgekd.core.task import OutputSpec
from edgekd.errors import ConfigError
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.export.export import ExportConfig, export
from edgekd.targets import _jetpack
from edgekd.training import checkpoint as checkpoint_module
from edgekd.training.trained_model import TrainedModel, build_network

if TYPE_CHECKING:
    import numpy as np


def export_trained(out: Path, trained: TrainedModel, dataset: PreparedDataset, config: ExportConfig) -> Exported:
    """Write the ONNX files of a trained network, compared with torch on validation images."""
    images = dataset.inputs(dataset.valid.load().images[: config.images])
    specs = dataset.outputs(len(trained.classes))
    facts = {"classes": "\n".join(trained.classes), "mean": str(dataset.mean), "std": str(dataset.std)}
    return export(out, trained.weights.name, trained.network(), images, specs, config, facts)


def export_checkpoint(
    out: Path, model: str, checkpoint: Path, images: Path, classes: int, config: ExportConfig, allow_pickle: bool
) -> OnnxModel:
    """Write the ONNX file `out`, for batch 1, of a checkpoint that edgekd did not make; only once it is proven.

    `model` is `family:key=value,...` or `package.module:function`; `images` holds real network inputs to compare with.
    """
    check_onnx_name(out)
    inputs = load_images(images)
    network = build_network(parse_model(model), classes, inputs.shape[1])
    checkpoint_module.load(network, checkpoint, allow_pickle)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".edgekd-", dir=out.parent) as folder:  # beside it: a rename, not a copy
        onnx = export(Path(folder), out.stem, network, inputs, (OutputSpec("logits", (classes,)),), config).single
        onnx.file.path.replace(out)
    return replace(onnx, file=File.of(out))


def check_onnx_name(out: Path) -> Path:
    """Return the path. Raise ConfigError if it is not that of an ONNX file."""
    if out.suffix != ".onnx":
        raise ConfigError(f"`{out}` is no name for an ONNX file", hint="end it with .onnx")
    return out


def load_images(images: Path) -> np.ndarray:
    """Return the network inputs in an .npz or .npy file, (N, C, H, W) float32."""
    if not images.is_file():
        raise ConfigError(f"there is no file `{images}`", hint="give real network inputs: .npz or .npy, (N, C, H, W)")
    return load_calibration(images, TensorSpec("image", (0, 0, 0, 0)))


def opset_for(opset: int | None, jetpack: str | None) -> int:
    """Return the opset to export with: the given one, or the highest up to the default that a JetPack reads."""
    usual = ExportConfig().opset
    if jetpack is None:
        return usual if opset is None else opset
    if opset is not None:
        raise ConfigError("a JetPack has its own opset", hint="give --opset or --jetpack, not both")
    return min(usual, _jetpack.jetpack(jetpack).opset[1])


def parse_model(text: str) -> Model:
    """Return the model that `resnet:depth=8,width=8` or `package.module:function` names."""
    name, _, rest = text.partition(":")
    if name not in plugins.names("models") and rest.isidentifier():
        return serialization.from_json(Model, {"use": "python", "function": text})  # type: ignore[type-abstract]
    pairs = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    settings = {key: parse_yaml(value, f"--model {text}") for key, value in pairs.items()}
    return serialization.from_json(Model, {"use": name, **settings})  # type: ignore[type-abstract]
