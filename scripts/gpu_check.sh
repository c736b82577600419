#!/usr/bin/env bash
# Every script on this GPU in at most 8 minutes, one report: bash scripts/gpu_check.sh [--minutes 20]
# Without a GPU, only shows that it runs: bash scripts/gpu_check.sh --device cpu --tiny
cd "$(dirname "$0")/.." || exit 1
[ -f .venv/bin/activate ] && . .venv/bin/activate
exec python -m benchmarks.gpu_check "$@"
