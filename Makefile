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
# the tests of measuring need no second version, and compiling for one architecture shows that Triton takes the kernels
OLDEST_TESTS := $(filter-out $(patsubst %,tests/test_%.py,bench bench_scores gpu_check perf_gate performance report), \
                  $(wildcard tests/test_*.py))
SOURCES := $(wildcard qaconv_triton kernels tests bench examples)

.DEFAULT_GOAL := help
.PHONY: help demo test test-portable test-oldest lint format benchmark gpu-check clean

help: ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "ARGS='...'      options for the demo's script (make demo ARGS=--help) or for pytest (make test ARGS='-k topk')"
	@echo "                or for the check (make gpu-check ARGS='--minutes 30'; --dry-run works without a GPU)"
	@echo "WORKERS=2       test processes, THREADS=1 threads in each"
	@echo "PIP_ARGS='...'  options for pip instead of --quiet: an --index-url, or nothing to watch the installation"
	@echo "PYTHON=python3  the interpreter that creates .venv; gpu-check runs in its environment"

demo: $(VENV)/demo.stamp ## train and evaluate a matcher on glyph images, with graph sampling
	$(BIN)/python examples/glyphs.py $(ARGS)

test: lint ## lint, then the tests but those marked slow (ARGS='-m slow': these)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/$(PYTEST) $(ARGS)

test-portable: $(VENV)/dev.stamp ## the tests of products as on other CPUs, with two threads, and with sums in mixed orders
	OMP_NUM_THREADS=1 $(HASWELL) $(PORTABLE) $(ORDERS)
	OMP_NUM_THREADS=1 $(NEHALEM) $(PORTABLE) $(TIES)
	OMP_NUM_THREADS=2 $(PORTABLE) -k 'not triton'
	OMP_NUM_THREADS=1 $(PORTABLE) $(ORDERS) --mixed-sums

test-oldest: .venv-oldest/test.stamp ## the tests of the library with the oldest torch, Triton and others that it supports
	OMP_NUM_THREADS=$(THREADS) $(OLDEST)/$(PYTEST) $(OLDEST_TESTS) $(ARGS)
	$(OLDEST)/$(PYTEST) -m slow -k sm_90 tests/test_static.py

lint: $(VENV)/dev.stamp ## ruff and mypy --strict, changing nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## let ruff fix and format the sources
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

benchmark: $(VENV)/dev.stamp ## the perf checks, each beside a baseline and checked first; leave the machine idle
	$(BIN)/python -m pytest --benchmark $(ARGS)

# in an environment that has a torch for the GPU, with nothing to download
gpu-check: ## test and measure on this machine's GPU, offline, in ten minutes; results in bench/results
	@$(PYTHON) -c 'import qaconv_triton' 2>/dev/null || $(PYTHON) -m pip install --no-deps --no-build-isolation -e .
	$(PYTHON) -m bench gpu-check $(ARGS)

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
