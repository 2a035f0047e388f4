# Two commands for a fresh checkout: `make demo` and `make test`. Each makes its own virtual environment.

PYTHON ?= python3
DEMO := .venv-demo/bin
TEST := .venv-test/bin
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet -c constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint types unit doctest docs package fuzz clean check-python

help: ## list the targets
	@echo "Usage: make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile | while IFS='	' read -r name text; do \
		printf '  %-8s  %s\n' "$$name" "$$text"; done

demo: .venv-demo/installed ## train a small SAGAN on real digits, on the CPU, into runs/demo
	@echo "==> demo: examples/imagenet_sagan.py, results in runs/demo"
	$(DEMO)/python examples/imagenet_sagan.py demo --out runs/demo

test: lint types unit doctest docs package ## every check below, in this order
	@echo "==> all checks passed"

lint: .venv-test/installed ## ruff: rules and format
	@echo "==> ruff check"
	$(TEST)/ruff check .
	@echo "==> ruff format --check"
	$(TEST)/ruff format --check .

types: .venv-test/installed ## mypy over the package and the examples
	@echo "==> mypy"
	$(TEST)/mypy

# One torch thread for each worker: xdist already fills the cores.
unit: .venv-test/installed ## pytest over tests/, all cores
	@echo "==> pytest"
	OMP_NUM_THREADS=1 $(TEST)/python -m pytest -n auto --dist worksteal

# Kernel files import Triton, which a CPU build of torch may lack; they hold no doctests.
doctest: .venv-test/installed ## the examples in the package's docstrings
	@echo "==> doctests of the package"
	$(TEST)/python -m pytest --doctest-modules --ignore-glob='*triton*.py' sagan_layers

docs: .venv-test/installed ## the documentation, into docs/_build/html; a warning is an error
	@echo "==> docs"
	$(TEST)/sphinx-build --fresh-env -W --keep-going -b html docs docs/_build/html
	@echo "==> every page as a phone and a desk show it, where there is Chromium"
	$(TEST)/python docs/check_pages.py docs/_build/html || test $$? -eq 2

package: .venv-test/installed ## build, check what is in the archives, use the wheel outside the checkout
	@echo "==> build the sdist, and the wheel from it"
	rm -rf dist
	$(TEST)/python -m build --no-isolation
	$(TEST)/twine check --strict dist/*
	@echo "==> contents of the archives"
	$(TEST)/python tests/packaging/archive_contents.py dist
	@echo "==> smoke test of the installed wheel"
	$(TEST)/python tests/packaging/wheel_smoke.py dist

fuzz: .venv-test/installed ## hostile calls, files and kills, about 15 minutes; not part of test
	@echo "==> campaigns of hostile input, results in benchmarks/results/fuzz.json"
	OMP_NUM_THREADS=1 $(TEST)/python -m benchmarks.fuzz

clean: ## remove what these targets made, runs/ excepted
	rm -rf .venv-demo .venv-test dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv-demo/installed: EXTRAS := demo
# Byte-compiling all of torch takes as long as the rest of the install, and the demo imports little of it.
.venv-demo/installed: PIP_INSTALL += --no-compile
.venv-test/installed: EXTRAS := dev
.venv-demo/installed .venv-test/installed: pyproject.toml constraints.txt | check-python
	@echo "==> $(@D): a virtual environment with the extra $(EXTRAS); the first time takes a minute or two"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

check-python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "'$(PYTHON)' was not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Python 3.10 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' has no venv module: install it (on Debian and Ubuntu the package python3-venv)" >&2; exit 1; }
