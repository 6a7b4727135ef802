# The commands of the project. None needs root, a GPU, or any network beyond the package index.

PYTHON ?= python3
PROMPT ?= a large red circle left of a small blue square on a plain yellow background
SEED ?= 0
COMMA := ,
BACKEND ?= tensorrt
BENCH ?=
BUNDLE ?= build/fp16
EXPLORED := a large blue cross on a plain red background
# Each file's tests in one process, of one thread; the files begin in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 .venv-test/bin/pytest --dist loadfile --no-loadscope-reorder
SOURCES := $(shell find dnp engine runtime export serving -type f -not -path '*/__pycache__/*')

# What cannot be is said before anything is installed; that there is no GPU, before the bundle is exported.
ifneq ($(filter gpu-check,$(MAKECMDGOALS)),)
ifeq ($(findstring |$(BACKEND)|,|tensorrt|tensorrt-rtx|cuda|),)
$(error BACKEND=$(BACKEND) is none that runs on a GPU; choose one of tensorrt, tensorrt-rtx, cuda)
endif
ifeq ($(filter build/fp16,$(BUNDLE))$(wildcard $(BUNDLE)/bundle.json),)
$(error BUNDLE=$(BUNDLE) holds no bundle.json; name the folder of a bundle, or leave BUNDLE out for one that is made)
endif
endif

.PHONY: demo test test-all lint bundle gallery quality gpu-check gpu-bench bench clean

demo: .venv/installed  ## plain, DNS and DNP image of one prompt, side by side, in out/
	.venv/bin/dnp generate "$(PROMPT)" --seed $(SEED) --compare --out out --overwrite

test: .venv-test/installed  ## the tests but the slow ones, against the built wheel
	$(PYTEST) --numprocesses 2 -m "not slow"

test-all: test  ## after them the slow ones, and all properties with more examples; some wait more than they compute
	$(PYTEST) --numprocesses 3 -m "slow or hypothesis" --hypothesis-profile thorough

lint: .venv-test/installed  ## ruff and mypy
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	cd .venv-test && bin/mypy --config-file ../pyproject.toml -p dnp

bundle: .venv-test/installed  ## export the default model to the bundle that the package ships
	.venv-test/bin/dnp export models/tiny/stable-diffusion dnp/default --captioner models/tiny/blip --overwrite \
	    --name dnp-tiny --default guidance=1.5 --default dns_guidance=1

gallery: .venv-test/installed  ## the pictures of the README
	.venv-test/bin/python benchmarks/gallery.py docs/images/gallery.png
	.venv-test/bin/dnp generate "$(PROMPT)" --seed $(SEED) --compare --out build/pictures --overwrite
	mv build/pictures/*-compared.png docs/images/demo.png
	.venv-test/bin/dnp explore "$(EXPLORED)" --out build/pictures --overwrite
	mv build/pictures/*-explored.png docs/images/explore.png
	.venv-test/bin/python benchmarks/page.py docs/images/page.png

quality: .venv-test/installed  ## does DNP help? Table, plot and contact sheet in benchmarks/results/
	.venv-test/bin/python benchmarks/quality/quality.py

gpu-check: .venv-$(BACKEND)/installed  ## what only a GPU can show; BACKEND=tensorrt, tensorrt-rtx, cuda
	.venv-$(BACKEND)/bin/python benchmarks/gpu_check.py --backend $(BACKEND) --dry-run
	$(MAKE) --no-print-directory $(BUNDLE)/bundle.json
	.venv-$(BACKEND)/bin/python benchmarks/gpu_check.py --backend $(BACKEND) --bundle $(BUNDLE)

gpu-bench: .venv-gpu-bench/installed  ## speed on a GPU beside PyTorch, at full size; BENCH=--profile tells the kernels too
	.venv-gpu-bench/bin/python benchmarks/gpu_bench/bench.py $(BENCH)

bench: .venv-bench-main/installed  ## speed beside the peers', about an hour; BENCH="--size default" is some minutes
	.venv-bench-main/bin/python benchmarks/speed/bench.py $(BENCH)

build/fp16/bundle.json: .venv-test/installed
	.venv-test/bin/dnp export models/tiny/stable-diffusion build/fp16 --captioner models/tiny/blip --overwrite \
	    --precision fp16 --name dnp-tiny-fp16 --default guidance=1.5 --default dns_guidance=1

clean:
	rm -rf .venv .venv-* build dist out *.egg-info

.venv/installed: pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check ".[cpu]"
	touch $@

.venv-bench-main/installed: pyproject.toml setup.py tests/constraints.txt benchmarks/speed/requirements/main.txt $(SOURCES)
	$(PYTHON) -m venv .venv-bench-main
	.venv-bench-main/bin/pip install --quiet --disable-pip-version-check -c tests/constraints.txt \
	    -r benchmarks/speed/requirements/main.txt ".[cpu,openvino,export]"
	touch $@

.venv-gpu-bench/installed: pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv .venv-gpu-bench
	.venv-gpu-bench/bin/pip install --quiet --disable-pip-version-check ".[gpu,build,export]" matplotlib
	touch $@

.venv-$(BACKEND)/installed: pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv .venv-$(BACKEND)
	.venv-$(BACKEND)/bin/pip install --quiet --disable-pip-version-check \
	    ".[$(if $(filter cuda,$(BACKEND)),gpu$(COMMA)build,cpu$(COMMA)$(BACKEND))]" onnx
	touch $@

.venv-test/installed: pyproject.toml setup.py tests/constraints.txt $(SOURCES)
	$(PYTHON) -m venv .venv-test
	rm -rf build dist
	.venv-test/bin/pip install --quiet --disable-pip-version-check -c tests/constraints.txt build
	.venv-test/bin/python -m build --wheel --outdir dist . > dist.log 2>&1 || (cat dist.log; false)
	rm -f dist.log
	.venv-test/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.whl
	.venv-test/bin/pip install --quiet --disable-pip-version-check -c tests/constraints.txt "dnp-engine[dev] @ file://$(CURDIR)/$$(ls dist/*.whl)"
	touch $@
