# The project's commands; `make help` lists them. Needs Python 3.11, pip and make; everything else goes into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN := .venv/bin
MODEL ?= smollm2-135m-instruct
# Where pip finds torch's CPU build; empty takes torch from pip's own index (on Linux the CUDA build).
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
# Where bench-peers keeps the other servers (some 8 GB), how often it measures each workload, and what share of its requests it sends.
PEERS_ROOT ?= ~/.cache/headrace/peers
ROUNDS ?= 2
SCALE ?= 1

.PHONY: help setup up test test-times test-gpu lint typecheck proto check fmt kernels-report bench bench-quality bench-startup bench-peers lm-eval compose-test clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.setup .venv/.proto .venv/.native ## make .venv and install everything into it; quick when nothing changed
	@:

up: setup ## install, fetch the default model if it is missing, and serve it on 127.0.0.1:8000 (Ctrl-C stops)
	@$(BIN)/headrace models show $(MODEL) >/dev/null 2>&1 || $(BIN)/headrace models pull $(MODEL)
	@exec $(BIN)/python tools/foreground.py $(BIN)/headrace serve

test: setup ## every test but those of compose, Node and lm-eval, suite by suite, each within its own time limit
	@$(BIN)/python tools/run_suites.py

test-times: setup ## the times that the design promises, held to on a machine that does nothing else
	@TEST_QUIET_MACHINE=1 $(BIN)/pytest -s tests/supervision tests/e2e/test_kills.py tests/e2e/test_prefix_cache.py tests/e2e/test_run_ahead.py tests/gateway

test-gpu: setup ## what only a GPU can show: parity, graphs, kernels compiled, and beside the roofline (build/gpu_report.json)
	@TEST_KERNEL_DEVICE=cuda $(BIN)/python tools/run_suites.py gpu kernels

lint: setup ## ruff (rules and format), import contracts, spelling, protos (lint, breaking changes)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || { echo "not formatted: run make fmt" >&2; exit 1; }
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/typos
	tools/check_protos.sh

typecheck: setup ## mypy --strict
	$(BIN)/mypy

proto: setup ## compile proto/ into headrace/v1/ (every build does it too)
	@$(BIN)/python hatch_build.py

check: ## everything that CI runs
	.ci/run

fmt: setup ## format and sort imports in place
	$(BIN)/ruff check --quiet --select I --fix .
	$(BIN)/ruff format .

kernels-report: setup ## compile every kernel for every GPU architecture and write kernels/RESOURCES.md
	$(BIN)/python -m kernels.aot report

bench: setup ## measure the server at 127.0.0.1:8000: TTFT, ITL, throughput (start it first: make up)
	@exec $(BIN)/headrace bench serve --model $(MODEL) --concurrency 1,4,16 --num-requests 16 --ignore-eos --worker-metrics http://127.0.0.1:9103/metrics

bench-quality: setup ## how near each way of computing comes to float32: KL, perplexity, greedy agreement on 20,480 tokens (minutes)
	@exec $(BIN)/python -m bench.quality --model $(MODEL)

bench-startup: setup ## from headrace serve to the first token, and what takes the time
	@exec $(BIN)/python -m bench.startup --model $(MODEL)

bench-peers: setup ## measure ours beside vLLM, llama.cpp, OpenVINO and transformers, set up first (8 GB; ROUNDS=2 SCALE=1)
	@$(BIN)/python -m bench.peers setup --root '$(PEERS_ROOT)' --torch-index '$(TORCH_INDEX_URL)'
	@exec $(BIN)/python -m bench.peers run --root '$(PEERS_ROOT)' --rounds $(ROUNDS) --scale $(SCALE)

structured: setup ## 500 schemas through a whole system, every output checked by jsonschema (several minutes)
	@STRUCTURED_SCHEMAS=500 $(BIN)/python -m pytest -s tests/e2e/test_structured.py -k every_output
node-test: setup ## build and test the Node client, its example, and OpenAI's Node client against a real server (needs Node.js 20 with npm)
	cd clients/node && npm ci --no-audit --no-fund --loglevel=error && npm test
	cd tests/node && npm ci --no-audit --no-fund --loglevel=error
	$(BIN)/pytest -m node tests/node

lm-eval: setup build/lm-eval/.setup ## lm-eval scores our completions as it scores transformers; set up first (some 50 packages)
	LM_EVAL_PYTHON=$(CURDIR)/build/lm-eval/bin/python $(BIN)/pytest -s -m lm_eval tests/lm_eval

# It sees .venv's packages, torch and transformers among them, and adds its own, which .venv shall not have.
build/lm-eval/.setup: .venv/.setup tests/lm_eval/requirements.txt
	$(BIN)/python -m venv --clear build/lm-eval
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$$(build/lm-eval/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/headrace-venv.pth"
	build/lm-eval/bin/python -m pip install --quiet --disable-pip-version-check -r tests/lm_eval/requirements.txt -c constraints.txt
	@touch $@

compose-test: setup ## bring compose.yaml up for real, scaled, and ask it (needs Docker)
	@tools/docker_engine.sh
	$(BIN)/pytest -m compose tests/compose

clean: ## remove .venv, builds, caches and generated code; keeps models and what npm installed
	rm -rf .venv build dist headrace/v1 clients/python/headrace_client/v1 kernels/cpu/*.so kernels/cpu/*.so.stamp .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage htmlcov
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(f"make: Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}. Say: make PYTHON=python3.11 setup" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.setup: .venv/.python pyproject.toml constraints.txt hatch_build.py clients/python/pyproject.toml clients/python/hatch_build.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]' -e clients/python -c constraints.txt $$($(BIN)/python tools/torch_index.py '$(TORCH_INDEX_URL)')
	@touch $@

.venv/.native: .venv/.setup kernels/cpu/build.py $(wildcard kernels/cpu/src/*)
	@$(BIN)/python kernels/cpu/build.py --where-possible
	@touch $@

.venv/.proto: .venv/.setup $(wildcard proto/headrace/v1/*.proto)
	@$(BIN)/python hatch_build.py
	@$(BIN)/python clients/python/hatch_build.py
	@touch $@
