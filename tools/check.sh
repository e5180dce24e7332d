#!/usr/bin/env bash
# Format, lint, types and tests: the same for developers, the hook and the pipeline.
# Words given go to pytest: tools/check.sh tests/test_masks.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -d .venv/bin ]]; then PATH="$PWD/.venv/bin:$PATH"; fi
export JAX_PLATFORMS=cpu
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR-$HOME/.cache/sdprune_jax/xla}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # torch in two workers would fight for two cores
ruff format --check .
ruff check .
pyrefly check
if [[ -d .venv/tpu ]]; then export PYTHONPATH="$PWD/.venv/tpu${PYTHONPATH:+:$PYTHONPATH}"; fi
python -m pytest -q -n 2 "$@"
