# The front door. Every target sets up what it needs in .venv.

PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check

FAST    := -m "real_quick or not (real or slow)" -n $(WORKERS) --dist loadfile
OLDEST  := .venv-oldest
# What old versions say of each other, and nothing of ours.
OLD_WORDS := -W 'ignore:`torch.jit:DeprecationWarning' -W "ignore:'click.utils:DeprecationWarning"
SHAPES  := --jaxtyping-packages=loracle.model,loracle.data.packing,beartype.beartype

CUDA_VENV ?= .venv-cuda

.PHONY: demo test test-all test-real test-cuda test-oldest coverage types-at-runtime check fix bench faults clean

demo: $(VENV)/.ready            ## fine-tune a real model on real Alpaca, measured (minutes)
	$(BIN)/loracle baseline demo

test: $(VENV)/.ready-dev check  ## format, lint, types, and the suite with one run of the real model
	@echo 'Left out: the other tests of the real model and data (make test-real), tests marked slow,'
	@echo 'coverage and shapes at run time. make test-all leaves nothing out.'
	$(BIN)/python -m pytest $(FAST) --durations=20

test-all: check coverage types-at-runtime test-real  ## before a release: everything

test-real: $(VENV)/.ready-dev   ## every test of the real model and data, and those marked slow
	$(BIN)/python -m pytest -m "real or slow"

test-cuda: $(CUDA_VENV)/bin/python  ## whole runs on pretended GPUs: no GPU, but a CUDA build of PyTorch, gcc
	LORACLE_TEST_CUDA=1 $(CUDA_VENV)/bin/python -m pytest tests/cuda --confcutdir=tests/cuda \
		-p no:cacheprovider --durations=10

test-oldest: $(OLDEST)/.ready   ## the suite with the oldest allowed versions (6 GB; PYTHON=python3.13 too)
	$(OLDEST)/bin/python -m pytest $(FAST) $(OLD_WORDS)

coverage: $(VENV)/.ready-dev    ## the suite of make test; fails below 90 %
	$(BIN)/python -m pytest $(FAST) --cov --cov-report=term --cov-fail-under=90

types-at-runtime: $(VENV)/.ready-dev  ## every call of a tensor function against its annotated shapes
	$(BIN)/python -m pytest tests/model tests/data $(SHAPES)

check: $(VENV)/.ready-dev       ## never writes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fix: $(VENV)/.ready-dev         ## what check would ask for, where a tool can do it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready-bench     ## ours and the peers side by side, on this machine; stop and go on as you like
	$(BIN)/python benchmarks/peers.py

faults: $(VENV)/.ready-dev      ## hundreds of kills, full disks, flipped bits, limits; some 25 minutes of one core
	PYTHONPATH=tests $(BIN)/python benchmarks/faults.py

clean:                          ## never results
	rm -rf $(VENV) $(OLDEST) .venv-cuda .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov dist build
	find src tests experiments benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv-cuda/bin/python: constraints.txt tests/cuda/constraints.txt  ## another CUDA_VENV is used as it is
	$(PYTHON) -m venv --clear .venv-cuda
	grep -v '^torch==' constraints.txt | cat - tests/cuda/constraints.txt > .venv-cuda/constraints.txt
	.venv-cuda/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off \
		-c .venv-cuda/constraints.txt -e . pytest hypothesis || { rm -r .venv-cuda; exit 1; }
	touch $@

$(VENV)/.python: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "LoRAcle needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet --progress-bar off $$(grep -E '^pip==' constraints.txt)
	touch $@

$(VENV)/.ready: $(VENV)/.python pyproject.toml
	$(PIP) install --quiet --progress-bar off -c constraints.txt -e .
	touch $@

$(VENV)/.ready-bench: $(VENV)/.ready
	$(PIP) install --quiet --progress-bar off -c constraints.txt -e '.[bench]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	touch $@

$(OLDEST)/.ready: constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --progress-bar off -c constraints-oldest.txt -e '.[dev]'
	touch $@
