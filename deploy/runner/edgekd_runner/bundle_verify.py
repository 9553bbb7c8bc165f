"""Command `verify`: the outputs of every engine to all inputs, compared with those of the host."""

import os

from edgekd_runner.backends.registry import open_model
from edgekd_runner.bundle import job_settings, load_bundle_inputs
from edgekd_runner.child_process import run_task
from edgekd_runner.files import sha256, write_atomic
from edgekd_runner.messages import emit
from edgekd_runner.predict import Progress, predict
from edgekd_runner.results import Checkpoint, built_engines, engine_key, engine_spec


def verify_bundle(bundle, out, args):
    """Write `logits-I.npy`, the outputs of engine I to all inputs; compare the first ones with those of the host."""
    checkpoint, keys = Checkpoint(out, "verify", bundle["sha256"]), []
    for engine in built_engines(bundle, out):
        keys.append(engine_key(engine))
        path = os.path.join(out, "logits-%d.npy" % engine["index"])
        record = checkpoint.parts.get(keys[-1])
        if not record or not os.path.isfile(path) or sha256(path) != record["sha256"]:
            checkpoint.save(keys[-1], run_task("verify", bundle, out, engine_spec(engine)))
    engines = [checkpoint.parts[key] for key in keys]
    for record in engines:
        if not record["passes"]:
            emit({"warning": "`%s` does not answer as on the host: %s" % (record["name"], record["reason"])})
    return {"engines": engines, "verify_images": bundle["verify_images"]}


def verify_task(bundle, out, spec):
    """Run one engine on all inputs, in a child."""
    import numpy as np

    engine, inputs = bundle["engines"][spec["index"]], load_bundle_inputs(bundle)
    session, _ = open_model(job_settings(bundle), spec, inputs)
    logits = predict(session, engine["name"], inputs, Progress(len(inputs), note="verify %s" % engine["name"]))
    path = os.path.join(out, "logits-%d.npy" % spec["index"])
    write_atomic(path, lambda stream: np.save(stream, logits))
    expected = np.load(os.path.join(bundle["folder"], engine["expected"]), allow_pickle=False)
    labels = bundle.get("labels") and np.load(os.path.join(bundle["folder"], bundle["labels"]), allow_pickle=False)
    verdict = compare_logits(engine, logits, expected[: bundle["verify_images"]], labels)
    return dict(verdict, name=engine["name"], index=spec["index"], sha256=sha256(path), images=len(logits))


def compare_logits(engine, logits, expected, labels):
    """Return how far the first outputs are from those that the host expects, and whether the engine passes."""
    import numpy as np

    first = logits[: len(expected)]
    if first.shape != expected.shape:
        reason = "outputs of shape %s instead of %s" % (first.shape, expected.shape)
        return {"passes": False, "reason": reason, "verify_images": len(first)}
    difference = np.abs(first.astype(np.float64) - expected)
    agreement = 100.0 * float(np.mean(first.argmax(1) == expected.argmax(1)))
    finite = bool(np.isfinite(logits).all())
    verdict = {"verify_images": len(first), "agreement": agreement, "required": engine["agreement"], "finite": finite}
    if finite:
        verdict.update(max_difference=float(difference.max()), mean_difference=float(difference.mean()))
    if labels is not None and labels.ndim == 1 and logits.ndim == 2:
        verdict["top1"] = 100.0 * float(np.mean(logits.argmax(1) == labels))
    reason = ""
    if not finite:
        reason = "some outputs are not finite; FP16 overflows above 65504: build it with FP32"
    elif agreement < engine["agreement"]:
        reason = "%.2f %% of the classes agree, %.2f %% must" % (agreement, engine["agreement"])
    return dict(verdict, passes=not reason, reason=reason)
