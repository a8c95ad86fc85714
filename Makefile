# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: demo test lint bench bench-plan bench-pack bench-fp8 bench-long clean gpu-check kernel-table bench-loss bench-context bench-convert

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

bench-plan: $(VENV)/ready
	$(BIN)/python -m tests.harness.bench_plan

gpu-check: $(VENV)/ready
	$(BIN)/python -m tests.harness.gpu_check

kernel-table: $(VENV)/ready
	$(BIN)/python -m tests.harness.compile_kernels

bench-loss: $(VENV)/ready
	$(BIN)/python -m tests.harness.bench_loss

bench-context: $(VENV)/ready
	$(BIN)/python -m tests.harness.bench_context

bench-pack: $(VENV)/ready
	$(BIN)/python -m tests.harness.bench_pack

bench-fp8: $(VENV)/ready
	$(BIN)/python -m tests.harness.bench_fp8

bench-long: $(VENV)/ready
	$(BIN)/python -m tests.harness.bench_long

bench-convert: $(VENV)/ready
	$(BIN)/python -m tests.harness.bench_convert

clean:
	rm -rf $(VENV) .demo .bench
