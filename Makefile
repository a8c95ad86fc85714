# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: demo test lint bench gpu-check kernel-table clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)  # first, so that nothing else chooses a torch
	$(BIN)/pip install --quiet --editable '.[demo,test]'
	touch $@

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest

demo: $(VENV)/ready
	$(BIN)/python -m tests.harness.demo

bench: $(VENV)/ready
	$(BIN)/python -m tests.harness.bench

bench-%: $(VENV)/ready  # bench-context bench-convert bench-encode bench-fp8 bench-long bench-loss bench-memory bench-pack bench-plan
	$(BIN)/python -m tests.harness.bench_$*

gpu-check: $(VENV)/ready
	$(BIN)/python -m tests.harness.gpu_check

kernel-table: $(VENV)/ready
	$(BIN)/python -m tests.harness.compile_kernels

clean:
	rm -rf $(VENV) .demo .bench
