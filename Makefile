# A fresh machine needs only Python >= 3.11 and make; `make train` and `make test` install everything else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
ARGS ?=
JOB ?= jobs/train_sop.py

# If set, every Ray process recompiles all its imports, which makes start-up three times as slow.
unexport PYTHONDONTWRITEBYTECODE

# `make gpu` does no set-up; it uses any Python with the required packages.
PYTHON_GPU ?= $(or $(wildcard $(BIN)/python),$(PYTHON))

.PHONY: train submit test test-rest test-all test-lowest gpu lint setup lock

train: setup
	$(BIN)/python jobs/train_sop.py $(ARGS)

# Submit to the cluster at ADDRESS (needs its token): make submit ADDRESS=http://127.0.0.1:8265 ARGS="--num-workers 4"
submit: setup
	RAY_AUTH_MODE=token $(BIN)/ray job submit --address $(ADDRESS) --working-dir . \
		--metadata-json '{"git_commit": "$(shell git rev-parse HEAD 2> /dev/null)"}' -- python $(JOB) $(ARGS)

PYTEST = $(BIN)/python -m pytest -n 2 --dist loadgroup

# Run before submitting a change: everything except the slow tests.
test: setup
	$(PYTEST) $(ARGS)

test-rest: setup
	$(PYTEST) -m slow $(ARGS)

test-all: setup
	$(PYTEST) -m "slow or not slow" $(ARGS)

# On a machine with a GPU: run the GPU tests, then the benchmarks; both are reported in gpu_report.json.
gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
gpu:
	rm -f build/gpu_tests.xml
	-timeout -k 5 180 $(PYTHON_GPU) -m pytest tests/gpu -o addopts=-ra --confcutdir=tests/gpu --junit-xml=build/gpu_tests.xml
	$(PYTHON_GPU) jobs/bench/gpu_report.py --tests build/gpu_tests.xml $(ARGS)

lint: setup
	$(BIN)/ruff check nsl_dist jobs cluster tests
	$(BIN)/ruff format --check nsl_dist jobs cluster tests
	$(BIN)/mypy nsl_dist jobs cluster tests

setup: $(VENV)/.current

# nsl_dist/__init__.py is a prerequisite because it defines the installed version.
$(VENV)/.current: requirements.lock pyproject.toml nsl_dist/__init__.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

# Update only what pyproject.toml requires; to upgrade everything: make lock ARGS=--upgrade
lock:
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate --quiet \
		--output-file requirements.lock $(ARGS)

# Run the fast tests with the oldest Python and packages that pyproject.toml allows.
test-lowest: setup
	$(BIN)/uv venv --quiet --clear --python 3.11 $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --all-extras \
		--requirement pyproject.toml --editable .
	$(LOWEST)/bin/python -m pytest tests/unit tests/distributed $(ARGS)
