# What you can do here. `make help` lists it; each target makes .venv first if it is not there.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := $(wildcard *.py) labeler shards trainer evaluator segmenter explainer examples tests benchmarks

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check format bench clean

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r target what; \
		do printf '  make %-10s %s\n' "$$target" "$$what"; done

demo: $(INSTALLED) ## Run the main job on 20 photos, a few minutes on a CPU, and print where the report is
	$(BIN)/python examples/demo.py

test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(INSTALLED) ## Run the tests, the slow ones and those for a GPU too
	$(BIN)/python -m pytest

check: $(INSTALLED) .typecheck/tokenlabel ## Lint, format check, types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED) ## Format the code and sort the imports
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(INSTALLED) ## Run every script in benchmarks/; each prints a table and writes JSON to benchmarks/results/
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(BIN)/python "$$script"; done

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
