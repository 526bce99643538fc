# Each target sets up what it needs: .venv with the pinned versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# The trainers' packages stay out of .venv, so that nothing comes to need them.
INTEGRATION := .venv-integration
# The environment of the wheel has nothing but the wheel, so that it finds what the wheel forgot.
WHEEL_PYTHON := .venv-wheel/bin/python

.PHONY: check demo test test-all faults fuzz test-integration test-triton bench docs figures lint types wheel clean

check: $(READY)  ## whether every optimizer is right on this machine, and which path runs
	$(BIN)/fusedreg check

demo: $(READY)  ## train on real data, compare with scikit-learn and torch.optim, draw the figures
	$(BIN)/fusedreg demo

test: $(READY)  ## what every change runs; COVERAGE=--cov counts the branches too, in twice the time
	$(BIN)/pytest -n 2 --dist worksteal --benchmark-disable -m "not slow" $(COVERAGE)

test-all: $(READY)  ## every test, or those of TESTS='-m slow'
	$(BIN)/pytest -n 2 --dist worksteal --benchmark-disable $(TESTS)

faults: $(READY)  ## plant faults one by one, and see which tests catch them
	$(BIN)/python tests/faults.py $(FAULTS)

fuzz: $(READY)  ## random programs around the optimizers, in other ones than the suite's
	$(BIN)/python tests/lib/stateful.py $(FUZZ)

test-integration: $(INTEGRATION)/.ready  ## train with transformers, accelerate and lightning
	$(INTEGRATION)/bin/pytest tests/integration

$(INTEGRATION)/.ready: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv $(INTEGRATION)
	$(INTEGRATION)/bin/python -m pip install -c constraints.txt -e '.[integration]'
	touch $@

# Other tritons than the pinned one: the one before, and the newest.
TRITONS := 3.6.0 3.9.0
FUSED := fused and (elastic_net or adamw)

test-triton: $(TRITONS:%=.triton/%)  ## compile and interpret the kernels with other tritons
	for version in $(TRITONS); do \
		echo "triton $$version" && PYTHONPATH=$(CURDIR)/.triton/$$version \
			$(BIN)/pytest -q -n 2 --benchmark-disable tests/kernels/test_compile.py || exit 1; \
		PYTHONPATH=$(CURDIR)/.triton/$$version $(BIN)/pytest -q -n 2 --benchmark-disable \
			tests/steps/test_oracle.py tests/steps/test_amp.py -k "$(FUSED)" || exit 1; \
	done

.triton/%: | $(READY)
	$(BIN)/python -m pip install -q --no-deps --target $@ triton==$*

bench: $(READY)  ## time a step beside torch.optim's; results and figures go into bench/results/latest/
	$(BIN)/python bench/run.py $(BENCH)

docs: $(READY)  ## build the site into site/, with figures drawn on this machine
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/figures/all.py site/figures

figures: $(READY)  ## draw the figures of the documentation anew, in their place
	$(BIN)/python docs/figures/all.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## as the package is installed: kernels/ is fusedreg.kernels
	rm -rf build/types && mkdir -p build/types
	cp -r fusedreg build/types && cp -r kernels build/types/fusedreg
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

wheel: $(READY)  ## build the wheel, install it alone, use it from another directory, without triton too
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --wheel
	$(PYTHON) -m venv .venv-wheel
	$(WHEEL_PYTHON) -m pip install -q -c constraints.txt dist/*.whl
	cd / && $(CURDIR)/$(WHEEL_PYTHON) $(CURDIR)/.ci/smoke.py
	$(WHEEL_PYTHON) -m pip uninstall -q -y triton
	cd / && $(CURDIR)/$(WHEEL_PYTHON) $(CURDIR)/.ci/smoke.py

clean:
	rm -rf .venv .venv-wheel $(INTEGRATION) .triton build dist site *.egg-info

$(READY): pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
