# Everything that a fresh machine with Python >= 3.11 and make needs; `make train` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
JOB ?= jobs/train_sop.py

# Where it is set, each of a cluster's many processes compiles all that it imports, anew: three times as slow.
unexport PYTHONDONTWRITEBYTECODE

# What `make gpu` runs with, without a set-up of its own: any Python that has the packages.
PYTHON_GPU ?= $(or $(wildcard $(BIN)/python),$(PYTHON))

.PHONY: train submit test gpu lint setup lock

train: setup
	$(BIN)/python jobs/train_sop.py $(ARGS)

# On the cluster at ADDRESS, by whoever has its token: make submit ADDRESS=http://127.0.0.1:8265 ARGS="--num-workers 4"
submit: setup
	RAY_AUTH_MODE=token $(BIN)/ray job submit --address $(ADDRESS) --working-dir . \
		--metadata-json '{"git_commit": "$(shell git rev-parse HEAD 2> /dev/null)"}' -- python $(JOB) $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

# On a machine with a GPU: the tests that need one, then a table of benchmarks; both are in gpu_report.json.
gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
gpu:
	rm -f build/gpu_tests.xml
	-timeout -k 5 120 $(PYTHON_GPU) -m pytest tests/gpu -o addopts=-ra --confcutdir=tests/gpu --junit-xml=build/gpu_tests.xml
	$(PYTHON_GPU) jobs/bench/gpu_report.py --tests build/gpu_tests.xml $(ARGS)

lint: setup
	$(BIN)/ruff check nsl_dist jobs cluster tests
	$(BIN)/ruff format --check nsl_dist jobs cluster tests
	$(BIN)/mypy nsl_dist jobs cluster

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
