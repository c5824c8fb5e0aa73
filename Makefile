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

.PHONY: setup train test lint docs clean

setup: $(VENV)/installed

# Installed again only when what is installed changes; the marker is written last.
$(VENV)/installed: setup.py constraints.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Tilewright needs Python 3.11 or newer; this is ' + sys.version.split()[0] + '. Name another with: make setup PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet $(PIP_INSTALL_OPTIONS) --constraint constraints.txt --editable ".[dev]"
	touch $@

train: setup
	@$(BIN)/tilewright corpus build --source stdlib --output $(CORPUS)
	@$(BIN)/tilewright train quickstart $(TRAIN_OVERRIDES)

test: setup
	$(BIN)/pytest --numprocesses 2

# mypy reads the folders under their import name through links, since they stand at the root under another.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/typed/tilewright
	@for folder in kernels model corpus trainer cli benchmarks; do ln -sfn ../../../$$folder build/typed/tilewright/$$folder; done
	MYPYPATH=build/typed $(BIN)/mypy -p tilewright
	$(BIN)/lint-imports

# docs/kernels.md, measured anew: a few minutes on two cores.
docs: setup
	$(BIN)/python benchmarks/kernels/accuracy_table.py

# What was installed and built; runs/ and data/ stay, for they may have taken long.
clean:
	rm -rf $(VENV) build *.egg-info
