"""What each method minimises, with odd weights, against NumPy; settings that make no sense; standardised logits."""

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from edgekd.core import plugins
from edgekd.core.method import Batch, Method, PhaseResult, TrainingContext
from edgekd.errors import ConfigError
from edgekd.methods import multi_teacher
from edgekd.methods.blockwise import Blockwise
from edgekd.methods.channel_planting import ChannelPlanting
from edgekd.methods.depth_dynamic import DepthDynamic
from edgekd.methods.dist import DIST
from edgekd.methods.dkd import DKD
from edgekd.methods.fitnet import FitNet
from edgekd.methods.kd import KD
from edgekd.methods.kpn import KPN, Route
from edgekd.methods.multi_teacher import MultiTeacher, TeacherGate
from edgekd.methods.quant_aware import QuantAware
from edgekd.methods.sparse_match import SparseMatch
from edgekd.methods.supervised import Supervised
from edgekd.tasks.classification import Classification
from edgekd.training.fake_quant import FakeQuantModel
from edgekd.training.losses import kd_loss, standardize
from tests import zoo

COUNT = 6
PROGRESS = 0.25
ROUTES = (Route("stage2.1", "stage2.1"),)  # in front of the activation
T = 2.5


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_batch(progress=PROGRESS):
    return Batch(drawn(COUNT, 1, 8, 8), torch.arange(COUNT) % zoo.CLASSES, torch.arange(COUNT), progress)


def sharp(network):
    """A network whose answers differ by more than a little."""
    with torch.no_grad():
        network.head.weight.mul_(12)
    return network.eval()


def a_context(student=zoo.Toy, teachers=1, **changes):
    torch.manual_seed(0)
    nets = [sharp(build(width)) for build, width in ((student, 2), *((zoo.Toy, 4),) * teachers)]
    settings = {
        "epochs": 10,
        "num_classes": zoo.CLASSES,
        "first_batches": lambda count: iter([a_batch()]),
        "task": Classification(),
    } | changes
    return TrainingContext(nets[0], tuple(nets[1:]), **settings)


@torch.no_grad()
def phase_of(method, ctx, name):
    """The phase of that name; those before it leave everything as it is."""
    script = method.phases(ctx)
    phase = next(script)
    while phase.name != name:
        losses = {key: value.item() for key, value in phase.loss(a_batch()).items()}
        phase = script.send(PhaseResult(losses, None))
    return phase


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def standard(z):
    return (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True)


def divergence(q, p):
    return (q * np.log(q / p)).sum(1).mean()


@dataclass(frozen=True)
class Said:
    """What student and teachers answer to the batch, and the parts of losses that come of it."""

    own: np.ndarray
    teachers: list[np.ndarray]
    y: np.ndarray = field(default_factory=lambda: a_batch().labels.numpy())

    @classmethod
    @torch.no_grad()
    def of(cls, *networks):
        own, *teachers = (network(a_batch().images).double().numpy() for network in networks)
        return cls(own, teachers)

    def labels(self):
        return -np.log(softmax(self.own)[np.arange(COUNT), self.y]).mean()

    def soft(self, temperature=4.0, form=lambda z: z):
        p, q = (softmax(form(z) / temperature) for z in (self.own, self.teachers[0]))
        return temperature**2 * divergence(q, p)

    def decoupled(self, temperature):
        parts = []
        for z in (self.teachers[0], self.own):
            p = softmax(z / temperature)
            target = p[np.arange(COUNT), self.y][:, None]
            rest = np.array([np.delete(row, label) for row, label in zip(p, self.y, strict=True)])
            parts.append((np.hstack([target, 1 - target]), rest / rest.sum(1, keepdims=True)))
        return [temperature**2 * divergence(q, p) for q, p in zip(*parts, strict=True)]


PART = {"kd_weight": 0.3, "temperature": T}
MIXES = {
    "kd": (KD(**PART, ce_weight=0.45), "kd", lambda s: {"task": 0.45 * s.labels(), "kd": 0.3 * s.soft(T)}),
    "kd, labels with the rest": (KD(kd_weight=0.3), "kd", lambda s: {"task": 0.7 * s.labels(), "kd": 0.3 * s.soft()}),
    "kd, standardised": (
        KD(kd_weight=9.0, ce_weight=0.1, temperature=2.0, standardize_logits=True),
        "kd",
        lambda s: {"task": 0.1 * s.labels(), "kd": 9 * s.soft(2.0, standard)},
    ),
    "dkd": (
        DKD(temperature=T, alpha=0.3, beta=1.7, ce_weight=0.45, warmup_fraction=0.4),
        "dkd",
        lambda s: {
            "task": 0.45 * s.labels(),
            "target": PROGRESS / 0.4 * 0.3 * s.decoupled(T)[0],
            "others": PROGRESS / 0.4 * 1.7 * s.decoupled(T)[1],
        },
    ),
    "channel_planting": (
        ChannelPlanting(**PART),
        "base",
        lambda s: {
            "student:task": 0.7 * s.labels(),
            "student:kd": 0.3 * s.soft(T),
            "student:error": (s.own.argmax(1) != s.y).mean(),
        },
    ),
    "sparse_match": (
        SparseMatch(**PART, ce_weight=0.45),
        "kd",
        lambda s: {"task": 0.45 * s.labels(), "kd": 0.3 * s.soft(T)},
    ),
    "sparse_match, labels with the rest": (
        SparseMatch(),
        "kd",
        lambda s: {"task": 0.25 * s.labels(), "kd": 0.75 * s.soft()},
    ),
    "blockwise": (
        Blockwise(**PART),
        "fine-tune",
        lambda s: {"task": 0.7 * s.labels(), "kd": 0.3 * s.soft(T)},
    ),
}


@pytest.mark.parametrize("name", MIXES)
def test_losses_are_mixed_as_the_formulas_say(name):
    method, phase, formula = MIXES[name]
    ctx = a_context(zoo.Staged if isinstance(method, Blockwise) else zoo.Toy)
    loss = phase_of(method, ctx, phase).loss
    with torch.no_grad():
        got = {key: value.item() for key, value in loss(a_batch()).items()}
    assert got == pytest.approx(formula(Said.of(ctx.student, *ctx.teachers)), rel=1e-4)


def masked_gap(r, v, negative):
    """L_KP of (N, C, H, W) features as the docstring of kpn has it."""
    over = (0, 2, 3)
    level, own_level = r.mean(over, keepdims=True), v.mean(over, keepdims=True)
    spread, own_spread = (np.sqrt(f.var(over, ddof=1, keepdims=True)) for f in (r, v))
    form = np.where(r >= 0, 1, negative) * np.abs((r - level) / spread - (v - own_level) / own_spread)
    return form.mean() + 0.1 * ((np.abs(level - own_level) + np.abs(spread - own_spread)) / spread).mean()


@pytest.mark.parametrize("stage", ["project", "joint"])
@pytest.mark.parametrize("standardize_logits", [False, True])
def test_kpn_mixes_labels_answers_and_the_gap(stage, standardize_logits):
    ctx = a_context()
    method = KPN(
        routes=ROUTES,
        kd_weight=0.3,
        temperature=T,
        projection_weight=0.45,
        negative_weight=0.15,
        search_fraction=0.0,
        standardize_logits=standardize_logits,
    )
    phase = phase_of(method, ctx, stage)
    student, projection = phase.trains
    with torch.no_grad():
        got = phase.loss(a_batch())
        theirs, own = (net.stage2[:2](net.stage1(a_batch().images)) for net in (ctx.teachers[0], student))
        gap = masked_gap(projection(theirs).double().numpy(), own.double().numpy(), 0.15)
    said = Said.of(student, ctx.teachers[0])
    task = 0.7 * said.labels() + 0.3 * said.soft(T, standard if standardize_logits else lambda z: z)
    # in stage 1 summed over the channels of the student's layer; then lambda fades with progress
    want = {"stage2.1>stage2.1:task": task, "stage2.1>stage2.1:project": 4 * gap}
    if stage == "joint":
        want = {"task": task, "project": 0.45 * (1 - PROGRESS) * gap}
    assert {key: value.item() for key, value in got.items()} == pytest.approx(want, rel=1e-3)


def test_routes_of_kpn_are_compared_by_the_mean_over_channels():
    """Else a wide layer would look worse than a thin one."""
    ctx = a_context()
    method = KPN(routes=(*ROUTES, Route("stage1.1", "stage1.1")), projection_weight=0.45)
    notes = {}
    script = method.phases(dataclasses.replace(ctx, log_choice=notes.__setitem__))
    phase = next(script)
    asked = {"stage2.1>stage2.1:task": 1.0, "stage2.1>stage2.1:project": 8.0}  # of 4 channels: 1 + 0.45 * 2
    asked |= {"stage1.1>stage1.1:task": 1.0, "stage1.1>stage1.1:project": 5.0}  # of 2 channels: 1 + 0.45 * 2.5
    assert phase.loss(a_batch()).keys() == asked.keys()
    script.send(PhaseResult(asked, None))
    assert {route["student"]: route["losses"] for route in notes["routes"]} == {"stage2.1": [1.9], "stage1.1": [2.125]}
    assert [route["student"] for route in notes["routes"] if route["won"]] == ["stage2.1"]


def cosines(answers):
    """Of the angle at j between i and k."""
    made = np.zeros((COUNT,) * 3)
    for i, j, k in np.ndindex(made.shape):
        if i != j and k != j:
            a, b = answers[i] - answers[j], answers[k] - answers[j]
            made[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return made


@pytest.mark.parametrize("standardize_logits", [False, True])
def test_multi_teacher_mixes_labels_answers_angles_and_hints(standardize_logits):
    ctx, form = a_context(teachers=2), standard if standardize_logits else lambda z: z
    method = MultiTeacher(
        **PART, structure_weight=0.8, hint_weight=0.45, gate_fraction=0.5, standardize_logits=standardize_logits
    )
    phase = phase_of(method, ctx, "weigh")
    student, weighing, *regressors = phase.trains
    assert isinstance(weighing, TeacherGate) and len(regressors) == 2
    last = {}
    with torch.no_grad():
        got = {key: value.item() for key, value in phase.loss(a_batch()).items()}
        taken = [
            (
                number,
                multi_teacher.FeatureExtractor(student, r.student.path),
                multi_teacher.FeatureExtractor(teacher, r.teacher.path),
            )
            for number, (r, teacher) in enumerate(
                zip(multi_teacher.match_hint_layers(ctx, a_batch().images[:2]), ctx.teachers, strict=True)
            )
        ]
        for number, own, theirs in taken:
            ((own_map,), (known,)) = (list(taps(a_batch().images)[1].values()) for taps in (own, theirs))
            a, b = (f.double().flatten(1).numpy() for f in (regressors[number](own_map), known))
            a, b = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (a, b))
            last[f"hint{number + 1}"] = 0.45 * ((a - b) ** 2).sum(1).mean()
        weights = weighing(
            multi_teacher.FeatureExtractor(student, "stage3.1")(a_batch().images)[1]["stage3.1"].amax((2, 3))
        ).numpy()
    said = Said.of(student, *ctx.teachers)
    p = softmax(form(said.own) / T)
    q = sum(weights[:, n, None] * softmax(form(z) / T) for n, z in enumerate(said.teachers))
    off = np.abs(cosines(p) - cosines(q))
    want = {
        "task": 0.7 * said.labels(),
        "kd": 0.3 * T**2 * divergence(q, p),
        "structure": 0.8 * np.where(off < 1, off**2 / 2, off - 0.5).mean(),
        "weights": -np.log(q[np.arange(COUNT), said.y]).mean(),
    }
    assert got == pytest.approx(want | last, rel=2e-3)


@pytest.mark.parametrize("standardize_logits", [False, True])
def test_quant_aware_mixes_labels_and_answers_of_the_rounded_student(standardize_logits, tmp_path):
    ctx = a_context(quant_spec=lambda network: zoo.drafted(tmp_path, network))
    method = QuantAware(Supervised(), **PART, standardize_logits=standardize_logits)
    phase = phase_of(method, ctx, "int8")
    rounded = FakeQuantModel(ctx.student, ctx.quant_spec(ctx.student), a_batch().images)
    with torch.no_grad():
        got = {key: value.item() for key, value in phase.loss(a_batch()).items()}
    said = Said.of(rounded, ctx.teachers[0])
    want = {
        "student:task": 0.7 * said.labels(),
        "student:kd": 0.3 * said.soft(T, standard if standardize_logits else lambda z: z),
        "student:int8 accuracy": (said.own.argmax(1) == said.y).mean(),
    }
    assert got == pytest.approx(want, rel=1e-4)


def test_standardised_rows_are_those_of_numpy_whatever_their_scale():
    own, theirs = drawn(5, 4, seed=1), 3 * drawn(5, 4, seed=2) + 7
    np.testing.assert_allclose(standardize(theirs), standard(theirs.numpy()), rtol=1e-4, atol=1e-5)
    p, q = (softmax(standard(z.double().numpy()) / T) for z in (own, theirs))
    assert kd_loss(own, theirs, T, standardize_logits=True).item() == pytest.approx(T**2 * divergence(q, p), rel=1e-4)
    sizes = torch.tensor([0.5, 1.0, 3.0, 8.0, 20.0])[:, None]
    assert kd_loss(sizes * own - 4, theirs, T, True).item() == pytest.approx(T**2 * divergence(q, p), rel=1e-3)
    assert kd_loss(torch.ones(2, 3), theirs[:2, :3], T, True).isfinite(), "a row of equal logits has no scale"


def test_whatever_softens_logits_can_standardise_them():
    softening = [
        cls
        for cls in (plugins.load("methods", name) for name in plugins.names("methods"))
        if "temperature" in {f.name for f in dataclasses.fields(cls)}
    ]
    assert len(softening) >= 12
    for cls in softening:
        assert {f.name: f.default for f in dataclasses.fields(cls)}["standardize_logits"] is False, cls


@pytest.mark.parametrize(
    ("method", "phase", "copied"),
    [
        (KD(), "kd", {"kd"}),
        (DKD(), "dkd", {"target", "others"}),
        (DIST(), "dist", {"inter", "intra"}),
        (FitNet(), "finish", {"kd"}),
        (ChannelPlanting(), "base", {"student:kd"}),
        (Blockwise(), "blocks", {"kd"}),
        (Blockwise(), "fine-tune", {"kd"}),
        (SparseMatch(), "kd", {"kd"}),
        (KPN(routes=ROUTES, kd_weight=0.5), "joint", {"task"}),
        (DepthDynamic(num_subnets=1, teacher_weight=0.0), "depths", {"depth-1-1:full"}),
        (DepthDynamic(num_subnets=1, kd_weight=0.0), "depths", {"task", "depth-1-1:task"}),
        (MultiTeacher(), "teach", {"kd", "structure"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else "",
)
def test_standardising_changes_what_is_copied_and_nothing_else(method, phase, copied):
    found = []
    for each in (method, dataclasses.replace(method, standardize_logits=True)):
        staged = isinstance(method, (Blockwise, DepthDynamic))
        ctx = a_context(zoo.Staged if staged else zoo.Toy, 2 if isinstance(method, MultiTeacher) else 1)
        with torch.no_grad():
            found.append({k: v.item() for k, v in phase_of(each, ctx, phase).loss(a_batch()).items()})
    plain, other = found
    assert {key for key, value in plain.items() if value != other[key]} == copied


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (KD, "kd_weight"),
        (KD, "ce_weight"),
        (KD, "temperature"),
        (KPN, "projection_weight"),
        (KPN, "negative_weight"),
        (KPN, "temperature"),
        (KPN, "projection_weight_decay"),
        (SparseMatch, "kd_weight"),
        (SparseMatch, "ce_weight"),
        (SparseMatch, "temperature"),
        (SparseMatch, "pixel_weight"),
        (SparseMatch, "image_weight"),
        (SparseMatch, "atoms"),
        (DKD, "temperature"),
        (DIST, "temperature"),
        (DepthDynamic, "temperature"),
        (DepthDynamic, "subnet_weight"),
        (DepthDynamic, "kd_weight"),
        (DepthDynamic, "attention_weight"),
        (MultiTeacher, "temperature"),
        (MultiTeacher, "structure_weight"),
        (MultiTeacher, "hint_weight"),
        (ChannelPlanting, "temperature"),
        (Blockwise, "temperature"),
        (QuantAware, "temperature"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(cls, name, value):
    base = {"base": KD()} if cls is QuantAware else {}
    with pytest.raises(ConfigError, match=f"{name} is {value:g}") as caught:
        cls(**base, **{name: value})
    assert "use a " in caught.value.hint or "set `ce_weight`" in caught.value.hint


@pytest.mark.parametrize(
    "cls", [KD, KPN, SparseMatch, DKD, DIST, DepthDynamic, MultiTeacher, ChannelPlanting, Blockwise]
)
def test_a_temperature_of_0_is_refused(cls):
    with pytest.raises(ConfigError, match="temperature is 0") as caught:
        cls(temperature=0.0)
    assert "use a number above 0" in caught.value.hint


@pytest.mark.parametrize("cls", [KD, SparseMatch])
def test_a_weight_above_1_needs_one_for_the_labels(cls):
    with pytest.raises(ConfigError, match="ce_weight is -8") as caught:
        cls(kd_weight=9.0)
    assert "set `ce_weight`" in caught.value.hint
    assert cls(kd_weight=9.0, ce_weight=0.0).ce_weight == 0


def test_a_tolerance_below_0_is_refused():
    for value in (-0.1, float("nan")):
        with pytest.raises(ConfigError, match="receptive_tolerance is"):
            KPN(receptive_tolerance=value)
