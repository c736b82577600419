#!/usr/bin/env bash
# Tests and the style check, in .venv. Arguments go to pytest: a file, -x, or -m slow for the tests that take minutes.
cd "$(dirname "$0")/.." && source scripts/setup.sh requirements-dev.txt || exit 1
export OMP_NUM_THREADS=1  # tiny tensors: more threads only wait for each other
ruff check . && ruff format --check . && python -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
