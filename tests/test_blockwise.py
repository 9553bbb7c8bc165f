"""Blockwise: blocks learn apart from each other, ratings are DNA's, the best path under a limit is put together."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.core.method import Batch, PhaseResult, TrainingContext
from edgekd.errors import ConfigError
from edgekd.methods.blockwise import Blockwise, divide_student, last_cut_layers, relative_gap
from edgekd.models.wide_resnet import PLUGIN as WideResNet
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression
from edgekd.training.architecture_diff import ArchitectureDiff, apply_diff
from edgekd.training.feature_method import LayerPair
from edgekd.training.macs import count_macs
from tests import zoo


def batch():
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(6) % zoo.CLASSES, torch.arange(6), 0.0)


class BlockwiseRun:
    """A lesson that remembers its notes: stages of 3 blocks, 1 of which must stay, and of 2, both of which may go."""

    def __init__(self, **changes):
        torch.manual_seed(0)
        self.notes = {}
        self.ctx = dataclasses.replace(
            TrainingContext(
                zoo.Staged().eval(), (zoo.Toy(3).eval(),), 10, zoo.CLASSES, lambda n: iter([batch()]), Classification()
            ),
            log_choice=self.notes.__setitem__,
            **changes,
        )

    def start(self, method):
        """The script in its first phase."""
        script = method.phases(self.ctx)
        return script, next(script)

    def chosen(self):
        return next(path for path in self.notes["paths"] if path["chosen"])


def arithmetic(**keys):
    """Ratings by hand: of stage 1 and stage 2, full, one fewer, two fewer."""
    return {f"{path}:{-n}": r for path, ratings in keys.items() for n, r in enumerate(ratings)}


def test_losses_are_the_formulas():
    random = np.random.default_rng(0)
    made, wanted = random.normal(size=(2, 4, 3, 5, 5)) * 3 + 1
    ours = [relative_gap(torch.tensor(made), torch.tensor(wanted), power).item() for power in (1, 2)]
    spread = wanted.std(ddof=1)
    assert ours == pytest.approx([np.abs(made - wanted).mean() / spread, ((made - wanted) ** 2).mean() / spread**2])


def test_blocks_end_where_the_size_of_maps_changes():
    room = BlockwiseRun()
    blocks, home = divide_student(room.ctx, (), 3, batch().images)
    assert [(b.end.teacher.path, b.end.student.path) for b in blocks] == [
        ("stage1", "stage1"),
        ("stage3", "stage2"),
    ]
    assert [b.lengths for b in blocks] == [
        ({"stage1": 3}, {"stage1": 2}, {"stage1": 1}),
        ({"stage2": 3}, {"stage2": 2}, {"stage2": 1}),
    ]
    assert [home[path] for path in ("stem.0", "stage1.2.branch.0", "stage2.0.0", "head")] == [0, 0, 1, 2]


def test_a_block_does_not_end_in_the_next_stage():
    network = WideResNet(depth=16, width=0.5).build(zoo.CLASSES, 1).eval()
    torch.manual_seed(0)
    assert [end.path for end in last_cut_layers(network, torch.randn(2, 1, 16, 16))] == ["stage1", "stage2", "act"]


def test_ratings_are_those_of_blocks_run_by_hand_on_projected_features():
    room = BlockwiseRun()
    _, phase = room.start(Blockwise())
    full, fewer, _, first, last = phase.trains
    with torch.no_grad():
        got = phase.loss(batch())
        known = room.ctx.teachers[0]
        t1 = known.stage1(batch().images)
        t2 = known.stage3(known.stage2(t1))
        r1, r2 = first(t1), last(t2)
        by_hand = fewer.stage2(r1).numpy() - r2.numpy()
        assert got["stage2:-1"].item() == pytest.approx(np.abs(by_hand).mean() / r2.numpy().std(ddof=1), rel=1e-4)
        by_hand = full.stage1(full.stem(batch().images)).numpy() - r1.numpy()
        assert got["stage1:0"].item() == pytest.approx(np.abs(by_hand).mean() / r1.numpy().std(ddof=1), rel=1e-4)


def test_a_block_learns_apart_and_its_target_is_formed_by_the_block_behind_it():
    room = BlockwiseRun()
    _, phase = room.start(Blockwise())
    for module in phase.trains:
        module.requires_grad_(True)
    full, fewer, _, first, last = phase.trains
    losses = phase.loss(batch())
    assert losses.keys() == {*arithmetic(**{"stage1": "123", "stage2": "123"}), "task", "kd"}

    def reached(loss, *modules):
        weights = [next(m.parameters()) for m in modules]
        return [g is not None for g in torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)]

    parts = (fewer.stage1, first, fewer.stage2, last, fewer.head, full.stage2, full.head)
    assert reached(losses["stage1:-1"], *parts) == [True, False, False, False, False, False, False]
    assert reached(losses["stage2:-1"], *parts) == [False, True, True, False, False, False, False]
    assert reached(losses["kd"], *parts) == [False, False, False, True, False, False, True]


RATINGS = {"stage1": (0.30, 0.45, 0.50), "stage2": (0.60, 0.62, 0.90)}


def every_path():
    """Lengths, rating, MACs, worked out without the method."""
    torch.manual_seed(0)
    student = zoo.Staged().eval()
    for a, b in itertools.product(range(3), repeat=2):
        left = {"stage1": 3 - a, "stage2": 3 - b}
        rating = RATINGS["stage1"][a] + RATINGS["stage2"][b]
        yield left, rating, count_macs(apply_diff(student, ArchitectureDiff(left)), batch().images[:1])


def taught(room, method):
    """After the blocks have got their ratings, up to the phase that fine-tunes."""
    script, first = room.start(method)
    last = script.send(PhaseResult(arithmetic(**RATINGS) | {"task": 0.0, "kd": 0.0}, None))
    assert first.epochs + last.epochs == room.ctx.epochs
    return first, last


COSTS = sorted({cost for _, _, cost in every_path()})


@pytest.mark.parametrize("limit", [*COSTS, None])
def test_the_chosen_path_is_the_best_of_all_under_the_limit_of_macs(limit):
    room = BlockwiseRun()
    taught(room, Blockwise(max_macs=limit))
    under = [path for path in every_path() if limit is None or path[2] <= limit]
    lengths, rating, cost = min(under, key=lambda path: path[1])
    assert room.chosen() == {
        "lengths": lengths,
        "ratings": [RATINGS[path][3 - left] for path, left in lengths.items()],
        "rating": pytest.approx(rating),
        "macs": cost,
        "ms": None,
        "chosen": True,
    }
    assert len(room.notes["paths"]) == 9
    assert {path: len(getattr(room.ctx.student, path)) for path in lengths} == lengths


def milliseconds(network):
    """A target on which the blocks of stage 2 are the slow ones."""
    return 1.0 + 0.5 * len(network.stage1) + 3.0 * len(network.stage2)


@pytest.mark.parametrize("limit", [4.5, 5.0, 7.6, 8.4, 100.0])
def test_the_chosen_path_is_the_best_of_all_under_the_limit_of_latency(limit):
    measured = []
    room = BlockwiseRun(latency_ms=lambda network: measured.append(network) or milliseconds(network))
    assert Blockwise(max_ms=limit).needs_target and not Blockwise().needs_target
    taught(room, Blockwise(max_ms=limit))
    under = [p for p in every_path() if 1 + 0.5 * p[0]["stage1"] + 3 * p[0]["stage2"] <= limit]
    assert room.chosen()["lengths"] == min(under, key=lambda path: path[1])[0]
    assert room.chosen()["ms"] <= limit
    assert len(measured) == sum(path["ms"] is not None for path in room.notes["paths"])
    assert limit < 100 or len(measured) == 2  # the shortest before training, then the best


def test_what_is_put_together_has_the_weights_of_the_chosen_candidates():
    room = BlockwiseRun()
    (limit,) = [cost for left, _, cost in every_path() if left == {"stage1": 3, "stage2": 2}]
    script, phase = room.start(Blockwise(max_macs=limit))
    full, fewer, *_ = phase.trains
    with torch.no_grad():
        for weight in (w for module in phase.trains for w in module.parameters()):
            weight.normal_()
    script.send(PhaseResult(arithmetic(**RATINGS) | {"task": 0.0, "kd": 0.0}, None))
    student = room.ctx.student
    assert room.chosen()["lengths"] == {"stage1": 3, "stage2": 2}
    features = student.stage1(student.stem(batch().images))
    assert torch.equal(features, full.stage1(full.stem(batch().images)))
    assert torch.equal(student.stage2(features), fewer.stage2(features))
    assert all(map(torch.equal, student.head.parameters(), full.head.parameters()))
    assert student.state_dict().keys() == apply_diff(zoo.Staged(), ArchitectureDiff({"stage2": 2})).state_dict().keys()


def test_blocks_that_are_taught_come_nearer_to_the_teacher():
    torch.manual_seed(0)
    room = BlockwiseRun()
    _, phase = room.start(Blockwise())
    before = phase.loss(batch())
    weights = [w for module in phase.trains for w in module.train().requires_grad_(True).parameters()]
    optimiser = torch.optim.SGD(weights, 0.02, 0.9)
    for _ in range(40):
        optimiser.zero_grad()
        sum(phase.loss(batch()).values()).backward()
        optimiser.step()
    with torch.no_grad():
        after = phase.loss(batch())
    assert all(after[key] < 0.9 * before[key] for key in after if ":" in key)


def test_a_teacher_of_other_classes_is_not_imitated():
    room = BlockwiseRun(class_columns=((0, None, 2),))
    assert "labels only" not in room.notes
    for phase in taught(room, Blockwise()):
        assert room.notes["labels only"] == "the teacher knows 2 of the 3 classes, so its logits are not imitated"
        assert "task" in phase.loss(batch()) and "kd" not in phase.loss(batch())


class Dense(nn.Module):
    """(N, 1, 8, 8) to maps (N, 1, 8, 8), without paths around its middle."""

    def __init__(self, width):
        super().__init__()
        self.down = zoo.conv(1, width, 2)
        self.middle = nn.Sequential(*(zoo.Residual(width) for _ in range(3)))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), *zoo.conv(width, width, 1))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        return self.head(self.up(self.middle(self.down(x))))


def test_answers_may_be_maps():
    maps = dataclasses.replace(batch(), labels=torch.rand(6, 1, 8, 8))
    room = BlockwiseRun(student=Dense(4).eval(), teachers=(Dense(6).eval(),), task=Regression(), num_classes=1)
    script, phase = room.start(Blockwise())
    losses = {name: value.item() for name, value in phase.loss(maps).items()}
    assert losses.keys() == {"middle:0", "middle:-1", "middle:-2", "up:0", "task", "kd"}
    last = script.send(PhaseResult(losses, None))
    with torch.no_grad():
        gap = room.ctx.student(maps.images) - maps.labels
    assert last.loss(maps)["task"].item() == pytest.approx(0.1 * gap.abs().mean().item(), rel=1e-5)


def test_named_cuts_are_used_and_the_blocks_that_hold_them_stay():
    room = BlockwiseRun()
    pairs = (LayerPair("stage1", "stage1.1.branch"),)
    with pytest.raises(ConfigError, match="paths around layer `stage1.1.branch`"):
        room.start(Blockwise(cuts=pairs))
    room.start(Blockwise(cuts=(LayerPair("stage1", "stage1.1"),)))
    (block,), _ = divide_student(room.ctx, (LayerPair("stage1", "stage1.2"),), 3, batch().images)
    assert block.lengths == ({},)  # nothing of stage 1 may go
    pairs = (LayerPair("stage1", "stem"), LayerPair("stage1", "stage1.1"))
    (first, second), _ = divide_student(room.ctx, pairs, 3, batch().images)
    assert (first.lengths, second.lengths) == (({},), ({},))


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        ({"max_macs": COSTS[0] - 1}, {}, f"the cheapest has {COSTS[0]} MACs"),
        ({"max_ms": 4.4}, {"latency_ms": milliseconds}, "MACs and takes 4.5 ms"),
        ({"max_ms": 4.4}, {}, "latencies cannot be measured here"),
        ({}, {"epochs": 1}, "1 epoch cannot both"),
        ({}, {"student": nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()}, "student: none"),
        ({}, {"teachers": ()}, "needs 1 teacher"),
        ({"cuts": (LayerPair("stage1", "stege1"),)}, {}, "no layer `stege1`"),
        ({"cuts": (LayerPair("stage2", "stage2"), LayerPair("stage1", "stage1"))}, {}, "not in the order"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_training(settings, changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        BlockwiseRun(**changes).start(Blockwise(**settings))
    assert error.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_candidates", 0),
        ("blocks_fraction", 1.5),
        ("kd_weight", 1.5),
        ("max_macs", 0),
        ("max_ms", -1.0),
        ("temperature", 0.0),
    ],
)
def test_settings_without_sense_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Blockwise(**{name: value})
