# A fresh machine needs make and Python >= 3.11 with the venv module, nothing else.
#   make demo   the main job on a small model: install, tune, prune, compare (OUT= chooses another folder)
#   make test   installs what the tests need, then runs every test (ARGS= goes to pytest)
#   make newest  every test with the newest transformers, trl and peft, beyond the ranges of pyproject.toml, in .venv-newest
#   make lint   ruff and mypy
#   make compare CONFIG=tiny  methods x ratios x seeds under one budget; CONFIG= one of benchmarks/compare/configs or a file,
#                             ARGS= further flags (--help lists them)
#   make docs   the pages of docs/ as a site in build/site; a link that leads nowhere is an error
#   make package  wheel and sdist in dist/, built and checked
#   make audit  known vulnerabilities of the packages in .venv, by pip-audit, and how many packages were skipped
#   make mutants  do the tests of method/ and surgery/ notice a fault? 300 mutants, about 12 minutes (ARGS= goes to the run)

PYTHON ?= python3
OUT ?= runs/demo
JOBS ?= 2
ARGS ?=
CONFIG ?= tiny

VENV := .venv
INSTALLED := $(VENV)/.installed
# The demo needs half of the packages that the tests do, and so half of the time.
DEMO_INSTALLED := $(or $(wildcard $(INSTALLED)),$(VENV)/.installed-demo)

# Absolute, because pip also hands it to the isolated environment that builds the package.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test newest lint docs package compare audit mutants clean
help:
	@sed -n 's/^#   //p' Makefile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable '.[dev]'
	@touch $@

$(VENV)/.installed-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable '.[demo]'
	@touch $@

demo: $(DEMO_INSTALLED)
	$(VENV)/bin/pat demo --output_dir $(OUT)

# One thread a process: two workers share two cores, and sums keep their order from run to run.
test: export OMP_NUM_THREADS := 1
test: export HF_HUB_OFFLINE := 1
test: $(INSTALLED)
	@$(VENV)/bin/python -m pytest -m "" --numprocesses $(JOBS) --dist worksteal $(ARGS)

newest: export OMP_NUM_THREADS := 1
newest: export HF_HUB_OFFLINE := 1
newest: export PIP_CONSTRAINT :=
newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" --editable '.[dev]'
	.venv-newest/bin/python -m pip install --quiet --upgrade --no-deps transformers trl peft
	@.venv-newest/bin/python -m pip list | grep -E '^(transformers|trl|peft) '
	@.venv-newest/bin/python -m pytest -m "" --numprocesses $(JOBS) --dist worksteal $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

READY_MADE := $(wildcard benchmarks/compare/configs/$(CONFIG).yaml)
compare: export PYTHONPATH := benchmarks
compare: $(INSTALLED)
	@$(VENV)/bin/python -m compare --config $(or $(READY_MADE),$(CONFIG)) $(ARGS)

docs package: $(VENV)/.docs
$(VENV)/.docs: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --editable '.[docs]'
	@touch $@

docs: export NO_MKDOCS_2_WARNING := 1
docs:
	$(VENV)/bin/mkdocs build --strict --quiet

package:
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist . > /dev/null
	$(VENV)/bin/twine check --strict dist/*

audit: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --editable '.[audit]'
	@$(VENV)/bin/python benchmarks/audit.py $(ARGS)

mutants: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --editable '.[mutation]'
	$(VENV)/bin/python benchmarks/mutation.py --workers $(JOBS) $(ARGS)

clean:
	rm -rf $(VENV) .venv-newest .mypy_cache .pytest_cache .ruff_cache build dist
