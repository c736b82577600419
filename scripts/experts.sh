#!/usr/bin/env bash
# Both phases: three experts, then the router over them with and without the store, and one table of all five.
# On the data of scripts/demo.sh, some 30 minutes on two cores; with --smoke, on toy data, under two.
cd "$(dirname "$0")/.." && source scripts/setup.sh requirements.txt requirements-data.txt || exit 1
set -e
if [ "$1" = --smoke ]; then
  name=smoke
  python prepare_data.py expert --toy --data_dir data/toy
  short="--steps 60 --warmup_steps 6"
else
  name=demo
  python prepare_data.py expert --data_dir data/demo
  python prepare_data.py tokenizer --data_dir data/demo --vocab_size 4096 --out data/demo/bpe4096.json
fi
folder=checkpoints/$name
expert="python train_expert.py --config configs/expert/$name.yaml --resume auto"
$expert --expert transformer $short
$expert --expert state_space $short --d_inner 256 --dt_rank 8 --lr 0.004
$expert --expert diffuser ${short:---steps 800} --lr 0.001 --transformer_ckpt $folder/transformer_expert.pt
python train_mla.py --config configs/mla/$name.yaml --resume auto
python train_mla.py --config configs/mla/$name.yaml --resume auto --checkpoint_dir ${folder}_store --use_vector_store
python plot.py $folder/*_metrics.jsonl ${folder}_store/*_metrics.jsonl --out $folder/experts.png
