# Every target that needs packages makes .venv first (scripts/setup; it does nothing when nothing changed).
BIN := .venv/bin
ARGS ?=
WORKERS ?= 2
# Tests have one thread a process: threads of several processes that wait for each other spin.

.PHONY: help setup demo realtime test test-fast lint bench-demo clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: ## make .venv, install, check that MuJoCo renders
	@scripts/setup

demo: setup ## record, train and evaluate a small policy from nothing (ARGS="seed=1" are passed on)
	$(BIN)/brachium demo $(ARGS)

realtime: setup ## train a policy that bears delay (25 minutes), and run it in real time: server, controller, simulated arm
	$(BIN)/brachium demo experiment=realtime
	$(BIN)/brachium deploy policy=outputs/realtime/flow-0/checkpoint env@robot.env=tabletop/push \
		embodiment@robot.env.embodiment=arm6_pose episodes=3 $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then the whole test suite
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: setup ## the tests that take less than ten seconds each
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

bench-demo: setup ## measure the demo against its controls
	$(BIN)/python benchmarks/demo_controls.py $(ARGS)

clean: ## remove .venv, caches and builds; outputs/ stays
	rm -rf .venv .venv-bootstrap build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +
