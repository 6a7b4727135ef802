"""Every name of TensorRT 10, TensorRT 11, TensorRT for RTX and CUDA that the package uses is there in the real modules.

TensorRT itself does not install without its libraries, but its bindings do: with libraries of nothing but the entry
points that they are linked to, they can be imported and looked at. Nothing can be built or run with them.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cuda.bindings import runtime as cuda_runtime

import dnp.engine
from dnp.engine.backends import tensorrt as trt_module

ENGINE = Path(dnp.engine.__file__).parent
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")

# What an expression in the source is an object of; None is the module itself.
KINDS = {
    "plans/compiler.py": {
        "trt": None, "builder": "Builder", "parser": "OnnxParser", "network": "INetworkDefinition",
        "config": "IBuilderConfig", "profile": "IOptimizationProfile", "e": "ParserError", "cache": "ITimingCache",
    },
    "backends/tensorrt.py": {
        "trt": None, "self._trt": None, "self._runtime": "Runtime", "engine": "ICudaEngine",
        "self._engine": "ICudaEngine", "context": "IExecutionContext", "run.context": "IExecutionContext",
        "config": "IRuntimeConfig", "self._cache": "IRuntimeCache", "refitter": "Refitter",
        "parser": "OnnxParserRefitter", "inspector": "EngineInspector",
    },
    "plans/product.py": {"module": None},
}  # fmt: skip
# What only TensorRT for RTX has; the code asks the product before it uses any of it.
RTX_ONLY = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "CudaGraphStrategy",
    "CudaGraphStrategy.DISABLED",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IExecutionContext.is_stream_capturable",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}
PLAIN = {"__version__", "__name__"}  # of any module
# What the source names in other ways: as text, in a class of its own, or one level deeper.
OTHERS = {f"DataType.{name}" for name in trt_module._DTYPES} | {
    "ILogger.Severity.VERBOSE",
    "ILogger.log",
    "IProgressMonitor.phase_finish",
    "IProgressMonitor.phase_start",
    "IProgressMonitor.step_complete",
}


def used_names() -> set[str]:
    """``Builder.create_network`` and the like, from the source."""
    names = set()
    for file, kinds in KINDS.items():
        for node in ast.walk(ast.parse((ENGINE / file).read_text())):
            if isinstance(node, ast.Attribute) and (root := ast.unparse(node.value)) in kinds:
                names.add(node.attr if kinds[root] is None else f"{kinds[root]}.{node.attr}")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                root = ast.unparse(node.value.value)
                if root in kinds and kinds[root] is None and node.value.attr[0].isupper():
                    names.add(f"{node.value.attr}.{node.attr}")
    return names - PLAIN | OTHERS


def test_the_source_is_really_read():
    for name in (
        "Builder.build_serialized_network",
        "EngineInspector.get_engine_information",
        "IBuilderConfig.builder_optimization_level",
        "ICudaEngine.num_io_tensors",
        "IExecutionContext.execute_async_v3",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.parse_from_file",
        "OnnxParserRefitter.refit_from_file",
        "ParserError.node_operator",
    ):
        assert name in used_names()
    assert used_names() >= RTX_ONLY


def missing(names: set[str], module) -> set[str]:
    """Those that the module does not have."""

    def there(name: str) -> bool:
        found = module
        for part in name.split("."):
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True

    return {name for name in names if not there(name)}


def test_tensorrt_for_rtx_has_every_name():
    import tensorrt_rtx

    assert missing(used_names(), tensorrt_rtx) == set()


def test_cuda_has_every_name():
    names = set()
    for node in ast.walk(ast.parse((ENGINE / "system/cuda.py").read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self._rt."):
            names.add(ast.unparse(node).removeprefix("self._rt."))
    assert len(names) > 30
    assert "cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal" in names
    assert missing(names, cuda_runtime) == set()


@pytest.mark.slow  # fetches two wheels of 1.3 MB from the package index
@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
def test_tensorrt_has_every_name(tmp_path, version):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler, which makes the libraries that the bindings are linked to")
    wheel = f"tensorrt-cu13-bindings=={version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    fetched = subprocess.run([*pip, "--dest", tmp_path, wheel], capture_output=True, text=True)
    assert fetched.returncode == 0, fetched.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path)
    source = tmp_path / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS))
    major = version.partition(".")[0]
    for library in LIBRARIES:
        out = tmp_path / f"{library}.so.{major}"
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{out.name}", "-o", out, source], check=True)
    script = (
        "import json, sys, tensorrt_bindings as trt\n"
        "names = json.load(sys.stdin)\n"
        "def there(name):\n"
        "    found = trt\n"
        "    for part in name.split('.'):\n"
        "        if not hasattr(found, part): return False\n"
        "        found = getattr(found, part)\n"
        "    return True\n"
        "print(json.dumps([trt.__version__, [n for n in names if not there(n)]]))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)},
        input=json.dumps(sorted(used_names())),
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    found, lacking = json.loads(told.stdout.splitlines()[-1])
    assert found == version
    assert set(lacking) == RTX_ONLY
