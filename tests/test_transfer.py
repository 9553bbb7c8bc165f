"""A teacher may know other classes than its student learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekd.config import BuildConfig, StudentConfig, TeacherConfig, load_config
from edgekd.core.augment import Augment
from edgekd.core.dataset import SplitArrays
from edgekd.core.method import TrainingContext
from edgekd.core.step_cache import StepCache
from edgekd.data.folder import Folder
from edgekd.errors import ConfigError, DataError
from edgekd.methods.channel_planting import ChannelPlanting
from edgekd.methods.fine_tune import FineTune
from edgekd.methods.fitnet import FitNet
from edgekd.methods.kd import KD
from edgekd.methods.kpn import KPN, Route
from edgekd.methods.multi_teacher import MultiTeacher
from edgekd.methods.supervised import Supervised
from edgekd.models.resnet import ResNet
from edgekd.pipelines.build import build, distill_only, prepare_datasets
from edgekd.pipelines.run import Run
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.distill.setup import TrainingPlan, class_columns, select_images
from edgekd.stages.quantize.calibration_set import CalibrationConfig
from edgekd.targets.cpu import Cpu
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression
from edgekd.training.feature_method import LayerPair
from edgekd.training.teachers import teacher_class_logits, teacher_logits
from edgekd.training.trained_model import TrainedModel
from edgekd.training.trainer import TrainConfig
from tests.pictures import write_folder

QUICK = TrainConfig(batch=16, precision="fp32")


def trained(*classes):
    return TrainedModel(None, None, classes, 1)


def test_what_a_teacher_knows_is_told_by_the_names_of_classes():
    assert class_columns(("cat", "dog"), [("cat", "dog")]) == ()
    assert class_columns(("cat", "dog"), [("dog", "fox", "cat"), ("cat", "dog")]) == ((2, 0), (0, 1))
    assert class_columns(("cat", "dog"), [("", "", "")]) == ((None, None),)


def a_context(teacher_knows, task=None):
    torch.manual_seed(0)
    teachers = (torch.nn.Flatten(),)
    return TrainingContext(
        torch.nn.Flatten(), teachers, 1, 2, None, task or Classification(), class_columns=teacher_knows
    )


def test_answers_are_put_into_the_order_of_the_students_classes():
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert teacher_logits(a_context(((2, 0),)))(x).tolist() == [[3.0, 1.0]]
    assert teacher_logits(a_context(()))(x).tolist() == x.tolist()


def test_answers_for_other_classes_cannot_be_copied():
    with pytest.raises(ConfigError, match="the teacher knows 1 of the 2 classes"):
        teacher_logits(a_context(((2, None),)))
    with pytest.raises(ConfigError, match="class logits"):
        teacher_class_logits(a_context((), task=Regression()))


def test_unlabelled_images_are_mixed_in_beside_the_labelled():
    train = SplitArrays(np.zeros((12, 2, 2, 1), np.uint8), np.arange(12) % 3)
    course = TrainingPlan(1, QUICK, Augment(), 0, labels_per_class=1, unlabelled=5)
    mixed = select_images(train, course, Classification())
    assert sorted(mixed.labels.tolist()) == [-1, -1, -1, -1, -1, 0, 1, 2]
    with pytest.raises(DataError, match="only 9 training images are left"):
        select_images(train, TrainingPlan(1, QUICK, Augment(), 0, labels_per_class=1, unlabelled=10), Classification())


def test_few_labelled_images_are_repeated_up_to_their_share():
    train = SplitArrays(np.arange(48, dtype=np.uint8).reshape(12, 2, 2, 1), np.arange(12) % 3)
    course = TrainingPlan(1, QUICK, Augment(), 0, labels_per_class=1, unlabelled=6, labelled_fraction=0.4)
    mixed = select_images(train, course, Classification())
    labelled = mixed.labels >= 0
    assert len(mixed.labels) == 10 and set(mixed.labels[labelled].tolist()) == {0, 1, 2}
    assert labelled.sum() == 4 and len(np.unique(mixed.images[labelled], axis=0)) == 3


def test_pixels_within_a_factor_of_1_25_are_right():
    answer = torch.tensor([1.0, 1.2, 1.3, -1.0, 5.0])
    truth = torch.tensor([1.0, 1.0, 1.0, 1.0, float("nan")])
    assert Regression().accuracy(answer, truth) == 0.5


def a_config(root, method, **teacher):
    def some(*only):
        return Folder(str(root), valid_fraction=0.25, crop=1, only=only)

    return BuildConfig(
        name="transfer",
        data=some("b", "c"),
        teacher=TeacherConfig(ResNet(8, 4), epochs=1, train=QUICK, **({"data": some("a", "c", "d")} | teacher)),
        student=StudentConfig(ResNet(8, 4), method, epochs=3, train=QUICK),
        targets=(Cpu(),),
        calibration=CalibrationConfig(images=4),
        bench=BenchConfig(rounds=3, calls_per_round=4, warmup_s=0.01, metrics=("top1", "agreement", "p50_ms")),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"), "abcd")


def test_a_student_learns_from_a_teacher_of_other_classes(root, tmp_path):
    record = build(a_config(root, KPN(receptive_tolerance=1.0)), tmp_path / "out", tmp_path / "calib", "")
    assert record.data.classes == ("b", "c")
    teacher, *students = record.benches[0].measurements
    assert "top1" not in teacher.metrics, "the teacher answers for other classes"
    assert all("top1" in m.metrics for m in students)
    assert teacher.speedup is None and all(m.speedup for m in students)
    assert (tmp_path / "out" / "report.html").exists()


def test_inputs_are_scaled_as_the_teacher_learnt_them(root, tmp_path):
    dataset, (taught,) = prepare_datasets(Run(a_config(root, KD()), StepCache(tmp_path)))
    assert (dataset.mean, dataset.std) == (taught.mean, taught.std)
    assert taught.classes == ("a", "c", "d")


def test_methods_that_copy_answers_say_that_they_cannot(root, tmp_path):
    with pytest.raises(ConfigError, match="the teacher knows 1 of the 2 classes"):
        distill_only(a_config(root, KD()), tmp_path)


def test_the_big_teacher_is_fine_tuned(root, tmp_path):
    fine, *_ = distill_only(a_config(root, FineTune()), tmp_path)[1:]
    assert [p.name for p in fine.phases] == ["head", "all"]


def test_a_checkpoint_of_other_classes_needs_no_data(root, tmp_path):
    torch.save(ResNet(8, 4).build(7, 3).state_dict(), tmp_path / "t.pt")
    config = a_config(root, FineTune(), checkpoint=str(tmp_path / "t.pt"), data=None, num_classes=7)
    teacher, *_ = distill_only(config, tmp_path / "out")
    assert teacher.valid_accuracy is None


def test_a_build_with_one_target_twice_is_refused(root, tmp_path):
    config = replace(a_config(root, Supervised()), targets=(Cpu(), Cpu()))
    with pytest.raises(ConfigError, match="a target is there twice"):
        build(config, tmp_path / "out", tmp_path / "calib", "")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (MultiTeacher(), "the method needs 2 teacher"),
        (FitNet(layers=(LayerPair("stage2.0", "stage9.0"),)), "has no layer `stage9.0`"),
        (KPN(routes=(Route("stage3.0", "stage1.0"),)), "sizes"),
        (ChannelPlanting(max_ms=1e-6), "ms already"),
    ],
)
def test_what_a_method_refuses_is_refused_before_any_training(tmp_path, method, says):
    config = load_config("digits", (), (), True)
    config = replace(config, student=replace(config.student, method=method, baselines=()))
    with pytest.raises(ConfigError, match=says):
        distill_only(config, tmp_path)
    assert not list((tmp_path / "steps").glob("teacher-*"))


def test_a_method_that_needs_labels_sees_equally_many_images():
    course = TrainingPlan(11, QUICK, Augment(), 0, labels_per_class=500, unlabelled=40000)
    assert replace(course, epochs=99, unlabelled=0) == course.labelled(10)
    half = TrainingPlan(3, QUICK, Augment(), 0, labels_per_class=2, unlabelled=8, labelled_fraction=0.5)
    assert replace(half, epochs=12, unlabelled=0, labelled_fraction=0.0) == half.labelled(2)
    all_labelled = TrainingPlan(3, QUICK, Augment(), 0, labels_per_class=2)
    assert all_labelled.labelled(2) is all_labelled
    assert Supervised.LABELS_ONLY and FineTune.LABELS_ONLY and not KD.LABELS_ONLY
