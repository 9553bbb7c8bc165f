"""Checks that jobs and bundles share: fields, the timing protocol, the inputs."""

from edgekd_runner.errors import RunnerError, first_line

SCOPES = ("end_to_end", "inference_only", "with_preprocessing")  # what a timed call contains


def require_fields(record, title, types):
    """Raise RunnerError unless `record` has every field of `types` with its type."""
    for key, kind in types.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            raise RunnerError("%s has no proper `%s`" % (title, key), "README.md shows a whole job")


def check_protocol(protocol):
    """Raise RunnerError unless the protocol times some calls, in one of the ways that there are."""
    numbers = {"warmup_s": (int, float), "warmup_calls": int, "rounds": int, "calls_per_round": int, "seed": int}
    require_fields(protocol, "the protocol", numbers)
    if min(protocol["rounds"], protocol["calls_per_round"]) < 1:
        raise RunnerError("the protocol times no call", "give at least 1 for rounds and for calls_per_round")
    rate = protocol.get("rate")
    if rate is not None and (not isinstance(rate, (int, float)) or not 0 < rate < 1e6):
        raise RunnerError("the rate of the protocol is `%s`" % rate, "give calls a second, more than 0")
    if rate and protocol.get("throughput"):
        raise RunnerError("the protocol has a rate and asks for throughput", "measure them one after the other")


def load_inputs(path):
    """Return the (images, ...) float32 array in a .npy file, memory-mapped. Raises RunnerError for anything else."""
    import numpy as np

    try:
        inputs = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        hint = "give a .npy file of float32, images first"
        raise RunnerError("the inputs cannot be read: %s" % first_line(error), hint)
    if inputs.dtype != np.float32 or inputs.ndim < 2 or not len(inputs):
        fact = "the inputs are %s of shape %s" % (inputs.dtype, inputs.shape)
        raise RunnerError(fact, "give float32, (images, channels, height, width)")
    return inputs
