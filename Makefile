# Two promises on a fresh clone with nothing but Python 3.11+: `make demo` writes out/demo.mp4, `make test` passes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXAMPLE := mi_jax/assets/examples

.PHONY: demo test lint clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "mi_jax needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# PyTorch serves the parity tests alone; its CPU build is tried first because the default one brings gigabytes of CUDA.
$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	mkdir -p out
	$(BIN)/mi-jax animate $(EXAMPLE)/portrait.png $(EXAMPLE)/speech.wav --mask $(EXAMPLE)/mask.png \
		--prompt "$$(cat $(EXAMPLE)/prompt.txt)" --out out/demo.mp4

test: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) out build *.egg-info
