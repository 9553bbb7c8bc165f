"""Assign to a target the student that ships there: the most accurate one within its latency budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgekd.core.trial import BenchResult


def assigned(bench: BenchResult, budget_ms: float | None, valid_accuracy: Mapping[str, float]) -> BenchResult:
    """The result with `ships` filled in. Accuracy on validation data chooses: test data only reports.

    Of equally accurate students, the faster. Where none is within the budget, none ships, and a warning says so. Nor
    does one ship whose answers on the device are not the host's.
    """
    int8 = [m for m in bench.measurements if m.contestant.role == "student" and m.contestant.precision == "int8"]
    timed = [m for m in int8 if "p50_ms" in m.readings and not m.astray]
    fitting = [m for m in timed if budget_ms is None or m.readings["p50_ms"] <= budget_ms]
    if not timed:
        return bench
    if not fitting:
        fastest = min(m.readings["p50_ms"] for m in timed)
        said = f"no student is within the budget of {budget_ms:g} ms: the fastest takes {fastest:.3g} ms (median)"
        return replace(bench, warnings=(*bench.warnings, said))
    best = max(fitting, key=lambda m: (valid_accuracy[m.contestant.name], -m.readings["p50_ms"]))
    return replace(bench, ships=best.contestant.name)
