"""channel_planting: grow a thin student by channels that learn from the teacher (Mitsuno et al., 2020, 2011.02390).

The student is taught as it is; then step by step some of its layers get more channels, and only what is new learns:
filters that make the new channels, their BatchNorm, and the weights that read them, which start at zero, so that a step
starts from exactly the old function. All earlier parameters and BatchNorm statistics stay, bit for bit. Every phase
learns from

    L = (1 - weight) CE + weight T^2 KL(teacher || student)          (mean absolute errors on dense tasks)

Of each step, candidates (groups of layers that must grow together) are first taught briefly, side by side, with one
teacher pass per batch. All grow by about the same MACs, and the one with the most gain per MAC is kept: gain is by how
much L falls on validation data. It ends at the accuracy `goal`, when `max_ms` (measured on the target) or `max_macs`
leave no room, when a step gained nothing (it is undone), or with the budget of epochs. Where all candidates are too
slow for `max_ms`, they are tried with half the channels, a quarter and so on.

Only the paper's abstract could be read. Known from it: growth layer by layer, earlier parameters fixed, distillation.
Deviations from it, or choices where it is silent, and why:
- Hints are not mentioned there, so the teacher helps by its answers only; where it knows other classes, labels teach
  alone.
- Number of channels, selection and lengths are ours; docs/results.md says why planting starts so late. Equal cost makes
  candidates comparable; validation loss is finer than accuracy. No group more than doubles in a step.
- The BatchNorm behind layers that read new channels keeps its old statistics, since earlier channels stay exactly.
- A candidate that is cut to fit `max_ms` begins anew, from zero effect, and has the rest of its step to learn.
- Channels on a residual path grow in all layers that share it.
- Every phase runs through a learning-rate schedule of its own: new parameters begin where old ones have ended.
- With `finish` above 0 (the paper: 0) the whole grown network learns in the end, so earlier parameters change, too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.core.method import Batch, Lesson, Losses, Method, Outcome, Phase, Script
from edgekd.errors import ConfigError
from edgekd.training.channel_growth import Group, groups, grown, merged, named, planted
from edgekd.training.losses import check_shares, check_temperature, imitation, supervised
from edgekd.training.macs import macs
from edgekd.training.teachers import answering, answers_all
from edgekd.training.trainer import right

LEAST = 2  # epochs of a step: one to try candidates, one to teach the best
STUDENT = "student"  # in the names of losses, where a single network learns


@dataclass(frozen=True)
class ChannelPlanting(Method):
    temperature: float = 4.0
    weight: float = 0.9  # of the teacher's answers; labels have the rest
    start: float = 0.8  # share of the budget in which the student is taught as it is; one step is always left
    steps: int = 2  # at most; they share the rest of the budget
    step: float = 0.25  # MACs that a step adds at most, as a share of the student's at first
    candidates: int = 8  # groups that compete in a step, drawn at random if there are more
    trial: float = 0.25  # share of a step in which they compete
    layers: tuple[str, ...] = ()  # one layer of each group that may grow; none: all that can
    goal: float | None = None  # accuracy on validation data at which growth ends
    max_macs: int | None = None  # for one image
    max_ms: float | None = None  # measured on the target
    finish: float = 0.0  # share of the budget in which all parameters learn in the end
    standardise: bool = False  # the logits, before they are softened

    def __post_init__(self) -> None:
        check_shares(weight=self.weight, start=self.start, trial=self.trial, finish=self.finish)
        for name in ("steps", "candidates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use 1 or more")
        check_temperature(self.temperature)
        for name in ("step", "max_macs", "max_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}", hint="use a number above 0")
        if self.goal is not None and not 0 < self.goal <= 1:
            raise ConfigError(f"goal is {self.goal}", hint="use an accuracy above 0, up to 1")

    @property
    def priced(self) -> bool:
        return self.max_ms is not None

    def teach(self, lesson: Lesson) -> Script:
        garden = Garden(lesson, self)
        base, lengths, finish = self.plan(lesson.epochs)
        loss = garden.loss({STUDENT: lesson.student})
        outcome = yield Phase("base", trains=(lesson.student,), loss=loss, epochs=base)
        network = yield from self.grow(lesson, garden, lengths, outcome)
        if finish:
            loss = garden.loss({STUDENT: network})
            yield Phase("finish", trains=(network,), loss=loss, epochs=finish, span=(0.5, 1.0))
        return {"student": network}

    def plan(self, epochs: int) -> tuple[int, list[int], int]:
        """Epochs of the student as it is, of each step, and of the finish."""
        finish = round(self.finish * epochs)
        base = max(1, min(round(self.start * epochs), epochs - finish - LEAST))
        rest = epochs - base - finish
        if rest < LEAST:
            told = f"of {epochs} epochs, {max(0, rest)} are left for growing (start {base}, finish {finish})"
            raise ConfigError(told, hint=f"give more epochs, or less finish: a step takes {LEAST}")
        return base, [len(part) for part in np.array_split(np.arange(rest), min(self.steps, rest // LEAST))], finish

    def grow(
        self, lesson: Lesson, garden: Garden, lengths: list[int], outcome: Outcome
    ) -> Generator[Phase, Outcome, nn.Module]:
        """The steps; the grown network. `outcome` is that of the student as it is."""
        network, steps, end = lesson.student, [], "the epochs are used up"
        for number, length in enumerate(lengths, 1):
            if self.reached(outcome):
                break
            seeds = garden.seeds(network)
            if not seeds:
                end = "no channel fits into what is left of the MACs"
                break
            short = min(length - 1, max(1, round(self.trial * length)))
            tried = yield garden.phase(f"try{number}", {seed.group.name: seed for seed in seeds}, short)
            gains = {s.group.name: total(outcome) - total(tried, s.group.name) for s in seeds}
            seed, ms = garden.best(network, seeds, gains, number)
            if seed is None:
                end = "no candidate fits into the latency budget"
                break
            after = yield garden.phase(f"grow{number}", {STUDENT: seed}, length - short)
            kept = total(after) < total(outcome)
            steps.append(told(seed, gains, (outcome, after), ms, kept))
            if not kept:
                end = "the last step gained nothing and was undone"
                break
            network, outcome = merged(seed.network), after
        lesson.note("steps", steps)
        if garden.too_slow:
            lesson.note("too slow", garden.too_slow)
        lesson.note("end", "the goal is reached" if self.reached(outcome) else end)
        return network

    def reached(self, outcome: Outcome) -> bool:
        return self.goal is not None and 1 - outcome.losses[f"{STUDENT}:error"] >= self.goal


@dataclass(frozen=True)
class Seed:
    """A group with channels that have yet to learn."""

    group: Group
    network: nn.Module  # grown
    channels: tuple[int, int]  # before and after
    macs: int
    added: int  # MACs

    @property
    def count(self) -> int:
        """New channels."""
        return self.channels[1] - self.channels[0]


class Garden:
    """What all steps need: the groups that may grow, their cost, and what is learnt from."""

    def __init__(self, lesson: Lesson, method: ChannelPlanting) -> None:
        self.lesson, self.method = lesson, method
        self.x = next(lesson.sample(1)).x[:2]
        self.teacher = answering(lesson) if answers_all(lesson) else None
        found = groups(lesson.student, self.x)
        able = [group for group in found if not group.fixed]
        self.groups = list(dict.fromkeys(named(found, layer) for layer in method.layers)) or able
        if not self.groups:
            raise ConfigError(
                f"no layer of the student can get more channels: {found[0].fixed if found else 'it has none'}",
                hint="use a student of plain convolutions, where one follows another",
            )
        self.base = macs(lesson.student, self.x[:1])
        self.too_slow: list[dict[str, object]] = []  # candidates that were measured in vain, for the report
        self.check()

    def check(self) -> None:
        """Whether there is room to grow. Raises ConfigError if not."""
        m, price = self.method, self.lesson.price
        if m.max_macs is not None and self.base >= m.max_macs:
            raise ConfigError(
                f"the student has {self.base} MACs already, max_macs is {m.max_macs}", hint="begin with a thinner one"
            )
        if not self.seeds(self.lesson.student):
            raise ConfigError(
                f"no channel fits into a step of {self.room(self.base)} MACs", hint="raise step (a share) or max_macs"
            )
        if m.max_ms is None:
            return
        if price is None:
            raise ConfigError(
                f"max_ms is {m.max_ms}, but latencies cannot be measured: the first target is not here",
                hint="set max_macs instead, or build where the target is",
            )
        ms = price(self.lesson.student)
        if ms >= m.max_ms:
            raise ConfigError(
                f"the student takes {ms:.3g} ms already, max_ms is {m.max_ms}", hint="begin with a thinner one"
            )

    def room(self, now: int) -> int:
        """MACs that a step may add to so many."""
        step = int(self.method.step * self.base)
        return step if self.method.max_macs is None else min(step, self.method.max_macs - now)

    def seeds(self, network: nn.Module) -> list[Seed]:
        """The candidates of a step: each group that can grow, by as many channels as there is room for."""
        now = macs(network, self.x[:1])
        found = [seed for group in self.groups if (seed := self.seed(network, group, now))]
        drawn = sorted(torch.randperm(len(found))[: self.method.candidates].tolist())
        return [found[i] for i in drawn]

    def seed(self, network: nn.Module, group: Group, now: int) -> Seed | None:
        channels, room = group.channels(network), self.room(now)
        count = min(channels, room // (macs(grown(network, group, 1), self.x[:1]) - now))
        while count > 0:
            made = self.sown(network, group, count, now)
            if made.macs - now <= room:
                return made
            count -= 1  # a layer that gives and takes the same channels costs their square
        return None

    def sown(self, network: nn.Module, group: Group, count: int, now: int) -> Seed:
        made, channels = grown(network, group, count), group.channels(network)
        total = macs(made, self.x[:1])
        return Seed(group, made, (channels, channels + count), total, total - now)

    def best(
        self, network: nn.Module, seeds: list[Seed], gains: dict[str, float], step: int
    ) -> tuple[Seed | None, float | None]:
        """The candidate that gained most per MAC, of those within the latency budget, and its latency.

        Where none fits, they are planted anew with half the channels, until one does or none has any left.
        """

        def score(seed: Seed) -> float:
            gain = gains[seed.group.name]
            return gain / seed.added if gain > 0 else gain  # a loss per MAC would favour what costs more

        ranked = sorted(seeds, key=score, reverse=True)
        if self.method.max_ms is None or self.lesson.price is None:
            return ranked[0], None
        while ranked:
            for seed in ranked:
                ms = self.lesson.price(merged(seed.network))
                if ms <= self.method.max_ms:
                    return seed, ms
                self.too_slow.append({"step": step, "layer": seed.group.name, "channels": [*seed.channels], "ms": ms})
            now = macs(network, self.x[:1])
            ranked = [self.sown(network, s.group, s.count // 2, now) for s in ranked if s.count > 1]
        return None, None

    def phase(self, name: str, seeds: dict[str, Seed], epochs: int) -> Phase:
        loss = self.loss({key: seed.network for key, seed in seeds.items()})
        new = tuple(module for seed in seeds.values() for module in planted(seed.network))
        return Phase(name, trains=new, loss=loss, epochs=epochs)

    def loss(self, networks: dict[str, nn.Module]) -> Callable[[Batch], Losses]:
        """The losses of several networks; on validation data also the share that each gets wrong."""
        m = self.method

        def loss(batch: Batch) -> Losses:
            theirs = None if self.teacher is None else self.teacher(batch.x)
            losses: dict[str, Tensor] = {}
            for name, network in networks.items():
                answer = network(batch.x)
                labels = supervised(answer, batch.y)
                if theirs is None:
                    losses[f"{name}:task"] = labels
                else:
                    losses[f"{name}:task"] = (1 - m.weight) * labels
                    losses[f"{name}:kd"] = m.weight * imitation(answer, theirs, m.temperature, m.standardise)
                if not torch.is_grad_enabled():
                    losses[f"{name}:error"] = torch.tensor(1 - right(answer.float(), batch.y))
            return losses

        return loss


def total(outcome: Outcome, name: str = STUDENT) -> float:
    """L of a network on validation data."""
    return sum(outcome.losses.get(f"{name}:{part}", 0.0) for part in ("task", "kd"))


def told(
    seed: Seed, gains: dict[str, float], outcomes: tuple[Outcome, Outcome], ms: float | None, kept: bool
) -> dict[str, object]:
    """A step as the report shows it."""
    return {
        "layers": list(seed.group.leaving),
        "channels": list(seed.channels),
        "macs": seed.macs,
        "ms": ms,
        "gains": {name: round(gain, 4) for name, gain in gains.items()},
        "losses": [round(total(outcome), 4) for outcome in outcomes],
        "accuracies": [round(1 - outcome.losses[f"{STUDENT}:error"], 4) for outcome in outcomes],
        "kept": kept,
    }


PLUGIN = ChannelPlanting
