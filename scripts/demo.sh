#!/usr/bin/env bash
# From a fresh clone to a model that writes text, in .venv, in a few minutes on two cores: bash scripts/demo.sh
cd "$(dirname "$0")/.." && source scripts/setup.sh requirements.txt requirements-data.txt || exit 1
set -e
python prepare_data.py expert --data_dir data/demo
python prepare_data.py tokenizer --data_dir data/demo --vocab_size 4096 --out data/demo/bpe4096.json
python train_expert.py --config configs/expert/demo.yaml --resume auto
for prompt in "In the beginning" "The Congress" "def "; do
  python generate.py --checkpoint checkpoints/demo/transformer_expert.pt --prompt "$prompt" --max_new_tokens 120
  echo
done
echo "loss curve: checkpoints/demo/transformer_expert_loss.png"
