"""From trained networks to one target: its INT8 files, the measurement, and the bundle where that is made elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from edgekd.config import BuildConfig
from edgekd.core import plugins
from edgekd.core.artifact import Exported, File, Weights, replace_files
from edgekd.core.bench_result import BenchResult, Contestant, Role
from edgekd.core.dataset import Scale
from edgekd.core.step_cache import Ledger, code
from edgekd.core.target import Target
from edgekd.errors import ConfigError
from edgekd.pipelines.quantize import Material, Quantized, quantized, suffix
from edgekd.stages.bench.benchmark import benchmark
from edgekd.stages.bench.cold_start import with_memory
from edgekd.stages.bench.config import BenchConfig, scenarios
from edgekd.stages.bench.gates import decisive
from edgekd.stages.bench.runner import runner_path
from edgekd.stages.bench.selection import assigned
from edgekd.stages.device import local, remote
from edgekd.stages.device.bundle import Bundle, Sent, bundle
from edgekd.stages.device.remote import Place
from edgekd.stages.device.results import RESULT, Returned, measured, read, taken
from edgekd.stages.device.ssh import Device, porter_path
from edgekd.stages.export.checkpoint import export_trained
from edgekd.utils import cpu

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Away:
    """How networks travel to other machines, and where is what came back."""

    out: Path  # of the build: its folders `bundle-NAME` hold results
    bundles: bool  # of every target, not only of those that are measured elsewhere
    device: Device | None

    def results(self, name: str) -> Path:
        return self.out / f"bundle-{name}" / "results"


@dataclass(frozen=True)
class Delivered:
    """What came of one target."""

    bench: BenchResult  # the main one
    beside: tuple[BenchResult, ...]  # with models called otherwise
    low: Quantized
    bundle: Bundle | None


def named(targets: tuple[Target, ...]) -> dict[str, Target]:
    """Every target by its name, or what tells it from its like. Raises ConfigError for one that is there twice."""
    names = [plugins.name_of(t) for t in targets]
    labels = [f"{n}-{t.trait}" if names.count(n) > 1 else n for n, t in zip(names, targets, strict=True)]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"a target is there twice: {', '.join(labels)}", hint="keep one, or give it other settings")
    return dict(zip(labels, targets, strict=True))


def export_all(ledger: Ledger, config: BuildConfig, material: Material, opset: int) -> dict[str, Exported]:
    """The ONNX files of every network, by its name."""
    asked, end = replace(config.export, opset=opset), suffix(config, opset)
    return {
        t.weights.name: ledger.step(f"export-{t.weights.name}{end}", Exported, export_trained, t, material.task, asked)
        for t in material.networks
    }


def deliver(
    ledger: Ledger,
    config: BuildConfig,
    name: str,
    target: Target,
    material: Material,
    exported: dict[str, Exported],
    away: Away,
) -> Delivered:
    """Quantize the chosen method's students for one target, and measure them against everything else.

    What cannot be measured here goes into a bundle, and to the device if there is one; what builds engines runs its
    bundle here. Results of that very bundle that are in the build's folder already count, too.
    """
    task, networks = material.task, material.networks
    for sentence in target.delivery.instead:
        log.info("%s: %s", name, sentence)
    chosen = [t.weights.name for t in networks[1:] if t.weights.method == plugins.name_of(config.student.method)]
    low = quantized(ledger, config, name, target, material, {n: exported[n] for n in chosen})
    sent = []
    for trained in networks:
        n, method = trained.weights.name, trained.weights.method
        role: Role = "teacher" if trained is networks[0] else "student" if n in chosen else "baseline"
        int8 = low.files[n].single if n in low.files else None
        sent.append(Sent(n, role, method, trained.classes == task.classes, exported[n].single, int8, low.ranges.get(n)))
    bare, made = replace(target, budget_ms=None), None
    reason = target.missing()
    if away.bundles or away.device or reason or builds(target) or (away.results(name) / RESULT).exists():
        files = (material.calib.images, material.inputs, task.test.labels, File.of(runner_path()))
        made = ledger.step(
            f"bundle-{name}", Bundle, bundle, config.name, name, bare, tuple(sent), *files, config.bundle, config.bench
        )
    students = [t.weights for t in networks[1:]]
    returned = made and bring(ledger, name, target, made, away)
    if (returned or reason) and len(scenarios(config.bench)) > 1:
        log.warning("%s: bundles are timed with one image a call; other batches, scopes and loads are left out", name)
    if made and returned:
        bench = read_off(ledger, name, made, returned, config.bench)
        return Delivered(shipped(bench, target, students), (), low, made)
    if reason:
        return Delivered(unmeasured(name, reason, target.delivery.instead), (), low, made)
    single = tuple(contestant for network in sent for contestant in contestants_of(network))
    dynamic = {e.single.file: e.dynamic.file for e in (*exported.values(), *low.files.values())}
    known = ledger.given(circumstances(bare, config.bench), counts=partial(decisive, config.gates))
    bench, *beside = measured_here(known, config.bench, name, bare, material, single, dynamic)
    return Delivered(shipped(bench, target, students), tuple(beside), low, made)


def measured_here(
    ledger: Ledger,
    config: BenchConfig,
    name: str,
    target: Target,
    material: Material,
    single: tuple[Contestant, ...],
    dynamic: dict[File, File],
) -> tuple[BenchResult, ...]:
    """Every scenario of the configuration, the main one first; calls of several images go to the `dynamic` files."""
    task, found = material.task, []
    alike = replace(config, batches=(1,), scopes=("copies",), rate=None, throughput=False)  # each is a step of its own
    for called in scenarios(config):
        contestants = single
        if called.batch > 1:
            contestants = tuple(replace(c, file=dynamic[c.file]) for c in single)
        found.append(
            ledger.step(
                "-".join(filter(None, ("bench", name, called.slug))),
                BenchResult,
                benchmark,
                contestants,
                name,
                target,
                material.inputs,
                task.test.labels if called.main else None,
                next(c.name for c in contestants if c.role == "student"),
                alike,
                called,
                Scale(task.mean, task.std),
            )
        )
    cold = [bench for called, bench in zip(scenarios(config), found, strict=True) if called.scope == "cold"]
    return (with_memory(found[0], cold[0]), *found[1:]) if cold else tuple(found)


def shipped(bench: BenchResult, target: Target, students: Iterable[Weights]) -> BenchResult:
    """With the student for the target: validation accuracy chooses. Where none can ship, that is said at once."""
    accuracy = {w.name: w.valid_accuracy or 0.0 for w in students}
    rows = [m.contestant.name for m in bench.measurements]
    known = {r: a for r in rows for n, a in accuracy.items() if r.startswith(f"{n} ")}
    made = assigned(bench, target.budget_ms, known)
    for said in made.warnings[len(bench.warnings) :]:
        log.warning("%s: %s", bench.target, said)
    return made


def fitted(ledger: Ledger, config: BuildConfig, device: Device) -> BuildConfig:
    """With the target as the device needs it. Raises ConfigError unless there is one target, and what `look` raises."""
    if len(config.targets) != 1:
        raise ConfigError(f"a device is for one target, here are {len(config.targets)}", hint="choose it with --target")
    place = ledger.given(File.of(porter_path())).step("device", Place, remote.look, device)
    return replace(config, targets=(config.targets[0].on(place.machine, place.flags),))


def builds(target: Target) -> bool:
    """Whether its runtime makes engines of ONNX files, so that it is measured by its bundle on this machine, too."""
    return target.runtime == "tensorrt"


def bring(ledger: Ledger, name: str, target: Target, made: Bundle, away: Away) -> Returned | None:
    """The results of a bundle: from the device, those in the build's folder, or of its run here. None without any."""
    home = away.results(name)
    if away.device:
        found = ledger.given(File.of(porter_path())).step(f"device-{name}", Returned, remote.measure, made, away.device)
        replace_files((*found.arrays, found.result), home)
        return found
    if (home / RESULT).exists():
        if read(home / RESULT)["bundle"] == made.manifest.sha256:
            log.info("%s: measured elsewhere, by the results in `%s`", name, home)
            return taken(home, made)
        log.info("%s: the results in `%s` are of an earlier bundle, and count no longer", name, home)
    if builds(target) and not target.missing():
        return ledger.given(local.look(made)).step(f"run-{name}", Returned, local.measure, made)
    return None


def read_off(ledger: Ledger, name: str, made: Bundle, returned: Returned, config: BenchConfig) -> BenchResult:
    known = ledger.given({"metrics": metrics(config)})
    return known.step(f"bench-{name}", BenchResult, measured, made, returned, config)


def metrics(config: BenchConfig) -> dict[str, object]:
    """What a reading depends on beside its samples."""
    return {name: code(plugins.places("metrics")[name]) for name in config.metrics}


def unmeasured(name: str, reason: str, instead: tuple[str, ...]) -> BenchResult:
    """Why there are no numbers, and what to type to get them."""
    lines = (
        f"not measured on device: {reason}",
        "With SSH: the same command with `--device ssh://user@host/folder`. Without: copy the folder "
        f"`bundle-{name}` to the device, type `sh run.sh` in it, bring its folder `results` back, and type "
        "`edgekd import-result results/result.json`",
        *instead,
    )
    return BenchResult(name, ". ".join(lines), None, None, {}, None, (), (), None, started="", seconds=0.0)


def contestants_of(network: Sent) -> list[Contestant]:
    """A network in FP32, then in INT8."""
    found = []
    for model in filter(None, (network.fp32, network.int8)):
        name = f"{network.name} {model.precision}"
        facts = (network.role, network.method, model.precision, model.file, model.macs, model.parameters)
        found.append(Contestant(name, *facts, knows=network.knows))
    return found


def circumstances(target: Target, config: BenchConfig) -> dict[str, object]:
    """What a measurement depends on beside its arguments: another machine, runtime, runner or metric measures anew."""
    return {
        "runtime": version(target.runtime),
        "processor": cpu.name(),
        "runner": File.of(runner_path()),
        "metrics": metrics(config),
    }
