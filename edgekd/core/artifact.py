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
Floats = Literal["fp32", "default"]  # what a runtime is asked to compute float operations in; default: its own choice
# lowest, highest, mean and deviation of a tensor's values for one fixed input: finds it again in every export
Mark: TypeAlias = tuple[float, float, float, float]
STORY = {"key": False}  # metadata of fields that the ledger does not key by


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
        """The file as recorded. Raises StaleArtifact if it is gone or its bytes changed."""
        if not path.exists():
            raise StaleArtifact(f"`{path}` is gone", hint=f"delete `{path.parent}` so that the step runs again")
        found = cls.of(path)
        if found.sha256 != sha256:
            raise StaleArtifact(
                f"`{path}` changed since it was recorded: sha256 {sha256[:10]} then, {found.sha256[:10]} now",
                hint=f"delete `{path.parent}` so that the step runs again",
            )
        return found

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def found(value: dict[str, str], info: Any) -> File:
            find: Callable[[Path, str], File] = info.context.get("find", cls.checked)
            return find(info.context["home"] / value["name"], value["sha256"])

        told = {  # what lies elsewhere is not this artefact
            "name": (r"^[^/\\\x00]*[^/\\\x00.][^/\\\x00]*$", "it must be the name of a file, without a folder"),
            "sha256": ("^[0-9a-f]{64}$", "it must be 64 hexadecimal digits"),
        }
        fields = {}
        for key, (pattern, said) in told.items():
            text = core_schema.str_schema(pattern=pattern)
            kind = core_schema.custom_error_schema(text, f"file_{key}", custom_error_message=said)
            fields[key] = core_schema.typed_dict_field(kind)
        return core_schema.with_info_after_validator_function(found, core_schema.typed_dict_schema(fields))


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of a model's input, batch dimension first (0 stands for a dynamic one)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of one phase, for the training curves."""

    phase: str
    epoch: int
    losses: dict[str, float]  # mean over the epoch, training data
    seconds: float


@dataclass(frozen=True)
class PhaseRecord:
    """One finished phase: what its script was told."""

    name: str
    epochs: int
    losses: dict[str, float]  # on validation data
    accuracy: float | None  # of the student, on validation data, 0 to 1; None if the phase does not train it
    seconds: float
    curve: tuple[EpochRecord, ...]


@dataclass(frozen=True)
class Learnt:
    """The range of one tensor that training found for the INT8 form of a network; float32 numbers."""

    mark: Mark
    low: float
    high: float


@dataclass(frozen=True)
class Weights:
    """A trained network: its state dict, and how it came to be."""

    file: File  # safetensors
    name: str
    method: str  # file name of the method that taught it
    parameters: int
    # how it came to be; no part of what a step is keyed by, since equal weights are equal however long they took
    valid_accuracy: float | None = field(metadata=STORY)  # 0 to 1; None if it learnt from those images
    seconds: float = field(metadata=STORY)  # of training, interruptions not counted
    phases: tuple[PhaseRecord, ...] = field(default=(), metadata=STORY)
    notes: dict[str, Any] | None = field(default=None, metadata=STORY)  # what the method chose, for the report
    ranges: tuple[Learnt, ...] = ()  # of its INT8 form, instead of calibrated ones


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file that was read back and checked."""

    file: File
    name: str
    input: TensorSpec
    classes: int
    precision: Precision
    opset: int
    ir: int
    parameters: int
    macs: int  # multiply-accumulates of convolutions and matrix products, one image


@dataclass(frozen=True)
class Exported:
    """One network as two ONNX files with the same tensor names: batch 1 for the edge, dynamic batch for evaluation."""

    single: OnnxModel
    dynamic: OnnxModel


@dataclass(frozen=True)
class Remembered(File):
    """A file as report.json remembers it: the file itself may be gone."""

    size: int | None  # bytes


def size(file: File) -> int | None:
    """Bytes, or None if the file is gone and nobody wrote its size down."""
    if isinstance(file, Remembered):
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
