#!/usr/bin/env bash
# Make skeleton pools of the test sets, which training holds out, in seconds and offline: bash scripts/import_test_sets.sh
cd "$(dirname "$0")/.." || exit 1
[ -f .venv/bin/activate ] && . .venv/bin/activate
set -e
for name in nguyen feynman fastsrb; do
  python prepare_data.py import-data -i configs/test_set/$name.csv -p $name -b configs/sr-cpu/skeleton_pool_train.yaml \
    -o data/ansr-data/test_set/$name/skeleton_pool --fresh "$@"
done
