"""Switches of the process environment, set before anything that reads them is imported."""

from __future__ import annotations

import os
import sys

# No telemetry leaves a process that uses edgekd, nor those that it starts, which inherit the environment;
# tests/test_telemetry.py proves it for whole builds.
TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime: 1.31 keeps events in the home folder, and posts them after seconds
    "HF_HUB_DISABLE_TELEMETRY": "1",  # Hugging Face's hub, where a user's own code imports it
    "DO_NOT_TRACK": "1",  # other packages that respect it
}


def prepare() -> None:
    """Switch telemetry off, and let idle OpenMP threads sleep."""
    os.environ.update(TELEMETRY_OFF)
    # OpenVINO sends a message at every import, and NNCF with each call, if they find this package
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    # The threads of GNU OpenMP, which torch uses, wait for each other by spinning. Where another process wants their
    # cores they spin instead of working: beside two busy processes training on two threads was 2.9 times slower than
    # with threads that soon sleep, which cost 4 % on an idle machine (docs/results). libgomp reads this when loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
