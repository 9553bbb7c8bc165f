"""Evaluate a trained network, or its ONNX file: metrics on the test images, and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from edgekd.core.artifact import Exported, File
from edgekd.core.bench_result import Samples
from edgekd.core.dataset import PreparedDataset
from edgekd.core.task import output_tensors
from edgekd.metrics._compute import compute_metrics
from edgekd.onnx import session
from edgekd.onnx.exact_sums import exact_entries
from edgekd.training.macs import count_macs
from edgekd.training.trained_model import TrainedModel
from edgekd.training.trainer import to_device

BATCH = 256


@dataclass(frozen=True)
class EvalResult:
    """Metrics and cost of a network."""

    metrics: dict[str, float]  # metric name -> value; empty if the network answers for other classes
    macs: int  # of one image
    session_config: dict[str, str] = field(default_factory=dict)  # entries of the onnxruntime session that answered


@torch.no_grad()
def evaluate(out: Path, trained: TrainedModel, dataset: PreparedDataset, metrics: tuple[str, ...]) -> EvalResult:
    """Return those of `metrics` that need outputs and labels only. Computed in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = trained.network()
    macs = count_macs(network, torch.zeros(1, *dataset.shape))
    if trained.classes != dataset.classes:
        return EvalResult({}, macs)
    to_device(network, device)
    test = dataset.test.load()
    parts = np.array_split(test.images, -(-len(test.images) // BATCH))
    batches = [output_tensors(network(torch.from_numpy(dataset.inputs(part)).to(device))) for part in parts]
    outputs = tuple(
        np.concatenate([tensor.float().cpu().numpy() for tensor in pieces]) for pieces in zip(*batches, strict=True)
    )
    empty = np.empty(0, np.int64)
    samples = Samples(ns=empty, round=empty, outputs=outputs, reference=(), labels=test.labels)
    return EvalResult(compute_metrics(samples, metrics, dataset.task), macs)


def evaluate_onnx(
    out: Path, model: Exported, reference: Exported, inputs: File, dataset: PreparedDataset, metrics: tuple[str, ...]
) -> EvalResult:
    """Return the metrics of an ONNX file in onnxruntime.

    Args:
        model: to evaluate.
        reference: its FP32 form, for the agreement.
        inputs: the file of `export_test_inputs`.
    """
    images, empty = np.load(inputs.path, mmap_mode="r"), np.empty(0, np.int64)
    outputs, expected = (session.run_outputs(m.dynamic.file.path, images) for m in (model, reference))
    samples = Samples(
        ns=empty, round=empty, outputs=outputs, reference=expected, labels=np.load(dataset.test.labels.path)
    )
    return EvalResult(compute_metrics(samples, metrics, dataset.task), reference.single.macs, exact_entries())
