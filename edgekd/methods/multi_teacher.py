"""multi_teacher: several teachers, whose answers are weighed anew for each image, and who each teach another layer.

Adaptive multi-teacher multi-level distillation, AMTML-KD (Liu, Zhang, Wang, 2020, arXiv 2103.04062). With b the
student's last map, its maximum over each channel, z_t the logits of teacher t, and learnt theta_t and W:

    w = softmax over t of (b * theta_t) W                      weights of the teachers for one image
    q = sum_t w_t softmax(z_t / T)                             what they say together
    L = (1 - weight) CE(y, student) + weight T^2 KL(q || p)    p = softmax(z_s / T)
        + structure mean Huber(angles of p - angles of q)      angle at j of each three images i, j, k of a batch
        + hints sum_t |n(R_t v_t) - n(f_t)|^2                  n: a sample's map divided by its norm
        + CE(y, q)                                             from which alone theta and W learn

where the 1x1 convolution R_t takes a student map v_t to the channels of a map f_t of teacher t. Each teacher teaches
another layer: the first a shallow one, the last the deepest; f_t has the size of v_t and the nearest receptive field.
Phase `weigh` trains the student, theta, W and the R_t together; phase `teach` goes on with theta and W as they are.

On dense tasks q is the weighted mean of the maps, CE and KL are mean absolute errors, and the angles are those of whole
maps. A teacher that does not know all classes has no part in q and gives its hint only.

Deviations from the paper, and why:
- theta and W learn from how well q fits the labels; q is detached elsewhere, and so is b. In the paper they learn from
  the whole of L, which is smallest where the teacher is trusted that the student resembles already. Measured on toys
  with a trained and a random teacher: the random one had 61 to 100 % of the weight, with labels less than 1 %.
- The term 0.1 (|W|^2 + |theta|^2) is left out: with it the weights stay equal (47 and 53 % there). The trainer's
  weight decay holds for theta and W as for everything.
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

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.errors import ConfigError
from edgekd.training.feature_hooks import Taps
from edgekd.training.layer_discovery import Layer, layers
from edgekd.training.layer_matching import Candidate
from edgekd.training.losses import check_shares, check_temperature, check_weights, imitation, standardised, supervised
from edgekd.training.teachers import answering, columns, teacher

LOOK = 8  # batches over which weights are averaged for the report
TINY = 1e-8


@dataclass(frozen=True)
class MultiTeacher(Method):
    weight: float = 0.7  # of the teachers' answers; labels have the rest
    temperature: float = 5.0
    structure: float = 1.0  # weight of the angles
    hints: float = 1.0  # weight of the hints
    weigh: float = 0.4  # share of the budget in which the weights of the teachers are learnt
    standardise: bool = False  # everyone's logits, before they are softened

    def __post_init__(self) -> None:
        check_shares(weight=self.weight, weigh=self.weigh)
        check_weights(structure=self.structure, hints=self.hints)
        check_temperature(self.temperature, 5)

    def teach(self, lesson: Lesson) -> Script:
        teacher(lesson, 1)  # two at least
        voices = self.voices(lesson)
        x = next(lesson.sample(1)).x[:2]
        last = last_map(lesson.student, x)
        routes = hinted(lesson, x) if self.hints else []
        faculty = Faculty(lesson, voices, routes, self)
        taps = Taps(lesson.student, *{last.path, *(r.student.path for r in routes)})
        weighing = Weighing(last.channels, len(voices)).to(x.device)
        regressors = [nn.Conv2d(r.student.channels, r.teacher.channels, 1).to(x.device) for r in routes]

        def loss(batch: Batch, weigh: bool) -> Losses:
            said, known = faculty(batch.x)
            answer, seen = taps(batch.x)
            together = mixed(said, weighing(seen[last.path].amax((2, 3)).detach()).float())
            losses = {"task": (1 - self.weight) * supervised(answer, batch.y)}
            losses |= self.heard(answer.float(), together.detach())
            for n, (route, regressor) in enumerate(zip(routes, regressors, strict=True)):
                losses[f"hint{n + 1}"] = self.hints * gap(regressor(seen[route.student.path]), known[n])
            if weigh:
                losses["weights"] = supervised(together if lesson.dense else together.clamp(min=TINY).log(), batch.y)
            return losses

        epochs = max(1, round(self.weigh * lesson.epochs))
        share = epochs / lesson.epochs
        yield Phase(
            "weigh",
            trains=(lesson.student, weighing, *regressors),
            loss=partial(loss, weigh=True),
            epochs=epochs,
            span=(0.0, share),
        )
        weights = mean_weights(lesson, taps, last, weighing)
        lesson.note("teachers", told(voices, routes, weights, len(lesson.teachers)))
        if epochs < lesson.epochs:
            weighing.requires_grad_(False)
            yield Phase(
                "teach",
                trains=(lesson.student, *regressors),
                loss=partial(loss, weigh=False),
                epochs=lesson.epochs - epochs,
                span=(share, 1.0),
            )
        return {"student": lesson.student}

    def voices(self, lesson: Lesson) -> list[int]:
        """The teachers that know all classes. Raises ConfigError if there are none, or others have nothing to teach."""
        voices = [n for n in range(len(lesson.teachers)) if None not in columns(lesson, n)]
        if not voices:
            answering(lesson)  # says why not
        if not self.hints and len(voices) < len(lesson.teachers):
            silent = min(set(range(len(lesson.teachers))) - set(voices))
            raise ConfigError(
                f"teacher {silent + 1} does not know all classes and hints is 0, so it has nothing to teach",
                hint="set hints above 0, or leave that teacher out",
            )
        return voices

    def soften(self, logits: Tensor) -> Tensor:
        return (standardised(logits) if self.standardise else logits) / self.temperature

    def heard(self, answer: Tensor, together: Tensor) -> dict[str, Tensor]:
        """What the teachers together say of the student's answer: of logits their probabilities, or of maps theirs."""
        if answer.ndim == 4:
            own = answer
            losses = {"answers": self.weight * imitation(own, together, self.temperature)}
        else:
            log_p = self.soften(answer).log_softmax(1)
            own, apart = log_p.exp(), F.kl_div(log_p, together, reduction="batchmean")
            losses = {"answers": self.weight * self.temperature**2 * apart}
        if self.structure:
            losses["structure"] = self.structure * F.smooth_l1_loss(angles(own), angles(together))
        return losses


class Weighing(nn.Module):
    """The teachers' weights for each image: (N, channels) maxima of the student's last map to (N, teachers)."""

    def __init__(self, channels: int, teachers: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(teachers, channels))
        self.w = nn.Parameter(torch.empty(channels, 1))
        nn.init.xavier_normal_(self.theta)
        nn.init.xavier_normal_(self.w)

    def forward(self, maxima: Tensor) -> Tensor:
        return ((maxima[:, None] * self.theta) @ self.w)[..., 0].softmax(1)


class Faculty:
    """All teachers, each asked once for a batch: what those with a voice say, and everyone's hint."""

    def __init__(self, lesson: Lesson, voices: list[int], routes: list[Candidate], method: MultiTeacher) -> None:
        self.dense, self.method, self.voices = lesson.dense, method, voices
        self.paths = [route.teacher.path for route in routes]
        self.taps = [Taps(module, *self.paths[n : n + 1]) for n, module in enumerate(lesson.teachers)]
        self.columns = [[c for c in columns(lesson, n) if c is not None] for n in voices] if lesson.knows else []

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(N, voices, classes) probabilities or (N, voices, K, H, W) maps, and for each route the teacher's map."""
        made = [taps(x) for taps in self.taps]
        answers = [made[n][0].float() for n in self.voices]
        if self.columns:
            answers = [answer[:, chosen] for answer, chosen in zip(answers, self.columns, strict=True)]
        said = torch.stack(answers if self.dense else [self.method.soften(answer) for answer in answers], 1)
        hints = [seen[path] for (_, seen), path in zip(made, self.paths, strict=False)]
        return said if self.dense else said.softmax(2), hints


def last_map(student: nn.Module, x: Tensor) -> Layer:
    """The student's last layer that all passes through. Raises ConfigError if it has none that gives a map."""
    found = layers(student, x)
    if not found:
        raise ConfigError(
            "no layer of the student gives a map that all passes through, by which teachers could be weighed",
            hint="choose a convolutional student",
        )
    return found[-1]


def hinted(lesson: Lesson, x: Tensor) -> list[Candidate]:
    """By teacher, the student's layer that it teaches and its own: the later the teacher the deeper.

    Raises ConfigError if a teacher has no map of the size of any of the student's.
    """
    thin, routes = layers(lesson.student, x), []
    for number, module in enumerate(lesson.teachers):
        wide = layers(module, x)
        found = [
            min((Candidate(theirs, own) for theirs in wide if theirs.size == own.size), key=lambda c: c.mismatch)
            for own in thin
            if own.size in {theirs.size for theirs in wide}
        ]
        if not found:
            raise ConfigError(
                f"no layer of the student has the map size of a layer of teacher {number + 1}",
                hint="set hints to 0, or choose a student that shrinks maps as the teachers do",
            )
        routes.append(found[-(-(number + 1) * len(found) // len(lesson.teachers)) - 1])
    return routes


def mixed(answers: Tensor, weights: Tensor) -> Tensor:
    """The mean of (N, teachers, ...) with weights (N, teachers)."""
    return (answers * weights.reshape(*weights.shape, *(1,) * (answers.ndim - 2))).sum(1)


def angles(answers: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k, for all three of N answers: (N, N, N) by i, j, k; 0 if i or k is j.

    From inner products alone, so that whole maps are compared as cheaply as logits.
    """
    flat = answers.flatten(1)
    flat = flat - flat.mean(0)  # angles stay, rounding errors shrink
    with torch.autocast(flat.device.type, enabled=False):
        inner = flat @ flat.T
    squares = inner.diagonal()
    own = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)  # no distance to itself, but no division by 0
    lengths = (squares[:, None] + squares - 2 * inner).clamp(min=TINY).sqrt() + own
    products = inner[:, None, :] - inner[:, :, None] - inner[None] + squares[None, :, None]
    return products / (lengths[:, :, None] * lengths[None])


def gap(own: Tensor, theirs: Tensor) -> Tensor:
    """Squared distance of (N, C, H, W) maps, each divided by its norm; mean over the batch, 0 to 4."""
    a, b = (F.normalize(t.float().flatten(1)) for t in (own, theirs))
    return (a - b).square().sum(1).mean()


@torch.no_grad()
def mean_weights(lesson: Lesson, taps: Taps, last: Layer, weighing: Weighing) -> list[float]:
    """What each voice weighs in the first training batches."""
    weights = [weighing(taps(batch.x)[1][last.path].amax((2, 3))) for batch in lesson.sample(LOOK)]
    return [round(value, 4) for value in torch.cat(weights).mean(0).tolist()]


def told(voices: list[int], routes: list[Candidate], weights: list[float], teachers: int) -> list[dict[str, object]]:
    """The teachers as the report shows them."""
    weight = dict(zip(voices, weights, strict=True))
    hints = {n: {"teacher": r.teacher.path, "student": r.student.path} for n, r in enumerate(routes)}
    return [{"weight": weight.get(n), "hint": hints.get(n)} for n in range(teachers)]


PLUGIN = MultiTeacher
