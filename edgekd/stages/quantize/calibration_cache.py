"""TensorRT's calibration cache: the INT8 scales of a network that stays float, for a DLA before TensorRT 11."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.core.artifact import File
from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.errors import ConfigError, ModelError
from edgekd.onnx import inspect
from edgekd.stages.quantize.qdq import scales
from edgekd.stages.quantize.quantize import Int8Options, select_ranges
from edgekd.stages.quantize.ranges import QuantizeConfig, Ranges


@dataclass(frozen=True)
class CalibrationCache:
    """A text file: a line with the TensorRT version that may read it, then a scale for each tensor of one ONNX file."""

    file: File
    tensors: int
    tensorrt: str


def quantize_to_cache(
    model: Path, target: Path, inputs: np.ndarray, tensorrt: str, config: QuantizeConfig
) -> CalibrationCache:
    """Calibrate the FP32 ONNX file `model` on `inputs` (N, ...) and write its cache to `target`.

    Raises ModelError if the file cannot be quantized, DataError if the inputs do not fit, ConfigError if `target` has
    the name of a network.
    """
    if target.suffix == ".onnx" or (target.exists() and target.samefile(model)):
        raise ConfigError(f"`{target}` is no name for a calibration cache", hint="end it with .cache")
    options = Int8Options.of(QUANT_SCHEMES["dla"], config)
    return write_cache(model, target, tensorrt, select_ranges(model, inputs, options, config))


def write_cache(model: Path, target: Path, tensorrt: str, ranges: Ranges) -> CalibrationCache:
    """Write the scales of the float tensors of `model`, which TensorRT `tensorrt` (as in "8.5.2") builds from.

    A scale is amax / 127, written as the 32 bits of the float in hexadecimal. Raises ModelError if a tensor of the
    file has no range: it was folded away for the calibration, and TensorRT would run its layer without INT8.
    """
    tensors = float_tensors(model)
    bounds = ranges.bounds_for(symmetric=True)
    missing = [name for name in tensors if name not in bounds]
    if missing:
        raise ModelError(
            f"`{model}` computes `{missing[0]}`, which is folded away before the calibration, so that it has no range",
            hint="fold BatchNorms and constants when you export it (model.eval(), onnxsim)",
        )
    amax = np.array([bounds[name][1] for name in tensors])
    bits = scales(amax).view(np.uint32)
    lines = [tag(tensorrt), *(f"{name}: {number:x}" for name, number in zip(tensors, bits, strict=True))]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n")
    return CalibrationCache(File.of(target), len(tensors), tensorrt)


def tag(tensorrt: str) -> str:
    """Return the first line. The version is one number, as NV_TENSORRT_VERSION: 8502 is 8.5.2, 100300 is 10.3.0."""
    major, minor, patch = (int(part) for part in tensorrt.split(".")[:3])
    number = (major * 100 + minor) * 100 + patch if major >= 10 else (major * 10 + minor) * 100 + patch
    return f"TRT-{number}-EntropyCalibration2"


def float_tensors(path: Path) -> list[str]:
    """Return every float tensor of a network that depends on its input, in the order of the file."""
    import onnx
    from onnx import TensorProto

    model = onnx.shape_inference.infer_shapes(inspect.load(path))
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    names = [inspect.single_input(model, path).name]
    live = set(names)
    for node in graph.node:
        if live & set(node.input):
            live.update(node.output)
            names += [name for name in node.output if types.get(name) == TensorProto.FLOAT]
    return names
