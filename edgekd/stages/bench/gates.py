"""Gates: decide from intervals whether what ships is good enough; what the numbers do not show is undecided."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from edgekd.core import plugins
from edgekd.core.artifact import size
from edgekd.core.bench_result import BenchResult, Interval, Measurement
from edgekd.core.gate import Decision, Gate, Outcome
from edgekd.errors import ConfigError
from edgekd.stages.bench.statistics import NOISY
from edgekd.utils.text import visible

# measures that are no metrics
OTHER = ("drop", "teacher_drop", "speedup", "kilobytes", "macs", "parameters", "memory_mb")
DOUBTS = ("A/A", "throttled")  # warnings that leave a latency undecided
EXIT = {"passed": 0, "failed": 3, "undecided": 4}


def check(
    gates: Iterable[Gate], metrics: Iterable[str], targets: Iterable[str], scopes: Iterable[str] = ("copies",)
) -> None:
    """Raises ConfigError for a gate that looks at nothing which is measured, or is for a target that is not there."""
    starts = "cold" in scopes
    measured, labels, families = list(metrics), list(targets), plugins.names("targets")
    known, there = (*measured, *OTHER), sorted({*labels, *families})
    for gate in gates:
        if "p50_ms" not in measured:  # what ships is chosen by its latency, too
            raise ConfigError("gates need the metric `p50_ms`", hint="add it to bench.metrics")
        if gate.measure not in known:
            raise plugins.unknown(f"no gate can look at `{gate.measure}`", gate.measure, list(known))
        if gate.measure == "memory_mb" and not starts:
            raise ConfigError("a gate looks at `memory_mb`, which is not measured", hint="add `cold` to bench.scopes")
        if gate.target and gate.target not in there:
            raise plugins.unknown(f"a gate is for the target `{gate.target}`", gate.target, there)


def decide(gates: Iterable[Gate], benches: Iterable[BenchResult]) -> tuple[Decision, ...]:
    """Every gate on every target that it is for, about the file that ships there, in the target's main table."""
    rows = [bench for bench in benches if not bench.scenario]
    return tuple(decided(gate, bench) for gate in gates for bench in rows if meant(gate, bench.target))


def meant(gate: Gate, target: str) -> bool:
    """Whether a gate is for a target: for all, for this one, or for all of its family (`cpu`: also `cpu-4t`)."""
    return gate.target in ("", target) or target.startswith(f"{gate.target}-")


def decided(gate: Gate, bench: BenchResult) -> Decision:
    shipped = next((m for m in bench.measurements if m.contestant.name == bench.ships), None)
    if shipped is None:
        reason = bench.not_measured or "no file ships: none is as accurate and as fast as asked for"
        outcome: Outcome = "undecided" if bench.not_measured else "failed"
        return Decision(bench.target, gate, "", outcome, None, reason)
    found = number(gate.measure, shipped)
    name = shipped.contestant.name
    if found is None:
        return Decision(bench.target, gate, name, "undecided", None, f"`{gate.measure}` was not measured for {name}")
    if doubt(bench) and timed(gate.measure):
        return Decision(bench.target, gate, name, "undecided", found, f"{NOISY}: {doubt(bench)}")
    outcome = held(gate, found)
    return Decision(bench.target, gate, name, outcome, found, said(found))


def doubt(bench: BenchResult) -> str:
    """Why its latencies decide nothing; "" where they do."""
    return next((warning for warning in bench.warnings if warning.startswith(DOUBTS)), "")


def decisive(gates: Iterable[Gate], bench: BenchResult) -> bool:
    """False where noise leaves a gate undecided; to measure again may help there."""
    asked = any(timed(gate.measure) and meant(gate, bench.target) for gate in gates)
    return bool(bench.scenario) or not (asked and doubt(bench))


def timed(measure: str) -> bool:
    return measure == "speedup" or measure not in OTHER and "ns" in plugins.load("metrics", measure).reads


def held(gate: Gate, found: Interval) -> Outcome:
    """Passed or failed where the whole interval lies on one side of the limit."""
    if gate.at_most is not None:
        within, beyond = found.high <= gate.at_most, found.low > gate.at_most
    else:
        assert gate.at_least is not None
        within, beyond = found.low >= gate.at_least, found.high < gate.at_least
    return "passed" if within else "failed" if beyond else "undecided"


def number(measure: str, of: Measurement) -> Interval | None:
    if measure == "speedup":
        return of.speedup
    if measure in of.intervals:
        return of.intervals[measure]
    bytes_ = size(of.contestant.file)
    exact = {
        **({} if bytes_ is None else {"kilobytes": bytes_ / 1000}),
        "macs": float(of.contestant.macs),
        "parameters": float(of.contestant.parameters),
        **of.readings,
    }
    return Interval(exact[measure], exact[measure], exact[measure]) if measure in exact else None


def said(found: Interval) -> str:
    if found.low == found.high:
        return f"{found.mid:.4g}"
    return f"{found.mid:.4g}, 95 % {found.low:.4g} to {found.high:.4g}"


def exit_code(decisions: Iterable[Decision]) -> int:
    """0: all passed; 3: one failed; 4: none failed, one could not be decided."""
    outcomes = {d.outcome for d in decisions}
    return next((EXIT[o] for o in ("failed", "undecided") if o in outcomes), 0)


def junit(decisions: tuple[Decision, ...], path: Path) -> None:
    """As CI systems read it: a failed gate is a failure, an undecided one an error."""
    counts = {o: sum(d.outcome == o for d in decisions) for o in ("failed", "undecided")}
    totals = {"tests": len(decisions), "failures": counts["failed"], "errors": counts["undecided"]}
    suite = ElementTree.Element("testsuite", {"name": "edgekd"} | {k: str(v) for k, v in totals.items()})
    for d in decisions:
        case = ElementTree.SubElement(suite, "testcase", classname=visible(d.target), name=visible(d.gate.words))
        if d.outcome != "passed":
            ElementTree.SubElement(case, "failure" if d.outcome == "failed" else "error", message=visible(d.reason))
    ElementTree.ElementTree(suite).write(path, "utf-8", xml_declaration=True)
