"""Mixes: which layers of an INT8 file stay float, so that it loses no more than allowed at the least latency."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgekd.core.artifact import File
from edgekd.core.errors import ModelError
from edgekd.core.exactness import exact_entries
from edgekd.core.mix import Frontier, Layer, Marks, Mix
from edgekd.core.onnx_facts import Exported
from edgekd.core.target import Target
from edgekd.core.task import Task
from edgekd.core.trial import BenchResult, Interval
from edgekd.stages.bench import statistics
from edgekd.stages.bench.benchmark import BenchConfig
from edgekd.stages.quantize.calibrate import load_calibration
from edgekd.stages.quantize.preparation import dialect_for
from edgekd.stages.quantize.ranges import QuantizeConfig, Ranges
from edgekd.stages.quantize.sensitivity import RANKED, SINGLES, Exam, Subject, ranked, timed

log = logging.getLogger(__name__)
MIXES = BenchConfig(warmup_s=0.3, metrics=("p50_ms",))
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)  # how many layers the mixes free
PRICED = 32  # layers whose price is measured, the noisiest; of the others, it is their share of the MACs
PRUNED = 8  # attempts to quantize a freed layer again
LEAST = statistics.SESSIONS_DIFFER  # the least that a layer counts as: smaller prices cannot be told apart


@dataclass
class Search:
    """The mixes of one network that were judged so far."""

    subject: Subject
    exam: Exam
    max_drop: float | None
    tried: dict[tuple[str, ...], Marks] = field(default_factory=dict)

    def marks(self, floats: tuple[str, ...]) -> Marks:
        if floats not in self.tried:
            with TemporaryDirectory(prefix="edgekd-") as folder:
                made = self.subject.write(self.subject.answering, Path(folder, "mix.onnx"), floats)
                self.tried[floats] = self.exam.marks(made.file.path)
        return self.tried[floats]

    def meets(self, floats: tuple[str, ...]) -> bool:
        return self.max_drop is not None and self.marks(floats).drop.mid <= self.max_drop

    def met(self) -> tuple[str, ...] | None:
        """The first mix that meets the limit."""
        return next((floats for floats in self.tried if self.meets(floats)), None)

    def widen(self, names: list[str], lunch: int) -> None:
        """Free the first of `names`: the first `lunch` always, more until a mix meets the limit."""
        sizes = {lunch, *(step for step in (*STEPS, len(names) - 1) if lunch < step < len(names))} - {0}
        for count in sorted(sizes):
            if count > lunch and self.met() is not None:
                return
            self.marks(tuple(names[:count]))

    def narrow(self, lunch: int) -> None:
        """Quantize layers again, the least worth first, as long as the mix that met the limit still does."""
        best = self.met() or ()
        for name in list(reversed(best[lunch:]))[:PRUNED]:
            fewer = tuple(other for other in best if other != name)
            if self.meets(fewer):
                best = fewer


def mixed(
    out: Path,
    model: Exported,
    images: File,
    ranges: Ranges,
    task: Task,
    name: str,
    target: Target,
    config: QuantizeConfig,
    max_drop: float,
) -> Frontier:
    """The cheapest mix for a target, called `name`, that loses at most `max_drop` points on all validation images.

    `images` calibrate; the layers in `config` stay float in any case. Raises ModelError if no mix loses so little.
    """
    valid = task.valid.load()
    known = load_calibration(images.path, model.single.input)
    paths = model.dynamic.file.path, model.single.file.path
    dialect = dialect_for(target.dialect, config)
    subject = Subject(*paths, known, dialect, ranges, model.single.macs, config.floats, config.correct_bias)
    exam = Exam.of(paths[0], task.inputs(np.asarray(valid.images)), valid.labels)
    found = frontier(out, subject, exam, model.single.name, name, target, max_drop, whole=False)
    if not found.met:
        raise unmet(found)
    return found


def unmet(found: Frontier) -> ModelError:
    plain, best, tried = found.mixes[0].marks.drop.mid, found.mix, len(found.mixes) - 1
    told = f"the best of {tried} mixes, with {len(best.floats)} layers in float, loses {best.marks.drop.mid:.2f}"
    return ModelError(
        f"`{found.network}` loses {plain:.2f} points of validation accuracy in INT8 on {found.target}, where "
        f"{found.max_drop:g} are allowed; {told if tried else 'no layer can stay float there'}",
        hint="teach it with the method quant_aware, give more calibration images (calib.images), or allow more "
        "(quantize.max_drop)",
    )


def frontier(
    out: Path,
    subject: Subject,
    exam: Exam,
    network: str,
    name: str,
    target: Target,
    max_drop: float | None,
    whole: bool,
) -> Frontier:
    """Mixes in the order of gain for cost, until one loses at most `max_drop` points; without a limit, up to FP32.

    A layer gains what noise it adds alone, and costs what latency it adds in float, or its multiply-accumulates where
    latency cannot be measured here. Layers that are surely faster in float are freed in any case: where nothing has to
    be freed, only the first and the last are looked at for that, unless `whole`. `out` keeps the samples of both
    comparisons.
    """
    search = Search(subject, exam, max_drop)
    engines = "TensorRT builds its engines from a bundle" if target.runtime == "tensorrt" else ""
    unpriced = target.missing() or engines
    search.marks(())
    found: list[Layer] = []
    needed = whole or not search.meets(())
    if needed or not unpriced:
        found = sorted_layers(out / "layers", search, name, target, unpriced, not needed)
    mixes = [Mix(floats, marks, share(floats, found, subject), None) for floats, marks in search.tried.items()]
    metric, accuracy = exam.accuracy()
    made = Frontier(
        network=network,
        target=name,
        metric=metric,
        max_drop=max_drop,
        accuracy=accuracy,
        images=len(exam.inputs),
        ranked=min(RANKED, len(exam.inputs)),
        layers=tuple(found),
        mixes=tuple(mixes),
        chosen=cheapest(mixes, max_drop, None),
        unpriced=unpriced,
        session_config=exact_entries(),
    )
    if not unpriced:
        result, prices, fp32 = timed(out / "mixes", subject, [mix.floats for mix in mixes], name, target, MIXES)
        mixes = [replace(mix, price=price) for mix, price in zip(mixes, prices, strict=True)]
        made = replace(
            made,
            mixes=tuple(mixes),
            chosen=cheapest(mixes, max_drop, result),
            fp32=fp32,
            machine=result.machine,
            runtime=result.runtime,
            aa=result.aa,
            warnings=result.warnings,
            started=result.started,
        )
    log.info("%s", told(made))
    return made


def sorted_layers(out: Path, search: Search, name: str, target: Target, unpriced: str, outermost: bool) -> list[Layer]:
    """The layers, the one to free first is first; `search` has judged the mixes that free them one after the other."""
    found = ranked(search.subject, search.exam.part(RANKED), outermost)
    lunch: set[str] = set()
    if not unpriced:
        singles = [(), *((layer.name,) for layer in found[:PRICED])]
        result, (_, *prices), _ = timed(out, search.subject, singles, name, target, SINGLES)
        some = [replace(layer, price=price) for layer, price in zip(found[:PRICED], prices, strict=True)]
        found = [*some, *found[PRICED:]]
        lunch = {layer.name for layer in found if faster(layer.price, result)}
    found.sort(key=lambda layer: (layer.name not in lunch, -worth(layer, search.subject.macs)))
    if search.subject.dialect.form != "cache":
        free = min(len(lunch), len(found) - (not outermost))  # one has to stay in INT8
        search.widen([layer.name for layer in found], free)
        search.narrow(free)
    return found


def faster(price: Interval | None, result: BenchResult) -> bool:
    """Whether a price is below 1 beyond doubt."""
    if price is None or result.aa is None:
        return False
    return "faster" in statistics.verdict(Interval(1 / price.high, 1 / price.mid, 1 / price.low), result.aa)


def worth(layer: Layer, macs: int) -> float:
    """The noise that INT8 adds in a layer alone, as a share of the answers' power, for each part of its cost."""
    cost = layer.macs / max(macs, 1) if layer.price is None else layer.price.mid - 1
    return float(10 ** (-layer.alone.snr_db / 10)) / max(cost, LEAST)


def share(floats: Collection[str], found: list[Layer], subject: Subject) -> float:
    """Of the multiply-accumulates, those in float; those of layers that are float in every mix count for nothing."""
    return sum(layer.macs for layer in found if layer.name in floats) / max(subject.macs, 1)


def cheapest(mixes: list[Mix], max_drop: float | None, result: BenchResult | None) -> int:
    """Of the mixes within the limit, the cheapest, but none that frees layers to no purpose; of none, the best one."""
    drops = [mix.marks.drop.mid for mix in mixes]
    fine = [i for i, drop in enumerate(drops) if max_drop is None or drop <= max_drop]

    def cost(index: int) -> float:
        price = mixes[index].price
        return mixes[index].macs if price is None else price.mid

    if not fine:
        return min(range(len(mixes)), key=lambda index: (drops[index], cost(index)))
    if 0 in fine:
        free = [i for i in fine[1:] if result and faster(mixes[i].price, result)]
        fine = [i for i in free if mixes[i].marks.snr_db >= mixes[0].marks.snr_db] or [0]
    return min(fine, key=cost)


def told(made: Frontier) -> str:
    mix = made.mix
    kept = f"{', '.join(mix.floats)} in float" if mix.floats else "all layers in INT8"
    price = f", {mix.price.mid:.3f} of its latency" if mix.price else ""
    points = f"{mix.marks.drop.mid:.2f} points of validation accuracy lost"
    return f"{made.network} on {made.target}: {kept}, {points} (all in INT8: {made.mixes[0].marks.drop.mid:.2f}{price})"
