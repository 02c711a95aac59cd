# make quickstart, make test: each makes .venv, installs pinned requirements, and runs.
#   ENGINE=sglang  quickstart with rollouts from a real SGLang server
#   PLATFORM=gpu   takes requirements/gpu.txt (default: cpu)
# make test-gpu PLATFORM=gpu: checks and benchmarks that need a GPU.
#   WHEELS=folder  install from the wheels in it alone: for machines without a network
#   PYTHON=...     the interpreter of the virtual environment

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
NVIDIA := $(wildcard /dev/nvidia0)

.PHONY: quickstart sglang test test-trainer test-servers test-gpu lint format bench clean

quickstart: $(RUN_STAMP) $(if $(filter sglang,$(ENGINE)),$(SGLANG_STAMP))
	$(BIN)/python -m examples.quickstart.run --engine $(ENGINE)

sglang: $(SGLANG_STAMP)

# Servers mostly wait for each other, so both halves run at the same time, each to its end.
test: $(RUN_STAMP) $(SGLANG_STAMP) $(DEV_STAMP)
	$(MAKE) --jobs=2 --keep-going --output-sync=target test-trainer test-servers

test-trainer:
	$(BIN)/python -m pytest --durations=15 --ignore=tests/servers

test-servers:
	$(BIN)/python -m pytest --durations=15 tests/servers

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
	$(BIN)/mypy megatron_rl patches

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

clean:
	rm -rf .venv build *.egg-info
