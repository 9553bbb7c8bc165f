"""channel_planting: grow a thin student by channels that learn from the teacher (Mitsuno et al., 2020, 2011.02390).

The student is trained first; then step by step some of its layers get more channels, and only the new parameters are
trained: filters that compute the new channels, their BatchNorm, and the weights that read them, which start at zero, so
that a step starts from exactly the old function. All earlier parameters and BatchNorm statistics stay, bit for bit.
Every phase minimises

    L = (1 - kd_weight) CE + kd_weight T^2 KL(teacher || student)    (of a regression: mean absolute errors)

In each step, candidates (groups of layers that must grow together) are first trained briefly, side by side, with one
teacher pass per batch. All grow by about the same MACs, and the one with the largest gain per MAC is kept: the gain is
the decrease of L on validation data. Growth ends at `target_accuracy`, when `max_ms` (measured on the target) or
`max_macs` leave no room, when a step gained nothing (it is undone), or with the budget of epochs. If all candidates are
too slow for `max_ms`, they are tried with half the channels, a quarter and so on.

Only the paper's abstract could be read. It says: growth layer by layer, earlier parameters fixed, distillation.
Deviations from it, or choices where it is silent, and why:
- Hints are not mentioned there, so the teacher helps by its outputs only; if it lacks some of the classes, labels teach
  alone.
- Number of channels, selection and lengths are ours; docs/results says why planting starts so late. Equal cost makes
  candidates comparable; validation loss is finer than accuracy. No group more than doubles in a step.
- The BatchNorm behind layers that read new channels keeps its old statistics, so that earlier channels stay exact.
- A candidate that is reduced to fit `max_ms` starts again, from zero effect, and has the rest of its step to learn.
- Channels on a residual path grow in all layers that share it.
- Every phase has its own learning-rate schedule: new parameters start at the full rate.
- With `finish_fraction` above 0 (the paper: 0) the whole grown network is trained in the end, so earlier parameters
  change, too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, PhaseResult, TrainingContext
from edgekd.errors import ConfigError
from edgekd.training.channel_growth import (
    ChannelGroup,
    find_groups,
    group_of_layer,
    grow_group,
    merge_growth,
    new_modules,
)
from edgekd.training.losses import check_fractions, check_temperature
from edgekd.training.macs import count_macs
from edgekd.training.teachers import knows_all_classes, teacher_logits

MIN_STEP_EPOCHS = 2  # of a step: one to try candidates, one to train the best
STUDENT = "student"  # in loss names, where a single network is trained


@dataclass(frozen=True)
class ChannelPlanting(Method):
    """Settings of channel planting."""

    temperature: float = 4.0
    kd_weight: float = 0.9  # of the teacher's outputs; labels have the rest
    start_fraction: float = 0.8  # of the budget, before growth; at least one step is left
    num_steps: int = 2  # at most; they share the rest of the budget
    step_macs_fraction: float = 0.25  # MACs that a step adds at most, relative to the initial student's
    num_candidates: int = 8  # groups that compete in a step, drawn at random if there are more
    trial_fraction: float = 0.25  # of a step, in which they compete
    layers: tuple[str, ...] = ()  # one layer of each group that may grow; none: all that can
    target_accuracy: float | None = None  # on validation data, at which growth ends
    max_macs: int | None = None  # for one image
    max_ms: float | None = None  # measured on the target
    finish_fraction: float = 0.0  # of the budget, in which all parameters are trained in the end
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        check_fractions(
            kd_weight=self.kd_weight,
            start_fraction=self.start_fraction,
            trial_fraction=self.trial_fraction,
            finish_fraction=self.finish_fraction,
        )
        for name in ("num_steps", "num_candidates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use 1 or more")
        check_temperature(self.temperature)
        for name in ("step_macs_fraction", "max_macs", "max_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}", hint="use a number above 0")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise ConfigError(f"target_accuracy is {self.target_accuracy}", hint="use a number above 0, up to 1")

    @property
    def needs_target(self) -> bool:
        return self.max_ms is not None

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        search = GrowthSearch(ctx, self)
        base_epochs, step_epochs, finish_epochs = self.plan(ctx.epochs)
        loss = search.loss({STUDENT: ctx.student})
        result = yield Phase("base", trains=(ctx.student,), loss=loss, epochs=base_epochs)
        network = yield from self.grow(ctx, search, step_epochs, result)
        if finish_epochs:
            loss = search.loss({STUDENT: network})
            yield Phase("finish", trains=(network,), loss=loss, epochs=finish_epochs, lr_span=(0.5, 1.0))
        return {"student": network}

    def plan(self, epochs: int) -> tuple[int, list[int], int]:
        """Return the epochs before growth, of each step, and of the finish."""
        finish = round(self.finish_fraction * epochs)
        base = max(1, min(round(self.start_fraction * epochs), epochs - finish - MIN_STEP_EPOCHS))
        rest = epochs - base - finish
        if rest < MIN_STEP_EPOCHS:
            raise ConfigError(
                f"of {epochs} epochs, {max(0, rest)} are left for growth (start {base}, finish {finish})",
                hint=f"increase the epochs, or decrease finish_fraction: a step takes {MIN_STEP_EPOCHS}",
            )
        steps = np.array_split(np.arange(rest), min(self.num_steps, rest // MIN_STEP_EPOCHS))
        return base, [len(step) for step in steps], finish

    def grow(
        self, ctx: TrainingContext, search: GrowthSearch, step_epochs: list[int], result: PhaseResult
    ) -> Generator[Phase, PhaseResult, nn.Module]:
        """Run the steps and return the grown network; `result` is that of the initial student."""
        network, steps, end = ctx.student, [], "the epochs are used up"
        for number, epochs in enumerate(step_epochs, 1):
            if self.target_reached(result):
                break
            candidates = search.candidates(network)
            if not candidates:
                end = "no channel fits into the remaining MACs"
                break
            trial_epochs = min(epochs - 1, max(1, round(self.trial_fraction * epochs)))
            trial = yield search.phase(f"try{number}", {c.group.name: c for c in candidates}, trial_epochs)
            gains = {c.group.name: total_loss(result) - total_loss(trial, c.group.name) for c in candidates}
            best, ms = search.best(network, candidates, gains, number)
            if best is None:
                end = "no candidate fits into the latency budget"
                break
            grown = yield search.phase(f"grow{number}", {STUDENT: best}, epochs - trial_epochs)
            kept = total_loss(grown) < total_loss(result)
            steps.append(step_summary(best, gains, (result, grown), ms, kept))
            if not kept:
                end = "the last step gained nothing and was undone"
                break
            network, result = merge_growth(best.network), grown
        ctx.log_choice("steps", steps)
        if search.too_slow:
            ctx.log_choice("too slow", search.too_slow)
        ctx.log_choice("end", "the target accuracy is reached" if self.target_reached(result) else end)
        return network

    def target_reached(self, result: PhaseResult) -> bool:
        """Return whether the network is accurate enough, so that growth ends."""
        return self.target_accuracy is not None and 1 - result.losses[f"{STUDENT}:error"] >= self.target_accuracy


@dataclass(frozen=True)
class GrowthCandidate:
    """A network in which one group has new, untrained channels."""

    group: ChannelGroup
    network: nn.Module  # grown
    channels: tuple[int, int]  # before and after
    macs: int
    added: int  # MACs

    @property
    def count(self) -> int:
        """The number of new channels."""
        return self.channels[1] - self.channels[0]


class GrowthSearch:
    """What all steps share: the groups that may grow, their cost, and the losses."""

    def __init__(self, ctx: TrainingContext, method: ChannelPlanting) -> None:
        """Raise ConfigError if nothing can grow, or there is no room to grow."""
        self.ctx, self.method = ctx, method
        self.images = next(ctx.first_batches(1)).images[:2]
        self.teacher = teacher_logits(ctx) if knows_all_classes(ctx) else None
        groups = find_groups(ctx.student, self.images)
        growable = [group for group in groups if not group.fixed]
        self.groups = list(dict.fromkeys(group_of_layer(groups, layer) for layer in method.layers)) or growable
        if not self.groups:
            raise ConfigError(
                f"no layer of the student can get more channels: {groups[0].fixed if groups else 'it has none'}",
                hint="use a student of plain convolutions, where one follows another",
            )
        self.base_macs = count_macs(ctx.student, self.images[:1])
        self.too_slow: list[dict[str, object]] = []  # candidates above max_ms, for the report
        self.check_limits()

    def check_limits(self) -> None:
        """Raise ConfigError unless the student is below the limits and a step can add a channel."""
        m, latency_ms = self.method, self.ctx.latency_ms
        if m.max_macs is not None and self.base_macs >= m.max_macs:
            raise ConfigError(
                f"the student has {self.base_macs} MACs already, max_macs is {m.max_macs}",
                hint="start with a thinner student",
            )
        if not self.candidates(self.ctx.student):
            raise ConfigError(
                f"no channel fits into a step of {self.room(self.base_macs)} MACs",
                hint="increase step_macs_fraction or max_macs",
            )
        if m.max_ms is None:
            return
        if latency_ms is None:
            raise ConfigError(
                f"max_ms is {m.max_ms}, but latencies cannot be measured: the first target is not here",
                hint="set max_macs instead, or build where the target is",
            )
        ms = latency_ms(self.ctx.student)
        if ms >= m.max_ms:
            raise ConfigError(
                f"the student takes {ms:.3g} ms already, max_ms is {m.max_ms}", hint="start with a thinner student"
            )

    def room(self, macs: int) -> int:
        """Return the MACs that a step may add to a network with so many."""
        step = int(self.method.step_macs_fraction * self.base_macs)
        return step if self.method.max_macs is None else min(step, self.method.max_macs - macs)

    def candidates(self, network: nn.Module) -> list[GrowthCandidate]:
        """Return the candidates of a step: each group that can grow, by as many channels as there is room for."""
        macs = count_macs(network, self.images[:1])
        fitting = [candidate for group in self.groups if (candidate := self.largest(network, group, macs))]
        drawn = sorted(torch.randperm(len(fitting))[: self.method.num_candidates].tolist())
        return [fitting[i] for i in drawn]

    def largest(self, network: nn.Module, group: ChannelGroup, macs: int) -> GrowthCandidate | None:
        """Return the candidate with the most channels of a group that there is room for; None if there is none."""
        channels, room = group.channels(network), self.room(macs)
        count = min(channels, room // (count_macs(grow_group(network, group, 1), self.images[:1]) - macs))
        while count > 0:
            candidate = self.grow(network, group, count, macs)
            if candidate.macs - macs <= room:
                return candidate
            count -= 1  # the cost of a layer that reads and computes the same channels is quadratic
        return None

    def grow(self, network: nn.Module, group: ChannelGroup, count: int, macs: int) -> GrowthCandidate:
        """Return the network, which has so many MACs, with `count` new channels in a group."""
        grown, channels = grow_group(network, group, count), group.channels(network)
        total = count_macs(grown, self.images[:1])
        return GrowthCandidate(group, grown, (channels, channels + count), total, total - macs)

    def best(
        self, network: nn.Module, candidates: list[GrowthCandidate], gains: dict[str, float], step: int
    ) -> tuple[GrowthCandidate | None, float | None]:
        """Return the candidate with the largest gain per MAC within the latency budget, and its latency in ms.

        If none fits, they are tried with half the channels, until one does or none has any left.
        """

        def score(candidate: GrowthCandidate) -> float:
            gain = gains[candidate.group.name]
            return gain / candidate.added if gain > 0 else gain  # a loss per MAC would favour the more expensive

        ranked = sorted(candidates, key=score, reverse=True)
        if self.method.max_ms is None or self.ctx.latency_ms is None:
            return ranked[0], None
        while ranked:
            for candidate in ranked:
                ms = self.ctx.latency_ms(merge_growth(candidate.network))
                if ms <= self.method.max_ms:
                    return candidate, ms
                layer, channels = candidate.group.name, [*candidate.channels]
                self.too_slow.append({"step": step, "layer": layer, "channels": channels, "ms": ms})
            macs = count_macs(network, self.images[:1])
            ranked = [self.grow(network, c.group, c.count // 2, macs) for c in ranked if c.count > 1]
        return None, None

    def phase(self, name: str, candidates: dict[str, GrowthCandidate], epochs: int) -> Phase:
        """Return a phase that trains the new channels of several candidates, by name in the losses."""
        loss = self.loss({key: candidate.network for key, candidate in candidates.items()})
        new = tuple(module for candidate in candidates.values() for module in new_modules(candidate.network))
        return Phase(name, trains=new, loss=loss, epochs=epochs)

    def loss(self, networks: dict[str, nn.Module]) -> Callable[[Batch], Losses]:
        """Return the losses of several networks by name; on validation data also the error rate of each."""
        m, task = self.method, self.ctx.task

        def loss(batch: Batch) -> Losses:
            target = None if self.teacher is None else self.teacher(batch.images)
            losses: dict[str, Tensor] = {}
            for name, network in networks.items():
                logits = network(batch.images)
                task_loss = task.loss(logits, batch.labels)
                if target is None:
                    losses[f"{name}:task"] = task_loss
                else:
                    losses[f"{name}:task"] = (1 - m.kd_weight) * task_loss
                    kd = task.distill_loss(logits, target, m.temperature, m.standardize_logits)
                    losses[f"{name}:kd"] = m.kd_weight * kd
                if not torch.is_grad_enabled():
                    losses[f"{name}:error"] = torch.tensor(1 - task.accuracy(logits.float(), batch.labels))
            return losses

        return loss


def total_loss(result: PhaseResult, name: str = STUDENT) -> float:
    """Return L of a network on validation data."""
    return sum(result.losses.get(f"{name}:{part}", 0.0) for part in ("task", "kd"))


def step_summary(
    candidate: GrowthCandidate,
    gains: dict[str, float],
    results: tuple[PhaseResult, PhaseResult],
    ms: float | None,
    kept: bool,
) -> dict[str, object]:
    """Return a step for the report."""
    return {
        "layers": list(candidate.group.producers),
        "channels": list(candidate.channels),
        "macs": candidate.macs,
        "ms": ms,
        "gains": {name: round(gain, 4) for name, gain in gains.items()},
        "losses": [round(total_loss(result), 4) for result in results],
        "accuracies": [round(1 - result.losses[f"{STUDENT}:error"], 4) for result in results],
        "kept": kept,
    }


PLUGIN = ChannelPlanting
