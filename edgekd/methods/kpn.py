"""kpn: knowledge projection (Zhang, Ning, He, 2017, arXiv 1710.09505): project teacher features into a thin student.

A route connects a teacher layer to a student layer of equal map size through a 1x1 convolution P. With r the projected
teacher feature, v the student's output at that layer, and h = 1 where r >= 0, else `negative_weight`:

    L_KP = mean(h |r - v|)                                                              (eq. 9-10)
    stage 1: L_p(rear(r)) + L_KP; the rear part and P learn from L_p, the front part only from L_KP
    stage 2: L_p(student(x)) + lambda L_KP, with lambda fading from `projection_weight` to 0       (eq. 7)

In stage 2 P continues to learn from L_KP, as in Algorithm 1; only its weight decay becomes 0. The known risk is that P
and the front part agree by shrinking together. Standardizing both sides (below) prevents that: the gap of a r and a v
with any a > 0 is that of r and v.
Several routes are trained side by side, each with a copy of the student, with one teacher pass per batch; after each
search period the one with the worst joint loss on validation data is dropped (section 3.4).

Deviations from the paper, and why:
- Algorithm 1 drops the smallest loss; its text says the worst. The text is followed.
- The mask of eq. 9 has the teacher's channels where a tensor of the student's is multiplied; the sign of r is used.
- r and v are standardized per channel before they are compared; mean and deviation have a small separate loss. Where
  the student cannot predict r, the plain L1 is smallest for a constant v: its BatchNorm gains vanish, and stage 2
  starts from a student that hardly learns (measured: docs/results). Channels of r with a deviation near 0 are
  divided by a hundredth of the mean deviation.
- In stage 1 the front part has no other loss, so lambda would only scale its steps, which are far too small with a
  mean over elements. There L_KP is summed over channels. Everywhere else, and when routes are compared, it is a mean.
- The route search is part of stage 1. On validation data L_p is that of the student alone, nothing injected: a route is
  judged by its student, not by how well the rear part uses the teacher's features. lambda is `projection_weight` for
  all.
- Candidates are layers that everything passes through, because only there does an injected feature replace the
  student's front part. To limit memory, each student layer is paired only with the teacher layer of the nearest
  receptive field, and of those routes the `num_candidates` with the deepest student layers are tried.
- Layers that are chosen automatically are pre-activations. Where a named student layer has no negative outputs, r
  passes a ReLU, too.
- `stage1_replay` is the fraction of stage-2 steps that are stage-1 steps, drawn at random; the paper gives no
  frequency.
- Each stage has its own learning-rate schedule (the paper gives none); stage 2 may start at `stage2_lr_start` within
  it, because with few labels the full rate undoes stage 1.
- With `num_routes` above 1 that many routes remain after the search and are trained together: each injects into the
  same student, which thereby learns part by part. The paper ends with one.
- `kd_weight` mixes softened logits (Hinton et al., 2015) into L_p. If the teacher has only some of the classes, it is
  for these and for samples of them; for the others labels alone count.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError
from edgekd.training.feature_hooks import FeatureExtractor
from edgekd.training.layer_matching import LayerMatch, check_distinct_ends, match_layers, match_named_layers
from edgekd.training.losses import check_fractions, check_temperature, check_weights, kd_loss, to_float32
from edgekd.training.teachers import class_columns, get_teacher

MOMENTS = 0.1  # weight of mean and deviation beside the standardized features
DEAD = 0.01  # of the mean deviation of the projected channels: the smallest divisor
NAMED = 4  # routes that may be named, even if `num_candidates` is less


@dataclass(frozen=True)
class Route(Settings):
    """A teacher layer and the student layer that its features are projected to, by dotted path."""

    teacher: str
    student: str


@dataclass(frozen=True)
class KPN(Method):
    """Settings of knowledge projection."""

    routes: tuple[Route, ...] = ()  # none: they are searched
    num_routes: int = 1  # that remain after the search, and are trained together
    num_candidates: int = 4  # routes trained side by side at first, each with a student; of named ones always up to 4
    receptive_tolerance: float = 0.2  # beta: maximal relative difference of the receptive fields of a route's layers
    stage1_fraction: float = 0.4  # of the budget
    search_fraction: float = 0.2  # of the budget, within stage 1, in which routes are dropped
    stage2_lr_start: float = 0.0  # position in the learning-rate schedule: 0 is the full rate, 0.5 half of it
    projection_weight: float = 0.6  # lambda
    negative_weight: float = 0.25  # eta
    projection_weight_decay: float = 1e-3  # of P in stage 1; 0 in stage 2
    stage1_replay: float = 0.0  # fraction of stage-2 steps that are stage-1 steps
    kd_weight: float = 0.0  # of softened logits within L_p; labels have the rest
    temperature: float = 4.0
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        check_fractions(
            stage1_fraction=self.stage1_fraction,
            search_fraction=self.search_fraction,
            stage1_replay=self.stage1_replay,
            kd_weight=self.kd_weight,
        )
        if self.search_fraction > self.stage1_fraction:
            raise ConfigError(
                f"search_fraction ({self.search_fraction}) is above stage1_fraction ({self.stage1_fraction})",
                hint="the search is part of stage 1",
            )
        if not 0 <= self.stage2_lr_start < 1:
            raise ConfigError(f"stage2_lr_start is {self.stage2_lr_start}", hint="use a fraction from 0 to below 1")
        for name in ("num_candidates", "num_routes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use 1 or more")
        if not self.receptive_tolerance >= 0:
            raise ConfigError(f"receptive_tolerance is {self.receptive_tolerance}", hint="use 0 or more")
        check_weights(
            projection_weight=self.projection_weight,
            negative_weight=self.negative_weight,
            projection_weight_decay=self.projection_weight_decay,
        )
        check_temperature(self.temperature)
        if len(self.routes) > (most := max(self.num_candidates, NAMED)):
            raise ConfigError(
                f"{len(self.routes)} routes are named, but at most {most} are trained side by side",
                hint=f"name fewer, or set num_candidates to {len(self.routes)}: each is trained with its own student",
            )

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        x = next(ctx.first_batches(1)).images[:2]
        nets = get_teacher(ctx), ctx.student
        routes = [match_named_layers(*nets, r.teacher, r.student, x) for r in self.routes]
        routes = routes or match_layers(*nets, x, self.receptive_tolerance)[: self.num_candidates]
        num_routes = min(self.num_routes, len(routes))
        check_distinct_ends(routes, num_routes)
        task_loss = TaskLoss(ctx, self)
        students = [RouteStudent((ProjectedRoute(r, x.device),), ctx.student, self.projection_weight) for r in routes]
        history: dict[str, list[float]] = {s.name: [] for s in students}
        dropped: dict[str, int] = {}
        drops = len(students) - num_routes
        search, end = self.boundaries(ctx.epochs, drops)
        epoch = 0
        periods = [len(p) for p in np.array_split(np.arange(search), min(search, drops))] if search else []
        for number, period in enumerate(periods, 1):
            result = yield self.stage1(f"search{number}", ctx, task_loss, students, epoch, period, end)
            epoch += period
            ranked = sorted(students, key=lambda s: s.joint_loss(result.losses))
            for student in students:
                history[student.name].append(round(student.joint_loss(result.losses), 4))
            left = round((len(routes) - num_routes) * (1 - epoch / search)) + num_routes
            students = ranked[:left]
            dropped |= {s.name: number for s in ranked[left:]}
        winner = RouteStudent(tuple(s.routes[0] for s in students), students[0].student, self.projection_weight)
        ctx.log_choice("routes", [route_summary(r, history[r.name], dropped.get(r.name)) for r in routes])
        if epoch < end:
            yield self.stage1("project", ctx, task_loss, [winner], epoch, end - epoch, end)
        ctx.student.load_state_dict(winner.student.state_dict())
        student = RouteStudent(winner.routes, ctx.student, self.projection_weight, copied=False)
        yield self.stage2(ctx, task_loss, student, end)
        return {"student": ctx.student}

    def boundaries(self, epochs: int, drops: int) -> tuple[int, int]:
        """Return the epochs at which the search, which drops so many routes, and stage 1 end."""
        search = max(1, round(self.search_fraction * epochs)) if drops else 0
        end = max(search, round(self.stage1_fraction * epochs))
        if end >= epochs:
            raise ConfigError(
                f"{epochs} epochs leave none for stage 2 (search until {search}, stage 1 until {end})",
                hint="increase the epochs, or decrease stage1_fraction",
            )
        return search, end

    def stage1(
        self,
        name: str,
        ctx: TrainingContext,
        task_loss: TaskLoss,
        students: list[RouteStudent],
        begin: int,
        epochs: int,
        end: int,
    ) -> Phase:
        """Return a phase of stage 1 that begins at an epoch and trains several students; stage 1 ends at `end`."""
        teacher = FeatureExtractor(get_teacher(ctx), *{r.match.teacher.path for s in students for r in s.routes})

        def loss(batch: Batch) -> Losses:
            with torch.no_grad():
                teacher_logits, features = teacher(batch.images)
            losses: dict[str, Tensor] = {}
            for student in students:
                logits, projection = self.guided(student, batch.images, features, inject=torch.is_grad_enabled())
                losses[f"{student.name}:task"] = task_loss(logits, teacher_logits, batch.labels)
                losses[f"{student.name}:project"] = projection
            return losses

        return Phase(
            name,
            trains=tuple(module for s in students for module in (s.student, *s.projections)),
            loss=loss,
            epochs=epochs,
            lr_span=(begin / end, (begin + epochs) / end),
            weight_decay={projection: self.projection_weight_decay for s in students for projection in s.projections},
        )

    def guided(
        self, student: RouteStudent, images: Tensor, teacher_features: dict[str, Tensor], inject: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the logits with projected features injected (or not), and L_KP summed over channels and routes."""
        projected = {r.match.student.path: r.projection(teacher_features[r.match.teacher.path]) for r in student.routes}
        logits, features = student.forward(images, projected if inject else {})
        gaps = [
            r.match.student.channels * self.projection_loss(projected[path].detach(), features[path])
            for r in student.routes
            for path in [r.match.student.path]
        ]
        return logits, torch.stack(gaps).sum()

    def stage2(self, ctx: TrainingContext, task_loss: TaskLoss, student: RouteStudent, begin: int) -> Phase:
        """Return stage 2, which begins at an epoch."""
        teacher = FeatureExtractor(get_teacher(ctx), *{r.match.teacher.path for r in student.routes})

        def loss(batch: Batch) -> Losses:
            with torch.no_grad():
                teacher_logits, teacher_features = teacher(batch.images)
            if torch.is_grad_enabled() and self.stage1_replay and torch.rand(()) < self.stage1_replay:
                logits, projection = self.guided(student, batch.images, teacher_features, inject=True)
                return {"task": task_loss(logits, teacher_logits, batch.labels), "project": projection}
            logits, features = student.forward(batch.images)
            gaps = [
                self.projection_loss(
                    r.projection(teacher_features[r.match.teacher.path]), features[r.match.student.path]
                )
                for r in student.routes
            ]
            weight = self.projection_weight * (1 - batch.progress)
            projection = torch.stack(gaps).sum()
            return {"task": task_loss(logits, teacher_logits, batch.labels), "project": weight * projection}

        return Phase(
            "joint",
            trains=(ctx.student, *student.projections),
            loss=loss,
            epochs=ctx.epochs - begin,
            lr_span=(self.stage2_lr_start, 1.0),
            weight_decay=dict.fromkeys(student.projections, 0.0),
        )

    def projection_loss(self, projected: Tensor, feature: Tensor) -> Tensor:
        """Return L_KP of (N, C, H, W) features, standardized per channel, with a small loss of mean and deviation."""
        r, v = to_float32(projected), to_float32(feature)
        (r_mean, r_std), (v_mean, v_std) = moments(r), moments(v)
        r_std = torch.maximum(r_std, DEAD * r_std.mean().detach())  # else one constant channel outweighs all others
        relaxed = torch.where(r >= 0, 1.0, self.negative_weight)
        shape = (relaxed * ((r - r_mean) / r_std - (v - v_mean) / v_std).abs()).mean()
        scale = (((r_mean - v_mean).abs() + (r_std - v_std).abs()) / r_std).mean()
        return shape + MOMENTS * scale


class ProjectedRoute:
    """A route with its projection."""

    def __init__(self, match: LayerMatch, device: torch.device) -> None:
        self.match = match
        conv = nn.Conv2d(match.teacher.channels, match.student.channels, 1)
        self.projection = (conv if match.student.signed else nn.Sequential(conv, nn.ReLU())).to(device)


class RouteStudent:
    """A student with the routes that it is trained on."""

    def __init__(
        self, routes: tuple[ProjectedRoute, ...], student: nn.Module, projection_weight: float, copied: bool = True
    ) -> None:
        self.routes, self.projection_weight = routes, projection_weight
        self.name = "+".join(r.match.name for r in routes)
        self.student = copy.deepcopy(student) if copied else student
        self.projections = tuple(r.projection for r in routes)
        self.forward = FeatureExtractor(self.student, *(r.match.student.path for r in routes))

    def joint_loss(self, losses: dict[str, float]) -> float:
        """Return L_p + lambda L_KP of its only route, L_KP as a mean over channels."""
        (route,) = self.routes
        projection = self.projection_weight * losses[f"{self.name}:project"] / route.match.student.channels
        return losses[f"{self.name}:task"] + projection


class TaskLoss:
    """L_p: the loss of the labels, mixed with that of the teacher's outputs for the classes that it has."""

    def __init__(self, ctx: TrainingContext, method: KPN) -> None:
        columns = class_columns(ctx)
        self.method, self.task = method, ctx.task
        self.common = [label for label, column in enumerate(columns) if column is not None]  # classes of both
        self.columns = [column for column in columns if column is not None]
        self.complete = len(self.common) == ctx.num_classes
        if method.kd_weight and len(self.common) < 2:
            raise ConfigError(
                f"kd_weight is {method.kd_weight}, but the teacher knows {len(self.common)} of the {ctx.num_classes} "
                "classes",
                hint="set kd_weight to 0: features alone teach across tasks",
            )

    def __call__(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        weight, m = self.method.kd_weight, self.method
        if weight == 0:
            return self.task.loss(logits, labels)
        if self.complete:
            if self.columns != list(range(teacher.shape[1])):
                teacher = teacher[:, self.columns]
            soft = self.task.distill_loss(logits, teacher, m.temperature, m.standardize_logits)
            return (1 - weight) * self.task.loss(logits, labels) + weight * soft
        common = torch.isin(labels, torch.tensor(self.common, device=labels.device))
        part = weight * common.sum() / len(labels)
        task = self.task.loss(logits, labels) - part * self.task.loss(logits, labels.where(common, -1))
        if not common.any():
            return task
        student, teacher = logits[common][:, self.common], teacher[common][:, self.columns]
        return task + part * kd_loss(student, teacher, m.temperature, m.standardize_logits)


def moments(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, (1, C, 1, 1)."""
    dims = (0, 2, 3)
    return feature.mean(dims, keepdim=True), feature.std(dims, keepdim=True) + 1e-5


def route_summary(route: LayerMatch, losses: list[float], dropped: int | None) -> dict[str, object]:
    """Return a route for the report."""
    return {
        "teacher": route.teacher.path,
        "student": route.student.path,
        "size": list(route.student.size),
        "receptive": [route.teacher.receptive, route.student.receptive],
        "losses": losses,
        "dropped": dropped,
        "won": dropped is None,
    }


PLUGIN = KPN
