"""Figures of data preparation, each beside the plain way to do it, in turn on the same input.

    python benchmarks/prepare_data.py                        # 64 MB of text, three rounds
    python benchmarks/prepare_data.py --rows ingest --times 5
    python benchmarks/prepare_data.py --rows "" --readme     # only write the table into README.md

The plain way (`--plain`): a whitespace BPE, one process, `json.dump` of a row with the same ids on all sides, reading
by json.loads of every line. Memory is the high-water mark of a command's largest process, polled. Text comes out of
installed packages (data_utils/text/corpus.py), again and again until there are --mb of it. Needs pyarrow.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LENGTH = 256


def plain(source, out, vocab_size):
    """The plain way of `language`: trains the tokenizer of folder `out`, or writes its train.jsonl and val.jsonl."""
    import pyarrow.parquet
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    def texts(n=None):
        for batch in itertools.islice(pyarrow.parquet.ParquetFile(source).iter_batches(512, columns=["text"]), n):
            yield from (" ".join(text.split()) for text in batch.to_pydict()["text"])

    path = Path(out, "tokenizer.json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        bpe = Tokenizer(models.BPE(unk_token="<unk>"))
        bpe.pre_tokenizer = pre_tokenizers.Whitespace()
        special = ["<pad>", "<bos>", "<eos>", "<unk>"]
        bpe.train_from_iterator(texts(4), trainers.BpeTrainer(vocab_size=int(vocab_size), special_tokens=special))
        bpe.save(str(path))
        return
    bpe, draw, group = Tokenizer.from_file(str(path)), random.Random(1337), []
    with open(f"{out}/train.jsonl", "w") as train, open(f"{out}/val.jsonl", "w") as val:
        for text in itertools.chain(texts(), [None]):
            if text is not None:
                group.append(text)
            if len(group) < 256 and text is not None:
                continue
            for found in bpe.encode_batch(group):
                for start in range(0, len(found.ids), LENGTH - 2):
                    ids = [1, *found.ids[start : start + LENGTH - 2], 2]
                    row = dict(encoder_ids=ids[:-1], decoder_input_ids=ids[:-1], labels=ids[1:])
                    file = val if draw.random() < 0.02 else train
                    json.dump(row, file)
                    file.write("\n")
            group = []


if __name__ == "__main__" and "--plain" in sys.argv:  # a child process that is measured: what it imports counts
    plain(*sys.argv[2:])
    sys.exit()

from benchmarks.report import command_line, figure, measure
from data_utils.reasoning.dataset import open_pairs, open_splits
from data_utils.reasoning.folder import read_row
from data_utils.text import corpus
from data_utils.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent


def documents():
    """Yield the texts of the installed sources, for ever, each time with another first line."""
    found = []
    for read, *_ in corpus.SOURCES.values():
        try:
            found += [text for _, text in corpus.clean(read())]
        except FileNotFoundError:
            continue
    random.Random(0).shuffle(found)
    for turn in itertools.count():
        yield from (f"{turn}\n{text}" for text in found)


def write_parquet(path, megabytes):
    import pyarrow
    import pyarrow.parquet

    schema, size, rows = pyarrow.schema([("text", pyarrow.string())]), 0, []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for text in documents():
            rows.append(text)
            size += len(text.encode("utf-8"))
            if len(rows) == 200 or size > megabytes * 1e6:
                writer.write_table(pyarrow.table(dict(text=rows), schema))
                rows = []
            if size > megabytes * 1e6:
                return size / 1e6


def measured(*words):
    """Run a command -> (seconds, high-water MB of its largest process)."""
    start, highest = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, *map(str, words)], cwd=HERE.parent, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        for process in (child.pid, *children(child.pid)):
            try:
                found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process}/status").read_text())
            except OSError:
                continue
            highest = max(highest, int(found[1]) * 1024 / 1e6 if found else 0)
        time.sleep(0.05)
    if child.returncode:
        sys.exit(f"{words} ended with status {child.returncode}")
    return time.perf_counter() - start, highest


def children(process):
    try:
        return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder = args, Path(folder)
        self.source, self.out = self.folder / "text.parquet", self.folder / "out"
        self.megabytes = write_parquet(self.source, args.mb)
        small = self.folder / "small.parquet"
        write_parquet(small, min(args.mb, 8))
        measured("prepare_data.py", "tokenizer", "--source", small, "--vocab_size", args.vocab, "--out", self.tokenizer)
        measured(__file__, "--plain", self.source, self.folder / "plain", args.vocab)  # trains

    @property
    def tokenizer(self):
        return self.folder / "tokenizer.json"

    def ours(self, source=None, form="bin"):
        flags = ["--tokenizer", self.tokenizer, "--tokenizer-num-threads", 2, "--format", form, "--fresh"]
        return measured("prepare_data.py", "language", "--source", source or self.source, "--dest", self.out, *flags)

    def plainly(self, source=None):
        return measured(__file__, "--plain", source or self.source, self.folder / "plain", self.args.vocab)

    def language(self):
        """Whole commands: parquet -> prepared folder."""
        rounds = [(self.ours()[0], self.plainly()[0]) for _ in range(self.args.times)]
        tokens = sum(open_splits(self.out)[0][f"{split}_tokens"] for split in ("train", "val"))
        name = f"`language`, {self.megabytes:.0f} MB of parquet to bin, 2 processes, against the plain way"
        yield figure(f"{name}, MB/s", ">= 9", [tuple(self.megabytes / s for s in r) for r in rounds])
        yield figure(f"{name}, million tokens/s", ">= 2.5", [(tokens / 1e6 / r[0],) for r in rounds])
        tokenizer, (_, splits) = load_tokenizer(f"bpe:{self.tokenizer}"), open_splits(self.out)
        import pyarrow.parquet

        expected = set(pyarrow.parquet.read_table(self.source)["text"].to_pylist())
        lost = expected - decoded(tokenizer, splits)
        yield figure("`language`, documents not found again in the decoded rows", "0", [(len(lost),)])

    def memory(self):
        """High-water marks at one and at four times the size."""
        large = self.folder / "large.parquet"
        write_parquet(large, 4 * self.args.mb)
        small, four = self.ours()[1], self.ours(large)[1]
        target = "ours <= 400, ratio 0.9 to 1.1"
        name = f"`language`, peak MB of its largest process, {4 * self.args.mb} MB of text against {self.args.mb} MB"
        yield figure(name, target, [(four, small)])
        name = f"peak MB, {self.args.mb} MB of text, against the plain way"
        yield figure(name, "ours <= 400", [(small, self.plainly()[1])])
        os.unlink(large)

    def size(self):
        """Bytes on disk, opening, batches."""
        self.ours(form="both")
        self.plainly()

        def stored(folder, *patterns):
            return sum(p.stat().st_size for pattern in patterns for p in Path(folder).glob(pattern)) / 1e6

        binary, plainly = stored(self.out, "*.bin", "*.npy"), stored(self.folder / "plain", "*.jsonl")
        yield figure("prepared rows, MB as bin, against the plain way's JSONL", "<= 0.143", [(binary, plainly)])
        name = "prepared rows, MB as bin, against JSONL of the same ids in the plain way"
        yield figure(name, "<= 0.143", [(binary, repeated(open_splits(self.out)[1]) / 1e6)])
        ours = stored(self.out, "*.jsonl")
        yield figure("prepared rows, MB as bin, against our own JSONL", "", [(binary, ours)])
        rounds = []
        for _ in range(self.args.times):
            start = time.perf_counter()
            open_splits(self.out)
            opened = time.perf_counter()
            with open(self.folder / "plain" / "train.jsonl") as file:
                rows = [json.loads(line) for line in file]
            rounds.append(((opened - start) * 1e3, (time.perf_counter() - opened) * 1e3))
        yield figure("opening, ms, against json.loads of every line", "ours < 10", rounds)
        data, plainly = open_pairs(self.out), lists(rows)
        order, rounds = data.order(0, 0), []
        for _ in range(self.args.times + 1):  # the first one warms up
            speeds = []
            for batch in (lambda index: data.batch("train", index), plainly):
                start, tokens = time.perf_counter(), 0
                for index in order[: 32 * min(200, len(order) // 32)].reshape(-1, 32):
                    found = batch(index)
                    tokens += int(found["encoder_mask"].sum() + found["decoder_mask"].sum())
                speeds.append(tokens / (time.perf_counter() - start) / 1e6)
            rounds.append(speeds)
        name = f"batches of 32 rows of up to {LENGTH}, million ids/s, against padding lists of the plain way"
        yield figure(name, "ours >= 50", rounds[1:])

    def ingest(self):
        """normalize-qa, and JSONL folders read with one and with two processes."""
        source, size = self.folder / "qa.jsonl", 0
        with open(source, "w", encoding="utf-8") as file:
            for text in documents():
                row = dict(data=dict(question=text[:200], answers=dict(text=[text[200:1000]]), context=text[1000:2000]))
                line = json.dumps(row, ensure_ascii=False) + "\n"
                size += len(line.encode("utf-8"))
                file.write(line)
                if size > self.args.mb * 1e6:
                    break
        fields = "--question-field data.question --answer-field data.answers.text[0]".split()
        command = [
            "prepare_data.py",
            "normalize-qa",
            "--input",
            source,
            "--output",
            f"{source}.out",
            "--fresh",
            *fields,
        ]
        found = [measured(*command) for _ in range(self.args.times)]
        yield figure("`normalize-qa`, MB/s, whole command", ">= 30", [(size / 1e6 / s,) for s, _ in found])
        yield figure("`normalize-qa`, peak MB of its largest process", "flat", [(mb,) for _, mb in found])
        self.ours(form="jsonl")
        rows = open_meta(self.out)
        speeds = [[self.read(rows, n) for n in (2, 1)] for _ in range(self.args.times)]
        yield figure("reading a JSONL folder, rows/s, 2 processes against 1", "ratio >= 1.7", speeds)

    def read(self, rows, processes):
        for path in (self.out / ".cache").glob("*"):
            path.unlink()
        start = time.perf_counter()
        open_splits(self.out, workers=processes, say=lambda *words: None)
        return rows / (time.perf_counter() - start)


def open_meta(folder):
    meta = json.loads(Path(folder, "meta.json").read_text())
    return meta["train_samples"] + meta["val_samples"]


def decoded(tokenizer, splits):
    """Return the set of documents that the rows of a text folder hold."""
    found = set()
    for ids, index in splits.values():
        document = []
        for i in range(len(index)):
            encoder_ids, labels, _ = read_row(ids, index, i)
            document += [encoder_ids[1:], labels]
            if labels[-1] == tokenizer.eos_id:
                found.add(tokenizer.decode(np.concatenate(document)))
                document = []
    return found


def repeated(splits):
    """Return the bytes of the rows written as the plain way does: all ids of a row in each of three lists."""
    size = 0
    for ids, index in splits.values():
        for i in range(len(index)):
            row = np.concatenate(read_row(ids, index, i)).tolist()
            size += len(json.dumps(dict(encoder_ids=row, decoder_input_ids=row, labels=row))) + 1
    return size


def lists(rows):
    """A function that pads the rows of json.loads one by one."""
    import torch

    def batch(index):
        chosen = [rows[i % len(rows)] for i in index]
        out = {}
        for name in ("encoder_ids", "decoder_input_ids", "labels"):
            side = [row[name] for row in chosen]
            longest = max(map(len, side))
            out[name] = torch.tensor([ids + [0] * (longest - len(ids)) for ids in side])
        masks = dict(encoder_mask="encoder_ids", decoder_mask="labels")
        return out | {mask: (out[name] != 0).long() for mask, name in masks.items()}

    return batch


ROWS = ("language", "memory", "size", "ingest")


def main(argv=None):
    parser = command_line(__doc__, ROWS, "prepare_data")
    add = parser.add_argument
    add("--mb", type=float, default=64, help="text, default 64")
    add("--times", type=int, default=3, help="rounds, default 3")
    add("--vocab", type=int, default=8192, help="ids of the tokenizers, default 8192")
    args = parser.parse_args(argv)
    args.threads = 2
    said = "".join(f" --{n} {getattr(args, n)}" for n in ("mb", "times") if getattr(args, n) != parser.get_default(n))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder) if args.rows else None
        rows = {name: lambda _, name=name: getattr(bench, name)() for name in ROWS}
        measure(args, rows, lambda row: said)


if __name__ == "__main__":
    main()
