#!/usr/bin/env bash
# Run a script as a batch job that goes on by itself after a stop: scripts/job.sh [train_X.py] ARGUMENTS
# Without a script it runs train_ae.py. SIGTERM is passed on: the run saves and leaves with 143. SIGUSR1, or MAX_SECONDS
# after the start, does the same and asks the scheduler for another turn, at most MAX_REQUEUE (100) times.
[ -f scripts/job.sh ] || cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1  # a scheduler may run a copy
[ -f .venv/bin/activate ] && . .venv/bin/activate
mkdir -p logs/stdout

script=train_ae.py
case $1 in *.py) script=$1; shift ;; esac
id=${JOB_ID:-$SLURM_JOB_ID}
[ -n "$SLURM_ARRAY_JOB_ID" ] && id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
arguments=("$@")

given() {  # whether the arguments have a flag or key of that name
  local word
  for word in "${arguments[@]}"; do
    case $word in "$1" | "$1"=* | *[/.]"$1"=* | --"$1" | --"$1"=* | --"${1//_/-}" | --"${1//_/-}"=*) return 0 ;; esac
  done
  return 1
}

sweeps() {  # whether the arguments, or a bundle among them, say --multirun
  local word
  given multirun && return 0
  for word in "${arguments[@]}"; do
    word=${word#*=}
    [ "$word" = -m ] && return 0
    grep -qs '^multirun: true' -- "${word%.yaml}.yaml" "configs/ae/${word#phase1/}.yaml" && return 0
  done
  return 1
}

# the same command must resume: these scripts begin anew unless told to go on
case ${script##*/} in  # ./train_X.py and a path are the same script
  train_expert.py | train_mla.py) given resume || arguments+=(--resume auto) ;;
  train_sr.py) given resume_from || given resume || arguments+=(--resume-from auto) ;;
  train_ae.py)
    [ -n "$SLURM_ARRAY_TASK_ID" ] && sweeps && ! given sweep_job && arguments+=("sweep_job=$SLURM_ARRAY_TASK_ID")
    if [ -n "$id" ] && sweeps && ! given sweep_job; then  # all jobs of the sweep run in this one; the name says which job it is
      before=$(ls -d "${PETRI_OUTPUTS:-outputs}"/multiruns/exp_*"job$id" 2>/dev/null | tail -n 1)
      for i in "${!arguments[@]}"; do
        case ${arguments[i]} in name=* | --name=* | *.name=*) arguments[i]+=_job$id ;; esac
      done
      given name || arguments+=("name=job$id")
      [ -n "$before" ] && arguments=("resume=$before")
    elif [ -n "$id" ] && ! given out; then
      arguments+=("out=${PETRI_OUTPUTS:-outputs}/runs/run_job$id")
    fi ;;
esac

processes=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
nodes=${SLURM_NNODES:-1}
command=(python)
if [ "$nodes" -gt 1 ]; then  # one launcher per node; since Slurm 22.05 srun does not inherit the job's --cpus-per-task
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  command=(srun --ntasks-per-node=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}"
    torchrun "--nnodes=$nodes" "--nproc-per-node=$processes" --rdzv-backend=c10d
    "--rdzv-endpoint=$first:29500" "--rdzv-id=$SLURM_JOB_ID")
elif [ "$processes" -gt 1 ] && { [ "${script##*/}" != train_ae.py ] || ! sweeps || given sweep_job; }; then
  command=(torchrun --standalone "--nproc-per-node=$processes")
fi

child= late= stopped=
stop() {
  stopped=1
  if [ "$nodes" -gt 1 ]; then
    scancel --signal=TERM "$SLURM_JOB_ID"  # srun would end its launchers at once; this signal also reaches the ranks
  elif [ -n "$child" ]; then
    kill -TERM "$child" 2>/dev/null
  fi
}
trap stop TERM INT
trap 'late=1; stop' USR1
"${command[@]}" "$script" "${arguments[@]}" &
child=$!
[ -n "$stopped" ] && stop
if [ -n "$MAX_SECONDS" ]; then
  (trap - TERM USR1; sleep "$MAX_SECONDS" & trap 'kill $!' TERM; wait && kill -USR1 $$) & clock=$!
fi
while kill -0 "$child" 2>/dev/null; do  # a trap ends `wait` before the child has ended
  wait "$child"
done
wait "$child"
status=$?
[ -n "$clock" ] && kill "$clock" 2>/dev/null

starts=$((${SLURM_RESTART_COUNT:-0} + 1))
[ -n "$_CONDOR_JOB_AD" ] && starts=$(sed -n 's/^NumJobStarts = //p' "$_CONDOR_JOB_AD")
if [ -n "$late" ] && [ $status -ne 0 ] && [ "${starts:-1}" -le "${MAX_REQUEUE:-100}" ]; then
  if [ -n "$SLURM_JOB_ID" ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  elif [ -n "$_CONDOR_JOB_AD" ]; then
    exit 85  # htcondor.sub keeps what leaves with this
  fi
fi
exit $status
