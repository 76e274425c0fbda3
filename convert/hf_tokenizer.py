"""Tokenizers of HuggingFace directories, in and out: `tokenizer.json` and the files beside it.

**What begins and ends a text.** `add_bos_token` of `tokenizer_config.json`, true or false, decides whether
texts begin with the BOS token; where it is absent or null, or the checkpoint has no BOS token, the
post-processor of `tokenizer.json` decides. A flag replaces what the post-processor puts there, so that BOS
never comes twice. `add_eos_token` does the same at the end. A SentencePiece model without flags adds BOS, and
no EOS. What class `tokenizer_class` names, and what a version of transformers makes of it, does not count.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from imae_jax.config import check_kinds
from imae_jax.errors import UserError
from imae_jax.files import read_json, read_text
from imae_jax.tokenizer import Tokenizer, damage_in

TOKENIZER_FILE, CONFIG_FILE, MODEL_FILE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = "special_tokens_map.json", "added_tokens.json"
TEMPLATE_FILE, OLD_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
TEMPLATE_DIR = "additional_chat_templates"
COPIED = (
    MODEL_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    TEMPLATE_FILE,
    OLD_TEMPLATE_FILE,
    f"{TEMPLATE_DIR}/*.jinja",
)
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
OTHER_NAMES = ("additional_special_tokens", "extra_special_tokens")
TOKEN_FIELDS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory: of `tokenizer.json`, else of a SentencePiece model.

    Raises:
        UserError: names what is missing, damaged or contradictory.
    """
    config, special_map, added = (
        read_json(path) if (path := directory / name).is_file() else {}
        for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE)
    )
    _check_config(config, directory / CONFIG_FILE)
    _check_names(special_map, directory / SPECIAL_TOKENS_FILE)
    check_kinds(added, int, "an integer", *added, where=directory / ADDED_TOKENS_FILE)
    check_kinds({name: name for name in added}, str, "a text", *added, where=directory / ADDED_TOKENS_FILE)
    files = [path for pattern in COPIED for path in sorted(directory.glob(pattern))]
    # As transformers: the map counts, and comes first, where the config does not declare the added tokens.
    sources = [config] if "added_tokens_decoder" in config else [config, special_map]
    named = {name: source[name] for source in sources for name in NAMES if source.get(name)}
    if (directory / TOKENIZER_FILE).is_file():
        text = read_text(directory / TOKENIZER_FILE, "the tokenizer")
        with damage_in(directory):
            backend = tokenizers.Tokenizer.from_str(text)
        flags = {}
    elif (directory / MODEL_FILE).is_file():
        from imae_jax.convert.sentencepiece_model import read_model

        text = None
        backend, pieces = read_model(directory / MODEL_FILE, legacy=config.get("legacy", True) is not False)
        named = pieces | named
        flags = {"add_bos_token": True, "add_eos_token": False}
    else:
        raise UserError(
            f"{directory} has no tokenizer ({TOKENIZER_FILE}, or a SentencePiece {MODEL_FILE}): pass "
            "--tokenizer DIRECTORY with the model's"
        )
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))

    special = {name: _content(named.get(name)) for name in NAMES}
    special = {name: token for name, token in special.items() if token}
    changed = _add_tokens(backend, _declared(config, added), directory)
    others = [
        token for source in sources for name in OTHER_NAMES for token in _tokens(source.get(name)).values()
    ]
    changed |= _make_special(backend, [*special.values(), *map(_content, others)])
    flags |= {
        name: config[name] for name in ("add_bos_token", "add_eos_token") if config.get(name) is not None
    }
    changed |= _set_ends(backend, special, flags, directory)
    if text is not None and not changed:
        files.append(directory / TOKENIZER_FILE)
    special = {name: token for name, token in special.items() if backend.token_to_id(token) is not None}
    return Tokenizer(
        backend,
        special,
        _chat_templates(directory, config),
        config.get("clean_up_tokenization_spaces") is True,
        config | dict.fromkeys(NAMES),
        tuple(files),
    )


def _tokens(value: list | dict | None) -> dict[str | int, Any]:
    """Several tokens, in a list or by their names."""
    return value if isinstance(value, dict) else dict(enumerate(value or ()))


def _check_names(values: Mapping[str, Any], file: Path) -> None:
    """Raises a `UserError` where what should name tokens is of another kind."""
    check_kinds(values, list | dict, "a list or an object", *OTHER_NAMES, where=file)
    tokens = {name: values.get(name) for name in NAMES}
    for key in OTHER_NAMES:
        tokens |= {f"{name} of {key}": token for name, token in _tokens(values.get(key)).items()}
    texts = {
        name: token.get("content", token) if isinstance(token, dict) else token
        for name, token in tokens.items()
    }
    check_kinds(texts, str, "a token", *texts, where=file)


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raises a `UserError` where a value of `tokenizer_config.json` is of another kind."""
    _check_names(config, file)
    check_kinds(config, bool | int, "true or false", "add_bos_token", "add_eos_token", where=file)
    check_kinds(config, dict, "an object", "added_tokens_decoder", where=file)
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        if not (i.isascii() and i.isdigit() and isinstance(token, dict) and token.get("content")):
            raise UserError(
                f"added_tokens_decoder in {file} must hold tokens by their ids, not {i!r}: {token!r}"
            )
        check_kinds(token, str, "a token", "content", where=file)
        check_kinds(token, bool, "true or false", *TOKEN_FIELDS, where=file)


def _content(token: Any) -> str | None:
    """The text of a token that is written as such or as an object; None for an empty one."""
    return (token.get("content") if isinstance(token, dict) else token) or None


def _declared(config: Mapping[str, Any], added: Mapping[str, int]) -> dict[int, AddedToken]:
    """Added tokens by id, as the files beside `tokenizer.json` declare them."""
    tokens = {i: AddedToken(text, normalized=False) for text, i in added.items()}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        options = {name: token[name] for name in TOKEN_FIELDS if token.get(name) is not None}
        tokens[int(i)] = AddedToken(token["content"], **options)
    return tokens


def _add_tokens(backend: tokenizers.Tokenizer, declared: Mapping[int, AddedToken], directory: Path) -> bool:
    """Adds tokens that `tokenizer.json` lacks, each with its declared id; says whether there are any."""
    known, changed = backend.get_added_tokens_decoder(), False
    for i, token in sorted(declared.items(), key=lambda item: item[0]):
        if i in known and known[i].content == token.content:
            continue
        changed = True
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != i:
            raise UserError(
                f"the tokenizer in {directory} declares the added token {token.content!r} with id {i}, but "
                f"has id {found} for it: restore its files, or pass --tokenizer DIRECTORY"
            )
    return changed


def _make_special(backend: tokenizers.Tokenizer, tokens: list[str | None]) -> bool:
    """Makes tokens special that the files name as such, where the vocabulary has them."""
    known, changed = {token.content: token for token in backend.get_added_tokens_decoder().values()}, False
    for text in dict.fromkeys(tokens):
        if text is None or backend.token_to_id(text) is None:
            continue
        token = known.get(text, AddedToken(text, normalized=False))
        if text not in known or not token.special:
            token.special = changed = True
            backend.add_special_tokens([token])
    return changed


def _set_ends(
    backend: tokenizers.Tokenizer, special: Mapping[str, str], flags: Mapping[str, Any], directory: Path
) -> bool:
    """Makes the post-processor do what the flags say; see the module. Returns whether it did not before."""
    ends = {}
    for name, flag in (("bos_token", "add_bos_token"), ("eos_token", "add_eos_token")):
        token = special.get(name)
        if flag in flags and token is not None and backend.token_to_id(token) is not None:
            ends[name] = [token] if flags[flag] else []
    if not ends:
        return False
    steps = _steps(_described(backend.post_processor))
    templates = [step for step in steps if step["type"] == "TemplateProcessing"]
    if not templates:
        if not any(ends.values()):
            return False
        templates = [_template([_SEQUENCE], {})]
        steps += templates
    single = templates[0]["single"]
    places = [i for i, part in enumerate(single) if "Sequence" in part]
    if len(templates) > 1 or len(places) != 1:
        raise UserError(
            f"the post-processor in {directory / TOKENIZER_FILE} is not supported beside add_bos_token or "
            f"add_eos_token in {CONFIG_FILE}: remove those, if it adds BOS and EOS by itself"
        )
    template, (place,) = templates[0], places
    before, after = single[:place], single[place + 1 :]
    wanted = [
        [_special_part(token) for token in ends[name]] if name in ends else found
        for name, found in (("bos_token", before), ("eos_token", after))
    ]
    if [_ids(part) for part in wanted] == [_ids(before), _ids(after)]:
        return False
    single = [*wanted[0], _SEQUENCE, *wanted[1]]
    template["single"] = single
    template["pair"] = single + [
        {kind: values | {"id": "B" if kind == "Sequence" else values["id"], "type_id": 1}}
        for part in single
        for kind, values in part.items()
    ]
    for tokens in ends.values():
        for token in tokens:
            i = backend.token_to_id(token)
            template["special_tokens"][token] = {"id": token, "ids": [i], "tokens": [token]}
    whole = {"type": "Sequence", "processors": steps} if len(steps) > 1 else steps[0]
    backend.post_processor = _post_processor(whole)
    return True


_SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


def _template(single: list[dict[str, Any]], ids: Mapping[str, int]) -> dict[str, Any]:
    tokens = {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}


def _steps(processor: dict[str, Any]) -> list[dict[str, Any]]:
    """The post-processors that one consists of, BERT's and RoBERTa's as the templates that they are."""
    kind = processor.get("type")
    if kind == "Sequence":
        return [step for part in processor["processors"] for step in _steps(part)]
    if kind in ("BertProcessing", "RobertaProcessing"):
        (first, first_id), (last, last_id) = processor["cls"], processor["sep"]
        parts = [_special_part(first), _SEQUENCE, _special_part(last)]
        return [_template(parts, {first: first_id, last: last_id})]
    return [processor] if processor else []


def _special_part(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _ids(parts: list[dict[str, Any]]) -> list[str]:
    return [part["SpecialToken"]["id"] for part in parts]


def _described(part: Any) -> dict[str, Any]:
    """What `tokenizer.json` holds of a part of a tokenizer; empty where there is none."""
    return {} if part is None else json.loads(part.__getstate__())


def _post_processor(description: dict[str, Any]) -> Any:
    """A post-processor of what `tokenizer.json` would hold: only a whole tokenizer can be read from JSON."""
    empty = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    return tokenizers.Tokenizer.from_str(json.dumps(empty | {"post_processor": description})).post_processor


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a file of its own comes before what `tokenizer_config.json` holds."""
    old = directory / OLD_TEMPLATE_FILE
    found = _named_templates(read_json(old).get("chat_template"), old) if old.is_file() else {}
    found |= _named_templates(config.get("chat_template"), directory / CONFIG_FILE)
    paths = {path.stem: path for path in sorted((directory / TEMPLATE_DIR).glob("*.jinja"))}
    if (directory / TEMPLATE_FILE).is_file():
        paths["default"] = directory / TEMPLATE_FILE
    return found | {name: read_text(path, "the chat template") for name, path in paths.items()}


def _named_templates(value: Any, file: Path) -> dict[str, str]:
    """Templates by name: of one text, of a list of `name` and `template`, or of an object."""
    keys = {"name", "template"}
    if isinstance(value, list) and all(isinstance(item, dict) and item.keys() >= keys for item in value):
        value = {str(item["name"]): item["template"] for item in value}
    templates = value if isinstance(value, dict) else {"default": value}
    check_kinds(templates, str, "a text", *templates, where=f"the chat templates of {file}")
    return {name: template for name, template in templates.items() if template}


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes a tokenizer so that every version of transformers reads the same ids from it.

    Files are copied as they are, `tokenizer.json` where it says by itself what the flags say.
    `tokenizer_config.json` names the class that takes `tokenizer.json` as it is: others build parts of their
    own, in ways that differ among versions.
    """
    for path in tokenizer.files:
        target = directory / TEMPLATE_DIR if path.parent.name == TEMPLATE_DIR else directory
        target.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.name)
    if not (directory / TOKENIZER_FILE).is_file():
        tokenizer.backend_tokenizer.save(str(directory / TOKENIZER_FILE))
    # Left to them, some versions would undo what tokenizer.json says.
    pre_tokenizer = _described(tokenizer.backend_tokenizer.pre_tokenizer)
    config = {
        **tokenizer.config,
        **tokenizer.special_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": pre_tokenizer.get("add_prefix_space", False),
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    # In tokenizer.json by now; and code is not shipped.
    for name in ("add_bos_token", "add_eos_token", "auto_map", "legacy"):
        config.pop(name, None)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
