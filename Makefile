# make demo   from a fresh clone to an image: environment, export of the sample model, one prompt
# make test   the tests         make lint   ruff and mypy         make clean   what the others made
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Python compiles what is imported; pip would compile everything, for a minute.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test lint score clean

demo: $(READY)
	@$(BIN)/python -m samples.demo

# Two processes, a file's tests together: they share what it exports. In the files' order, the long ones first.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

score: $(READY)
	$(BIN)/python -m samples.shapes.score --bundle bundles/shapes --require 97 85

# torch first and by itself: a bare `torch` among other requirements may pick a build with gigabytes of CUDA.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) bundles out build dist
