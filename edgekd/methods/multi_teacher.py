"""multi_teacher: several teachers whose outputs are weighted for each image, each with a hint for another layer.

Adaptive multi-teacher multi-level distillation, AMTML-KD (Liu, Zhang, Wang, 2020, arXiv 2103.04062). With b the
student's last map, its maximum over each channel, z_t the logits of teacher t, and learned theta_t and W:

    w = softmax over t of (b * theta_t) W                      weights of the teachers for one image
    q = sum_t w_t softmax(z_t / T)                             the ensemble's probabilities
    L = (1 - kd_weight) CE(y, student) + kd_weight T^2 KL(q || p)    p = softmax(z_s / T)
        + structure_weight mean Huber(angles of p - angles of q)     angle at j of each three images i, j, k of a batch
        + hint_weight sum_t |n(R_t v_t) - n(f_t)|^2                  n: a sample's map divided by its norm
        + CE(y, q)                                                   the only loss of theta and W

where the 1x1 convolution R_t takes a student map v_t to the channels of a map f_t of teacher t. Each teacher has a
hint for another layer: the first for a shallow one, the last for the deepest; f_t has the size of v_t and the nearest
receptive field. Phase `weigh` trains the student, theta, W and the R_t together; phase `teach` keeps theta and W fixed.

Of a regression q is the weighted mean of the maps, CE and KL are mean absolute errors, and the angles are those of
whole maps. A teacher that lacks some of the classes is not in q and only gives its hint.

Deviations from the paper, and why:
- theta and W learn from how well q fits the labels; q is detached elsewhere, and so is b. In the paper they learn from
  the whole of L, which is smallest where they trust the teacher that the student already resembles. Measured on toys
  with a trained and a random teacher: the random one had 61 to 100 % of the weight, with labels less than 1 %.
- The term 0.1 (|W|^2 + |theta|^2) is left out: with it the weights stay equal (47 and 53 % there). The trainer's
  weight decay applies to theta and W as to everything.
- KL is summed over classes; in the authors' code its mean over elements is weaker by their number, in turn doubled.
- Angles compare p and q, probabilities on both sides (the code: logarithms on one). Its distance term is left out.
- The order of teachers and layers, and the weight of the hints, are not known; the numbers here are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.core.task import Task
from edgekd.errors import ConfigError
from edgekd.training.feature_hooks import FeatureExtractor
from edgekd.training.layer_discovery import LayerInfo, cut_layers
from edgekd.training.layer_matching import LayerMatch
from edgekd.training.losses import check_fractions, check_temperature, check_weights, standardize
from edgekd.training.teachers import class_columns, get_teacher, teacher_logits

REPORTED = 8  # batches over which weights are averaged for the report
TINY = 1e-8


@dataclass(frozen=True)
class MultiTeacher(Method):
    """Settings of distillation from several teachers."""

    kd_weight: float = 0.7  # of the ensemble; labels have the rest
    temperature: float = 5.0
    structure_weight: float = 1.0  # of the angles
    hint_weight: float = 1.0
    gate_fraction: float = 0.4  # of the budget, in which the weights of the teachers are learned
    standardize_logits: bool = False  # of the student and the teachers

    def __post_init__(self) -> None:
        check_fractions(kd_weight=self.kd_weight, gate_fraction=self.gate_fraction)
        check_weights(structure_weight=self.structure_weight, hint_weight=self.hint_weight)
        check_temperature(self.temperature, 5)

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        get_teacher(ctx, 1)  # at least two
        members = self.members(ctx)
        x = next(ctx.first_batches(1)).images[:2]
        last = last_map(ctx.student, x)
        hints = match_hint_layers(ctx, x) if self.hint_weight else []
        ensemble = TeacherEnsemble(ctx, members, hints, self)
        student = FeatureExtractor(ctx.student, *{last.path, *(h.student.path for h in hints)})
        gate = TeacherGate(last.channels, len(members)).to(x.device)
        regressors = [nn.Conv2d(h.student.channels, h.teacher.channels, 1).to(x.device) for h in hints]

        def loss(batch: Batch, train_gate: bool) -> Losses:
            outputs, teacher_maps = ensemble(batch.images)
            logits, features = student(batch.images)
            mean = weighted_mean(outputs, gate(features[last.path].amax((2, 3)).detach()).float())
            losses = {"task": (1 - self.kd_weight) * ctx.task.loss(logits, batch.labels)}
            losses |= self.distill_losses(ctx.task, logits.float(), mean.detach())
            for n, (hint, regressor) in enumerate(zip(hints, regressors, strict=True)):
                gap = hint_loss(regressor(features[hint.student.path]), teacher_maps[n])
                losses[f"hint{n + 1}"] = self.hint_weight * gap
            if train_gate:
                mean = mean.clamp(min=TINY).log() if ctx.task.class_logits else mean
                losses["weights"] = ctx.task.loss(mean, batch.labels)
            return losses

        epochs = max(1, round(self.gate_fraction * ctx.epochs))
        fraction = epochs / ctx.epochs
        yield Phase(
            "weigh",
            trains=(ctx.student, gate, *regressors),
            loss=partial(loss, train_gate=True),
            epochs=epochs,
            lr_span=(0.0, fraction),
        )
        weights = mean_weights(ctx, student, last, gate)
        ctx.log_choice("teachers", teacher_summary(members, hints, weights, len(ctx.teachers)))
        if epochs < ctx.epochs:
            gate.requires_grad_(False)
            yield Phase(
                "teach",
                trains=(ctx.student, *regressors),
                loss=partial(loss, train_gate=False),
                epochs=ctx.epochs - epochs,
                lr_span=(fraction, 1.0),
            )
        return {"student": ctx.student}

    def members(self, ctx: TrainingContext) -> list[int]:
        """Return the teachers of the ensemble: those with all classes.

        Raises:
            ConfigError: if there are none, or if another teacher has no hint to give.
        """
        members = [n for n in range(len(ctx.teachers)) if None not in class_columns(ctx, n)]
        if not members:
            teacher_logits(ctx)  # raises with the reason
        if not self.hint_weight and len(members) < len(ctx.teachers):
            unused = min(set(range(len(ctx.teachers))) - set(members))
            raise ConfigError(
                f"teacher {unused + 1} lacks some of the classes and hint_weight is 0, so it has nothing to teach",
                hint="set hint_weight above 0, or leave that teacher out",
            )
        return members

    def soften(self, logits: Tensor) -> Tensor:
        """Return logits at the temperature."""
        return (standardize(logits) if self.standardize_logits else logits) / self.temperature

    def distill_losses(self, task: Task, logits: Tensor, ensemble: Tensor) -> dict[str, Tensor]:
        """Return the losses against the ensemble: its probabilities, or its maps."""
        if task.class_logits:
            log_p = self.soften(logits).log_softmax(1)
            outputs, kl = log_p.exp(), F.kl_div(log_p, ensemble, reduction="batchmean")
            losses = {"kd": self.kd_weight * self.temperature**2 * kl}
        else:
            outputs = logits
            losses = {"kd": self.kd_weight * task.distill_loss(outputs, ensemble, self.temperature)}
        if self.structure_weight:
            gap = F.smooth_l1_loss(pairwise_angles(outputs), pairwise_angles(ensemble))
            losses["structure"] = self.structure_weight * gap
        return losses


class TeacherGate(nn.Module):
    """The weights of the teachers for each image: (N, channels) maxima of the student's last map to (N, teachers)."""

    def __init__(self, channels: int, teachers: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(teachers, channels))
        self.w = nn.Parameter(torch.empty(channels, 1))
        nn.init.xavier_normal_(self.theta)
        nn.init.xavier_normal_(self.w)

    def forward(self, maxima: Tensor) -> Tensor:
        return ((maxima[:, None] * self.theta) @ self.w)[..., 0].softmax(1)


class TeacherEnsemble:
    """One pass of all teachers: the outputs of the members, and every teacher's hint."""

    def __init__(self, ctx: TrainingContext, members: list[int], hints: list[LayerMatch], method: MultiTeacher) -> None:
        self.task, self.method, self.members = ctx.task, method, members
        self.paths = [hint.teacher.path for hint in hints]
        self.teachers = [FeatureExtractor(module, *self.paths[n : n + 1]) for n, module in enumerate(ctx.teachers)]
        self.columns = (
            [[c for c in class_columns(ctx, n) if c is not None] for n in members] if ctx.class_columns else []
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return (N, members, classes) probabilities or (N, members, K, H, W) maps, and each hint's teacher map."""
        results = [teacher(x) for teacher in self.teachers]
        outputs = [results[n][0].float() for n in self.members]
        if self.columns:
            outputs = [output[:, columns] for output, columns in zip(outputs, self.columns, strict=True)]
        if self.task.class_logits:
            outputs = [self.method.soften(output) for output in outputs]
        stacked = torch.stack(outputs, 1)
        maps = [features[path] for (_, features), path in zip(results, self.paths, strict=False)]
        return stacked.softmax(2) if self.task.class_logits else stacked, maps


def last_map(student: nn.Module, x: Tensor) -> LayerInfo:
    """Return the student's last layer that everything passes through. Raise ConfigError if none gives a map."""
    layers = cut_layers(student, x)
    if not layers:
        raise ConfigError(
            "no layer of the student that everything passes through gives a map, which weights the teachers",
            hint="choose a convolutional student",
        )
    return layers[-1]


def match_hint_layers(ctx: TrainingContext, x: Tensor) -> list[LayerMatch]:
    """Return by teacher its layer and the student's: the later the teacher, the deeper the layers.

    Raises:
        ConfigError: if a teacher has no map of the size of any of the student's.
    """
    student_layers, hints = cut_layers(ctx.student, x), []
    for number, module in enumerate(ctx.teachers):
        teacher_layers = cut_layers(module, x)
        matches = [
            min((LayerMatch(t, s) for t in teacher_layers if t.size == s.size), key=lambda match: match.mismatch)
            for s in student_layers
            if s.size in {t.size for t in teacher_layers}
        ]
        if not matches:
            raise ConfigError(
                f"no layer of the student has the map size of a layer of teacher {number + 1}",
                hint="set hint_weight to 0, or choose a student with the teachers' map sizes",
            )
        hints.append(matches[-(-(number + 1) * len(matches) // len(ctx.teachers)) - 1])
    return hints


def weighted_mean(outputs: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of (N, teachers, ...) with weights (N, teachers)."""
    return (outputs * weights.reshape(*weights.shape, *(1,) * (outputs.ndim - 2))).sum(1)


def pairwise_angles(outputs: Tensor) -> Tensor:
    """Return the cosine of the angle at j between i and k, for all three of N outputs: (N, N, N); 0 if i or k is j.

    From inner products alone, so that whole maps are compared as cheaply as logits.
    """
    flat = outputs.flatten(1)
    flat = flat - flat.mean(0)  # angles stay, rounding errors shrink
    with torch.autocast(flat.device.type, enabled=False):
        inner = flat @ flat.T
    squares = inner.diagonal()
    diagonal = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)  # the distance to itself: no division by 0
    lengths = (squares[:, None] + squares - 2 * inner).clamp(min=TINY).sqrt() + diagonal
    products = inner[:, None, :] - inner[:, :, None] - inner[None] + squares[None, :, None]
    return products / (lengths[:, :, None] * lengths[None])


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of (N, C, H, W) maps, each divided by its norm; mean over the batch, 0 to 4."""
    a, b = (F.normalize(t.float().flatten(1)) for t in (student, teacher))
    return (a - b).square().sum(1).mean()


@torch.no_grad()
def mean_weights(ctx: TrainingContext, student: FeatureExtractor, last: LayerInfo, gate: TeacherGate) -> list[float]:
    """Return the mean weight of each member over the first training batches."""
    weights = [gate(student(batch.images)[1][last.path].amax((2, 3))) for batch in ctx.first_batches(REPORTED)]
    return [round(value, 4) for value in torch.cat(weights).mean(0).tolist()]


def teacher_summary(
    members: list[int], hints: list[LayerMatch], weights: list[float], teachers: int
) -> list[dict[str, object]]:
    """Return the teachers for the report."""
    weight = dict(zip(members, weights, strict=True))
    paths = {n: {"teacher": h.teacher.path, "student": h.student.path} for n, h in enumerate(hints)}
    return [{"weight": weight.get(n), "hint": paths.get(n)} for n in range(teachers)]


PLUGIN = MultiTeacher
