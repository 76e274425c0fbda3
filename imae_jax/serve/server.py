"""The endpoint: what a request may ask for, and answers in OpenAI's form.

The forms are those of https://platform.openai.com/docs/api-reference; `method`, `strength`, `top_k` and
`repetition_penalty` come on top.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from imae_jax.decode import Method, Sampler, parse_method
from imae_jax.decode.streams import check_prompts
from imae_jax.errors import UserError
from imae_jax.language_model import LanguageModel, special_stops
from imae_jax.prompts import adds_special_tokens, resolve_format
from imae_jax.serve.batching import Batcher, Piece, QueueFullError, Row, Settings

BODY_LIMIT = 2**20
"""Bytes of a request."""

COMPLETION_TOKENS = 16
"""OpenAI's default of `/v1/completions`."""

# What is not supported may be given where it changes nothing.
WITHOUT_EFFECT = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "top_logprobs": 0,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
}


class RequestError(Exception):
    """A request that is not answered, in OpenAI's form."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Server:
    """Answers requests to one model.

    Args:
        lm: the model.
        name: of the model in requests.
        methods: the default one, then others that need a resource and may be asked for.
        batch_size, queue_size: see `Batcher`.
        max_tokens: the most new tokens of a prompt.

    Raises:
        UserError: a method that the model cannot run, or that needs two prompts.
    """

    def __init__(
        self,
        lm: LanguageModel,
        name: str,
        methods: list[Method],
        *,
        batch_size: int,
        queue_size: int,
        max_tokens: int,
    ):
        self.lm, self.name, self.max_tokens, self.created = lm, name, max_tokens, int(time.time())
        self.loaded = {method.resource for method in methods} | {None}
        self.default, *_ = [self._checked(method) for method in methods]
        self.batcher = Batcher(lm, batch_size=batch_size, queue_size=queue_size)
        errors = (RequestError, UserError, HTTPException, ClientDisconnect, Exception)
        self.app = Starlette(
            routes=[
                Route("/", lambda _: FileResponse(Path(__file__).with_name("page.html"))),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers=dict.fromkeys(errors, _error_response),
        )

    async def _models(self, http: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "imae_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _completions(self, http: Request) -> Response:
        return await self._answer(http, _Form(self.name, chat=False))

    async def _chat(self, http: Request) -> Response:
        return await self._answer(http, _Form(self.name, chat=True))

    async def _answer(self, http: Request, form: "_Form") -> Response:
        body = await _read(http)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        # Tokenizers take their time with long prompts.
        rows, streamed, with_usage = await run_in_threadpool(
            self._rows, body, form.chat, lambda event: loop.call_soon_threadsafe(events.put_nowait, event)
        )
        try:
            self.batcher.submit(rows)
        except QueueFullError as error:
            message = f"{self.batcher.queue_size} prompts are waiting already: try again later"
            raise RequestError(message, status=503, code="queue_full") from error
        pieces = self._pieces(rows, events)
        if not streamed:
            return JSONResponse(await _while_connected(http, form.whole(self.lm, rows, pieces)))
        # What fails before the first piece can still have a status.
        first = await _while_connected(http, anext(pieces))
        return StreamingResponse(
            form.events(rows, first, pieces, with_usage=with_usage), media_type="text/event-stream"
        )

    async def _pieces(self, rows: list[Row], events: asyncio.Queue) -> AsyncIterator[Piece]:
        """What the batcher sends; rows that nobody waits for any more are closed."""
        try:
            missing = len(rows)
            while missing:
                event = await events.get()
                if isinstance(event, UserError):
                    raise RequestError(str(event), status=500)
                if isinstance(event, Exception):
                    raise RequestError("a fault of the server: its log says more", status=500)
                missing -= event.finish_reason is not None
                yield event
        finally:
            self.batcher.leave(rows)

    def _rows(
        self, body: bytes, chat: bool, send: Callable[[Piece | Exception], None]
    ) -> tuple[list[Row], bool, bool]:
        """The rows of a request, whether its answer is streamed, and with a last event of usage."""
        take = _Fields(body)
        if (model := take("model", str)) != self.name:
            message = f"model {model!r} does not exist: this server has {self.name!r}"
            raise RequestError(message, "model", status=404, code="model_not_found")
        method = self._method(take("method", str), take("strength", float))
        models, method = self.lm.prepare(method, generating=True)
        sampler = Sampler(
            take("temperature", float, 1.0),
            take("top_k", int, 0),
            take("top_p", float, 1.0),
            take("repetition_penalty", float, 1.0),
        )
        seed = take("seed", int, secrets.randbelow(2**31))
        if not 0 <= seed < 2**31:
            raise RequestError(f"seed {seed}: give a number from 0 to {2**31 - 1}", "seed")
        stop = take("stop", (str, list), [])
        stop = [stop] if isinstance(stop, str) else stop
        streamed = take("stream", bool, False)
        stream_options = take("stream_options", dict, {})
        if stream_options and (not streamed or stream_options.keys() - {"include_usage"}):
            raise RequestError("stream_options go with stream and have include_usage alone", "stream_options")
        prompts = (
            self._chat_prompt(take("messages", list)) if chat else self._prompts(take("prompt", (str, list)))
        )
        room = models.context_length - max(map(len, prompts))
        if chat and "max_completion_tokens" in take.fields:
            take.fields.setdefault("max_tokens", take.fields.pop("max_completion_tokens"))
        default = min(self.max_tokens, room) if chat else COMPLETION_TOKENS
        max_tokens = take("max_tokens", int, max(default, 1))
        if not 1 <= max_tokens <= self.max_tokens:
            raise RequestError(f"max_tokens {max_tokens}: give 1 to {self.max_tokens}", "max_tokens")
        if max_tokens > room:
            message = (
                f"a prompt and max_tokens {max_tokens} are {max_tokens - room} tokens longer than the context"
            )
            message = f"{message} of {models.context_length}: shorten one of them"
            raise RequestError(message, "messages" if chat else "prompt", code="context_length_exceeded")
        logprobs = take("logprobs", bool if chat else int)
        if not (chat or logprobs in (None, 0)):
            raise RequestError("logprobs are of the drawn tokens alone: give 0", "logprobs")
        logprobs = logprobs if chat else logprobs is not None
        if logprobs and streamed:
            raise RequestError("logprobs do not go with stream: leave one of them out", "logprobs")
        if logprobs and not method.normalized:
            message = f"the scores of {method.name} are no log-probabilities: give it renormalize=true"
            raise RequestError(message, "logprobs")
        take.end()
        ends = frozenset(self.lm.eos_token_ids) | special_stops(self.lm.tokenizer, stop)
        settings = Settings(models, method, sampler, seed, max_tokens, tuple(stop), ends, bool(logprobs))
        if len(prompts) > self.batcher.queue_size:
            raise RequestError(
                f"{len(prompts)} prompts: the queue has {self.batcher.queue_size} places", "prompt"
            )
        rows = [Row(i, prompt, settings, send) for i, prompt in enumerate(prompts)]
        return rows, streamed, bool(stream_options.get("include_usage"))

    def _method(self, name: str | None, strength: float | None) -> Method:
        """What a request asks for; it loads nothing that the server was not started with."""
        if name is not None and strength is not None:
            raise RequestError("method and strength exclude each other: give one of them", "strength")
        if name is None and strength is None:
            return self.default
        try:
            method = self._checked(parse_method(strength if name is None else name))
        except UserError as error:
            raise RequestError(str(error), "strength" if name is None else "method") from error
        return method

    def _checked(self, method: Method) -> Method:
        if method.resource not in self.loaded:
            raise UserError(
                f"method {method.name}: {method.resource} is not loaded: start the server with it"
            )
        if getattr(method, "noise", None) is not None:
            raise UserError(f"method {method.name}: noise is for control runs, which are not served")
        _, resolved = self.lm.prepare(method, generating=True)
        check_prompts(resolved, 1)
        return method

    def _prompts(self, prompt: str | list) -> list[list[int]]:
        """Token ids of one prompt or several, which are texts or token ids."""
        several = prompt if isinstance(prompt, list) and not _are(int, prompt) else [prompt]
        if _are(str, several):
            prompts = self.lm.encode_prompts(several, "raw")
        elif all(isinstance(each, list) and _are(int, each) for each in several):
            prompts = several
        else:
            raise RequestError("prompt: give a text, a list of token ids, or a list of these", "prompt")
        if not prompts or not all(prompts):
            raise RequestError("a prompt is empty: give at least one token", "prompt")
        for each in prompts:
            self.lm.config.check_token_ids(each)
        return prompts

    def _chat_prompt(self, messages: list) -> list[list[int]]:
        if not messages:
            raise RequestError("messages are empty: give at least one", "messages")
        try:
            resolve_format(self.lm.tokenizer, "chat")
        except UserError as error:
            message = "the model has no chat template that works here: use /v1/completions"
            raise RequestError(message, "messages") from error
        text = self.lm.tokenizer.apply_chat_template(
            [_message(each) for each in messages], add_generation_prompt=True, tokenize=False
        )
        return self.lm.tokenizer([text], add_special_tokens=adds_special_tokens("chat"))["input_ids"]


def _message(message: Any) -> dict[str, str]:
    """A chat message with its parts of text as one."""
    if isinstance(message, dict) and message.keys() == {"role", "content"}:
        role, content = message["role"], message["content"]
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
            for part in content
        ):
            content = "".join(str(part["text"]) for part in content)
        if isinstance(role, str) and isinstance(content, str):
            return {"role": role, "content": content}
    raise RequestError("a message has a role and a content, which is text, and nothing else", "messages")


def _are(kind: type, values: list) -> bool:
    return bool(values) and all(type(value) is kind for value in values)


class _Fields:
    """Takes fields out of a request; `end` refuses what is left."""

    def __init__(self, body: bytes):
        try:
            fields = json.loads(body, parse_constant=lambda name: _refuse(name))
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RequestError("a text holds half of a character (a lone surrogate)") from error
        except (ValueError, RecursionError) as error:
            raise RequestError("the request is no JSON") from error
        if not isinstance(fields, dict):
            raise RequestError("the request is no JSON object")
        self.fields = {name: value for name, value in fields.items() if value is not None}

    def __call__(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A field's value; without a default those of `REQUIRED` must be there."""
        if name not in self.fields:
            if name in ("model", "prompt", "messages"):
                raise RequestError(f"{name} is missing", name)
            return default
        value = self.fields.pop(name)
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            raise RequestError(f"{name} must be of type {' or '.join(k.__name__ for k in kinds)}", name)
        return value

    def end(self) -> None:
        self.fields.pop("user", None)  # Says who asks, and nothing about the answer.
        for name, value in self.fields.items():
            if name not in WITHOUT_EFFECT:
                raise RequestError(f"{name} is not supported: leave it out", name)
            if value != WITHOUT_EFFECT[name]:
                message = f"{name} is not supported: leave it out, or give {json.dumps(WITHOUT_EFFECT[name])}"
                raise RequestError(message, name)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


class _Form:
    """The form of an answer: chat or completion."""

    def __init__(self, model: str, *, chat: bool):
        self.chat = chat
        kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        self.head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, lm: LanguageModel, rows: list[Row], pieces: AsyncIterator[Piece]) -> dict[str, Any]:
        texts, last = [""] * len(rows), {}
        async for piece in pieces:
            texts[piece.index] += piece.text
            if piece.finish_reason is not None:
                last[piece.index] = piece
        choices = []
        for i, text in enumerate(texts):
            choice = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choice |= {"index": i, "finish_reason": last[i].finish_reason, "logprobs": None}
            if rows[i].settings.logprobs:
                choice["logprobs"] = self._logprobs(lm, last[i])
            choices.append(choice)
        return self.head | {"choices": choices, "usage": _usage(rows, last.values())}

    def _logprobs(self, lm: LanguageModel, piece: Piece) -> dict[str, Any]:
        names = [lm.tokenizer.decode([token]) for token in piece.tokens]
        # JSON has no infinity: OpenAI writes this number.
        values = [max(value, -9999.0) for value in piece.logprobs]
        if not self.chat:
            return {"tokens": names, "token_logprobs": values, "top_logprobs": None, "text_offset": None}
        pairs = zip(names, values, strict=True)
        content = [{"token": n, "logprob": v, "bytes": None, "top_logprobs": []} for n, v in pairs]
        return {"content": content, "refusal": None}

    async def events(
        self, rows: list[Row], piece: Piece, pieces: AsyncIterator[Piece], *, with_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events, beginning with a piece that is there."""
        head = self.head | ({"object": "chat.completion.chunk"} if self.chat else {})
        begun, last = set(), []
        try:
            while piece is not None:
                choice = {"index": piece.index, "finish_reason": piece.finish_reason, "logprobs": None}
                if self.chat:
                    role = {} if piece.index in begun else {"role": "assistant"}
                    choice["delta"] = role | ({"content": piece.text} if piece.text or role else {})
                    begun.add(piece.index)
                else:
                    choice["text"] = piece.text
                last += [piece] if piece.finish_reason else []
                yield _event(head | {"choices": [choice]})
                piece = await anext(pieces, None)
            if with_usage:
                yield _event(head | {"choices": [], "usage": _usage(rows, last)})
            yield "data: [DONE]\n\n"
        except RequestError as error:
            yield _event(error.body)
        finally:
            await pieces.aclose()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _usage(rows: list[Row], last: Any) -> dict[str, int]:
    prompt, new = sum(len(row.prompt) for row in rows), sum(len(piece.tokens) for piece in last)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def _read(http: Request) -> bytes:
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise RequestError(f"the request has more than {BODY_LIMIT} bytes", status=413)
    return bytes(body)


async def _while_connected(http: Request, work: Coroutine) -> Any:
    """What `work` gives; it is cancelled if the client goes first."""
    work, gone = asyncio.ensure_future(work), asyncio.ensure_future(http.receive())
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


async def _error_response(http: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # Nobody reads it.
    if isinstance(error, HTTPException):
        error = RequestError(f"{http.method} {http.url.path}: {error.detail}", status=error.status_code)
    elif isinstance(error, UserError):
        error = RequestError(str(error))
    elif not isinstance(error, RequestError):
        error = RequestError("a fault of the server: its log says more", status=500)
    return JSONResponse(error.body, error.status)
