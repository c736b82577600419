"""The train scripts repeat themselves on purpose; this keeps the repeats from drifting apart."""

import ast
import difflib
import importlib
import re
import typing
from dataclasses import fields
from pathlib import Path

import pytest

from data_utils.config import parser_of

SCRIPTS = sorted(Path(__file__).parents[2].glob("train_*.py"))
SECTIONS = ["hardware", "data", "model and optimizer", "resume", "schedule, evaluation, stop", "train", "summary"]
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in SCRIPTS}
MARKER = "    # The marked lines end here.\n"
READABLE = [name for name, text in TEXTS.items() if "class RunState" in text]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_shape_of_script(path):
    text = path.read_text()
    assert re.findall(r"^    # --- (.+?) -+$", text, flags=re.M) == SECTIONS
    assert text.index("from_cli(") < text.index("import torch")
    assert "import plot_losses" not in text, "a figure that fails must not end a run: metrics.draw_losses"


def test_shared_fields_agree():
    seen = {}
    for path in SCRIPTS:
        for f in fields(importlib.import_module(path.stem).Config):
            if (path.stem, f.name) == ("train_multimodal", "ema"):
                continue  # on or off in its guide, the decay in that of train_hrm.py
            assert seen.setdefault(f.name, f.type) == f.type, f"{path.stem}: {f.name}"


def test_the_marked_lines_are_the_same_in_all_scripts():
    marked = {name: text for name, text in TEXTS.items() if MARKER in text}
    sections = {name: text[text.index("    # --- hardware") : text.index(MARKER)] for name, text in marked.items()}
    for name, section in sections.items():
        assert section == sections["train_expert"], name


# ---- style -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READABLE)
def test_one_statement_per_line_and_lines_that_fit(name):
    text = TEXTS[name]
    lines = text.splitlines()
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    packed = [node.lineno for node in statements if isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp)]
    assert not packed, f"a conditional expression as a statement in lines {packed}"
    assert "fmt: skip" not in text
    long = [number for number, line in enumerate(lines, 1) if len(line) > 100]
    assert len(long) <= 5, f"lines of more than 100 columns: {long}"
    comments = [line for line in lines if line.strip().startswith("#")]
    assert len(comments) >= 0.045 * len(lines), f"{len(comments)} comments in {len(lines)} lines"


# ---- flags -----------------------------------------------------------------------------------------------------------

IDEAS = {  # idea: (names that work wherever it is, fields that hold it)
    "peak rate": ("lr learning_rate", "lr learning_rate"),
    "floor of the rate": ("min_lr_ratio", "min_lr_ratio lr_min_ratio"),
    "accumulation": ("grad_accum_steps", "grad_accum_steps gradient_accumulation_steps accumulate"),
    "clipping": ("grad_clip", "grad_clip gradient_clip clip"),
    "passes": ("epochs max_epochs", "epochs max_epochs"),
    "evaluate every": ("eval_interval", "eval_interval val_every validate_interval"),
    "log": ("log_interval", "log_interval log_steps"),
    "kept": ("keep", "keep checkpoint_limit"),
    "precision": ("dtype", "dtype use_amp mixed_precision"),
    "compile": ("compile", "compile compile_mode"),
    "folder": ("out", "out checkpoint_dir save_dir output_dir checkpoint_path"),
    "resume": ("resume", "resume resume_from"),
    "workers": ("num_workers", "num_workers dataset_workers workers"),
    "average of codes": ("codebook_decay ema_decay", "codebook_decay"),
}
ONE_MEANING = ["lr", "learning_rate", "epochs", "max_epochs"]  # two fields of a script would be two meanings


def configurations(name):
    module = importlib.import_module(name)
    return [module.Config, *getattr(module, "CONFIGS", {}).values()]


@pytest.mark.parametrize("idea", IDEAS)
@pytest.mark.parametrize("name", READABLE)
def test_an_idea_has_the_same_flag_in_every_script(name, idea):
    common, holders = (names.split() for names in IDEAS[idea])
    for cls in configurations(name):
        held_by = [f.name for f in fields(cls) if f.name in holders]
        flags = parser_of(cls, "", name)._option_string_actions
        for word in common if held_by else ():
            assert "--" + word in flags, f"{cls.__name__} has {held_by[0]} and no --{word}"
            assert flags["--" + word].dest in held_by, f"{cls.__name__}: --{word} sets another field"
            assert word not in ONE_MEANING or flags["--" + word].dest == held_by[0]


@pytest.mark.parametrize("name", READABLE)
def test_precision_has_the_same_choices_in_every_script(name):
    for cls in configurations(name):
        choices = typing.get_args({f.name: f.type for f in fields(cls)}["dtype"])
        assert choices == ("auto", "float32", "bfloat16", "float16")


# ---- train_expert.py and train_mla.py --------------------------------------------------------------------------------

NAMES = {  # in train_expert.py: in train_mla.py
    'complete(cfg, CONFIGS, by="expert")': "complete(cfg, Config)",
    'f"{cfg.expert}_expert"': '"nanothink_mla"',
    'f"expert:{cfg.expert}"': '"expert:mla"',
    "expert=cfg.expert": 'expert="mla"',
}
ALIKE = {  # section: least share of its lines in train_expert.py that stand in train_mla.py too
    "data": 1.0,
    "resume": 0.98,
    "schedule, evaluation, stop": 1.0,
    "train": 0.97,
    "summary": 0.95,
}
EQUAL = [  # (first words, words before which it ends)
    ("class ModelConfig", "@dataclass"),
    ("class DataConfig", "# A `cosmetic`"),
    ("BAD_STEPS =", "\n"),
    ("class RunState", "def check("),
    ("    def lr_at(", "    @torch.no_grad()"),
    ("    def evaluate(", "    def at_evaluation("),
    ("    def at_evaluation(", "    # --- train"),
    ("    # --- train", "# 2. Forward and backward."),
    ("# 3. Step.", "# 4. Log."),
    ("# 5. Evaluate.", "# 6. Save."),
    ("# 6. Save.", "# 7. End"),
    ("# 7. End", "    # --- summary"),
]


@pytest.fixture(scope="module")
def two_scripts():
    """The text of train_expert.py with the names of train_mla.py, and the text of train_mla.py."""
    expert = TEXTS["train_expert"]
    for theirs, ours in NAMES.items():
        assert expert.count(theirs) == 1, theirs
        expert = expert.replace(theirs, ours)
    return expert, TEXTS["train_mla"]


def section(text, name):
    start = text.index(f"    # --- {name} -")
    ends = [text.find(f"    # --- {later} -") for later in SECTIONS[SECTIONS.index(name) + 1 :]]
    return text[start : ends[0] if ends else len(text)]


@pytest.mark.parametrize("first, after", EQUAL)
def test_blocks_of_the_two_text_scripts_are_equal(first, after, two_scripts):
    assert all(text.count(first) == 1 for text in two_scripts)
    starts = [text.index(first) for text in two_scripts]
    blocks = [text[start : text.index(after, start)] for text, start in zip(two_scripts, starts, strict=True)]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("name", ALIKE)
def test_sections_of_the_two_text_scripts_are_alike(name, two_scripts):
    expert, router = (section(text, name).splitlines() for text in two_scripts)
    matcher = difflib.SequenceMatcher(None, expert, router, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    assert same >= ALIKE[name] * len(expert)


def test_each_difference_of_the_router_begins_with_a_comment_that_says_so(two_scripts):
    expert, router = (text[text.index("class RunState") :].splitlines() for text in two_scripts)
    matcher = difflib.SequenceMatcher(None, expert, router, autojunk=False)
    differences = []  # [first line, line after it]; a few equal lines may stand in one
    for tag, _, _, start, end in matcher.get_opcodes():
        if tag == "equal":
            continue
        if differences and start - differences[-1][1] <= 3:
            differences[-1][1] = end
        else:
            differences.append([start, end])
    for start, end in differences:
        assert "# Differs: " in "\n".join(router[start : start + 1]), "\n".join(router[start:end])
