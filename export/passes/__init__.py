"""Passes over ONNX graphs and their files."""
