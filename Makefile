# make quickstart, make test: each makes .venv, installs pinned requirements, and runs.
#   PLATFORM=gpu   takes requirements/gpu.txt (default: cpu)
#   PYTHON=...     the interpreter of the virtual environment

PLATFORM ?= cpu
PYTHON ?= $(if $(filter gpu,$(PLATFORM)),python3.12,python3.11)
BIN := .venv/bin
RUN_STAMP := .venv/.installed-$(PLATFORM)
DEV_STAMP := .venv/.installed-dev

.PHONY: quickstart test lint format bench clean

quickstart: $(RUN_STAMP)
	$(BIN)/python examples/quickstart/run.py

test: $(RUN_STAMP) $(DEV_STAMP)
	$(BIN)/python -m pytest

lint: $(RUN_STAMP) $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_rl patches

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(RUN_STAMP)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(RUN_STAMP): requirements/$(PLATFORM).txt setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/$(PLATFORM).txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(DEV_STAMP): requirements/dev.txt | $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	touch $@

clean:
	rm -rf .venv build *.egg-info
