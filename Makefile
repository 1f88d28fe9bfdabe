# The project's commands; `make help` lists them. Needs Python 3.11, pip and make; everything else goes into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN := .venv/bin
# Where pip finds torch's CPU build; empty takes torch from pip's own index (the CUDA build).
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu

.PHONY: setup proto

setup: .venv/.setup proto ## make .venv and install everything into it (quick when nothing changed)

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"make: Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}. Say: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.setup: .venv/.python pyproject.toml constraints.txt hatch_build.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]' -c constraints.txt $$($(BIN)/python tools/torch_index.py '$(TORCH_INDEX_URL)')
	@touch $@

proto: .venv/.proto ## compile proto/ into headrace/v1/ (the build does it too)

.venv/.proto: .venv/.setup hatch_build.py $(wildcard proto/headrace/v1/*.proto)
	@$(BIN)/python hatch_build.py
	@touch $@
