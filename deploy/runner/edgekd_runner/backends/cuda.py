"""CUDA: the functions of libcudart that are needed, through ctypes."""

import ctypes
import glob
import os
import sys

from edgekd_runner.errors import RunnerError
from edgekd_runner.system_files import find_paths, read_text, system_path

POINTER = ctypes.POINTER
HANDLE, HANDLE_OUT, INT_OUT = ctypes.c_void_p, POINTER(ctypes.c_void_p), POINTER(ctypes.c_int)
# without these types a 64-bit address would be passed as a 32-bit number
ARGUMENT_TYPES = {
    "cudaGetDeviceCount": [INT_OUT],
    "cudaDeviceGetAttribute": [INT_OUT, ctypes.c_int, ctypes.c_int],
    "cudaRuntimeGetVersion": [INT_OUT],
    "cudaDriverGetVersion": [INT_OUT],
    "cudaMemGetInfo": [POINTER(ctypes.c_size_t), POINTER(ctypes.c_size_t)],
    "cudaSetDeviceFlags": [ctypes.c_uint],
    "cudaMalloc": [HANDLE_OUT, ctypes.c_size_t],
    "cudaMallocHost": [HANDLE_OUT, ctypes.c_size_t],
    "cudaMemcpyAsync": [HANDLE, HANDLE, ctypes.c_size_t, ctypes.c_int, HANDLE],
    "cudaStreamCreateWithFlags": [HANDLE_OUT, ctypes.c_uint],
    "cudaStreamSynchronize": [HANDLE],
    "cudaStreamBeginCapture": [HANDLE, ctypes.c_int],
    "cudaStreamEndCapture": [HANDLE, HANDLE_OUT],
    "cudaGraphInstantiateWithFlags": [HANDLE_OUT, HANDLE, ctypes.c_ulonglong],  # from CUDA 11.4, the same ever since
    "cudaGraphLaunch": [HANDLE, HANDLE],
    "cudaEventCreate": [HANDLE_OUT],
    "cudaEventRecord": [HANDLE, HANDLE],
    "cudaEventSynchronize": [HANDLE],
    "cudaEventElapsedTime": [POINTER(ctypes.c_float), HANDLE, HANDLE],
}
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
SPIN, BLOCKING_SYNC = 1, 4  # cudaDeviceScheduleSpin, cudaDeviceScheduleBlockingSync
NON_BLOCKING, THREAD_LOCAL = 1, 1  # cudaStreamNonBlocking, cudaStreamCaptureModeThreadLocal
COMPUTE_CAPABILITY = (75, 76)  # cudaDevAttrComputeCapabilityMajor, ...Minor


class CudaError(RunnerError):
    pass


class Cuda:
    """libcudart. A call that fails raises CudaError."""

    def __init__(self):
        self.cudart = load_cudart()
        self.cudart.cudaGetErrorString.argtypes = [ctypes.c_int]
        self.cudart.cudaGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        try:
            function = getattr(self.cudart, name)
        except AttributeError:
            raise CudaError("this CUDA has no %s" % name, "use the CUDA of this device's JetPack", 1)
        function.argtypes, function.restype = ARGUMENT_TYPES[name], ctypes.c_int
        code = function(*arguments)
        if code:
            text = self.cudart.cudaGetErrorString(code).decode()
            raise CudaError("%s: CUDA error %d, %s" % (name, code, text), "run `doctor`; reboot if it stays", 1)

    def read(self, name, *arguments, kind=ctypes.c_int):
        """Return what a function writes to its first argument."""
        output = kind()
        self.call(name, ctypes.byref(output), *arguments)
        return output.value

    def create(self, name, *arguments):
        """Return the handle or address that a function writes to its first argument."""
        return self.read(name, *arguments, kind=ctypes.c_void_p)

    def free_bytes(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def device_info(self):
        """Return what engines depend on. Raises CudaError without a GPU or a driver."""
        if not self.read("cudaGetDeviceCount"):
            raise CudaError("CUDA finds no GPU", "run this on the device; in a container, `--runtime nvidia`", 1)
        versions = [self.read("cuda%sGetVersion" % kind) for kind in ("Runtime", "Driver")]
        return {
            "gpu": gpu_name(),
            "sm": "%d.%d" % tuple(self.read("cudaDeviceGetAttribute", a, 0) for a in COMPUTE_CAPABILITY),
            "cuda": "%d.%d" % (versions[0] // 1000, versions[0] % 1000 // 10),
            "cuda_driver": "%d.%d" % (versions[1] // 1000, versions[1] % 1000 // 10),
        }


def load_cudart():
    """Return libcudart of the system, of a wheel or in LD_LIBRARY_PATH. Raises CudaError without one."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":") + ["/usr/local/cuda/lib64"]
    folders += [path for place in sys.path for path in glob.glob(os.path.join(place, "nvidia", "*", "lib"))]  # wheels
    names = [path for folder in folders if folder for path in sorted(glob.glob(os.path.join(folder, "libcudart.so*")))]
    for name in names + ["libcudart.so" + end for end in ("", ".13", ".12", ".11.0", ".10.2")]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError("libcudart is not found", "install CUDA (on a Jetson: `sudo apt install nvidia-jetpack`)", 1)


def gpu_name():
    """Return the driver's name of the GPU; of a Jetson, whose driver has none, the board's."""
    for path in find_paths("/proc/driver/nvidia/gpus/*/information"):
        for line in read_text(path).splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return read_text(system_path("/proc/device-tree/model")).strip("\0") or "unknown"


class Buffer:
    """The same array twice: pinned on the host, and on the device."""

    def __init__(self, cuda, shape, kind):
        import numpy as np

        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        self.cuda, self.size = cuda, size
        self.device = cuda.create("cudaMalloc", size)
        self.pinned = cuda.create("cudaMallocHost", size)
        memory = (ctypes.c_byte * size).from_address(self.pinned)
        self.host = np.frombuffer(memory, kind).reshape(shape)
        self.host[...] = 0

    def send(self, stream):
        self.cuda.call("cudaMemcpyAsync", self.device, self.pinned, self.size, TO_DEVICE, stream)

    def fetch(self, stream):
        self.cuda.call("cudaMemcpyAsync", self.pinned, self.device, self.size, TO_HOST, stream)
