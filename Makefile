# `make demo` and `make test` set everything up by themselves, in .venv.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint figures clean

demo: $(VENV)/installed
	$(BIN)/edgekd build --target cpu

test: $(VENV)/tested
	$(BIN)/ruff check edgekd tests deploy benchmarks
	$(BIN)/ruff format --check edgekd tests deploy benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest

figures: $(VENV)/installed
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf $(VENV) runs build dist

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "edgekd needs Python 3.11 or newer; set PYTHON="'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[test]'
	touch $@
