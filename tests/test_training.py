"""Training: the schedule, a loss that is not finite, checkpoints that fit or are refused."""

import importlib
import pickle
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from edgekd.core.artifact import File
from edgekd.core.augment import Augment
from edgekd.core.method import Method, Phase, TrainingContext
from edgekd.core.model import Model
from edgekd.errors import CheckpointError, ConfigError, DataError, TrainingError
from edgekd.methods.supervised import Supervised
from edgekd.models.python import Python
from edgekd.models.resnet import ResNet
from edgekd.stages.distill.distill import distill, load_pretrained, log_teacher_accuracy
from edgekd.stages.distill.setup import TrainingPlan, build_trainer, check_outputs
from edgekd.tasks.classification import Classification
from edgekd.training import checkpoint
from edgekd.training.losses import kd_loss
from edgekd.training.trainer import TrainConfig, all_finite, divergence_error
from tests import zoo


def test_the_rate_rises_linearly_then_falls_as_a_cosine_to_zero():
    config = TrainConfig(lr=0.4, warmup_fraction=0.2)
    assert config.lr_at(0.1) == pytest.approx(0.2)
    assert config.lr_at(0.2) == pytest.approx(0.4)
    assert config.lr_at(0.6) == pytest.approx(0.2)
    assert config.lr_at(1.0) == pytest.approx(0.0)


def test_softened_logits_by_hand():
    # T = 2: teacher (0, 2 ln 3) -> (1/4, 3/4), student (0, 0) -> (1/2, 1/2)
    teacher = torch.tensor([[0.0, 2 * torch.log(torch.tensor(3.0)).item()]])
    want = 4 * (0.25 * torch.log(torch.tensor(0.5)) + 0.75 * torch.log(torch.tensor(1.5)))
    assert kd_loss(torch.zeros(1, 2), teacher, 2.0).item() == pytest.approx(want.item(), rel=1e-5)


class Exploding(Method):
    def phases(self, ctx):
        student = ctx.student

        def loss(batch):
            return {"task": student(batch.images).sum() * (float("nan") if batch.progress > 0.5 else 1e-6)}

        yield Phase("explode", trains=(student,), loss=loss, epochs=ctx.epochs)
        return {"student": student}


def test_a_loss_that_is_not_finite_stops_and_keeps_finished_epochs(tmp_path):
    dataset = zoo.blobs_dataset(tmp_path / "data")
    course = TrainingPlan(4, TrainConfig(batch=16, precision="fp32"), Augment(), 0)
    with pytest.raises(TrainingError) as error:
        distill(tmp_path, "s", dataset, ResNet(8, 4), Exploding(), course, ())
    assert "loss `task` is not finite in phase `explode`, epoch 3, step 2 (task nan)" in str(error.value)
    assert "lower train.lr" in error.value.hint
    assert list(tmp_path.rglob("epoch.pt"))


@dataclass(frozen=True)
class Steep(Method):
    """Losses that are finite; the root's slope at 0 is not, and dropout leaves it out of some steps."""

    tame: bool = False

    def phases(self, ctx):
        student = ctx.student

        def loss(batch):
            answer = student(batch.images)
            chosen = torch.nn.functional.dropout(torch.ones(()), 0.8)
            root = (answer - answer.detach()).abs().sum() * chosen + (1.0 if self.tame else 1 - chosen / 5)
            return {"task": 1e-6 * answer.square().mean(), "root": root.sqrt(), "other": 1e-6 * answer.sum()}

        yield Phase("climb", trains=(student,), loss=loss, epochs=ctx.epochs)
        return {"student": student}


def test_a_gradient_that_is_not_finite_stops_before_it_is_learnt_and_names_its_loss(tmp_path):
    dataset = zoo.blobs_dataset(tmp_path / "data")
    course = TrainingPlan(4, TrainConfig(batch=16, precision="fp32"), Augment(), 0)
    with pytest.raises(TrainingError) as error:
        distill(tmp_path / "s", "s", dataset, ResNet(8, 4), Steep(), course, ())
    assert "the gradient of loss `root` is not finite in phase `climb`, epoch 1, step" in error.value.what
    assert "nan" not in error.value.what and "root or logarithm of 0" in error.value.hint
    distill(tmp_path / "t", "t", dataset, ResNet(8, 4), Steep(tame=True), course, ())


def test_all_losses_that_are_not_finite_are_named():
    one, nan = torch.tensor(1.0), torch.tensor(float("nan"))
    said = divergence_error(
        ["a", "c"], {"a": nan, "b": one, "c": nan}, "phase `p`, epoch 1, step 1", gradient=False
    ).what
    assert said == "losses `a`, `c` are not finite in phase `p`, epoch 1, step 1 (a nan, b 1, c nan)"
    said = divergence_error(["a", "b"], {"a": one, "b": one}, "phase `p`, epoch 1, step 1", gradient=True).what
    assert said.startswith("the gradients of losses `a`, `b` are not finite in phase `p`")
    assert (
        divergence_error([], {"a": one}, "w", gradient=True).what
        == "the gradient of the sum of losses is not finite in w (a 1)"
    )


def test_a_gradient_whose_norm_overflows_is_finite_yet():
    assert all_finite([torch.full((9,), 1e38), None]) and all_finite([])
    assert not all_finite([torch.ones(3), torch.tensor([1.0, float("inf")])])


def a_net():
    return ResNet(8, 4).build(3, 1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_a_state_dict_is_found_however_it_is_wrapped(wrap, tmp_path):
    source, other = a_net(), a_net()
    torch.save(wrap(source.state_dict()), tmp_path / "c.pt")
    checkpoint.load(other, tmp_path / "c.pt")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), other.parameters(), strict=True))


def test_weights_survive_safetensors(tmp_path):
    source, other = a_net().to(memory_format=torch.channels_last), a_net()
    checkpoint.save(source, tmp_path / "w.safetensors")
    checkpoint.load(other, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), other.parameters(), strict=True))


class Payload:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    with (tmp_path / "evil.pt").open("wb") as stream:
        pickle.dump({"state_dict": Payload(tmp_path / "harm")}, stream, protocol=2)
    with pytest.raises(CheckpointError):
        checkpoint.load(a_net(), tmp_path / "evil.pt")
    torch.save({"x": Payload(tmp_path / "harm")}, tmp_path / "evil2.pt")
    with pytest.raises(CheckpointError, match="would run code") as error:
        checkpoint.load(a_net(), tmp_path / "evil2.pt")
    assert "allow_pickle: true" in error.value.hint
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: ResNet(8, 4).build(100, 1).state_dict(), "`head.weight` is (100, 16), the network's is (3, 16)"),
        (lambda: {k: v for k, v in a_net().state_dict().items() if k != "head.bias"}, "lacks `head.bias`"),
        (lambda: a_net().state_dict() | {"more": torch.ones(1)}, "has `more`, which the network lacks"),
        (lambda: {"epoch": 3}, "holds no state dict"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(content, says, tmp_path):
    torch.save(content(), tmp_path / "c.pt")
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(a_net(), tmp_path / "c.pt")
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
def test_a_file_that_is_no_checkpoint_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError):
        checkpoint.load(a_net(), tmp_path / name)
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        checkpoint.load(a_net(), tmp_path / f"no-{name}")


def a_context(tmp_path, student, teachers=()):
    dataset = zoo.blobs_dataset(tmp_path)
    trainer = build_trainer(dataset, TrainingPlan(1, TrainConfig(precision="fp32"), Augment(), 0), torch.device("cpu"))
    return TrainingContext(student, teachers, 1, 3, trainer.first_batches, Classification()), dataset


def test_a_teacher_with_other_classes_is_named(tmp_path):
    ctx, dataset = a_context(tmp_path, a_net(), (ResNet(8, 4).build(7, 1),))
    with pytest.raises(ConfigError, match=r"the teacher .* \(2, 7\)"):
        check_outputs(ctx, dataset, [3])
    check_outputs(ctx, dataset, [7])


def test_a_teacher_of_ones_own_is_adopted(tmp_path):
    dataset = zoo.blobs_dataset(tmp_path)
    torch.save(zoo.Toy(4).state_dict(), tmp_path / "toy.pt")
    made = load_pretrained(
        tmp_path, "t", dataset, Python("tests.zoo:Toy", {"width": 4}), File.of(tmp_path / "toy.pt"), False
    )
    assert made.weights.parameters == sum(p.numel() for p in zoo.Toy(4).parameters())


@pytest.mark.parametrize(("accuracy", "warns"), [(0.34, True), (0.46, True), (0.47, False), (None, False)])
def test_an_adopted_teacher_that_guesses_is_told_at_once(accuracy, warns, tmp_path, caplog):
    """Three classes: chance is a third, and a fifth of the rest is 13.3 points."""
    caplog.set_level("INFO")
    dataset = zoo.blobs_dataset(tmp_path)
    assert len(dataset.classes) == 3
    torch.save(zoo.Toy(4).state_dict(), tmp_path / "toy.pt")
    made = load_pretrained(
        tmp_path, "t", dataset, Python("tests.zoo:Toy", {"width": 4}), File.of(tmp_path / "toy.pt"), False
    )
    log_teacher_accuracy(replace(made, weights=replace(made.weights, valid_accuracy=accuracy)), dataset)
    assert ("near chance; check `normalize`" in caplog.text) == warns
    assert ("(pretrained)" in caplog.text) == (accuracy is not None)


@pytest.mark.parametrize(
    ("function", "args", "says"),
    [
        ("nowhere.at_all:f", {}, "there is no Python module `nowhere.at_all`"),
        ("tests.zoo:Toyy", {}, "`tests.zoo` has no function `Toyy`"),
        ("tests.zoo:Blobs", {"count": 3}, "`tests.zoo:Blobs` returned Blobs"),
        ("tests.zoo:Toy", {"widht": 4}, "hint: it is Toy(width: 'int' = 4)"),
        ("tests.zoo:Toy", {"width": "wide"}, "`tests.zoo:Toy` cannot be called with args {'width': 'wide'}"),
        (":Toy", {}, "write package.module:function"),
        ("sys:exit", {}, "there is no Python module `sys`"),
    ],
)
def test_a_function_that_makes_no_network_is_named(function, args, says):
    with pytest.raises(ConfigError) as error:
        Python(function, args).build(3, 1)
    assert says in str(error.value)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A folder of the user's own code, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import not_installed_anywhere", "No module named 'not_installed_anywhere'"),
        ("from torch import nothing_of_the_kind", "cannot import name"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(code, text, says):
    (code / "own_broken.py").write_text(text)
    (code / "own_package").mkdir()
    (code / "own_package" / "__init__.py").write_text(text)
    (code / "own_package" / "net.py").write_text("")
    for module in ("own_broken", "own_package.net"):
        with pytest.raises(ConfigError, match=f"`{module}` cannot be imported: .*{says}") as error:
            Python(f"{module}:f").build(3, 1)
        assert error.value.hint


def test_an_edited_helper_of_ones_own_code_is_seen(code):
    (code / "own_net.py").write_text("import own_layers")
    (code / "own_layers.py").write_text("")
    (code / "own_nets" / "parts").mkdir(parents=True)
    for name in ("__init__", "parts/__init__", "parts/layers", "net"):
        (code / "own_nets" / f"{name}.py").write_text("")
    for function, helper in (("own_net:f", "own_layers.py"), ("own_nets.net:f", "own_nets/parts/layers.py")):
        before = Python(function).fingerprint()
        assert Python(function).fingerprint() == before
        (code / helper).write_text("WIDTH = 3")
        assert Python(function).fingerprint() != before


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.module = torch.nn.Linear(4, 4)
        self.other = torch.nn.Linear(4, 4)
        self.other.weight = self.module.weight


def test_tied_weights_and_parts_called_module_survive(tmp_path):
    source, other = Tied(), Tied()
    checkpoint.save(source, tmp_path / "w.safetensors")
    checkpoint.load(other, tmp_path / "w.safetensors")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in source.state_dict().items())


def test_a_trusted_checkpoint_whose_class_is_gone_is_named(code):
    (code / "own_gone.py").write_text("class Gone:\n    pass\n")
    torch.save({"x": importlib.import_module("own_gone").Gone()}, code / "c.pt")
    (code / "own_gone.py").write_text("")
    importlib.reload(sys.modules["own_gone"]).__dict__.pop("Gone")
    with pytest.raises(CheckpointError, match="holds objects whose code cannot be imported"):
        checkpoint.load(a_net(), code / "c.pt", allow_pickle=True)
    del sys.modules["own_gone"]
    (code / "own_gone.py").unlink()
    with pytest.raises(CheckpointError, match="holds objects whose code cannot be imported"):
        checkpoint.load(a_net(), code / "c.pt", allow_pickle=True)


def test_more_labels_than_there_are_is_refused(tmp_path):
    dataset = zoo.blobs_dataset(tmp_path / "data")
    course = TrainingPlan(1, TrainConfig(), Augment(), 0, labels_per_class=99)
    with pytest.raises(DataError, match="labels_per_class is 99, but class number 0 has 16 training images"):
        distill(tmp_path, "s", dataset, ResNet(8, 4), Supervised(), course, ())


def test_a_family_of_networks_is_settings_only():
    assert issubclass(ResNet, Model)
    with pytest.raises(ConfigError, match="which no ResNet of the CIFAR family has"):
        ResNet(depth=9)
