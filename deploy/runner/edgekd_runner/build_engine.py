"""Build a TensorRT engine from a bundle's ONNX file, or take it from the cache in the results folder."""

import hashlib
import json
import os

from edgekd_runner.backends.cuda import Cuda
from edgekd_runner.backends.registry import open_model
from edgekd_runner.backends.tensorrt import create_logger, import_tensorrt
from edgekd_runner.bundle import job_settings, load_bundle_inputs
from edgekd_runner.errors import HINT_NEW_BUNDLE, RunnerError
from edgekd_runner.files import load_json, save_json, sha256, write_atomic
from edgekd_runner.machine import available_memory
from edgekd_runner.timing import now_ns

LEVEL, FRUGAL_LEVEL = 3, 1  # of optimisation: 3 is TensorRT's own default
WORKSPACE, FRUGAL_WORKSPACE = 4 << 30, 256 << 20  # bytes at most
NO_INT8 = ("5.3", "6.2")  # compute capability of Nano, TX1, TX2


def choose_flags(trt, engine, sm, frugal):
    """Return the flags of a build, composed of what this TensorRT has. Raises RunnerError where it cannot build it.

    `sm` is the GPU's compute capability; `frugal` builds with less memory.
    """
    version, precisions = trt.__version__, engine["precisions"]
    has_flags = hasattr(trt.BuilderFlag, "FP16")  # gone in 11: there, precisions stand in the file only
    if "int8" in precisions and sm in NO_INT8:
        hint = "use the FP16 engine: this GPU has no INT8 products"
        raise RunnerError("INT8 is not available on SM %s" % sm, hint, 1)
    if engine.get("typed") and has_flags and not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        raise RunnerError("TensorRT %s knows no strongly typed networks" % version, HINT_NEW_BUNDLE, 1)
    if not engine.get("typed") and not has_flags and precisions != ["fp32"]:
        fact = "TensorRT %s takes precisions from the file only, this one has none" % version
        raise RunnerError(fact, HINT_NEW_BUNDLE, 1)
    if engine.get("cache") and not hasattr(trt, "IInt8EntropyCalibrator2"):
        raise RunnerError("TensorRT %s reads no calibration cache" % version, HINT_NEW_BUNDLE, 1)
    network = ["STRONGLY_TYPED"] if engine.get("typed") and has_flags else []
    if int(version.split(".")[0]) < 10:
        network.append("EXPLICIT_BATCH")
    untyped = has_flags and not engine.get("typed")
    flags = [name for name in ("FP16", "INT8") if name.lower() in precisions] if untyped else []
    if engine.get("dla") is not None:
        flags.append("GPU_FALLBACK")
    has_level = hasattr(trt.IBuilderConfig, "builder_optimization_level")
    level = FRUGAL_LEVEL if frugal else LEVEL
    return {"network": network, "flags": flags, "level": level if has_level else None, "dla": engine.get("dla")}


def build_tensorrt(bundle, out, spec):
    """Build engine number `spec["index"]`, or take it from the cache, and run it once; return what `build` records."""
    trt, engine = import_tensorrt(), bundle["engines"][spec["index"]]
    cuda = Cuda()
    device, frugal = cuda.device_info(), spec.get("frugal", False)
    flags = choose_flags(trt, engine, device["sm"], frugal)
    sources = [bundle["files"][name]["sha256"] for name in (engine["model"], engine["cache"]) if name]
    key = [sources, trt.__version__, device, dict(flags, level=None)]  # a frugal build is as good as the other
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    os.makedirs(os.path.join(out, "engines"), exist_ok=True)
    path = os.path.join(out, "engines", name + ".engine")
    record = load_json(path + ".json")
    cached = record and os.path.isfile(path) and sha256(path) == record["engine_sha256"]
    if not cached:
        started = now_ns()
        record = write_engine(trt, cuda, bundle, engine, flags, path, frugal)
        record.update(build_s=(now_ns() - started) / 1e9, tensorrt=trt.__version__, device=device)
        save_json(path + ".json", record)
    session, times = open_model(job_settings(bundle), dict(engine, path=path), load_bundle_inputs(bundle))
    record = dict(record, **session.model_info())
    record.update(engine="engines/%s.engine" % name, cached=bool(cached))
    record.update(load_ms=times["load_ms"], first_ms=times["first_ms"])
    return dict(record, runtime=session.runtime_info())


def write_engine(trt, cuda, bundle, engine, flags, path, frugal):
    """Parse the ONNX file, let TensorRT choose its kernels, write the engine; return how it was built."""
    logger = create_logger(trt)
    builder = trt.Builder(logger)
    if flags["dla"] is not None and builder.num_DLA_cores <= flags["dla"]:
        raise RunnerError("TensorRT %s finds no DLA %d here" % (trt.__version__, flags["dla"]), HINT_NEW_BUNDLE, 1)
    bits = sum(1 << int(getattr(trt.NetworkDefinitionCreationFlag, name)) for name in flags["network"])
    network = builder.create_network(bits)
    parse_model(trt, network, logger, os.path.join(bundle["folder"], engine["model"]), flags)
    config = builder.create_builder_config()
    workspace = limit_workspace(trt, config, cuda, frugal)
    for name in flags["flags"]:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if flags["level"] is not None:
        config.builder_optimization_level = flags["level"]
    if hasattr(trt, "ProfilingVerbosity") and hasattr(trt.ProfilingVerbosity, "DETAILED"):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the layer information, costs no time
    profile = add_profile(builder, config, network, load_bundle_inputs(bundle).shape[1:])
    calibrator = set_calibration(trt, config, bundle, engine, profile)  # kept until the build ends
    on_dla = set_dla(trt, config, network, flags["dla"])
    timing_cache = os.path.join(os.path.dirname(path), "timings-%s.cache" % trt.__version__)
    load_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    del calibrator
    if plan is None:
        raise RunnerError("TensorRT built nothing: %s" % logger.last_errors(), "run `doctor`; the log is above", 1)
    save_timing_cache(config, timing_cache)
    write_atomic(path, lambda stream: stream.write(plan))
    record = {"recipe": flags, "workspace_mib": workspace >> 20, "frugal": frugal, "warnings": logger.warnings}
    record.update(engine_sha256=sha256(path), engine_bytes=os.path.getsize(path), layers=save_layers(trt, logger, path))
    return dict(record, on_dla=on_dla, tf32=tf32_enabled(trt, config))


def parse_model(trt, network, logger, model, flags):
    parser = trt.OnnxParser(network, logger)
    if flags["dla"] is not None and hasattr(trt, "OnnxParserFlag") and hasattr(trt.OnnxParserFlag, "ADJUST_FOR_DLA"):
        parser.set_flag(trt.OnnxParserFlag.ADJUST_FOR_DLA)
    if not parser.parse_from_file(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        text = "; ".join("node %d: %s" % (error.node(), error.desc()) for error in errors)
        raise RunnerError("TensorRT %s does not read the model: %s" % (trt.__version__, text), HINT_NEW_BUNDLE, 1)
    if network.num_inputs != 1:
        raise RunnerError("the model has %d inputs" % network.num_inputs, "give models with one input")


def limit_workspace(trt, config, cuda, frugal):
    """Limit the workspace to half of what is free, as CPU and GPU of a Jetson share it; return its bytes."""
    limit = min(WORKSPACE, cuda.free_bytes() // 2, available_memory() // 2)
    limit = min(limit, FRUGAL_WORKSPACE) if frugal else limit
    if hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    else:
        config.max_workspace_size = limit
    return limit


def add_profile(builder, config, network, image_shape):
    """Make one image the smallest, usual and largest input if the model leaves sizes open; else return None."""
    tensor = network.get_input(0)
    sizes = tuple(tensor.shape)
    if min(sizes) >= 0:
        return None
    if len(sizes) != len(image_shape) + 1:
        fact = "the model takes %d dimensions, the inputs have %d" % (len(sizes), len(image_shape) + 1)
        raise RunnerError(fact, "check both")
    shape = tuple(new if old < 0 else old for old, new in zip(sizes, (1,) + tuple(image_shape)))
    profile = builder.create_optimization_profile()
    profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    return profile


def set_calibration(trt, config, bundle, engine, profile):
    """Give implicit INT8 the scales in the engine's calibration cache, for which TensorRT needs no images.

    The calibrator that is returned must live until the build ends; None without a cache.
    """
    if not engine.get("cache"):
        return None
    with open(os.path.join(bundle["folder"], engine["cache"]), "rb") as stream:
        scales = stream.read()
    cache_target = scales.partition(b"-Entropy")[0].decode("ascii", "replace")
    version = "TRT-" + cache_version(trt.__version__)
    if cache_target != version:
        raise RunnerError("the calibration cache is for %s, this is %s" % (cache_target, version), HINT_NEW_BUNDLE, 1)

    class Calibrator(trt.IInt8EntropyCalibrator2):
        def __init__(self):
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self):
            return 1

        def get_batch(self, names):
            return None

        def read_calibration_cache(self):
            return scales

        def write_calibration_cache(self, cache):
            pass

    config.int8_calibrator = Calibrator()
    if profile is not None:
        config.set_calibration_profile(profile)
    return config.int8_calibrator


def cache_version(version):
    """Return a version as the first line of a calibration cache has it: 8502 is 8.5.2, 100300 is 10.3.0."""
    major, minor, patch = (int(part) for part in version.split(".")[:3])
    return str((major * 100 + minor) * 100 + patch if major >= 10 else (major * 10 + minor) * 100 + patch)


def set_dla(trt, config, network, core):
    """Ask for the DLA; return how many layers it takes, of how many. The others fall back to the GPU silently."""
    if core is None:
        return None
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return {"layers": sum(bool(config.can_run_on_DLA(layer)) for layer in layers), "of": len(layers)}


def load_timing_cache(config, path):
    """Choose again the kernels that were timed before: quicker builds, and repeatable ones."""
    timings = b""
    if os.path.isfile(path):
        with open(path, "rb") as stream:
            timings = stream.read()
    cache = config.create_timing_cache(timings)
    config.set_timing_cache(cache, False)  # False: refused where it is from another device


def save_timing_cache(config, path):
    cache = config.get_timing_cache()
    if cache is not None:
        write_atomic(path, lambda stream: stream.write(cache.serialize()))


def tf32_enabled(trt, config):
    return bool(config.get_flag(trt.BuilderFlag.TF32)) if hasattr(trt.BuilderFlag, "TF32") else None


def save_layers(trt, logger, path):
    """Write the layers of an engine to a file beside it and return its name; None where TensorRT cannot list them."""
    runtime = trt.Runtime(logger)
    with open(path, "rb") as stream:
        engine = runtime.deserialize_cuda_engine(stream.read())
    if engine is None or not hasattr(engine, "create_engine_inspector"):
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    write_atomic(path + ".layers.json", lambda stream: stream.write(text.encode()))
    return "engines/" + os.path.basename(path) + ".layers.json"
