"""Tokenizers that GGUF metadata describe."""

from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from imae_jax.errors import UserError, first_line

CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4


# How byte-level BPE models cut text before merging, by `tokenizer.ggml.pre` (llama.cpp's names).
# None is GPT-2's own pattern, built into `tokenizers`.
PRE_TOKENIZER_PATTERNS = {
    "gpt-2": None,
    "default": None,
    "smollm": None,
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
SINGLE_DIGIT_PRE_TOKENIZERS = ("smollm",)

Get = Callable[..., Any]
"""A metadata value by its key, or a default (None)."""


def end_token_ids(get: Get) -> set[int]:
    """Tokens that end a text, a turn or a message."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return {value for value in map(get, keys) if type(value) is int}


def read_tokenizer(get: Get, location: str, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer that a file's metadata describe.

    Raises:
        UserError: the tokenizer is damaged, or of a kind that this reader does not know.
    """
    try:
        return _tokenizer(get, location, max_length)
    except UserError:
        raise
    except Exception as error:  # The tokenizers package raises plain Exceptions.
        reason = first_line(error)
        raise UserError(
            f"the tokenizer in {location} is damaged ({reason}): pass --tokenizer DIRECTORY"
        ) from error


def _tokenizer(get: Get, location: str, max_length: int) -> PreTrainedTokenizerFast:
    tokens = get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{location} has no tokenizer: pass --tokenizer DIRECTORY")
    kinds = get("tokenizer.ggml.token_type") or [1] * len(tokens)
    model = get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level_bpe(get, location, tokens)
    elif model == "llama":
        tokenizer = _sentencepiece_bpe(get, tokens)
    else:
        raise UserError(
            f"tokenizer model {model!r} of {location} is not supported: pass --tokenizer "
            "DIRECTORY with the model's HuggingFace tokenizer"
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL_TOKEN, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN)
        ]
    )
    special = {}
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for key, name in names.items():
        token_id = get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            special[f"{name}_token"] = tokens[token_id]
    # Files that do not say: llama.cpp adds BOS to SentencePiece models and to Llama 3.
    unsaid = model == "llama" or get("tokenizer.ggml.pre") == "llama-bpe"
    adds_bos = get("tokenizer.ggml.add_bos_token", unsaid)
    if adds_bos and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, get("tokenizer.ggml.bos_token_id"))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        **special,
    )


def _byte_level_bpe(get: Get, location: str, tokens: list[str]) -> tokenizers.Tokenizer:
    pre = get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZER_PATTERNS:
        raise UserError(
            f"pre-tokenizer {pre!r} of {location} is not supported (known: "
            f"{', '.join(PRE_TOKENIZER_PATTERNS)}): pass --tokenizer DIRECTORY with the model's "
            "HuggingFace tokenizer"
        )
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges") or []]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3's vocabulary holds words that its merges cannot reach.
    bpe = models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(bpe)
    pattern = PRE_TOKENIZER_PATTERNS[pre]
    steps = []
    if pre in SINGLE_DIGIT_PRE_TOKENIZERS:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pattern is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(get: Get, tokens: list[str]) -> tokenizers.Tokenizer:
    scores = get("tokenizer.ggml.scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores or [], strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    unknown = tokens[get("tokenizer.ggml.unknown_token_id", 0)]
    bpe = models.BPE(
        vocabulary,
        [(left, right) for *_, left, right in sorted(merges)],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    prefix = get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer
