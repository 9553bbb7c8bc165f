"""edgekd: from a trained teacher to a measured INT8 student on an edge device."""

import os
import sys

__version__ = "0.1.0"

# No byte of telemetry leaves a process that imports edgekd, nor those that it starts: they inherit the environment.
# Set before anything imports what would send it; tests/test_telemetry.py proves it for whole builds.
TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime: 1.31 keeps events in the home folder, and posts them after seconds
    "HF_HUB_DISABLE_TELEMETRY": "1",  # Hugging Face's hub, where a user's own code imports it
    "DO_NOT_TRACK": "1",  # what else keeps to it
}
os.environ.update(TELEMETRY_OFF)
# OpenVINO sends a message at every import, and NNCF with each call, if they find this package; without it they do not
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

# The threads of GNU OpenMP, which torch uses, wait for each other by spinning. Where another process wants their cores
# they spin instead of working: beside two busy processes training on two threads was 2.9 times slower than with threads
# that soon sleep, which cost 4 % on an idle machine (docs/results.md). libgomp reads this when it is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
