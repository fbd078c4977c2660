# Every target sets itself up in .venv from a fresh clone. Needed beforehand: Python >= 3.10 and a C++ compiler.
#
#   make bench   the main job: ResNet-50 fused, verified and timed (BENCH="--dtype bf16" passes arguments on)
#   make test    linters, type checks and the tests (PYTEST="-k fuse" passes arguments on; PYTEST=--thorough
#                plants every bug and runs more sanitizers, for half an hour more)
#   make report  the package beside every peer on this machine, and the report made of it (REPORT="--models resnet18")
#   make baseline  how many times as fast as torch kernels and blocks are here, measured by pytest-benchmark and kept
#   make compare   the same measured again: fails if a ratio is 10% worse (PYTEST="-k resnet18": only its blocks)
#   make gpu     on a machine with an NVIDIA GPU: prove every kernel, tune, measure, in 10 minutes (docs/gpu.md;
#                GPU=--full without the limit; WHEEL=path takes the native library from there and compiles nothing)
#   make build | lint | pytest | native-test | wheel | clean
#
# Which torch is installed:
#   DEVICE=cpu|cuda   cuda if nvidia-smi sees a GPU, cpu otherwise
#   TORCH=...         the requirement; torch==2.13.0 for cpu, torch>=2.11 for cuda
#   TORCH_INDEX=...   an index to take torch and torchvision from. PyPI's torch for Linux is the CUDA build: it runs on
#                     a CPU too but is large. The CPU build: make bench TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Which kernels are compiled:
#   RESNET_FUSED_CUDA=0|1   0: none for CUDA. By default bench has them on a machine with a GPU and test everywhere; where
#                           there is no CUDA toolkit, test takes nvcc and the headers from PyPI
#   TORCH_CUDA_ARCH_LIST=...  8.0+PTX;9.0a by default

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH_cpu := torch==2.13.0
TORCH_cuda := torch>=2.11
TORCH ?= $(TORCH_$(DEVICE))
TORCH_INDEX ?=
BENCH ?=
REPORT ?=
GPU ?=
PYTEST ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
FROM_INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
BUILD_TOOLS := "setuptools>=77" wheel "cmake>=3.24" "ninja>=1.11" "pybind11>=2.13"
CUDA_TOOLKIT := $(patsubst %,"nvidia-%==13.0.*",cuda-nvcc nvvm cuda-crt cuda-runtime cuda-cccl)
ifeq ($(filter test pytest wheel,$(MAKECMDGOALS))$(filter cuda,$(DEVICE)),)
RESNET_FUSED_CUDA ?= 0
endif
export RESNET_FUSED_CUDA
SOURCES := $(shell find csrc tests/native tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: bench report baseline compare gpu test pytest lint build native-test wheel clean FORCE
.DELETE_ON_ERROR:

bench: $(VENV)/.build
	$(BIN)/resnet-fused bench $(BENCH)

report: $(VENV)/.build $(VENV)/.peers
	$(BIN)/python benchmarks/suite.py --device $(DEVICE) $(REPORT)

baseline compare: $(VENV)/.build $(VENV)/.test
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-json=.benchmarks/now.json $(PYTEST)
	$(BIN)/python benchmarks/baseline.py .benchmarks/now.json $(if $(filter baseline,$@),--save)

# With a wheel, pip install -e need not compile.
ifdef WHEEL
gpu: export RESNET_FUSED_NATIVE := 0
endif
gpu: $(if $(WHEEL),,$(VENV)/.cuda) $(VENV)/.test
	@nvidia-smi -L >/dev/null || { echo "error: make gpu needs an NVIDIA GPU, nvidia-smi sees none" >&2; exit 2; }
	$(BIN)/python benchmarks/gpu.py $(if $(WHEEL),--wheel $(WHEEL)) $(GPU)

test: lint pytest

pytest: $(VENV)/.cuda $(VENV)/.build $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal $(PYTEST)

native-test: $(VENV)/.test
	$(BIN)/python -m pytest tests/test_native_sanitizers.py $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy

build: $(VENV)/.build

wheel: $(VENV)/.torch
	$(BIN)/python setup.py --quiet bdist_wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f resnet_fused/*.so

# The set-up, one stamp a step. torch.txt changes, and with it all that follows, only when the choice of torch does.
$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch.txt: $(VENV)/pyvenv.cfg FORCE
	@echo '$(TORCH) $(TORCH_INDEX)' | cmp -s - $@ || echo '$(TORCH) $(TORCH_INDEX)' > $@

$(VENV)/.torch: $(VENV)/torch.txt
	$(PIP) install $(BUILD_TOOLS)
	$(PIP) install $(FROM_INDEX) "$(TORCH)"
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml
	$(PIP) install --no-build-isolation -e ".[bench]"
	@touch $@

$(VENV)/.peers: $(VENV)/.package
	$(PIP) install --no-build-isolation -e ".[peers]"
	@touch $@

# nvcc needs no GPU; about 100 MB where it comes from PyPI.
$(VENV)/.cuda: $(VENV)/pyvenv.cfg
	@test -x "$(CUDA_HOME)/bin/nvcc" || test -x /usr/local/cuda/bin/nvcc || command -v nvcc >/dev/null || \
		$(PIP) install $(CUDA_TOOLKIT)
	@touch $@

$(VENV)/cuda.txt: $(VENV)/pyvenv.cfg FORCE
	@echo '$(RESNET_FUSED_CUDA)' | cmp -s - $@ || echo '$(RESNET_FUSED_CUDA)' > $@

$(VENV)/.build: $(VENV)/.package $(VENV)/cuda.txt CMakeLists.txt setup.py $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# For their models. torchvision is that of the same index and release, or it cannot be imported; torch stays as it is, also
# under timm, which is taken without its dependencies.
$(VENV)/.test: $(VENV)/.package
	$(PIP) install --no-build-isolation -e ".[test,lint]"
	$(PIP) install $(FROM_INDEX) torchvision "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')"
	$(PIP) install --no-deps timm
	@touch $@
