# Each target sets up its own virtual environment first. `make demo` and `make test` need nothing but Python and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PLAIN := $(VENV)-plain
CHECKED := lora_recycle examples tests docs/hooks.py
# A process of tests for each core, of one thread and about 1.5 GB; `make test WORKERS=0` runs all in one, for a debugger.
WORKERS ?= auto
PYTEST := -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: demo plain test quick portable lowest quality style docs

# As a user installs the package: without extras, in an environment of its own.
demo: $(PLAIN)/.ready
	$(PLAIN)/bin/lora-recycle demo --output runs/demo

# Every public name, and every verb's help and smallest run, in that environment.
plain: $(PLAIN)/.ready
	$(PLAIN)/bin/python tests/smoke.py

# All tests, and the lines of the package that they run: fails below the share in pyproject.toml.
test: $(READY)
	$(BIN)/python $(PYTEST) --cov

# Without the slow tests and without counting lines.
quick: $(READY)
	$(BIN)/python $(PYTEST) -m 'not slow'

# The quick tests with the instructions that every x86-64 processor has: what they expect must not hang on last digits.
portable: $(READY)
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python $(PYTEST) -m 'not slow'

# The quick tests with the oldest versions that setup.cfg allows, in an environment of their own.
lowest: $(VENV)-lowest/.ready
	$(VENV)-lowest/bin/python $(PYTEST) -m 'not slow'

quality: $(READY)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

style: $(READY)
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

docs: $(VENV)/.docs  # never with --quiet: what it does not print it does not count as a warning either
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $(READY)

# --clear: what an earlier setup.cfg asked for must not hide what this one lacks
$(PLAIN)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(PLAIN)
	$(PLAIN)/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)-lowest/.ready: setup.cfg pyproject.toml lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet -c lowest.txt -e '.[test]'
	touch $@
