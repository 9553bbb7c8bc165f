# `make demo` and `make test` set everything up by themselves, in .venv.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test docs image-test torture audit figures clean

demo: $(VENV)/installed
	$(BIN)/edgekd build --target cpu

test: $(VENV)/tested
	$(BIN)/ruff check edgekd tests deploy benchmarks docs examples
	$(BIN)/ruff format --check edgekd tests deploy benchmarks docs examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# builds the Dockerfile with buildah and runs the images; needs root, buildah and debootstrap
image-test: $(VENV)/tested
	EDGEKD_IMAGE_TEST=1 $(BIN)/python -m pytest -s --durations=0 tests/test_image.py

# breaks builds in every way; about half an hour. As root also with full disks
torture: $(VENV)/installed
	$(BIN)/python -m tests.torture

# known weaknesses of the pinned packages; fails where no index answers for one of them
audit: $(VENV)/tested
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) pip-audit
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# the documentation site, in site/; fails on a broken link or a stale reference page
docs: $(VENV)/documented
	$(BIN)/python docs/generate.py --check
	$(BIN)/zensical build --clean --strict

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

$(VENV)/documented: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	touch $@
