"""ONNX Runtime, on the processor and on a GPU."""
