PYTHON ?= python3
BIN := .venv/bin
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --durations=20

.PHONY: install demo test test-full test-kernels test-gpu lint plugin bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/momkit demo

test: install lint plugin test-kernels
	MOMKIT_PROFILE=ci $(PYTEST) --ignore tests/kernels tests

test-full: install lint plugin test-kernels
	MOMKIT_PROFILE=full $(PYTEST) --timeout 3600 --ignore tests/kernels tests

# triton decides when it is imported whether it interprets kernels, so these have a process of their own
test-kernels: install
	TRITON_INTERPRET=1 MOMKIT_PROFILE=interpret $(PYTEST) tests/kernels

# on a machine with a CUDA GPU; most of the time goes into compiling kernels for many shapes, one process a core
test-gpu: install
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto -m gpu --durations=20 tests/gpu tests/test_decode.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the example plugin is tested as a user gets it: from its wheel, outside the source tree
plugin: install
	rm -rf build/plugin build/wheels
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheels ./plugins_example
	$(BIN)/python -m pip install --quiet --no-deps --target build/plugin build/wheels/*.whl
	MOMKIT_PROFILE=ci PYTHONPATH=build/plugin $(ONE_THREAD) $(BIN)/python -m pytest -n 2 plugins_example/tests

bench: install
	$(BIN)/momkit bench --device cpu --out benchmarks/results

clean:
	rm -rf build dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
