"""Compare ONNX files of any origin on one target: latency always, accuracy where labels are given."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import numpy as np

from edgekd.core import formatting, plugins
from edgekd.core.artifact import File, TensorSpec
from edgekd.core.bench_result import BenchResult, Contestant
from edgekd.core.target import Target
from edgekd.errors import ConfigError, DataError, TargetUnavailable
from edgekd.onnx import inspect
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.bench.benchmark import benchmark, noise
from edgekd.stages.bench.cold_start import with_memory
from edgekd.stages.bench.config import BenchConfig, Scenario, Scope, scenarios
from edgekd.utils.arrays import save_array
from edgekd.utils.external import foreign


def compare_files(
    out: Path,
    models: tuple[Path, ...],
    target_name: str,
    threads: int,
    images: Path | None,
    labels: Path | None,
    config: BenchConfig,
    called: Scenario | None = None,
) -> BenchResult:
    """Measure `models` against the first of them. Without `images` they are fed noise. `called` is how they are called;
    the main scenario of `config` if it is not given.

    Raises TargetUnavailable if this machine cannot run the target, ConfigError if the files do not go together,
    DataError if images or labels are unfit.
    """
    target: Target = replace(plugins.load("targets", target_name)(), threads=threads)
    if reason := target.missing():
        raise TargetUnavailable(f"target `{target_name}`: {reason}", hint="run it where the target is")
    contestants = tuple(contestant(path, name) for path, name in zip(models, short_names(models), strict=True))
    spec = inspect.facts(models[0]).input
    for path in models[1:]:
        other = inspect.facts(path).input
        if other.shape[1:] != spec.shape[1:]:
            raise ConfigError(
                f"`{path}` takes {other.shape[1:]}, `{models[0]}` takes {spec.shape[1:]}",
                hint="compare networks that take the same images",
            )
    if labels is not None and images is None:
        raise ConfigError("there are labels without images", hint="give the images that they belong to")
    out.mkdir(parents=True, exist_ok=True)
    inputs = noise(out, spec.shape[1:], config.seed) if images is None else given(out, images, spec)
    truth = None if labels is None else true_classes(labels, inputs, contestants)
    return benchmark(out, contestants, target_name, target, inputs, truth, contestants[0].name, config, called)


def comparisons(
    out: Path,
    models: tuple[Path, ...],
    target_name: str,
    threads: tuple[int, ...],
    images: Path | None,
    labels: Path | None,
    config: BenchConfig,
) -> tuple[BenchResult, ...]:
    """`compare_files` with every number of threads in every scenario of `config`; the first in `out`, others below."""
    found = []
    for count in threads:
        own = []
        for called in scenarios(config):
            name = "-".join(filter(None, (f"{count}t" if count != threads[0] else "", called.slug)))
            truth = labels if called.main else None
            own.append(compare_files(out / name, models, target_name, count, images, truth, config, called))
        cold = [result for called, result in zip(scenarios(config), own, strict=True) if called.scope == "cold"]
        found += [with_memory(own[0], cold[0]) if cold else own[0], *own[1:]]
    return tuple(found)


def asked(
    smoke: bool, threads: str, batch: str, scope: str, rate: float | None, throughput: bool
) -> tuple[BenchConfig, tuple[int, ...]]:
    """What a command line asks for, lists with commas; and the numbers of threads. Raises ConfigError."""
    scopes, known = tuple(word.strip() for word in scope.split(",")), get_args(Scope)
    for word in scopes:
        if word not in known:
            raise plugins.unknown(f"there is no scope `{word}`", word, list(known))
    config = BenchConfig(
        batches=numbers("--batch", batch), scopes=cast(tuple[Scope, ...], scopes), rate=rate, throughput=throughput
    )
    if smoke:
        config = replace(config, blocks=4, calls=16, warmup_s=0.05, metrics=("top1", "p50_ms"))
    return config, numbers("--threads", threads)


def numbers(option: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"{option} is `{text}`", hint=f"give whole numbers, each once, such as {option} 1,2")
    return tuple(map(int, words))


def contestant(path: Path, name: str) -> Contestant:
    found = inspect.facts(path)
    return Contestant(name, "student", "", found.precision, File.of(path), found.macs or 0, found.parameters)


def short_names(models: tuple[Path, ...]) -> list[str]:
    """The file names, or as much of the paths as it takes to tell them apart."""
    names = [path.name for path in models]
    if len(set(names)) == len(names):
        return names
    resolved = [str(path.resolve()) for path in models]
    if len(set(resolved)) < len(resolved):
        raise ConfigError("one file is given twice", hint="a comparison holds its own control: the first file, twice")
    shared = os.path.commonpath(resolved)
    return [os.path.relpath(path, shared) for path in resolved]


def given(out: Path, images: Path, spec: TensorSpec) -> File:
    save_array(out / "inputs.npy", load_calibration(images, spec))
    return File.of(out / "inputs.npy")


def true_classes(labels: Path, inputs: File, contestants: tuple[Contestant, ...]) -> File:
    """The labels, which number the classes of `inputs`: .npy, (N,) of any integer.

    Raises ConfigError if there is no such file, DataError if it holds anything else.
    """
    if not labels.is_file():
        raise ConfigError(f"there is no file `{labels}`", hint="give an .npy of class numbers")
    as_npy = "write it with numpy.save(path, labels), labels being class numbers, one for each image"
    with foreign(f"`{labels}` is not a readable .npy file of numbers", as_npy, DataError), labels.open("rb") as stream:
        found = np.load(stream, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise DataError(f"`{labels}` is an archive of arrays", hint=as_npy)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"`{labels}` holds {found.dtype} of shape {found.shape}, not class numbers", hint=as_npy)
    images = len(np.load(inputs.path, mmap_mode="r"))
    if len(found) != images:
        raise DataError(f"`{labels}` holds {len(found)} labels for {images} images", hint="give one for each image")
    classes = min(filter(None, (inspect.facts(c.file.path).classes for c in contestants)), default=0)
    if found.min() < 0 or (classes and found.max() >= classes):
        known = f"0 to {classes - 1}" if classes else "0 or more"
        raise DataError(
            f"`{labels}` holds numbers from {found.min()} to {found.max()}, the classes are {known}",
            hint="count classes from 0, as the networks do",
        )
    return File.of(labels)


def shown(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


def table(result: BenchResult) -> str:
    """A comparison for a terminal, with its machine."""
    names = list(dict.fromkeys(name for m in result.measurements for name in m.readings))
    rows = [["model", "precision", "floats in", *names, "compared with the first"]]
    for m in result.measurements:
        cells = [shown(m.readings[n]) if n in m.readings else "-" for n in names]
        rows.append([m.contestant.name, m.contestant.precision, m.floats or "-", *cells, m.verdict or "-"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{result.title}:"] if result.scenario else []
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    machine, runtime = result.machine, result.runtime
    if machine and runtime:
        lines.append(
            f"{machine.processor}, {runtime.name} {runtime.version}, threads: {runtime.threads}, {result.started}"
        )
    if result.aa:
        lines.append(f"A/A control: {formatting.near_one(result.aa)}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in result.warnings)])
