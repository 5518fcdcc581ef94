# The whole interface of a developer. The virtual environment lives outside the checkout: see scripts/venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench docs reference clean lock
MAKEFLAGS += --no-print-directory

help: ## Show this text
	@echo "Blixard: jobs in isolated sandboxes from a durable queue"
	@echo
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo
	@echo "Needs Python 3.11 or newer; PYTHON=… names another, BLIXARD_CACHE=… moves the virtual environments."

setup: ## Make the virtual environment for development and print its path
	@scripts/venv dev

demo: ## Run the main job on this machine's own Python library, with everything it needs
	@venv="$$(scripts/venv demo)"; PATH="$$venv/bin:$$PATH" scripts/demo

test: ## Run every test
	@scripts/test

check: ## Check format, lint, types and the direction of imports
	@scripts/check

format: ## Format all code
	@venv="$$(scripts/venv dev)"; "$$venv/bin/ruff" format . && "$$venv/bin/ruff" check --fix .

bench: ## Run the benchmarks; figures go to standard output
	@scripts/bench

docs: reference ## Bring the generated reference up to date and run every example in README and docs
	@venv="$$(scripts/venv dev)"; "$$venv/bin/python" -m pytest -q tests/integration/test_docs.py

reference: ## Write CONFIGURATION.md, config/default.toml and docs/reference/cli.md from the code
	@venv="$$(scripts/venv dev)"; scripts/write-reference "$$venv"

lock: ## Pin the newest versions of all dependencies in scripts/constraints.txt
	@scripts/lock

clean: ## Remove caches and build output from the checkout; virtual environments stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
