# make quickstart         watch a model learn by reinforcement, about eight minutes on two CPU cores
# make test-fast          unit tests, rules of the house, every config: some four minutes
# make test               all tests: some 40 minutes on two cores
#   test-trainer            all but those with real servers
#   test-servers            those with real SGLang servers
# make test-kernels       tests of the Triton kernels, in Triton's interpreter: no GPU needed, half a minute
# make campaign           kill runs at random and compare what they leave: an hour; CASES=servers for those with servers
# make test-gpu           checks and benchmarks that need a GPU; wants PLATFORM=gpu
# make lint               ruff, its format, mypy
# make format             mend what ruff can mend
# make bench              all benchmarks for CPUs
# make sglang             install SGLang beside the rest
# make clean              remove .venv and builds
# make help               print this
#
# Each target makes .venv and installs pinned requirements first, where they are not there yet.
#   ENGINE=sglang         quickstart with rollouts from a real SGLang server
#   PLATFORM=gpu          take requirements/gpu.txt (default: cpu)
#   WHEELS=folder         install from the wheels in it alone: for machines without a network
#   PYTHON=python3.12     the interpreter of the virtual environment

.DEFAULT_GOAL := help
PLATFORM ?= cpu
ENGINE ?= transformers
PYTHON ?= $(if $(filter gpu,$(PLATFORM)),python3.12,python3.11)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP += $(if $(WHEELS),--no-index --find-links $(WHEELS))
RUN_STAMP := .venv/.installed-$(PLATFORM)
SGLANG_STAMP := .venv/.installed-sglang-$(PLATFORM)
DEV_STAMP := .venv/.installed-dev
BENCH_STAMP := .venv/.installed-bench-gpu
# On a GPU machine Triton comes with torch. Elsewhere it gets a folder of its own, where only tests of kernels find it.
TRITON_STAMP := $(if $(filter cpu,$(PLATFORM)),build/triton/.installed)
NVIDIA := $(wildcard /dev/nvidia0)

.PHONY: help quickstart sglang test test-fast test-trainer test-servers test-kernels campaign test-gpu lint format bench clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: $(RUN_STAMP) $(if $(filter sglang,$(ENGINE)),$(SGLANG_STAMP))
	$(BIN)/python -m examples.quickstart.run --engine $(ENGINE)

sglang: $(SGLANG_STAMP)

# Servers mostly wait for each other, so both halves run at the same time, each to its end.
test: $(RUN_STAMP) $(SGLANG_STAMP) $(DEV_STAMP) $(TRITON_STAMP)
	$(MAKE) --jobs=2 --keep-going --output-sync=target test-trainer test-servers

# Two workers, since much of these tests is waiting for small processes.
test-fast: $(RUN_STAMP) $(SGLANG_STAMP) $(DEV_STAMP) $(TRITON_STAMP)
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal -m "not slow" --durations=5 tests/unit tests/house tests/configs

test-trainer:
	$(BIN)/python -m pytest --durations=15 --ignore=tests/servers

test-servers:
	$(BIN)/python -m pytest --durations=15 tests/servers

test-kernels: $(RUN_STAMP) $(DEV_STAMP) $(TRITON_STAMP)
	$(BIN)/python -m pytest tests/unit/parallel/test_vocab_kernels.py

campaign: $(RUN_STAMP) $(SGLANG_STAMP) $(DEV_STAMP)
	$(BIN)/python -m tests.e2e.campaign $(CASES)

# Everything that this machine's GPU can run; with PLATFORM=cpu, the word that there is none.
ifeq ($(PLATFORM) $(NVIDIA),cpu /dev/nvidia0)
test-gpu:
	@echo "this machine has a GPU, but PLATFORM=cpu has no software for it: make test-gpu PLATFORM=gpu" >&2; exit 1
else
test-gpu: $(RUN_STAMP) $(if $(filter gpu,$(PLATFORM)),$(BENCH_STAMP))
	$(BIN)/python benchmarks/gpu/run.py
endif

lint: $(RUN_STAMP) $(SGLANG_STAMP) $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_rl patches examples/own_method

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(RUN_STAMP) $(SGLANG_STAMP)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(RUN_STAMP): requirements/$(PLATFORM).txt setup.py | $(BIN)/python
ifeq ($(PLATFORM),gpu)  # Transformer Engine's bindings are built against the torch that is there already
	$(PIP) $(shell grep -E '^(torch|setuptools)==' requirements/gpu.txt)
	NVTE_BUILD_USE_NVIDIA_WHEELS=1 $(PIP) --no-build-isolation -r requirements/gpu.txt
else
	$(PIP) -r requirements/$(PLATFORM).txt
endif
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(SGLANG_STAMP): requirements/sglang_$(PLATFORM).txt | $(RUN_STAMP)
	$(PIP) --no-deps -r requirements/sglang_$(PLATFORM).txt
	touch $@

$(BENCH_STAMP): requirements/bench_gpu.txt | $(RUN_STAMP)
	$(PIP) -r $<
	touch $@

$(DEV_STAMP): requirements/dev.txt | $(RUN_STAMP)
	$(PIP) -r requirements/dev.txt
	touch $@

build/triton/.installed: requirements/triton_cpu.txt | $(RUN_STAMP)
	rm -rf build/triton
	$(PIP) --no-deps --target build/triton -r $<
	touch $@

clean:
	rm -rf .venv build *.egg-info
