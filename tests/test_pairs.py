"""Data as pairs: any file of question, right and wrong answer; the check of such a file; the builders."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import user_error

from imae_jax.config import LlamaConfig, RopeConfig
from imae_jax.evaluate.benchmarks.questions import DEMO_DATA
from imae_jax.train import build_pairs, pairs
from imae_jax.train.__main__ import main
from imae_jax.train.config import DataConfig, load_config
from imae_jax.train.data import (
    Example,
    Merging,
    Row,
    choose_merging,
    load_rows,
    make_batch,
    read_source,
    tokenize,
)

ROWS = [Row("Q 1?", "It is red.", "It is blue."), Row("Q, 2?", "two\nlines", "one")]
NAMED = ["data.columns.question=q", "data.columns.right=good", "data.columns.wrong=bad"]


def config_of(*settings: str) -> DataConfig:
    return load_config(None, ["model=unused", "out=unused", *settings]).data


def write_table(path: Path, rows: list[Row], names=("q", "good", "bad")) -> Path:
    """As the suffix says, with a byte order mark as spreadsheets write it and a column more."""
    cells = [dict(zip(names, vars(row).values(), strict=True)) | {"id": "x"} for row in rows]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, ["id", *names])
            writer.writeheader()
            writer.writerows(cells)
        elif path.suffix == ".json":
            json.dump(cells, file)
        else:
            file.writelines(json.dumps(row) + "\n" for row in cells)
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_any_table_is_a_source(tmp_path, suffix):
    path = write_table(tmp_path / f"rows.{suffix}", ROWS)
    assert load_rows(config_of(f"data.source={path}", *NAMED)) == ROWS
    with user_error(
        path, "'question'", "id", "q, good, bad" if suffix != "csv" else "bad", "data.columns.question"
    ):
        load_rows(config_of(f"data.source={path}"))


def test_a_hub_id_is_a_source(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"q": "Q?", "good": "a", "bad": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = ["data.source=owner/name", "data.hub_name=qa", "data.hub_split=test", *NAMED]
    assert load_rows(config_of(*settings)) == [Row("Q?", "a", "b")]
    assert asked == [("owner/name", "qa", "test")]
    with user_error("owner/name row 0", "'question'", "q, good, bad"):
        load_rows(config_of("data.source=owner/name"))


def test_a_hub_without_network_is_one_line():
    with user_error("owner/name", "cannot be fetched from the hub"):
        load_rows(config_of("data.source=owner/name"))


def test_equal_answers_and_damaged_tables_are_named(tmp_path):
    path = write_table(tmp_path / "rows.csv", [*ROWS, Row("Q 3?", "same ", "same")])
    with user_error(f"{path} line 5", "same right and wrong answer"):
        load_rows(config_of(f"data.source={path}", *NAMED))
    path.write_text('q,good,bad\n"Q?,a,b\n')
    with user_error(path, "not valid CSV"):
        load_rows(config_of(f"data.source={path}", *NAMED))
    for line, fields in (("Q?,a", 2), ("Q?,Yes, sir.,No.", 4)):
        path.write_text(f"q,good,bad\n{line}\n")
        with user_error(f"{path} line 2 has {fields} fields, the header 3", "quote"):
            load_rows(config_of(f"data.source={path}", *NAMED))
    path.write_text("q,good,bad\n")
    with user_error(path, "no rows"):
        load_rows(config_of(f"data.source={path}", *NAMED))


def test_answers_of_the_same_tokens_are_refused(checkpoint):
    # Both words are unknown to the tiny tokenizer.
    rows = [Row("t3 t4", "t5", "t6"), Row("t3", "hello", "bye")]
    with user_error("row 1", "'hello'", "same tokens"):
        tokenize(rows, checkpoint.load().tokenizer, DataConfig(format="plain"))


@pytest.mark.parametrize(
    ("right", "wrong", "kind"),
    [
        ("It is the Red Sea.", "It is the Black Sea.", "one word"),
        ("It has no smell.", "It has a bad smell.", "one phrase"),
        ("It has six legs.", "It has legs.", "one word"),
        ("The red one is old.", "The blue one is new.", "several places"),
        ("Light is fast", "thunder, later", "everything"),
        ("It costs 3.14 euros", "It costs 3.41 euros", "one word"),
    ],
)
def test_where_answers_differ(right, wrong, kind):
    assert pairs.difference(right, wrong) == kind


def test_form_is_found_where_it_tells_and_not_where_it_does_not():
    random = np.random.default_rng(0)
    fill = [f"w{i}" for i in random.integers(0, 30, 400)]
    telling = [Row(f"q{i}", f"yes {fill[i]}", f"no {fill[-i]}") for i in range(150)]
    assert pairs.form_accuracy(telling).value > 0.95
    by_chance = [Row(f"q{i}", f"it is {fill[i]}", f"it is {fill[399 - i]}") for i in range(150)]
    low, high = pairs.form_accuracy(by_chance).interval
    assert low < 0.5 < high
    # All rows of a question are in one fold: answers that only repeat within their question tell nothing.
    repeated = [Row(f"q{i}", f"right{i}", f"wrong{i}") for i in range(20) for _ in range(5)]
    assert pairs.form_accuracy(repeated).value == 0.5
    assert pairs.form_accuracy(telling[:5]).value is None


def test_overlap_is_found_in_other_spelling_order_and_length():
    questions = [
        "Who wrote the play “Hamlet”?",
        "In which year did the war of 1812 end?",
        "What is a raisin?",
        "Which one?",
    ]
    asked = [
        "Q: who wrote the play hamlet? A:",
        "in which year did the war of 1812 really end",
        "What is a raisin made of, and why is it dry?",
    ]
    found = pairs.overlaps(questions, asked)
    assert set(found) == {0, 1}
    assert found[0] == (1.0, asked[0])
    assert 0.8 <= found[1][0] < 1


def test_the_command_reports_problems_and_goes_on(tmp_path, capfd):
    good = [Row(f"Is it {i}?", f"It is {i}.", f"It is {i + 50}.") for i in range(12)]
    path = write_table(tmp_path / "rows.jsonl", [*good, Row("Q?", "a", "a"), good[3], Row("Q 4?", "b", " ")])
    text = tmp_path / "asked.txt"
    text.write_text("Is it 7?\nIs it 3?\n")
    assert main(["pairs", str(path), "--against", str(text), *NAMED]) == 0
    report = capfd.readouterr().out
    assert "pairs: 13; 2 problem(s):" in report
    assert f"{path} line 13 has the same right and wrong answer" in report
    assert f"{path} line 15 has an empty bad" in report
    assert "one word 13 (100%)" in report
    assert "repeated: 1 question(s), 1 whole pair(s)" in report
    assert f"overlap with {text}: 3 question(s) word for word, 0 nearly" in report


def test_the_command_refuses_what_it_cannot_read(tmp_path, capfd):
    path = write_table(tmp_path / "rows.csv", ROWS)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for arguments, part in (
        ([str(tmp_path / "none.csv")], "none.csv"),
        ([str(path)], "has no column 'question'"),
        ([str(path), *NAMED, "--against", str(other)], "other.csv has none of the columns"),
        ([str(path), *NAMED, "--against", str(tmp_path / "none.txt")], "none.txt"),
        ([str(path), *NAMED, "--tokenizer", "nowhere"], "nowhere"),
    ):
        assert main(["pairs", *arguments]) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert part in error


def test_the_command_counts_tokens(tiny, tmp_path, capfd):
    path = write_table(tmp_path / "rows.csv", [Row("t3", "hello", "bye"), Row("t3 t4", "t5 t6 t7", "t6")])
    assert main(["pairs", str(path), *NAMED, "--tokenizer", str(tiny("gqa").directory)]) == 0
    report = capfd.readouterr().out
    assert "the answers to 't3' have the same tokens" in report
    assert "right 2.0 tokens, wrong 1.0" in report


def test_shipped_pairs_cannot_be_told_apart_by_form():
    config = DataConfig(source="pairs")
    report = pairs.check(read_source(config), config, [DEMO_DATA])
    assert len(report.rows) == 600
    assert report.problems == []
    assert report.same_questions == 0
    assert not report.overlaps[str(DEMO_DATA)]
    assert report.length_auc == pytest.approx(0.5, abs=0.02)
    low, high = report.form.interval
    assert low < 0.5 < high
    assert report.differences["one word"] >= 540
    demo = load_rows(DataConfig())
    assert len(set(demo) & set(report.rows)) == 230


def test_shipped_pairs_are_in_no_evaluation_set(shared):
    data = shared / "data"
    files = [*data.glob("*.csv"), *data.glob("memotrap/*.csv"), *data.glob("factor/*.csv")]
    files += [*data.glob("nq/*.jsonl"), *data.glob("conflict/*.jsonl")]
    assert len(files) >= 13
    questions = [row.question for row in load_rows(DataConfig(source="pairs"))]
    assert {path.name: pairs.overlaps(questions, pairs.read_questions(path)) for path in files} == {
        path.name: {} for path in files
    }


def test_shipped_answers_are_other_tokens_to_a_real_tokenizer(smollm2):
    config = DataConfig(source="pairs", format="plain")
    tokenized = tokenize(load_rows(config), smollm2.tokenizer, config)
    assert len(tokenized.train) == 600
    assert tokenized.statistics["length_auc"] == pytest.approx(0.5, abs=0.03)


def test_triviaqa_takes_the_alias_nearest_in_form(tmp_path):
    path = tmp_path / "trivia.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("question", "answer", "false_answer"),
                ("Who?", "J. R. Smith; John Smith; Smith, John (actor); John Smiht", "Mary Jones"),
                ("When?", "the seventies; 1975; nineteen seventy-five", "1983"),
                ("What?", "PULSAR; Pulsar", "quasar"),
                ("Where?", "The Tigris; Tigris", "Tigris River"),
                ("Where to?", "colour; colours", "Color"),
            ]
        )
    rows, skipped = build_pairs.from_triviaqa(path)
    assert rows == [
        Row("Who?", "John Smith", "Mary Jones"),
        Row("When?", "1975", "1983"),
        Row("What?", "Pulsar", "quasar"),
    ]
    assert skipped == {"the false answer is or holds an accepted one": 2}


@pytest.mark.parametrize(
    ("question", "right", "wrong", "made"),
    [
        ("In what city is the office of A?", "Delhi", "The office is in Mumbai.", "The office is in Delhi."),
        ("Who won most, Ann Lee or Bo Ray?", "Bo Ray", "Ann Lee won most.", "Bo Ray won most."),
        ("Who won most, Ann Lee or Bo Ray?", "Ann Lee", "Bo Ray won most.", "Ann Lee won most."),
        (
            "What year did the series air?",
            "2006",
            "The series did air in 2003.",
            "The series did air in 2006.",
        ),
        # The answer's place is not sure, or the sentence says another thing.
        ("What year did the series air?", "2006", "The series did air in the 1990s.", None),
        ("Is it a rock band?", "no", "Yes, it is a rock band.", None),
        ("Who owns the resort?", "Genting Group", "The Malaysian government owns the resort.", None),
        ("Which has smaller flowers, Campsis or Kalmia?", "Kalmia", "Campsis has larger flowers.", None),
        ("What is the animal of Rome?", "Wolf", "It is an Eagle of Rome.", None),
        ("In what city is the office?", "Delhi", "The office is not in Mumbai.", None),
        ("What nationality was she?", "American", "She was born in London and Paris.", None),
    ],
)
def test_halueval_takes_the_right_answer_into_the_sentence(question, right, wrong, made):
    assert build_pairs.put_in(question, right, wrong) == made


def test_built_pairs_are_held_out_by_hash(tmp_path, capfd):
    rows = [Row(f"Is it {i}?", f"It is {i}.", "It is none.") for i in range(30)]
    train, held_out = build_pairs.hold_out(rows, 10)
    assert len(held_out) == 10
    assert sorted([*train, *held_out], key=rows.index) == rows
    # Neither the order nor the other rows of the file move a question from one side to the other.
    assert set(build_pairs.hold_out(rows[::-1], 10)[1]) == set(held_out)

    source = tmp_path / "trivia.csv"
    lines = [f"Who is {i}?,Ann {i},Bo {i + 100}" for i in range(8)]
    source.write_text("\n".join(["question,answer,false_answer", *lines]))
    command = ["triviaqa", str(source), "--out", str(tmp_path / "out"), "--held-out", "3"]
    assert build_pairs.main(command) == 0
    files = [tmp_path / "out" / name for name in ("train.jsonl", "held_out.jsonl")]
    assert [len(load_rows(DataConfig(source=str(file)))) for file in files] == [5, 3]
    assert build_pairs.main(command) == 2
    assert "--overwrite" in capfd.readouterr().err
    assert build_pairs.main([*command[:-1], "8", "--overwrite"]) == 2
    assert "leaves none of 8 pairs" in capfd.readouterr().err


def row_of(*tokens: int) -> Example:
    return Example(0, tokens, 1, (True,) * (len(tokens) - 1))


def test_rows_that_begin_alike_are_merged():
    """Where they cost less than rows: not where nothing is shared, over a limit, across devices, or where
    positions are no row's own."""
    alike = [row_of(*range(40), 100 + i, 200 + i) for i in range(8)]
    apart = [row_of(*range(100 * i, 100 * i + 64)) for i in range(8)]
    llama = LlamaConfig(300, 64, 128, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=16)
    dynamic = dataclasses.replace(llama, rope=RopeConfig(type="dynamic", factor=2.0))

    def rows_of_a_tree(batches, shards=1, max_length=512, config=llama):
        merging = choose_merging(batches, config, shards, max_length)
        return merging and merging.rows

    assert rows_of_a_tree([alike]) == 8
    assert rows_of_a_tree([alike], shards=2) == 4
    assert rows_of_a_tree([alike], shards=8) is None
    assert rows_of_a_tree([alike], max_length=55) == 4
    assert rows_of_a_tree([alike], max_length=41) is None
    assert rows_of_a_tree([alike, apart], max_length=100) == 8
    assert rows_of_a_tree([alike], config=dynamic) is None
    assert rows_of_a_tree([apart]) is None
    assert rows_of_a_tree([]) is None
    # A batch whose tree would be too long stays rows.
    assert make_batch(alike, 1, merging=Merging(8, 56)).tree is not None
    assert make_batch(apart, 1, merging=Merging(8, 56)).tree is None


@pytest.mark.parametrize("rows_of_tree", [2, 3, 6])
def test_every_token_of_a_tree_has_its_own_row_before_it(rows_of_tree):
    rows = [row_of(*x) for x in [(1, 2, 3), (1, 2), (1, 5, 3), (9, 2, 3, 4), (1, 2, 3), (1, 2, 3, 7)]]
    batch = make_batch(rows, 1, merging=Merging(rows_of_tree, 64))
    tree = {name: array[0] for name, array in vars(batch.tree).items()}
    places = tree["places"].reshape(batch.tokens[0].shape)
    used = np.zeros_like(tree["ends"], bool)
    for i, row in enumerate(rows):
        own, path = i // rows_of_tree, places[i, : len(row.tokens)]
        used[own, path] = True
        assert tuple(tree["tokens"][own][path]) == row.tokens
        assert tuple(tree["positions"][own][path]) == tuple(range(len(path)))
        for depth, place in enumerate(path):
            seen = np.flatnonzero((np.arange(len(tree["ends"][own])) <= place) & (tree["ends"][own] > place))
            assert tuple(seen) == tuple(path[: depth + 1])
    assert ((tree["ends"] > 0) == used).all()
