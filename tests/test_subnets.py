"""Stages that a user's own code runs in a loop over an nn.ModuleList: sub-nets of them, or a refusal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from edgekd.core.method import Batch, TrainingContext, run_phases
from edgekd.errors import ConfigError
from edgekd.methods.depth_dynamic import DepthDynamic
from edgekd.tasks.classification import Classification
from edgekd.training.architecture_diff import apply_diff, diff_architectures
from edgekd.training.subnets import SkippableStage, build_subnet, find_stages
from tests import zoo


class Looped(nn.Module):
    """Two lists of residual blocks, the first behind a convolution; (N, 1, 8, 8) to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.ModuleList([zoo.conv(1, 4, 1), *(zoo.Residual(4) for _ in range(3))])
        self.down = zoo.conv(4, 8, 2)
        self.stage2 = nn.ModuleList(zoo.Residual(8) for _ in range(2))
        self.head = nn.Linear(8, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.stage1:
            x = block(x)
        x = self.down(x)
        for block in self.stage2:
            x = block(x)
        return self.head(x.mean((2, 3)))


class List(nn.Module):
    """One list of three residual blocks; how it is run is up to others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(zoo.Residual(1) for _ in range(3))
        self.scales = nn.ModuleList(nn.Conv2d(1, 1, 1) for _ in range(3))

    def through(self, x: Tensor) -> list[Tensor]:
        made = [x]
        for block in self.blocks:
            made.append(block(made[-1]))
        return made[1:]


class Counted(List):
    def forward(self, x: Tensor) -> Tensor:
        for number in range(3):
            x = self.blocks[number](x)
        return x.flatten(1)


class Collected(List):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.through(x), 1).flatten(1)


class Summed(List):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.through(x)).sum(0).flatten(1)


class Paired(List):
    def forward(self, x: Tensor) -> Tensor:
        for block, scale in zip(self.blocks, self.scales, strict=False):
            x = scale(block(x))
        return x.flatten(1)


class Shrunk(List):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = nn.functional.max_pool2d(block(x), 2)
        return x.flatten(1)


class Recurrent(List):
    def forward(self, x: Tensor) -> Tensor:
        return self.through(self.through(x)[-1])[-1].flatten(1)


class Reversed(List):
    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x.flatten(1)


class Second(List):
    """Its second block is read by name."""

    def forward(self, x: Tensor) -> Tensor:
        made = self.through(x)
        return (made[-1] + made[1]).flatten(1)


class Pooled(List):
    """Its map is halved between two blocks: at the first one's end it has another size than at the last one's."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.blocks[0](x), 2)
        for block in self.blocks[1:]:
            x = block(x)
        return x.flatten(1)


class Indexed(nn.Module):
    """An nn.Sequential whose children are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(zoo.Residual(1) for _ in range(3)))

    forward = Counted.forward
    through = List.through


def a_batch() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_blocks_of_a_list_that_a_loop_runs_can_be_skipped() -> None:
    assert find_stages(Looped().eval(), a_batch()) == [SkippableStage("stage1", 4, 1), SkippableStage("stage2", 2, 1)]


@pytest.mark.parametrize("kind", [Counted, Collected, Summed, Paired, Shrunk, Recurrent, Reversed, Indexed])
def test_a_list_that_is_run_otherwise_stays_whole(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert find_stages(kind().eval(), a_batch()) == []


@pytest.mark.parametrize("kind", [Second, Pooled])
def test_a_block_that_is_read_by_its_number_stays_with_those_before_it(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert find_stages(kind().eval(), a_batch()) == [SkippableStage("blocks", 3, 2)]


def test_looking_for_stages_leaves_a_network_as_it_was() -> None:
    net = Looped().eval()
    before = copy.deepcopy(net.state_dict())
    find_stages(net, a_batch())
    assert len(net.stage1) == 4 and not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_subnet_of_a_list_answers_as_a_network_cut_by_hand() -> None:
    torch.manual_seed(0)
    whole, x = Looped().eval(), a_batch()
    net, cut = build_subnet(whole, find_stages(whole, x), (2, 1), private=True), copy.deepcopy(whole)
    cut.stage1, cut.stage2 = cut.stage1[:2], cut.stage2[:1]
    with torch.no_grad():
        assert torch.equal(net.module(x), cut(x)) and torch.equal(net.alone()(x), cut(x))
    assert len(whole.stage1) == 4, "the whole network keeps its blocks"


def a_context(student: nn.Module) -> TrainingContext:
    batch = Batch(a_batch(), torch.arange(6) % zoo.CLASSES, torch.arange(6), 0.0)
    return TrainingContext(student.eval(), (), 4, zoo.CLASSES, lambda count: iter([batch]), Classification())


def test_depth_dynamic_makes_plain_networks_of_lists_that_their_own_code_builds_again() -> None:
    torch.manual_seed(0)
    lesson = a_context(Looped())
    made = run_phases(DepthDynamic().phases(lesson), lambda phase: None)  # type: ignore[arg-type, return-value]
    assert list(made) == ["student", "depth-1-1", "depth-2-1"]
    for network in made.values():
        assert type(network) is Looped
        built = Looped()
        again = apply_diff(built, diff_architectures(built, network))
        again.load_state_dict(network.state_dict())
        assert torch.equal(again.eval()(a_batch()), network.eval()(a_batch()))


def test_its_losses_on_lists_are_finite_and_reach_every_block() -> None:
    torch.manual_seed(0)
    lesson = a_context(Looped())
    phase = next(DepthDynamic().phases(lesson))
    losses = torch.stack([*phase.loss(next(lesson.first_batches(1))).values()])
    losses.sum().backward()
    assert losses.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for m in phase.trains for p in m.parameters())


def test_a_student_of_a_list_that_is_not_run_in_a_loop_is_refused() -> None:
    with pytest.raises(ConfigError, match="Counted has no blocks that can be skipped"):
        next(DepthDynamic().phases(a_context(Counted())))
