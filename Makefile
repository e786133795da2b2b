# make demo   train, convert and score a small model here (about two minutes after the installation)
# make test   lint and tests (under eight minutes on two cores)
# Each makes its own .venv with pinned versions first. PYTHON chooses the interpreter, 3.10 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format clean

help:
	@sed -n 's/^# //p' Makefile | head -3

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo 'Installing into $(VENV), once; this takes a few minutes ...'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Every run has a fresh folder, so that no earlier result is overwritten or in the way.
demo: $(INSTALLED)
	$(BIN)/finedeep demo --output finedeep-demo/$$(date +%Y%m%d-%H%M%S)

test: lint
	$(BIN)/python -m pytest tests -m 'not slow'

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest tests -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
