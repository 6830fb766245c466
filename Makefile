# make quickstart   the default sweep on this machine: a report within minutes
# make test         the tests
# make check        tests, style, types and the import contract, as CI runs them
#
# Everything is installed into .venv; PYTHON names the interpreter that makes it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Each step needs megabytes of scratch memory; asking the C library for huge pages makes a CPU's
# steps about a fifth faster. Harmless where the setting is unknown.
RUN := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python

.PHONY: quickstart test check install clean

quickstart: $(VENV)/installed
	$(RUN) -m experiments.run --sweep

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(MAKE) test

install: $(VENV)/installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11 to 3.13 is needed; name one with: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	  { echo "this Python cannot make environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-test: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-dev: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	@touch $@ $(VENV)/installed-test $(VENV)/installed

clean:
	rm -rf $(VENV)
