"""`imae serve`: OpenAI's client against it, many clients at a time, what it refuses, how it ends."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    TINY,
    UNIT_SIZE,
    error_of,
    log_softmax,
    logits,
    with_random_units,
    word_tokenizer,
)
from helpers.documents import ROOT, blocks

from imae_jax.config import AntiExpertConfig
from imae_jax.convert import load_model
from imae_jax.convert.hf_tokenizer import write_tokenizer
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.decode import Sampler, parse_method
from imae_jax.serve.__main__ import main

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' + message.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}t9 {% endif %}"
)
PROMPT = "t5 t6 t7"
SECONDS = 300
"""After which what should happen soon has failed."""


@pytest.fixture(scope="module")
def model_dir(tiny, tmp_path_factory):
    """Random units, a chat template, and room for prompts."""
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny("gqa", initializer_range=0.2, max_position_embeddings=512).directory, root / "base")
    write_tokenizer(word_tokenizer(TINY.vocab_size, TEMPLATE), root / "base")
    base = load_model(str(root / "base"))
    weights, reference = with_random_units(base.model.weights(), base.config), dataclasses.asdict(base.base)
    # So large that modes write different texts.
    weights = dataclasses.replace(weights, units=jax.tree.map(lambda x: 4 * x, weights.units))
    write_imae_dir(
        root / "imae", weights, base.config, AntiExpertConfig(UNIT_SIZE), base=reference, training={}
    )
    return root / "imae"


@pytest.fixture(scope="module")
def lm(model_dir):
    return load_model(str(model_dir))


@pytest.fixture(scope="module")
def endless(lm):
    """It stops at no token."""
    return dataclasses.replace(lm, eos_token_ids=())


@contextlib.contextmanager
def serving(lm, *methods, batch_size=8, queue_size=256, max_tokens=400):
    """A server in a thread, and its address."""
    from imae_jax.serve.server import Server

    methods = [parse_method(method) for method in methods or ("expert",)]
    served = Server(lm, "tiny", methods, batch_size=batch_size, queue_size=queue_size, max_tokens=max_tokens)
    listener = socket.create_server(("127.0.0.1", 0))
    runner = uvicorn.Server(uvicorn.Config(served.app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=runner.run, args=([listener],))
    thread.start()
    try:
        yield served, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        runner.should_exit = True
        thread.join(SECONDS)
        served.batcher.end()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(lm):
    with serving(lm) as (_, address):
        yield address


def client_of(address: str):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=SECONDS)


@pytest.fixture(scope="module")
def client(address):
    return client_of(address)


def complete(client, prompt=PROMPT, **fields):
    """Greedy unless asked otherwise; what OpenAI's client does not know goes into `extra_body`."""
    known = {"max_tokens": 12, "temperature": 0, "model": "tiny", "prompt": prompt}
    extra = {name: fields.pop(name) for name in ("method", "strength", "top_k", "user2") if name in fields}
    return client.completions.create(**(known | fields), extra_body=extra)


def eventually(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# ---- answers


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize("mode", ["base", "expert", "anti-expert", "in-model-contrast:beta=2", None])
def test_a_completion_is_the_text_of_its_method(client, lm, mode):
    fields = {} if mode is None else {"method": mode}
    answer = complete(client, **fields)
    (expected,) = lm.complete([PROMPT], mode or "expert", max_new_tokens=12)
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert choice.finish_reason == ("stop" if expected.finished else "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        3,
        len(expected.tokens) + expected.finished,
    )


def test_a_strength_is_that_of_the_request(client, lm):
    texts = {o: complete(client, strength=o, max_tokens=24).choices[0].text for o in (0, -1, 2.5)}
    for o, text in texts.items():
        assert text == lm.generate([PROMPT], o, max_new_tokens=24)[0]
    assert len(set(texts.values())) == 3


def test_a_chat_is_rendered_with_the_template(client, lm):
    messages = [
        {"role": "system", "content": "t11"},
        {"role": "user", "content": [{"type": "text", "text": "t12 "}, {"type": "text", "text": "t13"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8)
    (expected,) = lm.generate(["system t11 user t12 t13 t9"], "expert", max_new_tokens=8)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == 6


def test_several_prompts_and_token_ids(client, lm):
    prompts = ["t5 t6", "t7 t8 t9 t10"]
    expected = lm.generate(prompts, "expert", max_new_tokens=12)
    for given in (prompts, [[5, 6], [7, 8, 9, 10]]):
        choices = complete(client, given).choices
        assert [choice.index for choice in choices] == [0, 1]
        assert [choice.text for choice in choices] == expected
    assert complete(client, [5, 6]).choices[0].text == expected[0]


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_stream_is_the_same_text(client, temperature):
    fields = {"temperature": temperature, "seed": 3, "max_tokens": 21, "prompt": ["t5 t6", "t7"]}
    whole = complete(client, **fields)
    texts, reasons, usage = ["", ""], [None, None], None
    parts = [*complete(client, **fields, stream=True, stream_options={"include_usage": True})]
    for part in parts:
        usage = part.usage or usage
        for choice in part.choices:
            assert reasons[choice.index] is None, "a piece after the last one"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert len(parts) > max(usage.completion_tokens / 5, 3), "it came at once"


def test_a_streamed_chat_is_the_same_text(client):
    chat = client.chat.completions
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "t5"}], "temperature": 0}
    whole = chat.create(**fields, max_completion_tokens=9).choices[0].message.content
    deltas = [part.choices[0].delta for part in chat.create(**fields, max_completion_tokens=9, stream=True)]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == whole


def test_a_stream_ends_as_openai_ends_it(address):
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 2, "stream": True}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=SECONDS)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


def test_seeds(client, lm):
    def text(**fields):
        return complete(client, temperature=2, max_tokens=16, **fields).choices[0].text

    (expected,) = lm.generate([PROMPT], "expert", sampler=Sampler(2.0), seed=5, max_new_tokens=16)
    assert text(seed=5) == text(seed=5) == expected
    assert len({text() for _ in range(3)}) == 3


def test_stop_strings(client, lm):
    (whole,) = lm.generate([PROMPT], "expert", max_new_tokens=24)
    words = whole.split()
    stop = next(word for word in words[4:] if f" {word}" in whole[8:])
    for given in (stop, [stop], ["nothing", stop]):
        answer = complete(client, stop=given, max_tokens=24)
        (expected,) = lm.complete([PROMPT], "expert", stop=[stop], max_new_tokens=24)
        assert answer.choices[0].text == expected.text != whole
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len(expected.tokens)


def test_logprobs_are_the_methods_own(client, lm):
    answer = complete(client, strength=-1, logprobs=0, max_tokens=8)
    (expected,) = lm.complete([PROMPT], -1, max_new_tokens=8)
    tokens = [5, 6, 7, *expected.tokens]
    all_logits = logits(lm.model.weights(), lm.config, np.array([tokens]), strength=jnp.full(1, -1.0))
    ahead = log_softmax(all_logits[0])[2:-1]
    given = answer.choices[0].logprobs
    assert given.tokens == [f"t{token}" for token in expected.tokens]
    np.testing.assert_allclose(given.token_logprobs, ahead[np.arange(len(ahead)), expected.tokens], atol=1e-4)
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "t5"}],
        temperature=0,
        max_tokens=5,
        logprobs=True,
    )
    assert [each.logprob <= 0 for each in chat.choices[0].logprobs.content] == [True] * 5


# ---- many clients


def test_100_clients_get_their_own_answers(client, lm):
    """Of several methods, lengths, samplers and seeds: each text is that of its prompt alone."""
    random = np.random.default_rng(0)
    requests = []
    for i in range(100):
        words = " ".join(f"t{t}" for t in random.integers(3, TINY.vocab_size, random.integers(1, 30)))
        fields = {"temperature": i % 2 * 1.3, "seed": int(random.integers(2**31))}
        fields |= {"method": ("base", "expert")[i % 3 == 0], "max_tokens": 9 + i % 8}
        requests.append((words, fields | ({"stop": [f"t{i % 90 + 3}"]} if i % 4 == 0 else {})))

    def ask(request):
        words, fields = request
        if fields["seed"] % 2:
            return "".join(part.choices[0].text for part in complete(client, words, **fields, stream=True))
        return complete(client, words, **fields).choices[0].text

    with ThreadPoolExecutor(100) as pool:
        texts = [*pool.map(ask, requests)]
    for (words, fields), text in zip(requests, texts, strict=True):
        (expected,) = lm.generate(
            [words],
            fields["method"],
            sampler=Sampler(fields["temperature"]),
            seed=fields["seed"],
            max_new_tokens=fields["max_tokens"],
            stop=fields.get("stop", ()),
        )
        assert text == expected, (words, fields)
    assert len(set(texts)) > 90


def test_a_model_over_several_devices_writes_the_same(model_dir, lm):
    """Three rows over eight: the others are copies."""
    with serving(load_model(str(model_dir), mesh="data=8"), batch_size=3) as (_, address):
        answer = complete(client_of(address), ["t5", "t6", "t7"], temperature=1, seed=4)
    for prompt, choice in zip(("t5", "t6", "t7"), answer.choices, strict=True):
        assert (
            choice.text == lm.generate([prompt], "expert", sampler=Sampler(1.0), seed=4, max_new_tokens=12)[0]
        )


class Held:
    """A row whose reader keeps the batcher's thread until it is let go."""

    def __init__(self, served):
        self.there, self.go = threading.Event(), threading.Event()
        request = json.dumps({"model": "tiny", "prompt": "t5", "max_tokens": 1}).encode()
        rows, _, _ = served.rows(request, self.send, chat=False)
        served.batcher.submit(rows)
        assert self.there.wait(SECONDS)

    def send(self, event):
        self.there.set()
        assert self.go.wait(SECONDS)


@contextlib.contextmanager
def held_after_its_first_piece(served):
    """A row that is asked for does not go on until the end, where the batcher is done."""
    rows, go, submit = [], threading.Event(), served.batcher.submit

    def hold(new):
        for row in new:
            row.send = lambda event, send=row.send: (send(event), go.wait(SECONDS))
        rows.extend(new)
        submit(new)

    served.batcher.submit = hold
    try:
        yield rows
    finally:
        go.set()
        served.batcher.end()


def test_rows_that_wait_share_a_batch(lm, monkeypatch):
    from imae_jax.serve import batching

    sizes = []

    def counted(models, prompts, *arguments, **options):
        sizes.append((len(prompts), options["closed"].count(False)))
        return stream_tokens(models, prompts, *arguments, **options)

    stream_tokens = batching.stream_tokens
    monkeypatch.setattr(batching, "stream_tokens", counted)
    with serving(lm, batch_size=6) as (served, address), ThreadPoolExecutor(16) as pool:
        held = Held(served)
        client = client_of(address)
        asked = [pool.submit(complete, client, f"t{i + 3}", max_tokens=9 + i % 7) for i in range(9)]
        eventually(lambda: len(served.batcher._waiting) == 9)
        held.go.set()
        texts = [each.result().choices[0].text for each in asked]
    assert sizes == [(1, 1), (6, 6), (4, 3)], "no batch of 6, and of 3 with a copy"
    for i, text in enumerate(texts):
        assert text == lm.generate([f"t{i + 3}"], "expert", max_new_tokens=9 + i % 7)[0]


def test_a_full_queue_refuses(lm):
    with serving(lm, queue_size=2) as (served, address), ThreadPoolExecutor(4) as pool:
        held = Held(served)
        client = client_of(address)
        waiting = [pool.submit(complete, client) for _ in range(2)]
        eventually(lambda: len(served.batcher._waiting) == 2)
        with pytest.raises(openai.InternalServerError) as caught:
            complete(client)
        assert caught.value.status_code == 503
        assert caught.value.body["code"] == "queue_full"
        held.go.set()
        assert len({each.result().choices[0].text for each in waiting}) == 1
        complete(client)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_makes_room(lm, stream):
    with serving(lm) as (served, address):
        held = Held(served)
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "stream": stream}

        async def leave():
            async with httpx.AsyncClient() as client:
                asked = asyncio.create_task(client.post(f"{address}/v1/completions", json=body))
                while not served.batcher._waiting:
                    await asyncio.sleep(0.01)
                asked.cancel()

        asyncio.run(leave())
        eventually(lambda: not served.batcher._waiting)
        held.go.set()


def test_a_client_that_leaves_a_stream_ends_its_row(endless):
    with serving(endless) as (served, address), held_after_its_first_piece(served) as rows:
        stream = complete(client_of(address), max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
        eventually(lambda: rows and rows[0].closed)
    assert len(rows[0].tokens) < 8


def test_a_row_that_fails_does_not_take_others_with_it(lm, model_dir):
    """A token whose embedding is no number."""
    broken = load_model(str(model_dir))
    broken.model.embed.set_value(broken.model.embed.get_value().at[50].set(jnp.nan))
    with serving(broken) as (served, address), ThreadPoolExecutor(3) as pool:
        held = Held(served)
        client = client_of(address)
        asked = [pool.submit(complete, client, prompt) for prompt in ("t5", "t50", "t6")]
        eventually(lambda: len(served.batcher._waiting) == 3)
        held.go.set()
        with pytest.raises(openai.InternalServerError, match="finite"):
            asked[1].result()
        for prompt, each in (("t5", asked[0]), ("t6", asked[2])):
            (expected,) = lm.generate([prompt], "expert", max_new_tokens=12)
            assert each.result().choices[0].text == expected


def test_what_fails_in_a_stream_is_its_last_event(lm, model_dir):
    prompts = [f"t{i}" for i in range(3, TINY.vocab_size)]
    completions = zip(prompts, lm.complete(prompts, "expert", max_new_tokens=24), strict=True)
    prompt, text, late = next(
        (prompt, each.text, token)
        for prompt, each in completions
        for i, token in enumerate(each.tokens[:-1])
        if i > 8 and f"t{token}" not in [prompt, *each.text.split()[:i]]
    )
    broken = load_model(str(model_dir))
    broken.model.embed.set_value(broken.model.embed.get_value().at[late].set(jnp.nan))
    texts = []
    with serving(broken) as (_, address), pytest.raises(openai.APIError, match="finite"):
        for part in complete(client_of(address), prompt, max_tokens=24, stream=True):
            texts.append(part.choices[0].text)
    assert text.startswith("".join(texts))
    assert len(texts) > 1


def test_a_fault_of_ours_is_500_and_a_traceback_in_the_log(lm, caplog):
    with serving(lm) as (served, address):
        served.lm = None
        with pytest.raises(openai.InternalServerError, match="its log says more"):
            complete(client_of(address))
    assert "AttributeError" in caplog.text


# ---- what is refused

BAD = {
    "no json": (b"{", None, "no JSON"),
    "no object": (b"[]", None, "no JSON object"),
    "nan": (b'{"model": "tiny", "temperature": NaN}', None, "no JSON"),
    "surrogate": (b'{"model": "tiny", "prompt": "\\ud800"}', None, "half of a character"),
    "no model": ({"model": None}, "model", "missing"),
    "no prompt": ({"prompt": None}, "prompt", "missing"),
    "empty": ({"prompt": ""}, "prompt", "empty"),
    "no prompts": ({"prompt": []}, "prompt", "prompt"),
    "mixed": ({"prompt": ["t5", 6]}, "prompt", "token ids"),
    "ids": ({"prompt": [97]}, None, "vocabulary"),
    "huge id": ({"prompt": [10**30]}, None, "vocabulary"),
    "bool": ({"max_tokens": True}, "max_tokens", "int"),
    "text": ({"max_tokens": "5"}, "max_tokens", "int"),
    "none new": ({"max_tokens": 0}, "max_tokens", "1 to 400"),
    "too many new": ({"max_tokens": 401}, "max_tokens", "1 to 400"),
    "context": ({"prompt": "t5 " * 200, "max_tokens": 400}, "prompt", "88 tokens over the context"),
    "temperature": ({"temperature": -1}, None, "temperature -1"),
    "huge temperature": ({"temperature": 10**400}, "temperature", "float"),
    "top_p": ({"top_p": 0}, None, "top_p 0"),
    "seed": ({"seed": -1}, "seed", "seed -1"),
    "stop": ({"stop": [""]}, None, "stop string is empty"),
    "many stops": ({"stop": ["t5"] * 17}, "stop", "at most 16"),
    "stop number": ({"stop": [5]}, None, "stop 0 is no text"),
    "n": ({"n": 2}, "n", "n is not supported"),
    "best_of": ({"best_of": 3}, "best_of", "not supported"),
    "echo": ({"echo": True}, "echo", "not supported"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    "tools": ({"tools": [{}]}, "tools", "not supported"),
    "unknown": ({"min_p": 0.1}, "min_p", "not supported"),
    "alternatives": ({"logprobs": 3}, "logprobs", "give 0"),
    "streamed logprobs": ({"logprobs": 0, "stream": True}, "logprobs", "stream"),
    "scores": ({"logprobs": 0, "method": "in-model-contrast"}, "logprobs", "renormalize"),
    "stream options": ({"stream_options": {"include_usage": True}}, "stream_options", "go with stream"),
    "method": ({"method": "truth"}, "method", "'truth' does not exist"),
    "both": ({"method": "base", "strength": 1}, "strength", "exclude each other"),
    "strength": ({"strength": 1e999}, None, "no JSON"),
    "not loaded": ({"method": "icd:anti_expert=/etc"}, "method", "start the server with it"),
    "noise": ({"method": "imae:strength=1,noise=3"}, "method", "noise"),
    "two prompts": ({"method": "cad"}, "method", "without_context"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(address, case):
    body, param, message = BAD[case]
    if isinstance(body, dict):
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4} | body
        body = json.dumps(body).encode()
    answer = httpx.post(f"{address}/v1/completions", content=body, timeout=SECONDS)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert message in error["message"]


ODD = [
    True,
    0,
    -1,
    1.5,
    10**30,
    1e300,
    "",
    "t5",
    [],
    ["t5"],
    [[]],
    [[1.5]],
    [None],
    {},
    {"role": 5},
    [{"role": 5}],
]
FIELDS = [
    *(
        "model",
        "method",
        "strength",
        "prompt",
        "messages",
        "stop",
        "stream",
        "stream_options",
        "seed",
        "user",
    ),
    *("temperature", "top_k", "top_p", "repetition_penalty", "max_tokens", "max_completion_tokens"),
    *("logprobs", "top_logprobs", "n", "logit_bias", "tools"),
]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_odd_values_are_no_fault_of_ours(address, path):
    """Whatever a field is, the answer is one, or says what is wrong with the request."""
    good = {"model": "tiny", "max_tokens": 1, "temperature": 0}
    good |= {"prompt": "t5"} if path == "completions" else {"messages": [{"role": "user", "content": "t5"}]}
    with httpx.Client(timeout=SECONDS) as client:
        for name in FIELDS:
            for value in ODD:
                if (name, value) == ("strength", 1e300):
                    continue  # Its logits are not finite, which may be the checkpoint's fault as well: 500.
                answer = client.post(f"{address}/v1/{path}", json=good | {name: value})
                assert answer.status_code in (200, 400, 404), (name, value, answer.text)
                if answer.status_code != 200:
                    assert answer.json()["error"]["message"], (name, value)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["t5"],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "t5", "tool_calls": []}],
    ],
)
def test_bad_messages(client, messages):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert caught.value.body["param"] == "messages"


def test_other_errors_have_openais_form(address, client):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as caught:
        complete(client, model="gpt")
    assert caught.value.body["code"] == "model_not_found"
    for method, path, status in (("GET", "/v1/completions", 405), ("POST", "/v1/embeddings", 404)):
        answer = httpx.request(method, f"{address}{path}")
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    large = httpx.post(f"{address}/v1/completions", content=b" " * (2**20 + 1))
    assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")


def test_parameters_without_effect_are_taken(client, lm):
    answer = complete(client, n=1, echo=False, presence_penalty=0, logit_bias={}, user="me", suffix=None)
    assert answer.choices[0].text == lm.generate([PROMPT], "expert", max_new_tokens=12)[0]


def test_chats_need_a_template(tiny_imae):
    with serving(tiny_imae.load()) as (_, address), pytest.raises(openai.BadRequestError) as caught:
        client_of(address).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "t5"}])
    assert "use /v1/completions" in caught.value.body["message"]


# ---- the command


def test_command_errors(model_dir, capfd):
    command = ["--model", model_dir, "--port", 0]
    assert "'truth' does not exist" in error_of(capfd, main, *command, "--method", "truth")
    assert "without_context" in error_of(capfd, main, *command, "--method", "cad")
    assert "batch-size" in error_of(capfd, main, *command, "--batch-size", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "choose another --port" in error_of(capfd, main, "--model", model_dir, "--port", port)


@contextlib.contextmanager
def command(*arguments):
    """The command in a process of its own, and its address."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.Popen(
        [sys.executable, "-m", "imae_jax", "serve", "--port", "0", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        line = run.stderr.readline()
        found = re.search(r"http://[\d.:]+", line)
        assert found, line + run.stderr.read()
        yield run, found[0]
    finally:
        run.kill()
        run.wait()
        run.stderr.close()


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish(model_dir, lm, number):
    prompts = [f"t{i}" for i in range(3, TINY.vocab_size)]
    expected = lm.generate(prompts, "expert", max_new_tokens=200)
    prompt, expected = max(zip(prompts, expected, strict=True), key=lambda pair: len(pair[1]))
    assert len(expected.split()) > 100
    with command("--model", model_dir, "--name", "tiny") as (run, address):
        stream = complete(client_of(address), prompt, max_tokens=200, stream=True)
        text = next(stream).choices[0].text
        run.send_signal(number)
        text += "".join(part.choices[0].text for part in stream)
        assert text == expected
        assert run.wait(SECONDS) == 0
        assert run.stderr.read() == ""
        with pytest.raises(openai.APIConnectionError):
            complete(client_of(address))


def test_a_missing_package_is_named(model_dir, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'imae_jax[serve]'" in error_of(capfd, main, "--model", model_dir)


@pytest.mark.docs
def test_the_documentation(smollm2):
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    start, curl = blocks(text, "sh")
    program, name, *arguments = shlex.split(start.splitlines()[-1])
    assert (program, name) == ("imae", "serve")
    (snippet,) = blocks(text, "python")
    lm = load_model("imae-smollm2-135m")
    with command(*arguments) as (_, address):

        def output(*run):
            run = [each.replace("http://127.0.0.1:8000", address) for each in run]
            return subprocess.run(run, capture_output=True, text=True, check=True).stdout

        printed = output(sys.executable, "-c", snippet)
        asked = {
            "{'method': 'in-model-contrast:beta=2'}": "in-model-contrast:beta=2",
            "{'strength': -0.5}": -0.5,
        }
        for shown, method in asked.items():
            (expected,) = lm.generate(["Water boils at"], method, max_new_tokens=16)
            assert f"{shown} {expected}\n" in printed
        if shutil.which("curl"):
            (choice,) = json.loads(output("bash", "-c", curl))["choices"]
            prompts = ["How many legs does a spider have?"]
            (expected,) = lm.generate(prompts, "base", format="chat", max_new_tokens=256)
            assert choice["message"]["content"] == expected


# ---- the LM Evaluation Harness

TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: generate_until
doc_to_text: "Q: What is the capital of {{country}}?\\nA:"
doc_to_target: "{{capital}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 24}
metric_list:
  - metric: exact_match
    ignore_case: true
    regexes_to_ignore: [" The capital of .* is "]
"""
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo"}
CAPITALS |= {"Greece": "Athens", "Norway": "Oslo", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["expert", "base"])
def test_local_completions_of_the_harness_equal_ours(smollm2, tmp_path, method):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from imae_jax.evaluate.lm_eval import IMAEJaxLM, load_tasks

    rows = [{"country": country, "capital": capital} for country, capital in CAPITALS.items()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "capitals.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.json")))
    lm = load_model("imae-smollm2-135m")

    def results(model):
        manager, tasks = load_tasks(["capitals"], tmp_path)
        found = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager)
        texts = {each["doc"]["country"]: each["resps"] for each in found["samples"]["capitals"]}
        return texts, found["results"]["capitals"]["exact_match,none"]

    with serving(lm, method) as (_, address):
        theirs = LocalCompletionsAPI(
            base_url=f"{address}/v1/completions",
            model="tiny",
            tokenizer_backend=None,
            tokenized_requests=False,
            num_concurrent=4,
        )
        actual = results(theirs)
    assert actual == results(IMAEJaxLM(lm, method))
    assert 0 < actual[1] <= 1
    assert len(actual[0]) == len(CAPITALS)


# ---- the page, in a browser


def fill(browser, name, value):
    browser.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)


def shown(browser):
    """Texts and notes of the two columns."""
    return browser.execute_script(
        "return ['pre', 'output'].map(name => [...document.querySelectorAll(name)].map(e => e.textContent))"
    )


@pytest.fixture
def page(browser, endless):
    with serving(endless) as (served, address):
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get(address)
        eventually(lambda: browser.find_element("id", "model").text == "tiny")
        browser.find_element("id", "chat").click()
        fill(browser, "prompt", PROMPT)
        fill(browser, "max", "200")
        yield served, address


def test_browser_shows_two_modes_as_they_stream(browser, page, endless):
    browser.execute_script(
        "window.lengths = []; const pres = [...document.querySelectorAll('pre')];"
        "new MutationObserver(() => lengths.push(pres.map(pre => pre.textContent.length)))"
        ".observe(document.body, { subtree: true, childList: true })"
    )
    browser.find_element("id", "go").click()
    eventually(lambda: shown(browser)[1] == ["length", "length"])
    texts, _ = shown(browser)
    assert texts == [endless.generate([PROMPT], mode, max_new_tokens=200)[0] for mode in ("base", "expert")]
    lengths = np.array(browser.execute_script("return lengths"))
    partly = (lengths > 0) & (lengths < [len(text) for text in texts])
    assert partly.all(axis=1).any(), "one after the other"
    # What differs has a colour, from the first character on.
    marked = [each.get_attribute("textContent") for each in browser.find_elements("css selector", ".differs")]
    plain = {text.removesuffix(rest) for text, rest in zip(texts, marked, strict=True)}
    assert len(plain) == 1
    assert marked[0][0] != marked[1][0]
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {
        f"{page[1]}{path}" for path in ("/", "/v1/models", "/v1/completions")
    }
    assert not browser.get_log("browser"), "errors in the console"


def test_browser_chats_says_what_is_wrong_and_stops(browser, page, endless):
    browser.find_element("id", "chat").click()
    first, second = browser.find_elements("css selector", ".method")
    first.clear()
    first.send_keys("truth")
    second.clear()
    second.send_keys("-2")
    fill(browser, "max", "20")
    browser.find_element("id", "go").click()
    eventually(lambda: shown(browser)[1][1] == "length")
    (expected,) = endless.generate([PROMPT], -2, format="chat", max_new_tokens=20)
    texts, notes = shown(browser)
    assert texts == ["", expected]
    assert "'truth' does not exist" in notes[0]

    eventually(lambda: browser.find_element("id", "go").is_enabled())
    with held_after_its_first_piece(page[0]) as rows:
        browser.find_element("id", "go").click()
        eventually(lambda: shown(browser)[0][1])
        browser.find_element("id", "stop").click()
        eventually(lambda: shown(browser)[1][1] == "stopped")
        eventually(lambda: rows[0].closed)
    assert len(rows[0].tokens) < 8


def test_browser_has_a_light_and_a_dark_page(browser, page):
    def brightness(element):
        colour = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        return [
            sum(map(int, re.findall(r"\d+", browser.execute_script(colour, element, name))[:3])) / 3
            for name in ("color", "backgroundColor")
        ]

    for scheme, dark in (("light", False), ("dark", True)):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        for element in ("body", "textarea", "button", "pre"):
            ink, surface = brightness(element)
            assert (ink - surface > 150) if dark else (surface - ink > 150), (scheme, element)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
