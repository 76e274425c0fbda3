"""The model for lm-eval against lm-eval's own backend for HuggingFace models, and its command."""

import copy
import dataclasses
import importlib.util
import json
import os
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from conftest import (
    SMOLLM2,
    TINY,
    import_torch,
    random_tokens,
    run_python,
    tiny_llama,
    user_error,
    word_tokenizer,
)
from helpers.documents import blocks

from imae_jax.convert import LanguageModel, load_model
from imae_jax.convert.hf import save_hf
from imae_jax.convert.references import BUILT_IN
from imae_jax.decode import encode, score
from imae_jax.evaluate import report
from imae_jax.evaluate.benchmarks.protocols import INSTRUCTION, load_primer
from imae_jax.evaluate.benchmarks.questions import read_questions
from imae_jax.evaluate.benchmarks.truthfulqa import mc_metrics
from imae_jax.evaluate.lm_eval import IMAEJaxLM, load_tasks, main
from imae_jax.language_model import BaseReference
from imae_jax.prompts import question_text

lm_eval = pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[1]
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(BUILT_IN[SMOLLM2]) is None, reason=f"{BUILT_IN[SMOLLM2]} is not installed"
)


def words(n: int, seed: int = 0) -> str:
    return " ".join(f"t{i}" for i in random_tokens(n, seed=seed))


@pytest.fixture(autouse=True, scope="module")
def without_what_takes_long():
    """With every result the harness lists the machine's packages; programs run a few times alone."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def instances(kind: str, *arguments: tuple, task: str = "task") -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i, (task, i, 1)) for i, args in enumerate(arguments)]


def backend(hf, tokenizer, **kwargs):
    """lm-eval's own model, with the same tokenizer in transformers."""
    import_torch()
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens,
    )
    return HFLM(pretrained=hf, tokenizer=theirs, batch_size=3, **kwargs)


# Requests by hand, on tiny models with a context of 64


@pytest.fixture(scope="module", params=["plain", "dynamic RoPE and BOS"])
def pair(request, tiny):
    """Ours and lm-eval's on the same random weights; one layer, since compiling more takes longer."""
    checkpoint = tiny("gqa" if request.param == "plain" else "rope_dynamic", num_hidden_layers=1)
    lm = checkpoint.load()
    if "BOS" in request.param:
        lm.tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return IMAEJaxLM(lm, batch_size=4), backend(checkpoint.hf, lm.tokenizer)


def test_loglikelihoods_equal_the_hf_backends(pair):
    (greedy,) = pair[1].generate_until(instances("generate_until", (words(5), {"max_gen_toks": 4})))
    arguments = [
        ("t5 t6 t7", " t8"),
        ("t5 t6 t7", " t9"),
        ("t5 t6 t7", " t9 t10 t11"),
        ("t5 t6  ", "t8"),
        ("", "t5 t6"),
        ("", "<s> t5"),
        # Not t5: lm-eval mixes up requests whose tokens are equal and split elsewhere.
        ("<s> t9", " t6"),
        (words(5), f" {greedy}"),
        (words(5), f" {greedy} t5"),
        (words(62), " t5 t6"),
        (words(70), f" {words(3, 1)}"),
        (words(5), f" {words(63, 2)}"),
        (words(5), f" {words(64, 2)}"),
    ]
    requests = instances("loglikelihood", *arguments) + instances("loglikelihood", *arguments[:2], task="b")
    actual, expected = (model.loglikelihood(requests, disable_tqdm=True) for model in pair)
    np.testing.assert_allclose([v for v, _ in actual], [v for v, _ in expected], atol=1e-3)
    flags = [flag for _, flag in actual]
    assert flags == [flag for _, flag in expected]
    assert flags[7] and not all(flags)


def test_rolling_loglikelihoods_equal_the_hf_backends(pair):
    requests = instances("loglikelihood_rolling", *((words(n, seed=n),) for n in (1, 63, 64, 65, 150)), ("",))
    actual, expected = (model.loglikelihood_rolling(requests, disable_tqdm=True) for model in pair)
    np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_generated_texts_equal_the_hf_backends(pair):
    prompts = [words(3 + n, seed=n) for n in range(8)]
    long = {"until": [], "max_gen_toks": 24}
    texts = pair[0].generate_until(instances("generate_until", *((prompt, long) for prompt in prompts)))
    lengths = [len(text.split()) for text in texts]
    assert len(set(lengths)) > 1, "some of the texts should meet the end-of-text token"
    longest = int(np.argmax(lengths))
    word = texts[longest].split()[5]
    requests = instances(
        "generate_until",
        *((prompt, long) for prompt in prompts),
        *((prompt, {"until": [f" {word}", "t7"], "max_new_tokens": 24}) for prompt in prompts[-4:]),
        # As many as in the other batches, for which decoding is compiled already.
        *[(prompts[longest], {"until": f" {word}", "max_tokens": 24, "temperature": 0.7, "do_sample": False})]
        * 4,
        (words(80), {"until": "t8", "max_gen_toks": 20, "top_p": 0.9, "num_beams": 1}),
    )
    actual, expected = (model.generate_until(requests, disable_tqdm=True) for model in pair)
    assert actual == expected
    assert actual[:8] == texts
    assert len(actual[-2].split()) <= 5


# Methods


@pytest.fixture(scope="module")
def units() -> LanguageModel:
    """A tiny model with units; two layers, which DoLa needs."""
    reference = BaseReference("tiny", None, "", "float32")
    config = dataclasses.replace(TINY, num_layers=2)
    return LanguageModel(tiny_llama(config, units=True), word_tokenizer(TINY.vocab_size), (2,), reference)


@pytest.mark.parametrize("method", ["expert", "dola:candidates=low,alpha=0.1"])
def test_any_method_gives_its_scores_and_its_arg_max(units, method):
    model = IMAEJaxLM(units, method)
    prompt, answers = words(5), [words(2, 1), words(3, 2)]
    (greedy,) = units.generate([prompt], method, max_new_tokens=24)
    answers.append(greedy.strip())
    requests = instances("loglikelihood", *((prompt, f" {answer}") for answer in answers))
    actual = model.loglikelihood(requests, disable_tqdm=True)
    expected = units.score(f"{prompt} ", answers, method, format="raw")
    np.testing.assert_allclose([v for v, _ in actual], expected, atol=1e-5)
    assert [flag for _, flag in actual] == [False, False, True]
    (text,) = model.generate_until(instances("generate_until", (prompt, {"max_gen_toks": 24})))
    assert text == greedy.strip()
    assert model.get_model_info()["imae_jax"]["method"]["scoring"]["name"] in (method.split(":")[0], "imae")


def test_drawn_texts_follow_the_seed(units):
    kwargs = {"do_sample": True, "temperature": 2.0, "top_k": 50, "max_gen_toks": 8}
    requests = instances("generate_until", *[(words(5), kwargs)] * 8)
    first, again, other = (
        IMAEJaxLM(units, "base", batch_size=4, seed=seed).generate_until(requests, disable_tqdm=True)
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) == 8, "equal requests are drawn apart, in one batch and in two"


def test_special_tokens_end_a_text(units):
    """They do not appear in the decoded text, so that they cannot be found in it."""
    long = {"max_gen_toks": 24}
    (plain,) = IMAEJaxLM(units, "expert").generate_until(instances("generate_until", (words(5), long)))
    word = plain.split()[2]
    backend = copy.deepcopy(units.tokenizer.backend_tokenizer)
    backend.add_special_tokens([word])
    tokenizer = dataclasses.replace(units.tokenizer, backend_tokenizer=backend)
    special = dataclasses.replace(units, tokenizer=tokenizer)
    (text,) = IMAEJaxLM(special, "expert").generate_until(
        instances("generate_until", (words(5), long | {"until": [word]}))
    )
    assert text.split() == plain.split()[:2]


BAD_REQUESTS = {
    "an unknown setting": ("generate_until", ("t5", {"penalty_alpha": 0.6}), "penalty_alpha"),
    "beams": ("generate_until", ("t5", {"num_beams": 4}), "num_beams"),
    "do_sample without a temperature": ("generate_until", ("t5", {"do_sample": True}), "temperature"),
    "no number": ("generate_until", ("t5", {"temperature": "hot"}), "hot"),
    "too many tokens": ("generate_until", ("t5", {"max_gen_toks": 64}), "max_gen_toks 64"),
    "an empty continuation": ("loglikelihood", ("t5", ""), "without tokens"),
    "a continuation over the context": ("loglikelihood", ("t5", f" {words(65)}"), "65 tokens"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_requests_that_cannot_be_answered(units, case):
    kind, arguments, message = BAD_REQUESTS[case]
    with user_error(message):
        getattr(IMAEJaxLM(units), kind)(instances(kind, arguments))


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"max_length": 65}, {"max_length": 0}])
def test_settings_out_of_their_range(units, kwargs):
    with user_error(next(iter(kwargs)).replace("_", " ")):
        IMAEJaxLM(units, **kwargs)


# Tasks, on the lowest layers of SmolLM2

DOCUMENTS = [
    {"question": "What is the capital of France?", "choices": [" Paris", " Rome", "Berlin is it."]},
    {"question": "Who wrote “Hamlet”? It was", "choices": ["Shakespeare", "Marlowe"]},
]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_mutual_info}]
""",
    "until": """
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


def write_task(directory: Path, name: str, text: str, documents: list[dict]) -> None:
    data = directory / f"{name}.json"
    data.write_text(json.dumps(documents))
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"validation": str(data)},
            "cache_dir": str(directory / "cache"),
        },
        "validation_split": "validation",
    }
    # JSON is YAML.
    lines = [f"{key}: {json.dumps(value)}" for key, value in source.items()]
    (directory / f"{name}.yaml").write_text("\n".join([text.strip(), *lines]) + "\n")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        write_task(directory, name, text, DOCUMENTS)
    return directory


@pytest.fixture(scope="module")
def cut_dir(tmp_path_factory) -> Path:
    """SmolLM2's lowest 2 layers as this project exports them, which load faster than from the GGUF file."""
    lm = load_model(f"{SMOLLM2}#layers=2")
    directory = tmp_path_factory.mktemp("cut")
    save_hf(lm.model, lm.tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def cut(cut_dir):
    """The same in memory, and lm-eval's backend on them."""
    import_torch()
    from transformers import AutoModelForCausalLM

    lm = load_model(str(cut_dir))
    hf = AutoModelForCausalLM.from_pretrained(cut_dir, attn_implementation="eager").eval()
    return lm, backend(hf, lm.tokenizer)


def evaluated(model, names, directory: Path, **kwargs) -> dict:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=directory, include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=manager, bootstrap_iters=0, torch_random_seed=None, **kwargs
    )


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("chat", [False, True])
def test_tasks_give_what_the_hf_backend_gives(cut, tasks, chat):
    lm, theirs = cut
    names = list(TASKS)[:2] if chat else list(TASKS)
    actual, expected = (
        evaluated(model, names, tasks, apply_chat_template=chat) for model in (IMAEJaxLM(lm), theirs)
    )
    for name in names:
        for ours, reference in zip(actual["samples"][name], expected["samples"][name], strict=True):
            assert ours["arguments"] == reference["arguments"]
            if name == "until":
                assert ours["resps"] == reference["resps"]
            else:
                # Log-likelihoods, and greedy flags as 0 and 1.
                np.testing.assert_allclose(
                    np.array(ours["resps"], float), np.array(reference["resps"], float), atol=1e-3
                )
        values = {key: v for key, v in expected["results"][name].items() if isinstance(v, float)}
        assert values
        assert {key: actual["results"][name][key] for key in values} == pytest.approx(values, rel=1e-4)


@pytest.mark.slow
@needs_smollm2
def test_truthfulqa_of_lm_eval_is_the_protocols(cut, shared, tmp_path, monkeypatch):
    """Prompt: the six pairs without the instruction; continuation: a space and the answer; sums as ours.

    The harness computes in float64, since torch's float32 errs more than what is asserted.
    """
    lm, in_float32 = cut
    theirs = backend(copy.deepcopy(in_float32.model).double(), lm.tokenizer)
    questions = read_questions(shared / "data" / "TruthfulQA.csv")
    questions = sorted(questions, key=lambda question: len(question.answers))[:2]
    directory = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"

    def targets(true, false):
        return {"choices": [*true, *false], "labels": [1] * len(true) + [0] * len(false)}

    # As in the hub's data: the best answer first for MC1, all true ones first for MC2.
    documents = [
        {
            "question": q.text,
            "mc1_targets": targets([q.true[q.best]], q.false),
            "mc2_targets": targets(q.true, q.false),
        }
        for q in questions
    ]
    for name in ("mc1", "mc2"):
        write_task(tmp_path, name, f"include: {directory / f'truthfulqa_{name}.yaml'}", documents)
    # Both ask for the same texts, and MC2 for some more.
    with monkeypatch.context() as patch:
        torch = import_torch()
        # What transformers casts norms and softmax to, whatever the dtype of a model.
        patch.setattr(torch, "float32", torch.float64)
        samples = evaluated(theirs, ["mc2"], tmp_path)["samples"]
    references = {
        tuple(texts): answer[0][0]
        for sample in samples["mc2"]
        for texts, answer in zip(sample["arguments"], sample["resps"], strict=True)
    }
    samples |= evaluated(IMAEJaxLM(lm), ["mc1"], tmp_path)["samples"]

    pairs = load_primer(None).text.removeprefix(f"{INSTRUCTION}\n\n")
    for name in ("mc1", "mc2"):
        for question, sample in zip(questions, samples[name], strict=True):
            prompts, continuations = zip(*sample["arguments"], strict=True)
            true = question.true if name == "mc2" else (question.true[question.best],)
            assert set(prompts) == {pairs + question_text(question.text)}
            assert list(continuations) == [f" {answer}" for answer in (*true, *question.false)]
            group = encode(lm.tokenizer, prompts, continuations)
            models, method = lm.prepare("base", generating=False)
            ((_, scored),) = score(models, lm.config, [group], method)
            sums = [float(np.sum(s, dtype=np.float64)) for s in scored.scores]
            expected = [references[texts] for texts in zip(prompts, continuations, strict=True)]
            np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-4)
            best = question.best if name == "mc2" else 0
            metrics = mc_metrics(sums[: len(true)], sums[len(true) :], best)
            assert sample["acc"] == pytest.approx(metrics[name], abs=1e-5)


# The command


WITHOUT_TORCH = """
import importlib.machinery
finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = classmethod(lambda cls, name, *a: None if name == "torch" else find(name, *a))
"""


def test_command_from_the_checkouts_root_without_torch(tiny, tmp_path, monkeypatch):
    """There Python finds this project's `evaluate` before HuggingFace's, which tasks import."""
    documents = [
        {"question": words(4, seed=i), "choices": [f" {words(n, i)}" for n in (1, 2)]} for i in range(3)
    ]
    write_task(tmp_path, "local", TASKS["choice"] + "process_results: !function own.results\n", documents)
    (tmp_path / "own.py").write_text(
        "import evaluate\n\n\ndef results(doc, results):\n"
        "    return {'acc': float(issubclass(evaluate.Metric, evaluate.EvaluationModule))}\n"
    )
    out = tmp_path / "out"
    arguments = ["--model", tiny("gqa").directory, "--method", "dola:candidates=low", "--tasks", "local"]
    arguments += ["--include-path", tmp_path, "--limit", 2, "--log-samples", "--cache-requests", "--out", out]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT_TORCH)
    path = [os.environ.get("PYTHONPATH"), str(tmp_path / "site")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv("LM_HARNESS_CACHE_PATH", str(tmp_path / "requests"))
    run = run_python(["-m", "evaluate.lm_eval", *arguments], ROOT)
    assert run.returncode == 0, run.stderr
    assert "acc" in run.stdout
    results = json.loads((out / "lm_eval.json").read_text())
    assert results["results"]["local"]["acc,none"] == 1.0
    assert "torch not installed" in results["pretty_env_info"]
    ours = results["config"]["imae_jax"]
    assert ours["method"]["scoring"]["name"] == "dola"
    assert ours["method"]["scoring"]["candidates"] == [0]
    assert ours["arguments"]["tasks"] == "local"
    assert {"imae_jax", "jax"} <= ours["versions"].keys()
    samples = [json.loads(line) for line in (out / "samples_local.jsonl").read_text().splitlines()]
    assert [sample["doc"] for sample in samples] == documents[:2]
    assert list((tmp_path / "requests").iterdir()), "requests are kept"

    assert report.main([str(out), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "dola:candidates=low, 2 documents a task, run 1" in text
    assert "| local | none | acc | 1.0000 | 0.0000 |" in text
    assert ours["base_model"]["fingerprint"] in text


@pytest.mark.parametrize("program", ["imae_jax.evaluate.lm_eval", "evaluate.lm_eval", "imae_jax"])
def test_every_name_of_the_command_finds_huggingfaces_evaluate(program, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["evaluate", "lm_eval"] if program == "imae_jax" else []
    arguments = ["--model", "none", "--tasks", "none", "--include-path", "nowhere", "--out", tmp_path / "out"]
    run = run_python(["-m", program, *words, *arguments], ROOT)
    assert (run.returncode, run.stderr) == (2, "error: --include-path nowhere is no directory\n")


def test_python_in_the_checkouts_root_is_told_what_to_do():
    code = "from imae_jax.evaluate import lm_eval; lm_eval.IMAEJaxLM(None)"
    run = run_python(["-c", code], ROOT)
    assert "`import evaluate` gives" in run.stderr and "start Python in another folder" in run.stderr


@pytest.fixture
def command(tiny, tasks, tmp_path, capfd):
    """Runs the command in this process: exit code and standard error."""

    def run(**arguments):
        given = {
            "model": tiny("gqa").directory,
            "tasks": "choice",
            "include_path": tasks,
            "out": tmp_path / "out",
        }
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in (given | arguments).items() if v is not True]
        flags += [f"--{k.replace('_', '-')}" for k, v in arguments.items() if v is True]
        code = main(flags)
        return code, capfd.readouterr().err

    return run


BAD_INPUT = {
    "no task": ({"tasks": ","}, "--tasks names no task"),
    "an unknown task": ({"tasks": "choice,nonsense"}, "task 'nonsense' does not exist"),
    "an unknown method": ({"method": "nonsense"}, "method 'nonsense' does not exist"),
    "a method without its units": ({"method": "expert"}, "needs a model with anti-expert units"),
    "no documents": ({"limit": 0}, "--limit: give at least 1, not 0"),
    "a folder that is none": ({"include_path": "nowhere"}, "nowhere is no directory"),
    "no chat template": ({"apply_chat_template": True}, "has no chat template"),
    "a context over the model's": ({"max_length": 65}, "max length 65"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_code_2(command, tmp_path, case):
    arguments, message = BAD_INPUT[case]
    code, error = command(**arguments)
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_results_are_not_replaced_unasked(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "exists already" in command()[1]
    assert "holds no lm_eval.json" in command(overwrite=True)[1]
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_data_that_cannot_be_loaded_is_one_line(tmp_path):
    write_task(tmp_path, "gone", TASKS["choice"], DOCUMENTS)
    (tmp_path / "gone.json").unlink()
    with user_error("tasks gone cannot be loaded"):
        load_tasks(["gone"], tmp_path)


def test_groups_are_loaded_once(tasks, tmp_path):
    for path in tasks.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "all.yaml").write_text("group: all\ntask: [choice, until]\naggregate_metric_list: []\n")
    manager, loaded = load_tasks(["rolling"], tmp_path)
    assert [task.task_name for task in loaded] == ["rolling"]
    assert "truthfulqa_mc1" not in manager.all_tasks, "the harness's own tasks are read only where needed"


@pytest.mark.docs
@needs_smollm2
def test_commands_and_snippets_of_the_document_run(cut_dir, tmp_path, monkeypatch, capfd):
    """As they stand, but for most of the model's layers."""
    text = (ROOT / "docs" / "lm_eval.md").read_text(encoding="utf-8")
    assert text.count(SMOLLM2) == 2
    text = text.replace(SMOLLM2, str(cut_dir))
    (tmp_path / "tasks").mkdir()
    for language in ("yaml", "json"):
        (block,) = blocks(text, language)
        (tmp_path / "tasks" / f"capitals.{language}").write_text(block)
    (line,) = blocks(text, "bash")
    program, *arguments = shlex.split(line.replace("\\\n", " "))
    assert program == "python"
    monkeypatch.chdir(tmp_path)
    module, *arguments = arguments[1:]
    assert module == main.__module__
    assert main(arguments) == 0
    capfd.readouterr()
    written = {path.name for path in (tmp_path / "out" / "capitals").iterdir()}
    assert written == {"lm_eval.json", "samples_capitals.jsonl"}

    # In the same process, where what the command compiled is there for the snippet.
    (snippet,) = blocks(text, "python")
    exec(snippet, {})
    assert 0 <= float(capfd.readouterr().out) <= 1
