# make quickstart   install, and name what is on some photographs; no GPU needed
# make test         linters, types, import contracts and tests
# make docs         the documentation as a site, in the folder site
# make test-oldest  the tests with the oldest versions that pyproject.toml promises, in an environment of its own
# PYTHON=python3.12 make ...   another Python (3.10 or newer)

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin
UV := uv==0.13.9
RUN := runs/quickstart
# Where Python keeps no bytecode, each of the many processes of the tests would compile PyTorch and timm anew, in 20 s.
# Some packages carry files that do not compile, which is no fault.
COMPILE = test -z "$$PYTHONDONTWRITEBYTECODE" || $(BIN)/python -m compileall -qq -j 2 $(VENV)/lib > /dev/null || true
# Each process keeps to the files next to one another, whose fixtures they share, until it has none left.
ORDINARY := -n 2 --dist worksteal -m "not slow and not gpu"

.PHONY: quickstart test test-oldest lint kernels docs clean

quickstart: $(VENV)/.installed
	$(BIN)/overlock predict examples/photos --top 3 --save $(RUN)/predictions.png --overwrite
	@echo "the picture of these predictions: $(RUN)/predictions.png"

test: lint kernels
	OMP_NUM_THREADS=1 $(BIN)/pytest $(ORDINARY)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the first page: site/index.html"

# Once, and with make -j2 beside the linters, in place of once in each of pytest's processes.
kernels: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/overlock compile

test-oldest: $(OLDEST)/.installed-dev
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest $(ORDINARY)

# An install is repeated only when the dependencies change. uv finds versions that fit in seconds, pip in minutes.
$(VENV)/.installed $(VENV)/.installed-dev: $(VENV)/.installed%: pyproject.toml
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) must be Python \
	3.10 or newer, with venv (on Debian: apt install python3-venv); make PYTHON=python3.12 names another"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet $(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".$(if $*,[$(*:-%=%)])"
	$(if $*,$(COMPILE))
	touch $@

# pip takes the newest versions only, so that uv resolves these. Without [data], whose readers need the newest timm. The
# cap is on what transformers' oldest needs.
$(OLDEST)/.installed-dev: pyproject.toml | $(VENV)/.installed-dev
	$(BIN)/uv venv --quiet --allow-existing --python $(PYTHON) $(OLDEST)
	$(BIN)/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct --editable \
		".[checks,train,detect,segment,parquet,video]" "huggingface-hub<1"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(RUN) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
