# serve · test · lint · bench · docs: each makes what it needs on a fresh machine (python3.11 with venv is all).
PYTHON ?= python3.11
MODEL ?= demo
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
INSTALL := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q
# a worker a core; a thread that waits for work must not burn a core that another process needs
TEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
ALL := -n auto --maxprocesses 4 --dist loadfile

.PHONY: serve test lint quick slow test-kernels bench bench-cpu test-gpu bench-gpu sanitize xla test-clients test-ui docs clean

serve: $(VENV)/serve
	@HF_HUB_OFFLINE=$${HF_HUB_OFFLINE:-$(if $(filter demo,$(MODEL)),1,0)} $(BIN)/tokenry serve $(MODEL) --port $(PORT) $(ARGS)

# one session for both: collecting takes 20 seconds, and what slow tests begin with is made for quick ones, too
test: lint
	$(TEST) $(ALL)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick: $(VENV)/dev
	$(TEST) $(ALL) -m "not slow"

slow: $(VENV)/dev
	$(TEST) $(ALL) -m slow

# Triton's kernels: interpreted against the reference, compiled under a budget, the table at the end
test-kernels: $(VENV)/dev
	$(TEST) plugins/triton/tests
	$(BIN)/python plugins/triton/tests/lane/triton_table.py plugins/triton/tests/budgets.json

bench: $(VENV)/dev
	$(BIN)/tokenry bench throughput $(MODEL)
	$(BIN)/tokenry bench latency $(MODEL)
	$(BIN)/python benchmarks/startup.py $(MODEL)

# beside the peers that are found in build/peers (benchmarks/peers/README.md)
bench-cpu: $(VENV)/dev
	test -e build/peers/m125/config.json || $(BIN)/python benchmarks/make_model.py build/peers/m125
	$(BIN)/python benchmarks/cpu_peers.py build/peers/m125 $(ARGS)

# on a machine with a GPU; GPU_PYTHON is one whose torch sees it and in which tokenry is installed
GPU_PYTHON ?= $(BIN)/python
test-gpu:
	$(GPU_PYTHON) -m pytest tests/gpu tests/gpu_kernels plugins/cuda/tests/test_cuda_conformance.py plugins/rocm/tests/test_rocm_conformance.py

bench-gpu:
	$(GPU_PYTHON) benchmarks/gpu_steps.py $(MODEL) --deterministic both --json gpu_steps.json $(ARGS)
	$(GPU_PYTHON) benchmarks/gpu_kernels.py --tune --json gpu_kernels.json

# the CPU's kernels under the address and undefined-behaviour sanitizers
sanitize: $(VENV)/dev
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r plugins/cpu build/sanitize/ && rm -rf build/sanitize/cpu/build
	cd build/sanitize/cpu && TOKENRY_CPU_SANITIZE=1 $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace --force
	cd build/sanitize && LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(CURDIR)/build/sanitize/cpu \
	  $(patsubst %/python,$(CURDIR)/%/python,$(TEST)) -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR)/build/sanitize \
	  -k "not model and not long_context and not (threads_nor and (softcap or window or float16))" $(addprefix cpu/tests/test_cpu_,ops.py sample.py bf16.py kv.py)

# the Neuron plugin's kernels through XLA on the host (tests/xla/README.md): 3 GB, some minutes
xla: build/xla/installed
	PJRT_DEVICE=CPU OMP_NUM_THREADS=1 PYTHONPATH=tests/xla build/xla/venv/bin/python tests/xla/check.py

build/xla/installed:
	$(PYTHON) -m venv build/xla/venv
	build/xla/venv/bin/pip install -q -U pip "setuptools>=77" wheel
	build/xla/venv/bin/pip install -q --no-deps torch==2.9.0 torch-xla==2.9.0
	build/xla/venv/bin/pip install -q absl-py filelock fsspec jinja2 networkx "numpy<2.4" pyyaml requests sympy typing_extensions
	build/xla/venv/bin/python tests/xla/stubs.py build/xla/venv/lib/python3*/site-packages/torch/lib
	build/xla/venv/bin/pip install -q --no-build-isolation -e . -e demo
	build/xla/venv/bin/pip install -q --no-build-isolation --no-deps -e plugins/cpu -e plugins/neuron
	@touch $@

# official clients against a demo server: a matrix of checks and clients at the end. Online, because
# huggingface_hub's client otherwise asks nobody, not even 127.0.0.1
test-clients: $(VENV)/clients build/lm-eval/installed
	$(subst HF_HUB_OFFLINE=1,HF_HUB_OFFLINE=0,$(TEST)) tests/clients $(ARGS)

# the page in chromium (apt install chromium chromium-driver), screenshots into build/ui; skips without
test-ui: $(VENV)/ui
	$(TEST) tests/ui $(ARGS)

# the evaluation harness lies beside .venv: its 300 MB (pandas, pyarrow) are no client's of ours
build/lm-eval/installed: $(VENV)/clients tests/clients/lm_eval/requirements.txt
	@echo "tokenry: installing the evaluation harness (10 seconds)"
	@rm -rf build/lm-eval
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-compile --target build/lm-eval/site -r tests/clients/lm_eval/requirements.txt
	@touch $@

docs: $(VENV)/dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build *.egg-info core/*.egg-info

$(VENV)/pip:
	@echo "tokenry: making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) setuptools wheel
	@touch $@

$(VENV)/serve: $(VENV)/pip pyproject.toml plugins/cpu/pyproject.toml demo/pyproject.toml constraints.txt
	@echo "tokenry: installing the engine, the CPU backend and the demo model (about a minute)"
	@$(INSTALL) --no-build-isolation -e . -e plugins/cpu -e demo
	@touch $@

$(VENV)/dev: $(VENV)/serve
	@echo "tokenry: installing what the tests need (about a minute)"
	@$(INSTALL) --no-build-isolation -e '.[bench,dev,otel,hf]' -e plugins/hpu -e plugins/neuron -e plugins/triton -e plugins/cuda -e plugins/rocm
	@touch $@

$(VENV)/clients: $(VENV)/dev
	@echo "tokenry: installing the clients that are tested against (about a minute)"
	@$(INSTALL) --no-build-isolation -e '.[clients]'
	@touch $@

$(VENV)/ui: $(VENV)/dev
	@$(INSTALL) --no-build-isolation -e '.[ui]'
	@touch $@
