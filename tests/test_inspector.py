"""The inspector: its numbers against one forward pass at a time, its page in a real browser, its errors."""

import base64
import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import (
    EVEN_SIZES,
    TINY,
    UNIT_SIZE,
    error_of,
    jit_forward,
    log_softmax,
    logits,
    tiny_llama,
    user_error,
    with_random_units,
    write_rows,
)

from imae_jax.anti_expert import MODES
from imae_jax.config import AntiExpertConfig
from imae_jax.convert import load_model
from imae_jax.convert.hf import save_hf
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.evaluate.inspector.__main__ import main
from imae_jax.evaluate.inspector.compute import MODE_NAMES, TOP, Excerpt, Inspection, inspect
from imae_jax.evaluate.inspector.excerpts import read_texts
from imae_jax.evaluate.inspector.page import byte_name, cut_characters, render_page, token_texts
from imae_jax.llama import Taps
from imae_jax.sharding import make_mesh
from imae_jax.tokenizer import Tokenizer
from imae_jax.train import data
from imae_jax.train.config import load_config
from imae_jax.train.run_directory import FILTER_DIR, IMAE_DIR
from imae_jax.train.token_filter import filter_tokens

ROOT = Path(__file__).parents[1]
CONTEXT = TINY.max_position_embeddings
# Half a step of 1/255, and the rounding of 255 · gate in float32.
GATE_STEP = 0.5 / 255 + 1e-6
GAMMA = 0.1
TEXT = 'A <script>window.hacked = 1</script> & "東京" é\n</script><!-- &amp; \tend'
HOSTILE_NAME = "<img src=x onerror=hacked=1>.txt"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`base`, a random model that reads bytes, and `imae`, the same with random units."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {"</s>": 0} | {character: i for i, character in enumerate(alphabet, 1)}
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = Tokenizer(byte_level, {"eos_token": "</s>"})
    model = tiny_llama(dataclasses.replace(TINY, vocab_size=len(vocab)))
    root = tmp_path_factory.mktemp("models")
    (root / "base").mkdir()
    save_hf(model, tokenizer, root / "base")
    base = dataclasses.asdict(load_model(str(root / "base")).base)
    weights, units = with_random_units(model.weights(), model.config), AntiExpertConfig(UNIT_SIZE)
    write_imae_dir(root / "imae", weights, model.config, units, base=base, training={})
    return root


@pytest.fixture(scope="module")
def lm(models):
    return load_model(str(models / "imae"), stacked=True)


def excerpt(length: int, *, seed: int = 0, **fields) -> Excerpt:
    tokens = np.random.default_rng(seed).integers(1, 257, length).tolist()
    return Excerpt(f"text of {length}", tuple(tokens), **fields)


def assert_values(lm, found: Inspection, tokens: tuple[int, ...], places: range, start: int = 0) -> None:
    """The values of tokens at `places` are those of one forward pass a mode over `tokens[start:]`."""
    weights, config = lm.model.weights(), lm.config
    row = np.array([tokens[start : places.stop]])
    predicting = np.array(places) - 1 - start
    for m, mode in enumerate(MODE_NAMES):
        output = jit_forward(weights, config, row, strength=MODES[mode], taps=Taps(gates=True))
        gates = np.asarray(output.gates)[:, 0, predicting]
        np.testing.assert_allclose(found.gates[m][:, places], gates, atol=2e-5)
        logits_here = np.asarray(output.hidden_states)[0] @ np.asarray(weights.base["unembed"])
        expected = log_softmax(logits_here)[predicting]
        targets = np.array(tokens)[places]
        rows = np.arange(len(places))
        np.testing.assert_allclose(found.log_probs[m, places], expected[rows, targets], atol=1e-4)
        top = found.top_tokens[m, places]
        best = -np.sort(-expected, axis=-1)[:, :TOP]
        np.testing.assert_allclose(found.top_log_probs[m, places], best, atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(expected, top, axis=-1), best, atol=1e-4)
        assert all(len(set(ids)) == TOP for ids in top.tolist())


def test_values_are_those_of_the_position_that_predicts_a_token(lm):
    """Texts of several lengths share batches and padding; each has the values that it has alone."""
    texts = [excerpt(n, seed=n) for n in (2, 33, 64)]
    for text, found in zip(texts, inspect(lm, texts), strict=True):
        assert_values(lm, found, text.tokens, range(1, len(text.tokens)))
        assert found.context.tolist() == list(range(len(text.tokens)))
    assert not np.allclose(found.gates[0], found.gates[1]), "units of lower layers change what gates read"


def test_windows_give_the_values_of_their_own_passes(lm):
    text, window = excerpt(80), 32
    (found,) = inspect(lm, [text], window=window)
    (first,) = inspect(lm, [dataclasses.replace(text, tokens=text.tokens[:window])])
    for field in dataclasses.fields(Inspection):
        axis = {"gates": 2, "context": 0}.get(field.name, 1)
        whole = np.take(getattr(found, field.name), np.arange(window), axis=axis)
        np.testing.assert_allclose(whole, getattr(first, field.name), atol=1e-5)
    for start, places in ((16, range(32, 48)), (32, range(48, 64)), (48, range(64, 80))):
        assert_values(lm, found, text.tokens, places, start)
        assert found.context[places].tolist() == [i - start for i in places]


def page_data(html: str) -> dict:
    """What the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    page = json.loads(text)
    M, L, K = len(page["modes"]), page["layers"], page["top"]
    for packed in page["excerpts"]:
        T = packed["length"]

        def unpack(name, dtype, *shape, packed=packed):
            return np.frombuffer(base64.b64decode(packed[name]), dtype).reshape(shape)

        packed["tokens"] = unpack("tokens", "<u4", T)
        packed["gates"] = unpack("gates", "u1", M, L, T) / 255
        packed["logProbs"] = unpack("logProbs", "<f4", M, T)
        packed["topTokens"] = unpack("topTokens", "<u4", M, T, K)
        packed["topLogProbs"] = unpack("topLogProbs", "<f4", M, T, K)
        packed["context"] = unpack("context", "<u4", T)
    return page


def shown_text(page: dict, packed: dict) -> str:
    return "".join(
        packed["shown"].get(str(i), page["texts"][str(token)]) for i, token in enumerate(packed["tokens"])
    )


@pytest.fixture(scope="module")
def text_page(models, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pages")
    source = directory / HOSTILE_NAME
    source.write_text(TEXT, encoding="utf-8")
    path = directory / "new" / "page.html"
    command = ["--model", models / "imae", "--text", source, "--html", path, "--window", "40", "--quiet"]
    assert main([*map(str, command)]) == 0
    return path


def test_page_of_a_text_holds_what_was_computed(text_page, lm):
    page = page_data(text_page.read_text(encoding="utf-8"))
    (packed,) = page["excerpts"]
    tokens = tuple(lm.tokenizer(TEXT)["input_ids"])
    assert packed["tokens"].tolist() == list(tokens)
    assert shown_text(page, packed) == TEXT, "characters of several tokens are whole"
    assert page["texts"][str(tokens[TEXT.index("東")])] == "<0xE6>", "and their parts are bytes"
    assert (packed["title"], packed["start"], packed["facts"]) == (HOSTILE_NAME, None, None)
    (found,) = inspect(lm, [Excerpt("", tokens)], window=40)
    np.testing.assert_allclose(packed["gates"], found.gates, atol=GATE_STEP)
    np.testing.assert_allclose(packed["logProbs"], found.log_probs, atol=1e-6)
    np.testing.assert_array_equal(packed["topTokens"], found.top_tokens)
    np.testing.assert_array_equal(packed["context"], found.context)
    (summary,) = page["summary"]
    assert summary["tokens"] == len(tokens) - 1
    np.testing.assert_allclose(summary["layers"], found.gates[:, :, 1:].mean(axis=2), atol=1e-6)
    assert summary["gain"] == pytest.approx((found.log_probs[1] - found.log_probs[0])[1:].mean(), abs=1e-5)


def test_texts_of_tokens_as_sentencepiece_writes_them():
    """Spaces begin words, and bytes are tokens of their own."""
    decoders = tokenizers.decoders
    vocab = {name: i for i, name in enumerate(("▁a", "▁b", "<0xE6>", "<0x9D>", "<0xB1>", "<unk>"))}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    tokenizer = Tokenizer(model, {"unk_token": "<unk>"})
    texts = token_texts(tokenizer, [[i] for i in range(5)])
    assert texts == [" a", " b", "\ufffd", "\ufffd", "\ufffd"]
    shown = cut_characters(tokenizer, [0, 2, 3, 4, 1, 2], dict(enumerate(texts)))
    assert shown == {1: "東", 2: "", 3: ""}, "the last one stays cut"
    assert byte_name("<0xE6>") == byte_name("æ") == "<0xE6>"


def test_nothing_of_a_text_is_markup(text_page):
    html = text_page.read_text(encoding="utf-8")
    assert html.count("<script") == html.count("</script") == 2
    assert "<img" not in html
    assert "<!--" not in html
    tags = re.findall(r"<[a-z][^>]*>", html.split("<script")[0])
    assert [tag for tag in tags if "src=" in tag or "href=" in tag] == ['<link rel="icon" href="data:,">']


def test_page_of_prompts_with_answers(models, lm, tmp_path):
    source, path = tmp_path / "texts.jsonl", tmp_path / "page.html"
    lines = [{"prompt": "Why?", "answer": "So."}, {"prompt": "Just this"}]
    source.write_text("\n\n".join(map(json.dumps, lines)))
    command = ["--model", models / "imae", "--text", source, "--html", path, "--quiet"]
    assert main([*map(str, command), "--format", "plain"]) == 0
    page = page_data(path.read_text())
    answered, alone = page["excerpts"]
    assert [e["title"] for e in page["excerpts"]] == ["line 1", "line 3"]
    assert shown_text(page, answered) == "Q: Why?\nA: So.</s>"
    assert answered["start"] == len("Q: Why?\nA:")
    assert alone["start"] is None
    assert shown_text(page, alone) == "Q: Just this\nA:"
    (found,) = inspect(lm, [Excerpt("", tuple(answered["tokens"].tolist()))])
    regions = {row["region"]: row for row in page["summary"]}
    assert list(regions) == ["all tokens", "prompt", "answer"]
    assert regions["answer"]["tokens"] == len(" So.") + 1
    answer = found.log_probs[:, answered["start"] :]
    np.testing.assert_allclose(regions["answer"]["log_probs"], answer.mean(axis=1), atol=1e-5)
    # An own page may be replaced, raw is the default.
    assert main([*map(str, command), "--overwrite"]) == 0
    page = page_data(path.read_text())
    assert shown_text(page, page["excerpts"][0]) == "Why?So."


@pytest.fixture(scope="module")
def anti_expert_llm(tiny):
    """Another random model does for one trained on hallucinations."""
    return tiny("gqa", initializer_range=0.2, seed=1, **EVEN_SIZES).directory


@pytest.fixture(scope="module")
def run(checkpoint, anti_expert_llm, tmp_path_factory) -> Path:
    """What the inspector reads of a training run, written as a run writes it; units are random."""
    out = tmp_path_factory.mktemp("run")
    rows = write_rows(out / "rows.jsonl")
    config = load_config(
        None,
        [
            *(f"model={checkpoint.directory}", f"out={out}", f"data.source={rows}", "data.held_out=4"),
            *(f"filter.anti_expert_llm={anti_expert_llm}", f"filter.gamma={GAMMA}"),
        ],
    )
    mesh = make_mesh(8)
    base = load_model(config.model, stacked=True, mesh=mesh)
    tokenized = data.tokenize(data.load_rows(config.data), base.tokenizer, config.data)
    _, kept = filter_tokens(
        tokenized.train + tokenized.held_out,
        base,
        [config.filter.anti_expert_llm],
        config,
        out / FILTER_DIR,
        mesh=mesh,
    )
    write_imae_dir(
        out / IMAE_DIR,
        with_random_units(base.model.weights(), base.config),
        base.config,
        AntiExpertConfig(UNIT_SIZE),
        base=dataclasses.asdict(base.base),
        training={"config": config.to_dict(), "data": tokenized.statistics | kept},
    )
    return out


def test_page_of_a_run_marks_the_tokens_about_facts(run, checkpoint, anti_expert_llm, tmp_path, capfd):
    path = tmp_path / "page.html"
    command = ["--model", run / "imae", "--data", run, "--html", path, "--quiet", "--overwrite"]
    command = [*map(str, command)]
    assert main(command) == 0
    page = page_data(path.read_text())
    lm = load_model(str(run / "imae"))
    held_out = lm.imae["training"]["data"]["held_out_rows"]
    assert [e["title"] for e in page["excerpts"]] == [f"row {row}, held out" for row in held_out]
    base, anti = (load_model(str(directory)) for directory in (checkpoint.directory, anti_expert_llm))
    marks, ratios = [], []
    for packed in page["excerpts"]:
        tokens, start = packed["tokens"], packed["start"]
        of_base, of_anti = (
            log_softmax(logits(m.model.weights(), m.config, tokens[None].astype(np.int32))[0])
            for m in (base, anti)
        )
        predicting = np.arange(start - 1, len(tokens) - 1)
        ratios += (of_anti - of_base)[predicting, tokens[start:]].tolist()
        marks += [i in packed["facts"] for i in range(start, len(tokens))]
    ratios, marks = np.array(ratios), np.array(marks)
    clear = np.abs(ratios - GAMMA) > 1e-4
    np.testing.assert_array_equal(marks[clear], ratios[clear] >= GAMMA)
    assert 0 < marks.sum() < len(marks)
    rows = {row["region"]: row["tokens"] for row in page["summary"]}
    assert (rows["T_fact"], rows["answer outside T_fact"]) == (marks.sum(), (~marks).sum())

    trained = next(row for row in range(12) if row not in held_out)
    assert main([*command, "--rows", f"{held_out[1]},{trained}"]) == 0
    page = page_data(path.read_text())
    assert [e["title"] for e in page["excerpts"]] == [
        f"row {held_out[1]}, held out",
        f"row {trained}, trained on",
    ]
    unfiltered = tmp_path / "run"
    shutil.copytree(run / "imae", unfiltered / "imae")
    assert main([*command, "--data", str(unfiltered)]) == 0
    for packed in page_data(path.read_text())["excerpts"]:
        assert [*packed["facts"]] == [*range(packed["start"], len(packed["tokens"]))]
    before = path.read_bytes()
    assert f"{run} has no row 12, 99" in error_of(capfd, main, *command, "--rows", "3,12,99")
    config = json.loads((unfiltered / "imae" / "imae_config.json").read_text())
    config["training"]["data"]["held_out_rows"].pop()
    (unfiltered / "imae" / "imae_config.json").write_text(json.dumps(config))
    assert "is not what" in error_of(capfd, main, *command, "--data", unfiltered)
    config["base"]["fingerprint"] = "other"
    (unfiltered / "imae" / "imae_config.json").write_text(json.dumps(config))
    assert "was trained on another base" in error_of(capfd, main, *command, "--data", unfiltered)
    assert path.read_bytes() == before


@pytest.mark.docs
def test_commands_of_the_document_run(run, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "inspector.md").read_text(encoding="utf-8")

    def blocks(language):
        return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "first").symlink_to(run)
    (lines,) = blocks("json")
    Path("answers.jsonl").write_text(lines, encoding="utf-8")
    Path("text.txt").write_text("t5 t6 t7 " * 40)
    (commands,) = blocks("bash")
    for command in commands.replace("\\\n", " ").splitlines():
        *program, module = shlex.split(command)[:3]
        assert [*program, module] == ["python", "-m", "imae_jax.evaluate.inspector"]
        arguments = shlex.split(command)[3:]
        assert main([*arguments, "--quiet"]) == 0, command
        assert Path(arguments[arguments.index("--html") + 1]).stat().st_size > 0


BAD_FILES = {
    "missing.txt": (None, "missing.txt cannot be read"),
    "empty.txt": (b" \n", "empty.txt is empty"),
    "latin1.txt": ("é".encode("latin1"), "latin1.txt cannot be read: 'utf-8' codec"),
    "one.txt": (b"x", "one.txt has 1 tokens: at least 2"),
    "huge.txt": (b"x" * 20_001, "20001 tokens are more than a page holds (20000)"),
    "cut.jsonl": (b'{"prompt": "a"}\n\n{"prompt": ', "cut.jsonl line 3 is not JSON"),
    "list.jsonl": (b"[1]", 'list.jsonl row 0 is no JSON object with a text "prompt"'),
    "number.jsonl": (b'{"prompt": 3}', 'line 1 is no JSON object with a text "prompt"'),
    "blank.jsonl": (b'{"prompt": "a", "answer": " "}', "line 1: prompt or answer is empty"),
    "surrogate.jsonl": (b'{"prompt": "\\ud800"}', "line 1 holds half a character"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_texts(models, tmp_path, capfd, name):
    content, message = BAD_FILES[name]
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    out = tmp_path / "page.html"
    assert message in error_of(capfd, main, "--model", models / "imae", "--text", source, "--html", out)
    assert not out.exists()


def test_bad_arguments(models, tmp_path, capfd):
    source, out = tmp_path / "text.txt", tmp_path / "page.html"
    source.write_text("some text")
    of_model = ["--model", models / "imae", "--html", out, "--quiet"]
    text = ["--text", source]
    plain = ["--model", models / "base", *text, "--html", out]
    assert "base has no anti-expert units: give an IMAE directory" in error_of(capfd, main, *plain)
    assert "--text --data is required" in error_of(capfd, main, *of_model)
    assert "not allowed with" in error_of(capfd, main, *of_model, *text, "--data", tmp_path)
    assert "--rows goes with --data" in error_of(capfd, main, *of_model, *text, "--rows", "1")
    assert "--rows 1,x: give" in error_of(capfd, main, *of_model, "--data", tmp_path, "--rows", "1,x")
    assert "--rows 1,1: give" in error_of(capfd, main, *of_model, "--data", tmp_path, "--rows", "1,1")
    assert "--format goes with" in error_of(capfd, main, *of_model, *text, "--format", "plain")
    assert f"--window 65: give 2 to {CONTEXT}" in error_of(capfd, main, *of_model, *text, "--window", "65")
    assert f"{tmp_path} holds no imae" in error_of(capfd, main, *of_model, "--data", tmp_path)
    assert "is a directory" in error_of(capfd, main, *of_model, *text, "--html", tmp_path)
    assert not out.exists()
    out.write_text("mine")
    assert "exists already" in error_of(capfd, main, *of_model, *text)
    assert "is not a page of this command" in error_of(capfd, main, *of_model, *text, "--overwrite")
    assert out.read_text() == "mine"
    with user_error("no-such.txt"):
        read_texts(tmp_path / "no-such.txt")


def synthetic_page(tokenizer, directory: Path, length: int, layers: int = 30, **fields) -> Path:
    """A page of random values that vary as much as they can, which is what does not compress."""
    text, random = excerpt(length, **fields), np.random.default_rng(0)
    M, K = len(MODE_NAMES), TOP
    found = Inspection(
        random.random((M, layers, length), np.float32),
        -10 * random.random((M, length), np.float32),
        random.integers(1, 257, (M, length, K)),
        -10 * random.random((M, length, K), np.float32),
        np.arange(length),
    )
    path = directory / f"{length}.html"
    path.write_text(render_page(tokenizer, [text], [found], model="synthetic", settings={}), "utf-8")
    return path


def test_a_page_of_1000_tokens_is_small(lm, tmp_path):
    size = synthetic_page(lm.tokenizer, tmp_path, 1000).stat().st_size
    # Texts of 15,000 different tokens would add about 300 kB.
    assert size < 0.6e6


# ---- in a browser


def open_page(browser, path: Path) -> None:
    """Opens a page; it must fetch nothing but itself."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # of the page before
    browser.get(path.as_uri())
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]


def choose(browser, name: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("name", name)).select_by_value(value)


def hover(browser, target, x: float = 0, y: float = 0) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).move_to_element_with_offset(target, x, y).perform()


def shares(browser) -> np.ndarray:
    """How strongly each token is coloured, negative where the second hue is used; NaN for the first."""
    script = "return [...document.querySelectorAll('.token')].map("
    script += "s => s.style.getPropertyValue('--v') * (s.classList.contains('less') ? -1 : 1))"
    values = np.array(browser.execute_script(script), float)
    values[0] = np.nan
    return values


def tokens_of(browser):
    return browser.find_elements("css selector", ".token")


def details_of(browser) -> str:
    return browser.find_element("id", "details").text.replace("−", "-")


def fitted(values: np.ndarray) -> np.ndarray:
    ordered = np.sort(values)
    low, high = ordered[np.round(np.array([0.01, 0.99]) * (len(ordered) - 1)).astype(int)]
    return np.clip((values - low) / (high - low), 0, 1)


def test_browser_shows_text_as_text(browser, text_page, lm):
    open_page(browser, text_page)
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_element("css selector", ".excerpt h2").text.startswith(HOSTILE_NAME)
    shown = "".join(
        browser.execute_script("return [...document.querySelectorAll('.token')].map(s => s.textContent)")
    )
    assert shown.replace("⏎\n", "\n").replace("⇥\t", "\t").replace("·", "") == TEXT
    assert not browser.get_log("browser"), "errors in the console"


def test_browser_shows_what_was_computed_where_the_pointer_is(browser, text_page):
    open_page(browser, text_page)
    page = page_data(text_page.read_text(encoding="utf-8"))
    (packed,) = page["excerpts"]
    i = 9  # "c" of "script": the 8 tokens before are in view as well
    hover(browser, tokens_of(browser)[i])
    text = details_of(browser)
    assert f"id {packed['tokens'][i]} · token {i}" in text
    for mode in range(3):
        assert f"{packed['logProbs'][mode, i]:.3f}" in text
    assert f"{packed['logProbs'][1, i] - packed['logProbs'][0, i]:+.3f}" in text
    for layer, gate in enumerate(packed["gates"][1, :, i], 1):
        assert f"{layer}\n{gate:.2f}" in text
    cells = browser.find_elements("css selector", ".predictions tbody td")
    shown = [cell.text.replace("−", "-").split("\n") for cell in cells]
    for mode in range(3):
        for k in range(5):
            name, probability = shown[3 * k + mode]
            assert float(probability) == pytest.approx(
                np.exp(packed["topLogProbs"][mode, i, k]), abs=6e-4, rel=0.5
            )
            token = page["texts"][str(packed["topTokens"][mode, i, k])]
            if token.isprintable() and not token.isspace():
                assert name == token

    # A click keeps a token until Escape; the first token has nothing.
    from selenium.webdriver.common.keys import Keys

    tokens_of(browser)[i].click()
    hover(browser, tokens_of(browser)[0])
    assert f"token {i}\n" in details_of(browser)
    browser.find_element("tag name", "body").send_keys(Keys.ESCAPE)
    hover(browser, tokens_of(browser)[1])
    hover(browser, tokens_of(browser)[0])
    assert "Nobody predicts the first token" in details_of(browser)


def test_browser_recolours_tokens(browser, text_page):
    open_page(browser, text_page)
    (packed,) = page_data(text_page.read_text(encoding="utf-8"))["excerpts"]
    gates, log_probs = packed["gates"][:, :, 1:], packed["logProbs"][:, 1:]

    def background():
        script = "return getComputedStyle(document.querySelectorAll('.token')[arguments[0]]).backgroundColor"
        return [browser.execute_script(script, i) for i in (5, 6, 7)]

    np.testing.assert_allclose(shares(browser)[1:], fitted(gates[1].mean(axis=0)), atol=6e-4)
    of_mean = background()
    choose(browser, "layer", "2")
    np.testing.assert_allclose(shares(browser)[1:], fitted(gates[1, 2]), atol=6e-4)
    assert background() != of_mean
    choose(browser, "mode", str(MODE_NAMES.index("anti-expert")))
    np.testing.assert_allclose(shares(browser)[1:], fitted(gates[2, 2]), atol=6e-4)
    script = "return [...document.querySelectorAll('#layer-table td')].map(cell => Number(cell.textContent))"
    np.testing.assert_allclose(browser.execute_script(script), gates[2].mean(axis=1), atol=GATE_STEP + 6e-4)
    choose(browser, "scale", "full")
    np.testing.assert_allclose(shares(browser)[1:], gates[2, 2], atol=6e-4)
    choose(browser, "colour", "gain")
    gain = log_probs[1] - log_probs[0]
    most = np.sort(np.abs(gain))[round(0.95 * (len(gain) - 1))]
    np.testing.assert_allclose(shares(browser)[1:], np.clip(gain / most, -1, 1), atol=6e-4)
    assert (gain < 0).any() and (gain > 0).any()
    assert not browser.get_log("browser")


def test_browser_links_heat_map_and_tokens(browser, text_page):
    open_page(browser, text_page)
    (packed,) = page_data(text_page.read_text(encoding="utf-8"))["excerpts"]
    gates = packed["gates"][1]
    L, T = gates.shape
    canvas = browser.find_element("css selector", ".sheet canvas")
    script = "const c = arguments[0];"
    script += "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    pixels = np.array(browser.execute_script(script, canvas)).reshape(L, T, 4)
    assert (pixels[:, 0, 3] == 0).all(), "the first token has no gate"
    assert (pixels[:, 1:, 3] == 255).all()
    # The larger the gate, the darker the cell.
    order = np.argsort(gates[:, 1:], axis=None)
    brightness = pixels[:, 1:, :3].sum(axis=-1).ravel()[order]
    assert (np.diff(brightness) <= 0).all()
    assert brightness[0] > brightness[-1]

    i, layer = T // 2, 2
    width, height = canvas.size["width"], canvas.size["height"]
    hover(browser, canvas, width * ((i + 0.5) / T - 0.5), height * ((layer + 0.5) / L - 0.5))
    readout = browser.find_element("css selector", ".across").text
    assert readout.startswith(f"token {i} ")
    assert readout.endswith(f"layer {layer + 1} · gate {gates[layer, i]:.2f}")
    assert browser.find_element("css selector", ".token.current").get_attribute("id") == f"t0-{i}"


def test_browser_takes_keys(browser, text_page):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, text_page)
    box = browser.find_element("css selector", ".tokens")
    browser.execute_script("arguments[0].focus()", box)
    keys = browser.switch_to.active_element
    keys.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert "· token 2\n" in details_of(browser)
    assert box.get_attribute("aria-activedescendant") == "t0-2"
    keys.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert browser.find_element("name", "layer").get_attribute("value") == "1"
    keys.send_keys(Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_UP)
    assert browser.find_element("name", "layer").get_attribute("value") == "-1"
    keys.send_keys(Keys.END)
    assert f"· token {len(tokens_of(browser)) - 1}\n" in details_of(browser)


def test_browser_copes_with_5000_tokens(browser, lm, tmp_path):
    fact = tuple(i % 3 == 0 for i in range(4000))
    path = synthetic_page(lm.tokenizer, tmp_path, 5000, start=1000, fact=fact)
    open_page(browser, path)
    loaded = browser.execute_script("return performance.getEntriesByType('navigation')[0].duration")
    assert len(tokens_of(browser)) == 5000
    marked = browser.execute_script(
        "return [...document.querySelectorAll('.token.fact')].map(s => Number(s.id.slice(3)))"
    )
    assert marked == list(range(1000, 5000, 3))
    recoloured = browser.execute_script(
        "const select = document.querySelector('[name=layer]'), start = performance.now();"
        "select.value = '7'; select.dispatchEvent(new Event('change', { bubbles: true }));"
        "getComputedStyle(document.querySelector('.token:last-child')).backgroundColor;"
        "document.body.offsetHeight; return performance.now() - start"
    )
    hover(browser, tokens_of(browser)[50])
    assert "token 50 ·" in details_of(browser)
    print(f"5000 tokens: loaded in {loaded:.0f} ms, recoloured in {recoloured:.0f} ms")
    # A desktop takes a tenth of this.
    assert loaded < 10_000
    assert recoloured < 3_000
    assert not browser.get_log("browser")


def test_browser_fits_a_phone(browser, text_page):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        open_page(browser, text_page)
        tokens_of(browser)[4].click()
        assert "token 4" in details_of(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
