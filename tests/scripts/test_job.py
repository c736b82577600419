"""scripts/job.sh under a make-believe Slurm and HTCondor: the same command goes on, what is late is started again."""

import os
import shutil
import signal
import sys
import time

import pytest

import train_ae
from tests.helpers import ROOT, finish, launch

# says with what it was called; with `wait` waits for SIGTERM and leaves with 143
CHILD = """
import signal, sys, time
print(sys.argv[0], *sys.argv[1:], flush=True)
if "wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    open("ready", "w").close()
    time.sleep(60)
"""
SCONTROL = 'test "$1" = show && echo first && echo second || echo scontrol "$@"'
SCANCEL = 'echo scancel "$@"; touch cancelled'
# says with what it was called; waits to be cancelled if `wait` is there, and a signal would end it
SRUN = """echo srun "$@"
case "$*" in *wait*) touch ready; while [ ! -f cancelled ]; do sleep 0.1; done; exit 1 ;; esac"""

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the batch scripts, training scripts that only talk, and commands of a scheduler."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(ROOT / "configs" / "ae", tmp_path / "configs" / "ae")
    for name in ("train_ae.py", "train_sr.py", "train_hrm.py", "train_expert.py"):
        (tmp_path / name).write_text(CHILD)
    (tmp_path / "bin").mkdir()
    for name, text in dict(python=f'exec {sys.executable} "$@"', scontrol=SCONTROL, srun=SRUN, scancel=SCANCEL,
                           torchrun='echo torchrun "$@"').items():  # fmt: skip
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    prefixes = ("SLURM_", "_CONDOR", "PETRI_")
    for name in [n for n in os.environ if n.startswith(prefixes) or n in ("JOB_ID", "NPROC")]:
        monkeypatch.delenv(name)
    return tmp_path


def job(clone, words, script="scripts/job.sh"):
    return launch(["bash", script, *words.split()], cwd=clone)


@pytest.mark.parametrize(
    "env, words, called",
    [
        ("", "train_hrm.py --run_name a", "train_hrm.py --run_name a"),
        ("SLURM_JOB_ID=7", "train_hrm.py --run_name a", "train_hrm.py --run_name a"),
        ("", "train_expert.py --expert x", "train_expert.py --expert x --resume auto"),
        ("", "train_expert.py --resume=a.pt", "train_expert.py --resume=a.pt"),
        ("", "./train_expert.py --expert x", "./train_expert.py --expert x --resume auto"),
        ("", "scripts/../train_sr.py -c a", "scripts/../train_sr.py -c a --resume-from auto"),
        ("SLURM_JOB_ID=7", "./train_ae.py --flags", "./train_ae.py --flags out=outputs/runs/run_job7"),
        ("", "train_sr.py -c a", "train_sr.py -c a --resume-from auto"),
        ("", "train_sr.py --resume-from b", "train_sr.py --resume-from b"),
        ("", "train_sr.py --resume=b", "train_sr.py --resume=b"),
        ("", "env=cluster epochs=2", "train_ae.py env=cluster epochs=2"),
        ("JOB_ID=5_0", "env=cluster phase1.trainer.epochs=2",
         "train_ae.py env=cluster phase1.trainer.epochs=2 out=outputs/runs/run_job5_0"),
        ("SLURM_JOB_ID=7", "train_ae.py out=there", "train_ae.py out=there"),
        ("SLURM_JOB_ID=7", "train_ae.py --out there", "train_ae.py --out there"),
        ("SLURM_JOB_ID=9 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=2", "train_ae.py -m epochs=1,2,3",
         "train_ae.py -m epochs=1,2,3 sweep_job=2 out=outputs/runs/run_job7_2"),
        ("SLURM_JOB_ID=9 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=2", "train_ae.py seed=3",
         "train_ae.py seed=3 out=outputs/runs/run_job7_2"),
        ("JOB_ID=5_0 PETRI_OUTPUTS=/data/out", "env=stoomboot",
         "train_ae.py env=stoomboot out=/data/out/runs/run_job5_0"),
        ("SLURM_JOB_ID=7", "train_ae.py --multirun epochs=1,2", "train_ae.py --multirun epochs=1,2 name=job7"),
        ("SLURM_JOB_ID=7", "train_ae.py --config-name=phase1/experiment/compare_vq_vs_none",
         "train_ae.py --config-name=phase1/experiment/compare_vq_vs_none name=job7"),
        ("SLURM_JOB_ID=7", "train_ae.py --config configs/ae/smoke.yaml",
         "train_ae.py --config configs/ae/smoke.yaml out=outputs/runs/run_job7"),
        ("SLURM_JOB_ID=7", "train_ae.py -m hydra.job.name=a epochs=1,2",
         "train_ae.py -m hydra.job.name=a_job7 epochs=1,2"),
        ("SLURM_JOB_ID=8", "train_ae.py -m hydra.job.name=a epochs=1,2",
         "train_ae.py resume=outputs/multiruns/exp_1_a_job8"),
        ("NPROC=2", "train_hrm.py --run_name a",
         "torchrun --standalone --nproc-per-node=2 train_hrm.py --run_name a"),
        ("SLURM_GPUS_ON_NODE=2", "train_ae.py -m epochs=1,2", "train_ae.py -m epochs=1,2"),
        ("SLURM_JOB_ID=7 SLURM_NNODES=2 SLURM_GPUS_ON_NODE=4 SLURM_CPUS_PER_TASK=3", "train_hrm.py --run_name a --fsdp",
         "srun --ntasks-per-node=1 --cpus-per-task=3 torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d "
         "--rdzv-endpoint=first:29500 --rdzv-id=7 train_hrm.py --run_name a --fsdp"),
    ],
)  # fmt: skip
def test_what_makes_the_same_command_resume_is_added(clone, monkeypatch, env, words, called):
    (clone / "outputs" / "multiruns" / "exp_1_a_job8").mkdir(parents=True)
    for pair in env.split():
        monkeypatch.setenv(*pair.split("="))
    assert finish(job(clone, words))[0].splitlines() == [called]


def stopped(clone, number, script="scripts/job.sh"):
    process = job(clone, "train_ae.py wait out=a", script)
    for _ in range(2000):
        if (clone / "ready").exists():
            process.send_signal(number)
            return process
        time.sleep(0.01)
    raise AssertionError("the job did not start")


@pytest.mark.parametrize("env", ["", "SLURM_JOB_ID=7"])
def test_sigterm_is_passed_on(clone, monkeypatch, env):
    for pair in env.split():
        monkeypatch.setenv(*pair.split("="))
    assert "scontrol" not in finish(stopped(clone, signal.SIGTERM), 143)[0]


def test_a_late_slurm_job_is_requeued(clone, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "scontrol requeue 7" in finish(stopped(clone, signal.SIGUSR1, "scripts/slurm.sh"))[0]
    (clone / "ready").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "100")
    assert "scontrol" not in finish(stopped(clone, signal.SIGUSR1), 143)[0]


def test_a_late_job_on_two_nodes_is_cancelled_by_its_steps_and_requeued(clone, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NNODES", "2")
    out = finish(stopped(clone, signal.SIGUSR1))[0]
    assert "scancel --signal=TERM 7" in out and "scontrol requeue 7" in out


def test_a_late_htcondor_job_leaves_with_85(clone, monkeypatch):
    (clone / "ad").write_text("A = 1\nNumJobStarts = 1\n")
    monkeypatch.setenv("_CONDOR_JOB_AD", str(clone / "ad"))
    monkeypatch.setenv("MAX_SECONDS", "1")
    finish(job(clone, "wait out=a"), 85)
    assert finish(job(clone, "out=a"))[0] == "train_ae.py out=a\n"  # nothing is late


@pytest.mark.parametrize("file", ["scripts/htcondor.sub", "hpc/stoomboot/train.sub"])
def test_the_submit_files_start_a_command_of_the_guide(file):
    lines = [line.partition(" = ") for line in (ROOT / file).read_text().splitlines() if line[:1] not in ("#", "")]
    settings = {name: value for name, _, value in lines}
    cfg = train_ae.parse(settings["arguments"].split())
    assert (ROOT / settings["executable"]).is_file() and cfg.latent_space == "vq" and cfg.epochs == 50
    assert all("stdout/train_$(Cluster)" in settings[name] for name in ("output", "error", "log"))


def test_slurm_sh_is_for_sbatch(clone):
    assert "sbatch scripts/slurm.sh train_ae.py" in finish(job(clone, "train_ae.py", "scripts/slurm.sh"), 2)[1]
