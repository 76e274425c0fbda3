"""The commands as a user runs them, and the package as a user installs it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    SMOLLM2,
    error_of,
    hf_logits,
    import_torch,
    output_of,
    random_tokens,
    run_python,
    tiny_llama,
)

from imae_jax import decode
from imae_jax.__main__ import COMMANDS
from imae_jax.__main__ import main as every_command
from imae_jax.convert.__main__ import main as convert
from imae_jax.convert.export import SHIPPED
from imae_jax.decode import Sampler
from imae_jax.decode.methods import StreamLogits
from imae_jax.generate import main as generate

ROOT = Path(__file__).parents[1]


HIDE_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]"


@pytest.fixture(scope="module")
def tiny_dir(tiny):
    return str(tiny("gqa").directory)


def test_generate_continues_like_transformers(tiny_dir, tiny, capfd):
    text = output_of(capfd, generate, "--model", tiny_dir, "--prompt", "t5 t6 t7", "--max-new-tokens", 6)
    tokens = [5, 6, 7]
    for _ in range(6):
        tokens.append(int(hf_logits(tiny("gqa").hf, [tokens])[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    words = [f"t{i}" for i in tokens[3:] if i > 2]
    assert text.replace("t5 t6 t7", "", 1).split() == words


def test_generate_is_seeded(tiny_dir, capfd):
    command = ["--model", tiny_dir, "--prompt", "t5", "--max-new-tokens", 12, "--temperature", 1.5]
    first = output_of(capfd, generate, *command, "--seed", 1)
    assert output_of(capfd, generate, *command, "--seed", 1) == first
    assert output_of(capfd, generate, *command, "--seed", 2) != first


def test_compare_shows_every_method(tiny_dir, capfd):
    command = ["--model", tiny_dir, "--prompt", "t5", "--max-new-tokens", 4]
    text = output_of(capfd, generate, *command, "--compare", "base,sled:scale={7,8}")
    for title in ("prompt", "base", "sled:scale=7", "sled:scale=8"):
        assert text.count(title) == 1


BAD_GENERATE = {
    "mode": (["--mode", "truth"], "'truth' does not exist"),
    "nan": (["--mode", "nan"], "'nan' does not exist"),
    "no units": (["--mode", "expert"], "needs a model with anti-expert units"),
    "two ways": (["--mode", "base", "--compare"], "exclude each other"),
    "context": (["--prompt", " ".join(["t5"] * 80)], "exceed the model's context of 64"),
    "no tokens": (["--prompt", ""], "is empty"),
    "too many new": (["--max-new-tokens", "99"], "context of 64"),
    "none new": (["--max-new-tokens", "0"], "max_new_tokens 0"),
    "temperature": (["--temperature", "-1"], "temperature -1"),
    "top_p": (["--top-p", "0"], "top_p 0"),
    "top_k": (["--top-k", "-3"], "top_k -3"),
    "format": (["--format", "xml"], "format 'xml'"),
    "chat": (["--format", "chat"], "no chat template"),
    "dtype": (["--dtype", "int4"], "dtype 'int4'"),
    "flag": (["--modes", "base"], "--modes"),
    "seed": (["--seed", "-1"], "--seed -1"),
    "revision": (["--revision", "main"], "goes with a hub model"),
    "base": (["--base", "other"], "goes with an IMAE directory"),
    "no methods": (["--compare", ""], "no method is given"),
    "half a character": (["--prompt", "t5 \udcff"], "prompts 1 holds half of a character"),
}


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_generate_errors(tiny_dir, capfd, case):
    arguments, message = BAD_GENERATE[case]
    command = ["--model", tiny_dir, "--prompt", "t5", "--max-new-tokens", 8]
    assert message in error_of(capfd, generate, *command, *arguments)


def test_errors_of_a_process_are_one_line_and_code_2(tmp_path):
    run = run_python(["-m", "imae_jax.generate", "--model", "nowhere", "--prompt", "x"], tmp_path)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == (
        "error: model 'nowhere' does not exist: give a HuggingFace directory, a GGUF file, a hub id "
        f"(org/name), an IMAE directory or {SMOLLM2}, imae-smollm2-135m\n"
    )


def test_export_is_the_same_model_in_transformers(tiny_dir, tiny, tmp_path, capfd):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    out = tmp_path / "hf"
    output_of(capfd, convert, "export", "--model", tiny_dir, "--out", out, "--max-shard-gb", 1e-5)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    hf = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    tokens = random_tokens(2, 9)
    np.testing.assert_array_equal(hf_logits(hf, tokens), hf_logits(tiny("gqa").hf, tokens))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("t7 t8")["input_ids"] == [7, 8]


def test_export_leaves_nothing_behind_on_errors(tiny_dir, tmp_path, capfd):
    out = tmp_path / "hf"
    assert "'nowhere' does not exist" in error_of(
        capfd, convert, "export", "--model", "nowhere", "--out", out
    )
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    assert "exists already" in error_of(capfd, convert, "export", "--model", tiny_dir, "--out", out)
    error_of(capfd, convert, "export", "--model", tiny_dir, "--out", out, "--overwrite")
    assert out.read_text() == "mine"


def test_overwrite_replaces_results_only(tiny_dir, tmp_path, capfd):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    command = ["export", "--model", tiny_dir, "--out", out, "--overwrite"]
    assert "holds no config.json" in error_of(capfd, convert, *command)
    assert (out / "thesis.tex").read_text() == "mine"
    (out / "thesis.tex").unlink()
    output_of(capfd, convert, *command)
    output_of(capfd, convert, *command)


def test_export_keeps_every_end_token(tiny_dir, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_dir, copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 5, 9]}')
    output_of(capfd, convert, "export", "--model", copy, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 5, 9]


@pytest.mark.slow
def test_wheel_keeps_the_rooms_inside_the_package(tmp_path):
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    top = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"imae_jax"}
    files = [
        "train/configs/demo.yaml",
        *("train/data/demo.jsonl", "train/data/pairs.jsonl"),
        "evaluate/data/demo_primer.txt",
        "convert/model_card.md.jinja",
        *(f"convert/torch_side/{name}" for name in SHIPPED),
        "serve/page.html",
        *(f"evaluate/inspector/page.{kind}" for kind in ("html", "css", "js")),
        *(f"evaluate/{name}" for name in ("data/paper_results.json", "benchmarks/harm.py")),
    ]
    for file in files:
        assert (site / "imae_jax" / file).is_file()
    for folder in ("evaluate/data", "train/configs", "train/data"):
        shipped, source = ({p.name for p in (top / folder).iterdir()} for top in (site / "imae_jax", ROOT))
        assert shipped == source
    assert "Package would be ignored" not in run.stdout + run.stderr
    assert (site / "imae_jax" / "py.typed").exists()
    assert {p.relative_to(ROOT).name for p in (ROOT / "convert").glob("*.py")} == {
        p.name for p in (site / "imae_jax" / "convert").glob("*.py")
    }
    # The console command, as pip's own script starts it.
    (tmp_path / "imae").write_text(
        f"{HIDE_EDITABLE}\nsys.path[0] = {str(site)!r}\nfrom importlib import metadata\n"
        f"(wheel,) = metadata.distributions(path=[{str(site)!r}])\n"
        "(script,) = wheel.entry_points.select(group='console_scripts', name='imae')\n"
        "sys.exit(script.load()())\n"
    )
    for words in (["--help"], ["evaluate"], ["evaluate", "report", "--help"]):
        run = run_python([tmp_path / "imae", *words], tmp_path)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith("usage: imae ")


@pytest.mark.parametrize("module", ["imae_jax.train", "imae_jax.evaluate.truthfulqa", "imae_jax.convert"])
def test_commands_run_from_a_checkout_that_is_not_installed(tmp_path, module):
    """Only the dependencies are importable: what is installed of this project is hidden."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("imae_jax", "convert", "train", "evaluate", "pyproject.toml"):
        os.symlink(ROOT / name, checkout / name)
    script = (
        f"{HIDE_EDITABLE}; import runpy; sys.argv = ['x', '--help']; "
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    run = run_python(["-c", script], checkout)
    assert run.returncode == 0, run.stderr
    assert module in run.stdout


# One command for all


IMAE = """
import sys
from imae_jax.__main__ import main

sys.argv[0] = "imae"
try:
    code = main()
except SystemExit as end:  # argparse's
    code = end.code
print(*(name for name in ("jax", "transformers", "matplotlib") if name in sys.modules), sep=",")
sys.exit(code)
"""


def imae(*words):
    """Exit code, output, errors, and which of the slow libraries were imported."""
    run = run_python(["-c", IMAE, *words], ROOT)
    *output, imported = run.stdout.splitlines()
    return run.returncode, "\n".join(output), run.stderr, imported


def test_every_name_is_a_command_that_calls_itself_so(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/imae"])
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            every_command([*name.split(), "--help"])
        assert capfd.readouterr().out.startswith(f"usage: imae {name} ")
        assert f"(see imae {name}" in error_of(capfd, every_command, *name.split(), "--no-such-option")


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_messages_may_stand_before_any_command(capfd, name):
    assert every_command(["-q", "--debug", *name.split(), "--no-such-option"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].endswith(" --help)")


def test_options_before_no_command_change_nothing(capfd):
    assert every_command(["--verbose"]) == 0
    assert "To begin with" in capfd.readouterr().out
    assert "'generat' is no command: did you mean" in error_of(capfd, every_command, "-q", "generat")


@pytest.mark.parametrize("words", [(), ("--help",), ("evaluate",), ("--version",)])
def test_help_does_not_wait_for_jax(words):
    code, output, error, imported = imae(*words)
    assert (code, error, imported) == (0, "", "")
    assert output


HELP = """
import contextlib, io, sys
from imae_jax.__main__ import COMMANDS, main

for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*name.split(), "--help"])
    assert text.getvalue().startswith("usage: ")
    slow = {"jax", "transformers", "matplotlib", "torch"} & sys.modules.keys()
    assert not slow, f"{name} imports {slow}"
"""


def test_no_command_needs_jax_for_its_help():
    run = run_python(["-c", HELP], ROOT)
    assert run.returncode == 0, run.stderr


def test_a_newcomer_is_told_what_to_do_first():
    """In order, with what exists; `evaluate` alone lists its commands."""
    _, text, _, _ = imae("--help")
    places = [text.index(f"  imae {command} ") for command in ("generate", "train", "evaluate truthfulqa")]
    assert places == sorted(places)
    _, listed, _, _ = imae("evaluate")
    assert "evaluate lm_eval" in listed
    assert "generate" not in listed
    run = run_python(["-m", "imae_jax", "evaluate", "harm", "--help"], ROOT)
    assert run.stdout.startswith("usage: python -m imae_jax evaluate harm ")
    run = run_python(["-m", "imae_jax.evaluate.harm", "--help"], ROOT)
    assert run.stdout.startswith("usage: python -m imae_jax.evaluate.harm ")


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["generat"], "did you mean imae generate?"),
        (["evaluate", "truthfullqa", "--model", "x"], "did you mean imae evaluate truthfulqa?"),
        (["harm"], "did you mean imae evaluate harm?"),
        (["xyz"], "imae --help lists all"),
        (["--model", "x"], "imae --help lists all"),
    ],
)
def test_unknown_commands_are_named_with_the_nearest(words, near):
    code, output, error, imported = imae(*words)
    assert (code, output, imported) == (2, "", "")
    assert error.startswith("error: ")
    assert near in error
    assert error.count("\n") == 1


def test_the_package_gives_what_a_notebook_needs(tiny_dir, tmp_path):
    """And is imported before JAX is set up."""
    script = f"""
import sys, imae_jax
assert "jax" not in sys.modules and set(imae_jax.__all__) <= set(dir(imae_jax))
import jax
jax.config.update("jax_num_cpu_devices", 2)
lm = imae_jax.load_model({tiny_dir!r})
assert jax.device_count() == 2 and isinstance(lm, imae_jax.LanguageModel)
for name in imae_jax.__all__:
    assert getattr(imae_jax, name) is not None
from imae_jax import *
assert parse_method("base") and Sampler(0.7) and load_model is imae_jax.convert.load_model
try: imae_jax.load_modle
except AttributeError as error: print(error)
"""
    run = run_python(["-c", script], tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "module 'imae_jax' has no attribute 'load_modle'\n"


def write_prompts(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_file_of_prompts(checkpoint, tmp_path, capfd):
    """Bad lines are named and left out; lines that are there already are not done again."""
    prompts = write_prompts(
        tmp_path / "in.jsonl",
        *(
            '{"prompt": "t5 t6"}',
            "",
            '{"prompt": ""}',
            '{"text": "t7"}',
            '{"prompt": "t7"}',
            '{"prompt": "t8"}',
        ),
        json.dumps({"prompt": " ".join(["t9"] * 80)}),
        '{"prompt": "t9 \\ud800"}',
    )
    out = tmp_path / "out.jsonl"
    command = ["--model", str(checkpoint.directory), "--prompts", str(prompts), "--out", str(out)]
    command += ["--max-new-tokens", "6", "--batch-size", "2", "--temperature", "1.5"]
    assert generate(command) == 2
    error = capfd.readouterr().err
    assert f"error: 4 lines of {prompts} were left out: line 3: prompt is empty" in error
    assert "line 4: no JSON object" in error
    assert "line 7: prompt and new tokens are" in error
    assert "line 8: prompts 0 holds half of a character" in error
    lines = out.read_text().splitlines(keepends=True)
    assert [json.loads(line)["line"] for line in lines] == [1, 5, 6]
    # Cut off in the middle of a line, as a kill leaves it: the same lines come again.
    out.write_text(lines[0] + lines[1][:20])
    assert generate(command) == 2
    assert out.read_text() == "".join(lines)
    assert generate([*command, "--seed", "3"]) == 2
    assert "was written with other settings" in capfd.readouterr().err
    assert out.read_text() == "".join(lines)
    # A row's text is that of the prompt alone.
    alone = checkpoint.load().generate(["t5 t6"], sampler=Sampler(1.5), max_new_tokens=6)
    assert json.loads(lines[0])["text"] == alone[0]


def test_lines_end_at_line_feeds_alone(checkpoint, tmp_path, capfd):
    """Not at what else Unicode calls a line's end; a byte-order mark belongs to no line."""
    out, prompts = tmp_path / "new" / "out.jsonl", tmp_path / "in.jsonl"
    texts = ["t5 \u2028 t6", "t7\u0085"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n" for text in texts]
    prompts.write_text("".join(lines), encoding="utf-8-sig", newline="")
    command = ["--model", str(checkpoint.directory), "--prompts", str(prompts), "--out", str(out)]
    for before in (0, 2):
        assert generate([*command, "--max-new-tokens", "2"]) == 0
        assert f"holds 2 lines, {before} of them from before" in capfd.readouterr().err
        assert [json.loads(line)["prompt"] for line in out.read_bytes().splitlines()] == texts


def test_an_output_is_gone_on_with_for_the_same_model_and_prompts_alone(
    checkpoint, tiny_dir, tmp_path, capfd
):
    out, prompts = tmp_path / "out.jsonl", write_prompts(tmp_path / "in.jsonl", '{"prompt": "t5"}')

    def run(*arguments, model=checkpoint.directory):
        command = ["--model", model, "--prompts", prompts, "--out", out, "--max-new-tokens", 2, *arguments]
        assert generate([*map(str, command)]) == 2
        return capfd.readouterr().err

    # What no line can be done with leaves no file behind.
    for arguments in (["--mode", "expert"], ["--format", "chat"], ["--max-new-tokens", 0], ["--stop", ""]):
        assert "left out" not in run(*arguments)
        assert not out.exists()
    output_of(capfd, generate, "--model", tiny_dir, "--prompts", prompts, "--out", out, "--max-new-tokens", 2)
    content = out.read_bytes()
    moved = shutil.copytree(tiny_dir, tmp_path / "moved")
    output_of(capfd, generate, "--model", moved, "--prompts", prompts, "--out", out, "--max-new-tokens", 2)
    assert out.read_bytes() == content
    assert "other settings" in run()
    assert "other settings" in run("--dtype", "bfloat16", model=tiny_dir)
    write_prompts(prompts, '{"prompt": "t6"}')
    assert "another prompt at line 1" in run(model=tiny_dir)
    assert out.read_bytes() == content
    for foreign in (b"mine", b"mine\n", b"\xff\xfe"):
        out.write_bytes(foreign)
        assert "not written by this command" in run()
        assert out.read_bytes() == foreign
    out.unlink()
    out.mkdir()
    assert f"{out} cannot be read" in run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "x.jsonl"], "--prompts FILE and --out FILE go together"),
        (["--prompt", "a", "--prompt", "b", "--stream"], "--stream goes with one --prompt"),
        (["--prompt", "a", "--compare", "--stream"], "--compare goes neither"),
        (["--prompt", "a", "--stop", ""], "a stop string is empty"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty 0.0 must be above 0"),
        (["--prompt", "a", "--mode", "dola:candidates=2+9"], "dola: layer 9 is no early one"),
        (["--prompt", "a", "--mode", "iti"], "iti needs directions=FILE"),
        (["--prompt", "a", "--mode", "cd:amateur=nowhere"], "nowhere"),
    ],
)
def test_contradictions_are_named(checkpoint, capfd, arguments, message):
    assert message in error_of(capfd, generate, "--model", checkpoint.directory, *arguments)


def test_streamed_text_is_the_generated_text(smollm2):
    prompt, options = ["Once upon a time"], {"max_new_tokens": 24}
    whole = smollm2.generate(prompt, **options)
    pieces = [piece for (piece,) in smollm2.stream(prompt, **options)]
    assert "".join(pieces) == whole[0]
    assert sum(map(bool, pieces)) > 3
    # Stop strings end the text before them, also where several tokens make them.
    stop = whole[0][20:27]
    cut = whole[0][: whole[0].index(stop)]
    assert smollm2.generate(prompt, stop=[stop, "never"], **options) == [cut]
    assert "".join(piece for (piece,) in smollm2.stream(prompt, stop=[stop], **options)) == cut


def test_the_beginning_of_a_stop_string_is_held_back(checkpoint):
    """Also where the text so far is shorter than the stop string, but by less than half."""
    lm = checkpoint.load()
    (text,) = lm.generate(["t5"], max_new_tokens=4)
    first, second, *_ = text.split()
    for stop in (f"{first} {second}", text[:-1]):
        cut = text[: text.index(stop)]
        assert lm.generate(["t5"], max_new_tokens=4, stop=[stop]) == [cut]
        pieces = lm.stream(["t5"], max_new_tokens=4, stop=[stop], chunk_size=1)
        assert "".join(piece for (piece,) in pieces) == cut


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.2, 1.7, 5.0])
def test_repetition_penalty_is_that_of_transformers(checkpoint, penalty):
    torch = import_torch()
    prompt = [5, 6, 7]
    expected = checkpoint.hf.generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, repetition_penalty=penalty, eos_token_id=2
    )[0]
    lm = checkpoint.load()
    rows = decode.generate(
        lm.model,
        lm.config,
        [prompt, [9] * 5],
        sampler=Sampler(repetition_penalty=penalty),
        max_new_tokens=16,
        eos_token_ids=[2],
    )
    assert rows[0] == expected[3:].tolist()


@pytest.mark.parametrize("penalty", [0.8, 1.3])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.6), (12, 0.7)])
def test_sampling_cuts_the_tokens_that_transformers_cuts(penalty, top_k, top_p):
    """Penalty, temperature, top-k, top-p: another order keeps other tokens."""
    torch = import_torch()
    from transformers import generation

    logits = np.random.default_rng(0).normal(0, 3, (4, 97)).astype(np.float32)
    tokens = random_tokens(4, 20)
    processors = [
        generation.RepetitionPenaltyLogitsProcessor(penalty),
        generation.TemperatureLogitsWarper(0.6),
        *([generation.TopKLogitsWarper(top_k)] if top_k else []),
        *([generation.TopPLogitsWarper(top_p)] if top_p < 1 else []),
    ]
    expected = torch.tensor(logits)
    for processor in processors:
        expected = processor(torch.tensor(tokens), expected)
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    actual = Sampler(0.6, top_k, top_p, penalty).processed(jnp.asarray(logits), jnp.asarray(seen))
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("method", ["base", "sled:scale=9", "dola:candidates=low"])
def test_what_a_penalty_acts_on_differs_from_the_scores_by_one_number(method):
    model = tiny_llama()
    method = decode.parse_method(method).resolve(model.config, generating=True)
    random = np.random.default_rng(0).normal(0, 3, (4, 2, model.config.vocab_size)).astype(np.float32)
    exits = jnp.asarray(random[: len(method.streams[0].exits)]) if method.streams[0].exits else None
    logits = [StreamLogits(jnp.asarray(random[-1]), exits)]
    scores, unnormalized = method.scores(logits), method.unnormalized_scores(logits)
    possible = np.isfinite(np.asarray(scores))
    difference = np.where(possible, unnormalized - scores, np.nan)
    spread = np.nanmax(difference, axis=-1) - np.nanmin(difference, axis=-1)
    # Scores of hundreds, in float32.
    np.testing.assert_allclose(spread, 0, atol=2e-4)


TERMINATED = """
import os, signal, sys
from pathlib import Path
from imae_jax.cli import command
from imae_jax.files import new_directory

@command
def main(argv):
    with new_directory(sys.argv[1], marker="mine", overwrite=True) as directory:
        (directory / "mine").write_text("new")
        os.kill(os.getpid(), signal.SIGTERM)

assert main([]) == 143
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
signal.signal(signal.SIGTERM, lambda *_: print("mine"))  # an application's own handler stays
assert main([]) == 0
"""


FORKED = """
import multiprocessing
from imae_jax.cli import command

@command
def main(argv):
    with multiprocessing.get_context("fork").Pool(2) as pool:  # terminates its workers
        print(pool.map(abs, [-1]))

assert main([]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_workers_of_other_libraries_end_without_a_word(tmp_path):
    done = run_python(["-c", FORKED], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1]\n", "")


def test_sigterm_cleans_up(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("old")
    done = run_python(["-c", TERMINATED, tmp_path / "out"], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\n", "terminated\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine").read_text() == "new"
