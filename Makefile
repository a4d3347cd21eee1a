# make run   : set up and run the main job on the embedded default
# make up    : start Prefect, MLflow, the reward server and a worker in the background; UP_ARGS="--port-mlflow 5001"
# make down  : stop them
# make test  : set up and run the tests, two files at a time; TEST_WORKERS=4 for four
PYTHON ?= python3
PIP_ARGS ?=
TEST_WORKERS ?= 2
BIN := .venv/bin
# The GPU environments' Python and places.
PYTHON_GPU ?= python3.12
ART := .venv-gpu-art
TRL := .venv-gpu-trl
GPU_PYTHON ?= $(wildcard $(ART)/bin/python $(TRL)/bin/python)

.PHONY: run up down gpu-art gpu-trl gpu-driver test test-gpu test-containers check bench format help

help:
	@sed -n 's/^# //p' Makefile

.venv/.run-ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up .venv (a few minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[cpu]'
	@touch $@

.venv/.test-ready: .venv/.run-ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[cpu,dev]'
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

# make gpu-art : on a machine with an NVIDIA GPU, .venv-gpu-art for flows and ART's trainer, and what gpu-trl sets up
gpu-art: $(ART)/.ready
	@echo "ART's environment is ready: $(ART)/bin/hn-titles. Put into .env, so that vLLM is found:"
	@echo "ART_VLLM_RUNTIME_BIN=\"$(CURDIR)/$(TRL)/bin/python -m art_vllm_runtime.dedicated_server\""
	@echo "TRL_PYTHON=$(CURDIR)/$(TRL)/bin/python"

# make gpu-trl : the same for .venv-gpu-trl: vLLM, and TRL's trainer; flows run in .venv or .venv-gpu-art
gpu-trl: $(TRL)/.ready
	@echo "TRL's environment is ready. Put into .env, so that flows in other environments find it:"
	@echo "TRL_PYTHON=$(CURDIR)/$(TRL)/bin/python"

gpu-driver:
	@command -v nvidia-smi >/dev/null || { echo "This needs an NVIDIA GPU, and no driver is here: nvidia-smi is not found. Install NVIDIA's driver (580 or newer). Without a GPU: make run"; exit 1; }
	@nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "NVIDIA's driver does not answer; see above."; exit 1; }
	@command -v uv >/dev/null || command -v $(PYTHON_GPU) >/dev/null || { echo "Python 3.12 is needed: neither uv nor $(PYTHON_GPU) is found. Try: make PYTHON_GPU=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }

$(TRL)/.ready: pyproject.toml constraints-gpu-trl.txt | gpu-driver
	@echo "Setting up $(TRL) (several gigabytes, once) ..."
	@$(call gpu-venv,$(TRL))
	@# Each version is pinned; the project itself comes without its own dependencies, which do not fit vLLM's.
	@$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps -r constraints-gpu-trl.txt
	@$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps -e .
	@touch $@

$(ART)/.ready: pyproject.toml constraints-gpu-art.txt $(TRL)/.ready | gpu-driver
	@echo "Setting up $(ART) (several gigabytes, once) ..."
	@$(call gpu-venv,$(ART))
	@$(ART)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints-gpu-art.txt -e '.[gpu-art]'
	@# The server that ART starts comes with ART and runs where vLLM is.
	@$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(ART)/lib/python3.12/site-packages/art/_vllm_runtime/*.whl
	@touch $@

gpu-venv = test -x $(1)/bin/python || if command -v uv >/dev/null; then uv venv --quiet --seed --python 3.12 $(1); else $(PYTHON_GPU) -m venv $(1); fi

test: .venv/.test-ready
	@# In the order of the files: the long ones (tests/integration) come first, the short ones even the end out.
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# make test-containers: check the Dockerfile, job templates and Kubernetes files with their own validators
test-containers: .venv/.test-ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[cpu,dev,containers]'
	$(BIN)/python -m pytest tests/containers

# make test-gpu : the tests that need a CUDA device, in each GPU environment that is here; GPU_PYTHON=... for another Python
test-gpu:
	@test -n "$(GPU_PYTHON)" || { echo "No GPU environment is here. Try: make gpu-art, or: make GPU_PYTHON=/path/to/its/python test-gpu"; exit 1; }
	@# Neither environment has pytest; its version is that of the other tests.
	@failed=; for python in $(GPU_PYTHON); do \
		$$python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints-gpu-art.txt pytest pytest-asyncio || exit 1; \
		echo "$$python -m pytest -m gpu -rs tests/gpu"; \
		$$python -m pytest -m gpu -rs tests/gpu || failed=1; \
	done; test -z "$$failed"

# make bench : measure the reward server (about twenty minutes on two cores); BENCH_ARGS="--quick" for one
bench: .venv/.test-ready
	$(BIN)/python -m bench.reward_server $(BENCH_ARGS)

# make format: mend what ruff can mend
format: .venv/.test-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
