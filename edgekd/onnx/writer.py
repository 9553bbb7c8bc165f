"""Write ONNX files so that equal models are equal bytes, and nothing of this machine is in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

RESCALED = "edgekd.rescaled"  # metadata: what was done to the channels of inner tensors, so that they compare no longer


def write(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Write `model` with `metadata` and nothing else but the graph: equal networks give equal bytes anywhere."""
    path.write_bytes(to_bytes(model, metadata))


def to_bytes(model: onnx.ModelProto, metadata: Mapping[str, str]) -> bytes:
    """Return the bytes that `write` writes."""
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    strip(bare)
    keep_used_domains(bare)
    onnx.helper.set_model_props(bare, {key: metadata[key] for key in sorted(metadata)})
    serialized: bytes = bare.SerializeToString(deterministic=True)
    return serialized


def strip(message: onnx.ModelProto | onnx.GraphProto) -> None:
    """Remove descriptions: the exporter writes stack traces with this machine's paths into them."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "ListFields") else value:
                strip(inner)


def keep_used_domains(model: onnx.ModelProto) -> None:
    """Drop the imports of operator sets that no node uses: some parsers refuse what they do not know."""
    used = {node.domain for node in model.graph.node} | {""}
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
