# make run   : set up and run the main job on the embedded default
# make up    : start Prefect, MLflow, the reward server and a worker in the background; UP_ARGS="--port-mlflow 5001"
# make down  : stop them
# make test  : set up and run the tests, two files at a time; TEST_WORKERS=4 for four
PYTHON ?= python3
PIP_ARGS ?=
TEST_WORKERS ?= 2
BIN := .venv/bin
GPU_PYTHON ?= $(PYTHON)

.PHONY: run up down test test-gpu test-containers check bench format help

help:
	@sed -n 's/^# //p' Makefile

.venv/.run-ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up .venv (a few minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

.venv/.test-ready: .venv/.run-ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# make check : lint, format and types
check: .venv/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

run: .venv/.run-ready
	@$(BIN)/hn-titles run

up: .venv/.run-ready
	@$(BIN)/hn-titles up $(UP_ARGS)

down: .venv/.run-ready
	@$(BIN)/hn-titles down

test: .venv/.test-ready
	@# In the order of the files: the long ones (tests/integration) come first, the short ones even the end out.
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# make test-containers: check the Dockerfile, job templates and Kubernetes files with their own validators
test-containers: .venv/.test-ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,containers]'
	$(BIN)/python -m pytest tests/containers

# make test-gpu : the tests that need a CUDA device; GPU_PYTHON=... is the Python of one engine's environment, whose tests run
test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu -rs tests/gpu

# make bench : measure the reward server (about ten minutes on two cores); BENCH_ARGS="--quick" for one
bench: .venv/.test-ready
	$(BIN)/python -m bench.reward_server $(BENCH_ARGS)

# make format: mend what ruff can mend
format: .venv/.test-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
