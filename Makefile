# Everything that a fresh machine with Python >= 3.11 and make needs; `make train` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
JOB ?= jobs/train_sop.py

# Where it is set, each of a cluster's many processes compiles all that it imports, anew: three times as slow.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train submit test test-rest test-all lint setup lock

train: setup
	$(BIN)/python jobs/train_sop.py $(ARGS)

# On the cluster at ADDRESS, by whoever has its token: make submit ADDRESS=http://127.0.0.1:8265 ARGS="--num-workers 4"
submit: setup
	RAY_AUTH_MODE=token $(BIN)/ray job submit --address $(ADDRESS) --working-dir . \
		--metadata-json '{"git_commit": "$(shell git rev-parse HEAD 2> /dev/null)"}' -- python $(JOB) $(ARGS)

PYTEST = $(BIN)/python -m pytest -n 2 --dist loadgroup

# What to run before a change is handed in: all but the slow tests.
test: setup
	$(PYTEST) $(ARGS)

test-rest: setup
	$(PYTEST) -m slow $(ARGS)

test-all: setup
	$(PYTEST) -m "slow or not slow" $(ARGS)

lint: setup
	$(BIN)/ruff check nsl_dist jobs cluster tests
	$(BIN)/ruff format --check nsl_dist jobs cluster tests
	$(BIN)/mypy nsl_dist jobs cluster tests

setup: $(VENV)/.current

$(VENV)/.current: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra bench --extra cloud --extra serve --extra onnx --extra timm --universal --python-version 3.11 --no-header --no-annotate \
		--quiet --output-file requirements.lock
