"""KPN against its paper: the loss by hand, who learns from what, which route is dropped."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from edgekd.core.method import Batch, PhaseResult, TrainingContext
from edgekd.errors import ConfigError
from edgekd.methods.kpn import KPN, Route, TaskLoss
from edgekd.tasks.classification import Classification
from edgekd.training.feature_hooks import FeatureExtractor
from edgekd.training.layer_discovery import cut_layers, drop_aliases, filter_cuts, is_cut, trace_layers
from tests import zoo


def batch(progress=0.0):
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(6) % zoo.CLASSES, torch.arange(6), progress)


def a_context(epochs=20):
    torch.manual_seed(0)
    return TrainingContext(
        zoo.Toy(2).eval(), (zoo.Toy(4).eval(),), epochs, zoo.CLASSES, lambda n: iter([batch()]), Classification()
    )


def test_the_gap_is_the_masked_l1_of_standardised_features():
    projected = torch.tensor([[[[1.0, -1.0]]]])  # mean 0, standard deviation sqrt 2
    # upside down: both positions differ by sqrt 2 after standardising; the negative one counts a quarter
    assert KPN().projection_loss(projected, -projected).item() == pytest.approx(math.sqrt(2) * (1 + 0.25) / 2, rel=1e-4)
    # the same form at another level and size: only a tenth of the differences in mean and spread, over the spread
    far = 2 * projected + 3
    assert KPN().projection_loss(projected, far).item() == pytest.approx(
        0.1 * (3 + math.sqrt(2)) / math.sqrt(2), rel=1e-4
    )


def test_a_constant_is_no_way_to_make_the_gap_small():
    projected = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    nearly_constant = 0.5 + 1e-3 * torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    assert KPN().projection_loss(projected, nearly_constant) > KPN().projection_loss(
        projected, projected + 0.8 * projected.flip(0)
    )


def test_the_gap_does_not_shrink_with_the_features():
    """Of both sides made smaller together nothing is won: else P and the front part would agree on nearly nothing."""
    r, v = (torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    for scale in (0.01, 100.0):
        assert KPN().projection_loss(scale * r, scale * v).item() == pytest.approx(
            KPN().projection_loss(r, v).item(), rel=5e-3
        )


def test_a_dead_channel_does_not_outweigh_the_others():
    r, v = torch.randn(8, 4, 5, 5), torch.randn(8, 4, 5, 5)
    alive = KPN().projection_loss(r, v).item()
    dead = r.clone()
    dead[:, 0] = 3.0
    # that channel: |v| standardised; (|3 - 0| + |spread - 1|) over a hundredth of the mean spread of four, three alive
    assert KPN().projection_loss(dead, v).item() == pytest.approx(alive + 0.1 * (3 + 1) / (0.01 * 3 / 4) / 4, rel=0.2)


def test_the_gap_has_true_gradients():
    r, v = (torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    assert torch.autograd.gradcheck(KPN().projection_loss, (r.requires_grad_(), v.requires_grad_()))
    assert KPN().projection_loss(r.half(), v.half()).dtype == torch.float32


def gradients(loss, *modules):
    for module in modules:
        module.requires_grad_(True).zero_grad()
    loss.backward()
    return [any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters()) for m in modules]


@pytest.fixture
def route():
    return KPN(routes=(Route("stage2", "stage2"),))


def phases(method, ctx):
    script = method.phases(ctx)
    first = next(script)
    return first, script.send(PhaseResult({n: 1.0 for n in first.loss(batch())}, 0.0))


def test_in_stage_1_the_front_learns_only_to_match_and_the_rear_and_projection_only_the_task(route):
    ctx = a_context()
    first, _ = phases(route, ctx)
    student, projection = first.trains
    parts = (student.stage1, student.stage2, student.stage3, student.head, projection)
    student.requires_grad_(True), projection.requires_grad_(True)
    losses = first.loss(batch())
    names = list(losses)
    assert [n.rpartition(":")[2] for n in names] == ["task", "project"]
    assert gradients(losses[names[0]], *parts) == [False, False, True, True, True]
    losses = first.loss(batch())
    assert gradients(losses[names[1]], *parts) == [True, True, False, False, False]


def test_on_validation_data_a_route_is_judged_by_the_student_itself(route):
    ctx = a_context()
    first, _ = phases(route, ctx)
    student = first.trains[0].eval()
    with torch.no_grad():
        losses = first.loss(batch())
        want = nn.functional.cross_entropy(student(batch().images), batch().labels)
    assert losses["stage2>stage2:task"].item() == pytest.approx(want.item())


def test_in_stage_2_the_student_runs_on_its_own_and_the_projection_fades(route):
    ctx = a_context()
    _, second = phases(route, ctx)
    student, projection = second.trains
    assert student is ctx.student
    start, late = second.loss(batch(0.0)), second.loss(batch(0.75))
    assert late["project"].item() == pytest.approx(start["project"].item() / 4)
    assert second.loss(batch(1.0))["project"].item() == 0
    student.requires_grad_(True)
    assert gradients(second.loss(batch())["task"], student.stage1, student.head) == [True, True]
    logits = student(batch().images)
    want = nn.functional.cross_entropy(logits, batch().labels)
    assert start["task"].item() == pytest.approx(want.item())


def test_in_stage_2_the_projection_goes_on_learning_from_the_gap(route):
    _, second = phases(route, a_context())
    student, projection = second.trains
    parts = (student.stage2, projection)
    assert gradients(second.loss(batch())["project"], *parts) == [True, True]
    assert gradients(second.loss(batch())["task"], *parts) == [True, False]
    before = [p.clone() for p in projection.parameters()]
    optimiser = torch.optim.SGD(projection.parameters(), 0.1)
    sum(second.loss(batch()).values()).backward()
    optimiser.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, projection.parameters(), strict=True))


def test_the_stages_have_the_paper_s_shares_and_weight_decay(route):
    first, second = phases(route, a_context())
    assert (first.epochs, second.epochs) == (8, 12)
    assert first.lr_span == (0.0, 1.0) and second.lr_span == (0.0, 1.0)
    assert list(first.weight_decay.values()) == [1e-3] and list(second.weight_decay.values()) == [0.0]
    _, gentle = phases(dataclasses.replace(route, stage2_lr_start=0.5), a_context())
    assert gentle.lr_span == (0.5, 1.0)


def test_what_is_projected_behind_an_activation_has_no_negative_values(route):
    first, _ = phases(route, a_context())
    _, projection = first.trains
    projected = projection(torch.randn(2, 8, 4, 4))  # the toys' layers end in a ReLU
    assert projected.min() == 0 < projected.max()


def test_each_period_drops_the_route_with_the_worst_joint_loss():
    method = KPN(receptive_tolerance=1.0, num_candidates=3)
    ctx = a_context()
    script = method.phases(ctx)
    phase = next(script)
    names = sorted({n.rpartition(":")[0] for n in phase.loss(batch())})
    assert len(names) == 3
    dropped = []
    while phase.name.startswith("search"):
        alive = sorted({n.rpartition(":")[0] for n in phase.loss(batch())})
        dropped.append(alive[1] if len(alive) == 3 else alive[0])
        losses = {f"{n}:task": 9.0 if n == dropped[-1] else 1.0 for n in alive} | {f"{n}:project": 0.5 for n in alive}
        phase = script.send(PhaseResult(losses, 0.0))
    (left,) = {n.rpartition(":")[0] for n in phase.loss(batch())}
    assert {left, *dropped} == set(names)


def told(method):
    """What the report is told of the routes; of each period, the deeper the student's layer the better."""
    notes = {}
    script = method.phases(dataclasses.replace(a_context(), log_choice=notes.__setitem__))
    phase = next(script)
    while phase.name != "joint":
        phase = script.send(PhaseResult({n: float(i) for i, n in enumerate(phase.loss(batch()))}, 0.0))
    return notes["routes"]


def test_of_the_routes_that_are_found_the_deepest_candidates_are_tried():
    everything = [(r["teacher"], r["student"]) for r in told(KPN(receptive_tolerance=1.0, num_candidates=99))]
    assert len(everything) > 2
    assert [(r["teacher"], r["student"]) for r in told(KPN(receptive_tolerance=1.0, num_candidates=2))] == everything[
        :2
    ]
    assert everything[0][1].startswith("stage3") and everything[-1][1].startswith("stage1")


def test_a_route_has_a_loss_of_each_period_that_it_took_part_in():
    routes = told(KPN(receptive_tolerance=1.0, num_candidates=3))
    assert [(len(r["losses"]), r["dropped"], r["won"]) for r in routes] == [
        (2, None, True), (2, 2, False), (1, 1, False)
    ]  # fmt: skip


def test_routes_between_receptive_fields_too_far_apart_are_not_tried():
    wide = nn.Sequential(nn.Conv2d(1, 4, 5, 1, 2), nn.Conv2d(4, 4, 3, 1, 1), nn.Flatten(), nn.Linear(256, 3)).eval()
    thin = nn.Sequential(nn.Conv2d(1, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 1, 1), nn.Flatten(), nn.Linear(128, 3)).eval()
    # receptive fields 4, then 6, of the teacher; 2, then 4, of the student
    for tolerance, want in ((0.0, [("0", "1")]), (0.4, [("0", "1")]), (0.5, [("0", "1"), ("0", "0")])):
        ctx = dataclasses.replace(a_context(), student=thin, teachers=(wide,))
        phase = next(KPN(receptive_tolerance=tolerance).phases(ctx))
        names = dict.fromkeys(n.rpartition(":")[0] for n in phase.loss(batch()))
        assert [tuple(name.split(">")) for name in names] == want


def test_only_so_many_routes_may_be_named_for_each_has_a_student():
    routes = tuple(Route("stage2", "stage2") for _ in range(5))
    assert KPN(routes=routes[:4]) and KPN(routes=routes[:4], num_candidates=1) and KPN(routes=routes, num_candidates=5)
    with pytest.raises(ConfigError, match="5 routes are named, but at most 4 are trained side by side") as error:
        KPN(routes=routes)
    assert "set num_candidates to 5" in error.value.hint


def test_the_winner_s_weights_arrive_in_the_student():
    ctx = a_context()
    script = KPN(receptive_tolerance=1.0).phases(ctx)
    phase = next(script)
    while phase.name != "joint":
        winner = phase.trains[0]
        with torch.no_grad():
            for p in winner.parameters():
                p.add_(1.0)
        losses = {n: float(i) for i, n in enumerate(phase.loss(batch()))}
        phase = script.send(PhaseResult(losses, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(winner.parameters(), ctx.student.parameters(), strict=True))


def test_routes_that_are_kept_are_taught_together_part_by_part():
    ctx = a_context()
    first, second = phases(KPN(routes=(Route("stage2", "stage2"), Route("stage1", "stage1")), num_routes=2), ctx)
    assert first.name == "project" and second.name == "joint"
    student, deep, shallow = first.trains
    assert (deep[0].out_channels, shallow[0].out_channels) == (4, 2)
    parts = (student.stage1, student.stage2, student.stage3, deep, shallow)
    losses = {n.rpartition(":")[2]: v for n, v in first.loss(batch()).items()}
    for module in parts:
        module.requires_grad_(True)
    losses = {n.rpartition(":")[2]: v for n, v in first.loss(batch()).items()}
    # the answer comes from the deepest injection alone; matching teaches each part in front of an injection, and the
    # shallow projection through the part that it feeds
    assert gradients(losses["task"], *parts) == [False, False, True, True, False]
    losses = {n.rpartition(":")[2]: v for n, v in first.loss(batch()).items()}
    assert gradients(losses["project"], *parts) == [True, True, False, False, True]
    assert list(second.trains) == [ctx.student, deep, shallow]


def test_two_routes_into_one_layer_cannot_be_taught_together():
    twins = (Route("stage2", "stage2"), Route("stage3", "stage2"))
    with pytest.raises(ConfigError, match="two routes end in `stage2`"):
        next(KPN(routes=twins, num_routes=2).phases(a_context()))


def test_some_steps_of_stage_2_go_back_to_stage_1():
    _, second = phases(KPN(routes=(Route("stage2", "stage2"),), stage1_replay=0.5), a_context())
    student = second.trains[0].requires_grad_(True)
    torch.manual_seed(0)
    back = [not gradients(second.loss(batch())["task"], student.stage1)[0] for _ in range(40)]
    assert 10 < sum(back) < 30
    with torch.no_grad():
        assert len({second.loss(batch())["task"].item() for _ in range(8)}) == 1, "validation never goes back"


def a_task(knows, **settings):
    ctx = dataclasses.replace(a_context(), class_columns=knows)
    return TaskLoss(ctx, KPN(temperature=1.0, **settings))


def test_logits_count_for_the_classes_that_the_teacher_knows_too():
    learnt = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    answer = torch.tensor([[9.0, 3.0, 1.0], [9.0, 0.0, 2.0]])  # its columns 1 and 2 are our classes 2 and 0
    truth = torch.tensor([0, 1])
    ce = [nn.functional.cross_entropy(learnt[i : i + 1], truth[i : i + 1]).item() for i in (0, 1)]
    p, q = (torch.softmax(torch.tensor(z), 0) for z in ([2.0, 1.0], [1.0, 3.0]))  # of the first sample: classes 0 and 2
    soft = (q * (q / p).log()).sum().item()
    got = a_task(((2, None, 1),), kd_weight=0.5)(learnt, answer, truth)
    assert got.item() == pytest.approx((0.5 * ce[0] + ce[1] + 0.5 * soft) / 2, rel=1e-5)


def test_logits_of_a_teacher_that_knows_none_of_the_classes_are_refused():
    with pytest.raises(ConfigError, match="the teacher knows 0 of the 3 classes"):
        a_task(((None, None, None),), kd_weight=0.5)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (KPN(routes=(Route("stage9", "stage2"),)), "no layer `stage9`"),
        (KPN(routes=(Route("stage1", "stage2"),)), "have sizes 8x8 and 4x4"),
        (KPN(receptive_tolerance=0.0, routes=(Route("head", "stage2"),)), "gives no (N, C, H, W) map"),
    ],
)
def test_a_route_that_does_not_fit_is_refused_in_words(method, says):
    with pytest.raises(ConfigError) as error:
        next(method.phases(a_context()))
    assert says in str(error.value)


def test_too_few_epochs_are_refused():
    with pytest.raises(ConfigError, match="leave none for stage 2"):
        next(KPN(receptive_tolerance=1.0).phases(a_context(epochs=1)))


class Foreign(nn.Module):
    """As found in the wild: activations in place, a residual, pooling by function."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5, 2, 2)
        self.conv2 = nn.Conv2d(4, 4, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(4, 6, 3, 1, 2, dilation=2)
        self.head = nn.Linear(6, zoo.CLASSES)

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        x = torch.relu_(self.conv2(x)) + x
        return self.head(nn.functional.avg_pool2d(self.conv3(x), 2).mean((2, 3)))


def test_layers_of_a_foreign_module_are_found_with_receptive_fields_worked_by_hand():
    found = {layer.path: layer for layer in cut_layers(Foreign().eval(), torch.randn(2, 1, 16, 16))}
    assert set(found) == {"conv1", "pool", "conv3"}  # conv2 lies inside of a residual: not everything passes it
    assert found["conv1"].receptive == 5 - 1 and found["conv1"].signed
    assert found["pool"].receptive == 4 + (2 - 1) * 2
    # through conv2 (kernel 3, stride so far 2 * 2), then conv3 (kernel 3 dilated to 5)
    assert found["conv3"].receptive == 6 + (3 - 1) * 4 + (5 - 1) * 4
    assert found["conv3"].channels == 6 and found["conv3"].size == (4, 4)


class Aliased(nn.Module):
    """A shortcut that is the very tensor which an activation in place changes next."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.late = (nn.Conv2d(i, 4, 3, padding=1) for i in (1, 4, 4))
        self.shortcut = nn.Identity()

    def forward(self, x):
        x = self.stem(x)
        r = self.shortcut(x)
        return self.late(self.conv(torch.relu_(x)) + r).mean((2, 3))


@pytest.mark.parametrize("network", [Foreign, Aliased])
def test_all_cuts_are_what_each_one_is_by_itself(network):
    model, x = network().eval(), torch.randn(2, 1, 16, 16)
    found = drop_aliases(trace_layers(model, x))
    kept = filter_cuts(model, found, x)
    assert kept == [layer for layer in found if is_cut(model, layer.path, x)] and 1 < len(kept) < len(found)


def test_injection_replaces_the_front_of_a_foreign_module_and_leaves_no_trace():
    model = Foreign().eval()
    x = torch.randn(2, 1, 16, 16)
    taps = FeatureExtractor(model, "pool")
    plain, seen = taps(x)
    other, own = taps(torch.randn(2, 1, 16, 16), {"pool": seen["pool"]})
    assert torch.equal(plain, other)
    assert not torch.equal(own["pool"], seen["pool"])
    assert torch.equal(model(x), plain)
    assert not any(m._forward_hooks for m in model.modules())


def test_what_is_seen_is_not_changed_by_an_activation_in_place():
    model = Foreign().eval()
    _, seen = FeatureExtractor(model, "conv1")(torch.randn(2, 1, 16, 16))
    assert (seen["conv1"] < 0).any()
