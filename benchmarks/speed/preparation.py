"""Figures of data preparation, each beside the plain way to do it, in turn on the same input.

    python -m benchmarks.speed.preparation                        # 64 MB of text, three rounds
    python -m benchmarks.speed.preparation --rows ingest --times 5

The plain way (`--plain`): a whitespace BPE, one process, `json.dump` of a row with the same ids on all sides, reading
by json.loads of every line. Memory is the high-water mark of a command's largest process, polled. Text comes out of
installed packages (data_utils/text/corpus.py), repeated up to --mb. Needs pyarrow.
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

LENGTH = 256
PLAIN = "-m", "benchmarks.speed.preparation", "--plain"


def plain(source, out, vocab_size):
    """The plain way of `language`: train the tokenizer of folder `out`, or write its train.jsonl and val.jsonl."""
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
            for encoding in bpe.encode_batch(group):
                for start in range(0, len(encoding.ids), LENGTH - 2):
                    ids = [1, *encoding.ids[start : start + LENGTH - 2], 2]
                    row = dict(encoder_ids=ids[:-1], decoder_input_ids=ids[:-1], labels=ids[1:])
                    file = val if draw.random() < 0.02 else train
                    json.dump(row, file)
                    file.write("\n")
            group = []


if __name__ == "__main__" and "--plain" in sys.argv:  # a measured child process: its imports count
    plain(*sys.argv[2:])
    sys.exit()

from benchmarks.report import ROOT, changed_flags, command_line, compared, measure
from data_utils.reasoning.dataset import open_pairs, open_splits
from data_utils.reasoning.folder import read_row
from data_utils.text import corpus
from data_utils.tokenizer import load_tokenizer


# --- inputs -----------------------------------------------------------------------------------
def documents():
    """Yield the texts of the installed sources, for ever, each time with another first line."""
    texts = []
    for read, *_ in corpus.SOURCES.values():
        try:
            texts += [text for _, text in corpus.clean_documents(read())]
        except FileNotFoundError:
            continue
    random.Random(0).shuffle(texts)
    for turn in itertools.count():
        yield from (f"{turn}\n{text}" for text in texts)


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


# --- commands ---------------------------------------------------------------------------------
def run(*words):
    """Run a command -> seconds, high-water MB of its largest process."""
    start, highest = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        for process in (child.pid, *children(child.pid)):
            try:
                match = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process}/status").read_text())
            except OSError:
                continue
            highest = max(highest, int(match[1]) * 1024 / 1e6 if match else 0)
        time.sleep(0.05)
    if child.returncode:
        sys.exit(f"{words} ended with status {child.returncode}")
    return time.perf_counter() - start, highest


def children(process):
    try:
        return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


# --- rows -------------------------------------------------------------------------------------
class Bench:
    """Parquet, tokenizers and folders that the rows share."""

    def __init__(self, args, folder):
        self.args, self.folder = args, Path(folder)
        self.source = self.folder / "text.parquet"
        self.out = self.folder / "out"
        self.tokenizer = self.folder / "tokenizer.json"
        self.megabytes = write_parquet(self.source, args.mb)
        small = self.folder / "small.parquet"
        write_parquet(small, min(args.mb, 8))
        run("prepare_data.py", "tokenizer", "--source", small, "--vocab_size", args.vocab, "--out", self.tokenizer)
        self.plainly()  # trains

    def ours(self, source=None, form="bin"):
        flags = ["--tokenizer", self.tokenizer, "--tokenizer-num-threads", 2, "--format", form, "--fresh"]
        return run("prepare_data.py", "language", "--source", source or self.source, "--dest", self.out, *flags)

    def plainly(self):
        return run(*PLAIN, self.source, self.folder / "plain", self.args.vocab)

    def language(self, args):
        """Whole commands: parquet -> prepared folder."""
        rounds = [(self.ours()[0], self.plainly()[0]) for _ in range(args.times)]
        tokens = sum(open_splits(self.out)[0][f"{split}_tokens"] for split in ("train", "val"))
        title = f"`language`, {self.megabytes:.0f} MB of parquet to bin, 2 processes"
        speeds = [tuple(self.megabytes / s for s in r) for r in rounds]
        yield compared("text", f"{title}, against the plain way", speeds, ">= 9", unit="MB/s")
        yield compared("tokens", title, [(tokens / 1e6 / r[0],) for r in rounds], ">= 2.5", unit="million tokens/s")
        tokenizer, (_, splits) = load_tokenizer(f"bpe:{self.tokenizer}"), open_splits(self.out)
        import pyarrow.parquet

        expected = set(pyarrow.parquet.read_table(self.source)["text"].to_pylist())
        lost = expected - decoded(tokenizer, splits)
        yield compared("lost", "`language`, documents lost in the decoded rows", [(len(lost),)], "0")

    def memory(self, args):
        """High-water marks at one and at four times the size."""
        large = self.folder / "large.parquet"
        write_parquet(large, 4 * args.mb)
        small, four = self.ours()[1], self.ours(large)[1]
        title = f"`language`, peak memory of its largest process, {4 * args.mb:g} MB of text against {args.mb:g} MB"
        yield compared("growth", title, [(four, small)], "ours <= 400, ratio 0.9 to 1.1", unit="MB")
        title = f"`language`, peak memory, {args.mb:g} MB of text, against the plain way"
        yield compared("peak", title, [(small, self.plainly()[1])], "ours <= 400", unit="MB")
        os.unlink(large)

    def size(self, args):
        """Bytes on disk, opening, batches."""
        self.ours(form="both")
        self.plainly()

        def stored(folder, *patterns):
            return sum(p.stat().st_size for pattern in patterns for p in Path(folder).glob(pattern)) / 1e6

        binary = stored(self.out, "*.bin", "*.npy")
        same_ids = plain_bytes(open_splits(self.out)[1]) / 1e6
        for id, baseline, megabytes, target in (
            ("plain", "the plain way's JSONL", stored(self.folder / "plain", "*.jsonl"), "<= 0.143"),
            ("same_ids", "JSONL of the same ids in the plain way", same_ids, "<= 0.143"),
            ("our_jsonl", "our own JSONL", stored(self.out, "*.jsonl"), ""),
        ):
            yield compared(id, f"prepared rows as bin, against {baseline}", [(binary, megabytes)], target, unit="MB")
        rounds = []
        for _ in range(args.times):
            start = time.perf_counter()
            open_splits(self.out)
            opened = time.perf_counter()
            with open(self.folder / "plain" / "train.jsonl") as file:
                rows = [json.loads(line) for line in file]
            rounds.append(((opened - start) * 1e3, (time.perf_counter() - opened) * 1e3))
        yield compared("opening", "opening, against json.loads of every line", rounds, "ours < 10", unit="ms")
        data, plainly = open_pairs(self.out), padded_lists(rows)
        order, rounds = data.order(0, 0), []
        for _ in range(args.times + 1):  # the first one warms up
            speeds = []
            for batch_of in (lambda index: data.batch("train", index), plainly):
                start, tokens = time.perf_counter(), 0
                for index in order[: 32 * min(200, len(order) // 32)].reshape(-1, 32):
                    batch = batch_of(index)
                    tokens += int(batch["encoder_mask"].sum() + batch["decoder_mask"].sum())
                speeds.append(tokens / (time.perf_counter() - start) / 1e6)
            rounds.append(speeds)
        title = f"batches of 32 rows of up to {LENGTH}, against padding lists of the plain way"
        yield compared("batches", title, rounds[1:], "ours >= 50", unit="million ids/s")

    def ingest(self, args):
        """normalize-qa, and JSONL folders read with one and with two processes."""
        source, size = self.folder / "qa.jsonl", 0
        with open(source, "w", encoding="utf-8") as file:
            for text in documents():
                row = dict(data=dict(question=text[:200], answers=dict(text=[text[200:1000]]), context=text[1000:2000]))
                line = json.dumps(row, ensure_ascii=False) + "\n"
                size += len(line.encode("utf-8"))
                file.write(line)
                if size > args.mb * 1e6:
                    break
        flags = f"--input {source} --output {source}.out --fresh --question-field data.question"
        words = ["prepare_data.py", "normalize-qa", *flags.split(), "--answer-field", "data.answers.text[0]"]
        runs = [run(*words) for _ in range(args.times)]
        yield compared("normalize", "`normalize-qa`, whole command", [(size / 1e6 / s,) for s, _ in runs], ">= 30",
                       unit="MB/s")  # fmt: skip
        yield compared("normalize_memory", "`normalize-qa`, peak memory of its largest process",
                       [(mb,) for _, mb in runs], "flat", unit="MB")  # fmt: skip
        self.ours(form="jsonl")
        meta = json.loads((self.out / "meta.json").read_text())
        rows = meta["train_samples"] + meta["val_samples"]
        speeds = [[self.read_speed(rows, n) for n in (2, 1)] for _ in range(args.times)]
        title = "reading a JSONL folder, 2 processes against 1"
        yield compared("reading", title, speeds, "ratio >= 1.7", unit="rows/s")

    def read_speed(self, rows, processes):
        for path in (self.out / ".cache").glob("*"):
            path.unlink()
        start = time.perf_counter()
        open_splits(self.out, workers=processes, say=lambda *words: None)
        return rows / (time.perf_counter() - start)


def decoded(tokenizer, splits):
    """Return the set of documents that the rows of a text folder hold."""
    texts = set()
    for ids, index in splits.values():
        document = []
        for i in range(len(index)):
            encoder_ids, labels, _ = read_row(ids, index, i)
            document += [encoder_ids[1:], labels]
            if labels[-1] == tokenizer.eos_id:
                texts.add(tokenizer.decode(np.concatenate(document)))
                document = []
    return texts


def plain_bytes(splits):
    """Return the bytes of the rows written the plain way: all ids of a row in each of three lists."""
    size = 0
    for ids, index in splits.values():
        for i in range(len(index)):
            row = np.concatenate(read_row(ids, index, i)).tolist()
            size += len(json.dumps(dict(encoder_ids=row, decoder_input_ids=row, labels=row))) + 1
    return size


def padded_lists(rows):
    """Return a function that pads the rows of json.loads one by one: index -> batch."""
    import torch

    def batch_of(index):
        batch = {}
        for name in ("encoder_ids", "decoder_input_ids", "labels"):
            side = [rows[i % len(rows)][name] for i in index]
            longest = max(map(len, side))
            batch[name] = torch.tensor([ids + [0] * (longest - len(ids)) for ids in side])
        masks = dict(encoder_mask="encoder_ids", decoder_mask="labels")
        return batch | {mask: (batch[name] != 0).long() for mask, name in masks.items()}

    return batch_of


ROWS = ("language", "memory", "size", "ingest")


def main(argv=None):
    parser = command_line(__doc__, ROWS, "speed.preparation", mb=64.0, times=3, vocab=8192)
    args = parser.parse_args(argv)
    args.threads = 2
    flags = changed_flags(parser, args, ["mb", "times"])
    if args.quick:
        args.mb, args.times = 0.5, 1
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        measure(args, {name: getattr(bench, name) for name in ROWS}, flags)


if __name__ == "__main__":
    main()
