PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test

.PHONY: demo test test-long test-all-networks bench bench-quick lint format clean

demo: $(STAMP)
	$(BIN)/quiesce demo --out runs/demo --force

test: lint
	$(BIN)/python -m pytest -n 2 -m "not long and not gpu"

test-long: $(TEST_STAMP)
	$(BIN)/python -m pytest

test-all-networks: $(TEST_STAMP)
	$(BIN)/python tests/networks/run.py

bench-quick: $(TEST_STAMP)
	$(BIN)/python benchmarks/bench.py run quick
	$(BIN)/python benchmarks/bench.py page

bench: $(TEST_STAMP)
	cd benchmarks && ../$(BIN)/python -m emoji1000.art
	$(BIN)/python benchmarks/bench.py run
	$(BIN)/python benchmarks/bench.py page

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[onnx]"
	touch $@

$(TEST_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs
