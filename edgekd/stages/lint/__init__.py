"""Predict what TensorRT refuses in an ONNX file, without TensorRT."""
