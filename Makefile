# make quickstart   install, and name what is on some photographs; no GPU needed
# make test         linters, types, import contracts and tests
# PYTHON=python3.12 make ...   another Python (3.10 or newer)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(BIN)/overlock predict examples/photos --top 3 --save $(RUN)/predictions.png
	@echo "the picture of these predictions: $(RUN)/predictions.png"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# An install is repeated only when the dependencies change.
$(VENV)/.installed $(VENV)/.installed-dev: $(VENV)/.installed%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".$(if $*,[$(*:-%=%)])"
	touch $@

clean:
	rm -rf $(VENV) $(RUN) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
