# One task runner: `make help`. On a machine with nothing but Python 3.11 (and git), each target first makes .venv and
# installs Sluice into it with everything that development needs; later runs find it done.
#
# VENV=/path uses an environment of yours as it is: nothing is installed into it (`make install VENV=/path` does).

VENV ?= .venv
PYTHON ?= $(firstword $(foreach python,python3.11 python3.12 python3.13 python3,$(shell command -v $(python))))
HISTORIES ?= 2000
SECONDS ?=
# Further arguments of the tool that a target runs: make test ARGS="-k spool -x".
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.sluice-installed
READY := $(if $(filter .venv,$(VENV)),$(INSTALLED))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-integration lint format bench bench-engine sim protos docs clean

help: ## Say what there is (this list).
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make the virtual environment and install everything into it.

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python found; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "make: installing into $(VENV); torch is large, so this takes some minutes the first time" >&2
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY) ## The whole path on this machine, on real input; SECONDS=30 ends it by itself.
	@$(BIN)/sluice demo $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

test: $(READY) ## The fast tests, with the brokers that pip installs.
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-integration: $(READY) ## The tests on Mosquitto and Apache Kafka, which are fetched when missing.
	deploy/ci/install-brokers
	$(BIN)/python -m pytest -m integration -n auto --dist loadfile $(ARGS)

lint: $(READY) ## Linter, formatter, types, import contracts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Format the code, and fix what the linter can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Every number that the README claims, on this machine.
	@set -e; for program in benchmarks/[a-z]*.py; do echo "== $$program"; $(BIN)/python "$$program" $(ARGS); done

bench-engine: $(READY) ## The engine: each remedy by itself, peers, latency under load (15 min; ARGS=--quick: 3).
	$(BIN)/python -m benchmarks.engine $(ARGS)

sim: $(READY) ## HISTORIES=2000 seeded histories of the whole path, and the seeded bugs that they must find.
	$(BIN)/python -m tests.sim --histories $(HISTORIES) $(ARGS)

protos: $(READY) ## Generate the protobuf stubs that are checked in.
	$(BIN)/python -m protos.generate

docs: $(READY) ## Write docs/configuration.md anew, from the configuration's own types.
	$(BIN)/python docs/build_configuration.py

clean: ## Remove .venv and what tools leave behind.
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
