"""ONNX files: read, validate, inspect, run and write them. Imports without torch."""
