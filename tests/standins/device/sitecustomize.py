"""Puts stand-ins for NVIDIA's libraries into every Python process whose PYTHONPATH begins with this folder."""

import ctypes

import standin_cudart


class Driver:
    """What ctypes.CDLL gives for libcuda: one GPU is there."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, target):
        target._obj.value = 1
        return 0


class Loader(ctypes.CDLL):
    """What ctypes loads, but for libcudart and libcuda, which are not on this machine."""

    def __new__(cls, name, *words, **options):
        if name and "libcudart" in str(name):
            return standin_cudart.Library()
        if name == "libcuda.so.1":
            return Driver()
        return ctypes_loader(name, *words, **options)


ctypes_loader = ctypes.CDLL
ctypes.CDLL = Loader
