# make demo | test | lint | docs | bench | bench-quality | reproduce: each sets up .venv by itself, from pyproject.toml.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
TRAIN_DATA ?=
VAL_DATA ?=
QUALITY_FLAGS ?=
GRID ?=
REPRODUCE_FLAGS ?=
# What tests compare evaluations with. Without its dependencies, of which dev has all but 100 MB of caption metrics.
CLIP_BENCHMARK := 1.6.2

.PHONY: demo test lint docs reference requirements bench bench-quality reproduce clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make demo   make a data set, train five small CLIP models on it, compare them (CPU, minutes)"
	@echo "make test   run the tests"
	@echo "make lint   style and types"
	@echo "make docs   build the documentation site into site/"
	@echo "make bench  run the benchmarks (CPU, some ten minutes)"
	@echo "make bench-quality TRAIN_DATA='...tar' VAL_DATA='...tar'   time to quality (hours)"
	@echo "make reproduce GRID=experiments/small/rates/rates.yaml REPRODUCE_FLAGS='--data EMOJI=...'   a grid of runs, and its tables"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; set PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	$(RUN) -m pip install --quiet --no-deps 'clip-benchmark==$(CLIP_BENCHMARK)'
	@touch $@

demo: $(VENV)/.installed
	$(RUN) scripts/demo.py

test: $(VENV)/.installed
	$(RUN) -m pytest -n auto --dist worksteal $(PYTEST_FLAGS)

lint: $(VENV)/.installed
	$(RUN) -m ruff check src experiments tests scripts benchmarks
	$(RUN) -m ruff format --check src experiments tests scripts benchmarks
	$(RUN) -m mypy

# Strict: a broken link, a missing anchor or a page outside the navigation is an error.
docs: $(VENV)/.installed
	$(RUN) -m mkdocs build --strict

reference: $(VENV)/.installed
	$(RUN) scripts/make_reference.py

requirements: $(VENV)/.installed
	$(RUN) scripts/make_requirements.py

bench: $(VENV)/.installed
	$(RUN) benchmarks/all.py $(BENCH_FLAGS)

# QUALITY_FLAGS: further flags of benchmarks/time_to_quality.py, such as --noise-list.
bench-quality: $(VENV)/.installed
	@test -n "$(TRAIN_DATA)" -a -n "$(VAL_DATA)" || { echo "error: give TRAIN_DATA and VAL_DATA" >&2; exit 1; }
	$(RUN) benchmarks/time_to_quality.py --train-data '$(TRAIN_DATA)' --val-data '$(VAL_DATA)' \
		--out bench/quality $(QUALITY_FLAGS)

# REPRODUCE_FLAGS: flags of `python -m experiments`, such as --data, --list and --collect.
reproduce: $(VENV)/.installed
	@test -n "$(GRID)" || { echo "error: give GRID, as in GRID=experiments/small/rates/rates.yaml" >&2; exit 1; }
	$(RUN) -m experiments $(GRID) $(REPRODUCE_FLAGS)

# Not logs and bench, which may hold days of training.
clean:
	rm -rf $(VENV) demo site .mypy_cache .ruff_cache .pytest_cache
