# `make demo` and `make test` set up what they need; everything else assumes `make setup`.
# Set-up is cached: it runs again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
WORKERS ?= $(shell nproc)

.PHONY: demo test test-quick test-slow check format bench mutants setup clean help

help:
	@echo "make demo        set up, then show what works"
	@echo "make test        set up, then all tests (quick ones first, then slow ones)"
	@echo "make test-quick  the tests that take seconds"
	@echo "make check       format, lint, types, layering"
	@echo "make bench       measurements; they never fail"
	@echo "make mutants     plant faults in the model and see the tests find them"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, found $$($(PYTHON) --version)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[engine,plot,parity,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/hadal demo

test: test-quick test-slow

test-quick: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/precision_error.py
	$(BIN)/python benchmarks/reference_model.py

mutants: $(STAMP)
	$(BIN)/python scripts/mutants.py

clean:
	rm -rf $(VENV) build dist out .pytest_cache .ruff_cache .hypothesis .import_linter_cache
