"""Each command of README.md and docs/ runs to its end at toy size: pytest -m slow tests/scripts/test_commands.py"""

import importlib.util
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest

from data_utils.reasoning.sudoku import sudoku
from tests.data_utils.reasoning.test_weights import published
from tests.helpers import MLA, ROOT, SIZES, TINY, finish, launch, start, start_two
from tests.scripts.test_readme import PAGES, commands

pytestmark = pytest.mark.slow
MOST_SECONDS = 900  # of a command, on a busy machine

SMALL = {  # script: flags after those of the command, which make it a run of a step or two
    "train_expert.py": [*TINY, "--steps=4", "--warmup_steps=1"],
    "train_mla.py": [*TINY, *MLA, "--steps=4", "--warmup_steps=1"],
    "train_hrm.py": "--steps=4 --batch_size=8 --d_model=16 --n_heads=2 --eval_rows=8 --dtype=float32".split(),
    "train_sr.py": """--encoder_dim=16 --encoder_n_heads=2 --encoder_ffn_hidden_dim=16 --encoder_n_seeds=2
        --decoder_input_dim=16 --decoder_model_dim=16 --decoder_n_heads=2 --decoder_n_layers=1
        --decoder_ffn_hidden_dim=16 --batch_size=1 --val_size=2 --val_problems=0 --steps=2""".split(),
    "train_ae.py": "events=300 epochs=1 hidden=[8] codebook_size=8 gnn_dim=8 make_plots=false dropout=0".split(),
    "train_multimodal.py": """--train_samples=64 --test_samples=8 --hidden_size=32 --num_heads=2 --global_batch_size=4
        --max_steps=3 --build_batch=4 --page_rows=2 --page_cols=24 --text_source=stories --memory_slots=8
        --vq_size=16 --num_capsules=4 --wandb=disabled --epochs=1""".split(),
    "prepare_data.py events": ["--events=300"],
    "prepare_data.py sudoku": ["--train=20", "--val=10"],
    "prepare_data.py expert": ["--toy"],
    "prepare_data.py language": ["--fresh"],
    "generate.py formula": ["--max_seconds=1"],
    "benchmarks.front": ["--metrics=checkpoints/transformer_expert_metrics.jsonl", "--out=front.png"],
}
SMALLER = {  # words of a command: what stands in their place
    "--length 128": "--length 16",
    "none,linear,vq epochs=10,20": "none,vq",  # a sweep takes each key once
    "data/ansr-data/sr-cpu/skeleton_pool_val": "few_skeletons",
}
NOT_HERE = {  # how commands begin that run elsewhere: why
    "python3 -m venv": "installs",
    "source .venv": "installs",
    "pip install": "installs",
    "bash scripts/demo.sh": "installs, and is at no toy size",
    "bash scripts/experts.sh": "half an hour; with --smoke it runs",
    "bash scripts/test.sh": "this test is part of it",
    "bash scripts/gpu_check.sh": "tests/benchmarks/test_gpu_check.py runs it at toy size",
    "bash scripts/pretrained.sh": "replaces a model of the repo; tests/benchmarks/test_pretrained.py runs its parts",
    "python -m faults": "minutes to hours; tests/benchmarks/test_faults.py runs some rows",
    "python -m benchmarks.quality": "hours; test_laws.py, test_puzzles.py and test_report.py run them at toy size",
    "python benchmarks/run.py": "replaces results of the repo; tests/benchmarks/test_report.py writes a page of them",
    "python prepare_data.py events --generator pythia": "needs pythia8mc",
    "torchrun --nnodes": "needs several machines",
}
BROKEN = "not solved|no path"  # words on an answer to a puzzle
NEEDS = {r"\S+\.(h5|hdf5)\b": "h5py", r"\S+\.root\b": "uproot"}  # words of a command: the package that reads such files


def why_not(command):
    """Return why a command of a page does not run here; "" if it does."""
    packages = [package for words, package in NEEDS.items() if re.search(words, command)]
    missing = [f"needs {package}" for package in packages if not importlib.util.find_spec(package)]
    reasons = [why for begin, why in NOT_HERE.items() if command.startswith(begin) and "--smoke" not in command]
    return next(iter(reasons + missing), "")


def toy(command, folder):
    """Return the words of a command at toy size, without the interpreter."""
    command = re.sub(r"^torchrun (--\S+ \S+ )+", "python ", command)
    sweeps = sorted(str(path.relative_to(folder)) for path in folder.glob("outputs/multiruns/exp_*"))
    command = re.sub(r"outputs/multiruns/exp_\w+-\w+|FOLDER_OF_THE_SWEEP", (sweeps or ["none"])[0], command)
    for long, short in SMALLER.items():
        command = command.replace(long, short)
    words = shlex.split(command)[1:]
    if words[0] == "-m":
        return [*words, *SMALL[words[1]]]
    if "--help" in words:
        return words
    flags = SMALL.get(words[0], SMALL.get(" ".join(words[:2]), []))
    if words[0] == "train_expert.py":
        expert = next((name for name in SIZES if name in words), "transformer")
        flags = [*flags, *SIZES[expert]]
    return [*words, *flags]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("furnished"))


@pytest.fixture
def place(furnished, tmp_path):
    """A copy for one page, so that each page can be read first."""
    return shutil.copytree(furnished, tmp_path / "place", symlinks=True)


def furnish(folder):
    """Make `folder` like a clone after the examples: configurations, data under the names of the docs, small runs."""
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "pendulum.csv", folder / "benchmarks")
    for path in ROOT.glob("*.py"):  # for the shell scripts, which install nothing here
        (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "scripts" / "setup.sh").write_text("")
    (folder / "data").mkdir()
    write_tables(folder)
    write_text(folder)
    write_puzzles(folder)
    write_events(folder)
    write_runs(folder)
    return folder


def write_tables(folder):
    table = "x,y\n" + "".join(f"{i},{2 * i}\n" for i in range(1, 9))
    for name in ("my.csv", "table.csv"):
        (folder / name).write_text(table)
    pool = "--config configs/sr-cpu/skeleton_pool_val.yaml --output_dir few_skeletons --size 4"
    run(folder, f"prepare_data.py generate-skeleton-pool {pool}")


def write_text(folder):
    lines = [f'{{"text": "Line {i} of my text is here."}}\n' for i in range(60)]
    (folder / "my_data.jsonl").write_text("".join(lines))
    (folder / "page.txt").write_text("Anna met ____.\n")
    lines = [f"Anna met Ben on day {i} of the year to walk along the river.\n" for i in range(300)]
    (folder / "my.txt").write_text("".join(lines))
    pairs = [f'{{"question": "What is {i} + {i}?", "answer": "It is {2 * i}."}}\n' for i in range(60)]
    for name in ("qa.jsonl", "qa2.jsonl", "train.jsonl"):
        (folder / name).write_text("".join(pairs))
    run(folder, "prepare_data.py expert --data_dir my_data")
    shutil.copytree(folder / "my_data", folder / "data", dirs_exist_ok=True)
    for name in ("toy", "demo"):
        shutil.copytree(folder / "my_data", folder / "data" / name)
    shutil.copytree(folder / "my_data" / "code", folder / "data" / "my_domain")


def write_puzzles(folder):
    puzzles, answers = sudoku(size=9, givens=30, n=40, seed=0)
    lines = [["".join(map(str, grid)).replace("0", ".") for grid in grids] for grids in (puzzles, answers)]
    lines = list(zip(*lines, strict=True))
    (folder / "sudoku.csv").write_text("question,answer\n" + "".join(f"{q},{a}\n" for q, a in lines))
    (folder / "puzzles.txt").write_text("".join(f"{q}\n" for q, _ in lines[:2]))
    (folder / "sudoku-extreme").mkdir()
    for name, half in dict(train=lines[:20], test=lines[20:]).items():
        text = "source,question,answer,rating\n" + "".join(f"a,{q},{a},60\n" for q, a in half)
        (folder / "sudoku-extreme" / f"{name}.csv").write_text(text)
    (folder / "puzzle.txt").write_text("...1\n1...\n.123\n.3..\n")
    small = sudoku(size=6, givens=20, n=1, seed=0)[0][0]
    (folder / "puzzle6.txt").write_text("".join(map(str, small)).replace("0", ".") + "\n")
    walls = "#" * 11
    (folder / "maze.txt").write_text("\n".join([walls, "#S" + " " * 7 + "G#", *[walls] * 9]) + "\n")
    (folder / "tasks").mkdir()
    for number in range(1, 10):
        pairs = [dict(input=[[color, number]], output=[[number, color]]) for color in range(4)]
        task = json.dumps(dict(train=pairs[1:], test=pairs[:1]))
        (folder / "tasks" / f"{number:08}.json").write_text(task)
    (folder / "task.json").write_text(task)
    (folder / "arc-agi_test_challenges.json").write_text(json.dumps({"00000009": json.loads(task)}))
    published(folder)[0].rename(folder / "step_65100")
    (folder / "checkpoints" / "trm").mkdir(parents=True)
    shutil.copy(folder / "step_65100", folder / "checkpoints" / "trm")


def write_events(folder):
    """Events of petri, and in the layouts of other programs: jets, blocks, tables, trees."""
    run(folder, "prepare_data.py events --out data/events.npz")
    run(folder, "prepare_data.py events --out data/odd.npz --seed 1")
    shutil.copy(folder / "data" / "events.npz", folder / "events.npz")
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    particles = np.stack([30 + rng.exponential(30, (60, 12)), *rng.normal(size=(2, 60, 12)), np.full((60, 12), 4)], 2)
    if importlib.util.find_spec("h5py"):
        import h5py

        rows = np.load(folder / "events.npz")
        for name in ("train", "val", "test"):
            with h5py.File(folder / f"{name}.h5", "w") as file:
                file["X"], file["y"] = rows[f"X_{name}"], rows[f"Y_{name}"]
        for name in ("g", "q", "t"):
            with h5py.File(folder / f"{name}.hdf5", "w") as file:
                file["particle_features"] = particles[..., [1, 2, 0, 3]] / [10, 10, 1000, 4]
                file["jet_features"] = np.tile([1000.0, 0.0, 80.0, 12.0], (60, 1))
        block = np.zeros((60, 2101))
        block[:, :36], block[:, 2100] = particles[..., :3].reshape(60, 36), labels
        with h5py.File(folder / "events_anomalydetection.h5", "w") as file:
            file["df/axis0"] = file["df/block0_items"] = np.arange(2101)
            file["df/axis1"], file["df/block0_values"] = np.arange(60), block
    if importlib.util.find_spec("uproot"):
        import uproot

        with uproot.recreate(folder / "mine.root") as file:
            file.mktree("events", dict(Particles=np.dtype(("f4", (12, 4))), truth="i4"))
            file["events"].extend(dict(Particles=particles.astype("f4"), truth=labels.astype("i4")))
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (folder / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.S)[1])


def write_runs(folder):
    for expert in SIZES:
        run(folder, f"train_expert.py --expert {expert}")
    run(folder, "train_mla.py")
    for name in ("qa", "qa2"):
        run(folder, f"prepare_data.py language --source qa.jsonl --dest datasets/{name}")
    run(folder, "train_hrm.py --dataset datasets/qa --run_name qa --save_best_model")
    run(folder, "train_ae.py out=outputs/runs/run_a")
    run(folder, "train_ae.py --multirun latent_space=vq")
    run(folder, "prepare_data.py puzzles --source tasks --out datasets/arc")
    for name in ("sudoku4", "sudoku6", "cpu", "arc --puzzles datasets/arc", "code_optimized"):
        run(folder, f"train_multimodal.py --arch {name}")
    run(folder, "train_sr.py")


def run(folder, command):
    """Run a command of a page at toy size, in a folder like a clone."""
    flags, typed = dict(cwd=folder), folder / "puzzle6.txt"
    if " | python" in command:
        text, _, command = command.partition(" | ")
        typed = folder / "typed.txt"
        typed.write_text(" ".join(shlex.split(text)[1:]) + "\n")
    if ".py" not in command and not command.startswith("python"):  # echo, mkdir; a shell script
        process = launch(["bash", "-c", command], **flags)
    else:
        words = toy(command if command.startswith(("python", "torchrun")) else f"python {command}", folder)
        print(" ".join(words))
        if command.startswith("torchrun"):  # test_parallel.py has torchrun itself
            for rank in start_two(*words, **flags):
                finish(rank, seconds=MOST_SECONDS)
            return
        if words[0] == "-m":
            process = launch([sys.executable, *words], **flags)
        elif "--input -" in command:
            with open(typed) as inputs:
                process = launch([sys.executable, str(ROOT / words[0]), *words[1:]], stdin=inputs, **flags)
        else:
            process = start(*words, **flags)
    try:
        finish(process, seconds=MOST_SECONDS)
    except AssertionError as e:  # so few steps teach nobody to solve a puzzle, which is status 1
        if process.returncode != 1 or not re.search(BROKEN, str(e)):
            raise


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, place):
    chosen = [command for command in dict.fromkeys(commands(PAGES[page])) if not why_not(command)]
    for command in chosen:
        run(place, command)
    assert chosen or page == "faults.md"


def test_commands_that_run_elsewhere_are_there():
    texts = [command for page in PAGES.values() for command in commands(page)]
    assert not [begin for begin in NOT_HERE if not any(text.startswith(begin) for text in texts)]
