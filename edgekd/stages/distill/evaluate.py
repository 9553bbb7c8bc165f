"""Grade a trained network, or its ONNX file: what the metrics read on the test images, and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgekd.core.artifact import Exported, File
from edgekd.core.bench_result import Trial
from edgekd.core.dataset import Task
from edgekd.metrics._compute import readings
from edgekd.onnx import session
from edgekd.training.macs import macs
from edgekd.training.trained_model import Trained
from edgekd.training.trainer import arrange

BATCH = 256


@dataclass(frozen=True)
class Graded:
    readings: dict[str, float]  # metric name -> value; empty if the network answers for other classes
    macs: int  # of one image


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
    answers, exact = (session.answers(m.dynamic.file.path, images) for m in (made, original))
    trial = Trial(ns=nothing, block=nothing, logits=answers, reference=exact, labels=np.load(task.test.labels.path))
    return Graded(readings(trial, metrics), original.single.macs)
