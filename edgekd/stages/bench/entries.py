"""Who stands in a comparison: every file in each way that its target computes it, and who is its measure."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekd.core import plugins
from edgekd.core.artifact import File
from edgekd.core.bench_result import Contestant
from edgekd.core.target import Target
from edgekd.errors import ConfigError, DataError


def computed(contestants: tuple[Contestant, ...], target: Target) -> tuple[Contestant, ...]:
    """The contestants, each float file once for every precision that the target computes floats in."""
    first, *others = target.floats
    found = []
    for c in contestants:
        found.append(replace(c, floats=first))
        if c.precision == "fp32":
            found += [replace(c, name=f"{c.name} ({other} precision)", floats=other) for other in others]
    return tuple(found)


def check(contestants: tuple[Contestant, ...], inputs: File, labels: File | None, reference: str) -> None:
    """Raises ConfigError or DataError unless these can be compared on these images."""
    names = [c.name for c in contestants]
    if not names:
        raise ConfigError("there is nothing to measure", hint="give at least one model")
    if len(set(names)) < len(names):
        raise ConfigError(f"contestants share a name: {', '.join(names)}", hint="give each its own")
    if labels is None:
        return
    if reference not in names:
        raise plugins.unknown(f"the reference `{reference}` is not a contestant", reference, names)
    images, answers = len(np.load(inputs.path, mmap_mode="r")), len(np.load(labels.path))
    if images != answers:
        raise DataError(f"there are {images} inputs and {answers} labels", hint="give one label for each input")


def original(contestant: Contestant, contestants: tuple[Contestant, ...], reference: str) -> int | None:
    """Whose answers those of a contestant are held against; None where that says nothing, or several could be meant.

    Of a float file that was computed otherwise than in FP32: itself in FP32. Of an INT8 or FP16 file, the FP32 one
    that it came from: of its name, or of its role and method, or else `reference`.
    """
    exact = {i: c for i, c in enumerate(contestants) if (c.precision, c.floats) == ("fp32", "fp32")}
    if contestant.precision == "fp32":
        found = [i for i, c in exact.items() if c.file == contestant.file and contestant.floats != "fp32"]
        return found[0] if found else None
    twin = f"{contestant.name.removesuffix(contestant.precision)}fp32"
    found = [i for i, c in exact.items() if c.name == twin]
    found = found or [i for i, c in exact.items() if (c.role, c.method) == (contestant.role, contestant.method)]
    found = found or [i for i, c in exact.items() if c.name == reference]
    return found[0] if len(found) == 1 else None


def linked(out: Path, index: int, contestant: Contestant) -> File:
    """The contestant's file under a name of its own in `out`; a copy where the disk cannot link."""
    plain_name = re.sub(r"[^a-z0-9.]+", "-", contestant.name.lower()).strip("-")
    path = out / f"{index}-{plain_name}{contestant.file.path.suffix}"
    path.unlink(missing_ok=True)
    try:
        os.link(contestant.file.path, path)
    except OSError:
        shutil.copyfile(contestant.file.path, path)
    return File.checked(path, contestant.file.sha256)
