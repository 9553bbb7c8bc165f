"""From torch to ONNX files that answer alike."""
