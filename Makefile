# make demo      the whole pipeline on synthetic patients, 2 and a half minutes on 2 cores, no data, no GPU
# make test      the fast tests
# make check     style, types, import directions, licences
# make nightly   everything: slow tests, every command of the docs
# make gpu-bench benchmarks on a CUDA device
PYTHON ?= python3
BIN := .venv/bin
GPU_READY := import cv2, jaxtyping, pytest, rich, safetensors, torch, typer, yaml; assert torch.cuda.is_available()

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

# An interpreter that sees the GPU and has what training needs (a GPU image's own, say) is taken as it is.
gpu-bench:
	@for python in $(BIN)/python $(PYTHON); do \
		if $$python -c "$(GPU_READY)" 2>/dev/null; then exec $$python benchmarks/_gpu_bench.py; fi; \
	done; \
	$(MAKE) setup && $(BIN)/python benchmarks/_gpu_bench.py

clean:
	rm -rf .venv outputs
