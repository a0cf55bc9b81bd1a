# The one entry point: make demo | test | test-all | lint | bench. Each sets up .venv first; a second run is quick.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-all lint format bench clean

demo: $(STAMP)
	$(BIN)/edgelora demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Peers are installed on request, into an environment of their own: see benchmarks/decode.py.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.decode

# torch goes first and alone: a version already there keeps pip from fetching gigabytes of CUDA for a range that admits it.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("edgelora needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis edgelora-demo
