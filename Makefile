# Each target sets up what it needs. On a fresh machine: make run, make test, make demo.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3; do command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test lint demo clean

run: .venv/.app
	HF_HUB_OFFLINE=0 $(BIN)/python app.py $(ARGS)

demo: .venv/.app
	$(BIN)/python -m reparam_diffusion demo

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; none was found." >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv 2>/dev/null || { rm -rf .venv; $(PYTHON) -m virtualenv .venv; } || \
		{ $(PYTHON) -m pip install --user --quiet virtualenv && $(PYTHON) -m virtualenv .venv; }
	@touch $@

.venv/.app: .venv/.made requirements.txt constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements.txt
	@touch $@

.venv/.dev: .venv/.app requirements-dev.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
