# Each target but gpu-check works in a fresh clone: it creates .venv, installs the pinned versions, then does its job.
# A second call reuses .venv; a change of pyproject.toml or constraints.txt installs again. test-oldest does the same with
# .venv-oldest and constraints-oldest.txt.

PYTHON   ?= python3
ARGS     ?=
PIP_ARGS ?= --quiet
WORKERS  ?= 2
THREADS  ?= 1

VENV    := .venv
BIN     := $(VENV)/bin
PIP      = python -m pip install --disable-pip-version-check --no-compile $(PIP_ARGS)
INSTALL  = $(BIN)/$(PIP) -c constraints.txt
# a test that hangs is shown, and the rest goes on
PYTEST   = python -m pytest -n $(WORKERS) --dist loadfile --timeout 900 -m 'not slow'
OLDEST  := .venv-oldest/bin
# the tests of products and of what is made of them, and the CPUs, by what their BLAS and torch would take, to run them as
PRODUCTS := $(patsubst %,tests/test_%.py,cosine_topk class_graph max_correlation max_correlation_index \
              max_correlation_ties pair_sums correspondences class_table graph_lifetime)
HASWELL  := OPENBLAS_CORETYPE=Haswell MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=avx2
NEHALEM  := OPENBLAS_CORETYPE=Nehalem MKL_CBWR=SSE4_2 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
PORTABLE  = $(BIN)/$(PYTEST) -q $(PRODUCTS) $(ARGS)
# NumPy's BLAS, which the interpreter multiplies with, matters to orders and ties; torch's matters to all that is not triton
ORDERS   := -k 'not triton or cosine_topk or class_graph or lowest or tie'
TIES     := -k 'not triton or lowest or tie'
# the tests of kernels, but those that would compile many more of them to no other end
COMPILED := tests/compiled $(filter-out tests/test_corr% tests/test_class_table.py,$(PRODUCTS)) tests/test_norms.py \
              -k '(triton or compiled) and not (repeats_are or layout or they_lie or any_table or all_channels)'
# the tests of measuring need no second version, and compiling for one architecture shows that Triton takes the kernels
OLDEST_TESTS := $(filter-out $(patsubst %,tests/test_%.py,bench perf_gate performance scale),$(wildcard tests/test_*.py))
SOURCES := $(wildcard qaconv_triton kernels tests bench examples) docs/site.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-compiled test-portable test-oldest docs package lint format benchmark clean
.PHONY: gpu-check gpu-test gpu-memcheck gpu-racecheck gpu-benchmark gpu-measure gpu-train gpu-profile

help: ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "ARGS='...'      options for the demo's script (make demo ARGS=--help) or for pytest (make test ARGS='-k topk')"
	@echo "WORKERS=2       test processes (on a GPU half as many as cores, 2 to 12), THREADS=1 threads in each"
	@echo "PIP_ARGS='...'  options for pip instead of --quiet: an --index-url, or nothing to watch the installation"
	@echo "PYTHON=python3  the interpreter that creates .venv, and that of gpu-check"

demo: $(VENV)/demo.stamp ## train and evaluate a matcher on glyph images, with graph sampling
	$(BIN)/python examples/glyphs.py $(ARGS)

test: lint ## lint, then the tests but those marked slow (ARGS='-m slow': these)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/$(PYTEST) $(ARGS)

test-compiled: $(VENV)/dev.stamp ## the tests of kernels, as compiled for an A100 and emulated on the CPU; needs g++
	OMP_NUM_THREADS=$(THREADS) QACONV_TESTS_KERNELS=emulated $(BIN)/$(PYTEST) --dist load $(COMPILED) $(ARGS)

test-portable: $(VENV)/dev.stamp ## the tests of products as on other CPUs, with two threads, and with sums in mixed orders
	OMP_NUM_THREADS=1 $(HASWELL) $(PORTABLE) $(ORDERS)
	OMP_NUM_THREADS=1 $(NEHALEM) $(PORTABLE) $(TIES)
	OMP_NUM_THREADS=2 $(PORTABLE) -k 'not triton'
	OMP_NUM_THREADS=1 $(PORTABLE) $(ORDERS) --mixed-sums

test-oldest: .venv-oldest/test.stamp ## the tests of the library with the oldest torch, Triton and others that it supports
	OMP_NUM_THREADS=$(THREADS) $(OLDEST)/$(PYTEST) $(OLDEST_TESTS) $(ARGS)
	$(OLDEST)/$(PYTEST) -m slow -k sm_90 tests/static

docs: $(VENV)/dev.stamp ## the documentation site, in build/site; a broken link or docstring is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

package: $(VENV)/dev.stamp ## build the source archive, from it the wheel, and use that where nothing else is installed
	rm -rf build/package
	$(BIN)/python -m build --outdir build/package > /dev/null
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/python -m pip install $(PIP_ARGS) --constraint constraints.txt build/package/*.whl
	cd build/package && venv/bin/python ../../tests/installed.py

lint: $(VENV)/dev.stamp ## ruff and mypy --strict, changing nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## let ruff fix and format the sources
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

benchmark: $(VENV)/dev.stamp ## the perf checks, each beside a baseline and checked first; leave the machine idle
	$(BIN)/python -m pytest --benchmark $(ARGS)

# In an environment that has torch for the GPU and the packages of .[test], with nothing to download. Each step has a time
# limit and a log; the others go on if one fails. The card's settings are left alone.
GPU_LOGS ?= out/gpu-check
logged = mkdir -p $(GPU_LOGS); timeout $(1) $(2) > $(GPU_LOGS)/$@.txt 2>&1; code=$$?; tail -n 20 $(GPU_LOGS)/$@.txt; exit $$code

gpu-check: ## test, sanitize, measure, train and profile on this machine's GPU, in ten minutes; logs in out/gpu-check
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA GPU here"'
	@$(PYTHON) -c 'import qaconv_triton' 2>/dev/null || $(PYTHON) -m pip install --no-deps --no-build-isolation -e .
	@timeout 600 $(MAKE) --keep-going --no-print-directory gpu-test gpu-memcheck gpu-racecheck gpu-benchmark gpu-measure gpu-train \
	    gpu-profile

# half of the cores, 2 to 12; of the slow tests those of test_gpu.py, which -k selects as it does markers, by name
gpu-test: WORKERS = $(shell half=$$(($$(nproc) / 2)); echo $$((half < 2 ? 2 : half > 12 ? 12 : half)))
gpu-test: export OMP_NUM_THREADS = $(THREADS)
gpu-test:
	@$(call logged,240,$(PYTHON) -m pytest -n $(WORKERS) -k 'test_gpu or not slow' --durations 20 --ignore=tests/static \
	    --ignore=tests/compiled --ignore=tests/test_bench.py --ignore=tests/test_perf_gate.py)

# Without torch's cache each tensor has bounds of its own. Of Triton 3.6's code racecheck reports that threads write the same
# place of shared memory in _norms_kernel and _prepare_kernel: all of them the same value, where a layout is converted.
gpu-memcheck gpu-racecheck: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
gpu-memcheck gpu-racecheck: gpu-%:
	@$(call logged,120,compute-sanitizer --tool $* --error-exitcode 42 --target-processes application-only \
	    $(PYTHON) -m pytest -q -m smoke tests/test_gpu.py)

gpu-benchmark:
	@$(call logged,120,$(PYTHON) -m pytest --benchmark --perf-gate-save)

gpu-measure:
	@$(call logged,180,$(PYTHON) -m bench --device cuda)
	@$(PYTHON) -m bench report

gpu-train:
	@$(call logged,90,$(PYTHON) examples/glyphs.py --device cuda)

# at the default tiles: tuning would launch others
gpu-profile: export QACONV_TRITON_TUNE := 0
gpu-profile:
	@$(call logged,90,ncu --set basic --section WarpStateStats --clock-control none --target-processes application-only \
	    --kernel-name 'regex:_forward_kernel|_append_kernel|_gradient_kernel' --launch-skip 4 --launch-count 4 \
	    $(PYTHON) -m bench classes --cases 256x10572x256x512x7x7x4 --parts step --providers sparse_grad --repeats 2 --no-save)

clean: ## remove .venv, .venv-oldest, caches and build output
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/venv.stamp:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(VENV)/venv.stamp
	@echo "Installing the demo's packages into $(VENV) (first call only)"
	$(INSTALL) -e '.[demo]'
	@touch $@

# dev contains demo
$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/venv.stamp
	@echo "Installing the development packages into $(VENV) (first call only)"
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/demo.stamp $@

.venv-oldest/test.stamp: pyproject.toml constraints-oldest.txt
	@echo "Installing the oldest supported packages into .venv-oldest (first call only)"
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/$(PIP) -c constraints-oldest.txt -e '.[test]'
	@touch $@
