"""blockwise: student blocks taught apart by teacher blocks, several candidates each; the best path is put together.

Neighbourhood distillation (Shao, Moroz, Eban, Movshovitz-Attias, 2020, arXiv 2010.01189) with the search of DNA (Li et
al., 2020, arXiv 1911.13053). Both networks are cut where the size of their maps changes. With t_i the teacher's
features at cut i, P_i a 1x1 convolution to the student's width (then ReLU, where the student's layer has no negative
outputs), r_i = P_i(t_i), and B_ik candidate k of block i, the student's own block with k repeats fewer a stage:

    taught:  mean (B_ik(r_i-1) - r_i)^2 / var(r_i), with this r_i fixed; the head, on the last r_i: the task's loss
    rated:   mean |B_ik(r_i-1) - r_i| / std(r_i) on validation data; a path by the sum over its blocks (DNA)

The best path under a limit is put together and fine-tuned with labels and the teacher's answers. The bridge between
its blocks is r_i, both what block i must make and what block i+1 is given: so blocks fit without P, which is dropped.
P_i learns only from the block behind it; from the block before it, it would learn to be easily made, a constant.

Deviations from the papers, and why:
- DNA's blocks end in the teacher's widths, and its candidates are layers of other kinds. Ours stay in the family of the
  student, so that the result can be built again: a candidate has fewer residual blocks, and P joins the widths.
- All candidates are taught in one phase: given their inputs, no gradient passes between them, and they share the
  teacher's pass. Each has weights of its own, so its BatchNorm need not be estimated anew before it is rated.
- The loss is relative (DNA: plain), because one optimiser teaches blocks whose features differ in size.
- The teacher stays in eval mode (DNA: train mode). Blocks keep their weights (DNA trains the path anew); fine-tuning
  re-estimates their BatchNorm, which has seen only the teacher's features.
- What lies behind the last common size belongs to the head; it has one candidate, the full one.
- Latencies are measured, not summed over blocks: paths are tried from the best rating on, without those that are
  nowhere shorter than one that was too slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.errors import ConfigError
from edgekd.training.architecture_diff import Surgery, operated
from edgekd.training.feature_hooks import Taps
from edgekd.training.feature_method import Pair
from edgekd.training.layer_discovery import Layer, cuts, homes, outputs, unique
from edgekd.training.layer_matching import Candidate, named
from edgekd.training.losses import check_shares, check_temperature, imitation, supervised
from edgekd.training.macs import macs
from edgekd.training.subnets import stages
from edgekd.training.teachers import answers_all, columns, teacher

Path: TypeAlias = tuple[int, ...]  # for each block how many repeats fewer its candidate has
TaskLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Blockwise(Method):
    cuts: tuple[Pair, ...] = ()  # layers where blocks end, in order; none: the last ones of each common size
    candidates: int = 3  # of a block, at most: full, one repeat fewer, two fewer
    share: float = 0.4  # of the budget, to teach the blocks; the rest fine-tunes; each at least an epoch
    max_macs: int | None = None  # limit of the student, for one image
    max_ms: float | None = None  # limit of the student's measured latency
    weight: float = 0.9  # of the teacher's answers beside the labels, where it knows all classes
    temperature: float = 4.0
    standardise: bool = False  # the logits, before they are softened

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ConfigError(f"candidates is {self.candidates}", hint="use 1 or more; 1 means no search")
        check_shares(share=self.share, weight=self.weight)
        check_temperature(self.temperature)
        for name in ("max_macs", "max_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}", hint="use a number above 0")

    @property
    def priced(self) -> bool:
        return self.max_ms is not None

    def teach(self, lesson: Lesson) -> Script:
        if lesson.epochs < 2:
            raise ConfigError("1 epoch cannot both teach blocks and fine-tune", hint="give 2 epochs or more")
        epochs = min(max(1, round(self.share * lesson.epochs)), lesson.epochs - 1)
        x, student, task = next(lesson.sample(1)).x[:2], lesson.student, self.task(lesson)
        blocks, home = divided(lesson, self.cuts, self.candidates, x)
        search = Search(lesson, blocks, x, self)
        count = max(len(block.lengths) for block in blocks)
        paths = [tuple(min(fewer, len(block.lengths) - 1) for block in blocks) for fewer in range(count)]
        pupils = [search.network(path) for path in paths]
        outcome = yield block_phase(lesson, blocks, pupils, task, epochs)
        ratings = [[outcome.losses[b.key(fewer)] for fewer in range(len(b.lengths))] for b in blocks]
        path = search.best(ratings)
        lesson.note("paths", search.told(ratings, path))
        for stage, left in search.lengths(path).items():
            del student.get_submodule(stage)[left:]  # type: ignore[operator]
        states = [pupils[fewer].state_dict() for fewer in (*path, 0)]
        owners = {key: key.rpartition(".")[0] for key in student.state_dict()}
        student.load_state_dict({key: states[home.get(owner, 0)][key] for key, owner in owners.items()})

        def loss(batch: Batch) -> Losses:
            with torch.no_grad():
                theirs = teacher(lesson)(batch.x)
            return task(student(batch.x), theirs, batch.y)

        yield Phase("fine-tune", trains=(student,), loss=loss, epochs=lesson.epochs - epochs)
        return {"student": student}

    def task(self, lesson: Lesson) -> TaskLoss:
        """What labels and the teacher's answers say of an answer; labels alone, if it does not know all classes."""
        known, copying = [column for column in columns(lesson) if column is not None], answers_all(lesson)

        def loss(answer: Tensor, theirs: Tensor, y: Tensor) -> dict[str, Tensor]:
            told = supervised(answer, y)
            if not copying:
                return {"task": told}
            copied = imitation(answer, theirs[:, known], self.temperature, self.standardise)
            return {"task": (1 - self.weight) * told, "kd": self.weight * copied}

        return loss


def gap(made: Tensor, wanted: Tensor, power: int) -> Tensor:
    """The mean of |made - wanted|^power, relative to the deviation of what is wanted."""
    return ((made.float() - wanted.float()).abs() / (wanted.float().std() + 1e-6)).pow(power).mean()


@dataclass(frozen=True)
class Block:
    """What lies between two cuts of the student."""

    end: Candidate  # the teacher's and the student's layer at its end
    lengths: tuple[dict[str, int], ...]  # of each candidate: children left in the nn.Sequential of that path

    def key(self, fewer: int) -> str:
        return f"{self.end.student.path}:{-fewer}"

    def projection(self) -> nn.Module:
        conv = nn.Conv2d(self.end.teacher.channels, self.end.student.channels, 1)
        return conv if self.end.student.signed else nn.Sequential(conv, nn.ReLU())


def divided(lesson: Lesson, chosen: tuple[Pair, ...], candidates: int, x: Tensor) -> tuple[list[Block], dict[str, int]]:
    """The student's blocks, with up to so many candidates; and by path the number of the block of each module.

    Raises ConfigError if they cannot be found, or named so.
    """
    student = lesson.student
    nets = teacher(lesson), student
    pairs = [named(*nets, cut.teacher, cut.student, x) for cut in chosen]
    if not pairs:
        wide, thin = (ends(net, x) for net in nets)
        pairs = [Candidate(theirs, own) for own in thin for theirs in wide if theirs.size == own.size]
    if not pairs:
        sizes = [", ".join("{}x{}".format(*layer.size) for layer in side) or "none" for side in (wide, thin)]
        raise ConfigError(
            "the student cannot be cut into blocks: its layers that everything passes through have no size in common "
            f"with the teacher's (teacher: {sizes[0]}; student: {sizes[1]})",
            hint="choose a student that shrinks maps alike, or name `cuts`",
        )
    order = [pair.student.path for pair in pairs]
    home = homes(student, order, x)
    if [home.get(path) for path in order] != list(range(len(order))):
        raise ConfigError("the `cuts` are not in the order in which the student runs them", hint="sort them")
    fixed = {student.get_submodule(path) for path in order}  # a stage that holds one stays as it is
    found = [s for s in stages(student, x) if fixed.isdisjoint([*student.get_submodule(s.path).modules()][1:])]
    blocks = []
    for number, pair in enumerate(pairs):
        own = [s for s in found if home[s.end(student)] == number]
        most = min(candidates, 1 + max((s.blocks - s.least for s in own), default=0))
        left = ({s.path: max(s.least, s.blocks - fewer) for s in own} for fewer in range(most))
        blocks.append(Block(pair, tuple(left)))
    return blocks, home


def ends(model: nn.Module, x: Tensor) -> list[Layer]:
    """Of each size the last layer that everything passes through, in order of execution; not a dense answer.

    It lies in as few modules as can be that end in another size, so not in the next stage; and it is the last layer of
    a stage only as the stage itself, whose path stays when it becomes shorter.
    """
    with torch.no_grad():
        answer = tuple(model(x).shape[1:])
    made = outputs(model, x)
    sizes = {layer.path: layer.size for layer, _ in made}

    def late(layer: Layer) -> int:
        parts = layer.path.split(".")
        around = [".".join(parts[:i]) for i in range(1, len(parts))]
        return sum(sizes.get(path, layer.size) != layer.size for path in around)

    found = [layer for layer in unique(made) if (layer.channels, *layer.size) != answer]
    ranked = sorted(reversed(found), key=late)
    last = [
        next((layer for layer in ranked if layer.size == size and cuts(model, layer.path, x)), None)
        for size in {layer.size for layer in found}
    ]
    return sorted(filter(None, last), key=found.index)


def block_phase(lesson: Lesson, blocks: list[Block], pupils: list[nn.Module], task: TaskLoss, epochs: int) -> Phase:
    """Teach all candidates at once: pupil k has candidate k of every block that has so many."""
    known = Taps(teacher(lesson), *dict.fromkeys(block.end.teacher.path for block in blocks))
    projections = [block.projection() for block in blocks]
    order = [block.end.student.path for block in blocks]
    taps = [Taps(pupil, *order) for pupil in pupils]

    def loss(batch: Batch) -> Losses:
        power = 2 if torch.is_grad_enabled() else 1
        with torch.no_grad():
            theirs, features = known(batch.x)
        wanted = [project(features[b.end.teacher.path]) for b, project in zip(blocks, projections, strict=True)]
        losses: dict[str, Tensor] = {}
        for fewer, tap in enumerate(taps):
            answer, made = tap(batch.x, dict(zip(order, wanted, strict=True)))
            for block, end, target in zip(blocks, order, wanted, strict=True):
                if fewer < len(block.lengths):
                    losses[block.key(fewer)] = gap(made[end], target.detach(), power)
            if fewer == 0:
                losses |= task(answer, theirs, batch.y)
        return losses

    return Phase("blocks", trains=(*pupils, *projections), loss=loss, epochs=epochs)


class Search:
    """All paths through the candidates, and what they cost. Raises ConfigError if none is under the limits."""

    def __init__(self, lesson: Lesson, blocks: list[Block], x: Tensor, method: Blockwise) -> None:
        self.lesson, self.blocks, self.method = lesson, blocks, method
        paths = itertools.product(*(range(len(block.lengths)) for block in blocks))
        self.macs = {path: macs(self.network(path), x[:1]) for path in paths}
        self.ms: dict[Path, float] = {}
        shortest = max(self.macs)
        if not self.fits(shortest):
            took = f" and takes {self.ms[shortest]:.3g} ms" if shortest in self.ms else ""
            raise ConfigError(
                f"no path is under the limits (max_macs {method.max_macs}, max_ms {method.max_ms}): "
                f"the cheapest has {self.macs[shortest]} MACs{took}",
                hint="raise the limit or candidates, or choose a thinner student",
            )

    def fits(self, path: Path) -> bool:
        """Whether a path is under the limits. Measures its latency if that decides."""
        max_macs, max_ms, price = self.method.max_macs, self.method.max_ms, self.lesson.price
        if max_macs is not None and self.macs[path] > max_macs:
            return False
        if max_ms is None:
            return True
        if price is None:
            raise ConfigError(
                f"max_ms is {max_ms}, but latencies cannot be measured here",
                hint="set max_macs instead, or build where the first target can run",
            )
        if path not in self.ms:
            self.ms[path] = price(self.network(path))
        return self.ms[path] <= max_ms

    def lengths(self, path: Path) -> dict[str, int]:
        """What a path leaves of each nn.Sequential that may be shortened."""
        own = (block.lengths[fewer] for block, fewer in zip(self.blocks, path, strict=True))
        return {stage: left for lengths in own for stage, left in lengths.items()}

    def network(self, path: Path) -> nn.Module:
        return operated(self.lesson.student, Surgery(self.lengths(path)))

    def ranked(self, ratings: list[list[float]]) -> list[tuple[float, Path]]:
        """Every path with the sum of its blocks' ratings, best first, of equal ones the cheaper."""
        rated = [(sum(r[n] for r, n in zip(ratings, path, strict=True)), path) for path in self.macs]
        return sorted(rated, key=lambda each: (each[0], self.macs[each[1]]))

    def best(self, ratings: list[list[float]]) -> Path:
        """The best path under the limits; the shortest of all is."""
        too_dear: list[Path] = []
        for _, path in self.ranked(ratings):
            if any(all(a <= b for a, b in zip(path, dear, strict=True)) for dear in too_dear):
                continue  # nowhere shorter
            if self.fits(path):
                break
            too_dear.append(path)
        return path

    def told(self, ratings: list[list[float]], chosen: Path) -> list[dict[str, Any]]:
        """Every path as the report shows it, best rating first. `ms` is None where none was measured."""
        return [
            {
                "lengths": self.lengths(path),
                "ratings": [round(r[fewer], 4) for r, fewer in zip(ratings, path, strict=True)],
                "rating": round(rating, 4),
                "macs": self.macs[path],
                "ms": self.ms.get(path),
                "chosen": path == chosen,
            }
            for rating, path in self.ranked(ratings)
        ]


PLUGIN = Blockwise
