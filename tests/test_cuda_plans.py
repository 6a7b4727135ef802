"""Graphs rewritten for ONNX Runtime's CUDA kernels, on the CPU: what is found, and that it computes the same.

No kernel of CUDA runs here. Each operator is replaced by the definition that it carries, and the graph then compared
with the modules of diffusers and transformers that it was exported from, in float32, where rounding hides nothing.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from transformers import BlipVisionConfig, CLIPTextConfig, CLIPTextModel
from transformers.models.blip.modeling_blip import BlipVisionModel

from dnp.cli import run
from dnp.engine import TensorSpec, open_session
from dnp.engine.backends.onnxruntime.cuda import CudaBackend
from dnp.engine.backends.onnxruntime.cuda_plans import build_cuda_plans
from dnp.engine.backends.onnxruntime.passes.definitions import DOMAIN, inlined
from dnp.engine.backends.onnxruntime.passes.plan import PASSES, rewrite
from dnp.engine.backends.onnxruntime.passes.sizes import fix_sizes
from dnp.engine.backends.session import BackendOptions
from dnp.engine.bundle.contract import Signature
from dnp.engine.errors import BackendError, BundleError, SettingsError
from dnp.engine.plans.profile import Range
from dnp.engine.plans.store import PlanStore
from dnp.export.fp16.float32 import infer_types, widen
from dnp.export.fp16.precision import in_precision
from dnp.export.graph import GraphExport, write_graph

SINGLE = 1e-4  # relative to the largest value; fp16's 1.702 of QuickGelu is 1e-4 away from it


class Denoiser(nn.Module):
    """A stretch of Stable Diffusion 1.5's UNet with its narrowest width, and what stands for the time."""

    def __init__(self):
        super().__init__()
        channels = {"temb_channels": 64, "groups": 32, "eps": 1e-5}
        self.conv_in = nn.Conv2d(4, 320, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64))
        self.first = ResnetBlock2D(in_channels=320, out_channels=320, **channels)
        self.attention = Transformer2DModel(8, 40, 320, num_layers=2, cross_attention_dim=48)
        self.second = ResnetBlock2D(in_channels=640, out_channels=320, **channels)
        self.norm_out, self.conv_out = nn.GroupNorm(32, 320), nn.Conv2d(320, 4, 3, padding=1)

    def forward(self, x, time, text):
        x, time = self.conv_in(x), self.time(time)
        (inner,) = self.attention(self.first(x, time), encoder_hidden_states=text, return_dict=False)
        x = self.second(torch.cat([inner, x], dim=1), time)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The middle of an image decoder: attention of one head over all places, between two blocks without a time, and
    what makes images larger.
    """

    def __init__(self):
        super().__init__()
        blocks = {"in_channels": 64, "out_channels": 64, "temb_channels": None, "groups": 32, "eps": 1e-6}
        self.conv_in = nn.Conv2d(4, 64, 3, padding=1)
        self.first, self.second = ResnetBlock2D(**blocks), ResnetBlock2D(**blocks)
        self.larger = Upsample2D(64, use_conv=True, out_channels=64)
        self.attention = Attention(
            64, heads=1, dim_head=64, norm_num_groups=32, bias=True, residual_connection=True, eps=1e-6
        )

    def forward(self, x):
        return self.larger(self.second(self.attention(self.first(self.conv_in(x), None)), None))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=98, pad_token_id=98,
        )  # fmt: skip
        self.model = CLIPTextModel(config)

    def forward(self, ids):
        return self.model(input_ids=ids).last_hidden_state


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        config = BlipVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8,
        )  # fmt: skip
        self.model = BlipVisionModel(config)
        for parameter in self.parameters():  # some of which transformers leaves as the memory was
            nn.init.normal_(parameter, std=0.1)

    def forward(self, pixels):
        return self.model(pixel_values=pixels).last_hidden_state


F16 = "float16"
GRID = ("batch", 4, "height", "width")
# module; inputs; what is found, counted in the module; what else is known to be in it
CASES = {
    "denoiser": (
        Denoiser,
        {"x": TensorSpec(GRID, F16), "time": TensorSpec(("batch", 16), F16), "text": TensorSpec(("batch", 7, 48), F16)},
        {
            "attention": Attention,
            "group norm": nn.GroupNorm,
            "layer norm": nn.LayerNorm,
            "skip group norm": 2 + 2,  # the time in both blocks, and the residual behind each
            "skip layer norm": 2 * 2 + 1,  # after each attention, and between the blocks
            "joined biases": 1,  # of the second block and its shortcut
            "convolution and residual": 1,  # behind the attention, as the sum is not normalised alone
            "products of places": 2,  # into the attention, and out of it
            "biases of convolutions": 1,  # the first one's; the last one's is the result
            "biased layer norm": 1,  # the first one of the blocks
            "GEGLU": 2,
            "bias and residual": 1,  # at the end of the last block
            "QuickGelu": 2,  # SiLU of the time, before the blocks and inside
            "joined products": 3 + 1,  # keys and values of the text in two layers; the blocks' shares of the time
        },
    ),
    "decoder": (
        Decoder,
        {"x": TensorSpec(GRID, F16)},
        {
            "attention": Attention,
            "group norm": nn.GroupNorm,
            "skip group norm": 0,
            "biases of convolutions": 1 + 2 * 2,
            "larger images": 1,
        },
    ),
    "text": (
        Text,
        {"ids": TensorSpec(("batch", 16), "int64")},
        {
            "attention": 2,
            "layer norm": nn.LayerNorm,
            "skip layer norm": 2 * 2,
            "QuickGelu": 2,
            "joined products": 2 * 2,
        },
    ),
    "vision": (
        Vision,
        {"pixels": TensorSpec(("batch", 3, 32, 32), F16)},
        {
            "packed heads": 2,
            "attention": 2,
            "biases of convolutions": 1,
            "layer norm": nn.LayerNorm,
            "skip layer norm": 2 * 2,
            "bias Gelu": 2,
        },
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A module in float32 with weights that fp16 holds, its fp16 graph, its inputs, and what is to be found in it."""
    make, inputs, wanted = CASES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().half().float().eval()
    folder = tmp_path_factory.mktemp(request.param)

    def fresh(rng, dims):
        shapes = {name: spec.resolve(dims) for name, spec in inputs.items()}
        return {
            name: rng.integers(0, 98, shape) if name == "ids" else rng.normal(size=shape).astype(F16)
            for name, shape in shapes.items()
        }

    dims = {symbol: 8 if symbol != "batch" else 2 for spec in inputs.values() for symbol in spec.symbols}
    signature = Signature(inputs, {"y": TensorSpec(("batch",))})
    export = GraphExport("graph", copy.deepcopy(module), signature, fresh, dims, [dims], {"y": 1.0}, "fp16")
    write_graph(export, folder)
    found = {
        name: count if isinstance(count, int) else sum(isinstance(part, count) for part in module.modules())
        for name, count in wanted.items()
    }
    return module, folder / "graphs" / "graph.onnx", fresh, found


def sizes_of(model):
    sizes = {"height": 8, "width": 20}
    symbols = {str(size.value) for value in model.graph.inputs for size in value.shape if not isinstance(size, int)}
    return {name: size for name, size in sizes.items() if name in symbols}


def rewritten(path):
    model = ir.load(path)
    return model, rewrite(model, sizes_of(model))


def computed(model, feeds, path, *, wide):
    """What a model in plain nodes makes on the CPU, computing in float32 throughout when ``wide``."""
    model = inlined(model)
    if wide:
        infer_types(model)
        widen(model)
        feeds = {name: array.astype(np.float32) if array.dtype == F16 else array for name, array in feeds.items()}
    ir.save(model, path, external_data=f"{path.name}.data")  # a plan's weights lie beside the plan
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def apart(one, other):
    """The largest difference, relative to the largest value."""
    return float(np.abs(one.astype(np.float64) - other).max() / np.abs(other).max())


def test_every_pattern_is_found_as_often_as_the_module_has_it(case):
    _, path, _, wanted = case
    model, found = rewritten(path)
    assert found == {**dict.fromkeys(PASSES, 0), **wanted}
    left = Counter(node.op_type for node in model.graph)
    assert not {"InstanceNormalization", "Softmax", "Sigmoid", "Gelu"} & set(left)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_rewritten_graph_computes_what_the_module_does(case, tmp_path, batch):
    module, path, fresh, _ = case
    model, _ = rewritten(path)
    feeds = fresh(np.random.default_rng(batch), {"batch": batch, "height": 8, "width": 20})
    with torch.inference_mode():
        tensors = [torch.from_numpy(array) for array in feeds.values()]
        expected = module(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors)).numpy()
    assert apart(computed(model, feeds, tmp_path / "wide.onnx", wide=True)[0], expected) < SINGLE
    model, _ = rewritten(path)
    assert apart(computed(model, feeds, tmp_path / "half.onnx", wide=False)[0], expected) < 5e-3


def test_onnxruntime_knows_every_operator_with_what_it_is_given(case, tmp_path):
    """Its own rules about inputs, attributes and types; on the CPU it then lacks the kernel of one of them."""
    model, _ = rewritten(case[1])
    own = {node.op_type for node in model.graph if node.domain == DOMAIN}
    ir.save(model, tmp_path / "plan.onnx")
    try:
        onnxruntime.InferenceSession(tmp_path / "plan.onnx", providers=["CPUExecutionProvider"])
    except Exception as error:
        assert type(error).__name__ == "NotImplemented", error
        assert any(f"com.microsoft.{name}(1)" in str(error) for name in own), error
    assert own <= {function.name for function in model.functions.values()}


def text(nodes, inputs="float16[b, 4, 64] x", outputs="y", weights=""):
    """A small graph, in ONNX's own notation."""
    source = f"""<ir_version: 10, opset_import: ["" : 20]> small ({inputs}) => (float16[b, m, n] {outputs})
        {f"<{weights}>" if weights else ""} {{ {nodes} }}"""
    return ir.from_proto(onnx.parser.parse_model(source))


class TestWhatIsLeftAlone:
    """Nodes that are nearly the pattern: each differs from it in one thing that would make the result another one."""

    @pytest.mark.parametrize(
        ("width", "approximate", "found"), [(2560, "none", 1), (2568, "none", 0), (2560, "tanh", 0)]
    )
    def test_geglu(self, width, approximate, found):
        model = text(
            f"""p = MatMul (x, w)  s = Add (p, b)  left, right = Split <axis = 2, num_outputs = 2> (s)
            gate = Gelu <approximate = "{approximate}"> (right)  y = Mul (left, gate)""",
            "float16[b, 200, 8] x",
        )
        weight(model, "w", (8, width))
        weight(model, "b", (width,))
        assert rewrite(model, {})["GEGLU"] == found

    @pytest.mark.parametrize(
        ("nodes", "found"),
        [
            ("s = Mul (x, a)  g = Sigmoid (s)  y = Mul (x, g)", 1),
            ("g = Sigmoid (x)  y = Mul (g, x)", 1),
            ("s = Mul (x, a)  g = Sigmoid (s)  y = Mul (s, g)", 1),  # SiLU of what was scaled
            ("s = Mul (x, a)  g = Sigmoid (s)  z = Mul (x, g)  y = Add (z, g)", 0),  # the gate is wanted elsewhere
            ("s = Mul (x, x)  g = Sigmoid (s)  y = Mul (x, g)", 0),
            ("s = Mul (x, a)  g = Sigmoid (s)  z = Mul (x, g)  y = Mul (z, s)", 0),  # so is what was scaled
        ],
    )
    def test_quick_gelu(self, nodes, found):
        model = text(nodes)
        weight(model, "a", (), 1.702)
        assert rewrite(model, {})["QuickGelu"] == found

    def test_group_norm_of_an_odd_number_of_channels_or_too_many(self, tmp_path):
        """ONNX Runtime's kernel takes two channels at a time, and 512 at most of one group."""
        norms = {(8, 16): True, (8, 24): False, (8, 8): False, (1, 512): True, (1, 1024): False}

        class Norms(nn.Module):
            def __init__(self):
                super().__init__()
                self.norms = nn.ModuleList(nn.GroupNorm(*norm) for norm in norms)

            def forward(self, a, b, c, d, e):
                return sum(norm(value).mean() for norm, value in zip(self.norms, (a, b, c, d, e), strict=True))

        inputs = {f"x{channels}": TensorSpec(("batch", channels, 4, 4), F16) for _, channels in norms}
        export = GraphExport(
            "graph", in_precision(Norms(), "fp16").eval(), Signature(inputs, {"y": TensorSpec(())}),
            lambda rng, dims: {name: rng.normal(size=spec.resolve(dims)).astype(F16) for name, spec in inputs.items()},
            {"batch": 2}, [], {},
        )  # fmt: skip
        write_graph(export, tmp_path)
        model, found = rewritten(tmp_path / "graphs" / "graph.onnx")
        assert found["group norm"] == sum(norms.values())
        left = [node for node in model.graph if node.op_type == "InstanceNormalization"]
        assert len(left) == len(norms) - sum(norms.values())

    @pytest.mark.parametrize(("rows", "found"), [(128, 2), (129, 0)])
    def test_products_of_many_rows(self, rows, found):
        """A product of thousands of rows is not worth the copy that taking it apart again costs."""
        model = text(
            "p = MatMul (x, w)  q = MatMul (x, w)  r = MatMul (x, w)  s = Add (p, q)  y = Add (r, s)",
            f"float16[b, {rows}, 64] x",
        )
        weight(model, "w", (64, 64))
        assert rewrite(model, {})["joined products"] == found


def weight(model, name, shape, value=None):
    """Give a graph the constant of this name, where it has one."""
    array = np.full(shape, value, F16) if value is not None else np.random.default_rng(1).normal(size=shape).astype(F16)
    for missing in {v for node in model.graph for v in node.inputs if v is not None and v.name == name}:
        missing.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(missing)


class TestSizes:
    def test_arithmetic_over_fixed_sizes_goes_and_over_free_ones_is_related_to_the_input(self):
        model = text(
            """batch = Shape <start = 0, end = 1> (x)  rest = Shape <start = 1, end = 2> (x)  four = Mul (rest, rest)
            wanted = Concat <axis = 0> (batch, four, rest)  y = Reshape (x, wanted)""",
            "float16[b, h, 64] x",
        )
        assert fix_sizes(model, {"h": 4}) == 4
        (reshape,) = model.graph
        assert ir.convenience.get_const_tensor(reshape.inputs[1]).numpy().tolist() == [0, 16, 4]

    def test_a_reshape_that_changes_nothing_goes(self):
        model = text(
            """size = Shape (x)  same = Reshape (x, size)  y = Add (same, x)""",
            "float16[b, h, 64] x",
        )
        fix_sizes(model, {"h": 4})
        assert [node.op_type for node in model.graph] == ["Add"]

    def test_two_free_sizes_that_change_places_stay_computed(self):
        model = text(
            """one = Shape <start = 0, end = 1> (x)  two = Shape <start = 1, end = 2> (x)
            wanted = Concat <axis = 0> (two, one)  y = Reshape (x, wanted)""",
            "float16[b, h] x",
        )
        fix_sizes(model, {})
        assert [node.op_type for node in model.graph] == ["Shape", "Shape", "Concat", "Reshape"]

    def test_a_graph_that_does_not_hold_together_at_a_size_is_named_with_the_node(self):
        model = text("y = Add (x, z)", "float16[b, 4, n] x, float16[b, 4, 8] z")
        with pytest.raises(BundleError, match=r"does not hold together at .*'n': 3.*Add"):
            fix_sizes(model, {"n": 3})


def needs_the_host(model):
    """The nodes that copy between the host and the GPU, by ONNX Runtime's rule, so that no run can be recorded.

    Shapes are numbers on the host, and some operators take numbers of the host for sizes, axes and bounds. Wherever
    such a number meets the GPU's, or the other way round, there is a copy; and what is computed from shapes is computed
    on the GPU, as was seen on one.
    """
    wants_host = {"Reshape": {1}, "Expand": {1}, "Tile": {1}, "ConstantOfShape": {0}, "Range": {0, 1, 2}, "Split": {1}}
    wants_host |= {name: {1, 2, 3, 4} for name in ("Slice", "Pad", "Resize", "Squeeze", "Unsqueeze", "ReduceSum")}
    host, offending = set(), []
    for node in model.graph:
        varying = [(index, v) for index, v in enumerate(node.inputs) if v is not None and v.producer() is not None]
        varying += [(index, v) for index, v in enumerate(node.inputs) if v is not None and v.is_graph_input()]
        varying = [(index, v) for index, v in varying if ir.convenience.get_const_tensor(v) is None]
        wanted = wants_host.get(node.op_type, set())
        if node.op_type in ("Shape", "Size"):
            host.update(node.outputs)
        elif any((v in host) != (index in wanted) for index, v in varying):
            offending.append(node)
    return offending


def test_what_needs_the_host_is_found():
    """The arithmetic that ONNX Runtime refused to record: rows of a table looked up through the size of a batch."""
    model = text(
        """size = Shape <start = 0, end = 1> (x)  one = Squeeze (size)  zero = Constant <value_int = 0> ()
        step = Constant <value_int = 1> ()  numbers = Range (zero, one, step)  twice = Mul (numbers, one)
        flat = Reshape (x, size)  y = Gather (flat, twice)""",
        "float16[b] x",
    )
    assert [node.op_type for node in needs_the_host(model)] == ["Squeeze", "Range"]


def test_no_node_of_a_rewritten_graph_needs_the_host(case):
    module, path, _, _ = case
    # transformers repeats the class embedding for each image by the size of a shape; our exports do not
    repeated = ["Concat", "Expand"] if isinstance(module, Vision) else []
    assert [node.op_type for node in needs_the_host(rewritten(path)[0])] == repeated


class TestPlans:
    def test_a_plan_is_for_one_image_size_and_every_batch(self, default_bundle, tmp_path):
        plans = {plan.spec.graph: plan for plan in build_cuda_plans(default_bundle, folder=tmp_path)}
        latents = default_bundle.latents
        height, width = latents.height, latents.width
        tokens = default_bundle.text.length
        sizes = {"height": height, "width": width, "tokens": tokens}
        assert plans["denoise"].spec.profile == {name: [size] * 3 for name, size in sizes.items()}
        assert plans["caption_step"].spec.profile == {"beams": [1, 1, 1]}
        assert {plan.spec.backend for plan in plans.values()} == {"cuda"}
        assert plans["denoise"].statistics["rewritten"]["attention"] > 0
        again = build_cuda_plans(default_bundle, folder=tmp_path)
        assert [plan.statistics["built"] for plan in again] == [plan.statistics["built"] for plan in plans.values()]

    def test_plans_for_other_sizes_share_the_weights(self, default_bundle, tmp_path):
        asked = {"graphs": ["decode_latents"], "folder": tmp_path}
        first, second = (
            build_cuda_plans(default_bundle, **asked, ranges={"height": Range(*[size] * 3)})[0] for size in (64, 128)
        )
        (weights,) = tmp_path.glob("*.weights")
        store = PlanStore(tmp_path)
        assert store.prune([second]) == [first.path]
        assert weights.exists()
        assert store.find(second.spec)[0] == second
        third = build_cuda_plans(default_bundle, **asked, force=True)[0]
        store.prune([third])
        assert [*tmp_path.glob("*.weights")] == [weights]
        assert store.find(third.spec)[0] == third

    def test_a_range_of_sizes_is_refused(self, default_bundle, tmp_path):
        for name, sizes in (("height", Range(64, 64, 128)), ("batch", Range(1, 1, 4))):
            with pytest.raises(SettingsError, match=r"one image size|takes every batch"):
                build_cuda_plans(default_bundle, folder=tmp_path, ranges={name: sizes})
        assert not [*tmp_path.iterdir()]

    def test_a_session_runs_the_plan_of_its_size_and_the_graph_where_there_is_none(
        self, gpu, default_bundle, tmp_path, caplog
    ):
        graph = default_bundle.graphs["decode_latents"]
        build_cuda_plans(default_bundle, graphs=[graph.name], folder=tmp_path)
        backend = CudaBackend(BackendOptions(plans=tmp_path))
        rng = np.random.default_rng(0)
        with backend.session(graph, default_bundle) as session, open_session(default_bundle, graph.name) as on_cpu:
            for size, planned in ((16, True), (12, False), (16, True)):
                caplog.clear()
                feed = {}
                for opened in (session, on_cpu):
                    opened.reshape(**{s: {"height": size, "width": 16}.get(s, 2) for s in graph.symbols})
                    for name, buffer in opened.inputs.items():
                        made = rng.normal(size=buffer.shape) if buffer.dtype.kind == "f" else np.arange(2)
                        feed.setdefault(name, made.astype(buffer.dtype))
                        buffer.write(feed[name])
                    opened.run()
                one, two = (opened.outputs["image"].read().astype(int) for opened in (session, on_cpu))
                assert np.abs(one - two).max() <= 1
                assert gpu.ort.settings[0]["prefer_nhwc"] == "1"
                assert ("there is no plan for" in caplog.text) == (not planned and len(gpu.ort.settings) == 2)
                assert ("dnp build" in caplog.text and "--height 48" in caplog.text) == (not planned)
        assert [settings["prefer_nhwc"] for settings in gpu.ort.settings] == ["1", "0"]  # each opened once
        backend.close()
        assert not gpu.ort.aborts

    def test_a_damaged_plan_is_named_and_the_graph_opened(self, gpu, default_bundle, tmp_path, caplog):
        (plan,) = build_cuda_plans(default_bundle, graphs=["encode_text"], folder=tmp_path)
        plan.path.write_bytes(b"nothing")
        backend = CudaBackend(BackendOptions(plans=tmp_path))
        backend.session(default_bundle.graphs["encode_text"], default_bundle).close()
        assert "encode_text: opened without its plan" in caplog.text
        assert "is damaged" in caplog.text
        backend.close()

    def test_without_onnx_ir_the_line_that_installs_it_is_told(self, default_bundle, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnx_ir", None)
        with pytest.raises(BackendError, match=r"needs onnx-ir.*pip install 'dnp-engine\[build\]'"):
            build_cuda_plans(default_bundle, folder=tmp_path)


@pytest.mark.parametrize("bundle", ["default_bundle", pytest.param("default_fp16", marks=pytest.mark.slow)])
def test_every_graph_s_plan_can_be_recorded_and_computes_what_the_graph_does(bundle, request, tmp_path):
    """The whole model, as its bundle has it: with the image size fixed, no node needs the host."""
    bundle = request.getfixturevalue(bundle)
    for plan in build_cuda_plans(bundle, folder=tmp_path / "plans"):
        graph = bundle.graphs[plan.spec.graph]
        model = ir.load(plan.path)
        assert needs_the_host(model) == [], graph.name
        fixed = {symbol: numbers[0] for symbol, numbers in plan.spec.profile.items()}
        dims = {**dict.fromkeys(graph.symbols, 2), **fixed}
        rng = np.random.default_rng(0)
        feeds = {}
        for name, spec in graph.inputs.items():
            shape = spec.resolve(dims)
            made = rng.normal(size=shape) if spec.dtype.startswith("float") else np.ones(shape)  # of two of everything
            feeds[name] = made.astype(spec.dtype)
        one = computed(model, feeds, tmp_path / "one.onnx", wide=True)
        two = computed(ir.load(graph.path), feeds, tmp_path / "two.onnx", wide=True)
        for found, expected in zip(one, two, strict=True):
            scale = max(1.0, np.abs(expected).max())
            levels = 1 if expected.dtype == np.uint8 else 1e-4 * scale
            assert np.abs(found.astype(np.float64) - expected).max() <= levels, graph.name


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch", "4"], "--batch is for TensorRT; plans of the backend 'cuda' take every batch"),
        (["--height", "64:128"], "is for one image size, and height is 64:64:128; build one for each size"),
    ],
)
def test_the_command_refuses_sizes_that_no_plan_has(default_bundle, tmp_path, capsys, options, told):
    command = ["build", str(default_bundle.path), "--backend", "cuda", "--plans", str(tmp_path), *options]
    assert run(command) == 2
    assert told in capsys.readouterr().err


def test_the_command_builds_a_plan_for_another_size(default_bundle, tmp_path, capsys):
    command = ["build", str(default_bundle.path), "--backend", "cuda", "--plans", str(tmp_path), "--height", "128"]
    assert run([*command, "--graph", "decode_latents", "--json"]) == 0
    told = capsys.readouterr()
    (plan,) = json.loads(told.out)["plans"]
    height = 128 // default_bundle.latents.vae_scale_factor
    assert plan["spec"]["profile"]["height"] == [height] * 3
    assert "computes in fp32; an export with --precision fp16 is faster" in told.err
