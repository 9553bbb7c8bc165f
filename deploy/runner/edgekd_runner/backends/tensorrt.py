"""TensorRT: engines on an NVIDIA GPU or a Jetson's DLA, in every interface from 8.2 to 11."""

import ctypes
import functools
import importlib
import sys

from edgekd_runner.backends.cuda import BLOCKING_SYNC, NON_BLOCKING, SPIN, THREAD_LOCAL, Buffer, Cuda, CudaError
from edgekd_runner.errors import HINT_BUILD_AGAIN, HINT_MEMORY, RunnerError


def import_tensorrt():
    """Return the module. Without a driver, loading it can end the process: only children of the runner do so."""
    return importlib.import_module("tensorrt")


def create_logger(trt):
    """Return a logger that keeps the last warnings and errors; they go to stderr too, should the process crash."""

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.warnings, self.errors = [], []

        def log(self, severity, msg):
            if int(severity) <= int(trt.ILogger.WARNING):
                messages = self.warnings if int(severity) == int(trt.ILogger.WARNING) else self.errors
                messages.append(msg)
                del messages[:-20]
                sys.stderr.write("%s\n" % msg)
                sys.stderr.flush()

        def last_errors(self):
            return "; ".join(self.errors[-3:]) or "TensorRT gives no reason"

    logger = Logger()
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    return logger


class Bindings:
    """Inputs and outputs by number: TensorRT up to 8.4."""

    def __init__(self, trt, engine, context):
        self.engine, self.context = engine, context
        self.names = [engine.get_binding_name(i) for i in range(engine.num_bindings)]
        self.addresses = [0] * len(self.names)

    def is_input(self, name):
        return self.engine.binding_is_input(self.names.index(name))

    def dtype(self, name):
        return self.engine.get_binding_dtype(self.names.index(name))

    def input_shape(self, name):
        return tuple(self.engine.get_binding_shape(self.names.index(name)))

    def set_shape(self, name, shape):
        self.context.set_binding_shape(self.names.index(name), shape)

    def output_shape(self, name):
        return tuple(self.context.get_binding_shape(self.names.index(name)))

    def bind(self, name, address):
        self.addresses[self.names.index(name)] = address

    def enqueue(self, stream):
        return self.context.execute_async_v2(self.addresses, stream)


class Tensors:
    """Inputs and outputs by name: TensorRT from 8.5."""

    def __init__(self, trt, engine, context):
        self.engine, self.context, self.input = engine, context, trt.TensorIOMode.INPUT
        self.names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

    def is_input(self, name):
        return self.engine.get_tensor_mode(name) == self.input

    def dtype(self, name):
        return self.engine.get_tensor_dtype(name)

    def input_shape(self, name):
        return tuple(self.engine.get_tensor_shape(name))

    def set_shape(self, name, shape):
        self.context.set_input_shape(name, shape)

    def output_shape(self, name):
        return tuple(self.context.get_tensor_shape(name))

    def bind(self, name, address):
        self.context.set_tensor_address(name, address)

    def enqueue(self, stream):
        return self.context.execute_async_v3(stream)


class TensorRt:
    """One engine file. A call copies the input, computes, copies the outputs and waits."""

    package = "tensorrt"
    numpy_names = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}

    def __init__(self, job, model, shape):
        trt = import_tensorrt()
        self.trt, self.cuda, self.errors = trt, Cuda(), (RuntimeError, ValueError, TypeError)
        self.info = dict(self.cuda.device_info(), name=self.package, version=trt.__version__, threads=job["threads"])
        self.spins = job.get("protocol", {}).get("spinning", True)
        self.cuda.call("cudaSetDeviceFlags", SPIN if self.spins else BLOCKING_SYNC)
        self.logger = create_logger(trt)
        self.runtime = trt.Runtime(self.logger)  # outlives the engine, as the engine its context
        if model.get("dla") is not None:
            self.runtime.DLA_core = model["dla"]
        with open(model["path"], "rb") as stream:
            self.engine = self.runtime.deserialize_cuda_engine(stream.read())
        if self.engine is None:
            fact = "TensorRT %s does not take the engine: %s" % (trt.__version__, self.logger.last_errors())
            raise RunnerError(fact, HINT_BUILD_AGAIN, 1)
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise RunnerError("the engine does not start: %s" % self.logger.last_errors(), HINT_MEMORY, 1)
        self.stream = self.create_stream()
        self.io = (Tensors if hasattr(self.engine, "num_io_tensors") else Bindings)(trt, self.engine, self.context)
        self.precision, self.graph = "+".join(model.get("precisions", ["unknown"])), None
        self.allocate([1] + shape)
        self.graph_state = "not valid on a DLA" if model.get("dla") is not None else self.capture()

    def create_stream(self):
        return self.cuda.create("cudaStreamCreateWithFlags", NON_BLOCKING)

    def allocate(self, shape):
        """Allocate the input and all outputs on both sides; `shape` replaces sizes that the engine leaves open."""
        inputs = [name for name in self.io.names if self.io.is_input(name)]
        if len(inputs) != 1:
            raise RunnerError("the engine takes %s" % (", ".join(inputs) or "no input"), "give models with one input")
        sizes = self.io.input_shape(inputs[0])
        self.shape = [new if old < 0 else old for old, new in zip(sizes, shape)] if len(sizes) == len(shape) else sizes
        if min(sizes) < 0:
            self.io.set_shape(inputs[0], tuple(self.shape))
        self.input = Buffer(self.cuda, self.shape, self.numpy_type(inputs[0]))
        outputs = [name for name in self.io.names if name not in inputs]
        self.outputs = [Buffer(self.cuda, self.io.output_shape(name), self.numpy_type(name)) for name in outputs]
        for name, buffer in zip(inputs + outputs, [self.input] + self.outputs):
            self.io.bind(name, buffer.device)

    def numpy_type(self, name):
        kind = str(self.io.dtype(name)).rpartition(".")[2]
        if kind not in self.numpy_names:
            raise RunnerError("`%s` of the engine is %s" % (name, kind), "export float32 inputs and outputs")
        return self.numpy_names[kind]

    def capture(self):
        """Put the kernels into a CUDA graph, which starts them with one call; return `captured`, or why not."""
        before = self.run(self.input.host)  # the first call allocates, which a capture cannot
        try:
            self.graph = self.capture_graph()
            after = self.run(self.input.host)
            state = "captured" if all((a == b).all() for a, b in zip(before, after)) else "its answers differ"
        except CudaError as error:
            state = error.error
            self.stream = self.create_stream()  # a failed capture spoils its stream
        if state != "captured":
            self.graph = None
        return state

    def capture_graph(self):
        self.cuda.call("cudaStreamBeginCapture", self.stream, THREAD_LOCAL)
        try:
            enqueued = self.io.enqueue(self.stream)
        finally:
            graph = ctypes.c_void_p()
            self.cuda.call("cudaStreamEndCapture", self.stream, ctypes.byref(graph))
        if not enqueued:
            raise CudaError("TensorRT's kernels cannot be captured", "", 1)
        return self.cuda.create("cudaGraphInstantiateWithFlags", graph, 0)

    def compute(self):
        if self.graph:
            self.cuda.call("cudaGraphLaunch", self.graph, self.stream)
        elif not self.io.enqueue(self.stream):
            raise RuntimeError(self.logger.last_errors())

    def run(self, x):
        self.input.host[...] = x
        self.input.send(self.stream)
        self.compute()
        for output in self.outputs:
            output.fetch(self.stream)
        self.cuda.call("cudaStreamSynchronize", self.stream)
        return [output.host.copy() for output in self.outputs]

    def bind(self, x):
        """Return what prepares a call, and a call from and to the memory of the device."""
        return functools.partial(self.set_input, x), self.compute_and_wait

    def set_input(self, x):
        self.input.host[...] = x
        self.input.send(self.stream)
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def compute_and_wait(self):
        self.compute()
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def run_many(self, inputs, count):
        hint = "`trtexec` tells it: `bench` on a bundle runs it"
        raise RunnerError("throughput of TensorRT is not measured here", hint)

    def compute_ms(self, count):
        """Return for each of `count` calls the time that the GPU takes by its own clock, without copies."""
        first, second = (self.cuda.create("cudaEventCreate") for _ in range(2))
        times = []
        for _ in range(count):
            self.cuda.call("cudaEventRecord", first, self.stream)
            self.compute()
            self.cuda.call("cudaEventRecord", second, self.stream)
            self.cuda.call("cudaEventSynchronize", second)
            times.append(round(self.cuda.read("cudaEventElapsedTime", first, second, kind=ctypes.c_float), 5))
        return times

    def runtime_info(self):
        return dict(self.info, waiting="spinning" if self.spins else "blocking", interface=type(self.io).__name__)

    def compute_precision(self):
        return self.precision

    def model_info(self):
        return {"compute_precision": self.compute_precision(), "cuda_graph": self.graph_state, "calls_in_flight": 1}
