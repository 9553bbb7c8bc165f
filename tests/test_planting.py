"""Channels are planted without effect, without touching what was learnt, within a budget; what cannot grow says why."""

import dataclasses

import pytest
import torch
from torch import nn

from edgekd.core.augment import Augment
from edgekd.core.method import Batch, PhaseResult, TrainingContext, run_phases
from edgekd.errors import ConfigError
from edgekd.methods.channel_planting import ChannelPlanting, GrowthCandidate, GrowthSearch
from edgekd.models.mobilenet_v2 import MobileNetV2Model
from edgekd.models.resnet import ResNet
from edgekd.models.unet import UNetModel
from edgekd.models.vgg import VGGModel
from edgekd.stages.distill.distill import PhaseRunner
from edgekd.stages.distill.setup import TrainingPlan, build_trainer
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression
from edgekd.training.architecture_diff import apply_diff, diff_architectures
from edgekd.training.channel_growth import (
    ChannelGroup,
    GrownLayer,
    GrownNorm,
    find_groups,
    group_of_layer,
    grow_group,
    merge_growth,
    new_modules,
)
from edgekd.training.macs import count_macs
from edgekd.training.trainer import TrainConfig, freeze
from tests import zoo

STUDENTS = {
    "resnet": ResNet(8, 4),
    "mobilenet": MobileNetV2Model(0.1, 0.3, 1),
    "vgg": VGGModel((4, 6), (1, 2)),
    "unet": UNetModel(4, 1),
}


@pytest.fixture(params=STUDENTS)
def student(request):
    torch.manual_seed(0)
    return STUDENTS[request.param], STUDENTS[request.param].build(3, 1).eval()


def images(seed=0):
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def able(network, x):
    return [group for group in find_groups(network, x) if not group.fixed]


def by_name(network, x):
    return {group.name: group for group in find_groups(network, x)}


@torch.no_grad()
def test_new_channels_start_without_effect_and_can_have_one(student):
    model, network = student
    x = images()
    if isinstance(model, UNetModel):
        nn.init.ones_(network.head.weight)  # it starts at zero
    found = able(network, x)
    assert len(found) >= 3
    want = network(x)
    for group in (found[0], *found[1::3]):
        wider = grow_group(network, group, 2)
        plain = merge_growth(wider)
        assert torch.allclose(wider(x), want, atol=1e-5 * want.abs().max().item())
        assert torch.allclose(plain(x), wider(x), atol=1e-6 * want.abs().max().item())
        assert group.channels(plain) == group.channels(network) + 2
        assert {type(m) for m in plain.modules()} <= {type(m) for m in network.modules()}, "only its own kinds of layer"
        again = apply_diff(model.build(3, 1), diff_architectures(model.build(3, 1), plain)).eval()
        again.load_state_dict(plain.state_dict())
        assert torch.equal(again(x), plain(x))
        for name, tensor in wider.named_parameters():
            if name.endswith("columns"):
                tensor.fill_(0.5)
        assert not torch.allclose(wider(x), want, atol=1e-4)


def test_layers_tied_by_a_residual_sum_grow_together():
    found = by_name(ResNet(8, 4).build(3, 1).eval(), images())
    assert found["stage1.0.conv1"] == ChannelGroup(
        ("stage1.0.conv1", "stage1.0.bn1"), ("stage1.0.bn1", "stage1.0.conv2")
    ), "within a block they do not"
    assert set(found["stem.0"].producers) == {"stem.0", "stem.1", "stage1.0.conv2", "stage1.0.bn2"}
    assert set(found["stem.0"].consumers) == {
        "stem.1", "stage1.0.conv1", "stage1.0.bn2", "stage2.0.conv1", "stage2.0.shortcut.0"
    }  # fmt: skip
    assert found["head"].fixed == "they are the output"


def test_depthwise_layers_grow_with_what_feeds_them():
    found = by_name(STUDENTS["mobilenet"].build(3, 1).eval(), images())
    first = "stages.1.0."
    assert set(found[first + "expand.0"].producers) == {
        first + layer for layer in ("expand.0", "expand.1", "spatial.0", "spatial.1")
    }
    assert first + "project.0" in found[first + "expand.0"].consumers


class Odd(nn.Module):
    """What foreign networks do with channels behind a first convolution."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
        self.middle = middle

    def forward(self, x):
        assert x.shape[2] > 1  # a branch on a size, which a symbolic trace could not follow
        return self.head(self.second(self.middle(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (lambda x: torch.cat(x.chunk(2, 1), 1), "`chunk` mixes or divides them"),
        (lambda x: x.reshape(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8), "`reshape` mixes or divides them"),
        (lambda x: x * torch.arange(8.0).reshape(1, 8, 1, 1), "`mul` mixes or divides them"),
        (lambda x: x.softmax(1), "more of them change the output"),
        (lambda x: x.flip(1), "more of them change the output"),
        (lambda x: x + torch.zeros(()) * torch.ones(1, 1, 1, 1), ""),
        (lambda x: torch.relu_(x).view(-1, 8, 8, 8), "does not run with more of them"),
        (nn.Conv2d(8, 8, 1, groups=2), "`middle` is a convolution in 2 groups"),
        (nn.GroupNorm(2, 8), "`group_norm` mixes or divides them"),
    ],
)
def test_what_cannot_grow_says_why(middle, why):
    torch.manual_seed(0)
    found = find_groups(Odd(middle).eval(), images())
    first = next(group for group in found if "first" in group.producers)
    assert why in first.fixed and bool(why) == bool(first.fixed)
    assert not next(group for group in found if "second" in group.producers).fixed
    if why:
        with pytest.raises(ConfigError, match="the channels of `first` cannot grow: ") as error:
            group_of_layer(found, "first")
        assert error.value.hint == "choose among second"
    with pytest.raises(ConfigError, match="no layer `secnd`.*\n*.*second"):
        group_of_layer(found, "secnd")


def test_gradients_reach_what_is_new_and_nothing_else():
    layer = GrownLayer(nn.Conv2d(2, 3, 3, padding=1).double(), 1, 2)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"new.columns", "new.rows", "new.bias"}
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    new = tuple(torch.randn_like(p).requires_grad_() for p in layer.new.values())

    def run(*values):
        return torch.func.functional_call(layer, {f"new.{k}": v for k, v in zip(layer.new, values, strict=True)}, (x,))

    assert torch.autograd.gradcheck(run, new)


def test_a_grown_batchnorm_has_true_gradients():
    layer = GrownNorm(nn.BatchNorm2d(2).double(), 1).double()
    layer.old.requires_grad_(False).eval()
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    new = tuple(torch.randn(1, dtype=torch.float64, requires_grad=True) for _ in "wb")

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"new.weight": weight, "new.bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, *new))


def test_macs_by_hand():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1),  # 4x4 pixels x 4 channels x 2*9
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, 1, 1, groups=4),  # 4x4 x 4 x 9
        nn.ConvTranspose2d(4, 3, 2, 2),  # 4x4 read x 4 x 3*4
        nn.Flatten(),
        nn.Linear(3 * 64, 5),
    )
    want = 16 * 4 * 18 + 16 * 4 * 9 + 16 * 4 * 12 + 192 * 5
    assert count_macs(network.eval(), torch.randn(1, 2, 8, 8)) == want
    assert count_macs(network, torch.randn(3, 2, 8, 8)) == 3 * want
    with pytest.raises(ConfigError, match="no convolution and no linear layer"):
        count_macs(nn.ReLU(), torch.randn(1, 2))


def a_context(home, epochs, student=None, **changes):
    torch.manual_seed(0)
    course = TrainingPlan(epochs, TrainConfig(batch=16, precision="fp32"), Augment(1, True), seed=0)
    trainer = build_trainer(zoo.blobs_dataset(home), course, torch.device("cpu"))
    ctx = TrainingContext(
        student or zoo.Toy(4), (zoo.Toy(8),), epochs, zoo.CLASSES, trainer.first_batches, Classification(), **changes
    )
    freeze(ctx)
    return ctx, trainer


def taught(home, method, ctx, trainer, watch=lambda phase, run: run(phase)):
    played = PhaseRunner(home / "work", trainer, ctx, "s")
    with played.progress():
        made = run_phases(method.phases(ctx), lambda phase: watch(phase, played.run))["student"]
    return made, played.records


def test_a_step_leaves_earlier_parameters_and_statistics_bit_for_bit(tmp_path):
    """With the trainer's momentum and weight decay."""
    network = ResNet(8, 4).build(3, 1)
    ctx, trainer = a_context(tmp_path, 6, network)
    assert trainer.config.weight_decay and trainer.config.momentum
    base = {}

    def watch(phase, run):
        outcome = run(phase)
        if phase.name == "base":
            base.update({k: v.clone() for k, v in network.state_dict().items()})
            return outcome
        parts = [t for m in phase.trains for t in m.parameters()]
        assert sum(p.numel() for p in parts) and not {id(p) for p in network.parameters()} & {id(p) for p in parts}
        return PhaseResult(
            {k: v - 100 if phase.name.startswith("grow") else v for k, v in outcome.losses.items()}, None
        )

    notes = {}
    ctx = dataclasses.replace(ctx, log_choice=notes.__setitem__)
    method = ChannelPlanting(start_fraction=0.3, num_steps=2, step_macs_fraction=0.5)
    made, records = taught(tmp_path, method, ctx, trainer, watch)
    assert [(r.name, r.epochs) for r in records] == [("base", 2), ("try1", 1), ("grow1", 1), ("try2", 1), ("grow2", 1)]
    assert [step["kept"] for step in notes["steps"]] == [True, True]
    state = made.state_dict()
    changed = [key for key, old in base.items() if state[key].shape != old.shape]
    assert len(changed) >= 4
    for key, old in base.items():
        assert torch.equal(state[key][tuple(slice(0, n) for n in old.shape)], old), key
    fresh = apply_diff(ResNet(8, 4).build(3, 1), diff_architectures(ResNet(8, 4).build(3, 1), made))
    fresh.load_state_dict(state)
    again, _ = taught(tmp_path, method, *a_context(tmp_path, 6, network), watch)
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items()), "recalled, it is the same"
    assert network.state_dict().keys() == base.keys()


def pretended(gain=0.1, accuracy=0.5):
    """Runs no phase, but says that validation gave a loss of 1 for candidates, and `gain` less from phase to phase."""
    phases = []

    def run(phase):
        said = {}
        for name in phase.loss(Batch(images(), torch.tensor([0, 1]), torch.arange(2), 1.0)):
            group, _, part = name.rpartition(":")
            task = 1.0 - gain * len(phases) * (group == "student")
            said[name] = {"task": task, "kd": 0.0, "error": 1 - accuracy}[part]
        phases.append(phase)
        return PhaseResult(said, None)

    return run, phases


def planned(home, method, run, epochs=20, **changes):
    notes = {}
    ctx, _ = a_context(home, epochs, log_choice=notes.__setitem__, **changes)
    with torch.no_grad():
        made = run_phases(method.phases(ctx), run)["student"]
    return made, notes, ctx


def test_growth_stops_when_the_macs_are_used_up(tmp_path):
    before = count_macs(zoo.Toy(4), images()[:1])
    run, phases = pretended()
    made, notes, _ = planned(
        tmp_path, ChannelPlanting(start_fraction=0.5, num_steps=4, max_macs=int(1.3 * before)), run
    )
    counts = [step["macs"] for step in notes["steps"]]
    assert before < counts[0] <= counts[-1] == count_macs(made, images()[:1]) <= 1.3 * before
    assert notes["end"] == "no channel fits into the remaining MACs"
    assert sum(phase.epochs for phase in phases) < 20


def test_growth_stops_at_the_latency_budget(tmp_path):
    method = ChannelPlanting(start_fraction=0.5, num_steps=4, max_ms=0.04)
    assert method.needs_target and not ChannelPlanting().needs_target
    asked = []

    def price(network):
        asked.append(count_macs(network, images()[:1]) / 1e6)
        return asked[-1]

    run, _ = pretended()
    made, notes, _ = planned(tmp_path, method, run, latency_ms=price)
    assert notes["end"] == "no candidate fits into the latency budget"
    assert notes["too slow"][-1]["channels"][1] - notes["too slow"][-1]["channels"][0] == 1, "down to one channel"
    assert notes["steps"] and notes["steps"][-1]["ms"] == count_macs(made, images()[:1]) / 1e6 <= 0.04
    assert max(asked) > 0.04


def test_what_is_too_slow_is_tried_with_fewer_channels(tmp_path):
    """Half of them at a time, of the best candidate first; what fits is taught in the rest of the step."""
    ctx, _ = a_context(tmp_path, 20)
    base = count_macs(ctx.student, images()[:1])

    def price(network):
        return count_macs(network, images()[:1]) / base

    run, phases = pretended()
    made, notes, _ = planned(
        tmp_path, ChannelPlanting(start_fraction=0.5, num_steps=1, max_ms=1.05), run, latency_ms=price
    )
    (step,) = notes["steps"]
    assert 1 < price(made) == step["ms"] <= 1.05
    # all three with their channels, then with half of them: of equal gains in the order of the network
    assert [(t["layer"], t["channels"]) for t in notes["too slow"]] == [
        ("stage1.0", [4, 7]), ("stage2.0", [8, 10]), ("stage3.0", [16, 21]),
        ("stage1.0", [4, 5]), ("stage2.0", [8, 9]), ("stage3.0", [16, 18]),
    ]  # fmt: skip
    assert all(t["ms"] > 1.05 and t["step"] == 1 for t in notes["too slow"])
    assert (step["layers"][0], step["channels"]) == ("stage3.0", [16, 17]) and made.head.in_features == 17
    assert [(phase.name, phase.epochs) for phase in phases] == [("base", 10), ("try1", 2), ("grow1", 8)]
    assert sum(p.numel() for m in phases[-1].trains for p in m.parameters()) == 8 * 9 + 2 + 3  # of one channel
    # without a limit nothing is measured, and the widest is planted
    wide, unlimited, _ = planned(tmp_path, ChannelPlanting(num_steps=1), pretended()[0], latency_ms=price)
    assert price(wide) > 1.05 and "too slow" not in unlimited


def test_growth_stops_at_the_goal(tmp_path):
    run, phases = pretended(accuracy=0.9)
    made, notes, ctx = planned(tmp_path, ChannelPlanting(target_accuracy=0.85), run)
    assert [phase.name for phase in phases] == ["base"] and made is ctx.student
    assert notes == {"steps": [], "end": "the target accuracy is reached"}


def test_candidates_cost_about_the_same(tmp_path):
    """As many channels as fit into the step's MACs, but no more than there are."""
    ctx, _ = a_context(tmp_path, 9)
    base = count_macs(ctx.student, images()[:1])
    seeds = GrowthSearch(ctx, ChannelPlanting(step_macs_fraction=0.4)).candidates(ctx.student)
    assert [seed.group.name for seed in seeds] == ["stage1.0", "stage2.0", "stage3.0"]
    for seed in seeds:
        assert seed.added == count_macs(merge_growth(seed.network), images()[:1]) - base <= 0.4 * base
        had, has = seed.channels
        assert has == 2 * had or seed.added * (has - had + 1) / (has - had) > 0.4 * base


def test_the_candidate_with_most_gain_per_mac_is_kept(tmp_path):
    """Of equal gains the cheaper; of losses the smaller."""
    ctx, _ = a_context(tmp_path, 9)
    garden = GrowthSearch(ctx, ChannelPlanting())
    first, second, third = (
        GrowthCandidate(ChannelGroup((name,), ()), ctx.student, (1, 2), 0, added)
        for name, added in (("a", 100), ("b", 50), ("c", 10))
    )
    for gains, want in (
        ((0.1, 0.1, 0.0), second),
        ((0.3, 0.1, 0.0), first),
        ((-0.1, -0.2, -0.15), first),
        ((-0.1, -0.2, 0.01), third),
    ):
        rated = dict(zip("abc", gains, strict=True))
        assert garden.best(ctx.student, [first, second, third], rated, 1) == (want, None)


def test_a_step_that_gains_nothing_is_undone(tmp_path):
    run, phases = pretended(gain=-0.1)
    made, notes, ctx = planned(tmp_path, ChannelPlanting(), run)
    assert made is ctx.student and [step["kept"] for step in notes["steps"]] == [False]
    assert notes["end"] == "the last step gained nothing and was undone"
    assert [phase.name for phase in phases] == ["base", "try1", "grow1"]


def test_only_named_layers_grow(tmp_path):
    run, phases = pretended()
    made, notes, _ = planned(tmp_path, ChannelPlanting(layers=("stage2.1",)), run)
    assert {step["layers"][0] for step in notes["steps"]} == {"stage2.0"}
    assert made.stage1[0].out_channels == 4 < 8 < made.stage2[0].out_channels


def test_the_finish_trains_the_whole_network(tmp_path):
    run, phases = pretended()
    made, _, _ = planned(tmp_path, ChannelPlanting(finish_fraction=0.2), run)
    assert phases[-1].trains == (made,) and phases[-1].epochs == 4
    assert sum(phase.epochs for phase in phases) == 20


def test_a_teacher_of_other_classes_leaves_the_labels(tmp_path):
    run, phases = pretended()
    _, notes, _ = planned(tmp_path, ChannelPlanting(num_steps=1), run, class_columns=((0, None, 1),))
    assert notes["labels only"] == "the teacher knows 2 of the 3 classes, so its logits are not imitated"
    batch = Batch(images(), torch.tensor([0, -1]), torch.arange(2), 0.0)
    assert set(phases[0].loss(batch)) == {"student:task"}


def test_dense_students_grow(tmp_path):
    ctx, _ = a_context(tmp_path, 4, UNetModel(4, 1).build(1, 1))
    ctx = dataclasses.replace(ctx, teachers=(UNetModel(6, 1).build(1, 1).eval(),), num_classes=1, task=Regression())
    x = images()

    def run(phase):
        losses = phase.loss(Batch(x, x.abs() + 1, torch.arange(2), 0.0))
        if torch.is_grad_enabled() and phase.name != "base":
            torch.stack(list(losses.values())).sum().backward()
            assert any(p.grad is not None for m in phase.trains for p in m.parameters())
        with torch.no_grad():
            losses = phase.loss(Batch(x, x.abs() + 1, torch.arange(2), 1.0))
        gain = 0.1 if phase.name.startswith("grow") else 0.0
        return PhaseResult({name: value.item() - gain for name, value in losses.items()}, None)

    made = run_phases(ChannelPlanting().phases(ctx), run)["student"]
    assert count_macs(made, x) > count_macs(ctx.student, x) and made(x).shape == x.shape


@pytest.mark.parametrize(
    ("settings", "epochs", "what"),
    [
        ({"max_macs": 1000}, 9, "MACs already, max_macs is 1000"),
        ({"step_macs_fraction": 0.001}, 9, "no channel fits into a step of"),
        ({"max_ms": 1.0}, 9, "latencies cannot be measured"),
        ({"layers": ("head",)}, 9, "the channels of `head` cannot grow: they are the output"),
        ({"layers": ("stage9",)}, 9, "no layer `stage9`"),
        ({}, 2, "are left for growth"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(settings, epochs, what, tmp_path):
    ctx, _ = a_context(tmp_path, epochs)
    with pytest.raises(ConfigError, match=what) as error:
        next(ChannelPlanting(**settings).phases(ctx))
    assert error.value.hint


def test_a_student_that_is_too_slow_already_is_refused(tmp_path):
    ctx, _ = a_context(tmp_path, 9, latency_ms=lambda network: 2.0)
    with pytest.raises(ConfigError, match="takes 2 ms already, max_ms is 1.0"):
        next(ChannelPlanting(max_ms=1.0).phases(ctx))


@pytest.mark.parametrize(
    "settings",
    [
        {"kd_weight": 2.0},
        {"num_steps": 0},
        {"step_macs_fraction": 0.0},
        {"target_accuracy": 80.0},
        {"max_macs": -1},
        {"max_ms": float("nan")},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ChannelPlanting(**settings)


def test_only_what_is_planted_learns():
    network = zoo.Toy(4).eval()
    wider = grow_group(network, by_name(network, images())["stage1.0"], 2)
    new = {id(p) for m in new_modules(wider) for p in m.parameters()}
    assert {id(p) for p in wider.parameters() if p.requires_grad} == new and len(new) == 4


def test_a_short_lesson_leaves_one_step_however_late_planting_starts():
    base, lengths, finish = ChannelPlanting(start_fraction=0.9).plan(5)
    assert (base, lengths, finish) == (3, [2], 0)
