"""LoRA files merged at export, against diffusers with the same file loaded and not merged."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextModel

from dnp.cli import run
from dnp.engine import Bundle, open_graph
from dnp.engine.bundle.contract import signatures
from dnp.engine.errors import ExportError
from dnp.export.bundle import export_bundle
from dnp.export.families import lora as lora_module
from dnp.export.families import stable_diffusion
from dnp.export.families.lora import Lora, check_fit, check_loras, merge
from dnp.export.families.source import read_source
from dnp.export.graph import export_graph

SCALE = 0.75


def pipeline(folder):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def lora(tiny_sd_folder, tmp_path_factory):
    """A LoRA of random weights for the UNet's and the text encoder's attention."""
    models = pipeline(tiny_sd_folder)
    layers = {}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj", "out_proj"])):
            model = getattr(models, name)
            model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights="gaussian"))
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(weight, std=0.5)
            layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(folder, weight_name="style.safetensors", **layers)
    return folder / "style.safetensors"


@pytest.fixture
def with_lora(tiny_sd_folder, lora):
    """diffusers' own models with the LoRA beside the weights."""
    models = pipeline(tiny_sd_folder)
    models.load_lora_weights(lora.parent, weight_name=lora.name)
    models.set_adapters(["default_0"], [SCALE])
    return models


def names(path):
    import onnx

    model = onnx.load(path).graph
    return [node.op_type for node in model.node], [tensor.name for tensor in model.initializer]


def test_a_merged_lora_is_what_diffusers_computes_with_it(tiny_sd_folder, lora, with_lora, tiny_export, tmp_path):
    source = replace(read_source(tiny_sd_folder), loras=(Lora(lora, SCALE),))
    bundle = Bundle.open(tiny_export.path)
    wanted, spec = signatures(bundle), bundle.graph("encode_text")
    written = export_graph(stable_diffusion.encode_text(source, wanted["encode_text"], "fp32"), tmp_path)
    path = tmp_path / written.manifest["file"]
    ids = np.arange(16, dtype=np.int64)[None]
    results = []
    for found in (replace(spec, path=path), spec):
        with open_graph(found) as session:
            session.reshape(batch=1, tokens=16)
            session.inputs["ids"].write(ids)
            session.run()
            results.append(session.outputs["embeddings"].read())
    with torch.no_grad():
        expected = with_lora.text_encoder(torch.from_numpy(ids)).last_hidden_state.numpy()
    assert abs(results[0] - expected).max() < 1e-4
    assert abs(results[1] - expected).max() > 1e-2  # without it

    merged, plain = (
        stable_diffusion.denoise(s, wanted["denoise"], "fp32").module.unet for s in (source, replace(source, loras=()))
    )
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    with torch.no_grad():
        one, two, three = (unet(x, 500, context).sample for unet in (merged, plain, with_lora.unet))
    assert abs(one - three).max() < 1e-4
    assert abs(two - three).max() > 1e-2
    assert [*merged.state_dict()] == [*plain.state_dict()]  # the same model, other numbers


@pytest.mark.slow
def test_an_fp16_graph_with_a_lora_differs_in_numbers_alone(tiny_sd_folder, lora, tiny_export, tmp_path):
    """So that the plan of one can be refitted with the weights of the other."""
    source, wanted = read_source(tiny_sd_folder), signatures(Bundle.open(tiny_export.path))["encode_text"]
    found = []
    for part, loras in (("plain", ()), ("merged", (Lora(lora, SCALE),))):
        (tmp_path / part).mkdir()
        graph_of = stable_diffusion.encode_text(replace(source, loras=loras), wanted, "fp16")
        found.append(names(tmp_path / part / export_graph(graph_of, tmp_path / part).manifest["file"]))
    assert found[0] == found[1]


def test_a_file_that_is_no_lora_for_this_model_is_a_sentence(tiny_sd_folder, tiny_blip_folder, lora, tmp_path):
    other, pickled, wrong = (tmp_path / name for name in ("other.safetensors", "lora.bin", "wrong.safetensors"))
    safetensors.torch.save_file({"x": torch.zeros(2)}, other)
    pickled.write_bytes(b"")
    state = safetensors.torch.load_file(lora)
    safetensors.torch.save_file({key: torch.zeros(3, 3) for key in state}, wrong)
    for file, told in (
        (other, "is no LoRA for Stable Diffusion"),
        (pickled, "pickle is never loaded"),
        (tmp_path / "none.safetensors", "does not exist"),
        (wrong, "does not fit the text_encoder of this model"),
    ):
        with pytest.raises(ExportError, match=told):
            export_bundle(tiny_sd_folder, tmp_path / "out", captioner=tiny_blip_folder, loras=[Lora(file)])
        assert not (tmp_path / "out").exists()


# The factor of every layer


@pytest.fixture
def models(tiny_sd_folder):
    """The two models that a LoRA may change, as they are exported."""
    folder = tiny_sd_folder
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
    }


def weights(model):
    return {name.removesuffix(".base_layer.weight"): w.detach().clone() for name, w in model.named_parameters()}


def changes(models, file, scale=1.0):
    """What merging ``file`` adds to each weight that it changes, by component and name."""
    lora = Lora(file, scale)
    check_loras((lora,))
    check_fit(models, (lora,))
    found = {}
    for component, model in models.items():
        before = weights(model)
        merge(model, component, lora)
        found |= {(component, n): w - before[n] for n, w in weights(model).items() if not torch.equal(w, before[n])}
    return found


def check_changes(found, expected):
    assert found.keys() == expected.keys()
    for place, change in expected.items():
        torch.testing.assert_close(found[place], change, rtol=1e-4, atol=1e-5)


def layers(model):
    """The linear layers and convolutions, by name."""
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}


def random_pair(weight, rank, generator):
    """A, B and B·A for a weight; of a convolution, by torch's own convolutions one after the other."""
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)
    return down, up, torch.einsum("or,r...->o...", up.reshape(-1, rank), down)


def kohya_name(component, path):
    return {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[component] + path.replace(".", "_")


def test_every_layer_of_a_kohya_file_has_its_own_rank_and_alpha(models, tmp_path):
    generator, state, expected = torch.Generator().manual_seed(0), {}, {}
    for component, model in models.items():
        for n, (path, weight) in enumerate(layers(model).items()):
            rank, alpha = 1 + n % 4, [None, 0.5, 3.0, 8.0, 1.0][n % 5]
            down, up, product = random_pair(weight, rank, generator)
            name = kohya_name(component, path)
            state |= {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()}
            product = torch.einsum("or,r...->o...", up.half().float().reshape(-1, rank), down.half().float())
            if alpha is not None:
                state[f"{name}.alpha"] = torch.tensor(alpha)
            expected[component, f"{path}.weight"] = -0.5 * (1 if alpha is None else alpha / rank) * product
    safetensors.torch.save_file(state, tmp_path / "kohya.safetensors")
    check_changes(changes(models, tmp_path / "kohya.safetensors", -0.5), expected)


CONFIGS = {
    "alpha": {"r": 4, "lora_alpha": 16},
    "less than one": {"r": 4, "lora_alpha": 1},
    "rsLoRA": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "patterns": {"r": 3, "lora_alpha": 6},
    "patterns and rsLoRA": {"r": 3, "lora_alpha": 6, "use_rslora": True},
}  # fmt: skip
PATTERNS = {
    "unet": {"rank_pattern": {"to_q": 2, "attentions.0.proj_in": 4}, "alpha_pattern": {"attn2.to_k": 1, "ff.net.2": 9}},
    "text_encoder": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {r".*layers\.1.*v_proj": 7}},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_file_that_diffusers_saved_is_what_peft_computes(models, tiny_sd_folder, tmp_path, config):
    targets = {
        "unet": ["to_q", "to_k", "to_out.0", "proj_in", "conv1", "ff.net.2", "conv_in"],
        "text_encoder": ["q_proj", "v_proj", "fc1"],
    }
    trained, expected = pipeline(tiny_sd_folder), {}
    saved = {}
    torch.manual_seed(3)
    for component, names in targets.items():
        model = getattr(trained, component)
        patterns = PATTERNS[component] if config.startswith("patterns") else {}
        settings = LoraConfig(**CONFIGS[config], **patterns, target_modules=names, init_lora_weights="gaussian")
        model.add_adapter(settings)
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight)
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                expected[component, f"{name}.weight"] = module.get_delta_weight("default").detach()
        saved[f"{component}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
        saved[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, weight_name="peft.safetensors", **saved)
    check_changes(changes(models, tmp_path / "peft.safetensors"), expected)


def test_what_peft_itself_saves_has_its_alpha_beside_it(models, tiny_sd_folder, tmp_path):
    settings = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "conv2"], init_lora_weights=False)
    trained = get_peft_model(UNet2DConditionModel.from_pretrained(tiny_sd_folder / "unet"), settings)
    trained.save_pretrained(tmp_path)
    expected = {
        ("unet", f"{name.removeprefix('base_model.model.')}.weight"): module.get_delta_weight("default").detach()
        for name, module in trained.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    file = tmp_path / "adapter_model.safetensors"
    check_changes(changes(models, file), expected)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ExportError, match=r"keeps alpha in an adapter_config\.json"):
        check_loras((Lora(file),))


@pytest.mark.parametrize(
    ("key", "component", "path"),
    [
        ("unet.{}.processor.to_q_lora.{}.weight", "unet", "mid_block.attentions.0.transformer_blocks.0.attn1"),
        ("{}.processor.to_out_lora.{}.weight", "unet", "mid_block.attentions.0.transformer_blocks.0.attn1"),
        ("unet.{}.to_v.lora.{}.weight", "unet", "mid_block.attentions.0.transformer_blocks.0.attn2"),
        ("text_encoder.text_model.{}.to_out_lora.{}.weight", "text_encoder", "encoder.layers.1.self_attn"),
        ("text_encoder.text_model.{}.v_proj.lora_linear_layer.{}.weight", "text_encoder", "encoder.layers.0.self_attn"),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora_{}.weight", "unet", None),
    ],
)
def test_older_names_of_layers(models, tmp_path, key, component, path):
    layer = path or "mid_block.attentions.0.transformer_blocks.0.attn1"
    names = {"to_q": "to_q", "to_v": "to_v", "v_proj": "v_proj"}
    last = next((ours for theirs, ours in names.items() if theirs in key), None)
    last = last or {"unet": "to_out.0", "text_encoder": "out_proj"}[component]
    weight = layers(models[component])[f"{layer}.{last}"]
    down, up, product = random_pair(weight, 3, torch.Generator().manual_seed(1))
    parts = [key.format(*([path] if path else []), part) for part in ("down", "up")]
    safetensors.torch.save_file(dict(zip(parts, (down, up), strict=True)), tmp_path / "old.safetensors")
    check_changes(changes(models, tmp_path / "old.safetensors"), {(component, f"{layer}.{last}.weight"): product})


def test_names_of_the_original_model_are_those_that_diffusers_makes_of_them():
    """kohya's files for XL have them."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64, 64), layers_per_block=2, norm_num_groups=8, cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=2,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        )  # fmt: skip
    paths = {id(weight): path for path, weight in layers(unet).items()}
    names = lora_module._weights(unet)
    original = {
        n: paths[id(w)]
        for n, w in names.items()
        if re.match("(input|output|middle)_block.*(?<!_to_out)$|time_embed_|out_2", n)
    }
    state = {}
    for n, name in enumerate(original):
        state |= {
            f"lora_unet_{name}.lora_down.weight": torch.tensor(n),
            f"lora_unet_{name}.lora_up.weight": torch.ones(1),
        }
    theirs, _ = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=unet.config)
    theirs = convert_unet_state_dict_to_peft(theirs)
    numbers = {int(tensor): re.sub(r"^unet\.|\.lora_A.*", "", key) for key, tensor in theirs.items() if "lora_A" in key}
    assert {name: numbers[n] for n, name in enumerate(original)} == original
    everything = {path for path in paths.values() if not path.startswith("add_embedding")}
    assert {*original.values()} == everything


# What is refused


def pair(name, down="lora_down", up="lora_up", rank=2, width=64):
    return {f"{name}.{down}.weight": torch.ones(rank, width), f"{name}.{up}.weight": torch.ones(width, rank)}


Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KQ = kohya_name("unet", Q)
PEFT = pair(f"unet.{Q}", "lora_A", "lora_B")
SETTINGS = {"unet.r": 2, "unet.lora_alpha": 2}


def header(**changes):
    return {"lora_adapter_metadata": json.dumps({**SETTINGS, **{f"unet.{k}": v for k, v in changes.items()}})}


FAULTS = {
    "is a DoRA .*dora_scale": {**pair(KQ), f"{KQ}.dora_scale": torch.ones(64, 1)},
    "is a DoRA .*lora_magnitude": {**PEFT, f"unet.{Q}.lora_magnitude_vector": torch.ones(64)},
    "is a LoHa .*hada_w1_a": {f"{KQ}.hada_w{n}_{x}": torch.ones(2, 2) for n in (1, 2) for x in "ab"},
    "is a LoKr .*lokr_w1": {f"{KQ}.lokr_w1": torch.ones(2, 2), f"{KQ}.lokr_w2": torch.ones(2, 2)},
    "is an OFT .*oft_blocks": {f"{KQ}.oft_blocks": torch.ones(2, 2, 2)},
    "is a GLoRA": {f"{KQ}.{x}.weight": torch.ones(2, 2) for x in ("a1", "a2", "b1", "b2")},
    "Tucker core": {**pair(KQ), f"{KQ}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
    "full differences": {**pair(KQ), f"{KQ}.diff_b": torch.ones(64)},
    "with biases": {**PEFT, f"unet.{Q}.lora_B.bias": torch.ones(64)},
    "is a textual inversion": {"emb_params": torch.ones(2, 32)},
    "that is known: 'unet.x.weight'": {**PEFT, "unet.x.weight": torch.ones(1)},
    "no counterpart": {f"{KQ}.lora_down.weight": torch.ones(2, 64)},
    "'lora_unet_other.alpha' have no": {**pair(KQ), "lora_unet_other.alpha": torch.ones(())},
    "NaN or infinity in '.*lora_up.weight'": {**pair(KQ), f"{KQ}.lora_up.weight": torch.full((64, 2), torch.nan)},
    "NaN or infinity in '.*lora_down": {**pair(KQ), f"{KQ}.lora_down.weight": torch.full((2, 64), torch.inf).half()},
    "alpha tensor": {**pair(KQ), f"{KQ}.alpha": torch.tensor(0.0)},
    "lacks 1 of the layers.*down_blocks.7": {**PEFT, **pair(f"unet.{Q.replace('mid_block', 'down_blocks.7')}")},
    r"have the shapes \[2, 32\]": {**pair(KQ, width=32)},
    "both change the same layer": {**pair(KQ), **PEFT},
    "has no text_encoder_2": pair("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", width=32),
    "changes a transformer": pair("transformer.single_blocks.0.attn.to_q", "lora_A", "lora_B"),
    "rank 4 of .*has rank 2": (PEFT, header(r=4)),
    "settings for 'to_k' in the unet": (PEFT, header(alpha_pattern={"to_k": 3})),
    r"alpha_pattern .* says \[3, 4\]": (PEFT, header(alpha_pattern={"attn1.to_q": 3, "to_q": 4})),
    "use_dora = True": (PEFT, header(use_dora=True)),
    "init_lora_weights = 'pissa'": (PEFT, header(init_lora_weights="pissa")),
    "says alpha twice": ({**PEFT, f"unet.{Q}.alpha": torch.ones(())}, header()),
    "some_new_setting = 3": (PEFT, header(some_new_setting=3)),
    "has rank 0": {
        f"{KQ}.lora_down.weight": torch.ones(0, 64),
        f"{KQ}.lora_up.weight": torch.ones(64, 0),
        f"{KQ}.alpha": torch.tensor(4.0),
    },
    "is no pattern": (PEFT, header(rank_pattern={"(": 4})),
    r"rank_pattern of its settings is \['to_q'\]": (PEFT, header(rank_pattern=["to_q"])),
    "settings of .* cannot be read": (PEFT, {"lora_adapter_metadata": "{"}),
}


@pytest.mark.parametrize("told", FAULTS)
def test_what_cannot_be_used_whole_is_refused_by_name(models, tmp_path, told):
    fault = FAULTS[told]
    state, metadata = fault if isinstance(fault, tuple) else (fault, None)
    safetensors.torch.save_file(state, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ExportError, match=told.replace("alpha tensor", r"has the alpha tensor\(0\.\)")) as caught:
        changes(models, tmp_path / "x.safetensors")
    assert "fp32" not in str(caught.value)


def test_layers_that_the_model_lacks_are_refused_before_anything_is_exported(
    tiny_sd_folder, tiny_blip_folder, tmp_path
):
    safetensors.torch.save_file(pair(KQ.replace("mid_block", "down_blocks_7")), tmp_path / "x.safetensors")
    stages = []
    with pytest.raises(ExportError, match="lacks 1 of the layers"):
        export_bundle(
            tiny_sd_folder, tmp_path / "out", captioner=tiny_blip_folder, loras=[Lora(tmp_path / "x.safetensors")],
            progress=lambda *stage: stages.append(stage),
        )  # fmt: skip
    assert not stages


def test_a_scale_that_float32_cannot_hold_is_refused(models, tmp_path):
    safetensors.torch.save_file(pair(KQ), tmp_path / "x.safetensors")
    with pytest.raises(ExportError, match="choose a smaller scale"):
        changes(models, tmp_path / "x.safetensors", 3e38)


def test_a_scale_is_read_after_the_last_colon(capsys):
    assert Lora.parse("a/b.safetensors") == Lora(type(Lora.parse("x").file)("a/b.safetensors"))
    assert Lora.parse("b.safetensors:0.5").scale == 0.5
    with pytest.raises(ExportError, match="must be a number, not 'much'"):
        Lora.parse("b.safetensors:much")
    code = run(["export", "nowhere", "out", "--captioner", "nowhere", "--lora", "b.safetensors:nan"])
    assert (code, "not 'nan'" in capsys.readouterr().err) == (5, True)


@pytest.mark.slow  # exports a whole bundle again
def test_the_command_merges_and_the_bundle_says_so(tiny_sd_folder, tiny_blip_folder, lora, tmp_path, capsys):
    out = tmp_path / "bundle"
    arguments = ["export", str(tiny_sd_folder), str(out), "--captioner", str(tiny_blip_folder)]
    assert run([*arguments, "--lora", f"{lora}:{SCALE}"]) == 0
    capsys.readouterr()
    assert json.loads((out / "bundle.json").read_text())["created_with"][lora.name] == "merged as 0.75"
    assert run(["inspect", str(out)]) == 0
    assert "style.safetensors merged as 0.75" in capsys.readouterr().out
