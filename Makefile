# Everything that a fresh machine with Python >= 3.11 and make needs; `make train` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Where it is set, each of a cluster's many processes compiles all that it imports, anew: three times as slow.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test lint setup lock

train: setup
	$(BIN)/python jobs/train_sop.py $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check nsl_dist jobs tests
	$(BIN)/ruff format --check nsl_dist jobs tests
	$(BIN)/mypy nsl_dist jobs

setup: $(VENV)/.current

$(VENV)/.current: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra bench --universal --python-version 3.11 --no-header --no-annotate \
		--quiet --output-file requirements.lock
