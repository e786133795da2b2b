# make demo   train, convert and score a small model here (about three minutes after the installation)
# make test   lint and tests (about ten minutes on two cores)
# make test-matrix   the tests in every supported version of transformers (half an hour)
# make test-newest   the same with the newest of every dependency; before every release (a quarter of an hour)
# make test-programs   TRL, llm-compressor, ONNX and other programs around a model (a quarter of an hour)
# make test-vllm   Finedeep served by vLLM on a CPU, beside transformers (half an hour on one core, after an installation of 3.4 GB)
# make bench   speed and memory beside dense Llama, into benchmarks/ (most of an hour; leave the machine alone)
# make real TEXTS="NAME=FILE ..."   convert and measure SmolLM2-135M (hours; resumable; see docs/real.md)
# make gpu-grid TRAIN=BOOKS.txt.xz AUTHOR=OTHER.txt   ten minutes of training on a GPU, with PYTHON as it is
# make docs    the documents as a site, into docs/_build/html
# The others make their own .venv with pinned versions first. PYTHON chooses the interpreter, 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-slow test-browser test-official test-matrix test-newest test-programs test-vllm \
	bench docs real gpu-grid lint format clean

help:
	@sed -n 's/^# //p' Makefile | head -11

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo 'Installing into $(VENV), once; this takes a few minutes ...'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Every run has a fresh folder, so that no earlier result is overwritten or in the way.
demo: $(INSTALLED)
	$(BIN)/finedeep demo --output finedeep-demo/$$(date +%Y%m%d-%H%M%S)

# two files at a time, each on one thread: most tests are of tiny models, which two threads make no faster
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m 'not slow' --numprocesses 2 --dist loadfile --durations 10

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest tests -m slow --ignore=tests/official
	FINEDEEP_HOSTILE_EXAMPLES=1100 $(BIN)/python -m pytest tests/convert/test_hostile.py

# on a GPU, with the interpreter that is there: nothing is installed, and the package need not be (about a minute)
test-gpu:
	$(PYTHON) -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_kernels.py tests/test_modeling.py

# the report's page in headless Chromium, where that is installed
test-browser: $(INSTALLED)
	$(BIN)/python -m pytest tests -m browser

# transformers' own model tests, for Llama and Finedeep side by side; they are fetched from the package index
test-official: $(INSTALLED)
	$(BIN)/python tests/official/compare.py

test-matrix: $(INSTALLED)
	$(BIN)/python tests/matrix.py

test-newest: $(INSTALLED)
	$(BIN)/python tests/newest.py

test-programs: $(INSTALLED)
	$(BIN)/python tests/programs/run.py

test-vllm: $(INSTALLED)
	$(BIN)/python tests/serving/run.py

bench: $(INSTALLED)
	$(BIN)/python -m finedeep.benchmarks --quick --output benchmarks
	$(BIN)/python -m finedeep.benchmarks --output benchmarks --document docs/performance.md

TEXTS ?=
QUESTIONS ?=
REAL_OPTIONS ?=
real: $(INSTALLED)
	$(BIN)/python examples/real/run.py .real $(foreach text,$(TEXTS),--text $(text)) \
		$(if $(QUESTIONS),--questions $(QUESTIONS)) $(REAL_OPTIONS)

DEADLINE ?= 600
OUT ?= gpu-grid.jsonl
gpu-grid:
	$(PYTHON) examples/gpu_grid.py examples/gpu_grid.yaml $(OUT) --train $(TRAIN) --author $(AUTHOR) --deadline $(DEADLINE) \
		$(GRID_OPTIONS)

docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b linkcheck docs docs/_build/links
	@echo docs/_build/html/index.html

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter --no-progress --no-cache configuration_finedeep.py modeling_finedeep.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .matrix build docs/_build *.egg-info
