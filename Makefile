# make demo | test | test-exact | test-triton | test-oldest | check | bench | bench-cells | bench-folding | asan: each sets up .venv by itself and is quick the second time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-exact test-triton test-oldest compatibility bench bench-cells bench-sweep bench-calibration bench-deployed bench-folding asan lint types check clean

# The oldest versions the package declares, and torchtext, in an environment of 5 GB that outlives the clone.
OLDEST_PYTHON ?= python3.11
OLDEST_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lightning-bln
OLDEST := $(OLDEST_CACHE)/oldest-$(shell sha256sum constraints-oldest.txt | cut -c1-12)

SOURCES := pyproject.toml setup.py constraints.txt $(wildcard lightning_bln/kernels/csrc/*)

# Torch first and by its pin, so that nothing moves it; the demo needs less than the tests do.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[$(1)]"
endef

$(VENV)/.demo: $(SOURCES)
	$(call install,demo)
	touch $@

$(VENV)/.installed: $(SOURCES)
	$(call install,dev)
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/bln demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(TESTS)

# Tables of modules of every kind against plain validations, and every rule of a tensor with a part for each mode.
test-exact: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m exact tests/callbacks tests/cli tests/convert tests/export tests/exporting tests/folding tests/kernels tests/recurrence tests/tuning tests/test_as_torch.py tests/test_per_mode_rules.py

# Beside the others alone, for only torch for CUDA asks for it; it needs nothing, and is to move nothing.
$(VENV)/.triton: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps -c constraints.txt triton==3.7.1
	touch $@

# Kernels for GPUs by Triton's interpreter on the CPU, and compiled for GPUs that are not there.
test-triton: $(VENV)/.triton
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/on_triton

# Made beside its place and moved there whole, so that one cut short is never used.
$(OLDEST)/.installed:
	mkdir -p $(OLDEST_CACHE)
	rm -rf $(OLDEST).part
	$(OLDEST_PYTHON) -m venv $(OLDEST).part
	$(OLDEST).part/bin/python -m pip install -q -r constraints-oldest.txt
	touch $(OLDEST).part/.installed
	rm -rf $(OLDEST)
	mv $(OLDEST).part $(OLDEST)

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m pytest -n 2 -m exact tests/test_as_torch.py
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m pytest -n 2 $(TESTS)

# Writes docs/compatibility.md.
compatibility: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.as_torch

bench: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt torchrecurrent
	$(BIN)/python -m benchmarks $(BENCH)

bench-cells: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt torchrecurrent
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_cells $(BENCH)

# The tests of layers, kernels and sweeps with every access to memory and all arithmetic of the kernels checked.
ASAN_TESTS ?= tests/kernels tests/recurrence tests/cells tests/sweep tests/test_norm.py tests/test_conv.py \
	tests/test_recurrent.py tests/test_golden.py tests/test_population.py tests/test_torch_samples.py tests/test_as_torch.py
asan: $(VENV)/.installed
	BLN_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/asan --build-temp build/asan-temp
	OMP_NUM_THREADS=1 BLN_KERNELS=build/asan/lightning_bln/kernels ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	$(BIN)/pytest -q -n 2 $(ASAN_TESTS) \
	-k "not compile and not inductor and not exports and not torchs_rules and not subprocess"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

bench-sweep: $(VENV)/.installed
	$(BIN)/python -m benchmarks.bench_sweep $(BENCH)

bench-calibration: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.calibration $(BENCH)

bench-deployed: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.deployed $(BENCH)

bench-folding: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.folding $(BENCH)

check: lint types

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
