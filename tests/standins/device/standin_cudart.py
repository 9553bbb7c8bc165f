"""A stand-in for libcudart: real C functions, made by ctypes, on memory of the host.

Streams are lazy, as on a device: copies and kernels run when somebody waits for them, so that a missing wait is
seen. A call that no CUDA allows at that point answers with CUDA's own code for it. The functions that a CUDA has are
those of the table in the tests' standard: cudaGraphInstantiateWithFlags came with 11.4.
"""

import ctypes
import os
import sys
import time
import traceback
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p

HANDLES = POINTER(c_void_p)
CUDA = {"8.2.1": 10020, "8.6.1": 12020, "10.3.0": 12060, "11.4.0": 13020}[os.environ.get("STANDIN_TENSORRT", "10.3.0")]
MEMORY = int(os.environ.get("STANDIN_MEMORY", str(8 << 30)))
WORDS = {
    2: b"out of memory",
    35: b"CUDA driver version is insufficient for CUDA runtime version",
    900: b"not permitted",
}

memory = {}  # address -> buffer
streams = {}  # handle -> work that waits
recording = {}  # handle of a stream that is captured -> its graph
graphs = {}
events = {}


def new_handle(table, value):
    handle = 0x7F0000001000 + 16 * sum(len(t) for t in (streams, graphs, events))  # no 32-bit number holds it
    table[handle] = value
    return handle


def enqueue(stream, work):
    (graphs[recording[stream]] if stream in recording else streams[stream]).append(work)


def drain(stream):
    work, streams[stream] = streams[stream], []
    for step in work:
        step()


def allocate(target, size):
    if size > MEMORY:
        return 2
    buffer = ctypes.create_string_buffer(size)
    memory[ctypes.addressof(buffer)] = buffer
    target[0] = ctypes.addressof(buffer)
    return 0


def copy(target, source, size, kind, stream):
    for address in (target, source):
        if not any(start <= address < start + len(buffer) for start, buffer in memory.items()):
            return 1
    enqueue(stream, lambda: ctypes.memmove(target, source, size))
    return 0


def attribute(target, name, device):
    major, minor = os.environ.get("STANDIN_SM", "8.7").split(".")
    target[0] = {75: int(major), 76: int(minor), 18: 1}[name]
    return 0


def count(target):
    if os.environ.get("STANDIN_FAIL") == "driver":
        return 35
    target[0] = 1
    return 0


def put(target, value):
    target[0] = value
    return 0


def memory_info(free, total):
    free[0] = total[0] = MEMORY
    return 0


def wait(stream):
    if stream in recording:
        return 900
    drain(stream)
    return 0


def begin(stream, mode):
    recording[stream] = new_handle(graphs, [])
    return 0


def end(stream, target):
    target[0] = recording.pop(stream)
    return 0


def launch(graph, stream):
    for work in graphs[graph]:
        enqueue(stream, work)
    return 0


def record(event, stream):
    def now():
        events[event] = time.perf_counter()

    enqueue(stream, now)
    return 0


def wait_for_event(event):
    for stream in list(streams):
        drain(stream)
    return 0 if events[event] else 1


def elapsed(target, first, second):
    target[0] = 1e3 * (events[second] - events[first])
    return 0


FUNCTIONS = {
    "cudaGetErrorString": ((c_char_p, c_int), lambda code: WORDS.get(code, b"unknown error")),
    "cudaGetDeviceCount": ((c_int, POINTER(c_int)), count),
    "cudaDeviceGetAttribute": ((c_int, POINTER(c_int), c_int, c_int), attribute),
    "cudaRuntimeGetVersion": ((c_int, POINTER(c_int)), lambda target: put(target, CUDA)),
    "cudaDriverGetVersion": ((c_int, POINTER(c_int)), lambda target: put(target, CUDA)),
    "cudaMemGetInfo": ((c_int, POINTER(c_size_t), POINTER(c_size_t)), memory_info),
    "cudaSetDeviceFlags": ((c_int, c_uint), lambda flags: 0),
    "cudaMalloc": ((c_int, HANDLES, c_size_t), allocate),
    "cudaMallocHost": ((c_int, HANDLES, c_size_t), allocate),
    "cudaMemcpyAsync": ((c_int, c_void_p, c_void_p, c_size_t, c_int, c_void_p), copy),
    "cudaStreamCreateWithFlags": (
        (c_int, HANDLES, c_uint),
        lambda target, flags: put(target, new_handle(streams, [])),
    ),
    "cudaStreamSynchronize": ((c_int, c_void_p), wait),
    "cudaStreamBeginCapture": ((c_int, c_void_p, c_int), begin),
    "cudaStreamEndCapture": ((c_int, c_void_p, HANDLES), end),
    "cudaGraphInstantiateWithFlags": (
        (c_int, HANDLES, c_void_p, c_ulonglong),
        lambda target, graph, flags: put(target, graph),
    ),
    "cudaGraphLaunch": ((c_int, c_void_p, c_void_p), launch),
    "cudaEventCreate": ((c_int, HANDLES), lambda target: put(target, new_handle(events, None))),
    "cudaEventRecord": ((c_int, c_void_p, c_void_p), record),
    "cudaEventSynchronize": ((c_int, c_void_p), wait_for_event),
    "cudaEventElapsedTime": ((c_int, POINTER(c_float), c_void_p, c_void_p), elapsed),
}
SINCE = {"cudaGraphInstantiateWithFlags": 11040}


def guarded(function):
    """ctypes swallows what a callback raises; here that must not pass."""

    def call(*arguments):
        try:
            return function(*arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)

    return call


class Library:
    """What ctypes.CDLL gives for libcudart."""

    def __getattr__(self, name):
        if name not in FUNCTIONS or SINCE.get(name, 0) > CUDA:
            raise AttributeError("undefined symbol: " + name)
        types, function = FUNCTIONS[name]
        made = ctypes.CFUNCTYPE(*types)(guarded(function))
        setattr(self, name, made)
        return made
