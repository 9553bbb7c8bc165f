"""What TensorRT will say of an ONNX file, told without TensorRT."""
