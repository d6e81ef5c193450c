# `make demo` and `make test` set up everything they need in .venv, on a fresh machine with Python 3.10 or newer.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/smile-kernels demo $(DEMO)

test: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(TESTS)

lint: .venv/ready
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# torch first: a range that the installed build satisfies installs nothing more, and the CPU build is the small one.
.venv/ready: pyproject.toml setup.py Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH) setuptools wheel ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,demo,dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
