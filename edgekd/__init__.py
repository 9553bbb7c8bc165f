"""edgekd: from a trained teacher to a measured INT8 student on an edge device."""

__version__ = "0.1.0"
