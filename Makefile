# Every target sets up what it needs: see tools/setup.sh.
PYTHON = .venv/bin/python
DEMO_DIR ?= runs/demo

.PHONY: demo test test-slurm chaos bench bench-gpu bench-coordinator native setup cuda lock clean

demo: native
	@rm -rf $(DEMO_DIR)
	$(PYTHON) launch.py --config=configs/digits.py --workdir=$(DEMO_DIR) --lp_launch_type=local_mp

test: native
	$(PYTHON) -m pytest

# On a Slurm of its own on this machine (slurm-wlm, munge, root): some minutes, because Slurm waits two before it starts a job again.
test-slurm: native
	KIP_TEST_SLURM=1 $(PYTHON) -m pytest tests/slurm

# Kills, pauses and cuts a real run for some minutes and compares it with one left in peace, bit by bit.
chaos: native
	PYTHONPATH=. $(PYTHON) tests/chaos --workdir=runs/chaos

bench: native
	$(PYTHON) -m benchmarks.kernels

# On the GPU that is there. Where Launchpad has no wheel: python -m benchmarks.gpu, in whatever environment has the packages.
bench-gpu: cuda
	$(PYTHON) -m benchmarks.gpu

# What a step costs beside the kernel.
bench-coordinator: setup
	$(PYTHON) -m benchmarks.coordinator

# Builds the C++ kernel where there is a compiler; elsewhere the JAX kernel is used.
native: setup
	@$(PYTHON) -m kernels.native.build

setup:
	@tools/setup.sh

cuda:
	@tools/setup.sh cuda

# Resolves requirements*.in again; the result is committed.
lock: setup
	$(UV) pip compile --quiet --python-version 3.10 --python $(PYTHON) --override overrides.txt --generate-hashes \
	  --no-emit-index-url --no-header requirements.in -o requirements.txt
	$(UV) pip compile --quiet --python-version 3.10 --python $(PYTHON) --override overrides.txt --generate-hashes \
	  --no-emit-index-url --no-header -c requirements.txt requirements-cuda.in -o requirements-cuda.txt
UV = $(shell command -v uv || echo .uv/bin/uv)

clean:
	rm -rf .venv .uv
