"""Rows in the layouts of published data sets: the right pairs, and a count or an error for what is no pair."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest

from data_utils import documents
from data_utils.errors import DataError, UsageError
from data_utils.reasoning import generate as answers
from data_utils.reasoning import layouts, sources
from data_utils.reasoning.layouts import pairs_of, string_of
from data_utils.reasoning.rows import read_texts, texts_of
from tests.data_utils.reasoning.test_prepare import config, language, normalized, put


def turns(*texts, names=("role", "content"), roles=("user", "assistant")):
    return [{names[0]: roles[i % 2], names[1]: text} for i, text in enumerate(texts)]


SHAREGPT = dict(names=("from", "value"), roles=("human", "gpt"))
LAYOUTS = {
    "prompt, response": (dict(prompt="q", response="a"), [("q", "a")]),
    "OpenAI, legacy": (dict(prompt="q", completion="a"), [("q", "a")]),
    "OpenAI": (dict(messages=[dict(role="system", content="s"), *turns("q", "a")]), [("s\nq", "a")]),
    "OpenAI, parts": (
        dict(messages=turns([dict(type="text", text="q")], [dict(type="text", text="a")])),
        [("q", "a")],
    ),
    "OpenAI, tools": (
        dict(messages=[*turns("q"), dict(role="assistant", content=None, tool_calls=[dict(id="1")]),
                       dict(role="tool", content="ok"), dict(role="assistant", content="a")]),
        [("q", '[{"id": "1"}]'), ('q\n[{"id": "1"}]\nok', "a")],
    ),
    "OpenAI, weight": (
        dict(messages=[*turns("q"), dict(role="assistant", content="no", weight=0), *turns("q2", "a")]),
        [("q\nno\nq2", "a")],
    ),
    "ShareGPT": (dict(id=1, conversations=turns("q", "a", "b", "c", **SHAREGPT)), [("q", "a"), ("q\na\nb", "c")]),
    "ShareGPT, answer first": (dict(conversations=turns("q", "a", **SHAREGPT)[::-1]), [("", "a")]),
    "ShareGPT, role and content": (dict(conversations=turns("q", "a")), [("q", "a")]),
    "ShareGPT, system": (dict(system="s", conversations=turns("q", "a", **SHAREGPT)), [("s\nq", "a")]),
    "tools": (
        dict(conversations=[{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"},
                            {"from": "observation", "value": "o"}, {"from": "gpt", "value": "a"}]),
        [("q\nf\no", "a")],
    ),
    "Alpaca": (dict(instruction="q", input="i", output="a"), [("q\ni", "a")]),
    "Alpaca, history": (
        dict(instruction="q", input="", output="a", system="s", history=[["h1", "h2"]]), [("s\nh1\nh2\nq", "a")],
    ),
    "Dolly": (dict(instruction="q", context="c", response="a", category="x"), [("c\nq", "a")]),
    "question, context": (dict(question="q", context="c", answer="a"), [("c\nq", "a")]),
    "paragraphs": (dict(question="q", context=["c", "d"], answer="a"), [("c\nd\nq", "a")]),
    "SQuAD of Hugging Face": (
        dict(question="q", context="c", answers=dict(text=["a", "b"], answer_start=[0, 1])), [("c\nq", "a")],
    ),
    "BoolQ": (dict(question="q", passage="p", answer=True), [("p\nq", "true")]),
    "numbers": (dict(question=1, answer=2.5), [("1", "2.5")]),
    "DPO": (dict(prompt="q", chosen="a", rejected="no"), [("q", "a")]),
    "DPO, turns": (dict(prompt=turns("q"), chosen=turns("a", roles=("assistant", "")), rejected=[]), [("q", "a")]),
    "DPO, all turns": (dict(prompt="q", chosen=turns("q", "a"), rejected=turns("q", "no")), [("q", "a")]),
    "DPO without a prompt": (dict(chosen=turns("q", "a"), rejected=turns("q", "no")), [("q", "a")]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    row, expected = LAYOUTS[name]
    assert pairs_of(row, Counter()) == expected
    read = {key for key in row if key not in ("id", "category", "rejected")}
    assert read <= layouts.COLUMNS  # of a table only these are read


def test_columns_may_have_any_case_and_a_guess_follows_names(tmp_path):
    row = dict(ID="1", Answer="gut", Question="Wie geht es?", Context="c")
    assert pairs_of(row, Counter()) == [("c\nWie geht es?", "gut")] and layouts.has_layout(row)
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame([row]).to_parquet(tmp_path / "a.parquet")
    assert rows_in(tmp_path / "a.parquet")[0] == [[("c\nWie geht es?", "gut")]]

    def advice(*names):
        return layouts.advice("a.csv", dict.fromkeys(names, "some text"))

    assert "try: " in advice("topic", "The Answer", "question_text", "id")
    assert advice("The Answer", "question_text").endswith(
        "--question-field question_text --answer-field 'The Answer' --skip-missing"
    )
    assert "--question-field frage --answer-field antwort" in advice("frage", "antwort")
    assert advice("frage", "antwort", "thema").startswith(
        "fix: for the text of one field, --text-field with one of frage, antwort, thema; for q"
    )
    assert advice("body") == "try: --text-field body --fresh"


def test_a_row_without_text_after_others_is_skipped_by_a_flag(tmp_path):
    put(tmp_path / "a.jsonl", [dict(question="q", answer="a"), dict(frage="q", antwort="a")])
    with pytest.raises(DataError, match="a.jsonl:2: no text: (?s:.*)try: --skip-bad-lines --fresh"):
        rows_in(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="none.jsonl: no such file or folder"):
        sources.find_files(tmp_path / "none.jsonl")
    (tmp_path / "b.tsv").write_text("")
    with pytest.raises(DataError, match="1 other files, such as b.tsv"):
        sources.find_files(tmp_path / "b.tsv")


@pytest.mark.parametrize("role", [*layouts.ASSISTANTS, "ChatGPT", "GPT"])
def test_every_assistant_answers(role):
    assert pairs_of(dict(messages=[dict(role="user", content="q"), dict(role=role, content="a")]), {}) == [("q", "a")]


MISSING = [
    (dict(question="q", answer=None), "no_answer"),
    (dict(question="q", answer=float("nan")), "no_answer"),
    (dict(question=None, answer="a"), "no_question"),
    (dict(question="q", answers=dict(text=[], answer_start=[])), "no_answer"),
    (dict(messages=turns("only a question")), "no_answer"),
    (dict(messages=[]), "no_answer"),
    (dict(text=None), "null_text"),
    (dict(text=float("nan")), "null_text"),
    (dict(text=" \n"), "empty_rows"),
]


@pytest.mark.parametrize("row, reason", MISSING)
def test_what_is_left_out_is_counted_by_reason(row, reason):
    counts = Counter()
    assert not texts_of(row, ("text",), counts)
    assert counts == {reason: 1}


@pytest.mark.parametrize(
    "row, message",
    [
        (dict(messages=[dict(role="narrator", content="x")]), "unknown role: narrator; an answer is of assistant gpt"),
        (dict(messages=[dict(content="x")]), "unknown role: None"),
        (dict(messages=["x"]), "a turn is str"),
        (dict(messages=turns("q", [dict(type="image_url", image_url="x")])), "content is image_url"),
        (dict(question=dict(a=1), answer="a"), "question is dict"),
        (dict(text=dict(a=1)), "text is dict"),
        (dict(title="x"), "no text: fields title"),
    ],
)
def test_what_cannot_be_read_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        texts_of(row, ("text",), Counter())


def test_string_of():
    values = ["x", 3, -2.5, True, False, None, float("nan"), ["a", None, ["b", 1]], 10**20]
    expected = ["x", "3", "-2.5", "true", "false", None, None, "a\nb\n1", "1" + "0" * 20]
    assert [string_of(value, "x") for value in values] == expected


def rows_in(path, **more):
    reading = dict(text_field=("text",), lang="", collapse_whitespace=False, skip_bad_lines=False) | more
    counts = Counter()
    return [row for task in sources.split_tasks([path]) for row in read_texts(task, counts, **reading)], counts


def test_arrays_per_file_and_per_line(tmp_path):
    chat = turns("q", "a")
    contents = {
        "turns.jsonl": json.dumps(chat) + "\n" + json.dumps(chat),
        "rows.jsonl": json.dumps([dict(messages=chat)]) + "\n" + json.dumps(dict(messages=chat)),
        "one_line.json": json.dumps([dict(messages=chat)] * 2),
        "spread_out.jsonl": json.dumps([dict(messages=chat)] * 2, indent=1),
        "objects.jsonl": "\n".join(json.dumps(dict(messages=chat), indent=1) for _ in "ab"),
        "LINES.JSON": "\n".join(json.dumps(dict(messages=chat)) for _ in "ab"),
        "conversations.json": json.dumps([chat, chat]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
        assert rows_in(tmp_path / name)[0] == [[("q", "a")]] * 2, name
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        assert rows_in(tmp_path / f"{name}.gz")[0] == [[("q", "a")]] * 2, name
    assert len(sources.find_files(tmp_path)) == 2 * len(contents)


def test_line_ends_of_an_old_mac(tmp_path):
    rows = [json.dumps(dict(question=f"q{i}", answer="a\rb")) for i in range(3)]
    (tmp_path / "a.jsonl").write_bytes("\r".join([*rows, ""]).encode())
    assert rows_in(tmp_path / "a.jsonl")[0] == [[(f"q{i}", "a\rb")] for i in range(3)]
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r")
    assert rows_in(tmp_path / "a.txt")[0] == ["one", "two"]
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one"}\r{"text": \r{"text": "three"}\r')
    assert list(documents.read_documents(tmp_path / "b.jsonl", skip_bad_lines=True)) == ["one", "three"]


def test_a_file_md_is_one_document_and_a_readme_beside_the_data_is_none(tmp_path):
    (tmp_path / "a.md").write_text("# One\n\nand more\n")
    for name in ("README.md", "LICENSE.txt"):
        (tmp_path / name).write_text("what this is")
    assert sources.find_files(tmp_path) == [tmp_path / "a.md"]
    assert rows_in(tmp_path / "a.md")[0] == ["# One\n\nand more\n"]
    assert sources.find_files(tmp_path / "README.md") == [tmp_path / "README.md"]


def test_csv(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer\n"What, then?",one\nand,"two\nlines"\nx,a,b\n')
    with pytest.raises(DataError, match="a.csv:5: bad row: more values than the 2 columns"):
        rows_in(tmp_path / "a.csv")
    rows, counts = rows_in(tmp_path / "a.csv", skip_bad_lines=True)
    assert rows == [[("What, then?", "one")], [("and", "two\nlines")]]
    assert counts == {"bad_rows": 1, "bad_rows, bad row: more values than the 2 columns: quote them": 1}


def test_a_folder_of_save_to_disk_is_read_without_its_json(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "train").mkdir()
    table = pyarrow.table(dict(text=["one", "two"]))
    with pyarrow.ipc.new_stream(str(tmp_path / "train" / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in "dataset_dict.json", "train/state.json", "train/dataset_info.json":
        (tmp_path / name).write_text("{}")
    assert [path.name for path in sources.find_files(tmp_path)] == ["data-00000-of-00001.arrow"]
    (tmp_path / "rows").mkdir()
    put(tmp_path / "rows" / "state.json", [dict(text="a state of the union")])  # a name like any other without .arrow
    assert len(sources.find_files(tmp_path / "rows")) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_refused(tmp_path, name, encoding):
    content = json.dumps(dict(text="some words of it")).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=f"{name}: UTF-16, convert it: iconv -f UTF-16"):
        language(tmp_path / name, tmp_path / "out")


def test_other_bytes_are_named_by_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(DataError, match="a.txt:2: invalid UTF-8(?s:.*)iconv -f CP1252"):
        rows_in(tmp_path / "a.txt")
    (tmp_path / "a.json").write_bytes(b'[{"text": "fine"}, {"text": "caf\xe9"}]')
    with pytest.raises(DataError, match="a.json: value 1 or later: invalid UTF-8.*CP1252, convert it: iconv"):
        rows_in(tmp_path / "a.json")
    (tmp_path / "a.txt").write_bytes(b"fine\nwith a \0 byte\n")
    with pytest.raises(DataError, match="a.txt:2: .*NUL"):
        rows_in(tmp_path / "a.txt")


def test_prompts_of_a_file_have_no_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfWhat is 1 + 2?\r\n\r\nWhat is 3 + 4?")
    assert answers._read_lines(tmp_path / "a.txt") == ["What is 1 + 2?", "What is 3 + 4?"]
    (tmp_path / "a.txt").write_text("What is 1 + 2?", encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16, convert it"):
        answers._read_lines(tmp_path / "a.txt")
    with pytest.raises(UsageError, match="No such file"):
        answers._read_lines(tmp_path / "b.txt")


def test_language_counts_and_names_what_it_leaves_out(tmp_path, capsys):
    rows = [dict(question="q", answer="a", id=1), dict(question="r", answer=None), dict(messages=turns("alone"))]
    put(tmp_path / "a.jsonl", [*rows, dict(messages=[dict(role="narrator", content="x")])])
    with pytest.raises(DataError, match="a.jsonl:4: unknown role: narrator"):
        language(tmp_path / "a.jsonl", tmp_path / "out", val_ratio=0.0)
    language(tmp_path / "a.jsonl", tmp_path / "out", val_ratio=0.0, skip_bad_lines=True, fresh=True)
    counts = json.loads((tmp_path / "out" / "meta.json").read_text())["counts"]
    assert counts["no_answer"] == 2 and counts["bad_rows"] == counts["bad_rows, unknown role: narrator"] == 1
    shown = capsys.readouterr().out
    assert "not used: id" in shown and "'no_answer': 2" in shown and "unknown role: narrator" in shown


# ---- normalize-qa ----------------------------------------------------------------------------------------------------


def test_normalize_qa_missing_values_and_kinds(tmp_path, capsys):
    nan = float("nan")
    rows = [dict(q="x", a=nan), dict(q="y", a=None), dict(q=nan, a="b"), dict(q="z", a=False), dict(q=3, a=1.5)]
    assert normalized(tmp_path, rows) == [("x", ""), ("y", ""), ("", "b"), ("z", "false"), ("3", "1.5")]
    assert normalized(tmp_path, rows, skip_missing=True) == [("z", "false"), ("3", "1.5")]
    assert "3 skipped (1 without question, 2 without answer)" in capsys.readouterr().out


def test_normalize_qa_context(tmp_path):
    rows = [dict(q="q", a="a", context=["One.", "Two."]), dict(q="r", a="b", context=None)]
    template = dict(prompt_template="{question} | {context}")
    assert normalized(tmp_path, rows, context_field="context", **template)[0] == ("q | One.\nTwo.", "a")
    assert normalized(tmp_path, rows, context_field="context[1]", **template)[0] == ("q | Two.", "a")
    with pytest.raises(DataError, match="no context in .*first row: q, a, context(?s:.*)other --context-field"):
        normalized(tmp_path, rows, context_field="contxt", **template)
    with pytest.raises(UsageError, match="{context}, and no field(?s:.*)--context-field"):
        normalized(tmp_path, rows, **template)
    with pytest.raises(UsageError, match="no template holds {context}(?s:.*)--prompt-template"):
        normalized(tmp_path, rows, context_field="context")


def test_normalize_qa_of_a_csv(tmp_path):
    assert normalized(tmp_path, b'q,a\n"x, y",z\n', "in.csv") == [("x, y", "z")]


# ---- sudoku ----------------------------------------------------------------------------------------------------------


def test_sudoku_says_how_many_givens_there_are(tmp_path, capsys):
    from data_utils.reasoning import prepare

    options = dict(size=4, train=9, val=3, num_threads=1)
    prepare.sudoku(config("sudoku", out=str(tmp_path / "a"), givens=2, **options))
    shown = capsys.readouterr()
    givens = np.count_nonzero(np.load(tmp_path / "a" / "train.npy")[:, 0], axis=1)
    assert givens.min() > 2 and "--givens 2: 100% of the puzzles keep more" in shown.err
    assert shown.out.startswith(f"givens: {givens.min()} to ")
    prepare.sudoku(config("sudoku", out=str(tmp_path / "b"), givens=12, **options))
    shown = capsys.readouterr()
    assert shown.out.startswith("givens: 12 to 12, 12.0 on average") and not shown.err
