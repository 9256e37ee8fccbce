# Every target sets up what it needs: see tools/setup.sh.
PYTHON = .venv/bin/python
UV = $(shell command -v uv || echo .uv/bin/uv)
DEMO_DIR ?= runs/demo
export DEMO_DIR
CPP = $(wildcard kernels/*/src/*.h kernels/*/src/*.cc kernels/*/src/*.cu \
  tests/kernels/*.h tests/kernels/*.cc)

.PHONY: help demo test lint format test-slurm test-cable chaos bench bench-gpu bench-coordinator bench-scale \
  native setup dev cuda lock clean

help:  ## these lines
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: native  ## distils 8x8 digits into 10 images, anew, in DEMO_DIR (runs/demo)
	@PYTHON=$(PYTHON) tools/demo.sh "$$DEMO_DIR"

test: dev native  ## runs the tests
	$(PYTHON) -m pytest

lint: dev  ## checks style (ruff, clang-format) and types (basedpyright)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(dir $(PYTHON))clang-format --dry-run -Werror $(CPP)
	$(PYTHON) -m basedpyright

format: dev  ## formats all code, and mends what ruff can
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	$(dir $(PYTHON))clang-format -i $(CPP)

test-slurm: dev native  ## tests on a Slurm of its own (slurm-wlm, munge, root): some minutes
	KIP_TEST_SLURM=1 $(PYTHON) -m pytest tests/slurm

test-cable: dev native  ## cuts the network between two hosts (namespaces, root) for five minutes
	KIP_TEST_CABLE=300 $(PYTHON) -m pytest -p no:xdist -o addopts= tests/programs/test_cable.py

chaos: native  ## kills and pauses real runs and compares the bits: a quarter of an hour
	PYTHONPATH=. $(PYTHON) tests/chaos --workdir=runs/chaos

bench: native  ## times the kernels beside Neural Tangents: many minutes
	$(PYTHON) -m benchmarks.kernels

# Where Launchpad has no wheel: python -m benchmarks.gpu, in whatever environment has the packages.
bench-gpu: cuda  ## times the kernels on the GPU that is there
	$(PYTHON) -m benchmarks.gpu

bench-coordinator: setup  ## measures what a step costs beside the kernel
	$(PYTHON) -m benchmarks.coordinator

bench-scale: native  ## measures how a run scales, with workers that simulate the kernel
	$(PYTHON) -m benchmarks.scale

native: setup  ## builds the C++ kernel where there is a compiler (else: the JAX kernel)
	@$(PYTHON) -m kernels.native.build

setup:  ## makes .venv, once
	@tools/setup.sh

dev: setup  ## adds what tests, linter and type checker need
	@tools/setup.sh dev

cuda: setup  ## adds what GPUs need
	@tools/setup.sh cuda

LOCK = $(UV) pip compile --quiet --python-version 3.10 --python $(PYTHON) \
  --override overrides.txt --generate-hashes --no-emit-index-url --no-header
lock: setup  ## resolves requirements*.in again; the result is committed
	$(LOCK) requirements.in -o requirements.txt
	$(LOCK) -c requirements.txt requirements-dev.in -o requirements-dev.txt
	$(LOCK) -c requirements.txt requirements-cuda.in -o requirements-cuda.txt

clean:  ## removes .venv, .uv and .uv-home
	rm -rf .venv .uv .uv-home
