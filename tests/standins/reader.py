"""Reads networks of anywhere in a process of its own, which may crash or hang without taking the tests with it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Reader:
    """The process; a new one takes the place of one that ended."""

    def __init__(self, home: Path) -> None:
        self.home, self.process = home, None

    def read(self, content: bytes, whole: bool, limit_s: float) -> str:
        """How it went: "ok", "refused: ..." in a sentence, or what should not be: a traceback, a crash, a hang."""
        (self.home / "net.onnx").write_bytes(content)
        if self.process is None:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            words = [sys.executable, "-m", "tests.standins.reader", str(self.home)]
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            assert self.line(60) == "ready"
        self.process.stdin.write(b"whole\n" if whole else b"parts\n")
        self.process.stdin.flush()
        told = self.line(limit_s)
        if told:
            return told
        code = self.process.poll()
        self.close()
        return f"ended with {code}" if code is not None else f"no answer within {limit_s} s"

    def line(self, limit_s: float) -> str:
        """The next line of JSON, whatever C code prints between; empty where none comes."""
        end = time.monotonic() + limit_s
        while (left := end - time.monotonic()) > 0 and select.select([self.process.stdout], [], [], left)[0]:
            line = self.process.stdout.readline()
            if not line:
                self.process.wait(5)
                return ""
            if line.startswith(b'{"told"'):
                return json.loads(line)["told"]
        return ""

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def parts(path: Path) -> None:
    """What every command begins with: rules, layers, facts, checks, a session that answers."""
    import numpy as np

    from edgekd.errors import ConfigError, ModelError
    from edgekd.onnx import inspect, session
    from edgekd.stages.explain.explain import explain
    from edgekd.stages.lint.lint import as_json, format_verdict, lint

    for version in ("5.1", "6.2"):
        verdict = lint(path, version)
        format_verdict(verdict), json.dumps(as_json(verdict))
    with suppress(ConfigError):  # that the file is not quantized
        explain(path, target="jetson")
    with suppress(ModelError):  # that it is no example of ONNX
        inspect.check(path)
    found = inspect.facts(path)
    inspect.describe(path, "net", found.macs or 0)
    shape = [size or 1 for size in found.input.shape]
    if found.input.dtype == "float32":
        inputs = np.random.default_rng(0).standard_normal(shape, np.float32)
        for optimised in (True, False):
            session.run_model(path, inputs, optimised, 1)


def whole(path: Path) -> None:
    """Quantization in two schemes, with everything that looks into the graph."""
    import numpy as np

    from edgekd.core.quant_scheme import get_scheme
    from edgekd.errors import EdgekdError
    from edgekd.onnx import inspect
    from edgekd.stages.quantize.quantize import quantize_file
    from edgekd.stages.quantize.ranges import QuantizeConfig

    shape = [size or 1 for size in inspect.facts(path).input.shape]
    inputs = np.random.default_rng(0).standard_normal((shape[0] * 4, *shape[1:]), np.float32)
    refused = None
    for scheme in ("ort-x86", "tensorrt"):
        try:
            config = QuantizeConfig(
                cross_layer_equalization=True, smoothquant_alpha=0.5, bias_correction=True, keep_float=("last",)
            )
            quantize_file(path, path.with_name("q.onnx"), inputs, get_scheme(scheme), config)
        except EdgekdError as error:
            refused = error
    if refused:
        raise refused


def main() -> None:
    import traceback
    import warnings

    import onnxruntime

    from edgekd.errors import EdgekdError
    from edgekd.stages.explain import explain as explain_module
    from edgekd.stages.quantize import quantize

    assert explain_module and quantize and onnxruntime  # imported before the clock runs
    path = Path(sys.argv[1], "net.onnx")
    warnings.simplefilter("ignore")
    print(json.dumps({"told": "ready"}), flush=True)
    for line in sys.stdin:
        try:
            (whole if line.strip() == "whole" else parts)(path)
            told = "ok"
        except EdgekdError as error:
            told = f"refused: {error}"
        except BaseException:
            told = traceback.format_exc()
        print(json.dumps({"told": told}), flush=True)


if __name__ == "__main__":
    main()
