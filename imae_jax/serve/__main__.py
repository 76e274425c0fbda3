"""`python -m imae_jax.serve`: a model as an OpenAI-compatible endpoint, with a mode or method per request."""

import contextlib
import importlib.util
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, add_model_arguments, at_least, command, model_arguments
from imae_jax.errors import UserError

logger = logging.getLogger(__name__)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install 'imae_jax[serve]'")
    runtime.set_up()

    import uvicorn

    from imae_jax.convert import load_model
    from imae_jax.decode import parse_method
    from imae_jax.serve.server import Server

    methods = [parse_method(name) for name in args.method]
    with _listen(args.host, args.port) as listener:
        lm = load_model(args.model, **model_arguments(args))
        if not methods:
            methods = [parse_method("expert" if lm.model.anti_expert_config else "base")]
        server = Server(
            lm,
            args.name or Path(args.model).name,
            methods,
            batch_size=args.batch_size,
            queue_size=args.queue_size,
            max_tokens=args.max_tokens,
        )
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        logger.info("%s, %s by default: http://%s:%d/v1", server.name, methods[0].name, host, port)
        # uvicorn stops listening at a signal and lets what runs finish; then it raises the signal again.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(server.app, log_config=None, lifespan="off")).run([listener])
        server.batcher.end()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port} cannot be listened on ({error}): choose another --port") from error


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m imae_jax.serve",
        description="Serves a model with OpenAI's completions and chat completions, a mode or method per "
        "request, and a page that compares two of them. It is for research and comparison, without access "
        "control: vLLM is for production (docs/serving.md).",
    )
    add_model_arguments(parser)
    parser.add_argument("--name", help="of the model in requests (default: the last part of --model)")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        help="mode or method of requests that name none (default: expert where the model has anti-expert "
        "units, else base); further ones load what they need: requests may name these, and all that need "
        "nothing",
    )
    parser.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=at_least(0), default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="rows of a batch (default: 8)")
    parser.add_argument(
        "--queue-size", type=at_least(1), default=256, help="prompts that may wait (default: 256)"
    )
    parser.add_argument(
        "--max-tokens", type=at_least(1), default=1024, help="the most new tokens of a prompt (default: 1024)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
