"""Train one phase. The only module that knows of devices, mixed precision, optimisers and schedules."""

from __future__ import annotations

import io
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from edgekd.core.artifact import EpochRecord
from edgekd.core.method import Batch, Losses, Phase, PhaseResult, TrainingContext
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError, TrainingError
from edgekd.training.convolutions import sound_convolutions
from edgekd.training.dataloader import ArrayLoader
from edgekd.utils.progress import Advance

Precision = Literal["auto", "fp32", "bf16"]
CALMER = "lower train.lr, or set train.precision to fp32; finished steps are kept"
STEEP = "a root or logarithm of 0 is steep without end: add a little to what it is taken of; or " + CALMER


@dataclass(frozen=True)
class TrainConfig(Settings):
    """SGD with Nesterov momentum; linear warm-up, then a cosine to zero over the whole budget."""

    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_fraction: float = 0.05  # share of the budget
    precision: Precision = "auto"  # auto: bf16 autocast where the processor has it

    def __post_init__(self) -> None:
        wrong = {
            "batch": (self.batch < 2, "use 2 or more: BatchNorm needs them"),
            "lr": (self.lr <= 0, "use a number above 0"),
            "momentum": (not 0 < self.momentum < 1, "use a number between 0 and 1; 0.9 is usual"),
            "weight_decay": (self.weight_decay < 0, "use 0 or more"),
            "warmup": (not 0 <= self.warmup_fraction < 1, "use a share of the budget from 0 to below 1"),
        }
        for name, (bad, hint) in wrong.items():
            if bad:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint=hint)

    def lr_at(self, done: float) -> float:
        """Return the learning rate when `done` (0 to 1) of the budget is spent."""
        if done < self.warmup_fraction:
            return self.lr * done / self.warmup_fraction
        return self.lr * 0.5 * (1 + math.cos(math.pi * (done - self.warmup_fraction) / (1 - self.warmup_fraction)))


def resolve_precision(precision: Precision) -> Precision:
    """Return the precision that `auto` means on this machine."""
    if precision != "auto":
        return precision
    fast = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bf16" if fast else "fp32"


class Trainer:
    def __init__(
        self, train: ArrayLoader, valid: ArrayLoader, config: TrainConfig, seed: int, device: torch.device
    ) -> None:
        self.train, self.valid, self.config, self.seed, self.device = train, valid, config, seed, device
        self.precision = resolve_precision(config.precision)

    def run(
        self, phase: Phase, ctx: TrainingContext, number: int, checkpoint: Path, advance: Advance
    ) -> tuple[PhaseResult, tuple[EpochRecord, ...]]:
        """Train phase `number` of a script; go on from `checkpoint` if an earlier run left one."""
        freeze(ctx)
        for module in phase.trains:
            to_device(module, self.device)
            module.requires_grad_(True)
        optimiser = self.optimiser(phase)
        curve = restore_epoch(checkpoint, phase, optimiser)
        advance(len(curve))
        for epoch in range(len(curve), phase.epochs):
            started = time.perf_counter()
            for module in phase.trains:
                module.train()
            losses = self.epoch(phase, epoch, optimiser, self.reseed(number, epoch))
            curve.append(EpochRecord(phase.name, epoch, losses, round(time.perf_counter() - started, 3)))
            save_epoch(checkpoint, phase, optimiser, curve)
            advance(1, note=f"{phase.name}, loss {sum(losses.values()):.3f}")
        return self.validate(phase, ctx), tuple(curve)

    def reseed(self, number: int, epoch: int = -1) -> int:
        """Make an epoch independent of what was drawn before it, so that a resumed run is the same run."""
        seed = (self.seed * 1_000_003 + number) * 1_000_003 + epoch + 1
        torch.manual_seed(seed % 2**63)
        return seed

    def optimiser(self, phase: Phase) -> torch.optim.Optimizer:
        c = self.config
        groups = [
            {"params": list(m.parameters()), "weight_decay": phase.weight_decay.get(m, c.weight_decay)}
            for m in phase.trains
        ]
        return torch.optim.SGD([g for g in groups if g["params"]], c.lr, c.momentum, nesterov=True)

    def epoch(self, phase: Phase, epoch: int, optimiser: torch.optim.Optimizer, seed: int) -> dict[str, float]:
        steps = self.train.steps(self.config.batch, phase.samples)
        sums: defaultdict[str, float] = defaultdict(float)
        start, end = phase.lr_span
        convolutions = sound_convolutions(phase.trains)
        for step, (x, y, index) in enumerate(self.train.shuffled(self.config.batch, seed, phase.samples)):
            progress = (epoch + step / steps) / phase.epochs
            for group in optimiser.param_groups:
                group["lr"] = self.config.lr_at(start + (end - start) * progress)
            batch, drawn = Batch(x, y, index, progress), torch.get_rng_state()
            with convolutions:
                losses = self.losses(phase, batch)
            total = torch.stack([value.float() for value in losses.values()]).sum()
            when = f"phase `{phase.name}`, epoch {epoch + 1}, step {step + 1}"
            if not math.isfinite(total.item()):
                nonfinite = [name for name, value in losses.items() if not math.isfinite(value.item())]
                raise divergence_error(nonfinite, losses, when, gradient=False)
            optimiser.zero_grad(set_to_none=True)
            with convolutions:
                total.backward()  # type: ignore[no-untyped-call]
            if not all_finite(p.grad for p in optimised_parameters(optimiser)):
                torch.set_rng_state(drawn)
                raise divergence_error(self.nonfinite_losses(phase, batch, optimiser), losses, when, gradient=True)
            optimiser.step()
            for name, value in losses.items():
                sums[name] += value.item()
        return {name: value / steps for name, value in sums.items()}

    def nonfinite_losses(self, phase: Phase, batch: Batch, optimiser: torch.optim.Optimizer) -> list[str]:
        """Return the losses of a step whose own gradients are not finite.

        They are computed again: to keep what they were differentiated by would cost every step memory and time.
        """
        trained = [p for p in optimised_parameters(optimiser) if p.requires_grad]
        with sound_convolutions(phase.trains):
            losses = {name: value for name, value in self.losses(phase, batch).items() if value.requires_grad}
            return [
                name
                for name, value in losses.items()
                if not all_finite(torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True))
            ]

    def losses(self, phase: Phase, batch: Batch) -> Losses:
        with self.autocast():
            return phase.loss(batch)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @torch.no_grad()
    def validate(self, phase: Phase, ctx: TrainingContext) -> PhaseResult:
        for module in phase.trains:
            module.eval()
        sums: defaultdict[str, float] = defaultdict(float)
        for x, y, index in self.valid.ordered(self.config.batch):
            for name, value in self.losses(phase, Batch(x, y, index, 1.0)).items():
                sums[name] += value.item() * len(y) / len(self.valid)
        nonfinite = [name for name, value in sums.items() if not math.isfinite(value)]
        if nonfinite:
            raise TrainingError(
                f"the loss on validation data is not finite after phase `{phase.name}` ({', '.join(nonfinite)})",
                hint=CALMER,
            )
        trains_student = any(module is ctx.student for module in phase.trains)
        return PhaseResult(dict(sums), self.accuracy(ctx.student) if trains_student else None)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of validation data that `model` gets right: of images, or as the task counts."""
        model.eval()
        fractions = []
        for x, y, _ in self.valid.ordered(self.config.batch):
            with self.autocast():
                fractions.append(self.valid.task.accuracy(model(x).float(), y) * len(y))
        return sum(fractions) / len(self.valid)

    def first_batches(self, count: int) -> Iterator[Batch]:
        for _, (x, y, index) in zip(range(count), self.train.ordered(self.config.batch), strict=False):
            yield Batch(x, y, index, 0.0)


def optimised_parameters(optimiser: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimiser.param_groups for parameter in group["params"])


def all_finite(gradients: Iterable[Tensor | None]) -> bool:
    """Return whether all their numbers are. The norm tells it cheaply; it overflows where they are merely huge."""
    present = [gradient for gradient in gradients if gradient is not None]
    return math.isfinite(get_total_norm(present).item()) or all(bool(g.isfinite().all()) for g in present)


def divergence_error(names: list[str], losses: Losses, when: str, gradient: bool) -> TrainingError:
    """Return the error with all losses that are not finite; none if only their sum is not."""
    quoted = ", ".join(f"`{name}`" for name in names)
    plural = len(names) > 1
    what = f"losses {quoted}" if plural else f"loss {quoted}" if names else "the sum of losses"
    if gradient:
        what = f"the {'gradients' if plural else 'gradient'} of {what}"
    values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
    return TrainingError(
        f"{what} {'are' if plural else 'is'} not finite in {when} ({values})", hint=STEEP if gradient else CALMER
    )


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move a module to where it is fast: on its device, in channels-last order."""
    module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def freeze(ctx: TrainingContext) -> None:
    """Nothing learns and no BatchNorm statistic moves, until a phase names it in `trains`."""
    for model in (ctx.student, *ctx.teachers):
        model.requires_grad_(False).eval()


def save_epoch(path: Path, phase: Phase, optimiser: torch.optim.Optimizer, curve: list[EpochRecord]) -> None:
    state = {
        "modules": [m.state_dict() for m in phase.trains],
        "optimiser": optimiser.state_dict(),
        "curve": [asdict(record) for record in curve],
    }
    save_atomic(path, state)


def restore_epoch(path: Path, phase: Phase, optimiser: torch.optim.Optimizer) -> list[EpochRecord]:
    """Put back what `save` wrote; the epochs that are done, none if there is no checkpoint."""
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    for module, tensors in zip(phase.trains, state["modules"], strict=True):
        module.load_state_dict(tensors)
    optimiser.load_state_dict(state["optimiser"])
    return [EpochRecord(**record) for record in state["curve"]]


def save_atomic(path: Path, state: Any) -> None:
    """Write `state` whole or not at all."""
    buffer = io.BytesIO()  # torch's own file writer hides a full disk behind a RuntimeError
    torch.save(state, buffer)
    partial = path.with_suffix(".partial")
    partial.write_bytes(buffer.getbuffer())
    partial.replace(path)
