"""PyTorch to ONNX: the five graphs of a bundle, and their parity with PyTorch."""
