# make setup   .venv for the CPU from launch/env/cpu.lock (idempotent)
# make study   set-up and the quick study, end to end, to a report
# make test    set-up and the tests that every change needs: `make unit`, then the real stack in three starts
# make test-all  every test: `make test`, then `make full`, those that are marked so, and a real Slurm where one can start
# make lint    ruff, and mypy on core and experiment
# make slurm   tests on a real Slurm of three nodes on this machine (half an hour)    make soak    twenty kills there
# make gpu     tests and tables that need a GPU; they skip with the reason elsewhere
# make bench   side-by-side measurements     make clean   .venv and caches; never runs/
#
# PYTHON=/path/to/python3.11 chooses the Python that .venv is made with.
# TESTS="tests/test_kl.py -k k3" narrows `make test`, FULL=tests/e2e narrows `make full`. BUDGET=600 ends `make full` within
# so many seconds: what would take longer is skipped. FIRST="test_study test_jobs" says whose tests come first there.

.PHONY: setup study unit test full test-all lint bench gpu slurm soak clean
.NOTPARALLEL:

PYTHON ?= $(shell python3.11 -c '' >/dev/null 2>&1 && echo python3.11 || echo python3)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
FULL ?= tests
# Two tests at a time on two cores, four on more: each process imports the stack.
UNIT := OMP_NUM_THREADS=1 $(PYTEST) -n logical --maxprocesses=4 --dist worksteal -m "not full" \
	--ignore=tests/bench --ignore=tests/slurm --ignore=tests/e2e tests

setup:
	@$(PYTHON) launch/env/setup_cpu.py

study: setup
	@$(BIN)/klreg run recipes/quickstart.yaml

unit: setup
	@$(UNIT)

test: setup
ifdef TESTS
	@$(PYTEST) $(TESTS)
else
	@$(UNIT)
	@$(PYTEST) -m "not full" tests/e2e
endif

full: setup
	@KLREG_SLURM=1 $(PYTEST) -m full $(if $(BUDGET),--budget=$(BUDGET)) --first="$(FIRST)" \
		--ignore=tests/bench --ignore=tests/slurm/test_job_start.py $(FULL)

test-all: test full

lint: setup
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

bench: setup
	@KLREG_SLURM=1 $(BIN)/python -m pytest tests/bench tests/slurm/test_job_start.py -q -s -rs --timeout=3600

slurm: setup
	@KLREG_SLURM=1 $(BIN)/python -m pytest tests/slurm --ignore=tests/slurm/test_job_start.py -q -rs

soak: setup
	@KLREG_SLURM=1 KLREG_SOAK=$${KLREG_SOAK:-20} $(BIN)/python -m pytest tests/slurm/test_soak.py -q -s

gpu:
	@$(or $(wildcard .venv-gpu/bin/python),$(BIN)/python) -m pytest tests/gpu tests/bench/gpu -q -s -rs --timeout=7200

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
