# `make demo` and `make test` do all the set-up: a Debian or Ubuntu machine with make and python3 (>= 3.10) is enough.
#
# torch is installed first and alone: pip then takes a CPU build wherever the package index offers one for exactly this
# version. Where none is offered, PyPI's own build comes with gigabytes of CUDA. To choose another one, set TORCH to what
# `pip install` should get, for every make call (or export it):
#
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#
# PYTHON chooses the interpreter, DEMO_FLAGS and PYTEST_FLAGS are passed on, PART_TIMEOUT bounds each part of `make test`.

SHELL := /bin/bash
.DEFAULT_GOAL := help

TORCH ?= torch==2.13.0
PYTHON ?= python3
export PYTHON

VENV := .venv
BIN := $(VENV)/bin
PARTS := lint types unit property integration conformance
# suites that need an engine or a GPU have targets of their own
PYTEST := $(BIN)/python -m pytest -m "not engines and not gpu and not gpu2" $(PYTEST_FLAGS)

# pip and the model libraries keep caches under HOME; where there is none to write to, they go into the checkout
ifneq ($(shell test -n "$$HOME" -a -w "$$HOME" && echo writable),writable)
export XDG_CACHE_HOME := $(CURDIR)/.cache/xdg
endif

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: ## make or reuse .venv
	@.ci/venv.sh $(VENV) "$(TORCH)" .ci/requirements-test.txt

.PHONY: demo
demo: venv ## update the weights of two running engines, on this machine
	$(BIN)/ckpt demo $(DEMO_FLAGS)

.PHONY: test
test: ## every test; prints the minutes of each part
	@.ci/parts.sh venv $(PARTS)

.PHONY: lint
lint: venv ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: venv ## mypy --strict
	$(BIN)/mypy

.PHONY: unit
unit: venv ## tests of single modules
	$(PYTEST) tests/unit $(wildcard plugins/*/tests)

.PHONY: property
property: venv ## tests under Hypothesis
	$(PYTEST) tests/property

.PHONY: integration
integration: venv ## tests with real processes, sockets and shared memory
	$(PYTEST) tests/integration conformance/tests

.PHONY: conformance
conformance: venv ## the conformance suite on the reference engine
	$(BIN)/ckpt-conformance --engine reference --level CORE

.PHONY: format
format: venv ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## remove all that make made: environments, caches, the demo's weights
	rm -rf .venv .venv-* .cache .work build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +
