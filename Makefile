# nni-plugins: `make demo` shows the main job, `make test` runs the tests. Both need only Python 3.10 to 3.12 and make.
#
#   make demo PORT=8090          another port for NNI's web page
#   make demo PYTHON=python3.12  another Python
#   make demo PIP_FLAGS='...'    further options for pip (an index with CPU builds of torch, for example)

PORT ?= 8080
OUTPUT ?= outputs/demo
VENV ?= .venv
PIP_FLAGS ?=
# The first of these that is a Python from 3.10 to 3.12.
PYTHON ?= $(shell for one in python3 python3.12 python3.11 python3.10 python; do \
	$$one -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 \
	&& echo $$one && break; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-dev
DOCS_STAMP := $(VENV)/.installed-docs
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format types docs doctor clean

help:
	@echo 'make demo      search a compact model for the digits with NNI, and report (creates $(VENV) first)'
	@echo 'make test      run the tests;  make test-all  the slow ones too'
	@echo 'make lint      ruff;           make types     mypy'
	@echo 'make docs      these pages as a site, in site/; a warning is an error'
	@echo 'make doctor    what is wrong with this installation, if anything'
	@echo 'make clean     remove $(VENV) and what tools cached'

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'make: no Python from 3.10 to 3.12 found; name one: make PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: any later requirement is then met by the build that the constraints name.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) 'setuptools<81' wheel
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(TEST_STAMP): $(STAMP)
	$(PIP) --editable '.[dev,lightning]'
	@touch $@

# The extra `docs` of pyproject.toml, without the package: the API pages are read from the source, torch is not needed.
$(DOCS_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) 'mkdocs<2' mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/nni-plugins run experiments/digits --port $(PORT) --output $(OUTPUT)

doctor: $(STAMP)
	$(BIN)/nni-plugins doctor --port $(PORT)

# Two at a time: the machine that they are made for has two cores. What measures time runs alone.
test: $(TEST_STAMP)
	$(BIN)/python -m pytest -m 'not slow and not alone' --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m 'alone and not slow'

test-all: $(TEST_STAMP)
	$(BIN)/python -m pytest

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(TEST_STAMP)
	$(BIN)/mypy

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
