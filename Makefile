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

.PHONY: help demo plain test quick portable lowest quality style docs

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

# as a user installs the package: without extras, in an environment of its own
demo: $(PLAIN)/.ready  ## the shipped pool, from adapters to a meta-LoRA that classifies handwritten digits
	$(PLAIN)/bin/lora-recycle demo --output runs/demo

plain: $(PLAIN)/.ready  ## every public name, and every verb's help and smallest run, in the same environment as the demo
	$(PLAIN)/bin/python tests/smoke.py

test: $(READY)  ## all tests; fails if they run fewer of the package's lines than pyproject.toml demands
	$(BIN)/python $(PYTEST) --cov

quick: $(READY)  ## all but the slow tests, without counting lines
	$(BIN)/python $(PYTEST) -m 'not slow'

# what the tests expect must not depend on the last digits, which differ between processors
portable: $(READY)  ## the quick tests with the instructions that every x86-64 processor has
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python $(PYTEST) -m 'not slow'

lowest: $(VENV)-lowest/.ready  ## the quick tests with the oldest versions that setup.cfg allows, in an environment of their own
	$(VENV)-lowest/bin/python $(PYTEST) -m 'not slow'

quality: $(READY)  ## ruff and mypy, changing nothing
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

style: $(READY)  ## ruff: fix, sort imports, format
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# never with --quiet: what it does not print it does not count as a warning either
docs: $(VENV)/.docs  ## the documentation as a site in build/site; a warning is an error
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
