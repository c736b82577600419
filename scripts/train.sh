#!/usr/bin/env bash
# Train a bundle of symbolic regression: bash scripts/train.sh configs/test (or test, or a train.yaml) FLAGS
cd "$(dirname "$0")/.." || exit 1
[ -f .venv/bin/activate ] && . .venv/bin/activate
bundle=${1:-sr-cpu}
shift
for path in "$bundle" "$bundle/train.yaml" "configs/$bundle/train.yaml"; do
  [ -f "$path" ] && exec python train_sr.py -c "$path" "$@"
done
echo "error: no bundle $bundle; there are: $(ls -d configs/*/train.yaml | xargs -n 1 dirname | xargs -n 1 basename | tr '\n' ' ')" >&2
exit 2
