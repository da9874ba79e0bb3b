# make setup   .venv for the CPU from launch/env/cpu.lock (idempotent)
# make study   set-up and the quick study, end to end, to a report
# make test    set-up and the tests that every change needs    make lint    ruff, and mypy on core and experiment
# make test-all  every test: those marked `full`, and a real Slurm where one can be started
# make slurm   tests on a real Slurm of three nodes on this machine (half an hour)    make soak    twenty kills there
# make gpu     tests and tables that need a GPU; they skip with the reason elsewhere
# make bench   side-by-side measurements     make clean   .venv and caches; never runs/
#
# PYTHON=/path/to/python3.11 chooses the Python that .venv is made with.
# TESTS="tests/test_kl.py -k k3" narrows `make test`.

.PHONY: setup study test test-all lint bench gpu slurm soak clean
.NOTPARALLEL:

PYTHON ?= $(shell python3.11 -c '' >/dev/null 2>&1 && echo python3.11 || echo python3)
BIN := .venv/bin
TESTS ?= tests
# pyproject.toml limits every test; this is for all of them together, in seconds.
TEST_SECONDS ?= 4800

setup:
	@$(PYTHON) launch/env/setup_cpu.py

study: setup
	@$(BIN)/klreg run recipes/quickstart.yaml

test: setup
	@$(BIN)/python -m pytest -m "not full" --ignore=tests/bench --ignore=tests/slurm --session-timeout=$(TEST_SECONDS) $(TESTS)

test-all: setup
	@KLREG_SLURM=1 $(BIN)/python -m pytest --ignore=tests/bench tests

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
