#!/usr/bin/env bash
# Every test and the style check, in .venv; arguments go to pytest: bash scripts/test.sh tests/data_utils/text/test_windows.py -x
cd "$(dirname "$0")/.." && source scripts/setup.sh requirements-dev.txt || exit 1
export OMP_NUM_THREADS=1  # tiny tensors: more threads only wait for each other
ruff check . && ruff format --check . && python -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
