# make help prints the targets. `make PYTHON=python3.12 VENV=/some/where test` uses another interpreter or place.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := memopt passes kernels solvers

.DEFAULT_GOAL := help
.PHONY: help demo test test-long check gpu bench bench-planners bench-table plan sizes clean

help: ## print this
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

# Set up once: again only when the dependencies change, or a step failed half way (then no stamp was left).
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "memopt needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY) ## train a Hugging Face model under a budget and compare what was promised with what was measured
	$(BIN)/python examples/demo.py

test: $(READY) ## the tests: about twenty minutes on two cores, no GPU
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not long"

test-long: $(READY) ## what `test` leaves out: the same promises on further models, and longer sweeps
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "long and not gpu"

check: $(READY) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu: $(READY) ## the tests and benchmarks that need a CUDA device
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.gpu.updates
	$(BIN)/python -m benchmarks.gpu.kernels

bench: $(READY) ## memopt against its peers on this CPU: a table and a picture
	$(BIN)/python benchmarks/recompute_cpu.py

bench-planners: $(READY) ## every memory planner on the same step graphs, scored by one simulator; no GPU, 15 minutes
	$(BIN)/python -m benchmarks.planners

bench-table: $(READY) ## make the README's tables and pictures from the last results
	$(BIN)/python -m benchmarks.tables

plan: $(READY) ## the plan of Llama 3 8B on an H200, with no GPU and no weights
	$(BIN)/memopt plan llama-3-8b --batch 1 --seq 4096 --dtype bf16 --budget 120GB --device h200

sizes: ## lines a file and a function against the aims of CONTRIBUTING.md
	@$(PYTHON) tools/sizes.py $(SOURCES)

clean: ## remove what builds and tests left; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find $(SOURCES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
