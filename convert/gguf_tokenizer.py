"""Tokenizers that GGUF metadata describe, as llama.cpp reads them."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from imae_jax.config import check_kinds
from imae_jax.convert import sentencepiece_model
from imae_jax.errors import UserError
from imae_jax.tokenizer import Tokenizer, damage_in

logger = logging.getLogger(__name__)

CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4
# What ends a turn or a message, whatever keys and types a file has for it: llama.cpp's list but for tokens
# that end documents, which are a file's `eos` where its model ends texts with them.
END_TOKENS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
    *("<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
)

# How byte-level BPE models cut text before merging, by `tokenizer.ggml.pre` (llama.cpp's names): the patterns
# of the models' own tokenizers, one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = (_WORDS % "{1,3}",)
_QWEN2 = (_WORDS % "",)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_SINGLE_DIGITS = (r"\p{N}", _GPT2)
# llama.cpp's own for files that say nothing, which is no model's.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
PATTERNS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "trillion", "exaone4", "mellum"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "hunyuan", "stablelm2"), _QWEN2),
    "tekken": _TEKKEN,
    "deepseek-coder": _DEEPSEEK_CODER,
}
# Their vocabularies hold words that their merges cannot reach, and texts begin with BOS.
WHOLE_WORDS = tuple(name for name, patterns in PATTERNS.items() if patterns in (_LLAMA3, _TEKKEN))

# Values by their kinds, without `tokenizer.`.
TEXTS = ("ggml.model", "ggml.pre", "chat_template")
TEXT_LISTS = ("ggml.tokens", "ggml.merges", "chat_templates")
NUMBER_LISTS = ("ggml.token_type", "ggml.scores")
IDS = tuple(f"ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding"))
FLAGS = ("ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_space_prefix")


def end_token_ids(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> set[int]:
    """Tokens that end a text, a turn or a message, by their keys and by their texts."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ids = {*map(metadata.get, keys), *map(tokenizer.convert_tokens_to_ids, END_TOKENS)}
    return {i for i in ids if type(i) is int}


def read_tokenizer(
    metadata: Mapping[str, Any], location: str, architecture: str, max_length: int
) -> Tokenizer:
    """The tokenizer that a file's metadata describe.

    Raises:
        UserError: the tokenizer is damaged, or of a kind that this reader does not know.
    """
    get = metadata.get
    _check(metadata, location)
    tokens = get("tokenizer.ggml.tokens")
    kinds = get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        AddedToken(token, special=kind == CONTROL_TOKEN or token in END_TOKENS, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN) or token in END_TOKENS
    ]
    model = get("tokenizer.ggml.model")
    if model == "gpt2":
        pre = _pre_tokenizer(get, location, architecture, tokens)
        tokenizer, adds_bos = _byte_level_bpe(get, location, tokens, pre), pre in WHOLE_WORDS
        tokenizer.add_tokens(added)
    elif model == "llama":
        tokenizer, adds_bos = _sentencepiece_bpe(get, location, tokens, added), True
    else:
        raise UserError(
            f"tokenizer model {model!r} of {location} is not supported: pass --tokenizer "
            "DIRECTORY with the model's HuggingFace tokenizer"
        )
    special = {}
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for key, name in names.items():
        token_id = get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            special[f"{name}_token"] = tokens[token_id]
    bos = (
        [special["bos_token"]]
        if get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in special
        else []
    )
    eos = [special["eos_token"]] if get("tokenizer.ggml.add_eos_token") and "eos_token" in special else []
    if bos or eos:
        ids = [(token, tokens.index(token)) for token in dict.fromkeys([*bos, *eos])]
        with damage_in(location):
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*bos, "$A", *eos],
                pair=[*bos, "$A", *eos, *bos, "$B", *eos],
                special_tokens=ids,
            )
    templates = {
        name: get(f"tokenizer.chat_template.{name}") for name in get("tokenizer.chat_templates") or ()
    }
    if get("tokenizer.chat_template"):
        templates["default"] = get("tokenizer.chat_template")
    config: dict[str, Any] = {"model_max_length": max_length}
    if templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    if list(templates) == ["default"]:
        config["chat_template"] = templates["default"]
    return Tokenizer(tokenizer, special, templates, config=config)


def _check(metadata: Mapping[str, Any], location: str) -> None:
    """Raises a `UserError` for a value of another kind, and for lists that do not fit the tokens."""
    for kind, items, what, names in (
        (str, None, "a text", TEXTS),
        (list, str, "a list of texts", TEXT_LISTS),
        (list, int | float, "a list of numbers", NUMBER_LISTS),
        (int, None, "an integer", IDS),
        (bool | int, None, "true or false", FLAGS),
    ):
        keys = (f"tokenizer.{name}" for name in names)
        check_kinds(metadata, kind, what, *keys, items=items, where=location)
    names = (f"tokenizer.chat_template.{name}" for name in metadata.get("tokenizer.chat_templates") or ())
    check_kinds(metadata, str, "a text", *names, where=location)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{location} has no tokenizer: pass --tokenizer DIRECTORY")
    for name in NUMBER_LISTS:
        values = metadata.get(f"tokenizer.{name}")
        if values and len(values) != len(tokens):
            raise UserError(
                f"tokenizer.{name} in {location} has {len(values)} values for {len(tokens)} tokens: download "
                "it again"
            )


def _pre_tokenizer(get: Callable, location: str, architecture: str, tokens: list[str]) -> str:
    """The name of the pre-tokenizer; for older files, which have none, that of the model's family."""
    pre = get("tokenizer.ggml.pre") or "default"
    if pre not in PATTERNS:
        raise UserError(
            f"pre-tokenizer {pre!r} of {location} is not supported (known: "
            f"{', '.join(PATTERNS)}): pass --tokenizer DIRECTORY with the model's "
            "HuggingFace tokenizer"
        )
    if pre == "default":
        if architecture.startswith("qwen"):
            return "qwen2"
        if "<|begin_of_text|>" in tokens:
            return "llama-bpe"
        logger.warning(
            "%s does not say how its tokenizer cuts text, and llama.cpp's default is taken: pass --tokenizer "
            "DIRECTORY with the model's HuggingFace tokenizer",
            location,
        )
    return pre


def _byte_level_bpe(get: Callable, location: str, tokens: list[str], pre: str) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges") or []]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    with damage_in(location):
        model = models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS)
    tokenizer = tokenizers.Tokenizer(model)
    steps = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(
    get: Callable, location: str, tokens: list[str], added: list[AddedToken]
) -> tokenizers.Tokenizer:
    scores, unknown = get("tokenizer.ggml.scores"), get("tokenizer.ggml.unknown_token_id", 0)
    if not scores or not 0 <= unknown < len(tokens):
        raise UserError(f"{location} has no tokenizer.ggml.scores, or no token {unknown}: download it again")
    merges = sentencepiece_model.merges_of(tokens, scores)
    with damage_in(location):
        bpe = models.BPE(
            {token: i for i, token in enumerate(tokens)},
            merges,
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    # After every special token, too.
    prefix = get("tokenizer.ggml.add_space_prefix", True)
    return sentencepiece_model.build(bpe, prefix=prefix, special=added)
