# Two commands to start with: `make train` and `make test`. Both install what is missing first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyPI's torch is the CUDA build on Linux and runs on CPU too. For a smaller, CPU-only download:
#   make setup PIP_INSTALL_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_INSTALL_OPTIONS ?=
CORPUS := data/stdlib
# Anything of the recipe, as in: make train TRAIN_OVERRIDES="--seed 1 --optimizer.learning_rate 2e-3"
TRAIN_OVERRIDES ?=

.PHONY: setup train test soak lint audit benchmark benchmark-gpu compare compare-loss docs clean

setup: $(VENV)/installed

# Installed again only when what is installed changes; the marker is written last.
$(VENV)/installed: setup.py constraints.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Tilewright needs Python 3.11 or newer; this is ' + sys.version.split()[0] + '. Name another with: make setup PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet $(PIP_INSTALL_OPTIONS) --constraint constraints.txt --editable ".[dev,peers]"
	touch $@

train: setup
	@$(BIN)/tilewright corpus build --source stdlib --output $(CORPUS)
	@$(BIN)/tilewright train quickstart $(TRAIN_OVERRIDES)

test: setup
	$(BIN)/pytest --numprocesses 2

# Runs killed some hundred times: at most half an hour. TILEWRIGHT_SOAK_MINUTES shortens it; TILEWRIGHT_CRASH_SEED, which
# a failure prints, repeats it.
soak: setup
	$(BIN)/pytest -m soak --capture=no tests/trainer tests/corpus

# mypy reads the folders under their import name through links, since they stand at the root under another.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/typed/tilewright
	@for folder in kernels model corpus trainer cli benchmarks; do ln -sfn ../../../$$folder build/typed/tilewright/$$folder; done
	MYPYPATH=build/typed $(BIN)/mypy -p tilewright
	$(BIN)/lint-imports

# One shape of every op and a few training steps beside PyTorch's and other packages': at most 5 minutes on an idle CPU.
# Others: make benchmark SUITE=kernels, training or all.
SUITE ?= quick
benchmark: setup
	@$(BIN)/tilewright benchmark run --suite $(SUITE)

# For whoever has an A100, H100 or newer: every op checked on it, its launch tables written, everything measured, and
# what came of it in one file. An hour or two; what breaks on the way is in the file too.
GPU_RECORD := runs/benchmark-gpu
benchmark-gpu: setup
	@if [ -e $(GPU_RECORD) ]; then mv $(GPU_RECORD) $(GPU_RECORD)-$$(date -r $(GPU_RECORD) +%Y%m%d-%H%M%S); fi; mkdir -p $(GPU_RECORD)
	@$(BIN)/tilewright benchmark tune --record $(GPU_RECORD)/tune.json \
	  && { $(BIN)/tilewright benchmark run --suite all --device cuda --output $(GPU_RECORD)/measured.json; status=$$?; \
	       $(BIN)/tilewright benchmark report $(GPU_RECORD)/measured.json --output $(GPU_RECORD)/report.html \
	         && (exit $$status); }; \
	status=$$?; \
	if [ -e $(GPU_RECORD)/tune.json ]; then \
	  $(BIN)/python -m zipfile -c $(GPU_RECORD).zip $(GPU_RECORD) && echo "attach to an issue: $(GPU_RECORD).zip"; \
	fi; exit $$status

# The ordinary training step beside transformers', in fresh processes: some 40 minutes on two cores, which must be idle.
# Other shapes: make compare COMPARE="--shape '42M, 8,192 tokens'".
COMPARE ?=
compare: setup
	@$(BIN)/python -c "from tilewright.cli.clone import load_benchmarks; load_benchmarks(); from tilewright.benchmarks.compare.compare import main; main()" $(COMPARE)

# linear_cross_entropy beside PyTorch's ways to the same loss: some minutes on two idle cores.
compare-loss: setup
	@$(BIN)/python -c "from tilewright.cli.clone import load_benchmarks; load_benchmarks(); from tilewright.benchmarks.compare.linear_cross_entropy import main; main()" $(COMPARE)

# What the compiler makes of every kernel and what each one issues, held to the bars and to the accepted audit of this
# triton version: at most 5 minutes on two cores. To accept a change: make audit WHY="the reason"
WHY ?=
audit: setup
	@$(BIN)/tilewright audit --baseline benchmarks/baselines $(if $(WHY),--accept --why "$(WHY)")

# docs/kernels.md, measured anew: a few minutes on two cores.
docs: setup
	$(BIN)/python benchmarks/kernels/accuracy_table.py

# What was installed and built; runs/ and data/ stay, for they may have taken long.
clean:
	rm -rf $(VENV) build *.egg-info
