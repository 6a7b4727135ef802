"""The C++ library against the Python package: part by part through ``dnp-probe``, and whole through its C interface."""

import ctypes
import hashlib
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import asdict
from itertools import cycle, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime
import PIL.Image
import pytest
from test_tokenizers import PIECES, corpus
from tokenizers import Tokenizer

from dnp import Pipeline
from dnp.engine.backends.onnxruntime.cpu import build_cpu_plans, plan_spec
from dnp.engine.backends.onnxruntime.cuda import CudaSession
from dnp.engine.backends.onnxruntime.cuda_plans import build_command, build_cuda_plans
from dnp.engine.backends.onnxruntime.passes.definitions import inlined
from dnp.engine.bundle.bundle import Bundle, file_record
from dnp.engine.errors import BackendError, BundleError, DnpError, SettingsError
from dnp.engine.plans.build import build_command as plan_command
from dnp.engine.plans.build import settings_of
from dnp.engine.plans.choice import plan_for
from dnp.engine.plans.compiler import REVISION
from dnp.engine.plans.limits import Limits
from dnp.engine.plans.plan import PlanSpec, cost
from dnp.engine.plans.product import TENSORRT
from dnp.engine.plans.profile import Range, default_profile, from_dict, to_dict
from dnp.engine.plans.settings import BuildSettings, Target
from dnp.engine.plans.store import PlanStore
from dnp.runtime.captioning.resize import resize_matrices
from dnp.runtime.job import resolve
from dnp.runtime.pictures import read_settings
from dnp.runtime.request import Request
from dnp.runtime.sampling.noise import TorchNoise
from dnp.runtime.sampling.samplers import sampler_names, sampler_table
from dnp.runtime.sampling.schedule import read_schedule

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "native"
BUNDLE = Bundle.default().path
(ONNXRUNTIME,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*")
SCENE = "a large red circle left of a small blue square on a plain yellow background"


def run(*command, **more):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, **more)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="session")
def built():
    """The folder of a finished build."""
    run("cmake", "-S", ".", "-B", BUILD, "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", BUILD, "--parallel", "2")
    return BUILD / "native"


@pytest.fixture(scope="session")
def probe(built):
    """A function that asks ``dnp-probe``: an answer, or the text of the error."""
    process = subprocess.Popen(
        [built / "tests" / "dnp-probe"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(what, **question):
        process.stdin.write(json.dumps({"ask": what, **question}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        if "error" in answer:
            raise {2: SettingsError, 3: BundleError}.get(answer["code"], DnpError)(answer["error"])
        return answer["value"]

    with process:
        yield ask
        process.stdin.close()


def floats(text):
    return np.frombuffer(bytes.fromhex(text), ">f4").astype(np.float32)


# ------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**63 - 256])
def test_noise_equals_pythons_to_the_bit(probe, seed):
    counts = [4 * 64 * 64, 3, 17, 1, 100, 16, 5, 4 * 16 * 16]
    generator = TorchNoise(seed)
    for draw, count in zip(probe("noise", seed=seed, counts=counts), counts, strict=True):
        np.testing.assert_array_equal(floats(draw).view(np.uint32), generator.randn((count,)).view(np.uint32))


# ------------------------------------------------------------------------------------------------ sampler tables

DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SCHEDULES = [
    {**DIFFUSION, "set_alpha_to_one": False, "timestep_spacing": "leading"},
    {**DIFFUSION, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {**DIFFUSION, "prediction_type": "sample", "beta_schedule": "linear", "variance_type": "fixed_large"},
    {**DIFFUSION, "beta_schedule": "squaredcos_cap_v2", "final_sigmas_type": "sigma_min", "num_train_timesteps": 500},
    {**DIFFUSION, "trained_betas": np.linspace(1e-4, 0.02, 1000).tolist(), "solver_order": 3, "euler_at_final": True},
    {
        **DIFFUSION,
        "solver_order": 3,
        "solver_type": "heun",
        "lower_order_final": False,
        "final_sigmas_type": "sigma_min",
    },
    {**DIFFUSION, "solver_order": 1, "solver_type": "bh1", "disable_corrector": [0, 3]},
    {**DIFFUSION, "use_karras_sigmas": True},
    {**DIFFUSION, "use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 12},
    {**DIFFUSION, "use_beta_sigmas": True, "final_sigmas_type": "sigma_min"},
    {**DIFFUSION, "use_lu_lambdas": True},
    {**DIFFUSION, "interpolation_type": "log_linear", "timestep_scaling": 5.0, "original_inference_steps": 40},
    {**DIFFUSION, "thresholding": True},
    {**DIFFUSION, "use_karras_sigmas": True, "use_beta_sigmas": True},
    {**FLOW, "shift": 3.0},
    {**FLOW, "shift": 3.0, "use_karras_sigmas": True, "stochastic_sampling": True},
    {**FLOW, "use_dynamic_shifting": True, "shift_terminal": 0.02},
    {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "linear", "solver_order": 3},
    {"prediction_type": "flow_prediction", "flow_shift": 5.0, "solver_type": "bh1"},
]


def table_of(config, sampler, steps, guidance, size, **settings):
    return sampler_table(read_schedule(config).sized(*size), sampler, steps, guidance, **settings)


def tables_agree(probe, config, sampler, steps, guidance, size=(64, 48), **settings):
    """Whether there is a table; both sides have the same one, or none."""
    asked = {name: value for name, value in settings.items() if value is not None}

    def native():
        return probe("table", schedule=config, size=size, sampler=sampler, steps=steps, guidance=guidance, **asked)

    try:
        expected = table_of(config, sampler, steps, guidance, size, **settings)
    except SettingsError:
        with pytest.raises(SettingsError):
            native()
        return False
    found = native()
    rows = floats(found["rows"]).reshape(expected.rows.shape)
    np.testing.assert_allclose(
        rows, expected.rows, rtol=2e-6, atol=2e-7, err_msg=f"{config} {sampler} {steps} {settings}"
    )
    assert found["roles"] == [list(roles) for roles in expected.roles]
    assert found["noise_steps"] == len(expected.noise_steps)
    assert found["init_noise_sigma"] == pytest.approx(expected.init_noise_sigma, rel=1e-7)
    return True


@pytest.mark.parametrize(
    "config", SCHEDULES, ids=lambda config: "-".join(str(v)[:12] for v in list(config.values())[-2:])
)
def test_tables_equal_pythons(probe, config):
    agreed = [
        tables_agree(probe, config, sampler, steps, [1.5] * steps, spacing=spacing)
        for sampler, steps, spacing in product(
            sampler_names(), [1, 2, 3, 4, 5, 10, 14, 15, 20, 25, 50, 61], [None, "leading", "linspace", "trailing"]
        )
    ]
    refused = config.get("thresholding") or (config.get("use_karras_sigmas") and config.get("use_beta_sigmas"))
    assert any(agreed) or refused


def test_tables_of_guidance_equal_pythons(probe):
    config = SCHEDULES[0]
    for guidance in ([0.0] * 4, [1.0] * 4, [-1.0] * 4, [7.5, 1.0, 0.0, -2.0]):
        for methods in (
            {},
            {"rescale": 0.7, "zero_star": 1.0},
            {"perp_neg": 1.25},
            {"norm_limit": 5.0, "parallel": 0.5},
        ):
            assert tables_agree(probe, config, "ddim", 4, guidance, methods=methods, embedded=3.5, eta=0.5)
    for refused in ({"rescale": 1.5}, {"rescal": 0.5}, {"parallel": -1.0}):
        assert not tables_agree(probe, config, "ddim", 4, [1.5] * 4, methods=refused)
    assert not tables_agree(probe, config, "ddim", 4, [1.5] * 3)
    assert not tables_agree(probe, config, "ddim", 0, [])
    assert not tables_agree(probe, config, "ddim", 1001, [1.5] * 1001)
    assert not tables_agree(probe, config, "euler", 4, [1.5] * 4, eta=0.5)


# ------------------------------------------------------------------------------------------------ tokenizers


def encoded(tokenizer, texts):
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def tokenizers_agree(probe, file, texts):
    expected, found = encoded(Tokenizer.from_file(str(file)), texts), probe("encode", file=str(file), texts=texts)
    wrong = [(text, a, b) for text, a, b in zip(texts, expected, found, strict=True) if a != b]
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("name", ["prompt", "caption"])
def test_every_character_gets_pythons_ids(probe, name):
    file = BUNDLE / "tokenizers" / f"{name}.json"
    points = [chr(point) for point in range(1, 0x110000) if not 0xD800 <= point < 0xE000]
    texts = ["a" + "e".join(points[start : start + 64]) for start in range(0, len(points), 64)]
    tokenizers_agree(probe, file, texts)


@pytest.mark.parametrize("name", ["prompt", "caption"])
def test_random_texts_get_pythons_ids(probe, name):
    tokenizers_agree(probe, BUNDLE / "tokenizers" / f"{name}.json", corpus(10_000))


def test_random_marks_are_put_in_order_as_python_does(probe):
    rng = random.Random(5)
    marks = [
        chr(c)
        for c in (*range(0x300, 0x370), *range(0x591, 0x5C8), 0x1100, 0x1161, 0x11A8, 0xAC00, 0x345, 0x9C7, 0x9BE)
    ]
    letters = ["a", "e", "Å", "ṩ", "\u1112", "\u09c7", "क", "\u0344", "\u212b", "ﬁ"]
    texts = ["".join(rng.choices(letters + marks, k=rng.randint(1, 12))) for _ in range(3000)]
    for name in ("prompt", "caption"):
        tokenizers_agree(probe, BUNDLE / "tokenizers" / f"{name}.json", texts)


def changed_tokenizer(folder, name, change):
    contents = json.loads((BUNDLE / "tokenizers" / f"{name}.json").read_text())
    change(contents)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(contents))
    return file


def test_added_tokens_of_every_kind_get_pythons_ids(probe, tmp_path):
    def change(contents):
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        for number, more in enumerate(({}, {"normalized": True}, {"lstrip": True}, {"rstrip": True, "special": True})):
            contents["added_tokens"].append({**token, "id": 591 + number, "content": f"<Toy{number}>", **more})
        contents["added_tokens"] += [
            {**token, "id": 595, "content": "<Toy"},
            {**token, "id": 596, "content": "!", "normalized": True},
        ]

    file = changed_tokenizer(tmp_path, "prompt", change)
    rng = random.Random(3)
    pieces = [*PIECES, "<Toy0>", "<toy1>", "<TOY1>", "  <Toy2>", "<Toy3>   ", "<Toy", "!", "<Toy2><Toy3>"]
    tokenizers_agree(probe, file, ["".join(rng.choices(pieces, k=rng.randint(1, 20))) for _ in range(3000)])


def test_captions_are_spelled_as_python_does(probe, tmp_path):
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    clean_up = [
        {"type": "Replace", "pattern": {"String": " n't"}, "content": "n't"},
        {"type": "Replace", "pattern": {"String": " ."}, "content": "."},
    ]

    def change(contents):
        contents["decoder"] = {"type": "Sequence", "decoders": [decoder, {"type": "Fuse"}, *clean_up]}

    rng = random.Random(1)
    ids = [[rng.randrange(140) for _ in range(rng.randint(0, 20))] for _ in range(500)]
    for file in (BUNDLE / "tokenizers" / "caption.json", changed_tokenizer(tmp_path, "caption", change)):
        tokenizer = Tokenizer.from_file(str(file))
        assert probe("decode", file=str(file), ids=ids) == [
            tokenizer.decode(row, skip_special_tokens=True) for row in ids
        ]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("model"),
        lambda c: c["model"].update(type="Unigram"),
        lambda c: c["model"].update(dropout=0.1),
        lambda c: c["model"].update(merges=[["a", "no such token"]]),
        lambda c: c["model"].update(vocab={"a": -1}),
        lambda c: c["normalizer"].update(type="NFKC"),
        lambda c: c["normalizer"]["normalizers"][1]["pattern"].update(Regex=r"\w+"),
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(invert=False),
        lambda c: c["added_tokens"][0].update(single_word=True),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(probe, tmp_path, change):
    with pytest.raises(BundleError, match="no tokenizer that libdnp can read"):
        probe("encode", file=str(changed_tokenizer(tmp_path, "prompt", change)), texts=["a"])


# ------------------------------------------------------------------------------------------------ images in


@pytest.mark.parametrize(
    ("source", "target"), [(64, 64), (65, 64), (512, 384), (1000, 64), (3, 64), (1, 7), (383, 384)]
)
def test_resize_weights_equal_pythons(probe, source, target):
    _, expected = resize_matrices(source, source, target)
    np.testing.assert_array_equal(
        floats(probe("resize", source=source, target=target)).reshape(target, source), expected
    )


# ------------------------------------------------------------------------------------------------ bundles


@pytest.fixture
def copied(tmp_path):
    return Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))


def both_refuse(probe, folder):
    with pytest.raises(BundleError):
        Bundle.open(folder)
    with pytest.raises(BundleError) as refused:
        probe("bundle", folder=str(folder))
    return str(refused.value)


def test_a_bundle_has_pythons_fingerprint(probe):
    assert probe("bundle", folder=str(BUNDLE)) == Bundle.default().fingerprint


@pytest.mark.slow
def test_a_bundle_with_any_byte_changed_is_refused(probe, copied):
    rng = random.Random(2)
    files = [path for path in copied.rglob("*") if path.is_file()]
    for file in files:
        whole = file.read_bytes()
        for place in sorted(rng.sample(range(64 if file.suffix == ".sha256" else len(whole)), 8)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            both_refuse(probe, copied)
        for damaged in (whole[:-1], whole + b"\n", b"", b"version https://git-lfs.github.com/spec/v1\n"):
            if file.suffix == ".sha256" and len(damaged) >= 64:
                continue  # what follows the digits is not read
            file.write_bytes(damaged)
            both_refuse(probe, copied)
        file.unlink()
        both_refuse(probe, copied)
        file.write_bytes(whole)
    assert probe("bundle", folder=str(copied))


def changes(value, path=()):
    """Places in a JSON value, with other values to put there."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield (*path, key), KeyError
            yield from changes(entry, (*path, key))
        yield (*path, "unknown"), 1
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from changes(entry, (*path, number))
    yield from ((path, other) for other in (None, True, -1, 0, 1.5, 10**30, "x", "../x", [], {}, [[1]]) if path)


@pytest.mark.slow
def test_manifests_are_refused_as_python_refuses_them(probe, copied):
    manifest = json.loads((copied / "bundle.json").read_text())
    shortened = {**manifest, "graphs": {name: manifest["graphs"][name] for name in ("decode_latents", "encode_text")}}
    places = [place for place in changes(shortened) if place[0][0] != "graphs"] + list(
        changes(manifest["graphs"]["decode_latents"], ("graphs", "decode_latents"))
    )
    for path, other in random.Random(4).sample(places, 300):
        damaged = json.loads(json.dumps(manifest))
        *inner, last = path
        at = damaged
        for key in inner:
            at = at[key]
        if other is KeyError:
            del at[last]
        else:
            at[last] = other
        write_manifest(copied, damaged)
        try:
            expected = Bundle.open(copied).fingerprint
        except BundleError:
            both_refuse(probe, copied)
        else:
            assert probe("bundle", folder=str(copied)) == expected, (path, other)


def write_manifest(folder, manifest):
    raw = json.dumps(manifest).encode()
    (folder / "bundle.json").write_bytes(raw)
    (folder / "bundle.sha256").write_text(f"{hashlib.sha256(raw).hexdigest()}  bundle.json\n")


@pytest.mark.parametrize(
    "raw",
    [b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"null", b"[1, 2", b'{"schema": 3}', b'{"schema": 1}'],
    ids=range(8),
)
def test_no_manifest_at_all_is_refused(probe, copied, raw):
    (copied / "bundle.json").write_bytes(raw)
    both_refuse(probe, copied)


# ------------------------------------------------------------------------------------------------ plans


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The default bundle, with plans of the processor."""
    folder = shutil.copytree(BUNDLE, tmp_path_factory.mktemp("planned") / "default", ignore=lambda *_: ["plans"])
    build_cpu_plans(Bundle.open(folder))
    return folder


def edited(change):
    def spoil(plan):
        sidecar = json.loads(plan.with_suffix(".json").read_text())
        change(sidecar)
        plan.with_suffix(".json").write_text(json.dumps(sidecar))

    return spoil


def flipped(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def of_another_version(plan):
    """A plan that another version of ONNX Runtime made, and the one that is wanted gone."""
    sidecar = json.loads(plan.with_suffix(".json").read_text())
    spec = PlanSpec(**{**sidecar["spec"], "version": "1.21.0"})
    other = plan.with_name(f"{spec.graph}-{spec.key}.plan")
    other.with_suffix(".json").write_text(json.dumps({**sidecar, "spec": asdict(spec)}))
    plan.rename(other)


SPOILED = [
    lambda plan: plan.unlink(),
    lambda plan: plan.with_suffix(".json").unlink(),
    lambda plan: plan.write_bytes(plan.read_bytes()[:-1]),
    flipped,
    lambda plan: flipped(*plan.parent.glob(f"{plan.stem}.*.weights")),
    lambda plan: next(plan.parent.glob(f"{plan.stem}.*.weights")).unlink(),
    lambda plan: plan.with_suffix(".json").write_text("[" * 100_000),
    of_another_version,
    edited(lambda sidecar: sidecar.pop("size")),
    edited(lambda sidecar: sidecar["spec"].update(architecture="x86_64 another (avx)")),
    edited(lambda sidecar: sidecar["spec"].update(profile={"batch": [1, 2, 3]})),
    edited(lambda sidecar: sidecar["spec"].update(profile={"batch": 1})),
    edited(lambda sidecar: sidecar["spec"].update(flags={"a flag": True})),
    edited(lambda sidecar: sidecar["statistics"].update(weights_bytes=-1)),
    edited(lambda sidecar: sidecar["weights"].update(file="../weights")),
    edited(lambda sidecar: sidecar["weights"].update(unknown=1)),
    edited(lambda sidecar: sidecar.update(weights=None)),
]


@pytest.mark.parametrize("spoil", [None, *SPOILED], ids=range(len(SPOILED) + 1))
def test_plans_are_found_or_refused_as_python_does(probe, planned, tmp_path, spoil):
    bundle, version = Bundle.open(planned), onnxruntime.__version__
    folder = shutil.copytree(planned / "plans", tmp_path / "plans")
    if spoil:
        spoil(*folder.glob("encode_text-*.plan"))
    plan, reason = PlanStore(folder).find(plan_spec(bundle, bundle.graph("encode_text")))
    found = probe("plan", folder=str(planned), plans=str(folder), graph="encode_text", version=version)
    if plan is not None:
        assert spoil is None
        assert found == str(plan.path)
    else:
        # What was found in JSON and in the system's errors is told in other words.
        same = reason.split(" (")[0].split(" must be ")[0]
        assert found["reason"].startswith(same)


# ------------------------------------------------------------------------------------------------ requests

REQUESTS = [
    {"prompt": "", "negative": "a cat"},
    {"prompt": ""},
    {"prompt": "  "},
    {"prompt": 7},
    {"prompt": "a\0b"},
    {"prompt": "a" * 100_001},
    {"negative": "a"},
    {"prompt": "a", "negative": ""},
    {"prompt": "a", "negative": "b", "dnp": False},
    {"prompt": "a", "dnp": 1},
    {"prompt": "a", "sed": 1},
    {"prompt": "a", "seed": -1},
    {"prompt": "a", "seed": 2**63 - 256},
    {"prompt": "a", "seed": 2**63 - 255},
    {"prompt": "a", "seed": 1.0},
    {"prompt": "a", "dns_seed": 2**64},
    {"prompt": "a", "images": 257},
    {"prompt": "a", "images": 256},
    {"prompt": "a", "windows": 9},
    {"prompt": "a", "height": 66},
    {"prompt": "a", "height": 260},
    {"prompt": "a", "height": 4, "width": 256},
    {"prompt": "a", "sampler": "eulr"},
    {"prompt": "a", "sampler": ""},
    {"prompt": "a", "sampler": 3},
    {"prompt": "a", "steps": 0},
    {"prompt": "a", "steps": 1000},
    {"prompt": "a", "steps": True},
    {"prompt": "a", "guidance": [1.5]},
    {"prompt": "a", "guidance": [1.5], "steps": 1},
    {"prompt": "a", "guidance": [1, 2, "3"], "steps": 3},
    {"prompt": "a", "guidance": 1e39},
    {"prompt": "a", "dns_guidance": [1, 2, 3], "dns_steps": 3},
    {"prompt": "a", "dns_steps": 3, "dns_sampler": "heun", "dns_spacing": "trailing", "dns_eta": 0.5},
    {"prompt": "a", "eta": 0.5},
    {"prompt": "a", "eta": 2},
    {"prompt": "a", "eta": True},
    {"prompt": "a", "spacing": "trailing"},
    {"prompt": "a", "spacing": "even"},
    {"prompt": "a", "embedded_guidance": 2},
    {"prompt": "a", "embedded_guidance": 1},
    {"prompt": "a", "methods": {"rescale": 0.5}},
    {"prompt": "a", "methods": []},
    {"prompt": "a", "compare": True, "beams": 3, "prefix": "a", "min_length": 4, "max_length": 20},
]


def nothing_less(value):
    """JSON's view: 7 and 7.0 are the same number."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("settings", REQUESTS, ids=range(len(REQUESTS)))
def test_requests_are_resolved_or_refused_as_python_does(probe, settings):
    bundle = Bundle.default()
    try:
        expected = resolve(Request.from_dict(settings), bundle, read_schedule(bundle.schedule)).request.to_dict()
    except SettingsError:
        with pytest.raises(SettingsError):
            probe("resolve", folder=str(BUNDLE), settings=settings)
    else:
        assert probe("resolve", folder=str(BUNDLE), settings=settings) == nothing_less(expected)


# ------------------------------------------------------------------------------------------------ the C interface


@pytest.fixture(scope="session")
def wheel(built, tmp_path_factory):
    """The package for Python, made as ``pip wheel ./native`` makes it, of what is compiled already."""
    folder = tmp_path_factory.mktemp("wheel")
    kept = [f"cmake.define.{option}=ON" for option in ("DNP_TOOLS", "DNP_EXAMPLES", "BUILD_TESTING")]
    options = [f"--config-settings={option}" for option in (f"build-dir={BUILD}", *kept)]
    pip = [sys.executable, "-m", "pip", "wheel", ROOT / "native", "--no-deps", "--no-build-isolation"]
    made_by = {**os.environ, "CMAKE_GENERATOR": "Unix Makefiles"}
    run(*pip, "--disable-pip-version-check", "--wheel-dir", folder, *options, env=made_by)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def dnp_native(wheel, tmp_path_factory):
    """The package, as an installer unpacks it."""
    folder = tmp_path_factory.mktemp("installed") / "dnp_native"
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder.parent)
    spec = importlib.util.spec_from_file_location("dnp_native", folder / "__init__.py")
    module = sys.modules["dnp_native"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def native(dnp_native):
    with dnp_native.Pipeline.open(BUNDLE, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def python():
    with Pipeline.open(backend="cpu", threads=1) as pipeline:
        yield pipeline


def same_pictures(found, expected):
    """Within 1 grey level."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def agree(native, python, settings):
    found = native.generate(**settings)
    expected = python.run(Request.from_dict(settings))
    assert found.negatives == expected.negatives
    same_pictures(found.images, expected.arrays)
    same_pictures(found.dns_images, [] if expected.dns_arrays is None else expected.dns_arrays)
    same_pictures(found.plain_images, [] if expected.plain_arrays is None else expected.plain_arrays)
    assert found.told["request"] == nothing_less(expected.request.to_dict())
    assert found.told["bundle"] == expected.bundle


def prompts(count):
    """Prompts of the kind that the default model was trained on."""
    rng = random.Random(11)
    sizes, colors, shapes = (
        ["small", "large"],
        ["red", "blue", "green", "yellow", "white"],
        ["circle", "square", "cross"],
    )

    def thing():
        return f"a {rng.choice(sizes)} {rng.choice(colors)} {rng.choice(shapes)}"

    return [f"{thing()} left of {thing()} on a plain {rng.choice(colors)} background" for _ in range(count)]


@pytest.mark.parametrize("sampler", sampler_names())
def test_images_and_n_star_equal_pythons(native, python, sampler):
    for seed, prompt in enumerate(prompts(2)):
        settings = {
            "prompt": prompt,
            "sampler": sampler,
            "dns_sampler": sampler,
            "steps": 7,
            "dns_steps": 5,
            "seed": seed,
        }
        agree(native, python, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"compare": True, "images": 10, "steps": 3, "dns_steps": 2},
        {"negative": "a small red circle", "guidance": [3, 2, 1, 0], "steps": 4},
        {"dnp": False, "steps": 3, "windows": 2},
        {"steps": 3, "dns_steps": 3, "beams": 3, "prefix": "a small", "min_length": 9, "height": 48, "width": 80},
        {"steps": 3, "dns_steps": 3, "eta": 0.7, "dns_eta": 1.0, "spacing": "trailing", "dns_seed": 5, "max_length": 9},
    ],
    ids=range(5),
)
def test_settings_mean_what_they_mean_in_python(native, python, settings):
    agree(native, python, {"prompt": SCENE, "seed": 2, **settings})


@pytest.mark.slow
def test_fifty_prompts_give_pythons_images_and_n_star(native, python):
    """With one sampler after another."""
    for (seed, prompt), sampler in zip(enumerate(prompts(50)), cycle(sampler_names()), strict=False):
        settings = {"steps": 6, "dns_steps": 6, "sampler": sampler, "dns_sampler": sampler}
        agree(native, python, {"prompt": prompt, "seed": seed, **settings})


@pytest.mark.parametrize(
    "settings", [{}, {"beams": 4}, {"beams": 2, "prefix": "a large", "min_length": 8}], ids=range(3)
)
def test_captions_equal_pythons(native, python, settings):
    from PIL.Image import fromarray

    rng = np.random.default_rng(3)
    for shape in ((64, 64), (33, 90), (200, 150)):
        pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
        assert native.caption(pixels, **settings) == python.caption([fromarray(pixels)], **settings)[0]


def test_dns_alone_gives_pythons_images_and_n_star(native, python):
    found = native.find_negatives(SCENE, seed=4, dns_steps=4, images=2)
    expected = python.dns(SCENE, seed=4, dns_steps=4, images=2)
    assert (found.images, found.negatives) == ([], expected.negatives)
    same_pictures(found.dns_images, expected.arrays)


def test_plans_give_the_same_pictures(dnp_native, native, planned):
    settings = {"seed": 3, "steps": 3, "dns_steps": 2}
    with dnp_native.Pipeline.open(planned, threads=1) as with_plans:
        found = with_plans.generate(SCENE, **settings)
    assert found.told["runs_on"].endswith(", plan)")
    assert found.told["warnings"] == []
    expected = native.generate(SCENE, **settings)
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.dns_images, expected.dns_images)
    assert found.negatives == expected.negatives


def test_a_plan_that_cannot_be_used_is_named_as_python_names_it(dnp_native, planned, tmp_path, caplog):
    folder = shutil.copytree(planned / "plans", tmp_path / "my plans")
    damaged, no_plan = (next(folder.glob(f"{graph}-*.plan")) for graph in ("encode_text", "decode_latents"))
    flipped(damaged)
    no_plan.write_bytes(b"no graph")
    record = {"size": 8, "sha256": hashlib.sha256(b"no graph").hexdigest()}
    edited(lambda sidecar: sidecar.update(record))(no_plan)
    settings = {"prompt": SCENE, "steps": 1, "dnp": False, "seed": 0}
    with Pipeline.open(planned, threads=1, plans=folder) as python:
        expected = python.run(Request.from_dict(settings))
    with dnp_native.Pipeline.open(planned, threads=1, plans=str(folder)) as pipeline:
        found = pipeline.generate(**settings)
    same_pictures(found.images, expected.arrays)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert sorted(found.told["warnings"]) == sorted(warnings)


# ------------------------------------------------------------------------------------------------ the backend cuda


@pytest.fixture(scope="module")
def planned_for_gpus(tmp_path_factory):
    """The default bundle with plans of ``cuda``, each operator that only CUDA has as the definition that it carries."""
    folder = shutil.copytree(BUNDLE, tmp_path_factory.mktemp("gpu") / "default", ignore=lambda *_: ["plans"])
    for plan in build_cuda_plans(Bundle.open(folder)):
        ir.save(inlined(ir.load(plan.path)), plan.path)
        edited(lambda sidecar, path=plan.path: sidecar.update(asdict(file_record(path))))(plan.path)
    return folder


@pytest.fixture
def stand_ins(built):
    """Variables that put native/tests/stand_in_*.cpp in the place of what a GPU needs: the processor does the work."""
    return {
        "DNP_ONNXRUNTIME": str(built / "tests" / "libonnxruntime_stand_in.so"),
        "DNP_STAND_IN_FOR": str(ONNXRUNTIME),
        "LD_LIBRARY_PATH": str(built / "tests"),
    }


@pytest.fixture
def on_stand_in(built, stand_ins, tmp_path):
    """A function that runs ``dnp-native generate`` on a GPU where there is none: its picture, output and log."""

    def generate(bundle, *options, backend="cuda", libraries=None, **more):
        log = tmp_path / "log"
        where = {
            **os.environ,
            **stand_ins,
            "DNP_STAND_IN_LOG": str(log),
            **{f"DNP_STAND_IN_{name.upper()}": str(value) for name, value in more.items()},
            **({} if libraries is None else {"LD_LIBRARY_PATH": str(libraries)}),
        }
        command = [built / "dnp-native", "generate", bundle, SCENE, "--seed", "5", "--out", tmp_path]
        settings = ["--steps", "4", "--dns-steps", "4", "--backend", backend, *options]
        done = subprocess.run([*map(str, command), *settings], capture_output=True, text=True, env=where)
        return done, log.read_text().splitlines() if log.exists() else []

    return generate


def picture(file):
    with PIL.Image.open(file) as image:
        return np.asarray(image)


@pytest.mark.parametrize("plans", [False, True])
def test_cuda_gives_the_processors_picture(on_stand_in, native, planned_for_gpus, tmp_path, plans):
    done, log = on_stand_in(planned_for_gpus if plans else BUNDLE, "--images", "2")
    assert done.returncode == 0, done.stderr
    assert "on cuda (ONNX Runtime stand-in, CUDAExecutionProvider, Stand-in, SM 90, cuda:0)" in done.stdout
    expected = native.generate(SCENE, seed=5, steps=4, dns_steps=4, images=2)
    same_pictures([picture(tmp_path / f"{seed}-dnp.png") for seed in (5, 6)], expected.images)
    same_pictures([picture(tmp_path / f"{seed}-dns.png") for seed in (5, 6)], expected.dns_images)
    assert [line[4:] for line in done.stdout.splitlines() if line.startswith("n*: ")] == expected.negatives
    runs = [line for line in log if line.startswith(("run", "capture", "replay"))]
    if plans:
        assert done.stderr == ""
        assert all(".plan" in line for line in log if line.startswith("open"))
        # The first step is as it comes, the second is captured, the others of both passes are replayed.
        assert runs.count("capture 1") >= 2  # of the denoiser, and of captions
        assert runs.count("replay 1") >= 6
        assert not any("waits" in line for line in runs)
    else:
        assert "runs without CUDA graphs" in done.stderr
        assert "there is no plan for height 16, width 16" in done.stderr
        assert set(runs) == {"run waits"}


def test_cuda_at_a_size_without_a_plan_runs_the_graph_itself(on_stand_in, native, planned_for_gpus, tmp_path):
    done, log = on_stand_in(planned_for_gpus, "--height", "48", "--dnp", "false")
    expected = native.generate(SCENE, seed=5, steps=4, height=48, dnp=False)
    same_pictures([picture(tmp_path / "5-plain.png")], expected.images)
    command = build_command(
        Bundle.open(planned_for_gpus), Bundle.default().graph("denoise"), {"height": 12, "width": 16}, None
    )
    assert done.stderr.count("warning") == 1
    assert done.stderr.endswith(f"can capture: {command}\n")
    assert "run waits" in log


def test_cuda_without_what_it_needs_is_refused(on_stand_in, tmp_path):
    plain = ["--onnxruntime", str(ONNXRUNTIME)]
    for message, options, more in (
        ("has no CUDA provider; name the library of the package onnxruntime-gpu", plain, {}),
        ("there is no NVIDIA driver here: install one", [], {"libraries": tmp_path}),
        ("there is no GPU number 1 here", ["--device", "1"], {}),
        ("Stand-in (SM 61) is too old", [], {"sm": 61}),
        ("cannot load its CUDA provider: OrtSessionOptions", [], {"broken": 1}),
    ):
        done, log = on_stand_in(BUNDLE, *options, **more)
        assert done.returncode == 4
        assert message in done.stderr
        assert not log


@pytest.mark.slow
def test_work_on_cuda_is_stopped_and_closed_from_other_threads(built, stand_ins, planned_for_gpus):
    run(built / "tests" / "dnp-threads", planned_for_gpus, "cuda", env={**os.environ, **stand_ins})


def test_cuda_has_pythons_options(on_stand_in, planned_for_gpus):
    asked = []

    class Module:
        """What Python's session tells ONNX Runtime."""

        SessionOptions = SimpleNamespace

        class RunOptions(dict):
            add_run_config_entry = dict.__setitem__

        class InferenceSession:
            def __init__(self, path, options, providers, enable_fallback):
                asked.append(dict(providers[0][1]))

            def get_providers(self):
                return ["CUDAExecutionProvider"]

    session = SimpleNamespace(_ort=Module, _number=0, _gpu=SimpleNamespace(stream=7), graph=SimpleNamespace(name="a"))
    for planned, capture in ((False, True), (False, False), (True, True)):
        CudaSession._load(session, Path("a"), None, planned=planned, capture=capture)
        asked[-1]["user_compute_stream"] = "set"
    log = on_stand_in(BUNDLE, "--dnp", "false")[1] + on_stand_in(planned_for_gpus, "--dnp", "false")[1]
    told = [dict(word.split("=") for word in line.split()[1:]) for line in log if line.startswith("session")]
    assert [settings for number, settings in enumerate(told) if settings not in told[:number]] == asked
    for capturable, waits in ((True, "1"), (False, "0")):  # as the log of the runs above has it
        way = CudaSession._way(session, SimpleNamespace(capturable=capturable), 3)
        assert way == {"disable_synchronize_execution_providers": waits, "gpu_graph_id": "3"}


# ------------------------------------------------------------------------------------------------ the backend tensorrt


@pytest.fixture(scope="module")
def tensorrt(built):
    """The stand-in of TensorRT, which is built where NVIDIA's headers are."""
    library = next((built / "tests").glob("libnvinfer.so.*"), None)
    if library is None:
        pytest.skip("libdnp is built without TensorRT: cmake --preset release -DDNP_TENSORRT_INCLUDE=FOLDER")
    return library


def target_on(library):
    numbers = [
        getattr(ctypes.CDLL(library), f"getInferLib{part}Version")() for part in ("Major", "Minor", "Patch", "Build")
    ]
    return Target(TENSORRT, ".".join(map(str, numbers)), (), "sm90 Stand-in")


def write_plans(folder, library, settings=None, **ranges):
    """Plans of the stand-in, which Python names and describes as those that it compiles."""
    bundle, store, target = Bundle.open(folder), PlanStore(folder / "plans"), target_on(library)
    for graph in bundle.graphs.values():
        spec = PlanSpec(
            graph=graph.name,
            graph_sha256=bundle.graph_sha256(graph.name),
            backend="tensorrt",
            version=target.version,
            architecture=target.architecture,
            precision=bundle.precision,
            profile=to_dict(default_profile(bundle, graph, ranges)),
            flags={**(settings or BuildSettings()).flags, "revision": REVISION},
        )
        store.write(spec, f"stand-in plan\n{graph.path}".encode(), cost(0))
    return store


@pytest.fixture
def planned_for_tensorrt(copied, tensorrt):
    write_plans(copied, tensorrt)
    return copied


def test_tensorrt_gives_the_processors_picture(on_stand_in, native, planned_for_tensorrt, tmp_path):
    done, log = on_stand_in(planned_for_tensorrt, "--images", "2", "--onnxruntime", "none", backend="tensorrt")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"on tensorrt \(TensorRT [\d.]+, Stand-in, SM 90, cuda:0\)", done.stdout)
    expected = native.generate(SCENE, seed=5, steps=4, dns_steps=4, images=2)
    same_pictures([picture(tmp_path / f"{seed}-dnp.png") for seed in (5, 6)], expected.images)
    same_pictures([picture(tmp_path / f"{seed}-dns.png") for seed in (5, 6)], expected.dns_images)
    assert [line[4:] for line in done.stdout.splitlines() if line.startswith("n*: ")] == expected.negatives
    assert sorted(Path(line.split()[1]).stem for line in log if line.startswith("plan")) == sorted(native_graphs())
    # Of the denoiser's eight runs, all at the same sizes, two are as they come, and the others one launch each.
    denoiser = [line for line in log if not line.startswith(("plan", "context"))]
    assert denoiser.count("enqueue captured") >= 2  # of the denoiser, and of captions
    assert denoiser.count("launch") >= 6


def native_graphs():
    return [Path(graph.path).stem for graph in Bundle.default().graphs.values()]


def test_tensorrt_does_as_many_at_once_as_the_plans_take(on_stand_in, native, copied, tensorrt, tmp_path):
    write_plans(copied, tensorrt, batch=Range(1, 1, 2))
    done, _ = on_stand_in(copied, "--images", "3", "--beams", "5", backend="tensorrt")
    assert (done.returncode, done.stderr) == (0, "")
    expected = native.generate(SCENE, seed=5, steps=4, dns_steps=4, images=3, beams=5)
    same_pictures([picture(tmp_path / f"{seed}-dnp.png") for seed in (5, 6, 7)], expected.images)


SIZES = BuildSettings(optimization_level=2, workspace=5_500_000, weight_streaming=True)


@pytest.mark.parametrize("settings", [None, SIZES], ids=["plain", "with settings"])
def test_sizes_beyond_the_plans_are_refused_with_pythons_command(on_stand_in, copied, tensorrt, settings):
    write_plans(copied, tensorrt, settings, steps=Range(1, 4, 5), batch=Range(1, 1, 1))
    bundle = Bundle.open(copied)
    for graph, option, dims in (
        ("decode_latents", ("--height", "48"), {"height": 12}),
        ("denoise", ("--steps", "9"), {"steps": 10}),  # the last row of a table computes nothing
        ("encode_text", ("--windows", "2"), {"tokens": 2 * bundle.text.length}),
        ("caption_step", ("--beams", "5"), {"sequences": 5}),
    ):
        (plan,) = PlanStore(copied / "plans").newest(graph, "tensorrt")
        command = plan_command(bundle, "tensorrt", settings_of(plan.spec))
        limits = Limits.of_plan(bundle.graph(graph), from_dict(plan.spec.profile), bundle, command)
        with pytest.raises(SettingsError) as expected:
            limits.check(**dims)
        done, log = on_stand_in(copied, *option, backend="tensorrt")
        assert done.returncode == 2
        same_command(done.stderr, f"dnp-native: {expected.value}")
        assert "enqueue" not in log


def same_command(found, expected):
    """The same sentence, its options in any order."""
    (said, options), (wanted, same) = (text.strip().split(" --backend ") for text in (found, expected))
    assert said == wanted
    assert sorted(re.split(r" (?=--)", options)) == sorted(re.split(r" (?=--)", same))


def renamed(**changes):
    """All plans as those of something else."""

    def change(store):
        for plan in store.folder.glob("*.plan"):
            sidecar = json.loads(plan.with_suffix(".json").read_text())
            spec = PlanSpec(**{**sidecar["spec"], **changes})
            plan.with_suffix(".json").unlink()
            other = plan.rename(plan.with_name(f"{spec.graph}-{spec.key}.plan"))
            other.with_suffix(".json").write_text(json.dumps({**sidecar, "spec": asdict(spec)}))

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda store: shutil.rmtree(store.folder),
        renamed(version="10.0.0.6"),
        renamed(architecture="sm90 Another"),
        renamed(graph_sha256="0" * 64),
        renamed(flags={**BuildSettings(refit=True).flags, "revision": 0}),
        lambda store: [flipped(plan) for plan in store.folder.glob("*.plan")],
    ],
    ids=range(6),
)
def test_plans_that_tensorrt_cannot_use_are_named_as_python_names_them(on_stand_in, copied, tensorrt, change):
    store, bundle = write_plans(copied, tensorrt), Bundle.open(copied)
    change(store)
    with pytest.raises(BackendError) as expected:
        plan_for(bundle, bundle.graph("encode_text"), target_on(tensorrt), store)
    done, log = on_stand_in(copied, backend="tensorrt")
    assert done.returncode == 4
    same_command(done.stderr, f"dnp-native: {expected.value}")
    assert not log


@pytest.mark.slow
def test_work_on_tensorrt_is_stopped_and_closed_from_other_threads(built, stand_ins, copied, tensorrt):
    write_plans(copied, tensorrt, steps=Range(1, 25, 1000))
    run(built / "tests" / "dnp-threads", copied, "tensorrt", env={**os.environ, **stand_ins})


def test_a_plan_that_tensorrt_cannot_load_is_named(on_stand_in, planned_for_tensorrt):
    for plan in (planned_for_tensorrt / "plans").glob("*.plan"):
        plan.write_bytes(b"no plan")
        edited(lambda sidecar, path=plan: sidecar.update(asdict(file_record(path))))(plan)
    done, _ = on_stand_in(planned_for_tensorrt, backend="tensorrt")
    assert done.returncode == 4
    assert (
        "cannot load the plan on Stand-in, SM 90, cuda:0: this is no plan of the stand-in; build it again: dnp "
        in done.stderr
    )


def test_tensorrt_without_what_it_needs_is_refused(on_stand_in, tensorrt, tmp_path):
    done, _ = on_stand_in(BUNDLE, backend="tensorrt", libraries=tmp_path)
    assert done.returncode == 4
    assert f"is not found ({tensorrt.name}: cannot open" in done.stderr
    (tmp_path / tensorrt.name).symlink_to(tensorrt)
    done, _ = on_stand_in(BUNDLE, backend="tensorrt", libraries=tmp_path)
    assert done.returncode == 4
    assert "there is no NVIDIA driver here: install one" in done.stderr


def test_without_tensorrts_headers_the_backend_says_so(on_stand_in, built):
    if list((built / "tests").glob("libnvinfer.so.*")):
        pytest.skip("libdnp is built with TensorRT")
    done, _ = on_stand_in(BUNDLE, backend="tensorrt")
    assert done.returncode == 4
    assert "was built without TensorRT: build it with -DDNP_TENSORRT_INCLUDE=FOLDER" in done.stderr


def test_tensorrt_for_rtx_is_pythons_alone(on_stand_in):
    done, _ = on_stand_in(BUNDLE, backend="tensorrt-rtx")
    assert done.returncode == 4
    assert "its headers are not public" in done.stderr


# ------------------------------------------------------------------------------------------------ while it works


def test_progress_tells_every_step_and_shows_it(dnp_native, native):
    steps, previews = [], []

    def progress(step):
        steps.append((step.phase, step.index, step.total, step.images))
        previews.append(step.preview(step.images - 1))
        with pytest.raises(dnp_native.DnpError, match="no image 2"):
            step.preview(2)

    settings = {"steps": 3, "dns_steps": 2, "images": 2, "seed": 1}
    found = native.generate(SCENE, progress, **settings)
    assert steps[:2] == [("dns", 1, 2, 2), ("dns", 2, 2, 2)]
    assert steps[-3:] == [("final", 1, 3, 2), ("final", 2, 3, 2), ("final", 3, 3, 2)]
    assert all(phase == "caption" for phase, *_ in steps[2:-3])
    assert all(picture.shape == (64, 64, 3) for picture in previews)
    without = native.generate(SCENE, **settings)
    np.testing.assert_array_equal(found.images[1], without.images[1])  # looking changes nothing


def test_a_callback_stops_the_work_and_the_pipeline_goes_on(dnp_native, native):
    with pytest.raises(dnp_native.DnpError, match=r"stopped .* in final step 2 of 9") as stopped:
        native.generate(SCENE, lambda step: step.index != 2, steps=9, dnp=False)
    assert stopped.value.code == 130
    with pytest.raises(dnp_native.DnpError, match="cancelled in final step 2 of 9") as stopped:
        native.generate(SCENE, lambda step: native.cancel() if step.index == 2 else None, steps=9, dnp=False)
    assert stopped.value.code == 130

    def broken(step):
        raise RuntimeError("a fault of the callback's")

    with pytest.raises(RuntimeError, match="a fault of the callback's"):
        native.generate(SCENE, broken, steps=1, dnp=False)
    assert len(native.generate(SCENE, steps=1, dnp=False).images) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "stepz": 3}', "did you mean 'steps'"),
        (
            b'{"prompt": "a", "prefix": "a small red circle left of a large blue square", "max_length": 5}',
            "leaves no room",
        ),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(dnp_native, native, settings, message):
    result = ctypes.c_void_p()
    error = dnp_native.LIBRARY.dnp_generate(native._handle, settings, None, ctypes.byref(result))
    with pytest.raises(dnp_native.DnpError, match=message) as refused:
        dnp_native.check(error)
    assert refused.value.code == 2
    assert not result


def test_a_pipeline_that_is_closed_and_an_image_that_is_none_are_refused(dnp_native):
    pipeline = dnp_native.Pipeline.open(BUNDLE, threads=1)
    assert pipeline.info["bundle"] == Bundle.default().fingerprint
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(dnp_native.DnpError, match="uint8 array"):
            pipeline.caption(image)
    pipeline.close()
    pipeline.close()
    with pytest.raises(dnp_native.DnpError, match="is closed"):
        pipeline.generate(SCENE)


def test_what_cannot_be_opened_is_named(dnp_native, native, tmp_path):
    for code, message, folder, options in (
        (3, "does not exist", tmp_path / "none", {}),
        (2, "unknown option", BUNDLE, {"thread": 1}),
        (2, "threads must be", BUNDLE, {"threads": 0}),
        (4, "has loaded ONNX Runtime", BUNDLE, {"onnxruntime": "another.so"}),
    ):
        with pytest.raises(dnp_native.DnpError, match=message) as refused:
            dnp_native.Pipeline.open(folder, **options)
        assert refused.value.code == code


def test_structs_without_their_size_are_refused(dnp_native, native):
    result, c = ctypes.c_void_p(), dnp_native.LIBRARY
    too_small = ctypes.byref(dnp_native.Callbacks(8))
    with pytest.raises(dnp_native.DnpError, match="set it to sizeof"):
        dnp_native.check(c.dnp_generate(native._handle, b'{"prompt": "a"}', too_small, ctypes.byref(result)))
    with pytest.raises(dnp_native.DnpError, match="pipeline is NULL"):
        dnp_native.check(c.dnp_generate(None, b"{}", None, ctypes.byref(result)))
    dnp_native.check(c.dnp_close(None))
    assert c.dnp_error_message(None) == b"no error"


def test_the_wheel_is_for_every_python(wheel):
    assert re.fullmatch(r"dnp_native-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if ".dist-info/" not in name]
    assert sorted(names) == ["dnp_native/__init__.py", "dnp_native/libdnp.so"]


def test_nothing_but_the_interface_is_exported(built, dnp_native):
    names = {line.split()[-1] for line in run("nm", "-D", "--defined-only", built / "libdnp.so").splitlines()}
    declared = set(re.findall(r"DNP_API[^;(]*?(dnp_\w+)\(", (ROOT / "native" / "include" / "dnp.h").read_text()))
    assert names == declared
    assert dnp_native.LIBRARY.dnp_abi_version() == 1


def test_ctest_passes(built):
    run("ctest", "--test-dir", BUILD, "--output-on-failure", env={**os.environ, "DNP_ONNXRUNTIME": str(ONNXRUNTIME)})


def test_an_installed_library_is_found_by_cmake_and_pkg_config(built, tmp_path):
    prefix = tmp_path / "prefix"
    run("cmake", "--install", BUILD, "--prefix", prefix)
    run("cmake", "-S", "native/examples", "-B", tmp_path / "examples", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path / "examples")
    where = {**os.environ, "DNP_ONNXRUNTIME": str(ONNXRUNTIME)}
    assert Bundle.default().fingerprint in run(prefix / "bin" / "dnp-native", "info", BUNDLE, env=where)
    told = run(tmp_path / "examples" / "example_c", BUNDLE, "a red circle", tmp_path / "image.ppm", env=where)
    assert json.loads(told)["request"]["seed"] == 7
    assert (tmp_path / "image.ppm").read_bytes().startswith(b"P6\n64 64\n255\n")
    (described,) = prefix.rglob("dnp.pc")
    flags = run("pkg-config", "--cflags", "--libs", "dnp", env={**os.environ, "PKG_CONFIG_PATH": str(described.parent)})
    program = tmp_path / "with_pkg_config"
    run("cc", "native/examples/generate.c", "-o", program, *flags.split())
    where["LD_LIBRARY_PATH"] = str(described.parents[1])
    assert run(program, BUNDLE, "a red circle", tmp_path / "same.ppm", env=where)
    assert (tmp_path / "same.ppm").read_bytes() == (tmp_path / "image.ppm").read_bytes()


def test_the_command_writes_pictures(built, tmp_path):
    command = [built / "dnp-native", "generate", BUNDLE, SCENE, "--steps", "3", "--dns-steps", "2", "--seed", "5"]
    out = run(*command, "--onnxruntime", ONNXRUNTIME, "--threads", "1", "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"5-dnp.png", "5-dns.png"}
    assert "n*: a " in out
    assert read_settings(tmp_path / "5-dnp.png")["request"]["prompt"] == SCENE
    caption = run(built / "dnp-native", "caption", BUNDLE, tmp_path / "5-dns.png", "--onnxruntime", ONNXRUNTIME)
    assert f"n*: {caption}" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_killed_at_work_leaves_no_half_picture(built, tmp_path, number):
    command = [built / "dnp-native", "generate", BUNDLE, SCENE, "--steps", "900", "--onnxruntime", ONNXRUNTIME]
    told, terminal = os.openpty()  # where progress is shown
    with subprocess.Popen([*map(str, command), "--out", str(tmp_path)], stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        said = b""
        while b"dns 2/" not in said:
            said += os.read(told, 1000)
        process.send_signal(number)
        with suppress(OSError):  # the end of a terminal
            while more := os.read(told, 1000):
                said += more
    os.close(told)
    assert not list(tmp_path.iterdir())
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130
        assert re.search(rb"dnp-native: cancelled in dns step \d+ of \d+", said)


def generated(*files):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "native" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for file in files:
        assert generate.FILES[file]() == (ROOT / "native" / file).read_text(encoding="utf-8"), "run native/generate.py"


def test_generated_files_are_those_of_the_sources():
    generated("src/generated/constants.hpp", "src/generated/samplers.inc")


@pytest.mark.slow
def test_generated_characters_are_those_of_the_tokenizers_library():
    generated("src/generated/unicode.inc")
