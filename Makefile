# Everything below sets itself up in .venv from a fresh clone; nothing needs installing by hand but Python >= 3.10 and a C++ compiler.
#
#   make bench   the main job: ResNet-50 fused, verified and timed (BENCH="--dtype bf16" passes arguments on)
#   make test    linters, type checks and the tests (PYTEST="-k fuse" passes arguments on)
#   make build | lint | native-test | wheel | clean
#
# Which torch is installed:
#   DEVICE=cpu|cuda   cuda if nvidia-smi sees a GPU, cpu otherwise
#   TORCH=...         the requirement; torch==2.13.0 for cpu, torch>=2.11 for cuda
#   TORCH_INDEX=...   an index to take torch from. PyPI's torch for Linux is the CUDA build, which runs on a CPU as well but is
#                     large; the small CPU build: make bench TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH_cpu := torch==2.13.0
TORCH_cuda := torch>=2.11
TORCH ?= $(TORCH_$(DEVICE))
TORCH_INDEX ?=
BENCH ?=
PYTEST ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_TOOLS := "setuptools>=77" wheel "cmake>=3.24" "ninja>=1.11" "pybind11>=2.13"
# torchvision is needed for its models alone, which are plain Python: without its dependencies it leaves torch as it is.
TORCHVISION := torchvision
NATIVE := CMakeLists.txt setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CLANG_FORMAT_FILES = $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: bench test lint build native-test wheel clean FORCE
.DELETE_ON_ERROR:

bench: $(VENV)/.bench
	$(BIN)/resnet-fused bench $(BENCH)

test: lint
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CLANG_FORMAT_FILES)
	$(BIN)/mypy

build: $(VENV)/.build

native-test: $(VENV)/.test
	$(BIN)/python -m pytest tests/test_native_sanitizers.py $(PYTEST)

wheel: $(VENV)/.torch
	$(BIN)/python setup.py --quiet bdist_wheel

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f resnet_fused/*.so
	rm -rf $(VENV)

# The set-up, one stamp a step. requirement.txt changes, and with it all that follows, only when the choice of torch does.
$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/requirement.txt: $(VENV)/pyvenv.cfg FORCE
	@echo '$(TORCH) $(TORCH_INDEX)' | cmp -s - $@ || echo '$(TORCH) $(TORCH_INDEX)' > $@

$(VENV)/.torch: $(VENV)/requirement.txt
	$(PIP) install $(BUILD_TOOLS)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml
	$(PIP) install --no-build-isolation -e .
	@touch $@

$(VENV)/.build: $(VENV)/.package $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.bench: $(VENV)/.build
	$(PIP) install --no-build-isolation -e ".[bench]"
	@touch $@

$(VENV)/.test: $(VENV)/.bench
	$(PIP) install --no-build-isolation -e ".[test,lint]"
	$(PIP) install --no-deps $(TORCHVISION)
	@touch $@
