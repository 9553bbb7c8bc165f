"""The baselines against their formulas in NumPy, and the pairs of layers that they find on any two networks."""

import dataclasses

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from edgekd.core.method import Batch, Method, PhaseResult, TrainingContext
from edgekd.errors import ConfigError
from edgekd.methods.attention_transfer import AttentionTransfer, attention_map
from edgekd.methods.dist import DIST, pearson
from edgekd.methods.dkd import DKD
from edgekd.methods.fitnet import FitNet, hint_loss
from edgekd.methods.relational import Relational, relations
from edgekd.methods.relational import relation_losses as relational_gaps
from edgekd.methods.similarity_preserving import SimilarityPreserving, similarity
from edgekd.models.mobilenet_v2 import MobileNetV2Model
from edgekd.models.resnet import ResNet
from edgekd.models.unet import UNetModel
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression
from edgekd.training.feature_method import LayerPair, deepest_pairs, equal_pairs, last_layers
from edgekd.training.layer_discovery import cut_layers
from edgekd.training.losses import kd_loss
from tests import zoo

FEATURES = [FitNet, AttentionTransfer, Relational, SimilarityPreserving]
LOGITS = [DKD, DIST]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_batch(y=None, progress=1.0):
    x = drawn(6, 1, 8, 8)
    return Batch(x, torch.arange(6) % zoo.CLASSES if y is None else y, torch.arange(6), progress)


def a_context(student=None, teacher=None, **more):
    torch.manual_seed(0)
    student, teacher = student or zoo.Toy(2), teacher or zoo.Toy(4)
    settings = {
        "epochs": 10,
        "num_classes": zoo.CLASSES,
        "first_batches": lambda n: iter([a_batch()]),
        "task": Classification(),
    } | more
    return TrainingContext(student.eval(), (teacher.eval(),), **settings)


def phases(method, ctx):
    script, found = method.phases(ctx), []
    with pytest.raises(StopIteration):
        found.append(next(script))
        while True:
            found.append(script.send(PhaseResult({}, None)))
    return found


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(1).mean()


def standard(z):
    return (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True)


@pytest.mark.parametrize("standardize_logits", [False, True])
def test_decoupled_kl_is_that_of_target_and_of_the_rest(standardize_logits):
    own, theirs, y = drawn(5, 4, seed=1), 3 * drawn(5, 4, seed=2), np.array([0, 3, 1, 1, 2])
    parts = []
    for z in (theirs, own):
        p = softmax((standard(z.numpy()) if standardize_logits else z.numpy()) / 4)
        p_y = p[np.arange(5), y][:, None]
        rest = np.array([np.delete(row, label) for row, label in zip(p, y, strict=True)])
        parts.append((np.hstack([p_y, 1 - p_y]), rest / rest.sum(1, keepdims=True)))
    got = DKD(standardize_logits=standardize_logits).decoupled_kl(own, theirs, torch.from_numpy(y))
    want = [16 * kl(parts[0][n], parts[1][n]) for n in range(2)]
    assert [v.item() for v in got] == pytest.approx(want, rel=1e-4)


def test_decoupled_kl_damped_by_the_teacher_s_doubt_is_kd():
    own, theirs, y = drawn(1, 4, seed=1), drawn(1, 4, seed=2), torch.tensor([2])
    target, others = DKD().decoupled_kl(own, theirs, y)
    doubt = 1 - (theirs / 4).softmax(1)[0, 2]
    assert (target + doubt * others).item() == pytest.approx(kd_loss(own, theirs, 4.0).item(), rel=1e-4)


def test_decoupled_kl_stands_a_teacher_that_is_certain():
    own = torch.tensor([[0.0, 0.0, 90.0]], requires_grad=True)
    target, others = DKD(temperature=1.0).decoupled_kl(own, torch.tensor([[900.0, 0.0, 0.0]]), torch.tensor([0]))
    (target + others).backward()
    assert target.item() == pytest.approx(90, rel=1e-3)
    assert own.grad.isfinite().all() and own.grad[0, 0] < 0


def test_without_a_label_the_target_is_what_the_teacher_finds_most_likely():
    context = a_context()
    images = a_batch().images
    with torch.no_grad():
        likely = context.teachers[0](images).argmax(1)
    (phase,) = phases(DKD(warmup_fraction=0), context)
    guessed, told = (phase.loss(a_batch(labels)) for labels in (torch.full((6,), -1), likely))
    assert all(torch.equal(guessed[name], told[name]) for name in ("target", "others"))


def test_the_decoupled_losses_warm_up():
    (phase,) = phases(DKD(warmup_fraction=0.5), a_context())
    early, late = phase.loss(a_batch(progress=0.125)), phase.loss(a_batch(progress=0.75))
    assert early["others"].item() == pytest.approx(late["others"].item() / 4)
    assert early["target"].item() == pytest.approx(late["target"].item() / 4)
    assert early["task"].item() == late["task"].item()


@pytest.mark.parametrize("standardize_logits", [False, True])
def test_dist_is_the_lack_of_correlation_of_rows_and_columns(standardize_logits):
    torch.manual_seed(1)
    ctx = a_context(*(nn.Sequential(nn.Flatten(), nn.Linear(64, zoo.CLASSES)) for _ in range(2)))
    (phase,) = phases(
        DIST(inter_weight=3.0, intra_weight=5.0, temperature=2.0, standardize_logits=standardize_logits), ctx
    )
    with torch.no_grad():
        nets = (net(a_batch().images).double().numpy() for net in (ctx.student, ctx.teachers[0]))
        own, theirs = (softmax((standard(z) if standardize_logits else z) / 2) for z in nets)
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
    assert attention_map(feature).tolist() == [pytest.approx([5 / 41**0.5, 4 / 41**0.5])]


def features_of(ctx, *paths):
    """What a network's children make of the batch, in NumPy: {path: feature}."""
    made = []
    with torch.no_grad():
        for net in (ctx.teachers[0], ctx.student):
            x, seen = a_batch().images, {}
            for name, child in list(net.named_children())[:3]:
                seen[name] = x = child(x)
            made.append([seen[p].double().numpy() for p in paths])
    return made


def test_attention_transfer_compares_the_ends_of_each_size():
    ctx = a_context()
    (phase,) = phases(AttentionTransfer(attention_weight=10.0), ctx)
    theirs, own = features_of(ctx, "stage1", "stage3")
    want = 0.0
    for pair in zip(theirs, own, strict=True):
        a, b = ((f**2).sum(1).reshape(6, -1) for f in pair)
        unit = [m / np.sqrt((m**2).sum(1, keepdims=True)) for m in (a, b)]
        want += 10 * ((unit[0] - unit[1]) ** 2).mean()
    with torch.no_grad():
        assert phase.loss(a_batch())["attention"].item() == pytest.approx(want, rel=1e-4)


def test_similarities_are_compared_as_rows_of_length_1():
    ctx = a_context()
    (phase,) = phases(SimilarityPreserving(similarity_weight=36.0), ctx)
    grams = []
    for (f,) in features_of(ctx, "stage3"):
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
    ctx = a_context()
    (phase,) = phases(Relational(distance_weight=2.0, angle_weight=3.0), ctx)
    found = []
    for (f,) in features_of(ctx, "stage3"):
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
    got = hint_loss(torch.from_numpy(known), torch.from_numpy(regressed)).item()
    assert got == pytest.approx(((known - regressed) ** 2).mean() / 2, rel=1e-5)


def test_fitnet_teaches_the_front_to_the_middle_and_then_the_whole_student():
    ctx = a_context()
    hint, finish = phases(FitNet(layers=(LayerPair("stage2", "stage2"),)), ctx)
    student, regressor = hint.trains
    assert (hint.epochs, finish.epochs) == (3, 7) and finish.trains == (student,)
    assert regressor(torch.zeros(2, 4, 4, 4)).shape == (2, 8, 4, 4)
    parts = (student.stage1, student.stage2, student.stage3, student.head, regressor)
    for part in parts:
        part.requires_grad_(True)
    hint.loss(a_batch())["hint"].backward()
    assert [any(p.grad is not None for p in part.parameters()) for part in parts] == [True, True, False, False, True]
    with torch.no_grad():
        losses, logits = finish.loss(a_batch()), [net(a_batch().images) for net in (student, ctx.teachers[0])]
    assert losses["kd"].item() == pytest.approx(0.9 * kd_loss(*logits, 4.0).item())
    assert losses["task"].item() == pytest.approx(0.1 * nn.functional.cross_entropy(logits[0], a_batch().labels).item())


def test_fitnet_finds_the_middle():
    notes = {}
    nets = ResNet(depth=8, width=2).build(zoo.CLASSES, 1), ResNet(depth=8, width=4).build(zoo.CLASSES, 1)
    phases(FitNet(), a_context(*nets, first_batches=lambda n: iter([wide_batch()]), log_choice=notes.__setitem__))
    (pair,) = notes["layers"]
    assert pair == {"teacher": "stage2", "student": "stage2"}  # of three


def wide_batch():
    return dataclasses.replace(a_batch(), images=drawn(6, 1, 16, 16))


@pytest.mark.parametrize("method", LOGITS + FEATURES)
def test_unlabelled_samples_teach_without_labels(method):
    ctx = a_context()
    unknown = a_batch(torch.full((6,), -1))
    for phase in phases(method(), ctx):
        for module in phase.trains:
            module.requires_grad_(True)
        losses = phase.loss(unknown)
        assert losses.get("task", torch.zeros(())).item() == 0
        total = sum(losses.values())
        assert total.isfinite() and total > 0
        total.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in ctx.student.parameters())
        ctx.student.zero_grad()


@pytest.mark.parametrize("method", LOGITS)
def test_methods_of_logits_refuse_other_classes_and_maps(method):
    with pytest.raises(ConfigError, match="knows 1 of the 3 classes"):
        phases(method(), a_context(class_columns=((0, None, None),)))
    with pytest.raises(ConfigError, match="compares class logits"):
        phases(method(), a_context(task=Regression()))


@pytest.mark.parametrize("method", FEATURES)
def test_features_teach_other_classes_but_logits_cannot(method):
    ctx = a_context(class_columns=((2, None, None),))
    *_, last = phases(method(kd_weight=0.0), ctx)
    assert "kd" not in last.loss(a_batch())
    with pytest.raises(ConfigError, match="kd_weight is 0.5, but the teacher knows 1 of the 3") as caught:
        phases(method(kd_weight=0.5), ctx)
    assert "set kd_weight to 0" in caught.value.hint


def test_logits_of_a_teacher_are_put_into_the_order_of_the_student_s():
    ctx = a_context(class_columns=((2, 0, 1),))
    (phase,) = phases(AttentionTransfer(kd_weight=0.5, ce_weight=2.0, standardize_logits=True), ctx)
    with torch.no_grad():
        own, theirs = ctx.student(a_batch().images), ctx.teachers[0](a_batch().images)[:, [2, 0, 1]]
        losses = phase.loss(a_batch())
    assert losses["kd"].item() == pytest.approx(0.5 * kd_loss(own, theirs, 4.0, True).item())
    assert losses["task"].item() == pytest.approx(2 * nn.functional.cross_entropy(own, a_batch().labels).item())


@pytest.mark.parametrize("method", FEATURES)
@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_features_teach_dense_answers(method, kd_weight):
    nets = UNetModel(2, 2).build(1, 1), UNetModel(4, 2).build(1, 1)
    maps = Batch(drawn(4, 1, 8, 12), drawn(4, 1, 8, 12, seed=1), torch.arange(4), 0.5)
    ctx = a_context(*nets, num_classes=1, task=Regression(), first_batches=lambda n: iter([maps]))
    for phase in phases(method(kd_weight=kd_weight), ctx):
        losses = phase.loss(maps)
        assert all(v.isfinite() for v in losses.values()) and sum(losses.values()) > 0
    assert ("kd" in losses) == (kd_weight > 0)


def test_the_end_of_a_size_is_its_last_layer_and_never_the_answer():
    x = drawn(2, 1, 8, 8)
    torch.manual_seed(0)
    toy = zoo.Toy(2).eval()
    assert [layer.path for layer in last_layers(toy, x)] == ["stage1", "stage3"]
    assert not any(layer.signed for layer in last_layers(toy, x))  # after the activation
    assert [layer.path for layer in cut_layers(toy, x)] != [layer.path for layer in last_layers(toy, x)]
    unet = UNetModel(2, 1).build(1, 1).eval()
    nn.init.ones_(unet.head.weight)
    assert [(layer.path, layer.size) for layer in last_layers(unet, x)] == [("up.0.narrow", (4, 4)), ("up.0", (8, 8))]


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
    assert [layer.path for layer in last_layers(Branched().eval(), drawn(2, 1, 8, 8))] == ["whole", "shrink"]


def test_networks_of_different_families_are_paired_by_size():
    torch.manual_seed(0)
    nets = MobileNetV2Model(width=0.25, halvings=3).build(3, 1), ResNet(depth=8, width=4).build(3, 1)
    ctx = a_context(*nets, first_batches=lambda n: iter([dataclasses.replace(a_batch(), images=drawn(4, 1, 16, 24))]))
    found = equal_pairs(ctx, ())
    assert found and all(p.teacher.size == p.student.size for p in found)
    sizes = [p.student.size for p in found]
    assert sizes == sorted(set(sizes), reverse=True)
    (deep,) = deepest_pairs(ctx, ())
    assert deep.student.size <= sizes[-1]


def test_maps_without_a_common_size_are_told():
    ctx = a_context(nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 3)), None)
    with pytest.raises(ConfigError, match=r"equal sizes \(teacher: 8x8, 4x4; student: 2x2\)"):
        equal_pairs(ctx, ())
    (pair,) = deepest_pairs(ctx, ())
    assert (pair.teacher.size, pair.student.size) == ((4, 4), (2, 2))
    with pytest.raises(ConfigError, match="no layer with"):
        deepest_pairs(a_context(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))), ())


def test_named_layers_are_checked_before_training():
    with pytest.raises(ConfigError, match="no layer `stage4`") as caught:
        next(AttentionTransfer(layers=(LayerPair("stage4", "stage1"),)).phases(a_context()))
    assert "did you mean `stage" in caught.value.hint
    with pytest.raises(ConfigError, match="`stage1` of the teacher has maps of 8x8, `stage3` of the student of 4x4"):
        next(FitNet(layers=(LayerPair("stage1", "stage3"),)).phases(a_context()))
    with pytest.raises(ConfigError, match=r"gives no \(N, C, H, W\) map"):
        next(SimilarityPreserving(layers=(LayerPair("head", "head"),)).phases(a_context()))
    next(
        Relational(layers=(LayerPair("stage1", "stage3"),)).phases(a_context())
    )  # only equal_pairs asks for equal sizes


def test_settings_are_read_from_a_configuration():
    said = {"use": "attention_transfer", "layers": [{"teacher": "a", "student": "b"}], "kd_weight": 0.5}
    assert TypeAdapter(Method).validate_python(said) == AttentionTransfer(layers=(LayerPair("a", "b"),), kd_weight=0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: DKD(beta=-1.0),
        lambda: DKD(temperature=0.0),
        lambda: DKD(warmup_fraction=2.0),
        lambda: DIST(intra_weight=float("nan")),
        lambda: DIST(temperature=-1.0),
        lambda: AttentionTransfer(attention_weight=-1.0),
        lambda: AttentionTransfer(kd_weight=2.0),  # labels would have weight -1
        lambda: AttentionTransfer(temperature=0.0),
        lambda: SimilarityPreserving(similarity_weight=-1.0),
        lambda: Relational(angle_weight=-1.0),
        lambda: FitNet(stage1_fraction=1.0),
        lambda: FitNet(hint_weight=-1.0),
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError) as caught:
        wrong()
    assert caught.value.hint


def test_fitnet_needs_epochs_for_both_stages():
    with pytest.raises(ConfigError, match="1 epochs leave none"):
        next(FitNet().phases(a_context(epochs=1)))
