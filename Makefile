# Each target sets up its own virtual environment first. `make demo` and `make test` need nothing but Python and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PLAIN := $(VENV)-plain
CHECKED := lora_recycle examples tests docs/hooks.py

.PHONY: demo plain test quick lowest quality style docs

# As a user installs the package: without extras, in an environment of its own.
demo: $(PLAIN)/.ready
	$(PLAIN)/bin/lora-recycle demo --output runs/demo

# Every public name, and every verb's help and smallest run, in that environment.
plain: $(PLAIN)/.ready
	$(PLAIN)/bin/python tests/smoke.py

# All tests, and the lines of the package that they run: fails below the share in pyproject.toml.
test: $(READY)
	$(BIN)/python -m pytest --cov

# Without the slow tests and without counting lines.
quick: $(READY)
	$(BIN)/python -m pytest -m 'not slow'

# The quick tests with the oldest versions that setup.cfg allows, in an environment of their own.
lowest: $(VENV)-lowest/.ready
	$(VENV)-lowest/bin/python -m pytest -m 'not slow'

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
