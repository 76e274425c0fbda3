"""The study of docs/results.md: the runs of `make results` are valid, the pages show what was recorded."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_rows

from imae_jax.decode.methods import parse_method, split_methods
from imae_jax.evaluate.harm import main as harm
from imae_jax.train.config import DataConfig, load_config
from imae_jax.train.data import load_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


def planned(directory: Path) -> list[list[str]]:
    """Arguments of every command that `make results` would run, module first."""
    data = directory / "data"
    data.mkdir(exist_ok=True)
    (data / "TruthfulQA.csv").touch()
    (data / "halueval_qa.jsonl").touch()
    call = ["make", "-n", "--file", "results/Makefile", f"DATA={data}", f"R={directory / 'out'}", "BIN=bin"]
    made = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in made.stdout.replace("\\\n", " ").splitlines()]
    return [line[2:] if line[1] == "-m" else line[1:] for line in lines if line[0] == "bin/python"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """The directory of the runs, and their commands."""
    directory = tmp_path_factory.mktemp("planned")
    return directory / "out", planned(directory)


@pytest.fixture
def scripts(monkeypatch):
    """The modules `records` and `tables` of results/."""
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module("records"), importlib.import_module("tables")


def check_methods(line: list[str]) -> None:
    if "--methods" in line:
        for method in split_methods(line[line.index("--methods") + 1]):
            parse_method(method)


def test_every_training_run_has_valid_settings_and_an_output_of_its_own(plan):
    configs = []
    for module, *line in plan[1]:
        if module == "imae_jax.train":
            name = line[line.index("--config") + 1]
            path = str(ROOT / name) if (ROOT / name).is_file() else name
            configs.append(load_config(path, [argument for argument in line if "=" in argument]))
    assert len({config.out for config in configs}) == len(configs)
    settings = [
        {k: v for k, v in config.to_dict().items() if k not in ("out", "eval_every")} for config in configs
    ]
    assert len({json.dumps(x, sort_keys=True) for x in settings}) == len(configs), (
        "two runs would do the same"
    )
    seeds = [config.seed for config in configs if config.icd.enabled and "train/seed" in config.out]
    assert sorted(seeds) == [0, 1, 2]


def test_every_evaluation_has_valid_methods_and_a_record(plan, scripts):
    records, _ = scripts
    root, commands = plan
    outputs = []
    for module, *line in commands:
        check_methods(line)
        if module.startswith("imae_jax.evaluate.") and not module.endswith("iti"):
            outputs.append(str(Path(line[line.index("--out") + 1]).relative_to(root)))
            assert importlib.util.find_spec(module)
    directory = RESULTS / "records"
    recorded = [
        str(path.relative_to(directory)).removesuffix(".json.bz2") for path in directory.rglob("*.bz2")
    ]
    summaries = records.read_json(directory / "summaries.json")
    recorded += [name for name, summary in summaries.items() if "kept_share" not in summary]
    assert sorted(outputs) == sorted(recorded)


def test_commands_of_the_page_are_valid():
    page = (ROOT / "docs" / "results" / "choosing.md").read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    shown = 'python() { printf "%q " "$@"; echo; }\n' + blocks
    made = subprocess.run(["bash", "-e", "-c", shown], capture_output=True, text=True, check=True)
    lines = [shlex.split(line)[1:] for line in made.stdout.splitlines()]
    assert len(lines) == 8
    for line in lines:
        check_methods(line)
        if line[0] == "imae_jax.train":
            load_config(line[line.index("--config") + 1], [x for x in line[1:] if "=" in x])


def test_a_stopped_run_is_resumed(tmp_path):
    run = tmp_path / "out" / "train" / "seed1"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    trained = [line for line in planned(tmp_path) if line[0] == "imae_jax.train"]
    assert [f"out={run}" in line for line in trained if "--resume" in line] == [True]


def test_missing_data_are_named(tmp_path):
    call = ["make", "--file", "results/Makefile", f"DATA={tmp_path}", f"R={tmp_path / 'out'}", "train"]
    (tmp_path / "out" / "base").mkdir(parents=True)
    (tmp_path / "out" / "base" / "config.json").touch()
    made = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2
    assert f"{tmp_path}/halueval_qa.jsonl does not exist: pass DATA=DIRECTORY" in made.stderr


@pytest.mark.slow
def test_pages_show_what_is_recorded(scripts):
    _, tables = scripts
    for path, text in tables.pages():
        assert path.read_text(encoding="utf-8") == text, path


def test_records_are_what_runs_measured(scripts, scored, tiny_imae, tmp_path):
    """In four decimals, and without texts."""
    records, _ = scripts
    root, out = tmp_path / "runs", tmp_path / "records"
    (root / "tqa").mkdir(parents=True)
    (root / "tqa" / "seed0").symlink_to(scored[1])
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{i}" for i in range(3, 60)))
    command = [
        "--model",
        tiny_imae.directory,
        "--methods",
        "base,expert",
        "--text",
        text,
        "--out",
        root / "harm",
    ]
    assert harm([*map(str, command)]) == 0
    for run in (root / "tqa" / "seed0", root / "harm"):
        records.record(run, root, out)
    lines = [json.loads(line) for line in (scored[1] / "scores.jsonl").read_text().splitlines()]
    record = records.read_scores(out / "tqa" / "seed0.json.bz2")
    assert record["source"]["command"] == json.loads((scored[1] / "results.json").read_text())["command"]
    assert set(record["scores"]) == {records.method_name(line["method"]) for line in lines}
    facts = records.read_json(out / "questions.json")
    for line in lines:
        scores = record["scores"][records.method_name(line["method"])]
        place = facts["index"].index(line["index"])
        for metric in records.METRICS:
            assert scores[metric][place] == pytest.approx(line[metric], abs=1e-4)
    # The right answers of these questions are shorter than the wrong ones.
    assert facts["shortest"] == "1" * len(facts["index"]) and "1" not in facts["longest"]
    kl = json.loads((root / "harm" / "results.json").read_text())["methods"]["expert"]["kl"]
    summaries = records.read_json(out / "summaries.json")
    assert summaries["harm"]["expert"]["kl"] == pytest.approx(kl, rel=1e-5)
    assert "t5" not in json.dumps([record["scores"], facts, summaries])


def test_methods_have_names_without_files(scripts):
    records, _ = scripts
    names = {
        "-2": "-2",
        "icd:anti_expert=out/seed0/icd/adapter,beta=2,renormalize=true": "icd:beta=2,renormalize=true",
        "icd:anti_expert=out/merged": "icd-model",
        "cd:amateur=out/base#layers=24,renormalize=false": "cd",
        "iti:directions=out/iti/fold0.safetensors": "iti",
    }
    assert {label: records.method_name(label) for label in names} == names


def run_controls(*arguments: object) -> subprocess.CompletedProcess:
    call = [sys.executable, RESULTS / "controls.py", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True)


def test_controls_name_a_missing_file(tmp_path):
    made = run_controls("right-answers", tmp_path / "none", tmp_path / "out")
    assert made.returncode == 2
    assert made.stderr.startswith(f"error: argument rows: {tmp_path / 'none'} does not exist")
    assert made.stderr.count("\n") == 1


def test_controls_swap_answers_and_keep_pairs_of_equal_length(tiny_imae, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    swapped, matched = tmp_path / "swapped.jsonl", tmp_path / "matched.jsonl"
    assert run_controls("right-answers", rows, swapped).returncode == 0
    before, after = (load_rows(DataConfig(source=str(path))) for path in (rows, swapped))
    assert [(r.question, r.hallucinated_answer) for r in after] == [
        (r.question, r.right_answer) for r in before
    ]

    tokenizer = json.loads((tiny_imae.directory / "imae_config.json").read_text())["base"]["reference"]
    assert run_controls("matched-pairs", rows, matched, "--tokenizer", tokenizer).returncode == 0
    # Right answers have 3 tokens, hallucinated ones 3, 4, 5 and 6 in turn; the limit is a factor of 1.25.
    assert load_rows(DataConfig(source=str(matched))) == before[::4]
