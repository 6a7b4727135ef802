"""Fixtures that several test modules share: tiny models of random weights, and pipelines on a stand-in for a GPU."""

import gc
import itertools
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

import dnp  # before the fixtures load torch and diffusers: it switches their telemetry off

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script: processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Neither asks for a time: the machine may be busy. A fixture of a function that its examples share is meant so.
profile = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("quick", max_examples=20, **profile)
settings.register_profile("thorough", max_examples=200, **profile)
settings.load_profile("quick")


# The files that take a minute or more, longest first: they begin first, so that no process has one left to itself.
LONG = [
    "families", "export", "ranges", "telemetry", "native", "page", "soak", "ray", "cuda_plans", "lora", "parity", "cli",
    "packaging", "gpu_sessions", "samplers", "forks", "batching", "captions", "plans",
]  # fmt: skip


@pytest.hookimpl(trylast=True)  # after the files were shuffled
def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish():
    """Python's collector need not go through the libraries' objects again and again: they stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """``made_once(name, make)``: what ``make(folder)`` gives for a new folder, made by one process for all of them.

    What it gives is pickled.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name, make):
        folder, result = shared / name, shared / f"{name}.pickle"
        with FileLock(f"{folder}.lock"):
            if not result.exists():
                folder.mkdir()
                result.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(result.read_bytes())

    return made


@pytest.fixture(scope="session")
def tiny_blip_folder(tmp_path_factory):
    """A BLIP of two layers whose captions differ from image to image, in content and in length."""
    import torch
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words = "a the red blue green large small circle square star ring left right of to on ' s don t . , ! ? it 've"
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocab = [*specials, *words.split(), "##s", "##ing", "##x", "##n", *"bcdefghijklmnopqruvwxyz"]
    spread = 0.2  # of the random weights: enough that images matter
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    config = BlipConfig(
        text_config={
            **common, "vocab_size": len(vocab), "encoder_hidden_size": 32, "max_position_embeddings": 32,
            "bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0, "initializer_range": spread,
        },
        vision_config={**common, "image_size": 32, "patch_size": 8, "initializer_range": spread},
        initializer_range=spread,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny-blip")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[3] += 1.5  # so that most captions end by themselves
    model.save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}, clean_up_tokenization_spaces=True)
    processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory):
    """A Stable Diffusion of random weights that fp16 holds exactly, heads of 16 channels, images of 32 pixels."""
    import families

    return families.build("sd1", tmp_path_factory.mktemp("tiny-sd") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_export(tiny_sd_folder, tiny_blip_folder, made_once):
    """The report of exporting the two tiny models; ``.path`` is the bundle. For reading only."""
    from dnp.export.bundle import export_bundle

    return made_once(
        "tiny", lambda folder: export_bundle(tiny_sd_folder, folder / "bundle", captioner=tiny_blip_folder)
    )


@pytest.fixture
def take_graphs(monkeypatch):
    """``take_graphs(report)`` has exports take the graphs of a report, where only what is around them is tested."""
    from dnp.export import bundle as bundle_module

    def take(report):
        written = {graph.name: graph for graph in report.graphs}

        def write(spec, folder):
            record = written[spec.name]
            for file in report.path.glob(f"{record.manifest['file']}*"):
                (folder / "graphs").mkdir(exist_ok=True)
                shutil.copy(file, folder / "graphs")
            entry = {key: record.manifest[key] for key in ("file", "inputs", "outputs")}
            return bundle_module.WrittenGraph(entry, 0.0, 0)

        monkeypatch.setattr(bundle_module, "write_graph", write)
        monkeypatch.setattr(bundle_module, "expect", lambda spec: spec)
        monkeypatch.setattr(bundle_module, "finish_graph", lambda spec, folder, graph: written[spec.name])

    return take


@pytest.fixture(scope="session")
def default_bundle():
    """The bundle that the package ships."""
    from dnp.engine import Bundle

    return Bundle.default()


@pytest.fixture(scope="session")
def default_fp16(model_folder, default_bundle, made_once):
    """The default model exported in fp16, its ranges checked, as a bundle. For reading only: plans go elsewhere."""
    from dnp.engine import Bundle
    from dnp.export.bundle import export_bundle
    from dnp.export.fp16.ranges import RangeCheck

    def make(folder):
        shipped = default_bundle.defaults
        return export_bundle(
            model_folder / "stable-diffusion",
            folder / "bundle",
            captioner=model_folder / "blip",
            precision="fp16",
            defaults={"guidance": shipped.final.guidance, "dns_guidance": shipped.dns.guidance},
            ranges=RangeCheck(),
        )

    return Bundle.open(made_once("fp16", make).path)


@pytest.fixture(scope="session")
def model_folder():
    """The weights that the default bundle was exported from, in the folders of diffusers and transformers."""
    return Path(__file__).parent.parent / "models" / "tiny"


@pytest.fixture
def gpu(monkeypatch):
    """A fake device, and fakes of both products of TensorRT and of ONNX Runtime on it."""
    import fake_gpu

    from dnp.engine.backends.onnxruntime import cuda as ort_cuda
    from dnp.engine.plans.product import Product
    from dnp.engine.system import cuda as cuda_module

    cuda = fake_gpu.FakeCuda()
    cuda.trt = fake_gpu.FakeTensorRt(cuda)
    monkeypatch.setattr(cuda_module, "open_cuda", lambda device=0: cuda.activate() or cuda)
    monkeypatch.setattr(Product, "load", lambda self: cuda.trt)
    cuda.ort = fake_gpu.FakeOnnxRuntime(cuda)
    monkeypatch.setattr(ort_cuda, "import_onnxruntime", lambda extra: cuda.ort)
    return cuda


@pytest.fixture
def open_pipeline(gpu, tmp_path, default_bundle, monkeypatch):
    from dnp.engine.backends import device
    from dnp.engine.backends.registry import open_backend
    from dnp.engine.backends.session import BackendOptions
    from dnp.engine.plans.build import build_plans
    from dnp.engine.plans.profile import Range
    from dnp.engine.plans.store import PlanStore

    opened = []

    def open_one(product="tensorrt-rtx", largest=2, **options):
        """A pipeline on plans for batches up to ``largest``, built unless there are any: every size is warmed up."""
        options = {"plans": tmp_path / "plans", **options}
        if product == "cuda":  # which has no plans to say it
            monkeypatch.setattr(device, "BATCH", largest)
        elif not any(plan.spec.backend == product for plan in PlanStore(options["plans"]).plans()):
            build_plans(default_bundle, product, ranges={"batch": Range(1, 1, largest)}, folder=options["plans"])
        opened.append(dnp.Pipeline(default_bundle, open_backend(product, BackendOptions(**options))))
        return opened[-1]

    yield open_one
    for pipeline in opened:
        pipeline.close()


@pytest.fixture
def go_on(monkeypatch):
    """Engines stand still before their 41st step, so that whoever looks finds work under way however late, until the
    test calls this."""
    from dnp.runtime.sampling.denoise import Denoiser

    step, taken, free = Denoiser.step, itertools.count(), threading.Event()

    def held(denoiser, among=None):
        if next(taken) >= 40:
            assert free.wait(600)
        return step(denoiser, among)

    monkeypatch.setattr(Denoiser, "step", held)
    yield free.set
    free.set()


@pytest.fixture(scope="session")
def served():
    """A server of the shipped model, with AUTOMATIC1111's paths, that many tests share."""
    from served import serving

    from dnp.serving.settings import ServerSettings

    with serving(ServerSettings(sdapi=True, most_images=4)) as running:
        yield running
