# One command for everything: `make test`. Set-up installs what is missing and is quick when nothing is.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-test run test test-long sim soak bench bench-quick bench-drbd bench-tried report lint format pictures clean

bin := .venv/bin

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what running needs (Debian packages, nbdkit, .venv)
	@setup/install.sh

setup-test: ## the same, and what the tests, the bench and the linters need
	@setup/install.sh --test

run: setup ## a mirrored volume of two replicas on this machine, its data under demo/; Ctrl-C ends it
	@exec $(bin)/nbdmirror demo

test: lint ## lint, types and all tests that are not long
	@$(bin)/python -m pytest

test-long: lint ## the same with the long tests (estimated 40 minutes on 2 cores)
	@$(bin)/python -m pytest -m "long or not long"

sim: setup-test ## one life of the simulated cluster as a timeline: make sim SEED=7
	@$(bin)/python -m tests.sim one $(or $(SEED),0)

soak: setup-test ## ever new lives of the simulated cluster, on all cores: make soak HOURS=8
	@$(bin)/python -m tests.sim soak --hours $(or $(HOURS),1)

bench: setup-test ## measure beside nbdkit's own file plugin and qemu's quorum, under 15 minutes; ARGS="--row fsync" for a part
	@$(bin)/python -m bench $(ARGS)

bench-quick: setup-test ## the same in 2 minutes, to see that it works; its figures say little
	@$(bin)/python -m bench --quick $(ARGS)

bench-drbd: setup-test ## beside DRBD, both in User-Mode Linux guests
	@$(bin)/python -m bench --drbd $(ARGS)

bench-tried: setup-test ## measure again what was tried, a minute
	@$(bin)/python -m bench.tried $(ARGS)

report: setup-test ## write docs/performance.md and its pictures anew, from what the runs above found
	@$(bin)/python -m bench --report

lint: setup-test ## style, format and types
	@$(bin)/ruff check --quiet
	@$(bin)/ruff format --check --quiet || { echo "Not formatted, see above: 'make format' mends it." >&2; exit 1; }
	@$(bin)/mypy --strict mirror/core
	@$(bin)/mypy mirror nbd_server cli

format: setup-test ## format the code and mend what ruff can
	@$(bin)/ruff check --fix --quiet || true
	@$(bin)/ruff format

pictures: setup-test ## draw docs/pictures and the table of docs/histories.md anew
	@$(bin)/python docs/draw_histories.py

clean: ## remove .venv and caches of the clone (not demo/, not the nbdkit that other clones use)
	@rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
