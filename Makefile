# SPDX-License-Identifier: Apache-2.0
# The developer's loop. Every target sets up .venv first, once; `make demo` and `make test` work on a fresh machine
# with Python 3.10 or newer, gcc and make.

# The Python to build on. One that can import a CUDA build of torch is preferred, and that torch is used.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
# Installed unless $(PYTHON) has a CUDA build of torch already.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ds4sci-ready
PYTEST_ARGS ?=
# Processes that tests are spread over, file by file; every test computes on one thread, some start ranks of their own.
# In the order of their names: those of ranks, which take longest, are not the last.
TEST_WORKERS ?= 2
BENCH_ARGS ?=

CXX_FILES = $(shell git ls-files '*.cu' '*.cuh' '*.h' '*.cpp')
# An empty file needs no licence.
HEADED_FILES = $(shell git ls-files '*.py' '*.cu' '*.cuh' '*.h' '*.cpp' '*.sh' Makefile .ci/run)

.PHONY: demo install lint format test build test-gpu bench verify report
.DEFAULT_GOAL := test

demo: $(READY)  ## both examples on what this machine has: its GPUs, else two CPU processes
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/evoformer/demo.sh
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/genslm/demo.sh

install: $(READY)  ## editable install with the development tools

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/codespell $$(git ls-files)
	@missing=$$(find $(HEADED_FILES) -size +0 -exec grep -L 'SPDX-License-Identifier: Apache-2.0' {} +); \
	if [ -n "$$missing" ]; then echo "no licence header in:"; echo "$$missing"; exit 1; fi

format: $(READY)  ## what lint asks for, done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

test: $(READY)  ## everything that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

build: $(READY)  ## compiles all kernels for all architectures; fails on spills. Needs nvcc, no GPU
	$(BIN)/python -m deepspeed_ds4sci.op_builder.compile_check

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

bench: $(READY)
	$(BIN)/python -m tests.benchmarks $(BENCH_ARGS)

verify: $(READY)  ## a failing op is not timed
	$(BIN)/python -m pytest tests/unit/ops tests/gpu $(PYTEST_ARGS)
	$(BIN)/python -m tests.benchmarks $(BENCH_ARGS)

report: $(READY)
	$(BIN)/python -m deepspeed_ds4sci.report

# A CUDA torch of the chosen Python is reused through the environment; it must be a version that we support.
HAS_CUDA_TORCH = import torch; from torch.torch_version import TorchVersion as V; \
    raise SystemExit(torch.version.cuda is None or V(torch.__version__) < "2.10")

# A new environment sees the packages of the system's Python, but not those of an environment that $(PYTHON) is in.
OWN_PACKAGES = import sysconfig; print(sysconfig.get_path("purelib"))

$(READY): pyproject.toml setup.py
	@[ -n "$(PYTHON)" ] || { echo "Python 3.10 or newer was not found; name one with make PYTHON=..."; exit 1; }
	@if [ -x $(BIN)/python ]; then \
	    echo "using the environment in $(VENV)"; \
	elif $(PYTHON) -c '$(HAS_CUDA_TORCH)' 2>/dev/null; then \
	    echo "using the CUDA build of torch that $(PYTHON) has"; \
	    $(PYTHON) -m venv --system-site-packages $(VENV); \
	    $(PYTHON) -c '$(OWN_PACKAGES)' > "$$($(BIN)/python -c '$(OWN_PACKAGES)')/outer_environment.pth"; \
	else \
	    $(PYTHON) -m venv $(VENV); \
	fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	@# DeepSpeed records at build time which accelerator there is, so it is built beside the torch it will run with.
	$(BIN)/python -m pip install --quiet "setuptools>=64" wheel ninja packaging
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[examples,genomes,test,lint]"
	@# Without torchvision, which would replace the torch above by the one it was built for; tests need none of it.
	$(BIN)/python -m pip install --quiet --no-deps "timm>=1.0,<2"
	@# A DeepSpeed of the outer environment has its launcher there, which would start the outer Python.
	@[ -x $(BIN)/deepspeed ] || $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall \
	    "deepspeed>=0.19.8,<0.20"
	@touch $@
