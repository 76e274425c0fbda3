"""A benchmark is one file: what it takes to run, resume, compare and report it."""

import json

import pytest
from conftest import error_of

from imae_jax.__main__ import main as imae
from imae_jax.evaluate import benchmarks
from imae_jax.evaluate.__main__ import main as evaluate
from imae_jax.evaluate.compare import main as compare
from imae_jax.evaluate.report import main as report
from imae_jax.evaluate.runner.directory import read_records, read_run

CAPITALS = '''
"""Are capitals preferred to other cities?"""

import numpy as np

from imae_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Task

CITIES = (("t5", "t6", "t7 t8"), ("t9", "t10", "t11"), ("t12", "t13", "t14"))


class Capitals(Benchmark):
    name, title = "capitals", "Capitals"
    description = "Whether capitals are preferred"
    heads = {"right": "right"}

    def add_arguments(self, parser):
        parser.add_argument("--lead", default=" ")

    def task(self, args, data, lm):
        items = [
            Item(i, country, f"Q: {country}\\nA:", (args.lead + capital, args.lead + other))
            for i, (country, capital, other) in enumerate(CITIES)
        ]
        return Task("capitals-v1", items, {"lead": args.lead}, ("right",))

    def record(self, item, output, tokenizer):
        capital, other = (float(np.sum(scores)) for scores in output)
        return {"scores": [capital, other], "right": float(capital > other)}


BENCHMARK = Capitals()
'''


@pytest.fixture
def capitals(tmp_path, monkeypatch):
    """A folder of benchmarks that holds one more."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "capitals.py").write_text(CAPITALS)
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path / "more")])


def test_a_file_is_a_benchmark(capitals, tiny_imae, tmp_path, capfd):
    out = tmp_path / "out"
    command = ["capitals", "--model", str(tiny_imae.directory), "--methods", "base,expert", "--quiet"]
    assert evaluate([*command, "--out", str(out)]) == 0
    assert "Capitals, capitals-v1, 3 questions" in capfd.readouterr().out
    results, records = read_run(out, "capitals"), read_records(out)
    assert results["command"].startswith("python -m imae_jax.evaluate capitals --model ")
    for record in (records[0], records[3]):
        alone = tiny_imae.load().score("Q: t5\nA:", [" t6", " t7 t8"], record["method"], format="raw")
        assert record["scores"] == pytest.approx(alone, abs=1e-4)
    right = [record["right"] for record in records if record["method"] == "base"]
    assert results["methods"]["base"]["right"] == pytest.approx(100 * sum(right) / 3)
    for name in ("table.md", "scores.png", "differences.svg"):
        assert (out / name).stat().st_size

    # Killed in the middle of a line, then resumed, by the command of all commands.
    lines = (out / "scores.jsonl").read_text().splitlines()
    (out / "scores.jsonl").write_text("\n".join([*lines[:4], lines[4][:30]]))
    (out / "results.json").unlink()
    other = ["evaluate", *command, "--out", str(out), "--resume"]
    assert "another lead" in error_of(capfd, imae, *other, "--lead", "\n")
    assert imae(other) == 0
    assert read_run(out)["resumed_lines"] == 4
    assert [json.loads(line)["index"] for line in lines] == [r["index"] for r in read_records(out)]

    comparison, page = tmp_path / "comparison", tmp_path / "report"
    assert compare([str(out), str(out), "--pair", "base", "expert", "--out", str(comparison)]) == 0
    assert "Δ right" in capfd.readouterr().out
    assert report([str(out), str(comparison), "--out", str(page)]) == 0
    text = (page / "report.md").read_text()
    assert "## Capitals" in text and "1-scores.png" in text and "Comparisons of two runs" in text


def test_texts_need_no_options(capitals, tiny_imae, tmp_path):
    file = tmp_path / "more" / "words.py"
    written = 'return {"text": output.text, "right": float(output.finished)}'
    text = CAPITALS.replace("    heads =", '    output = "texts"\n    heads =')
    file.write_text(
        text[: text.index("        capital, other = (")] + f"        {written}\n\n\nBENCHMARK = Capitals()\n"
    )
    out = tmp_path / "out"
    assert evaluate(["words", "--model", str(tiny_imae.directory), "--out", str(out), "--quiet"]) == 0
    texts = tiny_imae.load().generate([f"Q: {country}\nA:" for country in ("t5", "t9", "t12")])
    assert [record["text"] for record in read_records(out)] == texts


def test_benchmarks_are_found_by_name(capitals, capfd):
    assert {"answers", "capitals", "factor", "halueval", "harm"} <= set(benchmarks.benchmarks())
    assert imae(["evaluate"]) == 0
    assert "evaluate capitals" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        evaluate(["capitals", "--help"])
    assert "--lead" in capfd.readouterr().out
    error = error_of(capfd, evaluate, "chess")
    assert "'chess' is neither a benchmark (" in error and "nor another command (lm_eval, " in error
    assert "'evaluate chess' is no command" in error_of(capfd, imae, "evaluate", "chess")
