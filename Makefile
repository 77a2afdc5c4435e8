# `make quickstart`, `make real` and `make test` all make .venv first, with the versions in constraints.txt.
PYTHON ?= python3
BIN = .venv/bin

# Tests of the report drive a Chromium, which Debian has as a package; where none can be had they are skipped.
CHROMIUM_OR_SKIP = test -n "$$(which chromium chromium-browser google-chrome $$CHROMIUM 2> /dev/null)" \
	|| { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y --no-install-recommends chromium; } \
	|| echo "No Chromium: tests of the report in a browser will be skipped."

MODELS_OR_SKIP = $(BIN)/rlhf-recipes fetch smollm2 minilm || echo "No models: tests on a real language model will be skipped."

.PHONY: quickstart real test test-all test-fast docs format lint type clean

quickstart: .venv/.installed-offline
	$(BIN)/rlhf-recipes run imdb_tiny

real: .venv/.installed-offline
	$(BIN)/rlhf-recipes fetch smollm2 minilm
	$(BIN)/rlhf-recipes run imdb_smol

test: lint type
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not nightly'

test-all: lint type
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests/unit

docs: .venv/.installed-test
	$(BIN)/python docs/build.py

.venv/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	$(if $(filter test,$*),@$(CHROMIUM_OR_SKIP))
	$(if $(filter test,$*),@$(MODELS_OR_SKIP))
	touch $@

format: .venv/.installed-test
	$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

lint: .venv/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

type: .venv/.installed-test
	$(BIN)/mypy

clean:
	rm -rf .venv
