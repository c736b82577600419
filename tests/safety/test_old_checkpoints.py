"""Checkpoints of every kind from before the modules moved into rooms still load, and their runs go on.

tests/old_checkpoints/ holds the last file of a run of four to six steps of each script, written by the commit before.
"""

import shutil

import pytest

import train_ae
from data_utils.checkpoint import load_checkpoint, save_checkpoint
from data_utils.events.dataset import load_events
from tests.helpers import ROOT, finish, start

OLD = ROOT / "tests" / "old_checkpoints"
TEXT = """--tokenizer bytes --data_dir {toy} --d_model 16 --n_heads 2 --n_layers 1 --max_seq_len 16 --batch_size 4
--device cpu --eval_windows 16 --grad_accum_steps 1 --no-use_amp --steps 6 --resume"""
SR = """--encoder_dim 16 --decoder_input_dim 16 --decoder_model_dim 16 --encoder_n_heads 2 --decoder_n_heads 2
--encoder_ffn_hidden_dim 16 --decoder_ffn_hidden_dim 16 --decoder_n_layers 1 --encoder_n_sab 1 --batch_size 4
--val_size 16 --val_batch_size 8 --val_problems 0 --log_interval 1 --device cpu --max_operators 3 --dtype float32"""
RUNS = dict(  # kind: (folder of OLD, its place in a run, command, step of the file)
    transformer=("text", "checkpoints", f"train_expert.py --expert transformer --ffn_mult 2 {TEXT}", 4),
    state_space=("text", "checkpoints",
                 f"train_expert.py --expert state_space --d_inner 16 --d_state 2 --dt_rank 2 {TEXT}", 4),
    diffuser=("text", "checkpoints", f"train_expert.py --expert diffuser {TEXT}", 4),
    mla=("text", "checkpoints", f"train_mla.py {TEXT} --n_layers 2 --kv_latent_dim 8 --rope_dim 4", 4),
    hrm=("hrm", "runs/old/checkpoints", "train_hrm.py --d_model 16 --n_heads 2 --batch_size 8 --eval_batch_size 50 "
         "--device cpu --mixed_precision none --dataset synthetic --eval_rows 50 --steps 8 --max_steps 6 --val_every 4 "
         "--run_name old --save_best_model", 4),
    sr=("formulas", "ansr", f"train_sr.py {SR} --steps 8 --max_steps 6 -vi 4 -ci 4 -o ansr --resume-from auto", 4),
    ae=("events", "ae", "train_ae.py events=64 epochs=4 max_steps=9 batch_size=16 hidden=[16] latent_dim=4 "
        "codebook_size=8 make_plots=false device=cpu dtype=float32 out=ae", 6),
    multimodal=("pages", "mm", "train_multimodal.py --arch smoke --tasks sudoku4 --no-enable_mtp --hidden_size 16 "
                "--num_heads 2 --train_samples 32 --test_samples 4 --global_batch_size 4 --epochs 2 --max_steps 8 "
                "--memory_slots 16 --dqn_buffer_capacity 64 --device cpu --wandb disabled --data_paths pages "
                "--checkpoint_path mm --log_file=", 6),
)  # fmt: skip


def as_drawn_here(path, flags):
    """Give the checkpoint the hash of the rows of these events, as older files have it, on this machine.

    The last bits of sines depend on the processor.
    """
    cfg = train_ae.parse(flags)
    drawn = {name: getattr(cfg, name) for name in "events limit labels features phi energy_unit seed".split()}
    state = load_checkpoint(path, "ae:ae")
    save_checkpoint(path, state | dict(data_hash=load_events("decay_chain", **drawn)[1]["rows_hash"]))


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_from_before_the_rooms_goes_on(kind, toy, tmp_path):
    folder, place, command, step = RUNS[kind]
    shutil.copytree(OLD / folder, tmp_path / place)
    experts = ("transformer", "state_space", "diffuser")
    if kind == "mla":
        command += "".join(f" --{expert}_ckpt checkpoints/{expert}_expert_interrupted.pt" for expert in experts)
    if kind == "diffuser":
        command += " --transformer_ckpt checkpoints/transformer_expert_interrupted.pt"
    script, *flags = command.format(toy=toy).split()
    if kind == "ae":
        as_drawn_here(tmp_path / place / "last.pt", flags)
    out, _ = finish(start(script, *flags, cwd=tmp_path))
    assert f"resumed {place}" in out and f"at step {step}" in out
    last = {"ae": 9, "multimodal": 8}.get(kind, 6)
    assert f"step {last} of {last}" in out or kind == "ae" and "epoch 2 of 4" in out
