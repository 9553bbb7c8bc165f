"""Assign to a target the student that ships there: the most accurate one within its latency budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgekd.core.bench_result import BenchResult, Measurement


def assigned(bench: BenchResult, budget_ms: float | None, valid_accuracy: Mapping[str, float]) -> BenchResult:
    """The result with `ships` filled in. Accuracy on validation data chooses: test data only reports.

    Each in INT8, or in floats where it is measurably faster so, or where no student has INT8. Of equally accurate
    ones, the faster. Where none is within the budget, none ships, and a warning says so. Nor does one ship whose
    answers on the device are not the host's. `valid_accuracy` knows the students by the names of their rows.
    """
    known = [m for m in bench.measurements if m.contestant.role == "student" and "p50_ms" in m.readings]
    networks: dict[str, list[Measurement]] = {}
    for m in known:
        if not m.astray:
            networks.setdefault(m.contestant.name.partition(f" {m.contestant.precision}")[0], []).append(m)
    int8 = [rows for rows in networks.values() if any(m.contestant.precision == "int8" for m in rows)]
    timed = [m for rows in int8 or networks.values() for m in in_best_precision(rows)]
    fitting = [m for m in timed if budget_ms is None or m.readings["p50_ms"] <= budget_ms]
    if not timed:
        return bench
    if not fitting:
        fastest = min(m.readings["p50_ms"] for m in timed)
        said = f"no student is within the budget of {budget_ms:g} ms: the fastest takes {fastest:.3g} ms (median)"
        return replace(bench, warnings=(*bench.warnings, said))
    best = max(fitting, key=lambda m: (valid_accuracy[m.contestant.name], -m.readings["p50_ms"]))
    return replace(bench, ships=best.contestant.name)


def in_best_precision(rows: list[Measurement]) -> list[Measurement]:
    """Of one network: its INT8 form, if there is one; others that are faster beyond doubt take its place."""
    int8 = [m for m in rows if m.contestant.precision == "int8"]
    faster = [m for m in rows if any(o.speedup and m.speedup and m.speedup.low > o.speedup.high for o in int8)]
    return faster or int8 or rows
