#!/usr/bin/env bash
# Train the models of checkpoints/pretrained again, all or those named: bash scripts/pretrained.sh addition sudoku4
# On one core: addition 1 min, sudoku4 2, codebook 1, demo 4, sudoku6 20, sudoku9 30, maze 30. A stopped one goes on.
set -e
cd "$(dirname "$0")/.."

train() { # NAME CHECKPOINT COMMAND: train, then keep the weights and write the card
  local name=$1 checkpoint=$2
  shift 2
  "$@"
  python scripts/pretrained.py --name "$name" --checkpoint "$checkpoint" --command "$*"
}

for name in ${@:-addition sudoku4 sudoku9 codebook demo sudoku6 maze}; do
  case $name in
    addition)
      train $name runs/addition/checkpoints/final.pt \
        python train_hrm.py --config configs/hrm/addition.yaml --run_name addition ;;
    sudoku4)
      python prepare_data.py sudoku --size 4 --givens 6 --out datasets/sudoku4x4
      train $name runs/sudoku4/checkpoints/final.pt \
        python train_hrm.py --dataset datasets/sudoku4x4 --max_seq_len 16 --d_model 64 --steps 1000 --run_name sudoku4 ;;
    sudoku9)
      python prepare_data.py sudoku --givens 32 --train 10000 --out datasets/sudoku32
      train $name runs/sudoku9/checkpoints/final.pt \
        python train_hrm.py --dataset datasets/sudoku32 --steps 3000 --run_name sudoku9 ;;
    codebook)
      train $name outputs/codebook/best_val.pt \
        python train_ae.py out=outputs/codebook epochs=20 ;;
    demo)
      python prepare_data.py expert --data_dir data/demo
      python prepare_data.py tokenizer --data_dir data/demo --vocab_size 4096 --out data/demo/bpe4096.json
      train $name checkpoints/demo/transformer_expert.pt \
        python train_expert.py --config configs/expert/demo.yaml --resume auto ;;
    sudoku6)
      train $name checkpoints/multimodal-sudoku6/best_model.pt \
        python train_multimodal.py --arch sudoku6 --max_steps 1263 ;;
    maze)
      train $name checkpoints/multimodal-maze/best_model.pt \
        python train_multimodal.py --arch maze ;;
    *)
      echo "no recipe for $name" >&2
      exit 2 ;;
  esac
done
