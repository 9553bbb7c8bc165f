"""Whole jobs composed of stages; start reading at build.py."""
