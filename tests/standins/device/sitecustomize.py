"""Puts stand-ins for NVIDIA's libraries into every Python process whose PYTHONPATH begins with this folder."""

import ctypes

import standin_cudart


class Loader(ctypes.CDLL):
    """What ctypes loads, but for libcudart, which is not on this machine."""

    def __new__(cls, name, *words, **options):
        if name and "libcudart" in str(name):
            return standin_cudart.Library()
        return ctypes_loader(name, *words, **options)


ctypes_loader = ctypes.CDLL
ctypes.CDLL = Loader
