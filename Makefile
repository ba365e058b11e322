# make repro: install what is needed, then run the pipeline at the scale that params.yaml names.
# make test:  install what is needed, then run the tests.
# make gpu-check: does a GPU compute what the CPU does, and how fast?
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test install ready lint lab bench gpu-check
repro: install ready
	dvc repro
	@echo "All notebooks on one page: results/$$(sed -n 's/^scale: *\([a-z]*\).*/\1/p' params.yaml)/report/index.html"

test: install
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadgroup

lint: install
	ruff check . && ruff format --check .

bench: install
	python -m benchmarks

gpu-check: install
	python -m pytest -m gpu
	python -m benchmarks.gpu

lab: install
	JUPYTER_PATH= JUPYTER_PREFER_ENV_PATH=1 jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/explore.ipynb

# A zip archive has no .git, which DVC asks for unless told otherwise.
ready: install
	@test -e .git || (echo "No git here: DVC runs without it. dvc exp run needs a clone (git clone)."; \
	  dvc config --local core.no_scm true)

install: $(VENV)/installed
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "Python 3.11 to 3.14 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@
