"""The baselines against their formulas in NumPy, and the pairs of layers that they find on any two networks."""

import dataclasses

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from edgekd.core.method import Batch, Lesson, Method, Outcome
from edgekd.errors import ConfigError
from edgekd.methods.attention_transfer import AttentionTransfer, attention
from edgekd.methods.dist import DIST, pearson
from edgekd.methods.dkd import DKD
from edgekd.methods.fitnet import FitNet, gap
from edgekd.methods.relational import Relational, relations
from edgekd.methods.relational import gaps as relational_gaps
from edgekd.methods.similarity_preserving import SimilarityPreserving, similarity
from edgekd.models.mobilenet_v2 import MobileNetV2Model
from edgekd.models.resnet import ResNet
from edgekd.models.unet import UNetModel
from edgekd.training.feature_method import Pair, deepest_pairs, ends, equal_pairs
from edgekd.training.layer_discovery import layers
from edgekd.training.losses import soft_kl
from tests import zoo

FEATURES = [FitNet, AttentionTransfer, Relational, SimilarityPreserving]
LOGITS = [DKD, DIST]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_batch(y=None, progress=1.0):
    x = drawn(6, 1, 8, 8)
    return Batch(x, torch.arange(6) % zoo.CLASSES if y is None else y, torch.arange(6), progress)


def a_lesson(student=None, teacher=None, **more):
    torch.manual_seed(0)
    student, teacher = student or zoo.Toy(2), teacher or zoo.Toy(4)
    settings = {"epochs": 10, "classes": zoo.CLASSES, "sample": lambda n: iter([a_batch()])} | more
    return Lesson(student.eval(), (teacher.eval(),), **settings)


def phases(method, lesson):
    script, found = method.teach(lesson), []
    with pytest.raises(StopIteration):
        found.append(next(script))
        while True:
            found.append(script.send(Outcome({}, None)))
    return found


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(1).mean()


def standard(z):
    return (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True)


@pytest.mark.parametrize("standardise", [False, True])
def test_decoupled_kl_is_that_of_target_and_of_the_rest(standardise):
    own, theirs, y = drawn(5, 4, seed=1), 3 * drawn(5, 4, seed=2), np.array([0, 3, 1, 1, 2])
    parts = []
    for z in (theirs, own):
        p = softmax((standard(z.numpy()) if standardise else z.numpy()) / 4)
        p_y = p[np.arange(5), y][:, None]
        rest = np.array([np.delete(row, label) for row, label in zip(p, y, strict=True)])
        parts.append((np.hstack([p_y, 1 - p_y]), rest / rest.sum(1, keepdims=True)))
    got = DKD(standardise=standardise).decoupled(own, theirs, torch.from_numpy(y))
    want = [16 * kl(parts[0][n], parts[1][n]) for n in range(2)]
    assert [v.item() for v in got] == pytest.approx(want, rel=1e-4)


def test_decoupled_kl_damped_by_the_teacher_s_doubt_is_kd():
    own, theirs, y = drawn(1, 4, seed=1), drawn(1, 4, seed=2), torch.tensor([2])
    target, others = DKD().decoupled(own, theirs, y)
    doubt = 1 - (theirs / 4).softmax(1)[0, 2]
    assert (target + doubt * others).item() == pytest.approx(soft_kl(own, theirs, 4.0).item(), rel=1e-4)


def test_decoupled_kl_stands_a_teacher_that_is_certain():
    own = torch.tensor([[0.0, 0.0, 90.0]], requires_grad=True)
    target, others = DKD(temperature=1.0).decoupled(own, torch.tensor([[900.0, 0.0, 0.0]]), torch.tensor([0]))
    (target + others).backward()
    assert target.item() == pytest.approx(90, rel=1e-3)
    assert own.grad.isfinite().all() and own.grad[0, 0] < 0


def test_without_a_label_the_target_is_what_the_teacher_finds_most_likely():
    own, theirs = drawn(5, 4, seed=1), drawn(5, 4, seed=2)
    guessed = DKD().decoupled(own, theirs, torch.full((5,), -1))
    assert torch.equal(torch.stack(guessed), torch.stack(DKD().decoupled(own, theirs, theirs.argmax(1))))


def test_the_decoupled_losses_warm_up():
    (phase,) = phases(DKD(warmup=0.5), a_lesson())
    early, late = phase.loss(a_batch(progress=0.125)), phase.loss(a_batch(progress=0.75))
    assert early["others"].item() == pytest.approx(late["others"].item() / 4)
    assert early["target"].item() == pytest.approx(late["target"].item() / 4)
    assert early["task"].item() == late["task"].item()


@pytest.mark.parametrize("standardise", [False, True])
def test_dist_is_the_lack_of_correlation_of_rows_and_columns(standardise):
    torch.manual_seed(1)
    lesson = a_lesson(*(nn.Sequential(nn.Flatten(), nn.Linear(64, zoo.CLASSES)) for _ in range(2)))
    (phase,) = phases(DIST(inter=3.0, intra=5.0, temperature=2.0, standardise=standardise), lesson)
    with torch.no_grad():
        nets = (net(a_batch().x).double().numpy() for net in (lesson.student, lesson.teachers[0]))
        own, theirs = (softmax((standard(z) if standardise else z) / 2) for z in nets)
        losses = phase.loss(a_batch())
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(own, theirs, strict=True)]
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(own.T, theirs.T, strict=True)]
    assert losses["inter"].item() == pytest.approx(3 * 4 * (1 - np.mean(rows)), rel=1e-3)
    assert losses["intra"].item() == pytest.approx(5 * 4 * (1 - np.mean(columns)), rel=1e-3)


def test_correlation_ignores_scale_and_shift_and_stands_constants():
    a = drawn(4, 3)
    assert torch.allclose(pearson(a, 2 * a + 5, 1), torch.ones(4), atol=1e-5)
    flat = torch.ones(4, 3, requires_grad=True)
    pearson(flat, a, 0).sum().backward()
    assert pearson(flat, a, 0).tolist() == [0, 0, 0] and flat.grad.isfinite().all()


@pytest.mark.parametrize("over", [0, 1])
def test_correlation_has_true_gradients(over):
    a, b = (drawn(4, 3, seed=seed).double().requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: pearson(a, b, over), (a, b))


def test_attention_is_the_energy_of_each_position_over_their_norm():
    feature = torch.tensor([[[[1.0, 0.0]], [[2.0, -2.0]]]])  # energies 5 and 4
    assert attention(feature).tolist() == [pytest.approx([5 / 41**0.5, 4 / 41**0.5])]


def features_of(lesson, *paths):
    """What a network's children make of the batch, in NumPy: {path: feature}."""
    made = []
    with torch.no_grad():
        for net in (lesson.teachers[0], lesson.student):
            x, seen = a_batch().x, {}
            for name, child in list(net.named_children())[:3]:
                seen[name] = x = child(x)
            made.append([seen[p].double().numpy() for p in paths])
    return made


def test_attention_transfer_compares_the_ends_of_each_size():
    lesson = a_lesson()
    (phase,) = phases(AttentionTransfer(weight=10.0), lesson)
    theirs, own = features_of(lesson, "stage1", "stage3")
    want = 0.0
    for pair in zip(theirs, own, strict=True):
        a, b = ((f**2).sum(1).reshape(6, -1) for f in pair)
        unit = [m / np.sqrt((m**2).sum(1, keepdims=True)) for m in (a, b)]
        want += 10 * ((unit[0] - unit[1]) ** 2).mean()
    with torch.no_grad():
        assert phase.loss(a_batch())["attention"].item() == pytest.approx(want, rel=1e-4)


def test_similarities_are_compared_as_rows_of_length_1():
    lesson = a_lesson()
    (phase,) = phases(SimilarityPreserving(weight=36.0), lesson)
    grams = []
    for (f,) in features_of(lesson, "stage3"):
        g = f.reshape(6, -1) @ f.reshape(6, -1).T
        grams.append(g / np.linalg.norm(g, axis=1, keepdims=True))
    with torch.no_grad():
        assert phase.loss(a_batch())["similarity"].item() == pytest.approx(
            np.linalg.norm(grams[0] - grams[1]) ** 2, rel=1e-4
        )
    assert torch.allclose(similarity(drawn(3, 2, 4, 4)).norm(dim=1), torch.ones(3))


def test_relations_of_a_right_triangle():
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])[:, :, None, None]
    distances, angles = relations(corners)
    assert distances.tolist() == [pytest.approx(row) for row in ([0, 0.75, 1], [0.75, 0, 1.25], [1, 1.25, 0])]
    assert angles[0, 1, 2].item() == 0  # the right angle
    assert angles[1, 0, 2].item() == pytest.approx(3 / 5) and angles[2, 0, 1].item() == pytest.approx(4 / 5)
    turned = 7 * corners.flip(1) + 2  # similar triangles have equal relations
    assert relational_gaps(corners, turned).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_relational_losses_are_huber_means_over_pairs_and_triples():
    lesson = a_lesson()
    (phase,) = phases(Relational(distance=2.0, angle=3.0), lesson)
    found = []
    for (f,) in features_of(lesson, "stage3"):
        f = f.mean((2, 3))
        d = np.array([[np.linalg.norm(a - b) for b in f] for a in f])
        cos = np.zeros((6, 6, 6))
        for i, j, k in np.ndindex(6, 6, 6):
            if i != j and k != j:
                cos[i, j, k] = (f[i] - f[j]) @ (f[k] - f[j]) / d[i, j] / d[k, j]
        found.append((d / d[d > 0].mean(), cos))
    want = []
    for theirs, own in zip(*found, strict=True):
        off = np.abs(own - theirs)
        want.append(np.where(off < 1, off**2 / 2, off - 0.5).mean())
    with torch.no_grad():
        losses = phase.loss(a_batch())
    assert losses["distance"].item() == pytest.approx(2 * want[0], rel=1e-3)
    assert losses["angle"].item() == pytest.approx(3 * want[1], rel=1e-3)


def test_relations_stand_samples_that_look_the_same():
    theirs, own = drawn(4, 3, 2, 2), torch.ones(4, 3, 2, 2)
    own[3] = 2.0
    for made in (own, torch.ones(4, 3, 2, 2), torch.ones(1, 3, 2, 2)):
        made.requires_grad_(True)
        relational_gaps(theirs[: len(made)], made).sum().backward()
        assert made.grad.isfinite().all() and made.grad.abs().max() < 100


def test_relations_have_true_gradients():
    theirs, own = drawn(3, 2, 1, 2).double(), drawn(3, 2, 1, 2, seed=1).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda f: relational_gaps(theirs, f), own)


def test_the_hint_is_half_the_mean_square_of_what_the_regressor_lacks():
    known, regressed = drawn(2, 3, 4, 4).numpy(), drawn(2, 3, 4, 4, seed=1).numpy()
    got = gap(torch.from_numpy(known), torch.from_numpy(regressed)).item()
    assert got == pytest.approx(((known - regressed) ** 2).mean() / 2, rel=1e-5)


def test_fitnet_teaches_the_front_to_the_middle_and_then_the_whole_student():
    lesson = a_lesson()
    hint, finish = phases(FitNet(layers=(Pair("stage2", "stage2"),)), lesson)
    student, regressor = hint.trains
    assert (hint.epochs, finish.epochs) == (3, 7) and finish.trains == (student,)
    assert regressor(torch.zeros(2, 4, 4, 4)).shape == (2, 8, 4, 4)
    parts = (student.stage1, student.stage2, student.stage3, student.head, regressor)
    for part in parts:
        part.requires_grad_(True)
    hint.loss(a_batch())["hint"].backward()
    assert [any(p.grad is not None for p in part.parameters()) for part in parts] == [True, True, False, False, True]
    with torch.no_grad():
        losses, logits = finish.loss(a_batch()), [net(a_batch().x) for net in (student, lesson.teachers[0])]
    assert losses["logits"].item() == pytest.approx(0.9 * soft_kl(*logits, 4.0).item())
    assert losses["task"].item() == pytest.approx(0.1 * nn.functional.cross_entropy(logits[0], a_batch().y).item())


def test_fitnet_finds_the_middle():
    notes = {}
    nets = ResNet(depth=8, width=2).build(zoo.CLASSES, 1), ResNet(depth=8, width=4).build(zoo.CLASSES, 1)
    phases(FitNet(), a_lesson(*nets, sample=lambda n: iter([wide_batch()]), note=notes.__setitem__))
    (pair,) = notes["layers"]
    assert pair == {"teacher": "stage2", "student": "stage2"}  # of three


def wide_batch():
    return dataclasses.replace(a_batch(), x=drawn(6, 1, 16, 16))


@pytest.mark.parametrize("method", LOGITS + FEATURES)
def test_unlabelled_samples_teach_without_labels(method):
    lesson = a_lesson()
    unknown = a_batch(torch.full((6,), -1))
    for phase in phases(method(), lesson):
        for module in phase.trains:
            module.requires_grad_(True)
        losses = phase.loss(unknown)
        assert losses.get("task", torch.zeros(())).item() == 0
        total = sum(losses.values())
        assert total.isfinite() and total > 0
        total.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in lesson.student.parameters())
        lesson.student.zero_grad()


@pytest.mark.parametrize("method", LOGITS)
def test_methods_of_logits_refuse_other_classes_and_maps(method):
    with pytest.raises(ConfigError, match="knows 1 of the 3 classes"):
        phases(method(), a_lesson(knows=((0, None, None),)))
    with pytest.raises(ConfigError, match="compares class logits"):
        phases(method(), a_lesson(dense=True))


@pytest.mark.parametrize("method", FEATURES)
def test_features_teach_other_classes_but_logits_cannot(method):
    lesson = a_lesson(knows=((2, None, None),))
    *_, last = phases(method(logits=0.0), lesson)
    assert "logits" not in last.loss(a_batch())
    with pytest.raises(ConfigError, match="logits is 0.5, but the teacher knows 1 of the 3") as caught:
        phases(method(logits=0.5), lesson)
    assert "set logits to 0" in caught.value.hint


def test_logits_of_a_teacher_are_put_into_the_order_of_the_student_s():
    lesson = a_lesson(knows=((2, 0, 1),))
    (phase,) = phases(AttentionTransfer(logits=0.5, labels=2.0, standardise=True), lesson)
    with torch.no_grad():
        own, theirs = lesson.student(a_batch().x), lesson.teachers[0](a_batch().x)[:, [2, 0, 1]]
        losses = phase.loss(a_batch())
    assert losses["logits"].item() == pytest.approx(0.5 * soft_kl(own, theirs, 4.0, True).item())
    assert losses["task"].item() == pytest.approx(2 * nn.functional.cross_entropy(own, a_batch().y).item())


@pytest.mark.parametrize("method", FEATURES)
@pytest.mark.parametrize("logits", [0.0, 0.5])
def test_features_teach_dense_answers(method, logits):
    nets = UNetModel(2, 2).build(1, 1), UNetModel(4, 2).build(1, 1)
    maps = Batch(drawn(4, 1, 8, 12), drawn(4, 1, 8, 12, seed=1), torch.arange(4), 0.5)
    lesson = a_lesson(*nets, classes=1, dense=True, sample=lambda n: iter([maps]))
    for phase in phases(method(logits=logits), lesson):
        losses = phase.loss(maps)
        assert all(v.isfinite() for v in losses.values()) and sum(losses.values()) > 0
    assert ("logits" in losses) == (logits > 0)


def test_the_end_of_a_size_is_its_last_layer_and_never_the_answer():
    x = drawn(2, 1, 8, 8)
    torch.manual_seed(0)
    toy = zoo.Toy(2).eval()
    assert [layer.path for layer in ends(toy, x)] == ["stage1", "stage3"]
    assert not any(layer.signed for layer in ends(toy, x))  # after the activation
    assert [layer.path for layer in layers(toy, x)] != [layer.path for layer in ends(toy, x)]
    unet = UNetModel(2, 1).build(1, 1).eval()
    nn.init.ones_(unet.head.weight)
    assert [(layer.path, layer.size) for layer in ends(unet, x)] == [("up.0.narrow", (4, 4)), ("up.0", (8, 8))]


class Branched(nn.Module):
    """Two paths side by side at 8x8, which join; then an answer. The last layer of 8x8 sees half of what passes."""

    def __init__(self):
        super().__init__()
        self.whole, self.side = nn.Conv2d(1, 4, 1), nn.Conv2d(2, 2, 1)
        self.shrink = nn.Conv2d(4, 3, 2, 2)

    def forward(self, x):
        left, right = self.whole(x).chunk(2, 1)
        return self.shrink(torch.cat([left, self.side(right)], 1)).mean((2, 3))


def test_layers_that_everything_passes_through_come_first():
    torch.manual_seed(0)
    assert [layer.path for layer in ends(Branched().eval(), drawn(2, 1, 8, 8))] == ["whole", "shrink"]


def test_networks_of_different_families_are_paired_by_size():
    torch.manual_seed(0)
    nets = MobileNetV2Model(width=0.25, halvings=3).build(3, 1), ResNet(depth=8, width=4).build(3, 1)
    lesson = a_lesson(*nets, sample=lambda n: iter([dataclasses.replace(a_batch(), x=drawn(4, 1, 16, 24))]))
    found = equal_pairs(lesson, ())
    assert found and all(p.teacher.size == p.student.size for p in found)
    sizes = [p.student.size for p in found]
    assert sizes == sorted(set(sizes), reverse=True)
    (deep,) = deepest_pairs(lesson, ())
    assert deep.student.size <= sizes[-1]


def test_maps_without_a_common_size_are_told():
    lesson = a_lesson(nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 3)), None)
    with pytest.raises(ConfigError, match=r"equal sizes \(teacher: 8x8, 4x4; student: 2x2\)"):
        equal_pairs(lesson, ())
    (pair,) = deepest_pairs(lesson, ())
    assert (pair.teacher.size, pair.student.size) == ((4, 4), (2, 2))
    with pytest.raises(ConfigError, match="no layer that makes"):
        deepest_pairs(a_lesson(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))), ())


def test_named_layers_are_checked_before_training():
    with pytest.raises(ConfigError, match="no layer `stage4`") as caught:
        next(AttentionTransfer(layers=(Pair("stage4", "stage1"),)).teach(a_lesson()))
    assert "did you mean `stage" in caught.value.hint
    with pytest.raises(ConfigError, match="`stage1` of the teacher makes maps of 8x8, `stage3` of the student of 4x4"):
        next(FitNet(layers=(Pair("stage1", "stage3"),)).teach(a_lesson()))
    with pytest.raises(ConfigError, match=r"gives no \(N, C, H, W\) map"):
        next(SimilarityPreserving(layers=(Pair("head", "head"),)).teach(a_lesson()))
    next(Relational(layers=(Pair("stage1", "stage3"),)).teach(a_lesson()))  # only equal_pairs asks for equal sizes


def test_settings_are_read_from_a_configuration():
    said = {"use": "attention_transfer", "layers": [{"teacher": "a", "student": "b"}], "logits": 0.5}
    assert TypeAdapter(Method).validate_python(said) == AttentionTransfer(layers=(Pair("a", "b"),), logits=0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: DKD(others=-1.0),
        lambda: DKD(temperature=0.0),
        lambda: DKD(warmup=2.0),
        lambda: DIST(intra=float("nan")),
        lambda: DIST(temperature=-1.0),
        lambda: AttentionTransfer(weight=-1.0),
        lambda: AttentionTransfer(logits=2.0),  # labels would have weight -1
        lambda: AttentionTransfer(temperature=0.0),
        lambda: SimilarityPreserving(weight=-1.0),
        lambda: Relational(angle=-1.0),
        lambda: FitNet(stage1=1.0),
        lambda: FitNet(hint=-1.0),
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError) as caught:
        wrong()
    assert caught.value.hint


def test_fitnet_needs_epochs_for_both_stages():
    with pytest.raises(ConfigError, match="1 epochs leave none"):
        next(FitNet().teach(a_lesson(epochs=1)))
