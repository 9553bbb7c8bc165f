"""Facts about ONNX operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def channel_axis(node: onnx.NodeProto) -> int:
    """Return the axis of a weighted operator's weight that counts its output channels."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)):
        return 0
    return 1
