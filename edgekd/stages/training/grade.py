"""Grade a trained network, or its ONNX file: what the metrics read on the test images, and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from edgekd.core import onnx_facts
from edgekd.core.artifact import File
from edgekd.core.exactness import exact_entries
from edgekd.core.onnx_facts import Exported
from edgekd.core.task import Task
from edgekd.core.trial import Trial
from edgekd.learn.macs import macs
from edgekd.learn.trainer import arrange
from edgekd.stages.bench.judge import readings
from edgekd.stages.training.distill import Trained

BATCH = 256


@dataclass(frozen=True)
class Graded:
    readings: dict[str, float]  # metric name -> value; empty if the network answers for other classes
    macs: int  # of one image
    session_config: dict[str, str] = field(default_factory=dict)  # entries of the onnxruntime session that answered


@torch.no_grad()
def grade(out: Path, trained: Trained, task: Task, metrics: tuple[str, ...]) -> Graded:
    """What those of `metrics` say that need nothing but answers and labels. In float32, whatever it was taught in."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = trained.network()
    count = macs(network, torch.zeros(1, *task.shape))
    if trained.classes != task.classes:
        return Graded({}, count)
    arrange(network, device)
    test = task.test.load()
    parts = np.array_split(test.images, -(-len(test.images) // BATCH))
    answers = [network(torch.from_numpy(task.inputs(part)).to(device)).float().cpu().numpy() for part in parts]
    nothing = np.empty(0, np.int64)
    trial = Trial(ns=nothing, block=nothing, logits=np.concatenate(answers), reference=nothing, labels=test.labels)
    return Graded(readings(trial, metrics), count)


def grade_file(
    out: Path, made: Exported, original: Exported, inputs: File, task: Task, metrics: tuple[str, ...]
) -> Graded:
    """As `grade`, of an ONNX file in onnxruntime; agreement is with its FP32 form. `inputs` are those of `exam`."""
    images, nothing = np.load(inputs.path, mmap_mode="r"), np.empty(0, np.int64)
    answers, exact = (onnx_facts.answers(m.dynamic.file.path, images) for m in (made, original))
    trial = Trial(ns=nothing, block=nothing, logits=answers, reference=exact, labels=np.load(task.test.labels.path))
    return Graded(readings(trial, metrics), original.single.macs, exact_entries())
