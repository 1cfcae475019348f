# make demo | serve | test | lint | bench: each sets up .venv first; a second run costs seconds.
#   PYTHON=python3.12       another interpreter (3.11 or newer)
#   TORCH_SPEC=torch==...   another build of torch, see the top of constraints.txt
PYTHON     ?= python3
TORCH_SPEC ?= torch
VENV       := .venv
BIN        := $(VENV)/bin
STAMP      := $(VENV)/.setup-done
PIP        := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test lint bench clean

help:  ## this list
	@sed -n 's|^\([a-z]*\):.*## |make \1: |p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with torch, streamgen (editable) and the tools of the tests

# torch first and by itself: nothing that comes later may then bring another build of it.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "streamgen: no '$(PYTHON)' here: install Python 3.11 or newer (Debian: apt-get install python3 python3-venv), or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "streamgen: needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "streamgen: '$(PYTHON)' has no venv module: install it (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "setup 1/2: torch and the build tools (the long part)"
	@$(PIP) "$(TORCH_SPEC)" setuptools hatchling
	@echo "setup 2/2: streamgen and what it needs"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup  ## stream two prompts to demo.mp4, the second taking over while the first plays
	$(BIN)/streamgen stream "two large green circles bouncing over a grass background" \
	  --switch "8=two large yellow rings moving left over a sunset background" \
	  --seconds 16 --seed 7 --scale 4 --out demo.mp4 --overwrite

serve: setup  ## the page on localhost: open the address that it prints
	$(BIN)/streamgen serve

test: setup  ## the whole suite, two workers of one thread each
	@sh tests/browser/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: setup  ## ruff (rules and format) and mypy over the five packages together
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## time per block beside the bare matrix products and attention of the same shapes
	$(BIN)/streamgen bench

clean:  ## remove .venv and the caches of the tools
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache
