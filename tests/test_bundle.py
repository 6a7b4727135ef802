"""Bundles: what opens, what is refused and in which words. The graphs here are bytes; no backend reads them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dnp.engine.bundle.bundle import Bundle, file_record, seal
from dnp.engine.bundle.columns import ROW
from dnp.engine.bundle.contract import signatures, symbols
from dnp.engine.bundle.manifest import CaptionSpec, ConditioningSpec, GuidanceSpec, LatentSpec, TextSpec, TokenizerSpec
from dnp.engine.bundle.tensors import TensorSpec
from dnp.engine.errors import BundleError, SettingsError

TEXT = TextSpec(length=5, tokenizers=(TokenizerSpec("tokenizers/prompt.json", bos=0, eos=1, pad=1),), empty="encoded")
CONDITIONING = {"embeddings": ConditioningSpec(("tokens", 6), "text")}
GUIDANCE = GuidanceSpec(roles=2, methods=False, embedded=False)
LATENTS = LatentSpec(channels=4, height=8, width=12, multiple=4, max_height=32, max_width=32, vae_scale_factor=4)
CAPTION = CaptionSpec(
    image_size=16, length=7, layers=2, heads=2, head_dim=8, tokens=5, vocab=30, bos=4, eos=2, pad=0, max_length=7,
    tokenizer="tokenizers/caption.json",
)  # fmt: skip
GRAPHS = ["encode_text", "denoise", "decode_latents", "encode_image", "caption_step"]


def model(precision="fp32", **changes):
    """As much of a manifest as the contract reads."""
    parts = {"text": TEXT, "conditioning": CONDITIONING, "guidance": GUIDANCE, "latents": LATENTS, "caption": CAPTION}
    return SimpleNamespace(precision=precision, **{**parts, **changes})


def unsealed(precision="fp32"):
    """A manifest as an exporter would hand it to ``seal``: without "files"."""
    return {
        "schema": 2,
        "name": "tiny",
        "family": "stable-diffusion-1",
        "precision": precision,
        "created_with": {"dnp-engine": "0.1.0"},
        "text": {**dataclasses.asdict(TEXT), "tokenizers": [dataclasses.asdict(one) for one in TEXT.tokenizers]},
        "conditioning": {"embeddings": {"shape": ["tokens", 6], "source": "text"}},
        "guidance": dataclasses.asdict(GUIDANCE),
        "latents": dataclasses.asdict(LATENTS),
        "schedule": {"num_train_timesteps": 1000, "prediction_type": "epsilon"},
        "caption": dataclasses.asdict(CAPTION),
        "defaults": {
            "final": {"sampler": "ddim", "steps": 25, "guidance": 4},
            "dns": {"sampler": "ddim", "steps": 25, "guidance": 3.0},
        },
        "graphs": {
            name: {
                "file": f"graphs/{name}.onnx",
                "inputs": {n: t.to_dict() for n, t in inputs.items()},
                "outputs": {n: t.to_dict() for n, t in outputs.items()},
                "parity": {n: {"max_abs_error": 1e-6, "bound": 1e-4} for n in outputs},
            }
            for name, (inputs, outputs) in signatures(model(precision)).items()
        },
    }  # fmt: skip


def make_bundle(folder: Path, precision="fp32") -> Path:
    (folder / "graphs").mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    for name in GRAPHS:
        (folder / f"graphs/{name}.onnx").write_bytes(f"not a graph, but {name}".encode() * 50)
    for name in ("prompt", "caption"):
        (folder / f"tokenizers/{name}.json").write_text("{}")
    seal(folder, unsealed(precision))
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("shared") / "bundle")


def rewrite(folder, change):
    manifest = json.loads((folder / "bundle.json").read_text())
    change(manifest)
    write_sealed(folder, json.dumps(manifest).encode())


def write_sealed(folder, raw):
    """Write a manifest as if it had been sealed so."""
    (folder / "bundle.json").write_bytes(raw)
    (folder / "bundle.sha256").write_text(f"{hashlib.sha256(raw).hexdigest()}  bundle.json\n")


def refusal(folder):
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    return str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_was_sealed_opens(tmp_path, precision):
    bundle = Bundle.open(make_bundle(tmp_path / "b", precision))
    assert (bundle.text, bundle.latents, bundle.caption) == (TEXT, LATENTS, CAPTION)
    assert bundle.schedule == {"num_train_timesteps": 1000, "prediction_type": "epsilon"}
    assert list(bundle.graphs) == GRAPHS
    denoise = bundle.graph("denoise")
    assert denoise.path == bundle.path / "graphs/denoise.onnx"
    assert denoise.symbols == ("places", "height", "width", "steps", "noise_steps", "rows", "tokens")
    assert denoise.parity["latents"].bound == 1e-4
    keys = bundle.graph("caption_step").inputs["keys"]
    assert keys == TensorSpec(("sequences", 2, 2, 7, 8), "float16" if precision == "fp16" else "float32")
    assert isinstance(bundle.defaults.final.guidance, float)


RANGES = {"largest": 9e4, "at": "p", "limit": 32752.0, "error": 1e-3, "precision": "fp16", "float32": ["p", "a.b/c"]}


def test_ranges_are_optional_and_checked(tmp_path, folder):
    assert all(graph.ranges is None for graph in Bundle.open(folder).graphs.values())
    rewrite(folder, lambda m: m["graphs"]["denoise"].update(ranges=RANGES))
    ranges = Bundle.open(folder).graph("denoise").ranges
    assert ranges.to_dict() == RANGES and ranges.float32 == ("p", "a.b/c") and ranges.share == 9e4 / 65504
    for change, message in (
        ({"float32": ["p", 3]}, "float32: must be a list of names"),
        ({"float32": "p"}, "float32: must be a list of names"),
        ({"largest": "much"}, "largest: must be a finite number"),
        ({"precision": "fp8"}, "precision: must be one of fp16, fp32"),
        ({"limits": 1}, "unknown key 'limits', did you mean 'limit'"),
    ):
        rewrite(folder, lambda m, change=change: m["graphs"]["denoise"].update(ranges={**RANGES, **change}))
        assert message in refusal(folder)
    rewrite(folder, lambda m: m["graphs"]["denoise"].update(ranges=None))
    assert "ranges: must be an object, not None" in refusal(folder)


def test_opening_leaves_no_trace_and_takes_any_kind_of_path(folder, monkeypatch):
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder.parent)
    assert Bundle.open("bundle") == Bundle.open(str(folder)) == Bundle.open(folder)
    assert sorted(folder.rglob("*")) == before


def test_the_fingerprint_follows_every_file(folder):
    first = Bundle.open(folder).fingerprint
    assert len(first) == 16
    seal(folder, unsealed())
    assert Bundle.open(folder).fingerprint == first
    (folder / "tokenizers/prompt.json").write_text('{"another": 1}')
    seal(folder, unsealed())
    assert Bundle.open(folder).fingerprint != first


def test_shapes_resolve():
    spec = TensorSpec(("batch", "4*height", "width", 3), "uint8")
    assert spec.resolve({"batch": 2, "height": 5, "width": 7, "unused": 1}) == (2, 20, 7, 3)
    assert spec.symbols == ("batch", "height", "width")
    with pytest.raises(SettingsError, match="height"):
        spec.resolve({"batch": 1, "width": 2})


def test_the_contract_of_the_five_graphs():
    """As docs/architecture.md draws it."""
    graphs = signatures(model("fp16"))
    assert list(graphs) == GRAPHS
    inputs, outputs = graphs["denoise"]
    assert inputs["state"].shape == ("places", 4, 4, "height", "width")
    assert inputs["table"].shape == ("places", "steps", ROW)
    assert inputs["embeddings"].shape == ("places", 2, "tokens", 6)
    assert outputs["latents"].shape == ("places", 4, "height", "width")
    assert graphs["decode_latents"].outputs["image"] == TensorSpec(("batch", "4*height", "4*width", 3), "uint8")
    assert graphs["caption_step"].inputs["cross_keys"].shape == ("images", 2, 2, 5, 8)


def test_two_tokenizers_pooled_text_and_sizes_are_named_by_the_contract():
    xl = model(
        text=TextSpec(77, (TEXT.tokenizers[0],) * 2, "zeros"),
        conditioning={
            "embeddings": ConditioningSpec(("tokens", 2048), "text"),
            "pooled": ConditioningSpec((1280,), "text"),
            "sizes": ConditioningSpec((6,), "size"),
        },
        guidance=GuidanceSpec(3, methods=True, embedded=False),
    )
    encode, denoise = signatures(xl)["encode_text"], signatures(xl)["denoise"]
    assert list(encode.inputs) == ["ids", "ids_2"] and list(encode.outputs) == ["embeddings", "pooled"]
    assert denoise.inputs["pooled"].shape == ("places", 3, 1280) and denoise.inputs["sizes"].shape == ("places", 3, 6)
    assert denoise.inputs["place_rows"] == TensorSpec(("places", 3), "int64")


def test_every_symbol_of_the_contract_is_described():
    named = {
        name
        for graph in signatures(model()).values()
        for tensors in graph
        for t in tensors.values()
        for name in t.symbols
    }
    assert named == set(symbols(model()))


@pytest.mark.parametrize(
    ("symbol", "sizes", "fitted"),
    [("rows", [1, 2, 3, 5, 9, 16, 17], [1, 2, 3, 6, 12, 16, 17]), ("places", [1, 8, 9], [16, 16, 16]),
     ("noise_steps", [1, 2, 16], [1, 16, 16]), ("batch", [1, 5, 20], [1, 5, 20])],
)  # fmt: skip
def test_a_size_is_run_at_the_next_one_that_is_captured(symbol, sizes, fitted):
    assert [symbols(model())[symbol].fit(size, 16) for size in sizes] == fitted


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "graphs/denoise.onnx").unlink(), ["denoise.onnx", "missing", "copy"]),
        (lambda f: os.truncate(f / "graphs/denoise.onnx", 100), ["denoise.onnx", "truncated", "100", "1200"]),
        (lambda f: os.truncate(f / "graphs/denoise.onnx", 2000), ["denoise.onnx", "longer", "2000"]),
        (lambda f: (f / "graphs/denoise.onnx").write_bytes(b"x" * 1200), ["denoise.onnx", "edited", "SHA-256"]),
        (lambda f: (f / "tokenizers/prompt.json").write_text("[]"), ["prompt.json", "edited"]),
        (lambda f: (f / "bundle.json").unlink(), ["no bundle", "bundle.json"]),
        (lambda f: shutil.rmtree(f), ["bundle", "does not exist"]),
        (lambda f: (shutil.rmtree(f), f.write_text("")), ["is no folder"]),
        (lambda f: (f / "bundle.json").write_text("{"), ["bundle.json", "not valid JSON"]),
        (lambda f: (f / "bundle.json").write_bytes(b"\xff\xfe"), ["bundle.json", "not valid JSON"]),
        (lambda f: (f / "bundle.json").write_text("[" * 100_000), ["bundle.json", "nested"]),
        (lambda f: os.truncate(f / "bundle.json", 1 << 30), ["bundle.json", "too large"]),
        (lambda f: (f / "bundle.json").write_text("[]"), ["bundle.json", "not a manifest"]),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, words):
    damage(folder)
    message = refusal(folder)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m.update(schema=99),
            ["schema 99", "schema 2", "dnp-engine that wrote it", "export the model again"],
        ),
        (lambda m: m.update(schema=99, surprise=1), ["schema 99"]),
        (lambda m: m.update(schema=10**4000), ["huge"]),
        (lambda m: m.update(schema=1), ["schema 1", "schema 2", "dnp export"]),
        (lambda m: m.update(schema=True), ["schema", "True"]),
        (lambda m: m.pop("schema"), ["schema"]),
        (lambda m: m.pop("text"), ["'text' is missing"]),
        (lambda m: m.update(latent={}), ["unknown key 'latent'", "'latents'"]),
        (lambda m: m["text"].update(lenght=1), ["text", "'lenght'", "'length'"]),
        (lambda m: m["text"].update(length="32"), ["text: length", "'32'", "integer from 1"]),
        (lambda m: m["text"].update(length=0), ["text: length", "0"]),
        (lambda m: m["text"]["tokenizers"][0].update(bos=-1), ["text: tokenizers[0]: bos", "-1"]),
        (lambda m: m["text"].update(tokenizers={}), ["text: tokenizers", "a list of objects"]),
        (lambda m: m["text"].update(empty="none"), ["text: empty", "encoded, zeros"]),
        (lambda m: m["guidance"].update(roles=4), ["guidance: roles", "4"]),
        (lambda m: m["guidance"].update(methods=1), ["guidance: methods", "true or false"]),
        (lambda m: m["latents"].update(height=10), ["latents.height", "10", "multiple of 4"]),
        (lambda m: m["latents"].update(height=64), ["latents.height", "64", "32"]),
        (lambda m: m["caption"].update(max_length=8), ["caption.max_length", "8", "7"]),
        (lambda m: m["caption"].update(bos=30), ["caption.bos", "30"]),
        (lambda m: m["defaults"]["final"].update(guidance=float("nan")), ["guidance", "nan"]),
        (lambda m: m["defaults"]["dns"].update(guidance=10**400), ["guidance", "huge"]),
        (lambda m: m.update(precision="int8"), ["precision", "int8", "fp16"]),
        (lambda m: m.update(family=1), ["family", "text"]),
        (lambda m: m["graphs"].pop("denoise"), ["graphs", "'denoise' is missing"]),
        (lambda m: m["graphs"].update(extra=m["graphs"]["denoise"]), ["graphs", "'extra'"]),
        (lambda m: m["graphs"]["denoise"]["inputs"].pop("noise"), ["denoise.inputs", "'noise' is missing"]),
        (
            lambda m: m["graphs"]["denoise"]["inputs"]["state"].update(dtype="float16"),
            ["denoise.inputs.state", "float16", "float32"],
        ),
        (
            lambda m: m["graphs"]["denoise"]["inputs"]["state"].update(shape=["batch", 0]),
            ["inputs", "state", "shape"],
        ),
        (lambda m: m["graphs"]["denoise"].update(file="graphs/other.onnx"), ["denoise.file", "other", "'files'"]),
        (lambda m: m["text"]["tokenizers"][0].update(file="elsewhere.json"), ["text.tokenizers", "elsewhere"]),
        (lambda m: m["files"]["graphs/denoise.onnx"].update(sha256="abc"), ["denoise", "sha256", "abc"]),
        # weights of 3 GiB, as a UNet's in float32, are a size like any other
        (
            lambda m: m["files"]["graphs/denoise.onnx"].update(size=3 << 30),
            ["denoise.onnx", "where 3221225472 are expected"],
        ),
        (lambda m: m["files"].update({"../x": {"size": 0, "sha256": "0" * 64}}), ["../x", "outside"]),
        (lambda m: m["files"].update({"/etc/hosts": {"size": 0, "sha256": "0" * 64}}), ["/etc/hosts", "outside"]),
        (lambda m: m["files"].update({"a\\..\\b": {"size": 0, "sha256": "0" * 64}}), ["outside"]),
        (lambda m: m["files"].update({"a\0b": {"size": 0, "sha256": "0" * 64}}), ["a\\x00b", "cannot be"]),
        (lambda m: m["files"].update({"x" * 5000: {"size": 0, "sha256": "0" * 64}}), ["cannot be"]),
        (lambda m: m["files"].update({"graphs": {"size": 0, "sha256": "0" * 64}}), ["graphs: missing"]),
    ],
)
def test_a_wrong_manifest_is_refused(folder, change, words):
    rewrite(folder, change)
    message = refusal(folder)
    for word in words:
        assert word in message


def test_a_manifest_edited_within_its_schema_is_refused(folder):
    manifest = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**manifest, "name": "other"}))
    message = refusal(folder)
    assert "bundle.json" in message and "edited" in message and "bundle.sha256" in message
    write_sealed(folder, json.dumps(manifest, indent=7).encode())
    assert Bundle.open(folder).name == "tiny"
    (folder / "bundle.sha256").unlink()
    assert "bundle.sha256: cannot be read" in refusal(folder)


def test_the_seal_is_one_that_coreutils_check(folder):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    check = ["sha256sum", "--check", "--strict", "bundle.sha256"]
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 0
    (folder / "bundle.json").write_text((folder / "bundle.json").read_text() + " ")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode != 0


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_out_of_the_bundle_is_followed_and_verified(folder, tmp_path, what):
    """The hub's caches hold nothing else; the hash tells whether it is the file that was meant."""
    fingerprint = Bundle.open(folder).fingerprint
    inside = folder / ("graphs/denoise.onnx" if what == "file" else "graphs")
    outside = tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert Bundle.open(folder).fingerprint == fingerprint
    target = outside if what == "file" else outside / "denoise.onnx"
    target.write_bytes(target.read_bytes()[:-1] + b"?")
    assert "SHA-256 differs" in refusal(folder)
    target.unlink()
    assert "missing" in refusal(folder)


def test_links_inside_the_bundle_and_to_the_bundle_are_fine(folder, tmp_path):
    graph = folder / "graphs/denoise.onnx"
    graph.rename(folder / "blob")
    graph.symlink_to(Path("..") / "blob")
    (tmp_path / "link").symlink_to(folder)
    assert Bundle.open(tmp_path / "link").fingerprint == Bundle.open(folder).fingerprint


def test_a_pipe_in_place_of_a_file_does_not_hang(folder):
    for name in ("graphs/denoise.onnx", "bundle.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert Path(name).name in refusal(folder)


def test_an_unknown_graph_is_named(folder):
    with pytest.raises(BundleError, match="'denoise'"):
        Bundle.open(folder).graph("denoize")


def test_sealing_lists_what_is_there_and_nothing_private(folder):
    (folder / "plans").mkdir()
    (folder / "plans/plan").write_text("a plan")
    (folder / ".hidden").write_text("")
    (folder / "graphs/denoise.onnx.data").write_bytes(b"weights")
    seal(folder, unsealed())
    files = Bundle.open(folder).files
    assert set(files) == {f"graphs/{name}.onnx" for name in GRAPHS} | {
        "graphs/denoise.onnx.data", "tokenizers/prompt.json", "tokenizers/caption.json"
    }  # fmt: skip
    assert files["graphs/denoise.onnx.data"] == file_record(folder / "graphs/denoise.onnx.data")


def test_sealing_what_would_not_open_is_refused_and_leaves_the_old_manifest(folder):
    before = (folder / "bundle.json").read_bytes()
    manifest = unsealed()
    del manifest["graphs"]["denoise"]["inputs"]["noise"]
    with pytest.raises(BundleError, match="noise"):
        seal(folder, manifest)
    assert (folder / "bundle.json").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_no_default_bundle_is_said_plainly(tmp_path, monkeypatch):
    monkeypatch.setattr("dnp.engine.bundle.bundle.package_files", lambda package: tmp_path)
    with pytest.raises(BundleError, match="ships no default bundle"):
        Bundle.default()
    make_bundle(tmp_path / "default")
    assert Bundle.default().name == "tiny"


NASTY = st.sampled_from(
    ["", ".", "..", "../x", "/etc/passwd", "graphs", "graphs/denoise.onnx", "a\0b", "\ud800", "x" * 5000, "0*height",
     "99999999999*height", "4*", "batch", -1, 0, 2**31, 10**400, 1e308, float("nan"), float("inf"), True, None]
)  # fmt: skip
JSON = st.recursive(
    NASTY | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutations(draw):
    """Where to go (fractions, to index any object's children by), what to do there, and with which value."""
    depth = draw(st.integers(0, 6))
    where = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=depth, max_size=depth))
    return where, draw(st.sampled_from(["replace", "delete", "add", "rename"])), draw(JSON)


def mutate(manifest, where, action, value):
    """``manifest`` with one change at or below the place that ``where`` leads to."""
    parent, key, node = None, None, manifest
    for fraction in where:
        if not isinstance(node, dict | list) or not node:
            break
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        parent, key = node, keys[int(fraction * len(keys))]
        node = parent[key]
    if parent is None:
        return value if action == "replace" else manifest
    if action == "replace":
        parent[key] = value
    elif action == "delete":
        del parent[key]
    elif isinstance(parent, list):
        parent.append(value)
    elif action == "add":
        parent[str(value)] = node
    else:
        parent[str(value)] = parent.pop(key)
    return manifest


@given(st.lists(mutations(), min_size=1, max_size=3))
def test_any_change_of_the_manifest_opens_or_is_refused(shared_folder, changes):
    original = (shared_folder / "bundle.json").read_text()
    manifest = json.loads(original)
    for change in changes:
        manifest = mutate(manifest, *change)
    raw = json.dumps(manifest).encode()
    assert not check_opens_or_refuses(shared_folder, raw) or raw == original.encode()
    check_opens_or_refuses(shared_folder, raw, sealed=True)


@given(st.binary(max_size=40), st.floats(0, 1), st.integers(0, 40))
@example(b"", 0.0, 0)
def test_any_damage_to_the_bytes_of_the_manifest_opens_or_is_refused(shared_folder, patch, place, gap):
    raw = (shared_folder / "bundle.json").read_bytes()
    start = int(place * len(raw))
    check_opens_or_refuses(shared_folder, raw[:start] + patch + raw[start + gap :])


def check_opens_or_refuses(folder, raw, *, sealed=False):
    """Whether a folder of the same files opens with ``raw`` as its manifest; the shared one stays as it is."""
    copied = folder.parent / f"copied-{os.getpid()}"
    if not copied.exists():
        copied.mkdir()
        for name in ("graphs", "tokenizers"):
            shutil.copytree(folder / name, copied / name)
    shutil.copy(folder / "bundle.sha256", copied)
    (copied / "bundle.json").write_bytes(raw)
    if sealed:
        write_sealed(copied, raw)
    try:
        bundle = Bundle.open(copied)
    except BundleError as error:
        assert str(error)
        return False
    assert list(bundle.graphs)
    assert copy.deepcopy(bundle) == bundle
    return True


def test_a_git_lfs_pointer_is_called_by_its_name(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1200\n"
    (folder / "graphs/denoise.onnx").write_bytes(pointer)
    message = refusal(folder)
    assert "denoise.onnx is a Git LFS pointer" in message and "git lfs pull" in message
