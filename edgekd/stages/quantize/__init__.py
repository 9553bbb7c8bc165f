"""From FP32 ONNX to INT8: calibration, ranges, the files of each scheme."""
