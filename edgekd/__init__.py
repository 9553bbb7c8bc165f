"""edgekd: from a trained teacher to a measured INT8 student on an edge device."""

import os

__version__ = "0.1.0"

# before anything imports it: ONNX Runtime would keep a log of events for its maker in the home folder
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
