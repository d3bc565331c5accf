# Each target sets up its own virtual environment first. `make demo` and `make test` need nothing but Python and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECKED := lora_recycle examples tests docs/hooks.py

.PHONY: demo test quick quality style docs

demo: $(READY)
	$(BIN)/lora-recycle demo --output runs/demo

# All tests, and the lines of the package that they run: fails below the share in pyproject.toml.
test: $(READY)
	$(BIN)/python -m pytest --cov

# Without the slow tests and without counting lines.
quick: $(READY)
	$(BIN)/python -m pytest -m 'not slow'

quality: $(READY)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

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
