# make run ARGS="backend=triton workload=decode"   another interpreter: make PYTHON=python3.12   another place: make VENV=...
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes of the GPU tests; each holds a CUDA context.
GPU_WORKERS ?= 4
PY := $(VENV)/bin/python
STAMP := $(VENV)/.fa_research_installed

.PHONY: run test test-full lint format gpu-test setup clean

run: $(STAMP)
	$(PY) run.py $(ARGS)

test: lint
	$(PY) -m pytest -m "not gpu" -n 2

# Every mask with every page size and batch, where `test` runs every pair of values.
test-full: lint
	FA_RESEARCH_FULL_SEMANTICS=1 $(PY) -m pytest -m "not gpu" -n 2

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy fa_research hydra_plugins run.py

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

gpu-test: $(STAMP)
	$(PY) -m pytest -m "gpu and not quiet" -n $(GPU_WORKERS)
	$(PY) -m pytest -m "gpu and quiet"

setup: $(STAMP)

# torch goes first and alone, so that nothing else can choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e ".[dev,triton,hf,jax,report,wandb-report,launchers]"
	touch $@

# Leaves $(VENV) and outputs/ alone: both cost time to make again.
clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
