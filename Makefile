# Every target sets up what it needs: see tools/setup.sh.
PYTHON = .venv/bin/python
DEMO_DIR ?= runs/demo
export DEMO_DIR

.PHONY: help demo test test-slurm chaos bench bench-gpu bench-coordinator bench-scale native setup \
  cuda lock clean

help:  ## these lines
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: native  ## distils 8x8 digits into 10 images, anew, in DEMO_DIR (runs/demo)
	@PYTHON=$(PYTHON) tools/demo.sh "$$DEMO_DIR"

test: native  ## the tests
	$(PYTHON) -m pytest

test-slurm: native  ## those on a Slurm of its own (slurm-wlm, munge, root): some minutes
	KIP_TEST_SLURM=1 $(PYTHON) -m pytest tests/slurm

chaos: native  ## kills and pauses real runs and compares the bits: a quarter of an hour
	PYTHONPATH=. $(PYTHON) tests/chaos --workdir=runs/chaos

bench: native  ## the kernels beside Neural Tangents: many minutes
	$(PYTHON) -m benchmarks.kernels

# Where Launchpad has no wheel: python -m benchmarks.gpu, in whatever environment has the packages.
bench-gpu: cuda  ## the kernels on the GPU that is there
	$(PYTHON) -m benchmarks.gpu

bench-coordinator: setup  ## what a step costs beside the kernel
	$(PYTHON) -m benchmarks.coordinator

bench-scale: native  ## how a run scales with its workers, simulated ones but for their messages
	$(PYTHON) -m benchmarks.scale

native: setup  ## builds the C++ kernel where there is a compiler (else: the JAX kernel)
	@$(PYTHON) -m kernels.native.build

setup:  ## makes .venv, once
	@tools/setup.sh

cuda:  ## adds what GPUs need to it
	@tools/setup.sh cuda

lock: setup  ## resolves requirements*.in again; the result is committed
	$(UV) pip compile --quiet --python-version 3.10 --python $(PYTHON) --override overrides.txt --generate-hashes \
	  --no-emit-index-url --no-header requirements.in -o requirements.txt
	$(UV) pip compile --quiet --python-version 3.10 --python $(PYTHON) --override overrides.txt --generate-hashes \
	  --no-emit-index-url --no-header -c requirements.txt requirements-cuda.in -o requirements-cuda.txt
UV = $(shell command -v uv || echo .uv/bin/uv)

clean:  ## removes .venv, .uv and .uv-home
	rm -rf .venv .uv .uv-home
