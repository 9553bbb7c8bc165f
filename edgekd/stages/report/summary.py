"""Format the main comparison on a target as a table for a terminal; every other number is in the report."""

from __future__ import annotations

from edgekd.core import artifact, formatting
from edgekd.core.bench_result import BenchResult, Measurement
from edgekd.stages.report.tables import percentages

TIMES = ("p50_ms", "p99_ms")


def format_summary(bench: BenchResult) -> str:
    """Return one line for each model: accuracy, size, median, p99, and speed-up over the teacher with its interval."""
    accuracy = next((name for m in bench.measurements for name in m.metrics if name in percentages()), None)
    title = percentages()[accuracy][0] if accuracy else "accuracy"
    heads = ("model", "taught by", "precision", title, "size", "median ms", "p99 ms", "speed-up (95 %)")
    rows = [heads, *(row(measurement, accuracy) for measurement in bench.measurements)]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(heads))]
    lines = [f"{bench.target}:"]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows
    ]
    if bench.selected:
        lines.append(f"selected: {bench.selected}")
    if bench.machine and bench.runtime:
        runtime = f"{bench.runtime.name} {bench.runtime.version}, threads: {bench.runtime.threads}"
        lines.append(f"{bench.machine.processor}, {runtime}, {formatting.when(bench.started)}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in bench.warnings)])


def row(measurement: Measurement, accuracy: str | None) -> tuple[str, ...]:
    """Return the cells of one model."""
    entry, metrics = measurement.model, measurement.metrics
    precision: str = entry.precision
    if measurement.compute_precision not in ("", "fp32"):
        precision = f"{precision} ({measurement.compute_precision})"
    return (
        model_name(measurement),
        entry.method or "-",
        precision,
        f"{metrics[accuracy]:.1f} %" if accuracy in metrics else "-",
        formatting.file_size(artifact.size(entry.file)),
        *(formatting.figures(metrics[name]) if name in metrics else "-" for name in TIMES),
        formatting.interval(measurement.speedup) if measurement.speedup else "-",
    )


def model_name(measurement: Measurement) -> str:
    """Return the role of a model, or its name where that says more: of a family of students."""
    entry = measurement.model
    name = entry.name.removesuffix(f" ({entry.compute_precision} precision)").removesuffix(f" {entry.precision}")
    return entry.role if name in (entry.method, entry.role) else name
