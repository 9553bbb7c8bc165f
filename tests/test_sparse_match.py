"""Sparse representation matching against its formulas, which layers it pairs, and what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.core.method import Batch, PhaseResult, TrainingContext
from edgekd.errors import ConfigError
from edgekd.methods.sparse_match import SparseMatch, match_losses, spread_images
from edgekd.models.mobilenet_v2 import MobileNetV2Model
from edgekd.models.resnet import ResNet
from edgekd.models.unet import UNetModel
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression
from edgekd.training.feature_method import LayerPair
from edgekd.training.sparse_coding import SparseLayer
from tests import zoo


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def array(tensor):
    return tensor.detach().double().numpy()


def similarities(layer, x):
    """D^T (x / unit) + c, pixel by pixel: (N, H, W, K)."""
    return np.moveaxis(array(x), 1, -1) / layer.unit.item() @ array(layer.atoms) + layer.bias.item()


def sparse_codes(z, kept):
    least = np.sort(z, axis=-1)[..., -kept, None]
    return np.where(z >= least, sigmoid(z), 0.0)


def a_layer(channels=3, atoms=7, kept=2, unit=1.0):
    torch.manual_seed(0)
    layer = SparseLayer(channels, atoms, kept)
    layer.unit.fill_(unit)
    return layer


def some(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_the_dictionary_decodes_the_largest_similarities():
    layer, x = a_layer(unit=2.0), some(2, 3, 4, 5)
    z = similarities(layer, x)
    codes = sparse_codes(z, 2)
    assert ((codes > 0).sum(-1) == 2).all()
    assert np.allclose(np.moveaxis(array(layer(x)), 1, -1), z, atol=1e-5)
    assert np.allclose(np.moveaxis(array(layer.codes(layer(x))), 1, -1), codes, atol=1e-6)
    error = np.moveaxis(array(x), 1, -1) / 2 - codes @ array(layer.atoms).T
    assert layer.gap(x).item() == pytest.approx((error**2).sum(-1).mean(), rel=1e-5)


def test_equal_similarities_are_all_kept():
    similar = torch.tensor([3.0, 1.0, 1.0, 0.0]).reshape(1, 4, 1, 1)
    assert (a_layer(atoms=4).codes(similar) > 0).flatten().tolist() == [True, True, True, False]


def test_similarities_that_saturate_the_sigmoid_are_still_told_apart():
    similar = torch.tensor([30.0, 40.0, 50.0, 0.0]).reshape(1, 4, 1, 1)
    assert a_layer(kept=1).codes(similar).flatten().tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("raw", [False, True])
def test_the_labels_losses_are_those_of_the_paper(raw):
    theirs, x = a_layer(unit=1.5), some(2, 3, 4, 5)
    own, v = SparseLayer(2, 7, 2), some(2, 2, 4, 5)
    z, mine = similarities(theirs, x), similarities(own, v)
    logits = mine if raw else sigmoid(mine)
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    pixel = -np.log(np.take_along_axis(share, z.argmax(-1)[..., None], -1)).mean()
    target, dense = sparse_codes(z, 2).mean((1, 2)), sigmoid(mine).mean((1, 2))
    image = -(target * np.log(dense) + (1 - target) * np.log(1 - dense)).mean()
    got = [loss.item() for loss in match_losses(own(v), theirs, x, raw)]
    assert got == pytest.approx([pixel, image], rel=1e-5)


def test_gradients_of_the_sparse_layer_and_the_labels_losses():
    layer = a_layer().double()
    x = some(2, 3, 2, 2).double()
    parameters = [p.detach().requires_grad_() for p in (layer.atoms, layer.bias)]

    def gap(atoms, bias):
        return torch.func.functional_call(Gap(layer), {"layer.atoms": atoms, "layer.bias": bias}, (x,))

    assert torch.autograd.gradcheck(gap, parameters)
    own = some(2, 7, 2, 2).double().requires_grad_()
    for raw in (False, True):
        assert torch.autograd.gradcheck(lambda z, raw=raw: match_losses(z, layer, x, raw), (own,))


class Gap(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer.gap(x)


def test_a_dictionary_begins_better_than_at_random_and_whatever_the_features_size():
    gaps = []
    for size in (1.0, 100.0):
        pixels = size * some(600, 16).abs() * some(16).abs()
        layer = a_layer(16, 32, 2)
        layer.unit.copy_(size)
        random = layer.gap(pixels[:, :, None, None]).item() / 16
        layer.init_atoms(pixels)
        gaps.append(layer.gap(pixels[:, :, None, None]).item() / 16**0.5)  # as a share of the energy
        used = (layer.codes(layer(pixels[:, :, None, None])) > 0).any(0).sum()
        assert gaps[-1] < random and gaps[-1] < 0.5 and used > 16
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-4)


def test_a_dictionary_begins_where_all_pixels_are_equal_or_dead():
    for pixels in (torch.ones(40, 4), torch.zeros(40, 4)):
        layer = a_layer(4, 8, 1)
        layer.init_atoms(pixels)
        assert layer.gap(pixels[:, :, None, None]).item() < 0.1


def labelled(x, y=None):
    return Batch(x, torch.arange(len(x)) % zoo.CLASSES if y is None else y, torch.arange(len(x)), 0.0)


def a_context(teacher=None, student=None, epochs=10, x=None, **rest):
    torch.manual_seed(0)
    teacher, student = teacher or zoo.Toy(4), student or zoo.Toy(2)
    batch = labelled(some(8, 1, 8, 8) if x is None else x)
    return TrainingContext(
        student.eval(),
        (teacher.eval(),),
        epochs,
        zoo.CLASSES,
        lambda n: iter([batch]),
        **{"task": Classification(), **rest},
    )


def phases(method, ctx):
    script = method.phases(ctx)
    found = [next(script)]
    while len(found) < 3:
        batch = next(ctx.first_batches(1))
        found.append(script.send(PhaseResult({n: v.item() for n, v in found[-1].loss(batch).items()}, None)))
    return found


def noted(ctx):
    told = {}
    return told, dataclasses.replace(ctx, log_choice=told.__setitem__)


def test_three_phases_share_the_budget_and_only_the_last_sees_labels():
    ctx = a_context()
    first, second, third = phases(SparseMatch(dictionary_fraction=0.2, initialise_fraction=0.3), ctx)
    assert [(p.name, p.epochs) for p in (first, second, third)] == [("dictionary", 2), ("initialise", 3), ("kd", 5)]
    assert ctx.student not in first.trains and third.trains == (ctx.student,)
    batch = next(ctx.first_batches(1))
    other = dataclasses.replace(batch, labels=batch.labels.flip(0))
    for phase, sees in ((first, False), (second, False), (third, True)):
        a, b = (sum(v.item() for v in phase.loss(given).values()) for given in (batch, other))
        assert (a != b) == sees
    hidden = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -1))
    assert third.loss(hidden)["task"].item() == 0


def test_dictionaries_learn_without_weight_decay_and_the_student_not_at_all():
    first, _, _ = phases(SparseMatch(), a_context())
    assert set(first.weight_decay.values()) == {0.0} and set(first.weight_decay) == set(first.trains)
    assert all(isinstance(module, SparseLayer) for module in first.trains)


def test_the_classifier_waits_for_the_last_phase():
    ctx = a_context()
    _, second, _ = phases(SparseMatch(), ctx)
    ctx.student.requires_grad_(True).zero_grad()
    sum(second.loss(next(ctx.first_batches(1))).values()).backward()
    assert all(p.grad is None for p in ctx.student.head.parameters())
    assert ctx.student.stage1[0].weight.grad.abs().sum() > 0


def test_the_last_layers_of_equal_size_are_paired():
    told, ctx = noted(a_context())
    phases(SparseMatch(code_fraction=0.2), ctx)
    assert [(t["teacher"], t["student"], t["size"]) for t in told["pairs"]] == [
        ("stage1.1", "stage1.1", [8, 8]),
        ("stage3.1", "stage3.1", [4, 4]),
    ]
    assert [(t["atoms"], t["active"]) for t in told["pairs"]] == [(8, 1), (32, 6)]
    assert all(0 < t["unexplained"] < 1 for t in told["pairs"])


def test_of_the_pairs_found_the_deepest_are_taken():
    told, ctx = noted(a_context())
    phases(SparseMatch(num_pairs=1), ctx)
    assert [t["student"] for t in told["pairs"]] == ["stage3.1"]
    assert "labels only" not in told


def test_pixels_are_labelled_behind_the_sigmoid_unless_raw_is_set():
    """As in the paper."""
    by_raw = {}
    for settings in ({}, {"raw_logits": False}, {"raw_logits": True}):
        ctx = a_context()
        _, second, _ = phases(SparseMatch(**settings), ctx)
        with torch.no_grad():
            by_raw[settings.get("raw_logits")] = second.loss(next(ctx.first_batches(1)))[
                "stage3.1>stage3.1:pixel"
            ].item()
    assert by_raw[None] == by_raw[False] != by_raw[True]


def test_where_no_sizes_are_equal_the_larger_map_is_pooled():
    student = nn.Sequential(zoo.conv(1, 3, 3), nn.Flatten(), nn.Linear(27, zoo.CLASSES))
    told, ctx = noted(a_context(student=student))
    _, second, _ = phases(SparseMatch(), ctx)
    assert [(t["teacher"], t["size"]) for t in told["pairs"]] == [("stage3.1", [3, 3])]
    assert all(torch.isfinite(v) for v in second.loss(next(ctx.first_batches(1))).values())


def test_named_layers_are_taken_and_misspelt_ones_refused_with_the_nearest():
    told, ctx = noted(a_context())
    phases(SparseMatch(layers=(LayerPair("stage2", "stage1"),)), ctx)
    assert [(t["teacher"], t["student"], t["size"]) for t in told["pairs"]] == [("stage2", "stage1", [4, 4])]
    with pytest.raises(ConfigError, match="no layer `stagee2`") as error:
        next(SparseMatch(layers=(LayerPair("stagee2", "stage1"),)).phases(a_context()))
    assert "stage2" in error.value.hint


def test_a_network_without_maps_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, zoo.CLASSES))
    with pytest.raises(ConfigError, match="no layer of the student"):
        next(SparseMatch().phases(a_context(student=flat)))


@pytest.mark.parametrize(
    "settings",
    [
        {"dictionary_fraction": 0.0},
        {"initialise_fraction": 1.0},
        {"code_fraction": 0.0},
        {"atoms": 0.0},
        {"num_pairs": 0},
        {"pixel_weight": 0.0, "image_weight": 0.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError):
        SparseMatch(**settings)


def test_a_budget_too_small_for_three_phases_is_refused():
    with pytest.raises(ConfigError, match="2 epochs leave none for kd"):
        next(SparseMatch().phases(a_context(epochs=2)))


def test_a_teacher_of_other_classes_initialises_and_labels_finish():
    told, ctx = noted(a_context(class_columns=((0, None, 1),)))
    _, second, third = phases(SparseMatch(), ctx)
    assert told["labels only"] == "the teacher knows 2 of the 3 classes, so its logits are not imitated"
    assert second.loss(next(ctx.first_batches(1)))
    assert list(third.loss(next(ctx.first_batches(1)))) == ["task"]


def test_dense_answers_are_imitated_and_are_no_tap():
    torch.manual_seed(0)
    teacher, student = (UNetModel(width=w, levels=1).build(1, 1) for w in (4, 2))
    for net in (teacher, student):
        nn.init.normal_(net.head.weight)
    x = some(4, 1, 8, 8)
    told, ctx = noted(a_context(teacher, student, x=x, task=Regression()))
    batch = labelled(x, torch.full((4, 1, 8, 8), float("nan")))
    ctx = dataclasses.replace(ctx, num_classes=1, first_batches=lambda n: iter([batch]))
    _, _, third = phases(SparseMatch(), ctx)
    assert told["pairs"] and "head" not in {t["teacher"] for t in told["pairs"]}
    losses = third.loss(batch)
    assert losses["task"].item() == 0
    want = 0.75 * np.abs(array(student(x)) - array(teacher(x))).mean()
    assert losses["kd"].item() == pytest.approx(want, rel=1e-5)


def test_images_to_begin_with_come_from_the_whole_split():
    images = torch.arange(1000.0)[:, None, None, None]
    batches = [labelled(part) for part in images.split(64)]
    ctx = dataclasses.replace(a_context(), first_batches=lambda n: iter(batches[:n]))
    numbers = spread_images(ctx).flatten()
    assert 128 <= len(numbers) < 256 and set(numbers.diff().tolist()) == {4.0} and numbers.max() >= 990


def trained(phase, batch, steps, lr=0.05):
    optimiser = torch.optim.SGD([p for m in phase.trains for p in m.requires_grad_(True).parameters()], lr, 0.9)
    losses = []
    for _ in range(steps):
        made = phase.loss(batch)
        optimiser.zero_grad()
        sum(made.values()).backward()
        optimiser.step()
        losses.append({name: value.item() for name, value in made.items()})
    return losses[0], losses[-1]


@pytest.mark.parametrize("raw", [False, True])
def test_a_mobilenet_learns_the_codes_of_a_resnet(raw):
    torch.manual_seed(0)
    teacher = ResNet(depth=8, width=8).build(zoo.CLASSES, 1)
    student = MobileNetV2Model(width=0.25, depth=0.3, halvings=2).build(zoo.CLASSES, 1)
    ctx = a_context(teacher, student, x=some(8, 1, 16, 16))
    batch = next(ctx.first_batches(1))
    script = SparseMatch(num_pairs=2, raw_logits=raw).phases(ctx)
    for phase in (next(script), script.send(PhaseResult(dict.fromkeys(phase_names(ctx), 1.0), None))):
        before, after = trained(phase, batch, 6)
        assert all(after[name] < before[name] for name in before), (phase.name, before, after)


def phase_names(ctx):
    return next(SparseMatch(num_pairs=2).phases(ctx)).loss(next(ctx.first_batches(1)))
