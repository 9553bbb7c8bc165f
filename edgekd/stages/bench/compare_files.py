"""Compare ONNX files of any origin on one target: latency always, accuracy where labels are given."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from edgekd.core import formatting, plugins
from edgekd.core.artifact import File, TensorSpec
from edgekd.core.bench_result import BenchmarkEntry, BenchResult
from edgekd.core.target import Target
from edgekd.core.task import matching_task, primary_metrics
from edgekd.errors import ConfigError, DataError, TargetUnavailable
from edgekd.onnx import inspect
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.bench.benchmark import BenchmarkRequest, benchmark, save_noise
from edgekd.stages.bench.cold_start import with_memory
from edgekd.stages.bench.config import BenchConfig, Scenario, Scope, scenarios
from edgekd.stages.bench.entries import Entries
from edgekd.utils.arrays import save_array
from edgekd.utils.external import external_code


@dataclass(frozen=True)
class FileComparison:
    """ONNX files to compare with the first of them, on one target."""

    models: tuple[Path, ...]
    target_name: str
    config: BenchConfig
    images: Path | None = None
    """Network inputs, .npz or .npy, (N, C, H, W); None: noise."""
    labels: Path | None = None
    """Their classes, .npy; None: only latency is measured."""
    threads: int = 1
    scenario: Scenario | None = None
    """None: the main scenario of `config`."""


def compare_files(out: Path, comparison: FileComparison) -> BenchResult:
    """Measure files against the first of them.

    Raises:
        TargetUnavailable: This machine cannot run the target.
        ConfigError: The files cannot be compared.
        DataError: Images or labels are unfit.
    """
    target: Target = replace(plugins.load("targets", comparison.target_name)(), threads=comparison.threads)
    if reason := target.unavailable_reason():
        raise TargetUnavailable(f"target `{comparison.target_name}`: {reason}", hint="run it where the target is")
    models, images, labels = comparison.models, comparison.images, comparison.labels
    entries = tuple(load_entry(path, name) for path, name in zip(models, short_names(models), strict=True))
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
    if images is None:
        inputs = save_noise(out, spec.shape[1:], comparison.config.seed)
    else:
        inputs = save_inputs(out, images, spec)
    truth = None if labels is None else check_labels(labels, inputs, entries)
    request = BenchmarkRequest(
        entries,
        comparison.target_name,
        target,
        inputs,
        truth,
        reference=entries[0].name,
        config=comparison.config,
        scenario=comparison.scenario,
    )
    return benchmark(out, request)


def compare_all(out: Path, comparison: FileComparison, threads: tuple[int, ...]) -> tuple[BenchResult, ...]:
    """Run `compare_files` with every number of threads in every scenario; the first in `out`, others below."""
    results: list[BenchResult] = []
    every = scenarios(comparison.config)
    for count in threads:
        tables = []
        for scenario in every:
            name = "-".join(filter(None, (f"{count}t" if count != threads[0] else "", scenario.slug)))
            labels = comparison.labels if scenario.main else None
            one = replace(comparison, threads=count, scenario=scenario, labels=labels)
            tables.append(compare_files(out / name, one))
        cold = [table for scenario, table in zip(every, tables, strict=True) if scenario.scope == "cold_start"]
        results += [with_memory(tables[0], cold[0]) if cold else tables[0], *tables[1:]]
    return tuple(results)


def parse_lists(batch: str, scope: str, threads: str) -> tuple[list[int], list[str], list[int]]:
    """Return the batches, scopes and numbers of threads of a command line, whose lists have commas.

    Raises ConfigError.
    """
    scopes, choices = [word.strip() for word in scope.split(",")], get_args(Scope)
    for word in scopes:
        if word not in choices:
            raise plugins.unknown_name(f"there is no scope `{word}`", word, list(choices))
    return numbers("--batch", batch), scopes, numbers("--threads", threads)


def smoke_config(config: BenchConfig) -> BenchConfig:
    """Return a configuration with a few calls only; its numbers mean nothing."""
    return replace(config, rounds=4, calls_per_round=16, warmup_s=0.05, metrics=(*primary_metrics(), "p50_ms"))


def numbers(option: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"{option} is `{text}`", hint=f"give whole numbers, each once, such as {option} 1,2")
    return list(map(int, words))


def load_entry(path: Path, name: str) -> BenchmarkEntry:
    """Return an ONNX file as an entry of a comparison."""
    facts = inspect.facts(path)
    return BenchmarkEntry(name, "student", "", facts.precision, File.of(path), facts.macs or 0, facts.parameters)


def short_names(models: tuple[Path, ...]) -> list[str]:
    """Return the file names, or as much of the paths as it takes to distinguish them."""
    names = [path.name for path in models]
    if len(set(names)) == len(names):
        return names
    resolved = [str(path.resolve()) for path in models]
    if len(set(resolved)) < len(resolved):
        raise ConfigError("one file is given twice", hint="a comparison has its own control: the first file, twice")
    shared = os.path.commonpath(resolved)
    return [os.path.relpath(path, shared) for path in resolved]


def save_inputs(out: Path, images: Path, spec: TensorSpec) -> File:
    """Return the network inputs in `images` as .npy in `out`."""
    save_array(out / "inputs.npy", load_calibration(images, spec))
    return File.of(out / "inputs.npy")


def check_labels(labels: Path, inputs: File, entries: Entries) -> File:
    """Return the labels, which are the class numbers of `inputs`: .npy, (N,) of any integer type.

    Raises ConfigError if there is no such file, DataError if it holds anything else.
    """
    if not labels.is_file():
        raise ConfigError(f"there is no file `{labels}`", hint="give an .npy of class numbers")
    as_npy = "write it with numpy.save(path, labels), labels being class numbers, one for each image"
    with (
        external_code(f"`{labels}` is not a readable .npy file of numbers", as_npy, DataError),
        labels.open("rb") as stream,
    ):
        array = np.load(stream, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise DataError(f"`{labels}` is an archive of arrays", hint=as_npy)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"`{labels}` holds {array.dtype} of shape {array.shape}, not class numbers", hint=as_npy)
    images = len(np.load(inputs.path, mmap_mode="r"))
    if len(array) != images:
        raise DataError(f"`{labels}` holds {len(array)} labels for {images} images", hint="give one for each image")
    classes = min(filter(None, (num_classes(entry.file.path) for entry in entries)), default=0)
    if array.min() < 0 or (classes and array.max() >= classes):
        valid = f"0 to {classes - 1}" if classes else "0 or more"
        raise DataError(
            f"`{labels}` holds numbers from {array.min()} to {array.max()}, the classes are {valid}",
            hint="count classes from 0, as the networks do",
        )
    return File.of(labels)


def num_classes(path: Path) -> int:
    """Return the columns of a classifier's logits; 0 where a file is none, or does not say."""
    outputs = inspect.facts(path).outputs
    task = matching_task(outputs)
    return outputs[0].shape[1] if task and task.class_logits else 0


def format_number(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


def table(result: BenchResult) -> str:
    """Return a comparison for a terminal, with its machine."""
    names = list(dict.fromkeys(name for m in result.measurements for name in m.metrics))
    rows = [["model", "precision", "computed in", *names, "compared with the first"]]
    for m in result.measurements:
        cells = [format_number(m.metrics[name]) if name in m.metrics else "-" for name in names]
        rows.append([m.model.name, m.model.precision, m.compute_precision or "-", *cells, m.verdict or "-"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{result.title}:"] if result.scenario else []
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    machine, runtime = result.machine, result.runtime
    if machine and runtime:
        lines.append(
            f"{machine.processor}, {runtime.name} {runtime.version}, threads: {runtime.threads}, {result.started}"
        )
    if result.aa_ratio:
        lines.append(f"A/A control: {formatting.near_one(result.aa_ratio)}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in result.warnings)])
