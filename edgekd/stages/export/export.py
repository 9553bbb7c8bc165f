"""Export: a torch network becomes two ONNX files that provably answer alike, batch 1 and dynamic batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgekd.core.artifact import Exported, TensorSpec
from edgekd.core.settings import Settings
from edgekd.core.task import OutputSpec, matching_task, output_tensors
from edgekd.errors import ConfigError, ExportError, ParityError
from edgekd.onnx import inspect, session, writer
from edgekd.onnx.graph import GraphView
from edgekd.onnx.inspect import OnnxFacts
from edgekd.utils.external import external_code

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import Tensor, nn

INPUT = "image"
LOWEST_OPSET = 13  # below, Q/DQ nodes have no scale per channel; the oldest Jetsons (TensorRT 8.2) read 13
PROGRAM_OPSET = 18  # below, torch's exporter of programs keeps 18 with a mere warning, and its older one is needed


@dataclass(frozen=True)
class ExportConfig(Settings):
    opset: int = 20  # of ai.onnx
    tolerance: float = 1e-4  # largest difference to torch, as a share of the largest absolute logit
    images: int = 64  # how many real ones are compared

    def __post_init__(self) -> None:
        if self.opset < LOWEST_OPSET:
            raise ConfigError(
                f"opset is {self.opset}, but INT8 with a scale per channel needs {LOWEST_OPSET} or more",
                hint="use 20, which TensorRT 10 and onnxruntime 1.18 read; 17 for TensorRT 8.5, 13 for 8.2",
            )
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance is {self.tolerance}", hint="use a share between 0 and 1, such as 1e-4")
        if self.images < 1:
            raise ConfigError(f"images is {self.images}", hint="compare 1 image or more; 64 take no second")


def export(
    out: Path,
    name: str,
    network: nn.Module,
    images: np.ndarray,
    outputs: tuple[OutputSpec, ...] | None,
    config: ExportConfig,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write `NAME.onnx` (batch 1) and `NAME-dynamic.onnx` into `out`; `network` stays as it is.

    `images` are real network inputs, (N, C, H, W) float32. `outputs` are what one image must be answered with;
    None takes what comes, and names it by number. `metadata` (mean, std, class names ...) goes into the files.
    Raises ExportError if the network cannot be exported as asked, ParityError if a file answers otherwise than torch.
    """
    import torch

    images = images[: config.images]
    plain = deepcopy(network).to("cpu", torch.float32).eval()
    plain = plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with (
        external_code(
            f"the network does not take images of shape (N, {', '.join(map(str, images.shape[1:]))})",
            "give it the channels and the size that it was made for",
            ExportError,
        ),
        torch.no_grad(),
    ):
        tensors = output_tensors(plain(torch.from_numpy(images)))
    specs = check_outputs(network, tensors, outputs, len(images))
    expected = tuple(tensor.numpy() for tensor in tensors)
    single, dynamic = out / f"{name}.onnx", out / f"{name}-dynamic.onnx"
    model = translate(plain, images, config.opset, specs)
    writer.write(model, dynamic, metadata or {})
    writer.write(with_batch_of_one(model), single, metadata or {})
    for path, batch in ((single, 1), (dynamic, 0)):
        check_form(
            inspect.check(path), path, (batch, *images.shape[1:]), output_tensor_specs(specs, batch), config.opset
        )
        check_folded(path)
        compare(path, images, expected, config.tolerance)
    alone = inspect.describe(single, name)
    return Exported(alone, inspect.describe(dynamic, f"{name}-dynamic", alone.macs))


def check_outputs(
    network: nn.Module, tensors: tuple[Any, ...], outputs: tuple[OutputSpec, ...] | None, count: int
) -> tuple[OutputSpec, ...]:
    """Return the outputs of a network to `count` images. Raises ExportError where they are none of those expected."""
    import torch

    shapes = [str(tuple(t.shape)) if isinstance(t, torch.Tensor) else f"a {type(t).__name__}" for t in tensors]
    specs = outputs
    if specs is None:
        tensors = tuple(t for t in tensors if isinstance(t, torch.Tensor))
        specs = tuple(OutputSpec(f"output{n}", tuple(t.shape[1:])) for n, t in enumerate(tensors))
    expected = [str((count, *spec.shape)) for spec in specs]
    if not specs or shapes != expected:
        raise ExportError(
            f"`{type(network).__name__}` answers {count} images with {' and '.join(shapes)}, "
            f"not with {' and '.join(expected) or 'rows of numbers'}",
            hint="forward() must return the task's outputs alone, one row per image; for classes, one column per class",
        )
    return specs


def output_tensor_specs(specs: tuple[OutputSpec, ...], batch: int) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(spec.name, (batch, *spec.shape)) for spec in specs)


def translate(network: nn.Module, images: np.ndarray, opset: int, specs: tuple[OutputSpec, ...]) -> onnx.ModelProto:
    """The network with a dynamic batch, as torch's exporter wrote it. Raises ExportError with the exporter's cause."""
    import torch

    first = torch.from_numpy(images[:1])
    probe = torch.cat([first, first])  # two: a batch of one would be taken for a constant
    with (
        external_code(
            f"torch cannot export `{type(network).__name__}` to ONNX",
            "forward() must take one image batch and have no branch that depends on the values of tensors",
            ExportError,
        ),
        hushed(),
    ):
        return (programmed if opset >= PROGRAM_OPSET else traced)(network, probe, opset, specs)


def programmed(network: nn.Module, probe: Tensor, opset: int, specs: tuple[OutputSpec, ...]) -> onnx.ModelProto:
    """By way of torch.export."""
    import torch

    program = torch.onnx.export(
        network,
        (probe,),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=[INPUT],
        output_names=[spec.name for spec in specs],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    if program is None:  # only older exporters
        raise ExportError("torch's exporter returned nothing", hint="install torch 2.6 or newer")
    return program.model_proto


def traced(network: nn.Module, probe: Tensor, opset: int, specs: tuple[OutputSpec, ...]) -> onnx.ModelProto:
    """By way of TorchScript, torch's only exporter below opset 18.

    A trace loses branches without a word, so torch.export must accept the network, too.
    """
    import onnx
    import torch

    torch.export.export(network, (probe,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with TemporaryDirectory(prefix="edgekd-") as folder:
        torch.onnx.export(
            network,
            (probe,),
            f"{folder}/traced.onnx",
            dynamo=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[spec.name for spec in specs],
            dynamic_axes={name: {0: "batch"} for name in (INPUT, *(spec.name for spec in specs))},
        )
        model = onnx.load(f"{folder}/traced.onnx")
    for value, spec in zip(model.graph.output, specs, strict=True):  # the exporter leaves sizes open that it computes
        shape = [onnx.TensorShapeProto.Dimension(dim_value=size) for size in spec.shape]
        del value.type.tensor_type.shape.dim[1:]
        value.type.tensor_type.shape.dim.extend(shape)
    return model


@contextmanager
def hushed() -> Iterator[None]:
    """No warnings, no log lines from the exporter; what matters of them is checked on the file."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def with_batch_of_one(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph and tensor names for a single image, with everything folded that thereby became constant."""
    import onnx
    import onnxscript.optimizer

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del fixed.graph.value_info[:]
    fixed = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True)
    with hushed():
        return onnxscript.optimizer.optimize(fixed)


def check_form(
    found: OnnxFacts, path: Path, input_shape: tuple[int, ...], outputs: tuple[TensorSpec, ...], opset: int
) -> None:
    """Raises ExportError unless the file is what was asked for."""
    wishes = (
        ("opset", found.opset, opset),
        ("operator sets", found.domains, ("",)),
        ("input", (found.input.name, found.input.shape, found.input.dtype), (INPUT, input_shape, "float32")),
        ("outputs", found.outputs, outputs),
    )
    for what, got, asked in wishes:
        if got != asked:
            raise ExportError(
                f"`{path.name}` has {what} {got}, not {asked}",
                hint="torch's exporter could not do as asked; try another `export.opset`",
            )
    if found.ir > (limit := highest_ir(opset)):
        raise ExportError(
            f"`{path.name}` has IR version {found.ir}, but runtimes of opset {opset} may read no more than {limit}",
            hint="lower `export.opset`",
        )


def highest_ir(opset: int) -> int:
    """What runtimes load that read no higher opset: onnxruntime 1.10 with JetPack 4.6, 1.16 with 5.1, 1.18 to 1.20."""
    return 7 if opset < 15 else 8 if opset < PROGRAM_OPSET else 10


def check_folded(path: Path) -> None:
    """Raises ExportError if a BatchNormalization remains that a convolution could have taken up.

    One that follows something else (as in pre-activation networks) has nothing to fold into, and stays.
    """
    model = inspect.load(path)
    view = GraphView(model)
    for node in model.graph.node:
        convolution = view.producer(node.input[0], "Conv") if node.op_type == "BatchNormalization" else None
        if convolution is not None and len(view.uses[node.input[0]]) == 1:
            raise ExportError(
                f"`{path.name}` still has the BatchNormalization `{node.name}` behind a convolution",
                hint="train with BatchNorm statistics on (track_running_stats=True), so that it can be folded",
            )


def compare(path: Path, images: np.ndarray, expected: tuple[np.ndarray, ...], tolerance: float) -> float:
    """Return the largest difference to torch's outputs, as a fraction of the largest absolute value of an output.

    Both with onnxruntime's graph optimisation and without: the two disagree where constant folding goes wrong.
    Raises ParityError above `tolerance`; below, the top class is the same wherever it leads by twice as much.
    """
    import numpy as np

    worst = 0.0
    for optimised in (True, False):
        outputs = session.run_outputs(path, images, optimised)
        gaps = [
            float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-12))
            for a, b in zip(outputs, expected, strict=True)
        ]
        gap = next((value for value in gaps if np.isnan(value)), max(gaps))
        if not gap <= tolerance:  # also true of nan
            task = matching_task(inspect.facts(path).outputs)
            agreement = f", and agree on {task.agreement(outputs, expected):.1f} %" if task else ""
            raise ParityError(
                f"`{path.name}` and torch differ by {gap:.1e} of the largest value of an output "
                f"(allowed: {tolerance:.0e}){agreement} of {len(images)} images, "
                f"with onnxruntime's optimisation {'on' if optimised else 'off'}",
                hint="look for operators that behave otherwise in ONNX (resize, pooling with ceil_mode), "
                "or raise `export.tolerance`",
            )
        worst = max(worst, gap)
    return worst
