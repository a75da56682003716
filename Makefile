# Two commands: `make demo` and `make test`. Both need Python >= 3.10, make and a C++ compiler (for torch.compile),
# and make .venv when it is missing. Others: `make check`, `make format`, `make cards`, `make test-matrix` (the wheel, and
# saved folders in the oldest and newest Transformers), `make test-oldest`, `make test-llamacpp` (compiles llama.cpp),
# `make fuzz`, `make clean`.
# Settings: PYTHON=python3.12, VENV=folder, PYTEST_FLAGS="-k bloom -x"; FULL=1 and RECORD=1 for the matrix.

PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -n logical --maxprocesses 4 --dist worksteal
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
export HF_HUB_OFFLINE = 1

OLDEST = $(VENV)-oldest

.PHONY: help demo test test-matrix test-oldest test-llamacpp fuzz check format cards clean
help:
	@sed -n '1,/^$$/s/^# //p' Makefile

demo: $(VENV)/.base
	$(VENV)/bin/python examples/demo.py

test: check
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

# The wheel, and what saved folders compute in environments without this package. FULL=1: more of Transformers, torch and
# Python, gigabytes of them. RECORD=1 puts the rows into the README.
test-matrix: $(VENV)/.dev
	$(VENV)/bin/python -m tests.matrix $(if $(filter-out 0,$(FULL)),--full) $(if $(filter-out 0,$(RECORD)),--record)

# The same tests with the oldest Transformers that is supported.
test-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest $(PYTEST_FLAGS)

# GGUF files in llama.cpp itself, which pip compiles: minutes.
test-llamacpp: $(VENV)/.llamacpp
	$(VENV)/bin/python -m pytest tests/test_llamacpp.py

# Bad files for every loader, new ones each time: FUZZ_SECONDS=600. The figures of a long run are quoted in SECURITY.md.
FUZZ_SECONDS ?= 120
fuzz: $(VENV)/.dev
	$(VENV)/bin/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# model_cards/: the cards of the shipped and of published checkpoints.
cards: $(VENV)/.base
	$(VENV)/bin/python -m model_cards

clean:
	rm -rf $(VENV) $(OLDEST) .venv-matrix-* build dist .pytest_cache .mypy_cache .ruff_cache

# Stamp files: an installation is repeated only when one of these two files changes.
# torch comes first and pinned, so that nothing else draws in a second build of it.
$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; $(PYTHON) is " \
	    + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt --editable '.[plots]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install -c constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.llamacpp: $(VENV)/.dev
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF" $(PIP) install -c constraints.txt llama-cpp-python
	@touch $@

$(OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -c constraints.txt torch
	grep -v -e '^transformers==' -e '^huggingface_hub==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -c $(OLDEST)/constraints.txt transformers==5.17.0 --editable '.[dev]'
	@touch $@
