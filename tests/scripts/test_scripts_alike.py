"""The train scripts repeat themselves on purpose; this keeps the repeats from drifting apart."""

import ast
import difflib
import importlib
import re
import typing
from dataclasses import fields
from pathlib import Path

import pytest

import train_hrm
from data_utils.config import parser_of
from data_utils.errors import UsageError

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
    assert len(comments) >= 0.085 * len(lines), f"{len(comments)} comments in {len(lines)} lines"


BAD_MESSAGE = """raise DataError(
f"{BAD_STEPS} steps in a row were not finite, up to step {state.step}; "
f"last good file: {saver.last}\\n"
f"try: --lr {cfg.lr / 10:g}"
)"""


def test_what_all_scripts_say_of_a_bad_step_and_of_a_long_warmup_is_the_same():
    for name, text in TEXTS.items():
        message = text[text.index("if state.skipped_in_row == BAD_STEPS:") :].partition("# 4. Log.")[0].split("\n\n")[0]
        raised = [line.strip().replace("learning_rate", "lr") for line in message.splitlines()][1:6]
        expected = [line.strip() for line in BAD_MESSAGE.splitlines()]
        assert raised == expected, name
        assert "\nBAD_STEPS = 10  # steps in a row without a finite loss and gradient that end a run\n" in text, name
        length = "the whole schedule" if name in ("train_hrm", "train_sr") else "a tenth of the schedule"
        assert text.count("warmup cut from {cfg.warmup") == text.count(f" steps, {length}") == 1, name


FINE_TUNING = """\
    # Fine-tuning: where nothing is to be resumed, the weights may be those of another run.
    if cfg.init_from and not resumed_from:
        source =
        log(checkpoint.start_from(cfg, parts, source, header))
        del source
"""


def test_fine_tuning_has_the_same_words_and_the_same_place():
    helps = set()
    for name in sorted(TEXTS.keys() - {"train_ae"}):
        text = TEXTS[name]
        block = text[text.index("    # Fine-tuning:") :].partition("        del source\n")
        block = re.sub(
            r"(        source =).*\n(?:        (?:source|# Differs|frozen).*\n)*", r"\1\n", "".join(block[:2])
        )
        assert block == FINE_TUNING, name
        # Before that a checkpoint is resumed, after that a finished run leaves.
        place = text.index("    # Fine-tuning:")
        assert text[:place].endswith(("        del saved\n", "        del saved, saved_parts, tensors\n")), name
        assert text[place:].index("finished at step") < text[place:].index("saver = checkpoint.Saver("), name
        helps.add(re.search(r"^    init_from: .*$", text, re.M)[0])
    assert len(helps) == 1


def test_what_is_said_of_other_data_is_the_same():
    for name in sorted(TEXTS.keys() - {"train_ae"}):
        assert TEXTS[name].count('log("other data than before: best') == 1, name


def test_the_rate_of_a_step_follows_from_the_schedule_and_not_from_a_budget():
    for name, text in TEXTS.items():
        function = text[text.index("    def lr_at(") :].split("\n\n")[0]
        if name == "train_sr":
            function += text[text.index("def schedule(") :].split("\n\n")[0]
        assert "last_step" not in function and "max_" not in function, name


# ---- flags -----------------------------------------------------------------------------------------------------------

SIX = "expert mla hrm sr ae multimodal".split()


def everywhere(name):
    """The fields of an idea that all six scripts have under the same name."""
    return dict.fromkeys(SIX, name)


def of(text="", **others):
    """The fields of an idea by script; those of the two text scripts are the same."""
    return dict(expert=text, mla=text) | others


VOCABULARY = {  # idea: (names of its flag that work wherever it is, {script: the field that holds it})
    "peak rate": ("lr learning_rate", everywhere("lr") | dict(hrm="learning_rate")),
    "floor of the rate": (
        "min_lr_ratio lr_min_ratio",
        everywhere("min_lr_ratio") | dict(hrm="lr_min_ratio", multimodal="lr_min_ratio"),
    ),
    "warmup": ("warmup_steps", everywhere("warmup_steps") | dict(ae="warmup")),
    "warmup as a share": ("warmup_share", dict(sr="warmup")),
    "accumulation": (
        "grad_accum_steps gradient_accumulation_steps accumulate",
        of("grad_accum_steps", sr="gradient_accumulation_steps", ae="accumulate"),
    ),
    "clipping": (
        "grad_clip gradient_clip clip",
        of("grad_clip", hrm="grad_clip", sr="clip", ae="clip", multimodal="gradient_clip"),
    ),
    "passes": ("epochs max_epochs", of("max_epochs", hrm="epochs", ae="epochs", multimodal="epochs")),
    "length of the schedule": ("steps", everywhere("steps")),
    "budget": ("max_steps", everywhere("max_steps")),
    "budget in seconds": ("max_seconds", everywhere("max_seconds")),
    "steps between evaluations": (
        "val_every validate_interval",
        of("eval_interval", hrm="val_every", sr="validate_interval", multimodal="val_every"),
    ),
    # In the guide of train_multimodal.py it counts epochs, in steps everywhere else.
    "evaluations": (
        "eval_interval",
        of("eval_interval", hrm="val_every", sr="validate_interval", multimodal="eval_interval"),
    ),
    "epochs between evaluations": ("eval_epochs", dict(multimodal="eval_interval")),
    "log": (
        "log_interval log_steps",
        of("log_interval", hrm="log_steps", sr="log_interval", multimodal="log_interval"),
    ),
    "kept": ("keep checkpoint_limit", of("keep", hrm="checkpoint_limit")),
    "precision": ("dtype", everywhere("dtype")),
    "compile": ("compile", everywhere("compile")),
    "folder": (
        "out",
        of("checkpoint_dir", hrm="save_dir", sr="output_dir", ae="out", multimodal="checkpoint_path"),
    ),
    "resume": ("resume", everywhere("resume") | dict(sr="resume_from")),
    "start over": ("fresh", everywhere("fresh")),
    "fine-tuning": ("init_from", of("init_from", hrm="init_from", sr="init_from", multimodal="init_from")),
    "workers": ("num_workers workers", dict(hrm="dataset_workers", sr="num_workers", multimodal="workers")),
    "average of codes": ("codebook_decay ema_decay", dict(ae="codebook_decay")),
}
ABSENT = dict(  # flags that a script does not have, and says why
    mla=["fsdp"],
    hrm=["grad_accum_steps"],
    sr=["epochs", "max_epochs"],
    ae=["fsdp", "init_from"],
    multimodal=["grad_accum_steps", "fsdp"],
)
FIRST = dict(expert=["--expert=transformer"], hrm=["--dataset=synthetic"])  # words that a command line begins with
VARIANTS = dict(train_hrm=[train_hrm.SyntheticConfig, train_hrm.SudokuConfig])


def configurations(name):
    module = importlib.import_module(name)
    return [module.Config, *getattr(module, "CONFIGS", {}).values(), *VARIANTS.get(name, ())]


@pytest.mark.parametrize("idea", VOCABULARY)
@pytest.mark.parametrize("name", SIX)
def test_an_idea_has_the_same_flag_in_every_script(name, idea):
    common, holders = VOCABULARY[idea]
    for cls in configurations(f"train_{name}"):
        flags = parser_of(cls, "", name)._option_string_actions
        for word in common.split():
            action = flags.get(f"--{word}")
            if name in holders:
                assert action and action.dest == holders[name], f"{cls.__name__}: --{word}"
            else:  # nor does the name mean something else, but for the average of all weights
                assert not action or (name, word) == ("multimodal", "ema_decay"), f"{cls.__name__}: --{word}"


@pytest.mark.parametrize("name", ABSENT)
def test_a_flag_that_a_script_does_not_have_is_an_error_that_says_why(name, capsys):
    module = importlib.import_module(f"train_{name}")
    for word in ABSENT[name]:
        for typed in (f"--{word}=2", f"{word}=2"):
            with pytest.raises(SystemExit) as stopped:
                module.parse([typed])
            message = capsys.readouterr().err
            assert stopped.value.code == 2 and word in message and re.search("\n(try|fix): ", message)


@pytest.mark.parametrize("name", SIX)
def test_steps_and_epochs_together_are_an_error_that_names_both(name, capsys):
    module = importlib.import_module(f"train_{name}")
    for typed in (["--steps", "2000", "--epochs", "3"], ["steps=2000", "max_epochs=3"]):
        if name == "hrm":  # in its guide, steps override epochs: main says so
            cfg = module.parse([*FIRST.get(name, []), *typed])
            assert (cfg.steps, cfg.epochs) == (2000, 3)
            continue
        with pytest.raises((SystemExit, UsageError)) as error:
            module.main(module.parse([*FIRST.get(name, []), *typed]))
        message = capsys.readouterr().err or str(error.value)
        assert "--steps" in message and "epochs" in message
        assert not isinstance(error.value, SystemExit) or error.value.code == 2


@pytest.mark.parametrize("name", [name for name in SIX if name != "sr"])
def test_of_steps_and_epochs_the_one_that_is_typed_counts(name, tmp_path):
    module = importlib.import_module(f"train_{name}")
    field = VOCABULARY["passes"][1][name]

    def lengths(*words):
        cfg = module.parse([*FIRST.get(name, []), *words])
        return cfg.steps, getattr(cfg, field)

    for key, value, expected in (("steps", 70, (70, 0)), ("epochs", 7, (0, 7))):
        path = tmp_path / f"{key}.yaml"
        path.write_text(f"{key}: {value}\n")
        assert lengths(f"--{key}={value}") == lengths(f"{key}={value}") == lengths(f"--config={path}") == expected
    assert lengths(f"--config={tmp_path}/steps.yaml", "--epochs=7") == (0, 7)
    assert lengths(f"--config={tmp_path}/epochs.yaml", "--steps=70") == (70, 0)
    assert lengths("--steps=0", "--epochs=7") == (0, 7)


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
    ("# 6. Save.", "# 7. Best"),
    ("# 7. Best", "    # --- summary"),
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
