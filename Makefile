# make demo    a shop, a live dashboard and a database of its own; Ctrl-C ends all of it
#              EXAMPLE=tracking: parcels that their owners follow; URI=mongodb://… your database
# make test    the linters, the type checker and every test
# make bench   a benchmark, side by side with other ways of doing the same; BENCH=drain: another
#
# Each sets up what it needs in .venv the first time, and again when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
RATE ?= 2
EXAMPLE ?= orders
URI ?=
WORKERS ?= 3
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint format bench clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo
	@exec $(BIN)/data-bridge demo $(EXAMPLE) --port $(PORT) --rate $(RATE) $(if $(URI),--uri '$(URI)') $(ARGS)

test: lint
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "data-bridge needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "Setting up $(VENV) …"
	@$(PIP) install --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "Setting up $(VENV) for development …"
	@$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/.demo
