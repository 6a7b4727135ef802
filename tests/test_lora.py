"""LoRA files merged at export, against diffusers with the same file loaded and not merged."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from dnp.cli import run
from dnp.engine import open_graph
from dnp.engine.errors import ExportError
from dnp.export.bundle import export_bundle
from dnp.export.families import stable_diffusion
from dnp.export.families.lora import Lora
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


def graph(name, source, folder):
    folder.mkdir()
    written = export_graph(stable_diffusion.GRAPHS[name](source, "fp32"), folder)
    return folder / written.manifest["file"], written


def names(path):
    import onnx

    model = onnx.load(path).graph
    return [node.op_type for node in model.node], [tensor.name for tensor in model.initializer]


def test_a_merged_lora_is_what_diffusers_computes_with_it(tiny_sd_folder, lora, with_lora, tiny_export, tmp_path):
    from dnp.engine import Bundle

    source = replace(read_source(tiny_sd_folder), loras=(Lora(lora, SCALE),))
    path, _ = graph("encode_text", source, tmp_path / "text")
    ids = np.arange(16, dtype=np.int64)[None] % source.vocabulary
    spec = Bundle.open(tiny_export.path).graph("encode_text")
    results = []
    for found in (replace(spec, path=path), spec):
        with open_graph(found) as session:
            session.reshape(batch=1)
            session.inputs["ids"].write(ids)
            session.run()
            results.append(session.outputs["context"].read())
    with torch.no_grad():
        expected = with_lora.text_encoder(torch.from_numpy(ids)).last_hidden_state.numpy()
    assert abs(results[0] - expected).max() < 1e-4
    assert abs(results[1] - expected).max() > 1e-2  # without it

    merged, plain = (
        stable_diffusion.GRAPHS["denoise"](s, "fp32").module.unet for s in (source, replace(source, loras=()))
    )
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    with torch.no_grad():
        one, two, three = (unet(x, 500, context).sample for unet in (merged, plain, with_lora.unet))
    assert abs(one - three).max() < 1e-4
    assert abs(two - three).max() > 1e-2
    assert [*merged.state_dict()] == [*plain.state_dict()]  # the same model, other numbers


def test_an_fp16_graph_with_a_lora_differs_in_numbers_alone(tiny_sd_folder, lora, tmp_path):
    """So that the plan of one can be refitted with the weights of the other."""
    source = read_source(tiny_sd_folder)
    found = []
    for part, loras in (("plain", ()), ("merged", (Lora(lora, SCALE),))):
        (tmp_path / part).mkdir()
        graph_of = stable_diffusion.GRAPHS["encode_text"](replace(source, loras=loras), "fp16")
        found.append(names(tmp_path / part / export_graph(graph_of, tmp_path / part).manifest["file"]))
    assert found[0] == found[1]


def test_a_file_that_is_no_lora_for_this_model_is_a_sentence(tiny_sd_folder, tiny_blip_folder, lora, tmp_path):
    other, pickled, wrong = (tmp_path / name for name in ("other.safetensors", "lora.bin", "wrong.safetensors"))
    safetensors.torch.save_file({"x": torch.zeros(2)}, other)
    pickled.write_bytes(b"")
    state = safetensors.torch.load_file(lora)
    safetensors.torch.save_file({key: torch.zeros(3, 3) for key in state}, wrong)
    for file, told in (
        (other, "is no LoRA for Stable Diffusion 1.x"),
        (pickled, "pickle is never loaded"),
        (tmp_path / "none.safetensors", "does not exist"),
        (wrong, "does not fit the text_encoder of this model"),
    ):
        with pytest.raises(ExportError, match=told):
            export_bundle(tiny_sd_folder, tmp_path / "out", captioner=tiny_blip_folder, loras=[Lora(file)])
        assert not (tmp_path / "out").exists()


def test_a_scale_is_read_after_the_last_colon(capsys):
    assert Lora.parse("a/b.safetensors") == Lora(type(Lora.parse("x").file)("a/b.safetensors"))
    assert Lora.parse("b.safetensors:0.5").scale == 0.5
    with pytest.raises(ExportError, match="must be a number, not 'much'"):
        Lora.parse("b.safetensors:much")
    code = run(["export", "nowhere", "out", "--captioner", "nowhere", "--lora", "b.safetensors:nan"])
    assert (code, "not 'nan'" in capsys.readouterr().err) == (5, True)


def test_the_command_merges_and_the_bundle_says_so(tiny_sd_folder, tiny_blip_folder, lora, tmp_path, capsys):
    out = tmp_path / "bundle"
    arguments = ["export", str(tiny_sd_folder), str(out), "--captioner", str(tiny_blip_folder)]
    assert run([*arguments, "--lora", f"{lora}:{SCALE}"]) == 0
    capsys.readouterr()
    assert json.loads((out / "bundle.json").read_text())["created_with"][lora.name] == "merged as 0.75"
    assert run(["inspect", str(out)]) == 0
    assert "style.safetensors merged as 0.75" in capsys.readouterr().out
