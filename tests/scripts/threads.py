"""Train again and again in one process, on several threads, and compare what is left; test_threads.py starts it.

`python tests/scripts/threads.py CASES PLACE COUNTS`: CASES are names of cases, comma separated, PLACE a folder with
what they read, COUNTS of threads, such as 2,4. PLACE/FIRST_CASE.json then says for each case how much was compared,
what differed, and what may differ.
"""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from data_utils.launch import launch
from faults.lab import LANGUAGE, SCRIPTS, digests, results, words_of
from models import halting

# each is large enough for torch to split its work: tensors of more than 32,768 numbers
SIZES = """--d_model 96 --n_heads 4 --max_seq_len 64 --max_steps 4 --save_minutes 1 --eval_windows 8
--grad_accum_steps 1 --no-use_amp"""
EXPERT = f"""--data_dir {{place}}/data --checkpoint_dir run --transformer_ckpt {{place}}/experts/transformer_expert.pt
{LANGUAGE} {SIZES} --n_layers 1"""
AE = "batch_size=64 latent_dim=16 hidden=[96,96] gnn_dim=48 epochs=3 save_minutes=1"
CASES = dict(  # what a case adds to the flags of the fault lab; those of an expert stand alone
    transformer=("expert", f"--expert transformer {EXPERT}"),
    state_space=("expert", f"--expert state_space {EXPERT} --d_inner 192 --d_state 8 --dt_rank 8"),
    diffuser=("expert", f"--expert diffuser {EXPERT}"),
    mla=("mla", f"{SIZES} --kv_latent_dim 32 --use_vector_store --max_vectors 800"),
    sums=("hrm", "--d_model 96 --n_heads 4 --batch_size 64 --steps 4 --eval_rows 64 --save_minutes 1"),
    puzzles=("hrm", "--dataset {place}/puzzles --d_model 64 --n_heads 8 --batch_size 8 --core_layers 4 "
             "--max_seq_len 36 --segments 2 --steps 4 --eval_rows 8 --save_minutes 1"),
    sr=("sr", "--encoder_dim 96 --decoder_input_dim 96 --decoder_model_dim 96 --encoder_ffn_hidden_dim 192 "
        "--decoder_ffn_hidden_dim 192 --batch_size 16 --steps 4 -vi 4 -ci 2 --save_minutes 1"),
    multimodal=("multimodal", "hidden_size=96 num_heads=4 dqn_warmstart_steps=2 max_steps=5 train_samples=64 "
                "global_batch_size=16 save_minutes=1"),
    ae=("ae", f"{AE} encoder=gan decoder=gnn"),
    gan_ae=("ae", f"{AE} loop=gan_ae encoder=gan level=token"),
    diffusion_ae=("ae", f"{AE} loop=diffusion_ae"),
)  # fmt: skip


class Repeats(TorchDispatchMode):
    """Within it `names` collects operations that on a CPU add several numbers to one place in the order threads come.

    Those are the backward passes of x[index] and of take. An index with no entry twice does no harm, nor does a mask.
    """

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation = function._schema.name
        if "index_put" in operation and dict(enumerate(args)).get(3, (kwargs or {}).get("accumulate")):
            index = [part for part in args[1] if part is not None]
            if args[0].is_floating_point() and not any(part.dtype == torch.bool for part in index):
                rows = torch.stack([part.flatten() for part in torch.broadcast_tensors(*index)], 1)
                if len(rows.unique(dim=0)) < len(rows):
                    self.names.add(f"{operation} into {tuple(args[0].shape)}")
        elif operation.startswith("aten::put") and args[0].is_floating_point():
            self.names.add(operation)
        return function(*args, **(kwargs or {}))


def command(name, place):
    """The script of a case, as the fault lab knows it, and its words."""
    letter, flags = CASES[name]
    script = SCRIPTS[letter]
    if letter == "expert":
        return replace(script, metrics=f"run/{name}_expert_metrics.jsonl"), words_of(flags, place=place)
    return script, words_of(f"{script.flags} {flags}", place=place)


def train(name, place, folder, *more, stop_after=0):
    """Run a case in `folder`, to its end or until SIGTERM comes after a step."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    script, words = command(name, place)
    module, steps = import_module(script.file.removesuffix(".py")), [0]

    def count(*_):
        steps[0] += 1
        if steps[0] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(count)
    try:
        launch(module.main, module.parse([*words, *more]))
    except SystemExit as end:
        if end.code != (143 if stop_after else 0):
            raise
    finally:
        hook.remove()


def compare(name, place, counts):
    """Train twice on each count of threads, once with a stop between -> how much was compared, what differs or may."""
    script, repeats = command(name, place)[0], Repeats()

    def folder(run):
        return place / f"{name} {run}"

    def differ(run, other):
        a, b = (digests(results(script, folder(each))) for each in (run, other))
        return [f"{run} and {other}: {key}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]

    differences = []
    for threads in counts:
        torch.set_num_threads(threads)
        with repeats:
            train(name, place, folder(f"{threads}"))
        train(name, place, folder(f"{threads} resumed"), stop_after=2)
        train(name, place, folder(f"{threads} resumed"), *words_of(script.go_on))
        differences += differ(f"{threads}", f"{threads} resumed")
    for path in folder(f"{counts[0]}").glob("run/*_expert.pt"):
        shutil.copy(path, place / "experts")  # for the cases that build on it
    compared = len(digests(results(script, folder(f"{counts[0]}"))))
    return dict(compared=compared, differ=differences, repeats=sorted(repeats.names))


if __name__ == "__main__":
    names, place, counts = sys.argv[1].split(","), Path(sys.argv[2]), [int(count) for count in sys.argv[3].split(",")]
    sys.modules["data_utils.figures"] = None  # no figures
    halting.LEARN_FROM = 16  # transitions, in place of 1,000
    (place / "experts").mkdir(exist_ok=True)
    if "multimodal" in names:
        train("multimodal", place, place / "pages of", "dataset_only=true", "checkpoint_path=none")
    report = {name: compare(name, place, counts) for name in names}
    (place / f"{names[0]}.json").write_text(json.dumps(report))
