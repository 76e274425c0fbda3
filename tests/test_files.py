"""What users write with other tools: byte-order marks, line ends of Windows, lists instead of lines."""

import json

import pytest
from conftest import run_python, user_error, write_questions, write_rows

from imae_jax.evaluate.benchmarks.protocols import load_primer
from imae_jax.evaluate.benchmarks.questions import load_data
from imae_jax.evaluate.inspector.excerpts import read_texts
from imae_jax.evaluate.runner.arguments import parse_methods
from imae_jax.files import Journal, new_directory, read_json, read_rows, read_text
from imae_jax.train.config import DataConfig, load_config
from imae_jax.train.data import load_rows


def with_mark(path):
    """The same file as a Windows editor saves it."""
    copy = path.with_name(f"marked_{path.name}")
    copy.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    return copy


def texts(path):
    path.write_text('{"prompt": "t5", "answer": "t6"}\n{"prompt": "t7"}\n')
    return path


def text(content):
    def write(path):
        path.write_text(content)
        return path

    return write


def read_pairs(path):
    return load_rows(DataConfig(source=str(path)))


READERS = {
    "rows.jsonl": (write_rows, read_pairs),
    "questions.csv": (write_questions, lambda path: load_data(str(path)).questions),
    "texts.jsonl": (texts, read_texts),
    "primer.txt": (text("Q: t3 t4\nA: t5 .\n\n"), lambda path: load_primer(str(path)).text),
    "methods.yaml": (
        text("- name: base\n- name: dola\n  candidates: low\n"),
        lambda path: parse_methods(str(path)),
    ),
    "config.json": (text('{"hidden_size": 8}'), read_json),
    "config.yaml": (text("model: here\nout: there\nseed: 3\n"), lambda path: load_config(str(path), [])),
}


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_belongs_to_no_text(tmp_path, name):
    write, read = READERS[name]
    path = write(tmp_path / name)
    assert read(with_mark(path)) == read(path)


def test_a_list_is_read_as_lines_are(tmp_path):
    lines = write_rows(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    for indent in (None, 2):
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=indent))
        for path in (tmp_path / "rows.json", with_mark(tmp_path / "rows.json")):
            assert read_pairs(path) == read_pairs(lines)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"a": 1}\n{"a": \n', ["file.jsonl line 2 is not JSON"]),
        (b'[{"a": 1}, \n', ["file.jsonl is not valid JSON"]),
        (b"\xff\xfe\x00", ["file.jsonl cannot be read as UTF-8"]),
    ],
)
def test_what_is_not_json_is_named(tmp_path, content, parts):
    (tmp_path / "file.jsonl").write_bytes(content)
    with user_error(*parts):
        read_rows(tmp_path / "file.jsonl", "data file")
    with user_error("data file", "cannot be read", "nowhere"):
        read_text(tmp_path / "nowhere", "data file")


def test_training_takes_a_list_with_a_byte_order_mark(checkpoint, tmp_path):
    rows = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = [f"model={checkpoint.directory}", "out=out", "optimizer.steps=1", "icd.enabled=false"]
    settings += [f"data.path={with_mark(tmp_path / 'rows.json')}", "data.source=halueval", "batch_size=4"]
    run = run_python(["-m", "imae_jax", "train", *settings, "units.intermediate_size=8"], tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "imae").is_dir()


def test_a_journal_drops_what_a_kill_has_cut_off(tmp_path):
    journal = Journal(tmp_path / "new" / "journal.jsonl", {"n": int}, "line {number} is not ours")
    assert journal.read() == []
    journal.append({"n": 1, "text": "a\u2028b"})
    journal.append({"n": 2, "text": float("nan")})
    records = [{"n": 1, "text": "a\u2028b"}, {"n": 2, "text": None}]
    whole = journal.path.read_bytes()
    for cut_off in (b"", b"{", b'{"n', b'{"n": 3, "text": "\xe2\x80'):
        journal.path.write_bytes(whole + cut_off)
        assert journal.read() == records
        assert journal.path.read_bytes() == whole + cut_off, "reading changes nothing"
        assert journal.resume() == records
        assert journal.path.read_bytes() == whole
    for foreign in (b"mine", b"mine\n", b"[]\n", b'{"n": "3"}\n', b'{"other": 3}', b'{"n": 3\n'):
        journal.path.write_bytes(whole + foreign)
        with user_error("journal.jsonl line 3 is not ours"):
            journal.resume()
        assert journal.path.read_bytes() == whole + foreign
    journal.path.write_bytes(whole + b'{"n": 3}')
    assert journal.resume() == [*records, {"n": 3}]
    assert journal.path.read_bytes() == whole + b'{"n": 3}\n'


def test_a_journal_refuses_damaged_bytes_and_leaves_them(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"index": 0, "text": "\xff"}\n{"index": 1}\n')
    with user_error("line 1 is damaged"):
        Journal(path, {"index": int}, "line {number} is damaged").resume()
    assert b"\xff" in path.read_bytes()


def test_overwriting_a_result_spares_what_the_command_does_not_write(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("mine")
    (out / "thesis.tex").write_text("mine")
    options = {"marker": "report.md", "contents": ("report.md", "*.png"), "overwrite": True}
    with user_error("out", "thesis.tex", "choose another output"), new_directory(out, **options):
        pass
    assert (out / "thesis.tex").read_text() == "mine"
    (out / "thesis.tex").rename(tmp_path / "thesis.tex")
    with new_directory(out, **options) as new:
        (new / "report.md").write_text("new")
    assert (out / "report.md").read_text() == "new"
