"""What every task must keep. New files in tasks/ are found by themselves."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.core import plugins, serialization
from edgekd.core.augment import Augment
from edgekd.core.bench_result import Samples
from edgekd.core.metric import Metric, hit_rate
from edgekd.core.task import OutputSpec, Task, matching_task, output_tensors, primary_metrics
from edgekd.errors import ExportError, ParityError
from edgekd.metrics._compute import compute_metrics
from edgekd.onnx import inspect
from edgekd.onnx.session import run_outputs
from edgekd.stages.bench.intervals import intervals
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.mixed_precision.sensitivity import EvalSet, accuracy_drop
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression

SHAPE, CLASSES, COUNT = (3, 8, 10), 4, 12
NONE = np.zeros(0)


@dataclasses.dataclass(frozen=True)
class ClassAndAngle(Task):
    """A task of a package of its own: a class, and an angle in radians; targets are (N, 2), NaN where unknown."""

    def loss(self, outputs, targets):
        losses = self.sample_losses(outputs, targets)
        known = losses.isfinite()
        return torch.where(known, losses, 0.0).sum() / known.sum().clamp(min=1)

    def distill_loss(self, outputs, teacher_outputs, temperature=1.0, standardize=False):
        return sum((a.float() - b.float()).square().mean() for a, b in zip(outputs, teacher_outputs, strict=True))

    def sample_losses(self, outputs, targets):
        logits, angle = outputs
        known = ~targets.isnan().any(1)
        kind, turn = torch.where(known, targets[:, 0], 0).long(), torch.where(known, targets[:, 1], 0)
        losses = nn.functional.cross_entropy(logits, kind, reduction="none") + (angle[:, 0] - turn).abs()
        return losses.where(known, torch.inf)

    def accuracy(self, outputs, targets):
        return (outputs[0].argmax(1) == targets[:, 0]).float().mean().item()

    def unlabelled(self, targets):
        return targets.isnan()

    def fill_targets(self, targets, teacher_outputs):
        answers = torch.stack([teacher_outputs[0].argmax(1).float(), teacher_outputs[1][:, 0]], 1)
        return answers.where(targets.isnan(), targets)

    def transform(self, images, targets, augment, random):
        return images, targets

    def check_targets(self, split, targets, images, classes):
        assert targets.shape == (len(images), 2)

    def hide_targets(self, targets):
        return np.full_like(targets, np.nan)

    def outputs(self, num_classes, shape):
        return OutputSpec("class", (num_classes,)), OutputSpec("angle", (1,))

    def matches(self, outputs):
        return [output.name for output in outputs] == ["class", "angle"]

    def metrics(self):
        def hits(samples):
            return samples.outputs[0].argmax(1) == samples.labels[:, 0]

        def error(samples):
            return float(np.abs(samples.outputs[1][:, 0] - samples.labels[:, 1]).mean())

        inputs = ("outputs", "labels")
        return {
            "class_top1": hit_rate("images of the right class", "top-1", "%", inputs, hits),
            "angle_mae": Metric("mean absolute error of the angle", "rad", "lower", error, inputs),
        }

    def agreement(self, outputs, reference):
        return 100 * float((outputs[0].argmax(1) == reference[0].argmax(1)).mean())


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classes, self.angle = nn.Linear(8, CLASSES), nn.Linear(8, 1)

    def forward(self, x):
        features = self.body(x)
        return self.classes(features), self.angle(features)


@dataclasses.dataclass(frozen=True)
class Example:
    """Targets of a task, for images of SHAPE; those of the last are unknown."""

    task: Task
    targets: torch.Tensor

    def outputs(self, seed):
        """Random outputs of a network, with gradients."""
        random = torch.Generator().manual_seed(seed)
        tensors = [
            torch.randn(COUNT, *spec.shape, generator=random).requires_grad_()
            for spec in self.task.outputs(CLASSES, SHAPE)
        ]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def samples(self, seed=0, reference=1):
        outputs, others = (
            tuple(tensor.detach().numpy() for tensor in output_tensors(self.outputs(n))) for n in (seed, reference)
        )
        return Samples(NONE, NONE, outputs, others, self.targets.numpy())


def make_targets(task):
    """By the kind of the task's outputs; a task with others says here what its targets look like."""
    random = torch.Generator().manual_seed(9)
    if isinstance(task, ClassAndAngle):
        targets = torch.stack([torch.arange(COUNT) % CLASSES, torch.rand(COUNT, generator=random)], 1)
    elif task.class_logits:
        targets = torch.arange(COUNT) % CLASSES
    else:
        (spec,) = task.outputs(CLASSES, SHAPE)
        targets = 1 + torch.rand(COUNT, *spec.shape, generator=random)
    hidden = torch.from_numpy(task.hide_targets(targets[-1:].numpy()))
    return torch.cat([targets[:-1], hidden])


@pytest.fixture(params=[*plugins.names("tasks"), ClassAndAngle])
def example(request):
    task = plugins.load("tasks", request.param)() if isinstance(request.param, str) else request.param()
    return Example(task, make_targets(task))


def test_the_loss_is_finite_and_every_output_learns_from_it(example):
    outputs = example.outputs(0)
    loss = example.task.loss(outputs, example.targets)
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite()
    for tensor in output_tensors(outputs):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0


def test_unlabelled_samples_add_nothing(example):
    task, targets, outputs = example.task, example.targets, example.outputs(0)
    known = tuple(tensor[:-1] for tensor in output_tensors(outputs))
    known = known[0] if len(known) == 1 else known
    assert task.loss(outputs, targets).item() == pytest.approx(task.loss(known, targets[:-1]).item(), rel=1e-6)
    hidden = torch.from_numpy(task.hide_targets(targets.numpy()))
    nothing = task.loss(outputs, hidden)
    nothing.backward()
    assert nothing.item() == 0
    assert all(not tensor.grad.any() for tensor in output_tensors(outputs))
    assert task.unlabelled(hidden).all() and not task.unlabelled(targets[:-1]).any()


def test_the_losses_of_samples_are_what_the_loss_is_the_mean_of(example):
    losses = example.task.sample_losses(example.outputs(0), example.targets)
    assert losses.shape == (COUNT,) and losses[:-1].isfinite().all() and losses[-1] == torch.inf
    expected = example.task.loss(example.outputs(0), example.targets).item()
    assert losses[:-1].mean().item() == pytest.approx(expected, rel=1e-5)


def test_to_imitate_a_teacher_is_to_answer_as_it_does(example):
    teacher = example.outputs(1)
    same = example.outputs(1)
    loss = example.task.distill_loss(same, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(tensor.grad.abs().max() < 1e-3 for tensor in output_tensors(same) if tensor.grad is not None)
    other = example.outputs(2)
    gap = example.task.distill_loss(other, teacher)
    gap.backward()
    assert gap.item() > 1e-3 and any(tensor.grad.abs().sum() > 0 for tensor in output_tensors(other))


def test_a_teacher_fills_in_what_is_unknown_and_nothing_else(example):
    filled = example.task.fill_targets(example.targets, example.outputs(1))
    assert filled.shape == example.targets.shape and filled.dtype == example.targets.dtype
    assert torch.equal(filled[:-1], example.targets[:-1])
    assert not example.task.unlabelled(filled).any()


def test_accuracy_is_a_fraction_and_chance_is_less_than_certain(example):
    accuracy, chance = example.task.accuracy(example.outputs(0), example.targets), example.task.chance(CLASSES)
    assert 0 <= accuracy <= 1 and (chance is None or 0 < chance < 1)


def test_augmentation_moves_targets_with_the_images(example):
    """Where targets are maps of the image's size: pixels of a colour keep their value; other targets stay."""
    task, targets = example.task, example.targets
    images = torch.arange(80, dtype=torch.uint8).reshape(1, 8, 10, 1).expand(COUNT, 8, 10, 3)
    maps = targets.ndim == 4
    if maps:
        targets = (images[..., :1].permute(0, 3, 1, 2).float() + 1).expand_as(targets)
    same, kept = task.transform(images, targets, Augment(), np.random.default_rng(0))
    assert torch.equal(same, images) and torch.equal(kept.nan_to_num(), targets.nan_to_num())
    moved, after = task.transform(images, targets, Augment(crop=2, flip=True), np.random.default_rng(0))
    assert moved.shape == images.shape and moved.dtype == torch.uint8 and after.shape == targets.shape
    if maps:
        known = ~task.unlabelled(after)
        expected = (moved[..., :1].permute(0, 3, 1, 2).float() + 1).expand_as(after)
        assert torch.equal(after[known], expected[known]) and not torch.equal(moved, images) and not known.all()
    else:
        assert torch.equal(after.nan_to_num(), targets.nan_to_num())


def test_the_primary_metric_is_a_percentage_and_intervals_have_what_they_need(example):
    task, samples = example.task, dataclasses.replace(example.samples(), labels=example.targets.numpy())
    labelled = samples.subset(np.arange(COUNT - 1))
    metrics = task.metrics()
    assert task.primary_metric == next(iter(metrics))
    assert metrics[task.primary_metric].unit.startswith("%") and metrics[task.primary_metric].better == "higher"
    for name, metric in metrics.items():
        value = metric.compute(labelled)
        assert np.isfinite(value) and metric.summary and metric.unit and metric.min_calls == 0, name
        assert set(metric.inputs) <= set(Samples.__annotations__) - {"ns", "round"}, name
        assert np.isfinite(metric.compute(labelled.subset(np.arange(5)))), name  # as a jackknife leaves images out
        if metric.hits is not None:
            hits = metric.hits(labelled)
            assert hits.shape == (COUNT - 1,) and hits.dtype == bool, name
            assert 100 * hits.mean() == pytest.approx(value), name
    found = intervals(labelled, labelled.reference, tuple(metrics), 0, task=task)
    assert set(metrics) <= set(found) and all(i.low <= i.estimate <= i.high for i in found.values())
    assert ("accuracy_drop" in found) == (metrics[task.primary_metric].hits is not None)
    drop = accuracy_drop(dataclasses.replace(labelled, reference=labelled.outputs), task)
    assert drop.low <= 0 <= drop.high and drop.estimate == 0


def test_metrics_of_another_task_are_left_out(example):
    others = {name for name in plugins.names("metrics") if name not in example.task.metrics()}
    assert not compute_metrics(example.samples(), others, example.task)


def test_equal_outputs_agree_and_others_do_less(example):
    samples = example.samples()
    assert example.task.agreement(samples.outputs, samples.outputs) == 100
    assert 0 <= example.task.agreement(samples.outputs, samples.reference) < 100


def test_outputs_have_names_of_their_own_and_a_file_with_them_is_of_the_task(example):
    specs = example.task.outputs(CLASSES, SHAPE)
    assert specs and len({spec.name for spec in specs}) == len(specs)


def test_strata_are_the_classes_or_one(example):
    targets = example.targets.numpy()[:-1]
    strata = example.task.strata(targets)
    assert strata.shape == (COUNT - 1,) and len(np.unique(strata)) == example.task.num_strata(CLASSES)


@pytest.mark.parametrize("name", plugins.names("tasks"))
def test_a_task_is_frozen_settings_and_comes_back_from_json(name):
    task = plugins.load("tasks", name)()
    assert isinstance(task, Task) and type(task).__dataclass_params__.frozen
    assert serialization.from_json(Task, serialization.to_json(task)) == task
    assert task.primary_metric in primary_metrics()
    assert all(plugins.load("metrics", metric) is task.metrics()[metric] for metric in task.metrics())


def test_no_two_tasks_have_a_metric_of_one_name():
    names = [metric for name in plugins.names("tasks") for metric in plugins.load("tasks", name)().metrics()]
    assert len(set(names)) == len(names)


# --- a network with several outputs ---


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory):
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((COUNT, *SHAPE), np.float32)
    network, out = TwoHeads().eval(), tmp_path_factory.mktemp("two")
    return network, images, export(out, "net", network, images, ClassAndAngle().outputs(CLASSES, SHAPE), ExportConfig())


@pytest.mark.parametrize("opset", [13, 20])
def test_several_outputs_are_exported_under_the_names_of_the_task(opset, two_heads, tmp_path):
    network, images, _ = two_heads
    specs = ClassAndAngle().outputs(CLASSES, SHAPE)
    model = export(tmp_path, "net", network, images, specs, ExportConfig(opset=opset))
    for made, batch in ((model.single, 1), (model.dynamic, 0)):
        assert [(o.name, o.shape) for o in made.outputs] == [("class", (batch, CLASSES)), ("angle", (batch, 1))]
        assert ClassAndAngle().matches(made.outputs) and matching_task(made.outputs) is None


def test_several_outputs_of_a_file_are_those_of_torch_and_feed_the_metrics(two_heads):
    network, images, model = two_heads
    outputs = run_outputs(model.dynamic.file.path, images)
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in network(torch.from_numpy(images))]
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(outputs, expected, strict=True))
    task = ClassAndAngle()
    labels = np.stack([expected[0].argmax(1), expected[1][:, 0] + 0.5], 1)
    values = compute_metrics(Samples(NONE, NONE, outputs, outputs, labels), task.metrics(), task)
    assert values == pytest.approx({"class_top1": 100.0, "angle_mae": 0.5}, rel=1e-4)
    eval_set = EvalSet.of(model.dynamic.file.path, images, labels, task)
    assert eval_set.fp32_accuracy() == 100 and eval_set.evaluate(model.dynamic.file.path).accuracy_drop.estimate == 0


def test_a_network_with_other_outputs_than_the_task_is_refused(two_heads, tmp_path):
    network, images, _ = two_heads
    with pytest.raises(ExportError, match="answers 12 images with"):
        export(tmp_path, "net", network, images, Classification().outputs(CLASSES, SHAPE), ExportConfig())
    with pytest.raises(ExportError, match="answers 12 images with"):
        export(tmp_path, "net", nn.Conv2d(3, 4, 1), images, Regression().outputs(5, SHAPE), ExportConfig())


def test_parity_looks_at_every_output(two_heads, tmp_path):
    from edgekd.stages.export.export import compare

    _, images, model = two_heads
    first, second = run_outputs(model.dynamic.file.path, images)
    assert compare(model.dynamic.file.path, images, (first, second), 1e-4) < 1e-4
    with pytest.raises(ParityError):
        compare(model.dynamic.file.path, images, (first, second + 1), 1e-4)


def test_files_of_unknown_origin_are_matched_by_their_outputs(two_heads):
    _, images, model = two_heads
    assert matching_task(inspect.facts(model.single.file.path).outputs) is None
    assert matching_task([dataclasses.replace(model.single.outputs[0], name="scores")]) == Classification()
    assert matching_task([dataclasses.replace(model.single.outputs[0], shape=(1, 2, 8, 8))]) == Regression()
