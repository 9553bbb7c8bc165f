"""The entries of a comparison: each model in each compute precision, and the FP32 file that it is compared with."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekd.core import plugins
from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchmarkEntry
from edgekd.core.target import Target
from edgekd.errors import ConfigError, DataError

Entries = tuple[BenchmarkEntry, ...]


def expand_precisions(entries: Entries, target: Target) -> Entries:
    """Return the entries, with each FP32 file once for every precision that the target computes float operators in."""
    first, *others = target.compute_precisions
    expanded = []
    for entry in entries:
        expanded.append(replace(entry, compute_precision=first))
        if entry.precision == "fp32":
            for other in others:
                name = f"{entry.name} ({other} precision)"
                expanded.append(replace(entry, name=name, compute_precision=other))
    return tuple(expanded)


def check(entries: Entries, inputs: File, labels: File | None, reference: str) -> None:
    """Raise ConfigError or DataError unless these entries can be compared on these images."""
    names = [entry.name for entry in entries]
    if not names:
        raise ConfigError("there is nothing to measure", hint="give at least one model")
    if len(set(names)) < len(names):
        raise ConfigError(f"models share a name: {', '.join(names)}", hint="give each a name of its own")
    if labels is None:
        return
    if reference not in names:
        raise plugins.unknown_name(f"the reference `{reference}` is not among the models", reference, names)
    images, count = len(np.load(inputs.path, mmap_mode="r")), len(np.load(labels.path))
    if images != count:
        raise DataError(f"there are {images} inputs and {count} labels", hint="give one label for each input")


def fp32_twin(entry: BenchmarkEntry, entries: Entries, reference: str) -> int | None:
    """Return the index of the entry that an entry's outputs are compared with; None if there is none, or no single one.

    Of an FP32 file that is computed in another precision: itself in FP32. Of an INT8 or FP16 file, the FP32 file that
    it was made from: the one with its name, or its role and method, or else `reference`.
    """
    exact = {i: c for i, c in enumerate(entries) if (c.precision, c.compute_precision) == ("fp32", "fp32")}
    if entry.precision == "fp32":
        twins = [i for i, c in exact.items() if c.file == entry.file and entry.compute_precision != "fp32"]
        return twins[0] if twins else None
    name = f"{entry.name.removesuffix(entry.precision)}fp32"
    twins = [i for i, c in exact.items() if c.name == name]
    twins = twins or [i for i, c in exact.items() if (c.role, c.method) == (entry.role, entry.method)]
    twins = twins or [i for i, c in exact.items() if c.name == reference]
    return twins[0] if len(twins) == 1 else None


def link(out: Path, index: int, entry: BenchmarkEntry) -> File:
    """Return the entry's file linked into `out` under a unique name; a copy where the disk cannot link."""
    plain_name = re.sub(r"[^a-z0-9.]+", "-", entry.name.lower()).strip("-")
    path = out / f"{index}-{plain_name}{entry.file.path.suffix}"
    path.unlink(missing_ok=True)
    try:
        os.link(entry.file.path, path)
    except OSError:
        shutil.copyfile(entry.file.path, path)
    return File.checked(path, entry.file.sha256)
