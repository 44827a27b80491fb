# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: help install demo test lint format clean

PYTHON ?= python3
DEMO_MODEL ?= smollm2-moe
ARGS ?=

# more threads than this do not help models this small
THREADS := $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 4 ? cores : 4)))
export OMP_NUM_THREADS ?= $(THREADS)
export TOKENIZERS_PARALLELISM ?= false

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

install: ## create .venv with vLLM for CPUs and this checkout
	@PYTHON=$(PYTHON) ./scripts/install.sh

demo: install ## serve a real MoE, steer it per request, draw demo-out/heatmap.png
	@.venv/bin/python -m benchmarks.demo --model $(DEMO_MODEL)

test: install ## run all tests, one process a core; ARGS="-k name" picks some
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(THREADS) --dist loadfile \
		--max-worker-restart 0 $(ARGS)

lint: install ## check style and formatting
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: install ## fix what lint can fix
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean: ## remove .venv and what the demo wrote
	rm -rf .venv demo-out
