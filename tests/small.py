"""A bundle of five graphs after the contract that compute next to nothing: for tests of what is around graphs."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dnp.engine.bundle import manifest as m
from dnp.engine.bundle.bundle import Bundle, seal
from dnp.engine.bundle.contract import signatures

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
}


def small_manifest(**changes):
    """Images of 32x32 pixels by default, 64 at most, in latents of 4x4 pixels; prompts of 6 tokens."""
    fields = {
        "schema": m.SCHEMA, "name": "small", "family": "none", "precision": "fp32", "created_with": {},
        "text": m.TextSpec(6, (m.TokenizerSpec("words.json", 1, 2, 0),), "encoded"),
        "conditioning": {"embeddings": m.ConditioningSpec(("tokens", 5), "text")},
        "guidance": m.GuidanceSpec(2, methods=False, embedded=False),
        "latents": m.LatentSpec(3, 8, 8, 2, 16, 16, 4),
        "schedule": {},
        "caption": m.CaptionSpec(24, 10, 1, 2, 3, 7, 11, 1, 2, 0, 8, "words.json"),
        "defaults": m.Defaults(m.PassDefaults("ddim", 4, 3.0), m.PassDefaults("ddim", 4, 1.0)),
        "graphs": {}, "files": {},
    }  # fmt: skip
    return m.Manifest(**{**fields, **changes})


def small_bundle(folder, **changes):
    """Write the bundle to ``folder``, and open it."""
    manifest = small_manifest(**changes)
    graphs = {}
    for name, (inputs, outputs) in signatures(manifest).items():
        write_signature(folder / "graphs" / f"{name}.onnx", name, inputs, outputs)
        sides = {"inputs": inputs, "outputs": outputs}
        specs = {side: {n: spec.to_dict() for n, spec in tensors.items()} for side, tensors in sides.items()}
        graphs[name] = {"file": f"graphs/{name}.onnx", **specs}
    (folder / "words.json").write_text("{}")
    data = {**asdict(manifest), "graphs": graphs}
    del data["files"]
    seal(folder, json.loads(json.dumps(data)))
    return Bundle.open(folder)


def write_signature(path, name, inputs, outputs):
    """A graph with these inputs and outputs: an output is twice an input of the same kind, or zeros."""
    nodes, weights, used = [], {}, set()
    for output, spec in outputs.items():
        same = [n for n, other in inputs.items() if other == spec and n not in used]
        if same:
            used.add(same[0])
            nodes.append(helper.make_node("Add", [same[0], same[0]], [output]))
            continue
        sizes = []
        for axis, entry in enumerate(spec.shape):
            sizes.append(f"{output}.{axis}")
            if isinstance(entry, int):
                weights[sizes[-1]] = np.array([entry], np.int64)
                continue
            factor, symbol = entry.split("*") if "*" in entry else ("1", entry)
            source, at = next((n, s.shape.index(symbol)) for n, s in inputs.items() if symbol in s.shape)
            size = helper.make_node("Shape", [source], [f"{sizes[-1]}.size"], start=at, end=at + 1)
            weights[f"{sizes[-1]}.factor"] = np.array([int(factor)], np.int64)
            scaled = helper.make_node("Mul", [f"{sizes[-1]}.size", f"{sizes[-1]}.factor"], [sizes[-1]])
            nodes += [size, scaled]
        zero = numpy_helper.from_array(np.zeros(1, spec.dtype))
        nodes.append(helper.make_node("Concat", sizes, [f"{output}.shape"], axis=0))
        nodes.append(helper.make_node("ConstantOfShape", [f"{output}.shape"], [output], value=zero))
    return write_graph(path, name, nodes, inputs, outputs, weights)


def write_graph(path, name, nodes, inputs, outputs, weights=()):
    """Write a graph of ONNX nodes and give its spec."""
    values = [
        [helper.make_tensor_value_info(n, ONNX_TYPES[t.dtype], list(t.shape)) for n, t in side.items()]
        for side in (inputs, outputs)
    ]
    constants = [numpy_helper.from_array(array, n) for n, array in dict(weights).items()]
    graph = helper.make_graph(nodes, name, *values, initializer=constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return m.GraphSpec(name, path, inputs, outputs)
