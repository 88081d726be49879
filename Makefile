# Two promises on a fresh clone with nothing but Python 3.11+: `make demo` writes out/demo.mp4, `make test` passes.
PYTHON ?= python3
VENV := .venv
NEWEST := .venv-newest
BIN := $(VENV)/bin
EXAMPLE := mi_jax/assets/examples

.PHONY: demo test test-long test-newest lint clean

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
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not long"

# What takes most of a minute or more each: whole runs and their ends, full widths, programs for meshes.
test-long: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist load -m long

# Media, models, sampling and training on the newest Python that is here, if it is newer than the one that `make test`
# takes. PyTorch need not have a build for it: the parity tests are left out.
test-newest: $(BIN)/python
	@version=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	newest=$$(.ci/newest-python $$version); \
	if [ -z "$$newest" ]; then echo "test-newest: skipped, no supported Python newer than $$version is here"; exit 0; fi; \
	set -ex; \
	test -x $(NEWEST)/bin/python || $$newest -m venv $(NEWEST); \
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip; \
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[test-without-torch,tokamax]'; \
	MI_JAX_TESTS_WITHOUT_TORCH=1 $(NEWEST)/bin/python -m pytest --numprocesses 2 --dist loadfile -m "not long" \
		tests/data tests/models tests/sample tests/train

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) $(NEWEST) out build *.egg-info
