"""ONNX Runtime on the processor."""

import functools
import itertools
import threading

from edgekd_runner.errors import HINT_CHECK_MODEL, RunnerError, first_line
from edgekd_runner.timing import no_op


class OnnxRuntime:
    """One model in ONNX Runtime."""

    package = "onnxruntime"

    def __init__(self, job, model, shape):
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        # its errors share no parent but Exception
        kinds = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
        self.errors = tuple(kinds) + (RuntimeError, ValueError)
        options = onnxruntime.SessionOptions()
        self.callers = job["threads"] if job.get("protocol", {}).get("throughput") else 1  # threads of one call each
        options.intra_op_num_threads = job["threads"] // self.callers
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        spinning = "1" if job.get("protocol", {}).get("spinning", True) else "0"
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        try:
            self.session = onnxruntime.InferenceSession(model["path"], options, providers=["CPUExecutionProvider"])
        except self.errors as error:
            fact = "onnxruntime %s: %s" % (onnxruntime.__version__, first_line(error))
            raise RunnerError(fact, HINT_CHECK_MODEL, 1)
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            listed = ", ".join("%s %s" % (i.name, i.type) for i in inputs)
            raise RunnerError("it takes %s" % (listed or "no input"), "give models with one float32 input")
        self.name = inputs[0].name
        self.shape = [size if isinstance(size, int) else None for size in inputs[0].shape]  # None: dynamic

    def run(self, x):
        """Return the outputs for `x` by a call that reads `x` in place and returns its own memory, no copies."""
        return self.session.run(None, {self.name: x})

    def bind(self, x):
        """Return what prepares a call, and a call on a copy of `x` that writes into memory that is there already."""
        import numpy as np
        from onnxruntime import OrtValue

        binding = self.session.io_binding()
        values = [OrtValue.ortvalue_from_numpy(np.array(array)) for array in [x] + self.run(x)]
        binding.bind_ortvalue_input(self.name, values[0])
        for output, value in zip(self.session.get_outputs(), values[1:]):
            binding.bind_ortvalue_output(output.name, value)
        self.values = getattr(self, "values", []) + values  # which a binding does not keep alive
        return no_op, functools.partial(self.session.run_with_iobinding, binding)

    def run_many(self, inputs, count):
        """Run that many calls, from as many Python threads at once as there are threads."""
        if self.callers == 1:
            for i in range(count):
                self.run(inputs[i % len(inputs)])
            return
        numbers = itertools.count()  # taking the next one is atomic

        def work():
            for i in iter(lambda: next(numbers), None):
                if i >= count:
                    return
                self.run(inputs[i % len(inputs)])

        callers = [threading.Thread(target=work) for _ in range(self.callers)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    def runtime_info(self):
        import onnxruntime

        options = self.session.get_session_options()
        return {
            "name": self.package,
            "version": onnxruntime.__version__,
            "threads": options.intra_op_num_threads * self.callers,
            "providers": self.session.get_providers(),
            "graph_optimisation": str(options.graph_optimization_level).rpartition(".")[2],
            "spinning": options.get_session_config_entry("session.intra_op.allow_spinning") == "1",
        }

    def compute_precision(self):
        return "fp32"  # its processor kernels compute floats as the file says

    def model_info(self):
        return {"compute_precision": self.compute_precision(), "calls_in_flight": self.callers}
