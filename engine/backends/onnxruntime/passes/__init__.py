"""Passes over ONNX graphs: plain nodes become the operators that ONNX Runtime has a CUDA kernel for.

``plan.py`` names them all, and their order. Each changes a model in place, returns how often it found its pattern, and
leaves alone what is not surely the pattern. Each operator of ONNX Runtime's own carries its definition in plain nodes.
"""

from typing import Final

BEAMS: Final = "beams"  # how many sequences are searched for each image: a size that no input has by itself
