# Every target sets up its own virtual environment; nothing needs to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
# A second environment: ArviZ 1.x needs a later Python than the rest.
PYTHON312 ?= python3.12
ARVIZ1 := .venv-arviz1
DEMO_FILES := tutorials/plot_pumps.py tutorials/plot_eight_schools.py

.PHONY: demo test test-all lint types unit docs linkcheck bench bench-peers bench-nuts bench-em bench-scale format clean test-arviz1

# 2 cores and small tensors: threads would only wait for each other.
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= agg

demo: $(STAMP)  ## fit both data sets, compare with NUTS, write pictures and NetCDF to build/demo
	@for script in $(DEMO_FILES); do $(BIN)/python $$script || exit 1; done

test: lint types unit docs  ## everything that CI runs

test-all: lint types $(STAMP)  ## with tests marked slow and the tutorials at full length
	$(BIN)/pytest -m ""
	rm -rf docs/gallery docs/_build
	PYRO_VEM_SMOKE= $(MAKE) docs
	$(MAKE) demo

test-arviz1: $(ARVIZ1)/.installed  ## what touches ArviZ, with ArviZ 1.x on Python 3.12 or later; not part of CI
	$(ARVIZ1)/bin/pytest tests/test_arviz.py tests/test_result.py pyro_vem/posterior

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal

docs: export PYRO_VEM_SMOKE ?= 1
docs: $(STAMP)  ## build the pages, tutorials included, in docs/_build/html; warnings are errors
	$(BIN)/sphinx-build -W -n --keep-going -q -b html docs docs/_build/html

linkcheck: $(STAMP)  ## needs the network; not part of CI
	$(BIN)/sphinx-build -b linkcheck -D plot_gallery=0 docs docs/_build/linkcheck

bench: $(STAMP)  ## paired benchmarks; prints ratios, tables and plots go to build/bench
	$(BIN)/python tests/benchmarks/analytic_kl.py
	$(BIN)/python tests/benchmarks/scaling.py
	$(BIN)/python tests/benchmarks/imports.py
	$(BIN)/python tests/benchmarks/families.py
	$(MAKE) bench-peers

# PEERS_PYTHON names an interpreter that has the peers already; BENCH passes options, as BENCH=--quick.
bench-peers: $(if $(PEERS_PYTHON),$(STAMP),$(PEERS))  ## time to accuracy beside NumPyro, PyMC and Pyro; an hour or two
	$(BIN)/python tests/benchmarks/time_to_accuracy.py $(BENCH)

bench-nuts: $(STAMP)  ## warm and cold starts, Pyro and nutpie; half an hour for each model
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[nutpie]"
	$(BIN)/python tests/benchmarks/nuts.py $(BENCH)

bench-em: $(STAMP)  ## EM beside scikit-learn, statsmodels and pyPLNmodels; two minutes
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[em-peers]"
	$(BIN)/python tests/benchmarks/em.py $(BENCH)

bench-scale: $(STAMP)  ## training steps beside Pyro and NumPyro, ten million rows, several processes
	$(BIN)/python tests/benchmarks/processes.py
	$(or $(PEERS_PYTHON),$(BIN)/python) tests/benchmarks/scale.py $(BENCH)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,docs]"
	@touch $@

$(PEERS): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[peers]"
	@touch $@

# constraints.txt pins ArviZ 0.x; its torch has no CPU build for this Python on PyPI, so CUDA comes along.
$(ARVIZ1)/.installed: pyproject.toml constraints.txt
	$(PYTHON312) -m venv $(ARVIZ1)
	grep -v '^arviz==' constraints.txt > $(ARVIZ1)/constraints.txt
	$(ARVIZ1)/bin/pip install --quiet --constraint $(ARVIZ1)/constraints.txt --editable ".[test]" \
	  "arviz[zarr]>=1,<2"
	@touch $@

clean:
	rm -rf build docs/_build docs/gallery .pytest_cache .mypy_cache .ruff_cache
