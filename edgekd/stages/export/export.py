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
from typing import TYPE_CHECKING

from edgekd.core.artifact import Exported
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError, ExportError, ParityError
from edgekd.onnx import inspect, session, writer
from edgekd.onnx.inspect import OnnxFacts
from edgekd.utils.external import foreign

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import Tensor, nn

INPUT, OUTPUT = "image", "logits"
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
    answer: tuple[int, ...] | None,
    config: ExportConfig,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write `NAME.onnx` (batch 1) and `NAME-dynamic.onnx` into `out`; `network` stays as it is.

    `images` are real network inputs, (N, C, H, W) float32. `answer` is the shape that one image must be answered with;
    None takes what comes. `metadata` (mean, std, class names ...) goes into the files.
    Raises ExportError if the network cannot be exported as asked, ParityError if a file answers otherwise than torch.
    """
    import torch

    images = images[: config.images]
    plain = deepcopy(network).to("cpu", torch.float32).eval()
    plain = plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with (
        foreign(
            f"the network does not take images of shape (N, {', '.join(map(str, images.shape[1:]))})",
            "give it the channels and the size that it was made for",
            ExportError,
        ),
        torch.no_grad(),
    ):
        logits = plain(torch.from_numpy(images))
    wanted = (len(images), *(answer if answer is not None else getattr(logits, "shape", (0,))[1:]))
    if not isinstance(logits, torch.Tensor) or logits.shape != wanted:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ExportError(
            f"`{type(network).__name__}` answers {len(images)} images with {got}, not with {wanted}",
            hint="forward() must return the answers alone: logits, one row per image and one column per class, or maps",
        )
    want = logits.numpy()
    single, dynamic = out / f"{name}.onnx", out / f"{name}-dynamic.onnx"
    model = translate(plain, images, config.opset, want.shape[1:])
    writer.write(model, dynamic, metadata or {})
    writer.write(with_batch_of_one(model), single, metadata or {})
    for path, batch in ((single, 1), (dynamic, 0)):
        check_form(inspect.check(path), path, (batch, *images.shape[1:]), (batch, *wanted[1:]), config.opset)
        check_folded(path)
        compare(path, images, want, config.tolerance)
    alone = inspect.described(single, name)
    return Exported(alone, inspect.described(dynamic, f"{name}-dynamic", alone.macs))


def translate(network: nn.Module, images: np.ndarray, opset: int, answer: tuple[int, ...]) -> onnx.ModelProto:
    """The network with a dynamic batch, as torch's exporter wrote it. Raises ExportError with the exporter's cause."""
    import torch

    first = torch.from_numpy(images[:1])
    probe = torch.cat([first, first])  # two: a batch of one would be taken for a constant
    with (
        foreign(
            f"torch cannot export `{type(network).__name__}` to ONNX",
            "forward() must take one image batch and have no branch that depends on the values of tensors",
            ExportError,
        ),
        hushed(),
    ):
        return programmed(network, probe, opset) if opset >= PROGRAM_OPSET else traced(network, probe, opset, answer)


def programmed(network: nn.Module, probe: Tensor, opset: int) -> onnx.ModelProto:
    """By way of torch.export."""
    import torch

    program = torch.onnx.export(
        network,
        (probe,),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    if program is None:  # only older exporters
        raise ExportError("torch's exporter returned nothing", hint="install torch 2.6 or newer")
    return program.model_proto


def traced(network: nn.Module, probe: Tensor, opset: int, answer: tuple[int, ...]) -> onnx.ModelProto:
    """By way of TorchScript, torch's only exporter below opset 18; `answer` is the shape of the answer to one image.

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
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )
        model = onnx.load(f"{folder}/traced.onnx")
    for value in model.graph.output:  # the exporter leaves sizes open that it computes
        shape = [onnx.TensorShapeProto.Dimension(dim_value=size) for size in answer]
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


def check_form(found: OnnxFacts, path: Path, entering: tuple[int, ...], leaving: tuple[int, ...], opset: int) -> None:
    """Raises ExportError unless the file is what was asked for."""
    output = found.outputs[0]
    wishes = (
        ("opset", found.opset, opset),
        ("operator sets", found.domains, ("",)),
        ("input", (found.input.name, found.input.shape, found.input.dtype), (INPUT, entering, "float32")),
        ("outputs", (len(found.outputs), output.name, output.shape, output.dtype), (1, OUTPUT, leaving, "float32")),
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
    uses = [name for node in model.graph.node for name in node.input]
    convolved = {n.output[0] for n in model.graph.node if n.op_type == "Conv" and uses.count(n.output[0]) == 1}
    for node in model.graph.node:
        if node.op_type == "BatchNormalization" and node.input[0] in convolved:
            raise ExportError(
                f"`{path.name}` still has the BatchNormalization `{node.name}` behind a convolution",
                hint="train with BatchNorm statistics on (track_running_stats=True), so that it can be folded",
            )


def compare(path: Path, images: np.ndarray, want: np.ndarray, tolerance: float) -> float:
    """The largest difference to torch's logits `want`, as a share of the largest absolute one.

    Both with onnxruntime's graph optimisation and without: the two disagree where constant folding goes wrong.
    Raises ParityError above `tolerance`; below, the top class is the same wherever it leads by twice as much.
    """
    import numpy as np

    worst = 0.0
    for optimised in (True, False):
        got = session.answers(path, images, optimised)
        gap = float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-12))
        changed = int((got.argmax(1) != want.argmax(1)).sum())
        if not gap <= tolerance:  # also true of nan
            raise ParityError(
                f"`{path.name}` and torch differ by {gap:.1e} of the largest logit (allowed: {tolerance:.0e}), "
                f"and in the top class of {changed} of {len(images)} images, "
                f"with onnxruntime's optimisation {'on' if optimised else 'off'}",
                hint="look for operators that behave otherwise in ONNX (resize, pooling with ceil_mode), "
                "or raise `export.tolerance`",
            )
        worst = max(worst, gap)
    return worst
