#!/usr/bin/env bash
#SBATCH --job-name=petri
#SBATCH --output=logs/stdout/train_%j.out
#SBATCH --open-mode=append
#SBATCH --time=08:00:00
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
# A run as a Slurm job, from the clone with its environment active: sbatch scripts/slurm.sh train_ae.py env=cluster ...
# Options of sbatch come before: sbatch --gpus=1 scripts/slurm.sh train_expert.py --expert transformer
# Two machines of four GPUs: sbatch --nodes=2 --gpus-per-node=4 scripts/slurm.sh train_expert.py --expert transformer --fsdp
# A sweep of four, one job each: sbatch --array=0-3 scripts/slurm.sh train_ae.py --multirun latent_space=none,vq epochs=10,20
# When its time ends it saves, is requeued and goes on. Watch it: tail -f logs/stdout/train_*.out
if [ -z "$SLURM_JOB_ID" ]; then
  echo "error: this is for sbatch" >&2
  echo "try: sbatch scripts/slurm.sh $*" >&2
  exit 2
fi
exec bash scripts/job.sh "$@"  # Slurm runs a copy of this file, in the folder where sbatch was typed
