"""The runs behind docs/results.md: what `make results` calls is valid, its tables show what runs found."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_rows
from omegaconf import OmegaConf

from imae_jax.decode.methods import parse_method, split_methods
from imae_jax.evaluate.benchmarks.questions import load_data
from imae_jax.evaluate.cost import main as cost
from imae_jax.evaluate.harm import main as harm
from imae_jax.evaluate.truthfulqa import main as truthfulqa
from imae_jax.train.config import DataConfig, TrainConfig, load_config
from imae_jax.train.data import load_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
# Units of a second training (docs/results.md) by their runs, all of chat, which has tables of its own.
TRAINED_AGAIN = {
    "out/results/tqa/chat/seed0": "40de552f4eba18be6b845d14d7546ddaee03a7d37940122011816b7940d53975",
    "out/results/tqa/chat/placebo": "35abb86aa4085167c919ed3d770d970b7cf11e5ed501321e75da5a7a53072799",
}


def planned(directory: Path, *settings: str) -> list[list[str]]:
    """Arguments of every command that `make results` would run, module first."""
    data = directory / "data"
    data.mkdir(exist_ok=True)
    (data / "TruthfulQA.csv").touch()
    (data / "halueval_qa.jsonl").touch()
    call = [
        "make",
        "-n",
        "--file",
        "results/Makefile",
        f"DATA={data}",
        f"R={directory / 'out'}",
        "BIN=bin",
        *settings,
    ]
    made = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in made.stdout.replace("\\\n", " ").splitlines()]
    return [line[2:] if line[1] == "-m" else line[1:] for line in lines if line[0] == "bin/python"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> list[list[str]]:
    return planned(tmp_path_factory.mktemp("planned"))


def test_every_training_run_has_valid_settings_and_an_output_of_its_own(commands):
    trained = [line[1:] for line in commands if line[0] == "imae_jax.train"]
    configs = []
    for line in trained:
        settings = [argument for argument in line if "=" in argument]
        name = line[line.index("--config") + 1]
        config = load_config(str(ROOT / name) if (ROOT / name).is_file() else name, settings)
        configs.append(config)
    assert len({config.out for config in configs}) == len(configs)
    changed = [
        {k: v for k, v in config.to_dict().items() if k not in ("out", "eval_every")} for config in configs
    ]
    unequal = {json.dumps(settings, sort_keys=True) for settings in changed}
    assert len(unequal) == len(configs), "two runs would do the same"
    assert sorted(config.seed for config in configs if config.icd.enabled and "train/seed" in config.out) == [
        0,
        1,
        2,
    ]


def test_commands_of_the_page_are_valid():
    page = (ROOT / "docs" / "results.md").read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    shown = 'python() { printf "%q " "$@"; echo; }; make() { :; }\n' + blocks
    made = subprocess.run(["bash", "-e", "-c", shown], capture_output=True, text=True, check=True)
    lines = [shlex.split(line)[1:] for line in made.stdout.splitlines()]
    for line in lines:
        if line[0] == "imae_jax.train":
            load_config(line[line.index("--config") + 1], [x for x in line[1:] if "=" in x])
        if "--methods" in line:
            for method in split_methods(line[line.index("--methods") + 1]):
                parse_method(method)
    assert {line[0] for line in lines} == {
        "matched-pairs",
        "imae_jax.convert",
        "imae_jax.train",
        "imae_jax.evaluate.truthfulqa",
    }


def test_every_evaluation_has_valid_methods(commands):
    outputs = []
    for module, *line in commands:
        if "--methods" in line:
            for method in split_methods(line[line.index("--methods") + 1]):
                parse_method(method)
        if module.startswith("imae_jax.evaluate."):
            out = "--html" if module.endswith("inspector") else "--out"
            outputs.append(line[line.index(out) + 1])
            assert importlib.util.find_spec(module)
    assert len(set(outputs)) == len(outputs)


def test_a_stopped_run_is_resumed(tmp_path):
    run = tmp_path / "out" / "train" / "seed1"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    trained = {line[4]: "--resume" in line for line in planned(tmp_path) if line[0] == "imae_jax.train"}
    found = [line for line in planned(tmp_path) if line[0] == "imae_jax.train" and "--resume" in line]
    assert [f"out={run}" in line for line in found] == [True], trained


def test_missing_data_are_named(tmp_path):
    call = ["make", "--file", "results/Makefile", f"DATA={tmp_path}", f"R={tmp_path / 'out'}", "train"]
    (tmp_path / "out" / "base").mkdir(parents=True)
    (tmp_path / "out" / "base" / "config.json").touch()
    made = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2
    assert f"{tmp_path}/halueval_qa.jsonl does not exist: pass DATA=DIRECTORY" in made.stderr


def test_what_is_published_is_what_the_plan_would_make(tmp_path):
    """All of it; and after a change of settings, the records of older ones must not stay in the tables."""
    planned_of = {}
    for module, *line in planned(tmp_path):
        line = [
            x.replace(str(tmp_path / "out"), "out/results").replace(str(tmp_path / "data"), "DATA")
            for x in line
        ]
        if module == "imae_jax.train":
            settings = [argument for argument in line if "=" in argument]
            name = line[line.index("--config") + 1]
            config = load_config(str(ROOT / name) if (ROOT / name).is_file() else name, settings)
            planned_of[config.out] = config.to_dict()
        elif "--out" in line and "evaluate" in module:
            planned_of[line[line.index("--out") + 1]] = [module, *line]
    records = sorted((ROOT / "docs" / "results" / "runs").rglob("*.json"))
    units_of, published = {}, set()
    for path in records:
        record = json.loads(path.read_text())
        run = f"out/results/{path.relative_to(ROOT / 'docs' / 'results' / 'runs').with_suffix('')}"
        if "config" in record:
            run = run.removesuffix("/train")
            # A setting that a later version added was at its default.
            config = OmegaConf.merge(TrainConfig("", "").to_dict(), record["config"])
            assert OmegaConf.to_container(config) == planned_of.get(run), path
        else:
            command = shlex.split(record["source"]["command"])[2:]
            once = [x for x in command if x not in ("--resume", "--overwrite")]
            assert run in planned_of, path
            assert once == [x for x in planned_of[run] if x != "--overwrite"], path
            # Two trainings of one name must not meet in a table.
            model = once[once.index("--model") + 1]
            units = record["source"].get("units")
            if units in TRAINED_AGAIN.values():
                assert TRAINED_AGAIN.get(run) == units, path
            else:
                assert units is None or units_of.setdefault(model, units) == units, path
        published.add(run)
    # ITI's directions are no result of their own.
    assert published == planned_of.keys() - {"out/results/iti"}


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    call = [sys.executable, RESULTS / f"{name}.py", *map(str, arguments)]
    made = subprocess.run(call, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made


def test_pages_show_what_is_recorded(tmp_path):
    pages = [ROOT / "docs" / "results.md", ROOT / "README.md"]
    for page in pages:
        shutil.copy(page, tmp_path)
    shutil.copytree(ROOT / "docs" / "results" / "runs", tmp_path / "results" / "runs")
    assert not run_script("tables", "--docs", tmp_path, "--readme", tmp_path / "README.md").stdout
    for page in pages:
        assert (tmp_path / page.name).read_text() == page.read_text()


def test_controls_name_a_missing_file(tmp_path):
    call = [sys.executable, RESULTS / "controls.py", "right-answers", tmp_path / "none", tmp_path / "out"]
    made = subprocess.run(call, capture_output=True, text=True)
    assert made.returncode == 2
    assert made.stderr.startswith(f"error: argument rows: {tmp_path / 'none'} does not exist")
    assert made.stderr.count("\n") == 1


def test_controls_swap_answers_and_keep_pairs_of_equal_length(tiny_imae, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    run_script("controls", "right-answers", rows, tmp_path / "swapped.jsonl")
    before, after = (load_rows(DataConfig(source=str(p))) for p in (rows, tmp_path / "swapped.jsonl"))
    assert [(r.question, r.hallucinated_answer) for r in after] == [
        (r.question, r.right_answer) for r in before
    ]

    tokenizer = json.loads((tiny_imae.directory / "imae_config.json").read_text())["base"]["reference"]
    run_script("controls", "matched-pairs", rows, tmp_path / "matched.jsonl", "--tokenizer", tokenizer)
    matched = load_rows(DataConfig(source=str(tmp_path / "matched.jsonl")))
    # Right answers have 3 tokens, hallucinated ones 3, 4, 5 and 6 in turn; the limit is a factor of 1.25.
    assert matched == before[::4]


def test_tables_show_what_runs_found(scored, tiny_imae, tmp_path):
    runs, docs = tmp_path / "runs", tmp_path / "docs"
    for seed in (0, 1):
        shutil.copytree(scored[1], runs / "tqa" / "primer" / f"seed{seed}")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{i}" for i in range(3, 60)))
    methods = "base,expert,in-model-contrast:renormalize=true"
    command = ["--model", str(tiny_imae.directory), "--methods", methods, "--text", str(text)]
    assert harm([*command, "--out", str(runs / "harm" / "seed0")]) == 0
    command = ["--model", str(tiny_imae.directory), "--methods", "expert", "--batch-sizes", "1", "--quiet"]
    command += ["--prompt-tokens", "4", "--new-tokens", "4", "--repeats", "1"]
    assert cost([*command, "--out", str(runs / "cost")]) == 0
    trainings = (
        ("train/seed0", 0.25, 2),
        ("ablations/reference", 0.5, 2),
        ("ablations/beta1", 0.5, 1),
        ("ablations/nofilter", 1.0, 2),
        ("ablations/trivia", 0.5, 2),
    )
    for name, kept, beta in trainings:
        training = runs / name
        (training / "imae").mkdir(parents=True)
        config = {"training": {"data": {"kept_share": kept}}}
        (training / "imae" / "imae_config.json").write_text(json.dumps(config))
        settings = f"out: {name}\nseed: 0\ndata:\n  path: /own/halueval_qa.jsonl\nloss:\n  beta: {beta}\n"
        settings += f"filter:\n  gamma: {-1 if kept == 1 else 1}\n"
        (training / "config.yaml").write_text(settings)
        (training / "environment.json").write_text(json.dumps([{"git": {"commit": "c0ffee"}}]))
        off = [0.0] * 11 if kept == 1 else [1.0, *[0.25] * 8, None, float("nan")]
        steps = [{"gate_on_fact": 0.5, "gate_off_fact": x} for x in off]
        (training / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (runs / "train" / "seed0" / "training.png").write_bytes(b"curves")
    # These are scored on the test questions alone, as the plan has it.
    command = [*map(str, scored[0]), "--split", "test", "--quiet"]
    command[command.index("--out") + 1] = str(runs / "ablations" / "beta1" / "tqa")
    assert truthfulqa(command) == 0
    for name in ("reference", "nofilter", "trivia", "trivia-right"):
        shutil.copytree(runs / "ablations" / "beta1" / "tqa", runs / "ablations" / name / "tqa")
    shutil.copytree(scored[1], runs / "tqa" / "primer" / "placebo")
    for place in ("reference", "beta1", "nofilter", "trivia"):
        shutil.copytree(runs / "harm" / "seed0", runs / "ablations" / place / "harm")
    shutil.copytree(runs / "harm" / "seed0", runs / "harm" / "placebo")
    # As if the placebo's raw sums were what the other's renormalized ones are.
    path = runs / "ablations" / "trivia-right" / "tqa" / "results.json"
    right = json.loads(path.read_text())
    raw, renormalized = (right["methods"][f"in-model-contrast{x}"] for x in ("", ":renormalize=true"))
    raw["settings"], renormalized["settings"] = renormalized["settings"], raw["settings"]
    path.write_text(json.dumps(right))
    # As if the reference's expert were its anti-expert.
    path = runs / "ablations" / "reference" / "tqa" / "results.json"
    reference = json.loads(path.read_text())
    modes = [reference["methods"][name] for name in ("expert", "anti-expert")]
    modes[0]["settings"], modes[1]["settings"] = modes[1]["settings"], modes[0]["settings"]
    path.write_text(json.dumps(reference))
    # As if its contrast were ICD's with a model of its own.
    shutil.copytree(scored[1], runs / "tqa" / "primer" / "second-model")
    path = runs / "tqa" / "primer" / "second-model" / "results.json"
    second = json.loads(path.read_text())
    second["methods"]["in-model-contrast"]["settings"] |= {"name": "icd", "anti_expert": "out/merged"}
    path.write_text(json.dumps(second))
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "results.md", docs)
    shutil.copy(ROOT / "README.md", tmp_path)
    run_script("records", runs, docs / "results" / "runs")
    said = run_script("tables", "--docs", docs, "--readme", tmp_path / "README.md").stdout
    assert not said, "the pages have a place for every table"

    results = json.loads((scored[1] / "results.json").read_text())
    page, figures = (
        (docs / "results.md").read_text(),
        json.loads((docs / "results" / "figures.json").read_text()),
    )
    expert, base = results["methods"]["expert"], results["methods"]["base"]
    (scores,) = re.findall(r"<!-- primer-all -->(.*?)<!-- /primer-all -->", page, re.DOTALL)
    assert f"| IMAE expert | log p | {expert['mc1']:.2f} [" in scores
    contrast = results["methods"]["in-model-contrast"]["mc1"]
    assert f"| ICD, second model | raw | {contrast:.2f} [" in scores
    assert "| in-model contrast | raw |" in scores and "| in-model contrast | renormalized |" in scores
    (differences,) = re.findall(r"<!-- primer-all-differences -->(.*?)<!-- /", page, re.DOTALL)
    assert f"| IMAE expert | log p | {expert['mc1'] - base['mc1']:+.2f} [" in differences
    (seeds,) = re.findall(r"<!-- primer-all-seeds -->(.*?)<!-- /", page, re.DOTALL)
    assert f"| IMAE expert | log p | {expert['mc1']:.2f} ± 0.00 (" in seeds
    (of_seeds,) = re.findall(r"<!-- primer-all-seeds-differences -->(.*?)<!-- /", page, re.DOTALL)
    assert f"| IMAE expert | log p | 1 | {expert['mc1'] - base['mc1']:+.2f} [" in of_seeds
    # These questions' right answers are shorter than the wrong ones.
    (lengths,) = re.findall(r"<!-- lengths -->(.*?)<!-- /lengths -->", page, re.DOTALL)
    (row,) = re.findall(r"\| IMAE expert \| log p \| – \| (\S+) .*", lengths)
    of_test = figures["primer test"]["methods"]["IMAE expert / log p"]["against_base"]
    assert row == f"{of_test['mc1']['value']:+.2f}"
    (targets,) = re.findall(r"<!-- primer-targets -->(.*?)<!-- /", page, re.DOTALL)
    missed = [m.upper() for m in ("mc1", "mc2", "mc3") if of_test[m]["value"] <= 0]
    met = f"not in {', '.join(missed)}" if missed else "yes"
    assert re.search(rf"\| expert above base \| {re.escape(row)} .*\| {met} \|", targets)
    assert "| the shortest answer |  | – | 100.00 [" in lengths
    (placebo,) = re.findall(r"<!-- placebo -->(.*?)<!-- /placebo -->", page, re.DOTALL)
    minus = raw["mc2"] - renormalized["mc2"]
    assert re.search(
        rf"\| trivia, seed 0 \| in-model contrast \| raw \| \S+ \[.*?\] \| {re.escape(f'{minus:+.2f}')} \[",
        placebo,
    )
    (summary,) = re.findall(r"<!-- summary -->(.*?)<!-- /", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert f"| HaluEval | IMAE expert | log p | {of_test['mc1']['value']:+.1f} / " in summary.replace("*", "")
    assert f"| placebo: IMAE expert | log p | {expert['mc1'] - base['mc1']:+.2f} [" in differences
    (effects,) = re.findall(r"<!-- side-effects -->(.*?)<!-- /", page, re.DOTALL)
    (shares,) = re.findall(r"<!-- shares -->(.*?)<!-- /shares -->", page, re.DOTALL)
    raw, left = (
        figures["primer test"]["methods"][f"in-model contrast / {sums}"]["against_base"]["mc2"]
        for sums in ("raw", "renormalized")
    )
    assert f" {raw['value']:+.1f} → {left['value']:+.1f}" in shares
    kl = json.loads((runs / "harm" / "seed0" / "results.json").read_text())["methods"]["expert"]["kl"]
    assert f"| IMAE expert | log p | {kl:.3f} |" in effects
    ms = json.loads((runs / "cost" / "results.json").read_text())["batch_sizes"]["1"]["expert"][
        "ms_per_token"
    ]
    assert re.search(rf"\| IMAE expert \|.*\| {ms:.1f} \(\d", effects)
    (ablations,) = re.findall(r"<!-- ablations -->(.*?)<!-- /", page, re.DOTALL)
    # Its target is renormalized in-model contrast with the beta that the run was trained with.
    assert re.findall(r"\| (.*?) \| 50 \| 0.50 / 0.25 \| its target \|", ablations) == ["loss.beta=1"]
    (other_data,) = re.findall(r"<!-- other-data -->(.*?)<!-- /", page, re.DOTALL)
    assert "| trivia | 50 | 0.50 / 0.25 | IMAE expert | log p |" in other_data and "trivia" not in ablations
    of_runs = [
        re.search(rf"\| {name} \|.*?\| expert \|(.*)", ablations)[1].split(" | ")
        for name in ("reference", "loss.beta=1", "seed0")
    ]
    # Neutral text is of the same model, and scores are not.
    assert of_runs[0][-2:] == of_runs[1][-2:] and of_runs[0][1:-2] != of_runs[1][1:-2]
    # The same model on the same questions: seed 0's run holds all of them, the other the test ones.
    assert of_runs[1] == of_runs[2]
    (of_reference,) = re.findall(r"<!-- ablations-reference -->(.*?)<!-- /", page, re.DOTALL)
    of_split = figures["ablations"]["beta1"]["expert"]["against_base"]["mc2"]["value"]
    anti_expert = figures["ablations"]["reference"]["expert"]["against_base"]["mc2"]["value"]
    minus = re.escape(f"{of_split - anti_expert:+.2f}")
    assert re.search(rf"\| loss.beta=1 \| expert \| \S+ \[.*?\] \| {minus} \[", of_reference)
    # Nothing is off T_fact without a token filter.
    assert "| filter.gamma=-1 | 100 | 0.50 / – | expert |" in ablations
    (of_target,) = re.findall(r"<!-- ablations-target -->(.*?)<!-- /", page, re.DOTALL)
    target = figures["ablations"]["beta1"]["its target"]["against_base"]["mc2"]["value"]
    minus = re.escape(f"{of_split - target:+.2f}")
    assert re.search(rf"\| loss.beta=1 \| \S+ \[.*?\] \| {minus} \[", of_target)
    assert "| reference |" not in of_target
    assert (docs / "results" / "differences.png").read_bytes().startswith(b"\x89PNG")
    assert (docs / "results" / "training.png").read_bytes() == b"curves"
    assert figures["primer test"]["n"] + 1 == figures["primer all"]["n"] == 6

    # What is published of a run says how it was made, and holds neither texts nor where data lay.
    training = json.loads((docs / "results" / "runs" / "train" / "seed0.json").read_text())
    assert training["starts"][0]["git"] == {"commit": "c0ffee"}
    assert training["config"]["data"]["path"] == "DATA/halueval_qa.jsonl"
    record = (docs / "results" / "runs" / "tqa" / "primer" / "seed0.json").read_text()
    data = Path(results["data"]["path"])
    command = results["command"].replace(str(data), f"DATA/{data.name}")
    assert json.loads(record)["source"]["command"] == command
    assert f"DATA/{data.name}" in command
    assert all(question.text not in record for question in load_data(str(data)).questions)
