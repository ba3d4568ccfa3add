# Short names for what .ci/run and the README spell out. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help install test test-gpu lint format types contract ci

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

install:  ## Install with everything a contributor needs
	pip install -e ".[dev]" && pre-commit install

test:  ## The whole test suite
	pytest

test-gpu:  ## The tests that need a CUDA GPU
	pytest -n 0 -m gpu

lint:  ## Style
	ruff check . && ruff format --check .

format:  ## Rewrite to the house format
	ruff check --fix . && ruff format .

types:  ## Static types
	pyright

contract:  ## Which layer may import which
	lint-imports

ci:  ## What a change must pass, in fresh environments
	bash .ci/run
