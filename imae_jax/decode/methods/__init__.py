"""Decoding methods: which forward streams each needs, and how their outputs become scores.

The generator (`decode.loop`) and the scorer (`decode.scoring`) run any `Method` and know nothing else
of it. A method is a frozen dataclass, one file each; `REGISTRY` lists them by name.
"""

import itertools
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from imae_jax.anti_expert import MODES, parse_mode
from imae_jax.decode.methods.activation_decoding import ActivationDecoding
from imae_jax.decode.methods.adacad import AdaCAD
from imae_jax.decode.methods.cad import CAD
from imae_jax.decode.methods.cd import CD
from imae_jax.decode.methods.coiecd import COIECD
from imae_jax.decode.methods.delta import DeLTa
from imae_jax.decode.methods.dexperts import DExperts
from imae_jax.decode.methods.dola import DoLa, StaticDoLa
from imae_jax.decode.methods.end import END
from imae_jax.decode.methods.icd import ICD
from imae_jax.decode.methods.imae import Strength
from imae_jax.decode.methods.in_model_contrast import InModelContrast
from imae_jax.decode.methods.iti import ITI
from imae_jax.decode.methods.protocol import Method, Resource, Stream, StreamLogits, setting_fields
from imae_jax.decode.methods.prunecd import PruneCD
from imae_jax.decode.methods.sled import SLED
from imae_jax.decode.methods.steer import Steer
from imae_jax.errors import UserError

REGISTRY: dict[str, type[Method]] = {
    "imae": Strength,
    "in-model-contrast": InModelContrast,
    "icd": ICD,
    "dexperts": DExperts,
    "cd": CD,
    "prunecd": PruneCD,
    "dola": DoLa,
    "dola-static": StaticDoLa,
    "sled": SLED,
    "end": END,
    "delta": DeLTa,
    "activation-decoding": ActivationDecoding,
    "iti": ITI,
    "steer": Steer,
    "cad": CAD,
    "adacad": AdaCAD,
    "coiecd": COIECD,
}

__all__ = ["REGISTRY", "Method", "Resource", "Stream", "StreamLogits", "parse_method", "split_methods"]


def parse_method(settings: str | float | Mapping[str, Any] | Method) -> Method:
    """A method from its name or its settings.

    Args:
        settings: `base`, `expert`, `anti-expert`, a number (the strength), a name of `REGISTRY`,
            `name:key=value,key=value`, a mapping with the key `name`, or a method, returned as it is.

    Raises:
        UserError: names the method or setting that does not exist.
    """
    if isinstance(settings, Method):
        return settings
    if isinstance(settings, int | float):
        return Strength(parse_mode(settings))
    if isinstance(settings, str):
        name, _, rest = settings.strip().partition(":")
        fields = {}
        for item in filter(None, (part.strip() for part in rest.split(","))):
            key, equals, value = item.partition("=")
            if not equals:
                raise UserError(f"method {settings!r}: {item!r} is not of the form key=value")
            if key in fields:
                raise UserError(f"method {settings!r}: {key} is given twice")
            fields[key] = value
    else:
        fields = {str(key): value for key, value in settings.items()}
        name = str(fields.pop("name", ""))

    if name in REGISTRY:
        method = REGISTRY[name]
    else:
        if fields or (name not in MODES and not _is_number(name)):
            known = ", ".join([*MODES, "a number", *REGISTRY])
            wrong = "takes no settings" if name in MODES or _is_number(name) else "does not exist"
            raise UserError(f"method {name!r} {wrong}: use {known}")
        return Strength(parse_mode(name))
    kinds = typing.get_type_hints(method)
    known = {field.name: field.metadata for field in setting_fields(method)}
    values = {}
    for key, value in fields.items():
        if key not in known:
            raise UserError(f"method {name} has no setting {key!r}: it has {', '.join(known)}")
        values[key] = value = _convert(name, key, kinds[key], value)
        infinite = isinstance(value, float) and not math.isfinite(value)
        if infinite and not known[key].get("may_be_infinite"):
            raise UserError(f"method {name}: {key}={value} must be finite")
    return method(**values)


def split_methods(text: str) -> list[str]:
    """Cuts `base,expert,in-model-contrast:beta=2,alpha=0.1` into its methods.

    Braces stand for several values: `iti:directions=DIR,alpha={5,15},heads={16,48}` gives four methods.
    """
    methods: list[str] = []
    outside_of_braces = re.split(r",(?![^{}]*\})", text)
    for part in filter(None, (part.strip() for part in outside_of_braces)):
        is_setting = "=" in part and ":" not in part.partition("=")[0]
        if is_setting and methods and ":" in methods[-1]:
            methods[-1] += "," + part
        else:
            methods.append(part)
    if not methods:
        raise UserError("no method is given: use, for example, base,expert")
    return [expanded for method in methods for expanded in _expand(method)]


def _expand(method: str) -> list[str]:
    pieces = re.split(r"\{([^{}]*)\}", method)
    if any(brace in piece for piece in pieces for brace in "{}"):
        raise UserError(f"method {method!r}: braces do not match; use, for example, alpha={{5,15}}")
    choices = [
        [value.strip() for value in piece.split(",")] if i % 2 else [piece] for i, piece in enumerate(pieces)
    ]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _convert(method: str, key: str, kind: Any, value: Any) -> Any:
    """A setting's value from text or YAML."""
    kinds = [k for k in (typing.get_args(kind) or (kind,)) if k is not types.NoneType]
    if value is None and len(kinds) < len(typing.get_args(kind)):
        return None
    names = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
    wrong = UserError(f"method {method}: {key}={value!r} is no {names}")
    if isinstance(value, list | tuple) and any(typing.get_origin(k) is tuple for k in kinds):
        value = tuple(value)
        if all(isinstance(x, int) for x in value):
            return value
        raise wrong
    if bool in kinds:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise wrong
    if isinstance(value, bool | list | tuple | dict):
        raise wrong
    try:
        converted = kinds[0](value)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error
    if isinstance(value, float) and converted != value:
        raise wrong  # A fraction where a whole number is needed, or NaN.
    return converted
