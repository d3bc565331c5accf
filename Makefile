# Each target sets up its own virtual environment first. `make demo` and `make test` need nothing but Python and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECKED := lora_recycle examples tests docs/hooks.py

.PHONY: help demo test quick lowest quality style docs

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(READY)  ## the shipped pool, from adapters to a meta-LoRA that classifies handwritten digits
	$(BIN)/lora-recycle demo --output runs/demo

test: $(READY)  ## all tests; fails if they run fewer of the package's lines than pyproject.toml demands
	$(BIN)/python -m pytest --cov

quick: $(READY)  ## all but the slow tests, without counting lines
	$(BIN)/python -m pytest -m 'not slow'

lowest: $(VENV)-lowest/.ready  ## the quick tests with the oldest versions that setup.cfg allows, in an environment of their own
	$(VENV)-lowest/bin/python -m pytest -m 'not slow'

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

$(VENV)-lowest/.ready: setup.cfg pyproject.toml lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet -c lowest.txt -e '.[test]'
	touch $@
