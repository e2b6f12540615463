# make demo    sets up .venv and trains on arithmetic with OREAL, with a report at the end
# make test    sets up .venv and runs what CI runs
# make help    lists the other targets

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The environment of `make test-megatron-0.19`, which needs Python 3.12.
PYTHON_NEWEST ?= python3.12
NEWEST := .venv-newest
# The environment of `make setup` has a CPU torch.
GPU_PYTHON ?= python
export OMP_NUM_THREADS ?= 2

.PHONY: help setup lock sglang-deps slurm-deps hosts-deps demo tutorial test test-fast test-slow lint docs test-gpu test-gpu-one gpu-wheels \
	test-megatron-0.19 bench bench-host bench-rollout bench-async bench-trl \
	bench-memory bench-reshard bench-verifier bench-conversion bench-objectives bench-token-weights bench-fp8 clean

help: ## print this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(READY) ## create the environment in .venv

$(READY): setup.py requirements/cpu.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

$(VENV)/sglang/.ready: requirements/sglang_cpu.txt | setup
	rm -rf $(VENV)/sglang
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/sglang --requirement requirements/sglang_cpu.txt
	@touch $@

sglang-deps: $(VENV)/sglang/.ready ## install SGLang for CPU into a directory that only server processes see

# Each lock file begins with its command. Without --upgrade uv keeps what the file has and setup.py still allows.
LOCK = $(BIN)/uv --config-file requirements/uv.toml pip compile --quiet --no-emit-index-url --no-annotate $(UPGRADE)

lock: setup ## write requirements/*.lock again after a change of setup.py; with UPGRADE=--upgrade, to the newest versions
	$(LOCK) --python-version 3.11 --python-platform x86_64-manylinux_2_28 --extra dev --extra gguf \
	  setup.py requirements/cpu.in -o requirements/cpu.lock
	$(LOCK) --python-version 3.12 --python-platform x86_64-manylinux_2_34 --extra sglang --extra te \
	  setup.py -o requirements/cuda13.lock
	$(LOCK) --python-version 3.12 --python-platform x86_64-manylinux_2_34 \
	  requirements/servers.in -o requirements/servers.lock

demo: setup ## train on arithmetic: warm start, 50 steps, three evaluations, report.html (4 minutes)
	$(BIN)/oreal-train experiment=arithmetic

tutorial: setup ## run the commands of docs/tutorial.md in runs/tutorial: raw data, fine-tuning, OREAL, scores (14 minutes on busy cores)
	$(BIN)/python tools/run_page.py docs/tutorial.md runs/tutorial

slurm-deps: ## install shellcheck and the SLURM daemons that tests/slurm needs (Debian, as root)
	apt-get update --quiet
	DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends slurmctld slurmd slurm-client munge shellcheck

hosts-deps: ## install iproute2, with which tests/hosts makes several hosts of this machine (Debian, as root)
	apt-get update --quiet
	DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends iproute2

lint: setup docs ## run ruff, import contracts, types and documentation links; hadolint and shellcheck if they are installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	! test -x $(BIN)/hadolint || $(BIN)/hadolint docker/Dockerfile*
	! command -v shellcheck >/dev/null || shellcheck .ci/run docker/*.sh slurm/*.sbatch slurm/test_cluster/*.sh

docs: setup ## build the documentation into site/; a broken link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test: lint sglang-deps test-fast ## run what CI runs: lint and all tests that are not slow and need no GPU
	$(BIN)/pytest -m 'not fast and not slow and not gpu'

test-fast: setup ## run the unit tests, two at a time (3 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit -m 'fast and not slow' --numprocesses 2 --dist worksteal

test-slow: setup ## run the long tests
	$(BIN)/pytest -m 'slow and not gpu'

# The versions of cuda13.lock, with a torch that is built for CUDA, on CPU.
$(NEWEST)/.ready: setup.py requirements/cuda13.lock requirements/sglang_cpu.txt
	$(PYTHON_NEWEST) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --constraint requirements/cuda13.lock --editable '.[dev,gguf]'
	rm -rf $(NEWEST)/sglang
	sed --quiet 's/==.*//p' requirements/sglang_cpu.txt | xargs $(NEWEST)/bin/pip install --quiet --no-deps \
	  --target $(NEWEST)/sglang --constraint requirements/cuda13.lock
	@touch $@

test-megatron-0.19: $(NEWEST)/.ready ## run unit tests, parity, servers, conversion and kills on Python 3.12, megatron-core 0.19 and torch 2.14 for CUDA
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest -m 'not slow and not gpu' tests/unit tests/parity tests/distributed \
	  tests/end_to_end/test_kills.py tests/servers/test_publication.py tests/servers/test_servers.py

test-gpu: ## run the tests that need GPUs, in an environment with a CUDA torch (GPU_PYTHON)
	$(GPU_PYTHON) -m pytest tests/gpu -m gpu

# What a GPU machine without a network lacks beside torch, transformers and triton: 7 MiB.
GPU_WHEELS := gpu-wheels

gpu-wheels: ## gather the wheels of `make test-gpu-one` into gpu-wheels/, with a Python 3.12 (PYTHON_NEWEST)
	$(PYTHON_NEWEST) -m pip wheel --quiet --no-deps --wheel-dir $(GPU_WHEELS) --constraint requirements/cuda13.lock \
	  --requirement requirements/one_gpu.txt

test-gpu-one: ## run what one GPU can show in eight minutes, without a network (GPU_PYTHON; wheels of `make gpu-wheels`)
	! test -d $(GPU_WHEELS) || $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --find-links $(GPU_WHEELS) \
	  --requirement requirements/one_gpu.txt
	$(GPU_PYTHON) -m tests.gpu.one_gpu

bench: setup ## compare generation, a training step, packing, log-probabilities and checkpoints with their peers
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.training_step
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 -m benchmarks.training_step --tensor 2 --pipeline 2
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.logprobs
	$(BIN)/python -m benchmarks.checkpoint_stall

bench-rollout: sglang-deps ## compare the rollout client with a bare load generator
	$(BIN)/python -m benchmarks.rollout_client

bench-host: setup ## measure a step's work on the host, seconds and memory, for 1,024 responses of 8,000 tokens on two ranks
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m benchmarks.host_step

bench-async: sglang-deps ## compare schedules of generation and training with an SGLang server, a core each
	$(BIN)/python -m benchmarks.async_schedules

# TRL's newest version with the versions of cpu.lock, in an environment of its own.
$(VENV)/trl/.ready: requirements/cpu.lock | setup
	$(PYTHON) -m venv --clear $(VENV)/trl
	$(VENV)/trl/bin/pip install --quiet --constraint requirements/cpu.lock trl torch
	@touch $@

bench-trl: $(VENV)/trl/.ready ## compare a step of GRPO with TRL's GRPOTrainer on one core, in response tokens a second
	$(BIN)/python -m benchmarks.trl

bench-reshard: sglang-deps ## publish a 0.5B model to a server by every transport; simulate 32B
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.resharding

bench-memory: setup ## compare the planner's memory with measured peaks in eleven layouts
	$(BIN)/python -m benchmarks.memory

bench-verifier: setup ## compare the verifier with math-verify on the labelled cases: accuracy and throughput
	$(BIN)/python -m benchmarks.verifier

bench-conversion: setup ## compare converting 3 GB both ways with copying the same files: speed and memory
	$(BIN)/python -m benchmarks.conversion

bench-objectives: setup ## train all objectives from the same start, three seeds (half an hour)
	$(BIN)/python -m benchmarks.objectives

bench-token-weights: setup ## compare token weights on two tasks, five seeds each: ones, placebo, reward model, oracle (hours)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.token_weights
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.token_weights --task arithmetic_order

bench-fp8: setup ## measure emulated FP8's effect on log-probabilities and gradients (a quarter of an hour)
	$(BIN)/python -m benchmarks.fp8

clean: ## remove the environments, the site and caches, not the runs
	rm -rf $(VENV) $(NEWEST) site .mypy_cache .ruff_cache .pytest_cache *.egg-info
