"""What every method must keep, whatever it does inside. New files in methods/ are found by themselves."""

import dataclasses
import json
import shutil

import pytest
import torch
from torch.nn.utils import parametrize

from edgekd.core import plugins
from edgekd.core.augment import Augment
from edgekd.core.method import Method, TrainingContext, run_phases
from edgekd.methods.kd import KD
from edgekd.stages.distill.distill import PhaseRunner
from edgekd.stages.distill.setup import TrainingPlan, build_trainer
from edgekd.tasks.classification import Classification
from edgekd.training.architecture_diff import apply_diff, diff_architectures
from edgekd.training.trainer import TrainConfig, freeze
from tests import zoo

EPOCHS = 5
# where a method cannot do with its defaults and a lesson between two toys
SETTINGS = {"kpn": {"receptive_tolerance": 0.5}, "assistant": {"assistants": (zoo.ToyFamily(3),)}}
STUDENTS = {"fine_tune": lambda: zoo.Toy(4), "depth_dynamic": zoo.Staged, "blockwise": zoo.Staged}
TEACHERS = {"multi_teacher": 2}  # how many


def a_method(name):
    cls = plugins.load("methods", name)
    nested = {f.name: KD() for f in dataclasses.fields(cls) if f.type == "Method"}
    return cls(**nested, **SETTINGS.get(name, {}))


class MethodRun:
    """A method with toy networks and a trainer, from the same seed each time."""

    def __init__(self, name, home, watch=None):
        self.name = name
        torch.manual_seed(0)
        course = TrainingPlan(EPOCHS, TrainConfig(batch=16, precision="fp32"), Augment(1, True), seed=0)
        self.trainer = build_trainer(zoo.blobs_dataset(home / "data"), course, torch.device("cpu"))
        student = STUDENTS.get(name, lambda: zoo.Toy(2))()
        teachers = tuple(zoo.Toy(4) for _ in range(TEACHERS.get(name, 1)))
        self.ctx = TrainingContext(
            student,
            teachers,
            EPOCHS,
            zoo.CLASSES,
            self.trainer.first_batches,
            Classification(),
            build=lambda model: model.build(zoo.CLASSES, 1),
            quant_spec=lambda network: zoo.drafted(home / "draft", network),
        )
        self.work = home / "work"
        self.watch = watch

    def train(self):
        freeze(self.ctx)
        played = PhaseRunner(self.work, self.trainer, self.ctx, self.name)
        self.records = played.records
        run = played.run if self.watch is None else lambda phase: self.watch(phase, played.run)
        with played.progress():
            return run_phases(a_method(self.name).phases(self.ctx), run)


@pytest.fixture(params=plugins.names("methods"))
def name(request):
    return request.param


def same_function(rebuilt, student):
    """Whether a network that was built again takes the student's weights, and answers as it does."""
    rebuilt.load_state_dict(student.state_dict())
    x = torch.randn(2, 1, 8, 8)
    return torch.allclose(rebuilt.eval()(x), student.eval()(x), atol=1e-5)  # memory formats round otherwise


def state(students):
    return {f"{n}.{k}": v.clone() for n, m in students.items() for k, v in m.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_keeps_to_the_epoch_budget(name, tmp_path):
    room = MethodRun(name, tmp_path)
    room.train()
    assert 0 < sum(r.epochs for r in room.records) <= EPOCHS


def test_teaches_something(name, tmp_path):
    room = MethodRun(name, tmp_path)
    before = state({"student": room.ctx.student})
    assert not same(before, state(room.train()))


def test_leaves_teachers_untouched(name, tmp_path):
    room = MethodRun(name, tmp_path)
    before = state({"t": room.ctx.teachers[0]})
    room.train()
    assert same(before, state({"t": room.ctx.teachers[0]}))


def test_students_hold_nothing_of_the_method(name, tmp_path):
    for student in MethodRun(name, tmp_path).train().values():
        for module in student.modules():
            assert not type(module).__module__.startswith("edgekd.methods"), module
            assert not parametrize.is_parametrized(module), module
            assert not module._forward_hooks, module
        built = STUDENTS.get(name, lambda: zoo.Toy(2))()
        assert same_function(apply_diff(built, diff_architectures(built, student)), student)


@pytest.mark.parametrize("lost", ["the last phase", "the last epoch"])
def test_interrupted_and_resumed_is_the_same_as_uninterrupted(name, lost, tmp_path):
    whole = MethodRun(name, tmp_path / "whole")
    want = state(whole.train())
    part = MethodRun(name, tmp_path / "part")
    if lost == "the last phase":
        for slot in sorted(whole.work.iterdir())[:-1]:
            shutil.copytree(slot, part.work / slot.name)
    else:
        stop_before_the_last_epoch(part)
    again = MethodRun(name, tmp_path / "part")
    assert same(want, state(again.train()))
    keep = ("name", "epochs", "losses", "accuracy")
    assert [{k: getattr(r, k) for k in keep} for r in whole.records] == [
        {k: getattr(r, k) for k in keep} for r in again.records
    ]


def stop_before_the_last_epoch(room):
    """As a kill between two epochs would: what was saved stays, the rest is lost."""
    real, left = room.trainer.epoch, [EPOCHS - 1]

    def epoch(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args)

    room.trainer.epoch = epoch
    with pytest.raises(KeyboardInterrupt):
        room.train()
    assert list(room.work.rglob("epoch.pt")) or left[0] == 0


def test_a_phase_changes_only_what_it_trains(name, tmp_path):
    room = MethodRun(name, tmp_path)

    def watched(phase, run):
        mine = {id(t) for m in phase.trains for t in (*m.parameters(), *m.buffers())}
        models = (room.ctx.student, *room.ctx.teachers)
        others = [t for m in models for t in (*m.parameters(), *m.buffers()) if id(t) not in mine]
        before = [t.detach().clone() for t in others]
        outcome = run(phase)
        assert all(torch.equal(a, b) for a, b in zip(before, others, strict=True)), phase.name
        return outcome

    room.watch = watched
    room.train()


def test_notes_are_plain_json(name, tmp_path):
    room = MethodRun(name, tmp_path)
    notes = {}
    room.ctx = dataclasses.replace(room.ctx, log_choice=notes.__setitem__)
    room.train()
    assert json.loads(json.dumps(notes)) == notes


def test_is_a_frozen_dataclass_of_settings(name):
    cls = plugins.load("methods", name)
    assert issubclass(cls, Method)
    assert cls.__dataclass_params__.frozen
