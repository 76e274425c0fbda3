"""The endpoint: what a request may ask for, and its answer in OpenAI's form.

The form is that of https://platform.openai.com/docs/api-reference; `method`, `strength`, `top_k` and
`repetition_penalty` come on top.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from imae_jax.decode import Method, Sampler, parse_method
from imae_jax.decode.streams import Models, check_prompts
from imae_jax.errors import UserError
from imae_jax.language_model import LanguageModel, special_stops
from imae_jax.prompts import adds_special_tokens, resolve_format
from imae_jax.serve.batching import Batcher, Piece, QueueFullError, Row, Settings

BODY_LIMIT = 2**20
"""Bytes of a request."""

COMPLETION_TOKENS = 16
"""OpenAI's default of `/v1/completions`."""

STOP_LIMIT = 16
"""Stop strings of a request: all are looked for after every chunk."""

# Taken where it changes nothing, although nothing else is supported.
WITHOUT_EFFECT = {"n": 1, "best_of": 1, "echo": False, "frequency_penalty": 0, "presence_penalty": 0}
WITHOUT_EFFECT |= {"logit_bias": {}, "top_logprobs": 0, "tools": [], "tool_choice": "none"}
WITHOUT_EFFECT |= {"response_format": {"type": "text"}}
FAULT = "a fault of the server: its log says more"


class RequestError(Exception):
    """Why a request is not answered, in OpenAI's form."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Server:
    """Answers requests to one model.

    Args:
        lm: the model.
        name: of the model in requests.
        methods: the default one, then others that load something and may be asked for.
        batch_size, queue_size: see `Batcher`.
        max_tokens: the most new tokens of a prompt.

    Raises:
        UserError: a method that the model cannot run, or that needs two prompts.
    """

    def __init__(
        self,
        lm: LanguageModel,
        name: str,
        methods: Sequence[Method],
        *,
        batch_size: int,
        queue_size: int,
        max_tokens: int,
    ):
        self.lm, self.name, self.max_tokens, self.default = lm, name, max_tokens, methods[0]
        self.resources = {None, *(method.resource for method in methods)}
        for method in methods:
            self._prepare(method)
        self.batcher = Batcher(lm, batch_size=batch_size, queue_size=queue_size)
        errors = (RequestError, UserError, HTTPException, ClientDisconnect, Exception)
        self.app = Starlette(
            routes=[
                Route("/", lambda _: FileResponse(Path(__file__).with_name("page.html"))),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._answer, methods=["POST"]),
                Route("/v1/chat/completions", self._answer, methods=["POST"]),
            ],
            exception_handlers=dict.fromkeys(errors, _error_response),
        )

    async def _models(self, http: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "imae_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _answer(self, http: Request) -> Response:
        chat, body = http.url.path == "/v1/chat/completions", await _read(http)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def send(event: Piece | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        # Tokenizers take their time with long prompts.
        rows, stream, with_usage = await run_in_threadpool(self.rows, body, send, chat=chat)
        try:
            self.batcher.submit(rows)
        except QueueFullError as error:
            message = f"{self.batcher.queue_size} prompts wait already, or nearly: try again later"
            raise RequestError(message, status=503, code="queue_full") from error
        pieces = self._pieces(rows, events)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "text_completion" if not chat else f"chat.completion{'.chunk' if stream else ''}",
            "created": int(time.time()),
            "model": self.name,
        }
        if not stream:
            return JSONResponse(head | await _while_connected(http, self._whole(rows, pieces, chat=chat)))
        # What fails before the first piece still has a status.
        first = await _while_connected(http, anext(pieces))
        parts = _events(head, rows, first, pieces, chat=chat, with_usage=with_usage)
        return StreamingResponse(parts, media_type="text/event-stream")

    async def _pieces(self, rows: list[Row], events: asyncio.Queue) -> AsyncIterator[Piece]:
        """What the batcher sends; rows that nobody waits for any more are closed."""
        try:
            missing = len(rows)
            while missing:
                event = await events.get()
                if isinstance(event, Exception):
                    message = str(event) if isinstance(event, UserError) else FAULT
                    raise RequestError(message, status=500) from event
                missing -= event.finish_reason is not None
                yield event
        finally:
            self.batcher.leave(rows)

    async def _whole(self, rows: list[Row], pieces: AsyncIterator[Piece], *, chat: bool) -> dict[str, Any]:
        texts, last = [""] * len(rows), {}
        async for piece in pieces:
            texts[piece.index] += piece.text
            last[piece.index] = piece
        choices = []
        for i, text in enumerate(texts):
            content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            logprobs = self._logprobs(last[i], chat=chat) if rows[i].settings.logprobs else None
            reason = last[i].finish_reason
            choices.append({"index": i, **content, "finish_reason": reason, "logprobs": logprobs})
        return {"choices": choices, "usage": _usage(rows, last.values())}

    def _logprobs(self, piece: Piece, *, chat: bool) -> dict[str, Any]:
        tokens = [self.lm.tokenizer.decode([token]) for token in piece.tokens]
        # JSON has no infinity: OpenAI writes this number.
        values = [max(value, -9999.0) for value in piece.logprobs]
        if not chat:
            return {"tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": None}
        each = zip(tokens, values, strict=True)
        return {"content": [{"token": t, "logprob": v, "bytes": None, "top_logprobs": []} for t, v in each]}

    def rows(
        self, body: bytes, send: Callable[[Piece | Exception], None], *, chat: bool
    ) -> tuple[list[Row], bool, bool]:
        """The rows of a request, whether its answer is streamed, and with a last event of usage.

        Raises:
            RequestError, UserError: what is wrong with the request.
        """
        fields = _fields(body)
        model = _take(fields, "model", str)
        if model != self.name:
            message = f"model {model!r} does not exist: this server has {self.name!r}"
            raise RequestError(message, "model", status=404, code="model_not_found")
        models, method = self._asked(fields)
        prompts = self._chat(fields) if chat else self._prompts(fields)
        if len(prompts) > self.batcher.queue_size:
            message = f"{len(prompts)} prompts: give at most {self.batcher.queue_size}"
            raise RequestError(message, "prompt")
        stop = _take(fields, "stop", str, list, default=[])
        stop = [stop] if isinstance(stop, str) else stop
        if len(stop) > STOP_LIMIT:
            raise RequestError(f"{len(stop)} stop strings: give at most {STOP_LIMIT}", "stop")
        stream = _take(fields, "stream", bool, default=False)
        options = _take(fields, "stream_options", dict, default={})
        if options.keys() - {"include_usage"} or (options and not stream):
            raise RequestError("stream_options go with stream and have include_usage alone", "stream_options")
        names = ("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("repetition_penalty", 1.0)
        seed = _take(fields, "seed", int, default=secrets.randbelow(2**31))
        if not 0 <= seed < 2**31:
            raise RequestError(f"seed {seed}: give a number from 0 to {2**31 - 1}", "seed")
        settings = Settings(
            models,
            method,
            Sampler(*(_take(fields, name, type(default), default=default) for name, default in names)),
            seed,
            self._max_tokens(fields, models.context_length - max(map(len, prompts)), chat=chat),
            tuple(stop),
            frozenset(self.lm.eos_token_ids) | special_stops(self.lm.tokenizer, stop),
            _wants_logprobs(fields, method, chat=chat, stream=stream),
        )
        fields.pop("user", None)  # Says who asks, and nothing about the answer.
        for name, value in fields.items():
            if name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]:
                known = f", or give {json.dumps(WITHOUT_EFFECT[name])}" if name in WITHOUT_EFFECT else ""
                raise RequestError(f"{name} is not supported: leave it out{known}", name)
        rows = [Row(i, prompt, settings, send) for i, prompt in enumerate(prompts)]
        return rows, stream, bool(options.get("include_usage"))

    def _asked(self, fields: dict[str, Any]) -> tuple[Models, Method]:
        """The method of a request, prepared."""
        name = _take(fields, "method", str, default=None)
        strength = _take(fields, "strength", float, default=None)
        if name is not None and strength is not None:
            raise RequestError("method and strength exclude each other: give one of them", "strength")
        try:
            asked = strength if name is None else name
            return self._prepare(self.default if asked is None else parse_method(asked))
        except UserError as error:
            raise RequestError(str(error), "strength" if name is None else "method") from error

    def _prepare(self, method: Method) -> tuple[Models, Method]:
        # Files and models that a request names are not for it to load.
        if method.resource not in self.resources:
            raise UserError(
                f"method {method.name}: {method.resource} is not loaded: start the server with it"
            )
        if getattr(method, "noise", None) is not None:
            raise UserError(f"method {method.name}: noise is for control runs, which are not served")
        models, method = self.lm.prepare(method, generating=True)
        check_prompts(method, 1)
        return models, method

    def _prompts(self, fields: dict[str, Any]) -> list[list[int]]:
        """Token ids of one prompt or several, which are texts or token ids."""
        prompt = _take(fields, "prompt", str, list)
        prompts = prompt if isinstance(prompt, list) and not _all(int, prompt) else [prompt]
        if _all(str, prompts):
            prompts = self.lm.encode_prompts(prompts, "raw")
        if not prompts or not all(_all(int, each) for each in prompts):
            raise RequestError("prompt: give a text, a list of token ids, or several; none empty", "prompt")
        for each in prompts:
            self.lm.config.check_token_ids(each)
        return prompts

    def _chat(self, fields: dict[str, Any]) -> list[list[int]]:
        messages, tokenizer = _take(fields, "messages", list), self.lm.tokenizer
        if not messages:
            raise RequestError("messages are empty: give at least one", "messages")
        try:
            resolve_format(tokenizer, "chat")
        except UserError as error:
            message = "the model has no chat template that works here: use /v1/completions"
            raise RequestError(message, "messages") from error
        text = tokenizer.apply_chat_template(
            [_message(each) for each in messages], add_generation_prompt=True, tokenize=False
        )
        return tokenizer([text], add_special_tokens=adds_special_tokens("chat"))["input_ids"]

    def _max_tokens(self, fields: dict[str, Any], room: int, *, chat: bool) -> int:
        """The most new tokens, where the context has room for some."""
        default = max(min(self.max_tokens, room), 1) if chat else min(COMPLETION_TOKENS, self.max_tokens)
        if chat and "max_tokens" not in fields:
            default = _take(fields, "max_completion_tokens", int, default=default)
        max_tokens = _take(fields, "max_tokens", int, default=default)
        if not 1 <= max_tokens <= self.max_tokens:
            raise RequestError(f"max_tokens {max_tokens}: give 1 to {self.max_tokens}", "max_tokens")
        if max_tokens > room:
            message = f"prompt and max_tokens are {max_tokens - room} tokens over the context: shorten one"
            raise RequestError(message, "messages" if chat else "prompt", code="context_length_exceeded")
        return max_tokens


def _fields(body: bytes) -> dict[str, Any]:
    """The fields of a request that are not null."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        fields = json.loads(body, parse_constant=refuse)
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError("a text holds half of a character (a lone surrogate)") from error
    except (ValueError, RecursionError) as error:
        raise RequestError("the request is no JSON") from error
    if not isinstance(fields, dict):
        raise RequestError("the request is no JSON object")
    return {name: value for name, value in fields.items() if value is not None}


_REQUIRED = object()


def _take(fields: dict[str, Any], name: str, *kinds: type, default: Any = _REQUIRED) -> Any:
    """Takes a field out of a request; every integer of 53 bits is a float, too."""
    value = fields.pop(name, default)
    if value is _REQUIRED:
        raise RequestError(f"{name} is missing", name)
    if float in kinds and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if value is not default and type(value) not in kinds:
        raise RequestError(f"{name} must be of type {' or '.join(k.__name__ for k in kinds)}", name)
    return value


def _wants_logprobs(fields: dict[str, Any], method: Method, *, chat: bool, stream: bool) -> bool:
    """Whether log-probabilities are asked for: `true` in chats, in completions 0, the number of others."""
    logprobs = _take(fields, "logprobs", bool if chat else int, default=None)
    if logprobs is None or logprobs is False:
        return False
    if not chat and logprobs != 0:
        raise RequestError("logprobs are of the drawn tokens alone: give 0", "logprobs")
    if stream:
        raise RequestError("logprobs do not go with stream: leave one of them out", "logprobs")
    if not method.normalized:
        message = f"the scores of {method.name} are no log-probabilities: give it renormalize=true"
        raise RequestError(message, "logprobs")
    return True


def _message(message: Any) -> dict[str, str]:
    """A chat message with its parts of text as one."""
    if isinstance(message, dict) and message.keys() == {"role", "content"}:
        role, content = message["role"], message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        known = all(
            isinstance(p, dict) and p.keys() == {"type", "text"} and p["type"] == "text" for p in parts
        )
        if known and _all(str, [role, *(part["text"] for part in parts)]):
            return {"role": role, "content": "".join(part["text"] for part in parts)}
    raise RequestError("a message has a role and a content, which is text, and nothing else", "messages")


def _all(kind: type, values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is kind for value in values)


async def _events(
    head: dict[str, Any],
    rows: list[Row],
    piece: Piece | None,
    pieces: AsyncIterator[Piece],
    *,
    chat: bool,
    with_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events of `piece` and those that follow it."""

    def event(data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data)}\n\n"

    begun, last = set(), {}
    try:
        while piece is not None:
            role = {"role": "assistant"} if piece.index not in begun else {}
            content = {"delta": role | {"content": piece.text}} if chat else {"text": piece.text}
            choice = {"index": piece.index, **content, "finish_reason": piece.finish_reason, "logprobs": None}
            begun.add(piece.index)
            last[piece.index] = piece
            yield event(head | {"choices": [choice]})
            piece = await anext(pieces, None)
        if with_usage:
            yield event(head | {"choices": [], "usage": _usage(rows, last.values())})
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield event(error.body)
    finally:
        await pieces.aclose()


def _usage(rows: list[Row], last: Iterable[Piece]) -> dict[str, int]:
    prompt, new = sum(len(row.prompt) for row in rows), sum(len(piece.tokens) for piece in last)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def _read(http: Request) -> bytes:
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise RequestError(f"the request has more than {BODY_LIMIT} bytes", status=413)
    return bytes(body)


async def _while_connected(http: Request, work: Awaitable) -> Any:
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
    elif not isinstance(error, RequestError):
        ours = not isinstance(error, UserError)
        error = RequestError(FAULT if ours else str(error), status=500 if ours else 400)
    return JSONResponse(error.body, error.status)
