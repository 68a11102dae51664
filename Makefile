# `make demo` and `make test` set up everything they need; `make help` lists the rest.

VENV = .venv
PREFIX = $(VENV)
MPI ?=
PYTHON ?=
JOBS ?= 2

# $(abspath) would break names with spaces
with_bin = PATH="$$(cd "$(PREFIX)" && pwd)/bin:$$PATH"
install = ./install.sh --prefix "$(PREFIX)" $(if $(MPI),--mpi "$(MPI)") $(if $(PYTHON),--python "$(PYTHON)")

.PHONY: help install demo test test-fast test-slow faults lint large-batch-study predictions bench clean

help:
	@echo 'make demo       set up .venv if need be, and train a small network on two ranks'
	@echo 'make test       set up .venv if need be, check the style and the types, and run the tests'
	@echo 'make test-fast  the tests that start no other processes'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make faults     a hundred jobs killed at random moments and resumed, and all other faults'
	@echo 'make lint       style and types only'
	@echo 'make large-batch-study   accuracy against batch for SGD and LARS, into docs/large-batch-study/'
	@echo 'make predictions   the pages docs/prediction-*.md from what was published and measured'
	@echo 'make bench      side by side with what one would run instead, into docs/benchmarks-peers.md, under 40 minutes;'
	@echo '                QUICK=1: the essential in under 8 minutes, into build/'
	@echo 'make install    set up only, without the extras of the demo and the tests'
	@echo 'make clean      remove what tests, tools and builds left behind; keeps .venv'
	@echo
	@echo 'PREFIX=DIR      another environment than .venv'
	@echo 'MPI=system      the MPI whose mpicc is on PATH, or MPI=/path/to/mpicc; otherwise Open MPI from PyPI'
	@echo 'PYTHON=python3  the Python to build on, 3.10 to 3.13'
	@echo 'JOBS=2          unit tests at once'

install:
	@$(install)

demo:
	@$(install) --extras demo
	@$(with_bin) ./demo.sh

test:
	@$(install) --extras test
	@$(with_bin) .ci/test all $(JOBS)

test-fast:
	@$(install) --extras test
	@$(with_bin) .ci/test fast $(JOBS)

test-slow:
	@$(install) --extras test
	@$(with_bin) .ci/test slow

faults:
	@$(install) --extras test
	@$(with_bin) .ci/test faults

lint:
	@$(install) --extras test
	@$(with_bin) .ci/test lint

large-batch-study:
	@$(install) --extras demo
	@$(with_bin) ./demo.sh data
	@$(with_bin) python -m benchmarks.large_batch_study demo/shards docs/large-batch-study

predictions:
	@$(install)
	@$(with_bin) python -m benchmarks.published_prediction
	@$(with_bin) python -m benchmarks.emulated_prediction --page-only
	@$(with_bin) python -m benchmarks.held_out_prediction

# PyTorch is large and only for comparison: where it cannot be had, the rest is measured without it.
bench:
	@$(install) --extras bench || $(install)
	@$(with_bin) python -m benchmarks.peers $(if $(QUICK),--quick --out build)

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
