# make demo    sets up .venv and runs OREAL on arithmetic, with a report at the end
# make test    sets up .venv and runs everything that CI runs
# make help    the rest

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 2

.PHONY: help setup sglang-deps slurm-deps demo test test-fast test-slow lint bench bench-rollout bench-memory \
	bench-reshard bench-verifier bench-conversion bench-objectives clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(READY) ## the environment in .venv

$(READY): setup.py requirements/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements/cpu.txt
	$(BIN)/pip install --quiet --editable '.[dev,gguf]'
	@touch $@

$(VENV)/sglang/.ready: requirements/sglang_cpu.txt | setup
	rm -rf $(VENV)/sglang
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/sglang --requirement requirements/sglang_cpu.txt
	@touch $@

sglang-deps: $(VENV)/sglang/.ready ## SGLang for CPU, in a directory that only server processes see

demo: setup ## OREAL on arithmetic: warm start, 50 steps, three evaluations, report.html
	$(BIN)/oreal-train experiment=arithmetic

slurm-deps: ## the SLURM daemons and shellcheck that tests/slurm needs (Debian, as root)
	apt-get update --quiet
	DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends slurmctld slurmd slurm-client munge shellcheck

lint: setup ## ruff, import contracts, types; shellcheck where it is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	! command -v shellcheck >/dev/null || shellcheck .ci/run slurm/*.sbatch slurm/*.sh slurm/test_cluster/*.sh

test: lint sglang-deps ## all that CI runs
	$(BIN)/pytest -m 'not slow and not gpu'

test-fast: setup ## unit tests only
	$(BIN)/pytest tests/unit -m 'not slow and not gpu'

test-slow: setup ## the long proofs
	$(BIN)/pytest -m 'slow and not gpu'

bench: setup ## generation and a training step against their peers, the stall of a checkpoint
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.training_step
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 -m benchmarks.training_step --tensor 2 --pipeline 2
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.logprobs
	$(BIN)/python -m benchmarks.checkpoint_stall

bench-rollout: sglang-deps ## our rollout client against a bare load generator
	$(BIN)/python -m benchmarks.rollout_client

bench-reshard: sglang-deps ## publishing a 0.5B model to a server: direct against broadcast, IPC and disk; 32B simulated
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.resharding

bench-memory: setup ## the planner's memory against measured peaks in eleven layouts
	$(BIN)/python -m benchmarks.memory

bench-verifier: setup ## the verifier beside math-verify on the labelled cases, and its throughput
	$(BIN)/python -m benchmarks.verifier

bench-conversion: setup ## converting 3 GB both ways against copying the same files: speed and memory
	$(BIN)/python -m benchmarks.conversion

bench-objectives: setup ## all objectives from one start, three seeds (half an hour)
	$(BIN)/python -m benchmarks.objectives

clean: ## the environment and caches, not the runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
