# What you can do here. `make help` lists it; each target makes .venv first if it is not there.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := $(wildcard *.py) labeler shards trainer evaluator segmenter explainer examples tests benchmarks

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu check format bench bench-all bench-gpu clean

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r target what; \
		do printf '  make %-10s %s\n' "$$target" "$$what"; done

demo: $(INSTALLED) ## Run the main job on 20 photos, a few minutes on a CPU, and print where the report is
	$(BIN)/python examples/demo.py

test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(INSTALLED) ## Run the tests, the slow ones and those for a GPU too
	$(BIN)/python -m pytest

test-gpu: .typecheck/tokenlabel ## Run the tests for a GPU, with .venv or else PYTHON
	PYTHONPATH=.typecheck $(or $(wildcard $(BIN)/python),$(PYTHON)) -m pytest -m gpu

check: $(INSTALLED) .typecheck/tokenlabel ## Lint, format check, types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED) ## Format the code and sort the imports
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(INSTALLED) ## Measure speed, under 20 minutes; rewrites the tables in docs/performance.md and README.md
	$(BIN)/python benchmarks/run.py

bench-all: $(INSTALLED) ## The same, and what takes hours: growth, label quality, learning
	$(BIN)/python benchmarks/run.py --all

# Needs no .venv: a GPU machine may have its own torch, and no network to install anything from.
bench-gpu: .typecheck/tokenlabel ## Measure on a GPU, with .venv or else PYTHON; leaves out, with the reason, what cannot run
	PYTHONPATH=.typecheck $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/run.py --gpu

clean: ## Remove what the commands above made, except .venv
	rm -rf demo build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Pyright reads `import tokenlabel` through this link: the root of the repository is the package.
.typecheck/tokenlabel:
	mkdir -p .typecheck
	ln -sfn .. $@
