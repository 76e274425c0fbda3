"""Greedy text of GGUF models, here and in llama.cpp: the same prompts, token for token.

    python benchmarks/gguf_parity.py qwen2.5.gguf gemma3.gguf

llama.cpp multiplies quantized weights by activations that it rounds to 8 bits. So that both compute the same,
it gets the file's weights dequantized to float32, in a temporary file of 4 bytes a weight, and a float32
cache; with `--as-stored` it runs on the file itself. Where texts part, the margin of this library's likeliest
token there is shown: a small one is rounding's. Needs llama-cpp-python (`pip install llama-cpp-python`).
"""

import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from imae_jax.cli import ArgumentParser, command
from imae_jax.convert import LanguageModel, load_model
from imae_jax.convert.references import open_model
from imae_jax.decode import generate
from imae_jax.errors import UserError

PROMPTS = (
    "Q: Who wrote Hamlet?\nA:",
    "The three primary colors are",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees Celsius, but on top of a mountain",
    # Longer than Gemma's window of 512.
    " ".join(f"{n} times {n} is {n * n}." for n in range(60)),
)
FLOAT32 = 0  # In llama.cpp's enumeration of types.


@dataclasses.dataclass(frozen=True)
class PeerRun:
    """What llama.cpp made of a prompt: its own tokenization of it, and the tokens that follow ours."""

    prompt: list[int]
    new: list[int]


def write_float32(source: Path, target: Path) -> None:
    """The same model with every tensor in float32, one of them in memory at a time."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(tensor.n_elements))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.close()


def run_peer(path: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[PeerRun]:
    import llama_cpp

    length = max(map(len, prompts)) + new_tokens
    model = llama_cpp.Llama(str(path), n_ctx=length, type_k=FLOAT32, type_v=FLOAT32, verbose=False)
    runs = []
    for text, ids in zip(PROMPTS, prompts, strict=True):
        drawn = model.generate(list(ids), temp=0.0, repeat_penalty=1.0)
        new = [next(drawn) for _ in range(new_tokens)]
        runs.append(PeerRun(model.tokenize(text.encode(), add_bos=True, special=True), new))
    return runs


def margin(lm: LanguageModel, ids: Sequence[int], length: int) -> tuple[int, int, float]:
    """The two likeliest tokens after these, and by how much their logits differ."""
    padded = jnp.asarray([[*ids, *[0] * (length - len(ids))]])
    real = jnp.arange(length)[None] < len(ids)
    run = jax.jit(lambda model, tokens, mask: model(tokens, attention_mask=mask))
    logits = np.asarray(run(lm.model, padded, real))[0, len(ids) - 1]
    best, second = np.argsort(-logits)[:2]
    return int(best), int(second), float(logits[best] - logits[second])


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python benchmarks/gguf_parity.py", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="GGUF files")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--as-stored", action="store_true", help="llama.cpp runs on the quantized weights")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError("llama-cpp-python is not installed: pip install llama-cpp-python")
    for path in args.models:
        compare(path, args.new_tokens, args.as_stored)


def compare(path: Path, new_tokens: int, as_stored: bool) -> None:
    tokenizer = open_model(str(path)).tokenizer(None)
    prompts = tokenizer(list(PROMPTS))["input_ids"]
    # One model at a time is in memory.
    with tempfile.TemporaryDirectory() as directory:
        file = path
        if not as_stored:
            file = Path(directory) / "float32.gguf"
            write_float32(path, file)
        peer = run_peer(file, prompts, new_tokens)
    lm = load_model(str(path))
    ours = generate(lm.model, lm.config, prompts, max_new_tokens=new_tokens)
    length = max(map(len, prompts)) + new_tokens
    for ids, new, run in zip(prompts, ours, peer, strict=True):
        differing = [i for i, (a, b) in enumerate(zip(new, run.new, strict=True)) if a != b]
        verdict = "equal"
        if differing:
            at = differing[0]
            best, second, gap = margin(lm, [*ids, *new[:at]], length)
            verdict = (
                f"{at} equal, then {best} against {run.new[at]} (second here: {second}, {gap:.2g} below)"
            )
        same = "the same" if ids == run.prompt else f"other ({run.prompt})"
        print(
            f"{path.name}: {tokenizer.decode([*ids[-16:], *new])!r}: {verdict}; prompt's tokens: {same}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
