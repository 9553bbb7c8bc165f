"""One training makes a whole network and sub-nets of several depths in it, each of them a plain network."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.core.augment import Augment
from edgekd.core.method import Batch, TrainingContext, run_phases
from edgekd.errors import ConfigError
from edgekd.methods.depth_dynamic import DepthDynamic, attention_loss, attention_map
from edgekd.models.imagenet_resnet import ImagenetResNetModel
from edgekd.models.mobilenet_v2 import MobileNetV2Model
from edgekd.models.resnet import ResNet
from edgekd.models.shufflenet import ShuffleNetModel
from edgekd.models.unet import UNetModel
from edgekd.models.vgg import VGGModel
from edgekd.stages.distill.distill import distill
from edgekd.stages.distill.setup import TrainingPlan
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression
from edgekd.training.batchnorm import list_batchnorms, reestimate
from edgekd.training.subnets import SkippableStage, build_subnet, find_stages, spread_depths
from edgekd.training.trainer import TrainConfig
from tests import zoo

STAGES = [SkippableStage("stage1", 3, 1), SkippableStage("stage2", 3, 1)]


def a_net(seed=0):
    """A toy whose BatchNorm has seen something."""
    torch.manual_seed(seed)
    net = zoo.Staged()
    for norm in list_batchnorms(net):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return net.eval()


def a_batch(count=8):
    return torch.randn(count, 1, 8, 8)


# --- sub-nets ---


def test_stages_are_found_on_foreign_networks():
    x = torch.randn(2, 1, 32, 32)
    found = {
        model: [(s.path, s.blocks, s.least) for s in find_stages(model.build(3, 1).eval(), x)]
        for model in (
            ResNet(20, 4),
            ImagenetResNetModel(18, 0.1, 3),
            MobileNetV2Model(0.25, 1.0, 3),
            ShuffleNetModel((4, 8, 8, 8, 8), (1, 3, 2), 3),
        )
    }
    assert list(found.values()) == [
        [("stage1", 3, 1), ("stage2", 3, 1), ("stage3", 3, 1)],
        [("layer1", 2, 1), ("layer2", 2, 1), ("layer3", 2, 1), ("layer4", 2, 1)],
        [(f"stages.{n}", blocks, 1) for n, blocks in ((1, 2), (2, 3), (3, 4), (4, 3), (5, 3))],
        [("stage3", 3, 1)],  # a second unit that is the only one of its kind stays
    ]


def test_a_stage_may_begin_with_a_layer_of_another_kind():
    assert find_stages(a_net(), a_batch(2)) == STAGES


@pytest.mark.parametrize("model", [ResNet(8, 4), VGGModel((4, 4), (2, 2)), UNetModel(4, 1)])
def test_plain_and_single_blocks_are_never_skipped(model):
    assert find_stages(model.build(3, 1).eval(), torch.randn(2, 1, 16, 16)) == []


class Excited(nn.Module):
    """A residual block that itself holds an nn.Sequential of gates, which pass their input on, too."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.conv(x))

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(self.Gate(), self.Gate())

    def forward(self, x):
        return x + self.branch(x)


def test_what_lies_inside_of_a_block_is_no_stage():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(Excited(), Excited()), nn.Flatten()).eval()
    assert find_stages(net, a_batch(2)) == [SkippableStage("1", 2, 1)]


@pytest.mark.parametrize("private", [True, False])
def test_a_subnet_answers_bit_for_bit_as_its_copy_and_as_a_network_cut_by_hand(private):
    whole = a_net()
    net = build_subnet(whole, STAGES, (1, 2), private)
    x, cut = a_batch(), copy.deepcopy(whole)
    cut.stage1, cut.stage2 = cut.stage1[:1], cut.stage2[:2]
    with torch.no_grad():
        want = whole.head(whole.stage2[1](whole.stage2[0](whole.stage1[0](whole.stem(x)))).mean((2, 3)))
        assert torch.equal(net.module(x), want)
        assert torch.equal(net.alone()(x), want) and torch.equal(cut(x), want)
    assert len(whole.stage1) == 3, "the whole network keeps its blocks"


def test_a_subnet_learns_with_the_whole_and_its_copy_does_not():
    whole = a_net()
    net = build_subnet(whole, STAGES, (1, 1), private=True)
    left = net.alone()
    with torch.no_grad():
        whole.stem[0].weight.add_(1.0)
    assert torch.equal(net.module.stem[0].weight, whole.stem[0].weight)
    assert not torch.equal(left.stem[0].weight, whole.stem[0].weight)


@pytest.mark.parametrize("private", [True, False])
def test_what_is_not_shared_is_just_batchnorm(private):
    whole = a_net()
    net = build_subnet(whole, STAGES, (2, 1), private)
    mine = {id(t) for t in (*whole.parameters(), *whole.buffers())}
    apart = [t for t in (*net.module.parameters(), *net.module.buffers()) if id(t) not in mine]
    of_norms = [t for n in list_batchnorms(net.module) for t in (*(n.parameters() if private else ()), *n.buffers())]
    assert {id(t) for t in apart} == {id(t) for t in of_norms}
    assert {id(t) for t in (*net.unshared.parameters(), *net.unshared.buffers())} == {id(t) for t in of_norms}
    assert bool(list(net.unshared.parameters())) == private


def test_depths_are_spread_from_the_shallowest_up_without_the_full_one():
    found = [SkippableStage("a", 3, 1), SkippableStage("b", 5, 1), SkippableStage("c", 2, 1)]
    assert spread_depths(found, 1) == [(1, 1, 1)]
    assert spread_depths(found, 2) == [(1, 1, 1), (2, 3, 1)]
    assert (3, 5, 2) not in spread_depths(found, 20)
    assert spread_depths([SkippableStage("a", 2, 1)], 3) == [(1,)], "no depth twice"


# --- norms ---


def test_reestimated_statistics_are_those_of_numpy():
    net = a_net()
    net.stage1[0].branch[1].momentum = 0.3
    batches = [a_batch() for _ in range(3)]
    want_mean, want_var = [], []
    with torch.no_grad():
        for x in batches:
            made = net.stem[0](x).numpy()
            want_mean.append(made.mean((0, 2, 3), dtype=np.float64))
            want_var.append(made.var((0, 2, 3), dtype=np.float64, ddof=1))
    reestimate(net, iter(batches))
    first = net.stem[1]
    np.testing.assert_allclose(first.running_mean, np.mean(want_mean, 0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first.running_var, np.mean(want_var, 0), rtol=1e-4)
    assert net.stage1[0].branch[1].momentum == 0.3
    assert not any(module.training for module in net.modules())


def test_reestimated_statistics_follow_a_cut():
    """The layer behind skipped blocks sees other maps than in the whole network: those of the sub-net count."""
    net, x = build_subnet(a_net(), STAGES, (1, 1), private=False).alone(), a_batch(64)
    reestimate(net, [x])
    with torch.no_grad():
        entering = nn.functional.batch_norm(net.stem[0](x), None, None, net.stem[1].weight, net.stem[1].bias, True)
        branch = net.stage1[0].branch
        inner = nn.functional.batch_norm(branch[0](entering.relu()), None, None, branch[1].weight, branch[1].bias, True)
        seen = net.stage2[0][0](entering.relu() + inner.relu()).numpy()
    np.testing.assert_allclose(net.stage2[0][1].running_mean, seen.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(net.stage2[0][1].running_var, seen.var((0, 2, 3), ddof=1), rtol=1e-3)


@pytest.mark.parametrize("private", [True, False])
def test_running_a_subnet_moves_no_statistic_of_the_whole_network(private):
    whole = a_net()
    net = build_subnet(whole, STAGES, (1, 1), private)
    before = copy.deepcopy(whole.state_dict())
    net.module.train()(a_batch())
    assert all(torch.equal(before[k], v) for k, v in whole.state_dict().items())
    assert not torch.equal(net.module.stem[1].running_mean, whole.stem[1].running_mean)


# --- losses ---


def numpy_gap(own, aim):
    def standard(feature):
        a = feature.astype(np.float64).sum(1)
        return (a - a.mean((1, 2), keepdims=True)) / np.sqrt(a.var((1, 2), keepdims=True) + 1e-5)

    return np.mean((standard(own) - standard(aim)) ** 2)


def test_attention_by_hand():
    maps = torch.tensor([[[[1.0, 2.0]], [[0.0, 3.0]]]])  # sums 1 and 5: mean 3, deviation 2
    assert attention_map(maps).flatten().tolist() == pytest.approx([-1.0, 1.0], abs=1e-4)


def test_attention_has_true_gradients():
    maps = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention_map, maps)
    assert attention_map(maps.half()).dtype == torch.float32


def test_the_maps_loss_is_that_of_numpy_and_finite_for_a_map_of_one_pixel():
    own, aim = torch.randn(2, 4, 3, 5, 6, dtype=torch.float32)
    thin, other = torch.randn(2, 4, 2, 3, 3, dtype=torch.float32)
    want = numpy_gap(own.numpy(), aim.numpy()) + numpy_gap(thin.numpy(), other.numpy())
    assert attention_loss([own, thin], [aim, other]).item() == pytest.approx(want, rel=1e-5)
    pixel = torch.randn(4, 3, 1, 1, requires_grad=True)
    attention_loss([pixel], [torch.randn(4, 3, 1, 1)]).backward()
    assert pixel.grad.isfinite().all()


def a_context(student, teachers=(), **others):
    batches = [Batch(a_batch(), torch.arange(8) % 3, torch.arange(8), 0.0) for _ in range(3)]
    return TrainingContext(
        student, teachers, 4, zoo.CLASSES, lambda count: iter(batches[:count]), Classification(), **others
    )


def a_phase(method, student, *teachers, **others):
    """The phase of a script, everything in it able to learn, with a batch."""
    ctx = a_context(student, teachers, **others)
    phase = next(method.phases(ctx))
    for module in phase.trains:
        module.requires_grad_(True).train()
    return phase, next(ctx.first_batches(1))


def log_softmax(z):
    z = z.astype(np.float64)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def test_each_loss_of_a_step_is_that_of_numpy():
    method = DepthDynamic(
        depths=((1, 2), (2, 1)),
        subnet_weight=0.8,
        temperature=2.0,
        kd_weight=0.5,
        attention_weight=3.0,
        norms="shared",
        teacher_weight=0.25,
    )
    student, teacher = a_net(), zoo.Toy().eval()
    phase, batch = a_phase(method, student, teacher)
    losses = {name: value.item() for name, value in phase.loss(batch).items()}
    whole = copy.deepcopy(student).train()
    cut = copy.deepcopy(whole)
    cut.stage1, cut.stage2 = cut.stage1[:1], cut.stage2[:2]
    with torch.no_grad():
        (z, f1, f2), (full, g1, g2) = (
            (n(batch.images).numpy(), (s := n.stage1(n.stem(batch.images))).numpy(), n.stage2(s).numpy())
            for n in (cut, whole)
        )
        told = teacher(batch.images).numpy()

    def soft(own, aim):
        p, q = log_softmax(own / 2), log_softmax(aim / 2)
        return 4 * (np.exp(q) * (q - p)).sum(1).mean()

    def task(answer):
        return 0.75 * -log_softmax(answer)[np.arange(8), batch.labels].mean() + 0.25 * soft(answer, told)

    assert losses["task"] == pytest.approx(task(full), rel=1e-4)
    assert losses["depth-1-2:task"] == pytest.approx(0.4 * task(z), rel=1e-4)
    assert losses["depth-1-2:full"] == pytest.approx(0.4 * 0.5 * soft(z, full), rel=1e-4)
    assert losses["depth-1-2:maps"] == pytest.approx(0.4 * 3 * (numpy_gap(f1, g1) + numpy_gap(f2, g2)), rel=1e-4)
    assert len(losses) == 7


@pytest.mark.parametrize("private", ["private", "shared"])
def test_no_gradient_from_subnets_reaches_what_only_the_whole_network_has(private):
    student = a_net()
    phase, batch = a_phase(DepthDynamic(depths=((1, 1), (1, 2)), norms=private), student)
    losses = phase.loss(batch)
    of_subnets = torch.stack([value for name, value in losses.items() if ":" in name]).sum()
    skipped = [*student.stage1[1:].parameters(), *student.stage2[2:].parameters()]
    if private == "private":
        skipped += [w for norm in list_batchnorms(student) for w in norm.parameters()]
    reached = torch.autograd.grad(of_subnets, skipped, allow_unused=True)
    assert all(gradient is None for gradient in reached)
    (shared,) = torch.autograd.grad(of_subnets, student.stem[0].weight)
    assert shared.abs().sum() > 0


def test_sampled_subnets_take_turns_and_validation_asks_all():
    torch.manual_seed(0)
    phase, batch = a_phase(DepthDynamic(depths=((1, 1), (2, 2)), subnets_per_step=1), a_net())
    steps = [{name for name in phase.loss(batch) if ":task" in name} for _ in range(12)]
    assert all(len(names) == 1 for names in steps) and len(set.union(*steps)) == 2
    with torch.no_grad():
        assert len(phase.loss(batch)) == 1 + 2 * 3


def test_a_dense_task_is_imitated_by_mean_absolute_error():
    class Dense(zoo.Staged):
        def forward(self, x):
            return self.stage1(self.stem(x))[:, :1]

    torch.manual_seed(0)
    student, x = Dense().eval(), a_batch()
    ctx = replace(a_context(student), task=Regression(), num_classes=1)
    phase = next(DepthDynamic(num_subnets=1, norms="shared").phases(ctx))
    with torch.no_grad():
        losses = phase.loss(Batch(x, torch.full((8, 1, 8, 8), torch.nan), torch.arange(8), 0.0))
        want = 0.6 * (student.stage1[0](student.stem(x))[:, :1] - student(x)).abs().mean()
    assert losses["depth-1:full"].item() == pytest.approx(want.item(), rel=1e-5)
    assert losses["task"] == 0


# --- teachers, settings, a whole run ---


def taught_by(ctx, method):
    """The weight of the teacher that a script settles on."""
    notes = {}
    next(method.phases(replace(ctx, log_choice=notes.__setitem__)))
    return notes["teacher"]


def test_a_teacher_helps_where_it_knows_the_classes():
    teacher = zoo.Toy().eval()
    assert taught_by(a_context(a_net(), (teacher,)), DepthDynamic()) == 0.9
    assert taught_by(a_context(a_net(), (teacher,), class_columns=((0, None, 1),)), DepthDynamic()) == 0
    assert taught_by(a_context(a_net()), DepthDynamic()) == 0
    with pytest.raises(ConfigError, match="knows 2 of the 3 classes"):
        taught_by(a_context(a_net(), (teacher,), class_columns=((0, None, 1),)), DepthDynamic(teacher_weight=0.5))


def test_a_student_without_blocks_to_skip_is_refused_before_training():
    with pytest.raises(ConfigError, match=r"Toy has no blocks that can be skipped(.|\n)*hint: .*residual blocks"):
        next(DepthDynamic().phases(a_context(zoo.Toy().eval())))


@pytest.mark.parametrize("depth", [(1,), (0, 1), (1, 4), (3, 3)])
def test_depths_that_are_no_subnet_are_refused_with_the_limits(depth):
    with pytest.raises(ConfigError, match=r"no sub-net of the student(.|\n)*stage1 1 to 3, stage2 1 to 3"):
        next(DepthDynamic(depths=(depth,)).phases(a_context(a_net())))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_subnets": 0},
        {"subnets_per_step": -1},
        {"subnet_weight": -0.1},
        {"temperature": 0.0},
        {"teacher_weight": 1.5},
        {"attention_weight": -1.0},
        {"depths": ((1, 1),) * 2},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        DepthDynamic(**settings)


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_one_training_publishes_every_subnet(kind, tmp_path):
    task = zoo.blobs_dataset(tmp_path / "data")
    course = TrainingPlan(1, TrainConfig(batch=16, precision="fp32"), Augment(), seed=0)
    made = distill(tmp_path, "s", task, ResNet(20, 4), DepthDynamic(norms=kind), course, ())
    assert [m.weights.name for m in made] == ["s", "s-depth-1-1-1", "s-depth-2-2-2"]
    whole, thin, middle = (m.network() for m in made)
    assert (len(thin.stage1), len(middle.stage1), len(whole.stage1)) == (1, 2, 3)
    x = torch.randn(2, 1, 8, 8)
    assert thin(x).shape == (2, 3)
    assert torch.equal(thin.stem[0].weight, whole.stem[0].weight)
    assert torch.equal(thin.stem[1].weight, whole.stem[1].weight) == (kind == "shared")
    assert not torch.equal(thin.stage2[0].bn1.running_mean, whole.stage2[0].bn1.running_mean)
    assert made[0].weights.notes["subnets"] == {"depth-1-1-1": [1, 1, 1], "depth-2-2-2": [2, 2, 2]}


def test_shared_norms_are_measured_on_training_images_before_they_are_published():
    ctx = a_context(a_net())
    students = run_phases(DepthDynamic(num_subnets=1, norms="shared").phases(ctx), lambda phase: None)
    again = students["depth-1-1"]
    want = copy.deepcopy(again)
    reestimate(want, [batch.images for batch in ctx.first_batches(99)])
    assert all(torch.equal(a, b) for a, b in zip(want.buffers(), again.buffers(), strict=True))
