"""Select the student for a target: the most accurate one within its latency budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgekd.core.bench_result import BenchResult, Measurement


def select_model(bench: BenchResult, budget_ms: float | None, valid_accuracy: Mapping[str, float]) -> BenchResult:
    """Return the result with `selected` filled in. Accuracy on validation data chooses: test data only reports.

    Each in INT8, or in floats where it is measurably faster so, or where no student has INT8. Of equally accurate
    ones, the faster. Where none is within the budget, none is selected, and a warning says so. Nor
    is one whose outputs on the device are not the host's. `valid_accuracy` has the students by entry name.
    """
    students = [m for m in bench.measurements if m.model.role == "student" and "p50_ms" in m.metrics]
    networks: dict[str, list[Measurement]] = {}
    for m in students:
        if not m.mismatch:
            networks.setdefault(m.model.name.partition(f" {m.model.precision}")[0], []).append(m)
    int8 = [rows for rows in networks.values() if any(m.model.precision == "int8" for m in rows)]
    timed = [m for rows in int8 or networks.values() for m in in_best_precision(rows)]
    fitting = [m for m in timed if budget_ms is None or m.metrics["p50_ms"] <= budget_ms]
    if not timed:
        return bench
    if not fitting:
        fastest = min(m.metrics["p50_ms"] for m in timed)
        warning = f"no student is within the budget of {budget_ms:g} ms: the fastest takes {fastest:.3g} ms (median)"
        return replace(bench, warnings=(*bench.warnings, warning))
    best = max(fitting, key=lambda m: (valid_accuracy[m.model.name], -m.metrics["p50_ms"]))
    return replace(bench, selected=best.model.name)


def in_best_precision(rows: list[Measurement]) -> list[Measurement]:
    """Of one network: its INT8 form, if there is one; others that are faster beyond doubt take its place."""
    int8 = [m for m in rows if m.model.precision == "int8"]
    faster = [m for m in rows if any(o.speedup and m.speedup and m.speedup.low > o.speedup.high for o in int8)]
    return faster or int8 or rows
