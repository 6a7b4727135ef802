"""The exporter: the graphs against diffusers, what is refused, and that a failed export leaves nothing."""

import json
import shutil
import warnings
from dataclasses import replace

import diffusers
import families
import numpy as np
import onnx
import onnx_ir
import pytest
import safetensors.torch
import torch
import transformers

from dnp.engine import Bundle, GraphSpec, open_graph, open_session
from dnp.engine.backends.onnxruntime.session import OrtSession
from dnp.engine.bundle import columns
from dnp.engine.bundle.contract import signatures
from dnp.engine.bundle.manifest import GuidanceSpec
from dnp.engine.errors import ExportError, OutputError
from dnp.export import graph as graph_module
from dnp.export.bundle import STAGES, export_bundle
from dnp.export.families import stable_diffusion
from dnp.export.families.source import FAMILIES, _read_scheduler, read_source
from dnp.export.families.tokenizer import PROBES
from dnp.export.fp16 import simulation
from dnp.export.graph import export_graph
from dnp.export.passes import onnx_file
from dnp.runtime.sampling.samplers import sampler_table
from dnp.runtime.sampling.schedule import NoiseSchedule

W = (-3.0, 0.0, 1.0, 7.5)


@pytest.fixture(scope="module")
def bundle(tiny_export):
    return Bundle.open(tiny_export.path)


@pytest.fixture(scope="module")
def unet(tiny_sd_folder):
    return diffusers.UNet2DConditionModel.from_pretrained(tiny_sd_folder / "unet")


@pytest.fixture
def sd_copy(tiny_sd_folder, tmp_path):
    return shutil.copytree(tiny_sd_folder, tmp_path / "source")


def run(graph, inputs, **dims):
    """Outputs by name of a session, or of a graph file."""
    graph.reshape(**dims)
    for name, array in inputs.items():
        graph.inputs[name].write(array)
    graph.run()
    return {name: buffer.read() for name, buffer in graph.outputs.items()}


def step_inputs(rng, places, steps, noise_steps, height, width, guidance=W):
    """A step of every place, two rows each, in any order."""

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    table = 0.5 * normal(places, steps, columns.ROW)
    table[..., columns.TIMESTEP] = rng.uniform(0, 999, (places, steps))
    table[..., columns.GUIDANCE] = np.resize(guidance, (places, steps))
    table[..., columns.DRAW] = rng.integers(0, noise_steps, (places, steps))
    table[..., columns.ADVANCE] = 1
    order = rng.permutation(2 * places)
    return {
        "state": normal(places, columns.SLOTS, 4, height, width),
        "index": rng.integers(0, steps, places),
        "table": table,
        "noise": normal(places, noise_steps, 4, height, width),
        "row_place": order // 2,
        "row_role": order % 2,
        "place_rows": np.argsort(order).reshape(places, 2),
        "embeddings": normal(places, 2, 16, 32),
    }


def sizes_of(inputs):
    places, steps, _ = inputs["table"].shape
    _, noise_steps, _, height, width = inputs["noise"].shape
    rows, tokens = len(inputs["row_place"]), inputs["embeddings"].shape[2]
    return {"places": places, "rows": rows, "steps": steps, "noise_steps": noise_steps, "height": height,
            "width": width, "tokens": tokens}  # fmt: skip


def step_by_hand(unet, inputs):
    """The step of columns.py, one place and one guidance branch after the other: ``next_state``, ``clean_latents``."""
    states, clean = [], []
    for p, index in enumerate(inputs["index"]):
        row = inputs["table"][p, index]
        z = inputs["noise"][p, int(row[columns.DRAW])]
        s = inputs["state"][p]
        x = torch.from_numpy(np.tensordot(row[columns.INPUT], s, 1))[None]
        with torch.no_grad():
            outputs = []
            for role in (0, 1):
                embeddings = torch.from_numpy(inputs["embeddings"][p, role])[None]
                outputs.append(unet(x, torch.tensor([row[columns.TIMESTEP]]), embeddings).sample[0].numpy())
        o_0, o_1 = outputs
        o = o_0 + row[columns.GUIDANCE] * (o_1 - o_0)
        state = np.tensordot(row[columns.STATE].reshape(4, 4), s, 1)
        for part, of in ((columns.OUTPUT, o), (columns.NEGATIVE_OUTPUT, o_0), (columns.NOISE, z)):
            state += np.multiply.outer(row[part], of)
        states.append(state)
        clean.append(np.tensordot(row[columns.CLEAN_STATE], s, 1) + row[columns.CLEAN_OUTPUT] * o)
    return np.stack(states), np.stack(clean)


# The graphs


@pytest.mark.parametrize(
    ("places", "steps", "noise_steps", "height", "width"),
    [(4, 5, 1, 8, 8), (1, 1, 1, 2, 6), (3, 2, 2, 16, 4), (2, 1, 1, 5, 7), (1, 2, 2, 13, 3), (1, 1, 1, 1, 1)],
)
def test_denoise_is_the_step_of_the_contract(bundle, unet, places, steps, noise_steps, height, width):
    """At odd sizes too, where diffusers tells its upsamplers which size to give."""
    inputs = step_inputs(np.random.default_rng(places), places, steps, noise_steps, height, width)
    with open_session(bundle, "denoise") as session:
        got = run(session, inputs, **sizes_of(inputs))
    next_state, clean = step_by_hand(unet, inputs)
    np.testing.assert_allclose(got["next_state"], next_state, atol=1e-4)
    np.testing.assert_allclose(got["clean_latents"], clean, atol=1e-4)
    np.testing.assert_array_equal(got["latents"], got["next_state"][:, 0])
    np.testing.assert_array_equal(got["next_index"], inputs["index"] + 1)


def test_a_place_that_stands_still_takes_nothing_of_what_is_no_number(bundle):
    """Its rows are another's, of which nothing reaches it; and the other's are no concern of its neighbours."""
    inputs = step_inputs(np.random.default_rng(7), 3, 1, 1, 4, 4)
    still = inputs["table"][2, 0]
    still[:] = 0
    still[columns.INPUT.start], still[columns.STATE] = 1, np.eye(4).ravel()
    inputs["state"][0] = np.nan
    inputs["place_rows"][2] = inputs["place_rows"][0]
    with open_session(bundle, "denoise") as session:
        got = run(session, inputs, **sizes_of(inputs))
    assert np.isnan(got["next_state"][0]).all() and np.isfinite(got["next_state"][1:]).all()
    np.testing.assert_array_equal(got["next_state"][2], inputs["state"][2])
    assert got["next_index"].tolist() == [*(inputs["index"][:2] + 1), inputs["index"][2]]


def test_guidance_is_data_of_any_sign(bundle, unet):
    """The same sample at every w, in one batch: the results lie on a line, 0 is the negative branch, −3 is DNS."""
    one = step_inputs(np.random.default_rng(0), 1, 1, 1, 8, 8)
    per_place = ("state", "index", "table", "noise", "embeddings")
    inputs = step_inputs(np.random.default_rng(0), len(W), 1, 1, 8, 8)
    inputs |= {name: np.repeat(one[name], len(W), 0) for name in per_place}
    inputs["table"][:, 0, columns.GUIDANCE] = W
    with open_session(bundle, "denoise") as session:
        next_state = run(session, inputs, **sizes_of(inputs))["next_state"]
    np.testing.assert_allclose(next_state, step_by_hand(unet, inputs)[0], atol=1e-4)
    per_w = next_state[2] - next_state[1]
    assert np.abs(per_w).max() > 1e-3
    for w, state in zip(W, next_state, strict=True):
        np.testing.assert_allclose(state, next_state[1] + w * per_w, atol=1e-4)


@pytest.mark.parametrize("role", [0, 1])
def test_a_place_of_one_row_is_that_branch_alone(bundle, unet, role):
    inputs = step_inputs(np.random.default_rng(3), 2, 1, 1, 8, 8)
    inputs["table"][..., columns.GUIDANCE] = role
    alone = {"row_place": np.arange(2), "row_role": np.full(2, role), "place_rows": np.repeat([[0], [1]], 2, 1)}
    with open_session(bundle, "denoise") as session:
        got = run(session, {**inputs, **alone}, **sizes_of({**inputs, **alone}))["next_state"]
    inputs["embeddings"][:, 1 - role] = inputs["embeddings"][:, role]  # and o_0 stands for it in B0
    np.testing.assert_allclose(got, step_by_hand(unet, inputs)[0], atol=1e-4)


def test_cfg_plus_plus_is_a_row_of_the_table(bundle, unet):
    """arXiv 2406.08070 by its formula: the clean latents from the guided output, the noise from the negative one."""
    inputs = step_inputs(np.random.default_rng(5), 1, 1, 1, 8, 8)
    alpha, sigma, next_alpha, next_sigma, w = 0.6, 0.8, 0.8, 0.6, 0.4
    row = inputs["table"][0, 0]
    row[:] = 0
    row[columns.TIMESTEP], row[columns.GUIDANCE], row[columns.ADVANCE], row[columns.INPUT.start] = 500, w, 1, 1
    row[columns.STATE.start] = next_alpha / alpha
    row[columns.OUTPUT.start], row[columns.NEGATIVE_OUTPUT.start] = -next_alpha * sigma / alpha, next_sigma
    x = torch.from_numpy(inputs["state"][0, :1])
    with torch.no_grad():
        negative, prompt = (
            unet(x, 500, torch.from_numpy(inputs["embeddings"][0, role])[None]).sample for role in (0, 1)
        )
    clean = (x - sigma * (negative + w * (prompt - negative))) / alpha
    with open_session(bundle, "denoise") as session:
        got = run(session, inputs, **sizes_of(inputs))["latents"]
    np.testing.assert_allclose(got, next_alpha * clean + next_sigma * negative, atol=1e-4)


@pytest.mark.slow
def test_a_graph_with_guidance_methods_gives_plain_guidance_until_it_is_asked(bundle, unet, tiny_sd_folder, tmp_path):
    source = replace(read_source(tiny_sd_folder), methods=True)
    with_methods = replace(bundle, guidance=GuidanceSpec(**source.guidance_manifest()))
    signature = signatures(with_methods)["denoise"]
    record = export_graph(stable_diffusion.denoise(source, signature, "fp32"), tmp_path)  # held to PyTorch, methods too
    inputs = step_inputs(np.random.default_rng(6), 2, 1, 1, 8, 8)
    inputs["table"][..., columns.THIRD] = 0
    inputs["table"][..., columns.RESCALE :] = 0
    inputs["table"][..., columns.PARALLEL] = 1
    third = inputs["embeddings"][:, :1]
    more = {
        "embeddings": np.concatenate([inputs["embeddings"], third], 1),
        "place_rows": np.concatenate([inputs["place_rows"], inputs["place_rows"][:, :1]], 1),
    }
    with open_graph(GraphSpec("denoise", tmp_path / record.manifest["file"], *signature)) as session:
        plain = run(session, {**inputs, **more}, **sizes_of(inputs))["next_state"]
        inputs["table"][..., columns.RESCALE] = 0.7
        rescaled = run(session, {**inputs, **more}, **sizes_of(inputs))["next_state"]
    np.testing.assert_allclose(plain, step_by_hand(unet, inputs)[0], atol=1e-4)
    assert np.abs(rescaled - plain).max() > 0.01


def test_more_rows_than_were_traced(bundle, unet):
    inputs = step_inputs(np.random.default_rng(2), 33, 1, 1, 2, 2)
    with open_session(bundle, "denoise") as session:
        got = run(session, inputs, **sizes_of(inputs))
    np.testing.assert_allclose(got["next_state"], step_by_hand(unet, inputs)[0], atol=1e-4)


@pytest.mark.parametrize("batch", [1, 5])
def test_encode_text_is_the_text_encoder(bundle, tiny_sd_folder, batch):
    model = transformers.CLIPTextModel.from_pretrained(tiny_sd_folder / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_sd_folder / "tokenizer")
    ids = tokenizer(list(PROBES[:batch]), padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids)[0].numpy()
    with open_session(bundle, "encode_text") as session:
        got = run(session, {"ids": ids.numpy()}, batch=batch, tokens=16)["embeddings"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 3, 10)])
def test_decode_latents_is_what_the_pipeline_shows(bundle, tiny_sd_folder, batch, height, width):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None)
    latents = np.random.default_rng(3).standard_normal((batch, 4, height, width), dtype=np.float32)
    with torch.no_grad():
        image = pipe.vae.decode(torch.from_numpy(latents) / pipe.vae.config.scaling_factor).sample
    expected = np.stack([np.asarray(picture) for picture in pipe.image_processor.postprocess(image)])
    with open_session(bundle, "decode_latents") as session:
        places = np.random.default_rng(4).permutation(batch)[: max(1, batch - 1)]
        inputs = {"latents": latents, "decoded": places}
        got = run(session, inputs, places=batch, batch=len(places), height=height, width=width)["image"]
    expected, batch = expected[places], len(places)
    assert got.shape == (batch, 4 * height, 4 * width, 3)
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def test_the_tokenizer_file_alone_gives_transformers_ids(bundle, tiny_sd_folder):
    from tokenizers import Tokenizer

    theirs = transformers.CLIPTokenizer.from_pretrained(tiny_sd_folder / "tokenizer")
    (spec,) = bundle.text.tokenizers
    ours = Tokenizer.from_file(str(bundle.path / spec.file))
    for text in (*PROBES, "Zażółć gęślą jaźń", "a" * 300):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert (spec.bos, spec.eos) == (theirs.bos_token_id, theirs.eos_token_id)


# fp16


@pytest.fixture(scope="module")
def half_denoise(bundle, tiny_sd_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    spec = stable_diffusion.denoise(read_source(tiny_sd_folder), signatures(bundle)["denoise"], "fp16")
    return folder, export_graph(spec, folder)


def test_fp16_is_close_to_float32(bundle, half_denoise, unet):
    folder, record = half_denoise
    inputs = step_inputs(np.random.default_rng(4), 4, 3, 1, 8, 8)
    graph = replace(bundle.graph("denoise"), path=folder / record.manifest["file"])
    with open_graph(graph) as session:
        got = run(session, inputs, **sizes_of(inputs))["next_state"]
    expected, _ = step_by_hand(unet, inputs)
    assert 0 < np.abs(got - expected).max() < 5e-3 * np.abs(expected).max()


def test_fp16_computes_in_fp16_but_for_its_regions(half_denoise):
    folder, record = half_denoise
    model = onnx.shape_inference.infer_shapes(onnx.load(folder / record.manifest["file"]), strict_mode=True)
    known = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in known}
    types |= {weight.name: weight.data_type for weight in model.graph.initializer}
    used = {}
    for node in model.graph.node:
        used.setdefault(node.op_type, set()).update(types[name] for name in node.input[:1])
    half, single = {onnx.TensorProto.FLOAT16}, {onnx.TensorProto.FLOAT}
    for op in ("Conv", "MatMul", "Gemm", "Sigmoid", "Gelu"):
        assert used[op] == half, op
    for op in ("InstanceNormalization", "LayerNormalization", "Softmax", "Sin", "Cos", "ReduceSum"):
        assert used[op] == single, op
    assert not any(types[name] == onnx.TensorProto.FLOAT16 for name in (*record.manifest["outputs"],))


# The files


def test_files_tell_nothing_of_the_machine_that_made_them(tiny_export):
    graphs = sorted(tiny_export.path.glob("graphs/*.onnx"))
    assert len(graphs) == 5
    for path in graphs:
        content = path.read_bytes()
        for trace in (b".py", b"site-packages", b'File "', b"torch.nn", b"/home", b"/tmp", b"stack_trace"):
            assert trace not in content, (path.name, trace)
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model)
        fused = [("com.microsoft", 1)] if path.stem in ("denoise", "decode_latents") else []
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20), *fused]
        assert [entry.name for entry in model.functions] == ["MultiHeadAttention" for _ in fused]
        assert not model.metadata_props and not model.graph.value_info
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert not any(node.op_type == "Attention" for node in model.graph.node)


def test_weights_that_fp16_holds_are_stored_in_fp16(tiny_export, tiny_sd_folder):
    model = onnx.load(tiny_export.path / "graphs/denoise.onnx")
    sizes = {weight.name: (weight.data_type, np.prod(weight.dims)) for weight in model.graph.initializer}
    assert not [n for n, (kind, size) in sizes.items() if kind == onnx.TensorProto.FLOAT and size >= 64]
    whole = (tiny_sd_folder / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert (tiny_export.path / "graphs/denoise.onnx").stat().st_size < 0.7 * whole


def test_compaction_is_without_loss():
    exact = np.arange(100, dtype=np.float32) / 8
    weights = {"exact": exact, "inexact": exact + 1e-4, "large": exact * 1e6, "small": exact[:5]}
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape((1,)), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    values = [onnx_ir.Value(name=n, const_value=onnx_ir.tensor(w, name=n)) for n, w in weights.items()]
    nodes = [onnx_ir.node("Mul", [x, value]) for value in values]
    outputs = [node.outputs[0] for node in nodes]
    graph = onnx_ir.Graph([x], outputs, nodes=nodes, initializers=values, opset_imports={"": 20})
    onnx_file.compact(onnx_ir.Model(graph, ir_version=10))
    assert sorted(graph.initializers) == ["exact.fp16", "inexact", "large", "small"]
    np.testing.assert_array_equal(graph.initializers["exact.fp16"].const_value.numpy().astype(np.float32), exact)


def test_large_weights_lie_beside_the_graph(bundle, tiny_sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "EXTERNAL_ABOVE", 1000)
    signature = signatures(bundle)["decode_latents"]
    record = export_graph(stable_diffusion.decode_latents(read_source(tiny_sd_folder), signature, "fp32"), tmp_path)
    data = tmp_path / "graphs/decode_latents.onnx.data"
    assert record.bytes == data.stat().st_size + (tmp_path / "graphs/decode_latents.onnx").stat().st_size
    operators = [node.op_type for node in onnx_ir.load(tmp_path / "graphs/decode_latents.onnx").graph]
    assert "MultiHeadAttention" in operators and "Softmax" not in operators  # written twice, the weights once
    assert data.stat().st_size > 0.8 * record.bytes


@pytest.mark.slow
def test_an_fp16_export_has_its_weights_once_on_disk_and_lets_its_module_go(
    bundle, tiny_sd_folder, tmp_path, monkeypatch
):
    """Also while the graph is compared, for which it computes in float32."""
    monkeypatch.setattr(onnx_file, "EXTERNAL_ABOVE", 1000)
    spec = stable_diffusion.decode_latents(read_source(tiny_sd_folder), signatures(bundle)["decode_latents"], "fp16")
    weights, seen = list(spec.module.parameters()), {}

    class Session(OrtSession):
        def __init__(self, *arguments, **settings):
            seen.update({path.name: path.stat().st_size for path in (tmp_path / "graphs").iterdir()})
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(simulation, "OrtSession", Session)
    export_graph(spec, tmp_path)
    assert sum(weight.numel() for weight in weights) == 0
    own = {"decode_latents.onnx", "decode_latents.onnx.data"}
    assert {path.name for path in (tmp_path / "graphs").iterdir()} == own
    (graph,) = set(seen) - own
    assert seen[graph] < seen["decode_latents.onnx.data"]


def test_the_manifest_and_the_report_hold_what_was_measured(tiny_export, bundle):
    assert bundle.name == "bundle" and bundle.precision == "fp32"
    assert bundle.latents.multiple == 1 and bundle.latents.vae_scale_factor == 4 and bundle.latents.max_height == 64
    assert bundle.schedule["beta_schedule"] == "scaled_linear" and bundle.defaults.final.steps == 25
    assert [graph.name for graph in tiny_export.graphs] == list(STAGES[:-1])
    for record in tiny_export.graphs:
        assert record.seconds > 0 and record.nodes > 10 and record.peak_memory > 1 << 20
        parity = bundle.graphs[record.name].parity
        for name, found in record.parity.items():
            assert found.max_abs_error <= found.bound and parity[name] == found
    assert tiny_export.seconds >= sum(record.seconds for record in tiny_export.graphs)
    assert tiny_export.peak_memory >= max(record.peak_memory for record in tiny_export.graphs)


# What is refused


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def drop(file, *keys):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))


def schedule_as(folder, kind, **settings):
    """Have the folder name another scheduler, which says nothing but ``settings``."""
    edit(folder / "model_index.json", scheduler=["diffusers", kind])
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(settings))


def pickle_only(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")


def drop_a_weight(folder):
    file = folder / "text_encoder/model.safetensors"
    weights = safetensors.torch.load_file(file)
    del weights[next(name for name in weights if "final_layer_norm.weight" in name)]
    safetensors.torch.save_file(weights, file, {"format": "pt"})


def truncate(folder):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


REFUSED = {
    "pickle is never loaded.*safe_serialization": pickle_only,
    "source is a FluxPipeline": lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"),
    "text_encoder_2 is None": lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
    "text_encoder is 'T5": lambda f: edit(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
    "has no model_index.json": lambda f: (f / "model_index.json").unlink(),
    "no JSON object": lambda f: (f / "model_index.json").write_text("[]"),
    "cannot be read": lambda f: (f / "vae/config.json").write_text("{"),
    "scheduler_config.json is missing": lambda f: (f / "scheduler/scheduler_config.json").unlink(),
    "no model.safetensors": lambda f: (f / "text_encoder/model.safetensors").unlink(),
    "inpainting": lambda f: edit(f / "unet/config.json", in_channels=9),
    "class embeddings": lambda f: edit(f / "unet/config.json", class_embed_type="timestep"),
    "added embeddings": lambda f: edit(f / "unet/config.json", addition_embed_type="text_time"),
    "32 channels, the text encoder gives 48|48 channels": lambda f: edit(
        f / "unet/config.json", cross_attention_dim=48
    ),
    "incomplete or damaged": lambda f: edit(f / "unet/config.json", block_out_channels=None),
    "shifted latents": lambda f: edit(f / "vae/config.json", shift_factor=0.1),
    "scheduler_config.json: prediction_type 'score' is unknown": lambda f: edit(
        f / "scheduler/scheduler_config.json", prediction_type="score"
    ),
    "scheduler_config.json: .*thresholding = True.*not linear": lambda f: schedule_as(
        f, "DDIMScheduler", thresholding=True
    ),
    "scheduler_config.json: .*skip_prk_steps = False.*set it to true": lambda f: drop(
        f / "scheduler/scheduler_config.json", "skip_prk_steps"
    ),
    "is one of flow matching": lambda f: schedule_as(f, "FlowMatchEulerDiscreteScheduler"),
    "scheduler is 'NoScheduler', which diffusers .* lacks": lambda f: schedule_as(f, "NoScheduler"),
    "model_max_length is 1000": lambda f: drop(f / "tokenizer/tokenizer_config.json", "model_max_length"),
    "beta_end is None": lambda f: edit(f / "scheduler/scheduler_config.json", beta_end=None),
    "model_max_length is 77": lambda f: edit(f / "tokenizer/tokenizer_config.json", model_max_length=77),
    "lacks 1 weights": drop_a_weight,
    "cannot be loaded": truncate,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_exported_is_refused(sd_copy, tmp_path, tiny_blip_folder, monkeypatch, message):
    REFUSED[message](sd_copy)
    monkeypatch.setattr(graph_module, "_trace", None)  # nothing may be exported before
    with pytest.raises(ExportError, match=message):
        if message == "cannot be loaded":
            stable_diffusion.denoise(read_source(sd_copy), None, "fp32")
        else:
            export_bundle(sd_copy, tmp_path / "out", captioner=tiny_blip_folder)
    assert not (tmp_path / "out").exists()


def test_a_file_or_nothing_is_no_source(tmp_path, tiny_blip_folder):
    file = tmp_path / "model.ckpt"
    file.touch()
    for source, message in ((file, "from_single_file"), (tmp_path / "none", "does not exist"), (tmp_path, "ckpt")):
        with pytest.raises(ExportError, match=message):
            export_bundle(source, tmp_path / "out", captioner=tiny_blip_folder)


def test_unknown_settings_are_refused(tiny_sd_folder, tiny_blip_folder, tmp_path):
    for setting, message in (
        ({"precision": "fp8"}, "unknown precision 'fp8'.*fp32"),
        ({"defaults": {"step": 3}}, "unknown key 'step'.*'steps'"),
        ({"defaults": {"steps": 0}}, "steps.*from 1, not 0$"),
    ):
        with pytest.raises(ExportError, match=message):
            export_bundle(tiny_sd_folder, tmp_path / "out", captioner=tiny_blip_folder, **setting)


def test_a_folder_with_the_fp16_variant_alone_is_read(bundle, sd_copy):
    for name, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (sd_copy / name / f"{stem}.safetensors").rename(sd_copy / name / f"{stem}.fp16.safetensors")
    source = read_source(sd_copy)
    assert source.variants == {"unet": "fp16", "text_encoder": "fp16", "vae": None}
    for name, make in stable_diffusion.GRAPHS.items():
        assert next(make(source, signatures(bundle)[name], "fp32").module.parameters()).dtype == torch.float32


# All or nothing


@pytest.fixture
def quick(monkeypatch, tiny_export):
    """Export within a second: the graphs are copies of those that ``tiny_export`` made."""
    families.copy_graphs(monkeypatch, tiny_export, STAGES)


@pytest.fixture
def export(quick, tiny_sd_folder, tiny_blip_folder):
    def call(out, **settings):
        return export_bundle(tiny_sd_folder, out, captioner=tiny_blip_folder, **settings)

    return call


def test_an_unfaithful_export_leaves_nothing(tiny_sd_folder, tiny_blip_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(stable_diffusion.BOUNDS, "encode_text", {"fp32": 0.0})
    with pytest.raises(ExportError, match="'encode_text' differs from PyTorch: output 'embeddings'"):
        export_bundle(tiny_sd_folder, tmp_path / "deep" / "out", captioner=tiny_blip_folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_leaves_nothing(export, tiny_export, take_graphs, tmp_path, stage):
    take_graphs(tiny_export)

    def progress(name, index, total):
        assert (index, total) == (STAGES.index(name), len(STAGES))
        if name == stage:
            assert any(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out", progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_a_bundle_and_only_a_bundle(export, tiny_export, take_graphs, tmp_path):
    take_graphs(tiny_export)
    out = tmp_path / "out"
    (tmp_path / "out").mkdir()
    export(out, name="first")  # an empty folder is free
    with pytest.raises(OutputError, match="not empty"):
        export(out, name="second")
    (out / "stray").write_text("of the old one")

    def stop(name, index, total):
        if name == "seal":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(out, name="second", overwrite=True, progress=stop)
    assert Bundle.open(out).name == "first"
    assert export(out, name="second", overwrite=True, defaults={"steps": 3}).path == out
    assert Bundle.open(out).name == "second" and Bundle.open(out).defaults.final.steps == 3
    assert sorted(path.name for path in out.iterdir()) == ["bundle.json", "bundle.sha256", "graphs", "tokenizers"]
    assert list(tmp_path.iterdir()) == [out]

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").touch()
    with pytest.raises(OutputError, match="no bundle"):
        export(photos, overwrite=True)
    with pytest.raises(OutputError, match="no folder"):
        export(photos / "cat.jpg", overwrite=True)
    assert (photos / "cat.jpg").exists()


def test_a_place_that_cannot_be_written_is_an_output_error(export, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        export(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("DDPMScheduler", {"variance_type": "learned_range"}),
        ("UniPCMultistepScheduler", {"use_dynamic_shifting": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
        ("KDPM2DiscreteScheduler", {"beta_start": 5}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}),  # with epsilon
    ],
)
def test_a_schedule_that_no_table_can_follow_is_not_dropped(sd_copy, kind, change):
    schedule_as(sd_copy, kind, **change)
    (key,) = change
    with pytest.raises(ExportError, match="rescale_zero_terminal_snr" if key == "rescale_betas_zero_snr" else key):
        read_source(sd_copy)


# Configurations as their own libraries read them


def loaded(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what it rewrites
        return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers mixes numpy and torch
@pytest.mark.parametrize(
    ("kind", "settings", "sampler"),
    [
        ("DDIMScheduler", {"steps_offset": 0, "clip_sample": True}, "ddim"),
        ("DDIMScheduler", {"beta_schedule": "scaled_linear"}, "ddim"),
        ("DDPMScheduler", {"timestep_spacing": "trailing"}, "ddpm"),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, "heun"),
        ("LCMScheduler", {}, "lcm"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "_class_name": "PNDMScheduler"}, "euler"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "dpmpp_2m_sde"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -float("inf")}, "dpmpp_2m"),
        ("PNDMScheduler", {"skip_prk_steps": True, "trained_betas": None}, "pndm"),
    ],
)
def test_a_scheduler_is_read_as_the_pipeline_takes_it(sd_copy, kind, settings, sampler):
    schedule_as(sd_copy, kind, **settings)
    source = read_source(sd_copy)
    assert source.sampler == sampler
    theirs = loaded(sd_copy).scheduler
    theirs.set_timesteps(10)
    schedule = NoiseSchedule.from_config(json.loads(json.dumps(source.schedule, allow_nan=False)))
    table = sampler_table(schedule, sampler, 10, 1.0)
    np.testing.assert_allclose(table.timesteps, theirs.timesteps, rtol=1e-5)
    np.testing.assert_array_equal(schedule.alphas_cumprod, theirs.alphas_cumprod)
    rewritten = [key for key in ("steps_offset", "clip_sample") if any(f"{key} is taken" in n for n in source.notes)]
    own = getattr(diffusers, kind)(**{key: value for key, value in settings.items() if not key.startswith("_")})
    assert rewritten == [
        key for key in ("steps_offset", "clip_sample") if own.config.get(key) != theirs.config.get(key)
    ]


def test_a_scheduler_that_is_no_sampler_gives_way_to_ddim_and_says_so(sd_copy):
    schedule_as(sd_copy, "KDPM2DiscreteScheduler", beta_schedule="scaled_linear", steps_offset=1)
    source = read_source(sd_copy)
    assert source.sampler == "ddim" and source.schedule["beta_start"] == 0.00085
    assert source.notes == ("the folder's KDPM2DiscreteScheduler is not among the samplers; ddim is the bundle's "
                            "default instead",)  # fmt: skip


@pytest.mark.parametrize(
    ("version", "size"),
    [("0.6.0", 32), ("0.8.1", 8), ("0.9.0.dev0", 32), ("0.42.1", 8), ("0.6.0", [32, 48]), ("0.6.0", 96), (None, 32)],
)
def test_the_default_size_is_the_pipelines(sd_copy, version, size):
    edit(sd_copy / "unet/config.json", sample_size=size)
    if version is None:
        drop(sd_copy / "unet/config.json", "_diffusers_version")
    else:
        edit(sd_copy / "unet/config.json", _diffusers_version=version)
    source = read_source(sd_copy)
    theirs = loaded(sd_copy).unet.config.sample_size
    assert (source.height, source.width) == ((theirs, theirs) if isinstance(theirs, int) else tuple(theirs))
    assert any("sample_size is taken as 64" in note for note in source.notes) == (theirs != size)


def test_what_the_configurations_leave_out_is_the_default_of_the_class(sd_copy):
    drop(sd_copy / "unet/config.json", "in_channels", "out_channels", "attention_type")
    drop(sd_copy / "vae/config.json", "latent_channels", "scaling_factor", "out_channels")
    expected = read_source(sd_copy)
    assert expected.channels == 4
    text = json.loads((sd_copy / "text_encoder/config.json").read_text())
    (sd_copy / "text_encoder/config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    edit(sd_copy / "unet/config.json", cross_attention_dim=[32, 32])
    assert replace(read_source(sd_copy), configs={}) == replace(expected, configs={})
    drop(sd_copy / "unet/config.json", "cross_attention_dim")
    with pytest.raises(ExportError, match="text of 1280 channels"):
        read_source(sd_copy)


def test_a_vae_that_does_not_say_its_scaling_has_diffusers_own(sd_copy):
    path = sd_copy / "vae/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "scaling_factor"}))
    assert read_source(sd_copy).scaling == diffusers.AutoencoderKL().config.scaling_factor == 0.18215


@pytest.mark.parametrize("defaults", [{"sampler": "dimm"}, {"steps": 5000}, {"dns_guidance": 1e39}])
def test_defaults_that_could_never_run_are_refused_at_once(tiny_sd_folder, tiny_blip_folder, tmp_path, defaults):
    stages = []
    with pytest.raises(ExportError, match="defaults"):
        export_bundle(
            tiny_sd_folder,
            tmp_path / "out",
            captioner=tiny_blip_folder,
            defaults=defaults,
            progress=lambda *stage: stages.append(stage),
        )
    assert not stages
    assert list(tmp_path.iterdir()) == []


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("UNet2DConditionModel", {}, "no sampler"),
        ("DDIMInverseScheduler", {}, "no sampler"),
        ("FlowMatchEulerDiscreteScheduler", {}, "flow matching"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "flow matching"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(kind, changes, reason):
    family = FAMILIES["StableDiffusionPipeline"]
    with pytest.raises(ExportError, match=reason):
        _read_scheduler(family, kind, {**BETAS, **changes})


def test_clipping_by_default_counts_where_the_pipeline_does_not_switch_it_off():
    kept, _, notes = _read_scheduler(FAMILIES["StableDiffusionPipeline"], "DDIMScheduler", BETAS)
    assert kept["clip_sample"] is False and any("clip_sample" in note for note in notes)
    with pytest.raises(ExportError, match="clip_sample = True"):
        _read_scheduler(FAMILIES["StableDiffusionXLPipeline"], "DDIMScheduler", BETAS)
