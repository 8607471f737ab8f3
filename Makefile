# `make demo` and `make test` do all the set-up: a Debian or Ubuntu machine with make and python3 (>= 3.10) is enough.
#
# torch is installed first and alone: pip then takes a CPU build wherever the package index offers one for exactly this
# version. Where none is offered, PyPI's own build comes with gigabytes of CUDA. To choose another one, set TORCH to what
# `pip install` should get, for every make call (or export it):
#
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#
# `make conformance conformance-trtllm conformance-vllm conformance-sglang TABLE=--write-table` writes the capability tables
# in READMEs anew; else a table that differs from the run fails it.
#
# PYTHON chooses the interpreter, DEMO_FLAGS and PYTEST_FLAGS are passed on, WORKERS is how many tests run at once where no
# engine is started, PART_TIMEOUT bounds each part of `make test`.
#
# Real engines have an environment each (.venv-vllm, .venv-sglang: CPU builds, some 3.5 GB each), since they pin what they need.

SHELL := /bin/bash
.DEFAULT_GOAL := help

TORCH ?= torch==2.13.0
PYTHON ?= python3
export PYTHON

# tests start hundreds of processes: each would compile all modules again
unexport PYTHONDONTWRITEBYTECODE

# more than there may be cores: most of a test is waiting for processes to start, and for deadlines
WORKERS ?= 3
TABLE ?= --check-table
VENV := .venv
BIN := $(VENV)/bin
PARTS := lint types unit property integration conformance conformance-trtllm faults \
	venv-vllm engines-vllm venv-sglang engines-sglang conformance-engines engines-both
# suites that need an engine or a GPU have targets of their own
PYTEST := $(BIN)/python -m pytest --durations=15 -n $(WORKERS) -m "not engines and not gpu and not gpu2" $(PYTEST_FLAGS)
ENGINE_PYTEST := python -m pytest --durations=15 -m engines $(PYTEST_FLAGS) tests/engines

# pip and the model libraries keep caches under HOME; where there is none to write to, they go into the checkout
ifneq ($(shell test -n "$$HOME" -a -w "$$HOME" && echo writable),writable)
export XDG_CACHE_HOME := $(CURDIR)/.cache/xdg
endif

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: ## make or reuse .venv
	@.ci/venv.sh $(VENV) "$(TORCH)" .ci/requirements-test.txt

.PHONY: venv-vllm
venv-vllm: ## make or reuse .venv-vllm: vLLM for CPUs, and this project
	@.ci/venv.sh $(VENV)-vllm "$(TORCH)" .ci/engines/vllm.txt "python .ci/engines/vllm_finish.py" \
		.ci/engines/project.txt "--no-deps -e ."

.PHONY: venv-sglang
venv-sglang: ## make or reuse .venv-sglang: SGLang on a CPU with stand-ins for its GPU kernels, and this project
	@.ci/venv.sh $(VENV)-sglang "$(TORCH)" "--no-deps sglang==0.5.23 torchvision==0.28.0" .ci/engines/sglang.txt \
		"python .ci/engines/sglang_finish.py" .ci/engines/project.txt "--no-deps -e ."

.PHONY: demo
demo: venv ## update the weights of two running engines, on this machine
	$(BIN)/ckpt demo $(DEMO_FLAGS)

.PHONY: test
test: ## every test; prints the minutes of each part
	@PREPARE="venv-vllm venv-sglang" .ci/parts.sh venv $(PARTS)

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
integration: venv ## tests with real processes, sockets, shared memory and network namespaces
	@.ci/network_tools.sh
	$(PYTEST) tests/integration conformance/tests

.PHONY: conformance
conformance: venv ## the conformance suite on the reference engine
	$(BIN)/ckpt-conformance --engine reference $(TABLE) conformance/README.md

.PHONY: conformance-trtllm
conformance-trtllm: venv ## the conformance suite on the stand-in for TensorRT-LLM
	$(BIN)/ckpt-conformance --engine trtllm $(TABLE) plugins/trtllm/README.md

.PHONY: faults
faults: venv ## every fault at every step of an update: prints the table, writes docs/fault-matrix.md
	$(BIN)/python tests/faults/matrix.py

.PHONY: smollm2
smollm2: venv
	@$(BIN)/python -c 'from pathlib import Path; from ckpt_conformance.models import smollm2; smollm2.fetch(Path(".cache"))'

.PHONY: engines-vllm
engines-vllm: venv-vllm smollm2 ## updates of real vLLM servers
	$(VENV)-vllm/bin/$(ENGINE_PYTEST) plugins/vllm/tests

.PHONY: engines-sglang
engines-sglang: venv-sglang smollm2 ## updates of real SGLang servers
	$(VENV)-sglang/bin/$(ENGINE_PYTEST) plugins/sglang/tests

.PHONY: engines-both
engines-both: venv venv-vllm venv-sglang ## one update of a vLLM and an SGLang server
	$(BIN)/$(ENGINE_PYTEST)

.PHONY: conformance-vllm
conformance-vllm: venv-vllm ## the conformance suite on vLLM, loading directly and through its reload
	$(VENV)-vllm/bin/ckpt-conformance --engine vllm $(TABLE) plugins/vllm/README.md
	$(VENV)-vllm/bin/ckpt-conformance --engine vllm --harness ckpt_vllm.harness:reload_harness --tier worker

.PHONY: conformance-sglang
conformance-sglang: venv-sglang ## the conformance suite on SGLang
	$(VENV)-sglang/bin/ckpt-conformance --engine sglang $(TABLE) plugins/sglang/README.md

# engines in one process wait for servers more than they compute: both at once take little longer than one
.PHONY: conformance-engines
conformance-engines: venv-vllm venv-sglang ## the conformance suite on vLLM and on SGLang, at once
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target conformance-vllm conformance-sglang

.PHONY: format
format: venv ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## remove all that make made: environments, caches, the demo's weights
	rm -rf .venv .venv-* .cache .work build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +
