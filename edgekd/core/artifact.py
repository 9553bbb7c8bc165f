"""What stages hand to each other: files with hashes, and the facts the next stage needs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias
from uuid import uuid4

from edgekd.errors import StaleArtifact

Precision = Literal["fp32", "fp16", "int8"]
ComputePrecision = Literal["fp32", "native"]  # of float operators, as asked of a runtime; native: its own choice
# lowest, highest, mean and deviation of a tensor's values for one fixed input: finds it again in every export
Fingerprint: TypeAlias = tuple[float, float, float, float]
NOT_IN_KEY = {"key": False}  # metadata of fields that the step cache does not key by


@dataclass(frozen=True)
class File:
    """A file that must not change: its hash is checked whenever it is read back."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> File:
        with path.open("rb") as stream:
            return cls(path, hashlib.file_digest(stream, "sha256").hexdigest())

    @classmethod
    def checked(cls, path: Path, sha256: str) -> File:
        """Return the file as recorded. Raises StaleArtifact if it is gone or its bytes changed."""
        if not path.exists():
            raise StaleArtifact(f"`{path}` is gone", hint=f"delete `{path.parent}` so that the step runs again")
        file = cls.of(path)
        if file.sha256 != sha256:
            raise StaleArtifact(
                f"`{path}` changed since it was recorded: sha256 {sha256[:10]} then, {file.sha256[:10]} now",
                hint=f"delete `{path.parent}` so that the step runs again",
            )
        return file

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def load(value: dict[str, str], info: Any) -> File:
            find: Callable[[Path, str], File] = info.context.get("find", cls.checked)
            return find(info.context["home"] / value["name"], value["sha256"])

        patterns = {  # a file in another folder is not part of this artefact
            "name": (r"^[^/\\\x00]*[^/\\\x00.][^/\\\x00]*$", "it must be the name of a file, without a folder"),
            "sha256": ("^[0-9a-f]{64}$", "it must be 64 hexadecimal digits"),
        }
        fields = {}
        for key, (pattern, message) in patterns.items():
            text = core_schema.str_schema(pattern=pattern)
            kind = core_schema.custom_error_schema(text, f"file_{key}", custom_error_message=message)
            fields[key] = core_schema.typed_dict_field(kind)
        return core_schema.with_info_after_validator_function(load, core_schema.typed_dict_schema(fields))


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of a model's input or output, batch dimension first (0 stands for a dynamic one)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of one phase, for the training curves."""

    phase: str
    epoch: int
    losses: dict[str, float]
    """Mean over the epoch, training data."""
    seconds: float


@dataclass(frozen=True)
class PhaseRecord:
    """One finished phase: its result, which the method receives, and its training curve."""

    name: str
    epochs: int
    losses: dict[str, float]
    """On validation data."""
    accuracy: float | None
    """Of the student, on validation data, 0 to 1; null if the phase does not train it."""
    seconds: float
    curve: tuple[EpochRecord, ...]


@dataclass(frozen=True)
class LearnedRange:
    """The range of one tensor that training learned for the INT8 form of a network; float32 numbers."""

    fingerprint: Fingerprint
    low: float
    high: float


@dataclass(frozen=True)
class Weights:
    """A trained network: its state dict, and how it came to be."""

    file: File
    """Safetensors."""
    name: str
    method: str
    """File name of the method that trained it."""
    parameters: int
    # how it came to be; no part of what a step is keyed by, since equal weights are equal however long they took
    valid_accuracy: float | None = field(metadata=NOT_IN_KEY)
    """0 to 1; null if it was trained on those images."""
    seconds: float = field(metadata=NOT_IN_KEY)
    """Of training, interruptions not counted."""
    phases: tuple[PhaseRecord, ...] = field(default=(), metadata=NOT_IN_KEY)
    notes: dict[str, Any] | None = field(default=None, metadata=NOT_IN_KEY)
    """What the method chose, for the report."""
    ranges: tuple[LearnedRange, ...] = ()
    """Of its INT8 form, instead of calibrated ones."""


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file that was read back and checked."""

    file: File
    name: str
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    precision: Precision
    opset: int
    ir: int
    parameters: int
    macs: int
    """Multiply-accumulates of convolutions and matrix products, one image."""


@dataclass(frozen=True)
class Exported:
    """One network as two ONNX files with the same tensor names: batch 1 for the edge, dynamic batch for evaluation."""

    single: OnnxModel
    dynamic: OnnxModel


@dataclass(frozen=True)
class RecordedFile(File):
    """A file as report.json remembers it: the file itself may be gone."""

    size: int | None
    """Bytes."""


def size(file: File) -> int | None:
    """Bytes, or None if the file is gone and nobody wrote its size down."""
    if isinstance(file, RecordedFile):
        return file.size
    return file.bytes if file.path.exists() else None


def replace_files(files: Iterable[File], home: Path) -> None:
    """Copy files to where people look for them, each whole or not at all; two builds may do so at once."""
    home.mkdir(parents=True, exist_ok=True)
    for file in files:
        partial = home / f"{file.path.name}.{uuid4().hex[:8]}.partial"
        try:
            shutil.copyfile(file.path, partial)
            partial.replace(home / file.path.name)
        finally:
            partial.unlink(missing_ok=True)
