# Needs Python 3.11 or newer and make; everything else goes into $(VENV). `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
# The first one that really runs (a version manager's shim may exist without its Python) and is new enough.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq install -c constraints.txt
BIN := $(VENV)/bin

# Research data, where there is some; tests that need it are skipped elsewhere.
SHARED ?= ../shared
ifneq ($(wildcard $(SHARED)/.),)
export CPT_SHARED := $(abspath $(SHARED))
endif

WORKERS ?= 2
ARGS ?=
OUT ?= runs/tiny_base

export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

# By file: fixtures of a module are built once. (loadgroup has no effect under pytest 9.2 with xdist 3.8.)
PYTEST := $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile

.PHONY: help env dev hooks quickstart test test-all check docs bench classic retention retention-real world fmt clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.core ## make the environment: what running needs
dev: $(VENV)/.dev ## ... and what developing needs

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found (tried python3.11, python3.12, python3.13, python3);" \
		"install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "PYTHON=$(PYTHON) does not run or" \
		"is older than 3.11; name another: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) has no venv;" \
		"on Debian and Ubuntu: apt-get install python3-venv (python3.11-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV): a few minutes the first time"
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e .[dev,docs,deepspeed,quant,lm-eval]
	@touch $@

hooks: $(VENV)/.dev ## run the fast checks before every commit
	$(BIN)/pre-commit install

# The tiny model's matrices are too small to share: on a busy machine two spinning threads are fifty times slower.
quickstart world: export OMP_NUM_THREADS ?= 1

quickstart: $(VENV)/.core ## two streams on the tiny world, with and without methods, side by side
	$(BIN)/python recipes/quickstart.py

test: $(VENV)/.dev ## all tests but the slow ones (ARGS="-k word" picks)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.dev ## all tests
	$(PYTEST) $(ARGS)

check: $(VENV)/.dev ## format, lint, types, import directions, the documentation's links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs: $(VENV)/.dev ## the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open build/site/index.html"

bench: $(VENV)/.dev ## step time, memory and start-up time against bare TRL (minutes)
	$(BIN)/python -m tests.bench $(ARGS)

classic: $(VENV)/.dev ## the table of docs/evidence/classic_stream.md (half an hour; needs the research data)
	$(BIN)/python -m tests.evidence.classic_stream --data $(SHARED)/data --model $(SHARED)/models/stories260K $(ARGS)

retention: $(VENV)/.dev ## the table of docs/evidence/retention.md (an hour and a half)
	$(BIN)/python -m tests.evidence.retention $(ARGS)

retention-real: $(VENV)/.dev ## the table of docs/evidence/retention_real.md (an hour; needs the research data)
	$(BIN)/python -m tests.evidence.retention_real --data $(SHARED)/data --model $(SHARED)/models/stories260K $(ARGS)

world: $(VENV)/.core ## train the tiny model again (OUT=cpt/assets/tiny_world replaces the shipped one)
	$(BIN)/python recipes/tiny_base.py --out $(OUT) $(ARGS)

fmt: $(VENV)/.dev ## format, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find cpt eval_harness recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
