# make quickstart   prune the embedded model, generate with it, write a report
# make test         format, lint, types, tests
# make clean        forget the virtual environment and the caches; runs/ stays
# Needs python3 3.11 or 3.12, or say which: make quickstart PYTHON=python3.12

SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: quickstart test clean

quickstart: .venv/installed
	@$(BIN)/python -m sdprune_jax.main --config=configs/quickstart.py

test: .venv/installed-dev
	@tools/check.sh

# The two stamps are made anew when a list of pins is newer.
.venv/installed: requirements.txt | $(BIN)/python
	@echo "installing requirements.txt into .venv (one to three minutes, once)"
	@$(PIP) -r requirements.txt
	@touch $@

# torch first and exactly: nothing else shall choose its build.
.venv/installed-dev: requirements.txt tools/requirements-dev.txt tools/requirements-tpu.txt | $(BIN)/python
	@echo "installing requirements.txt and tools/requirements-dev.txt into .venv (minutes, once)"
	@$(PIP) "$$(grep ^torch== tools/requirements-dev.txt)"
	@$(PIP) -r requirements.txt -r tools/requirements-dev.txt
	@$(PIP) --no-deps --upgrade --target .venv/tpu -r tools/requirements-tpu.txt
	@touch $@ .venv/installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else \
	"Python 3.11 or 3.12 is needed, $(PYTHON) is %d.%d; say make PYTHON=python3.12" % v)'
	@$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find sdprune_jax configs tests tools -name __pycache__ -prune -exec rm -rf {} +
