"""Six scripts and generate.py on a simulated GPU, a few steps each.

simulated_device.py says what is simulated. Each kind of device is one process, which imports torch once.
"""

import pytest

from tests.helpers import finish, slow, start
from tests.safety.simulated_device import build, simulate

TEXT = """--data_dir {data}/toy --domains code --tokenizer bytes --d_model 16 --n_heads 2 --max_seq_len 16
--batch_size 128 --lr 3e-3 --eval_windows 8 --log_interval 2 --checkpoint_dir text
--transformer_ckpt text/transformer_expert.pt"""
EXPERTS = dict(
    transformer="--n_layers 1 --ffn_mult 2",
    state_space="--n_layers 1 --d_inner 16 --d_state 2 --dt_rank 2",
    diffuser="--n_layers 1",
)
MLA = f"""train_mla.py {TEXT} --n_layers 1 --kv_latent_dim 8 --rope_dim 4 --grad_accum_steps 1 --use_vector_store
--max_vectors 100 --state_space_ckpt text/state_space_expert.pt --diffuser_ckpt text/diffuser_expert.pt"""
HRM = """train_hrm.py --d_model 16 --n_heads 2 --batch_size 4 --eval_batch_size 8 --eval_rows 8 --val_every 2
--segments 2 --log_steps 2"""
SUMS = f"{HRM} --dataset synthetic --run_name sums"
PUZZLES = f"{HRM} --dataset {{data}}/puzzles --max_seq_len 16 --core_layers 1 --run_name puzzles"
SR = """train_sr.py --encoder_dim 16 --decoder_input_dim 16 --decoder_model_dim 16 --encoder_n_heads 2
--decoder_n_heads 2 --encoder_ffn_hidden_dim 16 --decoder_ffn_hidden_dim 16 --decoder_n_layers 1 --encoder_n_sab 1
--encoder_n_isab 1 --batch_size 2 --val_size 4 --val_batch_size 4 --val_problems 1 --val_choices 2 --max_operators 3
--validate_interval 2 --holdout_pools none --wandb_mode disabled --steps 3 -o formulas"""
FORMULA = """generate.py formula --model formulas --data {data}/points.csv --max_seconds 0 --choices 4 --max_points 8
--restarts 1 --top 1"""
AE = "train_ae.py hidden=[8,8] latent_dim=4 codebook_size=8 events=80 batch_size=16 epochs=1 make_plots=false"
PAGES = """train_multimodal.py --arch smoke --data_paths {data}/pages --code_dir {data}/code --tasks continue sudoku4
--train_samples 8 --test_samples 4 --text_source stories --hidden_size 16 --global_batch_size 4 --supervision_steps 2
--text_supervision_steps 1 --H_cycles 1 --L_cycles 1 --L_layers 1 --decoder_layers 1 --latent_num_paths 2
--grad_monitor_every 2 --dqn_warmstart_steps 1 --halt_policy dqn --wandb disabled --log_file= --checkpoint_path pages
--epochs 5"""
ANSWER = "generate.py multimodal pages --steps 1 --input {data}"


def six_scripts(resume=True):
    """Each script trains, evaluates, saves and, if asked, resumes; then what it left is used."""
    for expert, sizes in EXPERTS.items():
        yield f"train_expert.py --expert {expert} {TEXT} {sizes} --max_steps 2"
    if resume:
        yield f"train_expert.py --expert transformer {TEXT} {EXPERTS['transformer']} --max_steps 3 --resume"
    yield "generate.py --checkpoint text/transformer_expert.pt --prompt In --max_new_tokens 3"
    yield f"{MLA} --max_steps 2"
    if resume:
        yield f"{MLA} --max_steps 3 --resume"
    yield "generate.py --checkpoint text/nanothink_mla.pt --prompt In --max_new_tokens 2"
    yield f"{SUMS} --steps 2"
    if resume:
        yield f"{SUMS} --steps 3"
    yield "generate.py --run_name sums --dataset synthetic --prompt 2+3 --temperature 0.5 --max_new_tokens 3"
    yield f"{SR} --max_steps 2" if resume else SR
    if resume:
        yield f"{SR} --resume-from auto"
    yield FORMULA
    yield f"{AE} latent_space=vq out=vq max_steps={2 if resume else 0}"
    if resume:
        yield "train_ae.py resume=vq max_steps=0"
    yield "generate.py events vq --mode sample --events 4"
    yield f"{PAGES} --max_steps 3"
    if resume:
        yield f"{PAGES} --max_steps 4"
    yield f"{ANSWER}/page.txt --task continue"


def everything():
    """The other experts, tasks, loops, latent spaces and modes besides."""
    yield from six_scripts()
    for expert in ("state_space", "diffuser"):
        yield f"train_expert.py --expert {expert} {TEXT} {EXPERTS[expert]} --max_steps 3 --resume"
    yield "generate.py --checkpoint text/state_space_expert.pt --prompt In --max_new_tokens 2"
    yield "generate.py --checkpoint text/diffuser_expert.pt --steps 2 --length 8"
    yield f"{PUZZLES} --steps 2"
    yield f"{PUZZLES} --steps 3"
    yield "generate.py --run_name puzzles --prompt 1.3...1..1....21"
    yield "train_hrm.py --dry_run --d_model 16 --max_seq_len 16"
    yield f"{FORMULA} --method beam --beam_width 2"
    yield f"{AE} loop=gan_ae latent_space=linear out=gan"
    yield f"{AE} loop=diffusion_ae latent_space=none encoder=gnn gnn_dim=8 gnn_layers=1 out=noise"
    yield f"{AE} loop=test_mlp out=mlp limit=64"
    yield "generate.py events noise --mode reconstruct --limit 4"
    yield "generate.py events vq --mode encode --limit 4 --out codes.npz"
    yield "generate.py events vq --mode decode --data codes.npz"
    yield "generate.py events vq --mode score --limit 4"
    yield f"{ANSWER}/puzzle.txt --task sudoku4 --paths 3 --noise 0.2 --png answer.png"


DEVICES = {  # float16 needs all that bfloat16 does, and a GradScaler
    "cuda7.5": ("cuda", (7, 5), lambda: six_scripts(resume=False), "cuda:0, float16"),
    "mps": ("mps", (0, 0), lambda: six_scripts(resume=False), "mps, float32"),
    "all of cuda7.5": ("cuda", (7, 5), everything, "cuda:0, float16"),
    "cuda8.0": ("cuda", (8, 0), everything, "cuda:0, bfloat16, TF32"),
    "all of mps": ("mps", (0, 0), everything, "mps, float32"),
}
QUICK = list(DEVICES)[:2]
SLOW = [slow(device) for device in DEVICES if device not in QUICK]

REFUSED = """
import torch
kind = "mps" if torch.backends.mps.is_available() else "cuda"
here, there = torch.ones(3, device=kind), torch.ones(3)
assert (here + 1).device == torch.device(kind, 0) and (here + here).cpu().tolist() == [2, 2, 2]
refused = {
    "a tensor of the CPU": lambda: here + there,
    "numpy": lambda: here.numpy(),
    "a generator of the CPU": lambda: torch.randn(3, device=kind, generator=torch.Generator()),
    "an index of the device": lambda: there[torch.tensor([0], device=kind)],
    "float64 on mps": lambda: here.double() if kind == "mps" else here.numpy(),
    "no index": lambda: torch.cuda.set_device(torch.device("cuda")),
}
for name, call in refused.items():
    try:
        call()
    except (RuntimeError, TypeError, ValueError, AttributeError):
        continue
    raise SystemExit(f"not refused: {name}")
"""


@pytest.fixture(scope="session")
def data(toy, tmp_path_factory):
    """One folder with the data of all scripts."""
    folder = tmp_path_factory.mktemp("simulated")
    (folder / "toy").symlink_to(toy)
    (folder / "code").mkdir()
    (folder / "points.csv").write_text("x,y\n" + "".join(f"{x},{2 * x * x + 1}\n" for x in range(1, 13)))
    (folder / "page.txt").write_text("The fox met Ada.\nThey ran home")
    (folder / "puzzle.txt").write_text("1.3.\n..1.\n.1..\n..21\n")
    sizes = ["--size=4", "--givens=8", "--train=20", "--val=8"]
    puzzles = start("prepare_data.py", "sudoku", f"--out={folder}/puzzles", *sizes)
    finish(start(*PAGES.format(data=folder).split(), "--dataset_only", "--device=cpu", cwd=folder))
    finish(puzzles)
    return folder


@pytest.fixture(scope="session")
def library(pytestconfig, tmp_path_factory):
    cache = getattr(pytestconfig, "cache", None)
    path = build(cache.mkdir("simulated_device") if cache else tmp_path_factory.mktemp("simulated_device"))
    if path is None:
        pytest.skip("no g++ to build the simulated device with")
    return path


@pytest.mark.parametrize("device", QUICK + SLOW)
def test_six_scripts_run_on_a_gpu_that_refuses_what_gpus_refuse(device, library, data, tmp_path):
    kind, capability, commands, hardware = DEVICES[device]
    (tmp_path / "refused.py").write_text(REFUSED)
    commands = [str(tmp_path / "refused.py"), *(command.format(data=data) for command in commands())]
    results = simulate(library, kind, capability, [command.split() for command in commands], tmp_path)
    failed = [
        f"{command}\nstatus {status}\n{out}"
        for command, (status, out) in zip(commands, results, strict=True)
        if status and not (status == 1 and "not solved: " in out)  # a model of three steps solves no Sudoku
    ]
    assert not failed, "\n\n".join(failed)
    first = {}
    for command, (_, out) in zip(commands, results, strict=True):
        first.setdefault(command.split()[0], out)
        if "resume" in command:
            assert "resumed" in out, command
    assert hardware in first["train_expert.py"] and len(first) == 8
