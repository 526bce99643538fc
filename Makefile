# Each target sets up what it needs: .venv with the pinned versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# The environment of the wheel has nothing but the wheel, so that it finds what the wheel forgot.
WHEEL_PYTHON := .venv-wheel/bin/python

.PHONY: demo test bench lint types wheel clean

demo: $(READY)  ## train on real data, compare with scikit-learn and torch.optim, draw the figures
	$(BIN)/fusedreg demo

test: $(READY)  ## the whole suite with branch coverage
	$(BIN)/pytest -n 2 --benchmark-disable --cov

bench: $(READY)  ## time a step beside torch.optim's
	$(BIN)/pytest bench --benchmark-only --benchmark-columns=min,median,max --benchmark-sort=name

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

wheel: $(READY)  ## build the wheel, install it alone, use it from another directory, without triton too
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --wheel
	$(PYTHON) -m venv .venv-wheel
	$(WHEEL_PYTHON) -m pip install -q -c constraints.txt dist/*.whl
	cd / && $(CURDIR)/$(WHEEL_PYTHON) $(CURDIR)/.ci/smoke.py
	$(WHEEL_PYTHON) -m pip uninstall -q -y triton
	cd / && $(CURDIR)/$(WHEEL_PYTHON) $(CURDIR)/.ci/smoke.py

clean:
	rm -rf .venv .venv-wheel build dist *.egg-info

$(READY): pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
