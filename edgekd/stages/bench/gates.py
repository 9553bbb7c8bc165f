"""Gates: decide from intervals whether the selected file is good enough; undecided where the numbers do not show it."""

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
from edgekd.utils.text import escape_control_chars

# measures that are no metrics
OTHER = ("accuracy_drop", "accuracy_drop_vs_teacher", "speedup", "kilobytes", "macs", "parameters", "memory_mb")
DOUBTS = ("A/A", "throttled")  # warnings that leave a latency undecided
EXIT = {"passed": 0, "failed": 3, "undecided": 4}


def check(
    gates: Iterable[Gate], metrics: Iterable[str], targets: Iterable[str], scopes: Iterable[str] = ("end_to_end",)
) -> None:
    """Raises ConfigError for a gate that looks at nothing which is measured, or is for a target that is not there."""
    starts = "cold_start" in scopes
    measured, labels, families = list(metrics), list(targets), plugins.names("targets")
    names, there = (*measured, *OTHER), sorted({*labels, *families})
    for gate in gates:
        if "p50_ms" not in measured:  # the file is selected by its latency, too
            raise ConfigError("gates need the metric `p50_ms`", hint="add it to bench.metrics")
        if gate.metric not in names:
            raise plugins.unknown_name(f"no gate can look at `{gate.metric}`", gate.metric, list(names))
        if gate.metric == "memory_mb" and not starts:
            raise ConfigError(
                "a gate looks at `memory_mb`, which is not measured", hint="add `cold_start` to bench.scopes"
            )
        if gate.target and gate.target not in there:
            raise plugins.unknown_name(f"a gate is for the target `{gate.target}`", gate.target, there)


def decide(gates: Iterable[Gate], benches: Iterable[BenchResult]) -> tuple[Decision, ...]:
    """Every gate on every target that it is for, about the selected file, in the target's main table."""
    rows = [bench for bench in benches if not bench.scenario]
    return tuple(decided(gate, bench) for gate in gates for bench in rows if meant(gate, bench.target))


def meant(gate: Gate, target: str) -> bool:
    """Whether a gate is for a target: for all, for this one, or for all of its family (`cpu`: also `cpu-4t`)."""
    return gate.target in ("", target) or target.startswith(f"{gate.target}-")


def decided(gate: Gate, bench: BenchResult) -> Decision:
    shipped = next((m for m in bench.measurements if m.model.name == bench.selected), None)
    if shipped is None:
        reason = bench.not_measured or "no file is selected: none is as accurate and as fast as asked for"
        outcome: Outcome = "undecided" if bench.not_measured else "failed"
        return Decision(bench.target, gate, "", outcome, None, reason)
    interval = number(gate.metric, shipped)
    name = shipped.model.name
    if interval is None:
        return Decision(bench.target, gate, name, "undecided", None, f"`{gate.metric}` was not measured for {name}")
    if doubt(bench) and timed(gate.metric):
        return Decision(bench.target, gate, name, "undecided", interval, f"{NOISY}: {doubt(bench)}")
    outcome = compare_to_limit(gate, interval)
    return Decision(bench.target, gate, name, outcome, interval, format_interval(interval))


def doubt(bench: BenchResult) -> str:
    """Why its latencies decide nothing; "" where they do."""
    return next((warning for warning in bench.warnings if warning.startswith(DOUBTS)), "")


def decisive(gates: Iterable[Gate], bench: BenchResult) -> bool:
    """False where noise leaves a gate undecided; to measure again may help there."""
    wanted = any(timed(gate.metric) and meant(gate, bench.target) for gate in gates)
    return bool(bench.scenario) or not (wanted and doubt(bench))


def timed(measure: str) -> bool:
    return measure == "speedup" or measure not in OTHER and "ns" in plugins.load("metrics", measure).inputs


def compare_to_limit(gate: Gate, interval: Interval) -> Outcome:
    """Passed or failed where the whole interval lies on one side of the limit."""
    if gate.max is not None:
        within, beyond = interval.high <= gate.max, interval.low > gate.max
    else:
        assert gate.min is not None
        within, beyond = interval.low >= gate.min, interval.high < gate.min
    return "passed" if within else "failed" if beyond else "undecided"


def number(measure: str, of: Measurement) -> Interval | None:
    if measure == "speedup":
        return of.speedup
    if measure in of.intervals:
        return of.intervals[measure]
    bytes_ = size(of.model.file)
    exact = {
        **({} if bytes_ is None else {"kilobytes": bytes_ / 1000}),
        "macs": float(of.model.macs),
        "parameters": float(of.model.parameters),
        **of.metrics,
    }
    return Interval(exact[measure], exact[measure], exact[measure]) if measure in exact else None


def format_interval(interval: Interval) -> str:
    if interval.low == interval.high:
        return f"{interval.estimate:.4g}"
    return f"{interval.estimate:.4g}, 95 % {interval.low:.4g} to {interval.high:.4g}"


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
        case = ElementTree.SubElement(
            suite, "testcase", classname=escape_control_chars(d.target), name=escape_control_chars(d.gate.description)
        )
        if d.outcome != "passed":
            ElementTree.SubElement(
                case, "failure" if d.outcome == "failed" else "error", message=escape_control_chars(d.reason)
            )
    ElementTree.ElementTree(suite).write(path, "utf-8", xml_declaration=True)
