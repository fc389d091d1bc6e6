# make demo      the whole pipeline on synthetic patients, 2 and a half minutes on 2 cores, no data, no GPU
# make test      the fast tests
# make check     style, types, import directions, licences
# make nightly   everything: slow tests, every command of the docs
# make gpu-bench benchmarks on a CUDA device
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check format nightly bench gpu-bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/hilum demo --out outputs/demo

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tests/check_licences.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

nightly: setup
	$(BIN)/python -m pytest -m "not gpu"

bench: setup
	$(BIN)/hilum bench all

gpu-bench: setup
	$(BIN)/python -m pytest -m gpu
	$(BIN)/hilum bench pretrain-step

clean:
	rm -rf .venv outputs
