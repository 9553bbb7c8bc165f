"""A stand-in for TensorRT in the flavour that STANDIN_TENSORRT names: its engines answer through onnxruntime.

It has no member that the real version lacks: those of 8.6.1, 10.3.0 and 11.4.0 were read from NVIDIA's wheels
(tensorrt_api.json), those of 8.2.1 are 8.6.1's without what came later by the tags of pyCore.cpp. Where a member is
missing, Python says so, as it would on a device. STANDIN_FAIL asks for a failure, in the words of the real one.
"""

import json
import os
import pathlib
import signal

import numpy as np
import standin_cudart as cuda

__version__ = os.environ["STANDIN_TENSORRT"]
MAJOR = int(__version__.split(".")[0])
FAIL = os.environ.get("STANDIN_FAIL", "")
OPSET = {"8.2.1": 13, "8.6.1": 17, "10.3.0": 20, "11.4.0": 24}[__version__]
API = json.loads((pathlib.Path(__file__).parents[1] / "tensorrt_api.json").read_text())
AFTER_8_2 = {
    "IBuilderConfig": ["set_memory_pool_limit", "get_memory_pool_limit", "builder_optimization_level"],
    "ICudaEngine": ["num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape"],
    "IExecutionContext": ["execute_async_v3", "set_tensor_address", "get_tensor_shape", "set_input_shape"],
    "TensorIOMode": "all",
    "MemoryPoolType": "all",
    "OnnxParserFlag": "all",
}


class Enum:
    """As pybind11 makes them: they turn into numbers when asked, and do not compare with any."""

    def __init__(self, owner, name, value):
        self.owner, self.name, self.value = owner, name, value

    def __int__(self):
        return self.value

    def __repr__(self):
        return f"{self.owner}.{self.name}"

    __str__ = __repr__


def enum(owner, names):
    known = API["8.6.1" if MAJOR == 8 else __version__].get(owner, {})
    kept = [name for name in names if name in known]
    return type(owner, (), {name: Enum(owner, name, number) for number, name in enumerate(kept)})


NetworkDefinitionCreationFlag = enum("NetworkDefinitionCreationFlag", ["EXPLICIT_BATCH", "STRONGLY_TYPED"])
BuilderFlag = enum("BuilderFlag", ["FP16", "INT8", "DEBUG", "GPU_FALLBACK", "TF32"])
MemoryPoolType = enum("MemoryPoolType", ["WORKSPACE"])
DeviceType = enum("DeviceType", ["GPU", "DLA"])
LayerInformationFormat = enum("LayerInformationFormat", ["ONELINE", "JSON"])
ProfilingVerbosity = enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "NONE", "DETAILED"])
TensorIOMode = enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
DataType = enum("DataType", ["FLOAT", "HALF"])
OnnxParserFlag = enum("OnnxParserFlag", ["NATIVE_INSTANCENORM", "ADJUST_FOR_DLA"])


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = (
        Enum("Severity", name, number)
        for number, name in enumerate(("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"))
    )

    def __init__(self):
        self.ready = True

    def log(self, severity, msg):
        raise RuntimeError('Tried to call pure virtual function "ILogger::log"')  # as pybind11 does


def listening(logger):
    if not isinstance(logger, ILogger) or not getattr(logger, "ready", False):
        raise TypeError("incompatible constructor arguments: a logger is needed, its __init__ called")
    return logger


def init_libnvinfer_plugins(logger, namespace):
    listening(logger)
    return True


class IHostMemory(bytes):
    pass


class ITensor:
    def __init__(self, name, shape):
        self.name, self.shape = name, tuple(shape)


class INetworkDefinition:
    def __init__(self, flags):
        names = [n for n in vars(NetworkDefinitionCreationFlag) if not n.startswith("_")]
        if flags >> len(names):
            raise TypeError("no such flag")
        self.chosen = {n for n in names if flags >> int(getattr(NetworkDefinitionCreationFlag, n)) & 1}
        self.model = None

    @property
    def num_inputs(self):
        return len(self.model.graph.input)

    @property
    def num_layers(self):
        return len(self.model.graph.node)

    def get_layer(self, index):
        return self.model.graph.node[index]

    def get_input(self, index):
        value = self.model.graph.input[index]
        return ITensor(value.name, [d.dim_value or -1 for d in value.type.tensor_type.shape.dim])


class ParserError:
    def __init__(self, node, desc):
        self.told = node, desc

    def node(self):
        return self.told[0]

    def desc(self):
        return self.told[1]


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.logger, self.errors = network, listening(logger), []

    def set_flag(self, flag):
        self.network.chosen.add(flag.name)

    @property
    def num_errors(self):
        return len(self.errors)

    def get_error(self, index):
        return self.errors[index]

    def parse_from_file(self, model):
        import onnx

        self.network.model = found = onnx.load(model)
        opset = {o.domain: o.version for o in found.opset_import}[""]
        if MAJOR < 10 and "EXPLICIT_BATCH" not in self.network.chosen:
            self.errors.append(ParserError(-1, "In node -1: This parser needs an explicit batch"))
        if opset > OPSET:
            self.errors.append(ParserError(-1, f"Unsupported ONNX opset version: {opset}"))
        for number, node in enumerate(found.graph.node):
            if node.domain or node.op_type in ("QLinearConv", "MatMulInteger", "Shrink"):
                self.errors.append(ParserError(number, f"No importer registered for op: {node.op_type}"))
        return not self.errors


class ITimingCache:
    def __init__(self, known):
        self.known = known

    def serialize(self):
        return IHostMemory(self.known + b"timed;")


class IOptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, input, min, opt, max):
        self.shapes[input] = tuple(opt)


class IInt8EntropyCalibrator2:
    def __init__(self):
        self.ready = True


class IBuilderConfig:
    max_workspace_size = 0
    builder_optimization_level = 3
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    int8_calibrator = None
    default_device_type = DeviceType.GPU
    DLA_core = -1

    def __init__(self):
        self.chosen, self.profiles, self.timings, self.pool = {"TF32"}, [], None, None

    def set_flag(self, flag):
        self.chosen.add(flag.name)

    def get_flag(self, flag):
        return flag.name in self.chosen

    def set_memory_pool_limit(self, pool, pool_size):
        self.pool = int(pool_size)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return 0

    def set_calibration_profile(self, profile):
        return True

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        self.timings = cache
        return True

    def get_timing_cache(self):
        return self.timings

    def can_run_on_DLA(self, layer):
        return layer.op_type in ("Conv", "Relu", "MatMul")


class Builder:
    def __init__(self, logger):
        self.log = listening(logger)

    @property
    def num_DLA_cores(self):
        return int(os.environ.get("STANDIN_DLA", "0"))

    def create_network(self, flags=0):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        if FAIL == "SIGSEGV" or FAIL == "SIGKILL":
            os.kill(os.getpid(), getattr(signal, FAIL))
        reason = self._refusal(network, config)
        if reason:
            self.log.log(ILogger.ERROR, reason)
            return None
        workspace = config.pool if config.pool is not None else config.max_workspace_size
        told = {
            "tensorrt": __version__,
            "flags": sorted(config.chosen),
            "network": sorted(network.chosen),
            "level": getattr(config, "builder_optimization_level", None),
            "workspace": workspace,
            "dla": config.DLA_core,
        }
        calibrator = getattr(config, "int8_calibrator", None)
        if calibrator:
            told["scales"] = calibrator.read_calibration_cache().decode()
        return IHostMemory(json.dumps(told).encode() + b"\n" + network.model.SerializeToString())

    def _refusal(self, network, config):
        """In the words of the real one, where they are known."""
        workspace = config.pool if config.pool is not None else config.max_workspace_size
        pairs = any(node.op_type == "QuantizeLinear" for node in network.model.graph.node)
        typed = MAJOR >= 11 or "STRONGLY_TYPED" in network.chosen
        if FAIL == "oom" or (FAIL == "oom once" and workspace > 256 << 20):
            return (
                "Tactic Device request: 2113MB Available: 1536MB. Device memory is insufficient memory to use tactic."
            )
        if FAIL.startswith("words "):
            return FAIL[6:]
        if min(network.get_input(0).shape) < 0 and not config.profiles:
            return "Network has dynamic or shape inputs, but no optimization profile has been defined."
        if typed and {"FP16", "INT8"} & config.chosen:
            return "Precision flags cannot be set for a strongly typed network"
        if pairs and not typed and "INT8" not in config.chosen:
            return "A network with Q/DQ layers needs the INT8 flag"
        if "INT8" in config.chosen and not pairs and getattr(config, "int8_calibrator", None) is None:
            return "Calibrator is not being used. Users must provide dynamic range for all tensors"
        if config.default_device_type is DeviceType.DLA and "GPU_FALLBACK" not in config.chosen:
            return "DLA layer Flatten is not supported and GPU fallback is not enabled"
        return None


class EngineInspector:
    def __init__(self, engine):
        self.engine = engine

    def get_engine_information(self, format):
        return json.dumps({"Layers": [node.op_type for node in self.engine.model.graph.node], "Bindings": []})


class Runtime:
    DLA_core = -1

    def __init__(self, logger):
        self.log = listening(logger)

    def deserialize_cuda_engine(self, serialized_engine):
        head, _, model = bytes(serialized_engine).partition(b"\n")
        try:
            told = json.loads(head)
        except ValueError:
            self.log.log(ILogger.ERROR, "Serialization assertion magicTagRead == kPLAN_MAGIC_TAG failed.")
            return None
        if told["tensorrt"] != __version__:
            words = "The engine plan file is not compatible with this version of TensorRT, expecting library version %s"
            self.log.log(ILogger.ERROR, words % __version__)
            return None
        return ICudaEngine(told, model)


class ICudaEngine:
    def __init__(self, told, model):
        import onnx
        import onnxruntime

        self.told, self.model = told, onnx.load_model_from_string(model)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.tensors = list(self.session.get_inputs()) + list(self.session.get_outputs())
        self.named = {tensor.name: tensor for tensor in self.tensors}

    def create_execution_context(self):
        return IExecutionContext(self)

    def create_engine_inspector(self):
        return EngineInspector(self)

    @property
    def num_bindings(self):
        return len(self.tensors)

    def get_binding_name(self, index):
        return self.tensors[index].name

    def binding_is_input(self, index):
        return index == 0

    def get_binding_dtype(self, index):
        return self._dtype_of(self.tensors[index].name)

    def get_binding_shape(self, index):
        return self._shape_of(self.tensors[index].name)

    @property
    def num_io_tensors(self):
        return len(self.tensors)

    def get_tensor_name(self, index):
        return self.tensors[index].name

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name == self.tensors[0].name else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return self._dtype_of(name)

    def get_tensor_shape(self, name):
        return self._shape_of(name)

    def _dtype_of(self, name):
        return {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF}[self.named[name].type]

    def _shape_of(self, name):
        return tuple(size if isinstance(size, int) else -1 for size in self.named[name].shape)


class IExecutionContext:
    def __init__(self, engine):
        self.engine, self.addresses, self.batch, self.calls = engine, {}, None, 0

    def _shape(self, name):
        known = self.engine._shape_of(name)
        if min(known) < 0 and self.batch is None:
            return known
        return tuple(self.batch if size < 0 else size for size in known)

    def get_binding_shape(self, binding):
        return self._shape(self.engine.tensors[binding].name)

    def set_binding_shape(self, binding, shape):
        self.batch = shape[0]
        return True

    def get_tensor_shape(self, name):
        return self._shape(name)

    def set_input_shape(self, name, shape):
        self.batch = shape[0]
        return True

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def execute_async_v2(self, bindings, stream_handle):
        self.addresses = {tensor.name: bindings[index] for index, tensor in enumerate(self.engine.tensors)}
        return self._start(stream_handle)

    def execute_async_v3(self, stream_handle):
        return self._start(stream_handle)

    def _start(self, stream):
        self.calls += 1
        if stream in cuda.recording and FAIL == "capture":
            return False
        if not all(address in cuda.memory for address in self.addresses.values()):
            raise RuntimeError("an address is not on the device")
        cuda.enqueue(stream, self._compute)
        return True

    def _compute(self):
        name = self.engine.tensors[0].name
        answers = self.engine.session.run(None, {name: np.array(self._array(name))})
        for index, value in enumerate(answers):
            self._array(self.engine.tensors[1 + index].name)[...] = value * (1 if FAIL != "answers" else -1)

    def _array(self, name):
        kind = np.float16 if self.engine.named[name].type == "tensor(float16)" else np.float32
        buffer = cuda.memory[self.addresses[name]]
        shape = self._shape(name)
        return np.frombuffer(buffer, kind)[: int(np.prod(shape))].reshape(shape)


def without_what_is_missing(module):
    """Take away every class and member that the real version has not."""
    known = API["8.6.1" if MAJOR == 8 else __version__]
    later = AFTER_8_2 if __version__ == "8.2.1" else {}
    for owner in [*API["8.6.1"]]:
        if owner not in known or later.get(owner) == "all":
            del module[owner]
            continue
        for name in [name for name in vars(module[owner]) if not name.startswith("_")]:
            if name not in known[owner] or name in later.get(owner, ()):
                delattr(module[owner], name)


without_what_is_missing(globals())
