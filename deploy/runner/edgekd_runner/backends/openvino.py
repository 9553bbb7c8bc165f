"""OpenVINO on the processor."""

import functools
import tempfile

from edgekd_runner.errors import HINT_CHECK_MODEL, RunnerError
from edgekd_runner.timing import now_ns


class OpenVino:
    """One model in OpenVINO, with a fixed shape: a dynamic batch becomes the job's."""

    package = "openvino"
    precisions = {"f32": "fp32", "f16": "fp16"}  # the runtime's names -> edgekd's, where they differ

    def __init__(self, job, model, shape):
        import openvino

        self.errors = (RuntimeError, ValueError)
        self.version = openvino.__version__.partition("-")[0]
        throughput = job.get("protocol", {}).get("throughput")
        self.options = {
            "PERFORMANCE_HINT": "THROUGHPUT" if throughput else job.get("hint", "latency").upper(),
            "INFERENCE_NUM_THREADS": job["threads"],
        }
        if model.get("compute_precision", "fp32") == "fp32":  # else processors that have bf16 compute in that
            self.options["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            self.core = openvino.Core()
            self.model = self.core.read_model(model["path"])
            self.shape = self.fix_shape([job.get("batch", 1)] + shape)
            self.compiled, self.compile_ms = self.compile()
            self.request = self.compiled.create_infer_request()
            self.input = self.request.get_input_tensor().data  # its own memory, which a call writes to
            self.queue = openvino.AsyncInferQueue(self.compiled) if throughput else None  # of as many as it advises
        except self.errors as error:
            raise RunnerError("openvino %s: %s" % (self.version, root_cause(error)), HINT_CHECK_MODEL, 1)

    def fix_shape(self, shape):
        """Give the model its only input shape and return it; `shape` replaces sizes that the file leaves open."""
        inputs = self.model.inputs
        kinds = [i.get_element_type().get_type_name() for i in inputs]
        if kinds != ["f32"]:
            raise RunnerError("it takes %s" % (", ".join(kinds) or "no input"), "give models with one float32 input")
        partial = inputs[0].get_partial_shape()
        sizes = [size.get_length() if size.is_static else None for size in partial]
        if None in sizes and len(sizes) == len(shape):
            sizes = [default if size is None else size for size, default in zip(sizes, shape)]
            self.model.reshape(sizes)
        return sizes

    def compile(self, cache_dir=None):
        """Return the model ready to run, and the milliseconds that took; `cache_dir` keeps it for the next time."""
        options = dict(self.options, **({"CACHE_DIR": cache_dir} if cache_dir else {}))
        started = now_ns()
        compiled = self.core.compile_model(self.model, "CPU", options)
        return compiled, (now_ns() - started) / 1e6

    def run(self, x):
        """Return the outputs for `x`: it is copied into the runtime's memory, they are copied into new arrays."""
        self.input[...] = x
        return self.request.infer()

    def bind(self, x):
        """Return what prepares a call, and a call on the runtime's own memory, where its outputs stay.

        Tensors that share the memory of `x` would do as well, but each change of them costs some microseconds.
        """
        return functools.partial(self.set_input, x), functools.partial(self.request.infer, share_outputs=True)

    def set_input(self, x):
        self.input[...] = x

    def run_many(self, inputs, count):
        """Run that many calls, as many at once as the runtime advises."""
        for i in range(count):
            self.queue.start_async({0: inputs[i % len(inputs)]})
        self.queue.wait_all()

    def runtime_info(self):
        get_property = self.compiled.get_property
        return {
            "name": self.package,
            "version": self.version,
            "threads": get_property("INFERENCE_NUM_THREADS"),
            "streams": get_property("NUM_STREAMS"),
            "pinned": get_property("ENABLE_CPU_PINNING"),
            "hint": str(get_property("PERFORMANCE_HINT")).rpartition(".")[2].lower(),
        }

    def compute_precision(self):
        precision = self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        return self.precisions.get(precision, precision)

    def model_info(self):
        info = {"compute_precision": self.compute_precision(), "compile_ms": self.compile_ms}
        if self.queue:
            info["calls_in_flight"] = len(self.queue)
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.compile(folder)
                compiled, compile_ms = self.compile(folder)
            except self.errors as error:
                fact = "openvino keeps no compiled model in `%s`: %s" % (folder, root_cause(error))
                raise RunnerError(fact, "free some space there, or set TMPDIR to another folder", 1)
            if compiled.get_property("LOADED_FROM_CACHE"):
                info["cached_compile_ms"] = compile_ms
        return info


def root_cause(error):
    """Return the cause in an error of OpenVINO, without the places in its source that stand before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    start = lines.index("Summary:") + 1 if "Summary:" in lines else -1
    return "; ".join(line.lstrip("- ") for line in lines[start:])
