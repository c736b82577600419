#!/usr/bin/env bash
# Make 1000 held-out skeletons of configs/NAME, under the name MODEL: bash scripts/generate_validation_set.sh NAME [MODEL]
[ -n "$1" ] || { echo "error: which bundle of configs/? try: bash scripts/generate_validation_set.sh sr-cpu" >&2; exit 2; }
cd "$(dirname "$0")/.." || exit 1
[ -f .venv/bin/activate ] && . .venv/bin/activate
exec python prepare_data.py generate-skeleton-pool -c "configs/$1/skeleton_pool_val.yaml" \
  -o "data/ansr-data/${2:-$1}/skeleton_pool_val" -s 1000 -v --fresh
