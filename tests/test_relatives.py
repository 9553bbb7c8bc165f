"""The methods that stand around others: curriculum, multi_teacher, assistant."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from edgekd.core.augment import Augment
from edgekd.core.method import Batch, Method, Phase, PhaseResult, TrainingContext, run_phases
from edgekd.errors import ConfigError
from edgekd.methods import curriculum, multi_teacher
from edgekd.methods.assistant import Assistant
from edgekd.methods.channel_planting import ChannelPlanting
from edgekd.methods.curriculum import Curriculum, CurriculumStage
from edgekd.methods.kd import KD
from edgekd.methods.kpn import KPN
from edgekd.methods.multi_teacher import MultiTeacher, TeacherGate, hint_loss, pairwise_angles, weighted_mean
from edgekd.methods.supervised import Supervised
from edgekd.models.resnet import PLUGIN as CifarFamily
from edgekd.stages.distill.distill import PhaseRunner
from edgekd.stages.distill.setup import TrainingPlan, build_trainer
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression
from edgekd.training.trainer import TrainConfig
from tests import zoo

COUNT = 30


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(progress=0.0, count=COUNT):
    return Batch(random(count, 1, 8, 8), torch.arange(count) % zoo.CLASSES, torch.arange(count), progress)


def a_context(epochs=10, teachers=1, **other):
    torch.manual_seed(0)
    student, *rest = (zoo.Toy(2), *(zoo.Toy(4) for _ in range(teachers)))
    for module in (student, *rest):
        module.eval()
    return TrainingContext(
        student,
        tuple(rest),
        epochs,
        zoo.CLASSES,
        lambda n: iter([batch()]),
        build=lambda family: family.build(zoo.CLASSES, 1),
        **{"task": Classification(), **other},
    )


def untaught(method, ctx):
    """The phases of a script that is told of no progress."""
    phases = []

    def run(phase):
        phases.append(phase)
        return PhaseResult({}, None)

    run_phases(method.phases(ctx), run)
    return phases


class Room:
    """A lesson with a real trainer."""

    def __init__(self, home, epochs, teachers=1):
        course = TrainingPlan(epochs, TrainConfig(batch=16, precision="fp32"), Augment(), seed=0)
        self.trainer = build_trainer(zoo.blobs_dataset(home / "data"), course, torch.device("cpu"))
        self.notes, self.phases = {}, []
        self.ctx = dataclasses.replace(
            a_context(epochs, teachers), first_batches=self.trainer.first_batches, log_choice=self.notes.__setitem__
        )
        self.played = PhaseRunner(home / "work", self.trainer, self.ctx, "s")

    def train(self, method):
        def run(phase):
            self.phases.append(phase)
            return self.played.run(phase)

        with self.played.progress():
            return run_phases(method.phases(self.ctx), run)


class Constant(nn.Module):
    """Answers the same for every image, (N, *shape); its front is as of a network."""

    def __init__(self, answer):
        super().__init__()
        self.body, self.answer = zoo.conv(1, 4, 1), torch.as_tensor(answer)

    def forward(self, x):
        return self.answer.expand(len(x), *self.answer.shape) + 0 * self.body(x).mean()


class Mapper(nn.Module):
    """(N, 1, 8, 8) to maps (N, 1, 8, 8)."""

    def __init__(self, width):
        super().__init__()
        self.body, self.head = zoo.conv(1, width, 1), nn.Conv2d(width, 1, 1)

    def forward(self, x):
        return self.head(self.body(x))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# curriculum


@dataclass(frozen=True)
class Recorded(Method):
    """Two phases that teach the student, one between them that does not; remembers what it is told."""

    heard: list = dataclasses.field(default_factory=list)

    def phases(self, ctx):
        side = nn.Linear(2, 2)

        def loss(batch):
            return {"progress": torch.tensor(batch.progress)}

        for phase in (
            Phase("one", (ctx.student,), loss, 4, (0.0, 0.5)),
            Phase("side", (side,), loss, 1),
            Phase("two", (ctx.student, side), loss, ctx.epochs - 5, (0.5, 1.0)),
        ):
            self.heard.append((yield phase))
        return {"student": ctx.student}


def test_difficulty_is_the_loss_of_each_image():
    logits, labels = random(5, 3), torch.tensor([0, 2, -1, 1, 1])
    p = softmax(logits.numpy())
    want = [-np.log(p[n, label]) if label >= 0 else np.inf for n, label in enumerate(labels.tolist())]
    np.testing.assert_allclose(Classification().sample_losses(logits, labels), want, rtol=1e-5)
    truth = random(3, 1, 2, 2, seed=1)
    truth[0, 0, 0, 0] = truth[2] = torch.nan
    maps = random(3, 1, 2, 2)
    far = np.abs((maps - truth).numpy()).reshape(3, 4)
    want = [far[0, 1:].mean(), far[1].mean(), np.inf]
    np.testing.assert_allclose(Regression().sample_losses(maps, truth), want, rtol=1e-5)


def test_places_are_shares_of_the_class_that_are_easier():
    losses = np.array([3.0, 1.0, 2.0, 0.1, 9.0, np.inf, np.inf])
    groups = np.array([0, 0, 0, 1, 1, 0, -1])
    np.testing.assert_allclose(curriculum.difficulty_ranks(losses, groups), [0.5, 0, 0.25, 0, 0.5, 1, 1])


@pytest.mark.parametrize("epochs", [3, 4, 5, 10, 37, 100])
def test_stages_grow_from_easy_to_all(epochs):
    stages = Curriculum(KD()).plan(epochs)
    ends = [stage.end for stage in stages]
    shares = [stage.fraction for stage in stages[1:]]
    assert ends == sorted(set(ends))
    assert ends[-1] == epochs
    assert shares[0] == pytest.approx(0.4)
    assert shares == sorted(set(shares))
    assert stages[0].fraction == shares[-1] == 1


def test_the_stages_by_hand():
    want = [CurriculumStage(2, 1.0), CurriculumStage(7, 0.4), CurriculumStage(12, 0.7), CurriculumStage(20, 1.0)]
    assert [CurriculumStage(s.end, round(s.fraction, 9)) for s in Curriculum(KD(), num_stages=2).plan(20)] == want


def test_the_base_keeps_its_epochs_its_schedule_and_its_progress():
    phases = untaught(Curriculum(Recorded(), num_stages=2), a_context(epochs=20))
    assert sum(p.epochs for p in phases) == 20
    for name, span in (("one", (0.0, 0.5)), ("two", (0.5, 1.0))):
        parts = [p for p in phases if p.name.startswith(name)]
        total = sum(p.epochs for p in parts)
        assert len(parts) > 1
        edges = [parts[0].lr_span[0], *(p.lr_span[1] for p in parts)]
        assert [p.lr_span[0] for p in parts] == pytest.approx(edges[:-1])
        assert (edges[0], edges[-1]) == pytest.approx(span)
        done = 0
        for part in parts:
            assert part.lr_span[1] - part.lr_span[0] == pytest.approx(0.5 * part.epochs / total)
            begin, end = (part.loss(batch(progress))["progress"].item() for progress in (0.0, 1.0))
            assert (begin, end) == pytest.approx((done / total, (done + part.epochs) / total))
            done += part.epochs


def test_the_base_hears_once_of_each_phase_and_what_came_last():
    method, count = Curriculum(Recorded()), iter(range(100))
    sent = []

    def run(phase):
        sent.append((phase.name, PhaseResult({"n": float(next(count))}, 0.5)))
        return sent[-1][1]

    run_phases(method.phases(a_context(epochs=20)), run)
    last = {name.split()[0]: outcome for name, outcome in sent}
    assert method.base.heard == list(last.values())


def test_phases_that_teach_no_student_or_chose_their_images_stay_as_they_are():
    method = Curriculum(Recorded())
    side = next(p for p in untaught(method, a_context(epochs=20)) if p.name == "side")
    assert (side.epochs, side.samples, side.lr_span) == (1, None, (0.0, 1.0))

    class Choosy(Recorded):
        def phases(self, ctx):
            yield Phase("chosen", (ctx.student,), lambda b: {}, ctx.epochs, samples=(1, 2))
            return {"student": ctx.student}

    (phase,) = untaught(Curriculum(Choosy()), a_context(epochs=20))
    assert (phase.name, phase.epochs, phase.samples) == ("chosen", 20, (1, 2))


def test_parts_hold_the_easiest_of_each_class_and_the_last_all(tmp_path):
    room = Room(tmp_path, epochs=10)
    x, y, _ = next(room.trainer.train.ordered(1000))
    held = []

    def easiest(share):
        with torch.no_grad():
            p = softmax(room.ctx.student.eval()(x).numpy())
        chosen = []
        for label in range(zoo.CLASSES):
            own = np.flatnonzero(y.numpy() == label)
            easy = own[np.argsort(-np.log(p[own, label]), kind="stable")]
            chosen += easy[: int(np.ceil(share * len(own)))].tolist()
        return sorted(chosen)

    def run(phase):
        share = [None, 0.4, 0.7, None][len(held)]
        assert phase.samples == (share and easiest(share))
        held.append(phase.samples and len(phase.samples))
        return room.played.run(phase)

    with room.played.progress():
        run_phases(Curriculum(KD(), num_stages=2).phases(room.ctx), run)
    assert held == [p["samples"] for p in room.notes["curriculum"]] == [None, 21, 36, None]


def test_a_curriculum_goes_around_methods_of_several_phases_and_copies(tmp_path):
    room = Room(tmp_path, epochs=10)
    base = KPN(receptive_tolerance=0.5, num_candidates=2)
    plain = untaught_of(base, room)
    room.train(Curriculum(base))
    assert sum(p.epochs for p in room.phases) == 10
    names = list(dict.fromkeys(p.name.split()[0] for p in room.phases))
    assert names == plain
    sizes = [48 if p.samples is None else len(p.samples) for p in room.phases]
    assert sizes[0] == sizes[-1] == 48
    assert sizes[1] == min(sizes) < 48  # within the first stage, where copies of the student are taught
    assert {"routes", "curriculum"} <= room.notes.keys()


def untaught_of(base, room):
    """Names of the phases of `base`, whatever comes of them."""
    script, names = base.phases(a_context(room.ctx.epochs)), []
    phase = next(script)
    try:
        while True:
            names.append(phase.name)
            losses = {name: 1.0 for name in phase.loss(batch())}
            phase = script.send(PhaseResult(losses, None))
    except StopIteration:
        return names


def test_images_without_labels_are_scored_against_the_teacher_or_come_in_last():
    ctx = a_context()
    full = batch()
    partly = dataclasses.replace(full, labels=torch.where(full.index < 20, full.labels, -1))
    told = curriculum.reference_labels(ctx)(partly)
    with torch.no_grad():
        guessed = ctx.teachers[0](full.images).argmax(1)
    assert torch.equal(told, torch.where(full.index < 20, full.labels, guessed))
    foreign = dataclasses.replace(ctx, class_columns=((0, None, 1),), first_batches=lambda n: iter([partly]))
    assert torch.equal(curriculum.reference_labels(foreign)(partly), partly.labels)
    chosen = curriculum.easiest_images(foreign, [ctx.student], 0.999)
    assert chosen == list(range(20))


def test_maps_have_a_curriculum_too():
    y = random(COUNT, 1, 8, 8, seed=1)
    y[5:] = torch.nan
    some = dataclasses.replace(batch(), labels=y)
    ctx = dataclasses.replace(
        a_context(), student=Mapper(2).eval(), teachers=(), task=Regression(), first_batches=lambda n: iter([some])
    )
    chosen = curriculum.easiest_images(ctx, [ctx.student], 0.1)
    with torch.no_grad():
        far = (ctx.student(some.images)[:5] - y[:5]).abs().mean((1, 2, 3))
    assert chosen == sorted(far.argsort()[:3].tolist())  # a tenth of the thirty


def test_a_curriculum_asks_for_latencies_if_its_base_does():
    assert Curriculum(ChannelPlanting(max_ms=1.0)).needs_target and not Curriculum(KD()).needs_target


def test_a_curriculum_refuses_what_leaves_no_room():
    with pytest.raises(ConfigError, match="2 epochs leave none"):
        next(Curriculum(KD()).phases(a_context(epochs=2)))
    with pytest.raises(ConfigError, match=r"warmup_fraction .0.7. is not below"):
        Curriculum(KD(), warmup_fraction=0.7)
    with pytest.raises(ConfigError, match="start_fraction is 0"):
        Curriculum(KD(), start_fraction=0)
    with pytest.raises(ConfigError, match="num_stages is 0"):
        Curriculum(KD(), num_stages=0)


# multi_teacher


def test_weights_of_teachers_sum_to_one_and_are_those_of_the_paper():
    torch.manual_seed(0)
    weighing = TeacherGate(channels=5, teachers=3)
    maxima = random(7, 5)
    weights = weighing(maxima).detach().numpy()
    theta, w = weighing.theta.detach().numpy(), weighing.w.detach().numpy()[:, 0]
    scores = np.array([[np.dot(b * theta[t], w) for t in range(3)] for b in maxima.numpy()])
    np.testing.assert_allclose(weights, softmax(scores), rtol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert weights.std(0).min() > 0  # by image


def test_the_weighed_answers_and_their_divergence_match_numpy():
    answers, weights, own = random(4, 2, 3), random(4, 2, seed=1).softmax(1), random(4, 3, seed=2)
    q = (weights.numpy()[..., None] * softmax(answers.numpy() / 5)).sum(1)
    p = softmax(own.numpy() / 5)
    together = weighted_mean((answers / 5).softmax(2), weights)
    np.testing.assert_allclose(together, q, rtol=1e-5)
    losses = MultiTeacher(structure_weight=0).distill_losses(Classification(), own, together)
    assert list(losses) == ["kd"]
    want = 0.7 * 25 * (q * np.log(q / p)).sum(1).mean()
    assert losses["kd"].item() == pytest.approx(want, rel=1e-4)


def test_weights_learn_from_labels_and_not_from_whom_the_student_resembles():
    ctx = dataclasses.replace(a_context(), teachers=(Constant([30.0, 0.0, 0.0]), Constant([0.0, 30.0, 0.0])))
    method = MultiTeacher(hint_weight=0, temperature=1)
    (phase,) = untaught(dataclasses.replace(method, gate_fraction=1), ctx)
    weighing = next(m for m in phase.trains if isinstance(m, TeacherGate))
    first = dataclasses.replace(batch(), labels=torch.zeros(COUNT, dtype=torch.int64))  # the first teacher is right
    losses = phase.loss(first)
    for name in ("task", "kd", "structure"):
        grads = torch.autograd.grad(losses[name], weighing.parameters(), retain_graph=True, allow_unused=True)
        assert all(g is None for g in grads), name
    body = torch.autograd.grad(losses["weights"], ctx.student.parameters(), retain_graph=True, allow_unused=True)
    assert all(g is None for g in body), "the student's maps are not bent to weigh teachers"
    steps = torch.optim.SGD(weighing.parameters(), 1.0)
    for _ in range(100):
        steps.zero_grad()
        losses = phase.loss(first)
        losses["weights"].backward()
        steps.step()
    _, seen = multi_teacher.FeatureExtractor(ctx.student, "stage3.1")(first.images)
    weights = weighing(seen["stage3.1"].amax((2, 3))).detach()
    assert weights.mean(0)[0] > 0.8
    q = weights.numpy() @ np.array([softmax(np.array([30.0, 0, 0])), softmax(np.array([0, 30.0, 0]))])
    assert phase.loss(first)["weights"].item() == pytest.approx(-np.log(q[:, 0]).mean(), rel=1e-3)


def test_angles_are_those_between_each_three_answers():
    points = random(5, 4, dtype=torch.float64)
    got, x = pairwise_angles(points).numpy(), points.numpy()
    for i, j, k in np.ndindex(5, 5, 5):
        a, b = x[i] - x[j], x[k] - x[j]
        size = np.linalg.norm(a) * np.linalg.norm(b)
        assert got[i, j, k] == pytest.approx(a @ b / size if size else 0.0, abs=1e-9)


def test_gradients_reach_angles_and_weights():
    points = random(4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(pairwise_angles, points)
    answers = random(3, 2, 4, dtype=torch.float64).requires_grad_()
    weights = random(3, 2, seed=1, dtype=torch.float64).softmax(1).requires_grad_()
    assert torch.autograd.gradcheck(weighted_mean, (answers, weights))
    assert torch.autograd.gradcheck(TeacherGate(4, 2).double(), random(3, 4, dtype=torch.float64).requires_grad_())


def test_hints_compare_directions_of_maps():
    maps = random(3, 2, 4, 4)
    assert hint_loss(3 * maps, maps).item() == pytest.approx(0, abs=1e-6)
    assert hint_loss(-maps, maps).item() == pytest.approx(4, rel=1e-5)


def test_each_teacher_hints_at_another_layer():
    ctx = a_context(teachers=3)
    routes = multi_teacher.match_hint_layers(ctx, batch().images[:2])
    assert [r.student.path.split(".")[0] for r in routes] == ["stage1", "stage2", "stage3"]
    assert all(r.student.size == r.teacher.size for r in routes)


def test_weights_are_learnt_first_and_then_stay(tmp_path):
    room = Room(tmp_path, epochs=5, teachers=2)
    seen = []

    def run(phase):
        outcome = room.played.run(phase)
        (found,) = {id(m): m for p in (*room.phases, phase) for m in p.trains if isinstance(m, TeacherGate)}.values()
        seen.append([p.detach().clone() for p in found.parameters()])
        room.phases.append(phase)
        return outcome

    with room.played.progress():
        run_phases(MultiTeacher().phases(room.ctx), run)
    first, second = room.phases
    assert (first.epochs, second.epochs, first.lr_span, second.lr_span) == (2, 3, (0.0, 0.4), (0.4, 1.0))
    assert not any(isinstance(m, TeacherGate) for m in second.trains)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    told = room.notes["teachers"]
    assert sum(t["weight"] for t in told) == pytest.approx(1, abs=1e-3)
    assert all(t["hint"]["student"].startswith("stage") for t in told)


def test_all_teachers_teach():
    ctx = a_context(teachers=2)
    (phase,) = untaught(MultiTeacher(gate_fraction=1), ctx)
    before = phase.loss(batch())
    for number, teacher in enumerate(ctx.teachers, 1):
        with torch.no_grad():
            teacher.head.weight.mul_(3)
            teacher.stage3[0].weight.neg_()
            teacher.stage2[0].weight.neg_()
        after = phase.loss(batch())
        assert before["kd"] != after["kd"]
        assert before[f"hint{number}"] != after[f"hint{number}"]
        assert before["task"] == after["task"]
        before = after


def test_a_teacher_of_other_classes_gives_its_hint_only():
    ctx = a_context(teachers=3, class_columns=((2, 0, 1), (0, None, None), (0, 1, 2)))
    (phase,) = untaught(MultiTeacher(gate_fraction=1), ctx)
    before = phase.loss(batch())
    with torch.no_grad():
        ctx.teachers[1].head.weight.mul_(3)
    same = phase.loss(batch())
    assert before["kd"] == same["kd"]
    with torch.no_grad():
        ctx.teachers[1].stage2[0].weight.neg_()
    assert phase.loss(batch())["hint2"] != before["hint2"]
    with pytest.raises(ConfigError, match="teacher 2 lacks"):
        next(MultiTeacher(hint_weight=0).phases(ctx))
    with pytest.raises(ConfigError, match="knows 1 of the 3 classes"):
        next(MultiTeacher().phases(dataclasses.replace(ctx, class_columns=((0, None, None),) * 3)))


def test_answers_of_a_wider_teacher_are_put_in_the_lessons_order():
    ctx = dataclasses.replace(
        a_context(),
        teachers=(Constant([9.0, 1.0, 2.0, 3.0]), Constant([1.0, 2.0, 3.0])),
        class_columns=((3, 1, 2), (0, 1, 2)),
    )
    said, hints = multi_teacher.TeacherEnsemble(ctx, [0, 1], [], MultiTeacher(temperature=2.0))(batch().images)
    np.testing.assert_allclose(said[0], softmax(np.array([[3, 1, 2], [1, 2, 3]]) / 2), rtol=1e-5)
    assert hints == []


def test_several_teachers_of_maps():
    y = random(COUNT, 1, 8, 8, seed=1)
    y[0] = torch.nan
    some = dataclasses.replace(batch(), labels=y)
    ctx = dataclasses.replace(
        a_context(),
        student=Mapper(2).eval(),
        teachers=(Mapper(4).eval(), Mapper(4).eval()),
        task=Regression(),
        first_batches=lambda n: iter([some]),
    )
    (phase,) = untaught(MultiTeacher(gate_fraction=1), ctx)
    losses = phase.loss(some)
    assert losses.keys() == {"task", "kd", "structure", "hint1", "hint2", "weights"}
    assert all(value.isfinite() for value in losses.values())
    weighing = next(m for m in phase.trains if isinstance(m, TeacherGate))
    with torch.no_grad():
        weighing.w.zero_()  # equal weights
        target = (ctx.teachers[0](some.images) + ctx.teachers[1](some.images)) / 2
        want = 0.7 * (ctx.student(some.images) - target).abs().mean()
    assert phase.loss(some)["kd"].item() == pytest.approx(want.item(), rel=1e-5)


def test_images_without_labels_teach_by_answers_and_hints():
    (phase,) = untaught(MultiTeacher(gate_fraction=1), a_context(teachers=2))
    bare = dataclasses.replace(batch(), labels=torch.full((COUNT,), -1))
    losses = phase.loss(bare)
    assert losses["task"] == losses["weights"] == 0
    assert losses["kd"] == phase.loss(batch())["kd"] > 0


def test_one_teacher_is_too_few_for_multi_teacher():
    with pytest.raises(ConfigError, match="extra_teachers"):
        next(MultiTeacher().phases(a_context(teachers=1)))


def test_hints_between_maps_of_other_sizes_are_refused_in_words():
    class Small(zoo.Toy):
        def forward(self, x):
            return super().forward(x[:, :, ::3, ::3])

    ctx = dataclasses.replace(a_context(teachers=2), student=Small(2).eval())
    with pytest.raises(ConfigError, match="set hint_weight to 0"):
        next(MultiTeacher().phases(ctx))
    assert next(MultiTeacher(hint_weight=0).phases(ctx)).name == "weigh"
    with pytest.raises(ConfigError, match="temperature is 0"):
        MultiTeacher(temperature=0)


# assistant

CHAIN = (zoo.ToyFamily(4), zoo.ToyFamily(3))


@pytest.mark.parametrize("epochs", [3, 4, 7, 10, 60])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_chain_never_spends_more_than_the_budget(epochs, share):
    phases = untaught(Assistant(CHAIN, KD(), share), a_context(epochs))
    assert [p.name for p in phases] == ["assistant1 kd", "assistant2 kd", "kd"]
    assert sum(p.epochs for p in phases) == epochs
    assert phases[0].epochs == phases[1].epochs == max(1, int(share * epochs / 2))


def test_each_network_is_taught_by_the_one_before():
    ctx = a_context()
    phases = untaught(Assistant(CHAIN, KD()), ctx)
    chain = [ctx.teachers[0], *(phase.trains[0] for phase in phases)]
    assert [m.stage1[0].out_channels for m in chain] == [4, 4, 3, 2]
    assert chain[-1] is ctx.student
    for number, network in enumerate(chain[:-1]):
        before = [phase.loss(batch())["kd"].item() for phase in phases]
        with torch.no_grad():
            network.head.weight.mul_(3)
        after = [phase.loss(batch())["kd"].item() for phase in phases]
        # who answers otherwise changes the lesson that it is taught in, and the one that it teaches
        assert [a != b for a, b in zip(before, after, strict=True)] == [n in (number - 1, number) for n in range(3)]


def test_an_assistant_stays_as_it_is_while_it_teaches(tmp_path):
    room = Room(tmp_path, epochs=6)
    taught = []

    def run(phase):
        before = [t.clone() for m in taught for t in m.state_dict().values()]
        outcome = room.played.run(phase)
        assert all(torch.equal(a, t) for a, t in zip(before, held(taught), strict=True))
        assert not any(p.requires_grad for m in taught for p in m.parameters())
        taught.extend(phase.trains)
        return outcome

    with room.played.progress():
        run_phases(Assistant(CHAIN, KD()).phases(room.ctx), run)
    assert len(taught) == 3


def held(modules):
    return [t for m in modules for t in m.state_dict().values()]


def test_the_accuracy_of_each_assistant_is_measured_on_validation_data(tmp_path):
    room = Room(tmp_path, epochs=6)
    room.train(Assistant(CHAIN, KD()))
    told = room.notes["assistants"]
    assert [t["epochs"] for t in told] == [1, 1]
    for entry, phase in zip(told, room.phases, strict=False):
        assert entry["accuracy"] == pytest.approx(room.trainer.accuracy(phase.trains[0]))
        assert phase.loss(batch()).keys() == {"task", "kd"}  # where gradients count it has no part


def test_the_base_is_told_of_its_own_student(tmp_path):
    @dataclass(frozen=True)
    class Heard(KD):
        heard: list = dataclasses.field(default_factory=list)

        def phases(self, ctx):
            script = super().phases(ctx)
            self.heard.append((yield next(script)))
            return {"student": ctx.student}

    base = Heard()
    Room(tmp_path, epochs=4).train(Assistant(CHAIN[:1], base))
    assert len(base.heard) == 2  # the rehearsals were told nothing
    for outcome in base.heard:
        assert outcome.losses.keys() == {"task", "kd"}
        assert 0 <= outcome.accuracy <= 1


def test_a_chain_of_projections_keeps_notes_apart(tmp_path):
    room = Room(tmp_path, epochs=6)
    room.train(Assistant(CHAIN[:1], KPN(receptive_tolerance=0.5, num_candidates=1)))
    assert room.notes.keys() == {"assistant1.routes", "routes", "assistants"}
    assert sum(p.epochs for p in room.phases) == 6


def test_only_the_first_assistant_meets_a_teacher_of_other_classes():
    ctx = a_context(class_columns=((0, None, 1),))
    with pytest.raises(ConfigError, match="knows 2 of the 3 classes"):
        next(Assistant(CHAIN, KD()).phases(ctx))
    knowns = []

    @dataclass(frozen=True)
    class Asking(Supervised):
        def phases(self, ctx):
            knowns.append(ctx.class_columns)
            return super().phases(ctx)

    untaught(Assistant(CHAIN, Asking()), ctx)
    assert knowns == 2 * [((0, None, 1),), (), ()]  # in rehearsal and in earnest


def test_what_the_base_refuses_at_any_step_is_refused_before_training():
    for base, ctx, said in (
        (MultiTeacher(), a_context(epochs=20, teachers=2), "2 teacher"),  # the student would have one
        (KPN(receptive_tolerance=0.5, stage1_fraction=0.5), a_context(epochs=3), "leave none for stage 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            next(Assistant(CHAIN[:1], base).phases(ctx))


def test_a_rehearsal_leaves_no_trace():
    notes = {}
    ctx = a_context(log_choice=notes.__setitem__)
    before = [t.clone() for t in ctx.student.state_dict().values()]
    next(Assistant(CHAIN, KD()).phases(ctx))
    assert notes == {}
    assert all(torch.equal(a, b) for a, b in zip(before, ctx.student.state_dict().values(), strict=True))


def test_a_chain_needs_a_teacher_an_assistant_and_time():
    with pytest.raises(ConfigError, match="assistants is empty"):
        Assistant((), KD())
    with pytest.raises(ConfigError, match="assistants_fraction is 1"):
        Assistant(CHAIN, KD(), assistants_fraction=1)
    with pytest.raises(ConfigError, match="2 epochs leave none for the student"):
        next(Assistant(CHAIN, KD()).phases(a_context(epochs=2)))
    with pytest.raises(ConfigError, match="there are 0"):
        next(Assistant(CHAIN, KD()).phases(a_context(teachers=0)))


def test_methods_around_others_are_read_from_a_configuration():
    inner = {"use": "curriculum", "base": {"use": "kd", "temperature": 2.0}}
    chain = [{"use": "resnet", "depth": 14}]
    read = TypeAdapter(Method).validate_python({"use": "assistant", "assistants": chain, "base": inner})
    assert read == Assistant((CifarFamily(depth=14),), Curriculum(KD(temperature=2.0)))
