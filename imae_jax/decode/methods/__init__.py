"""Decoding methods: which forward streams each needs, and how their outputs become scores.

The generator (`decode.loop`) and the scorer (`decode.scoring`) run any `Method` and know nothing else
of it. A method is a frozen dataclass, one file each; `REGISTRY` lists them by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from imae_jax.anti_expert import MODES, parse_mode
from imae_jax.decode.methods.contrast import InModelContrast
from imae_jax.decode.methods.imae import Strength
from imae_jax.decode.methods.protocol import Method, Stream
from imae_jax.errors import UserError

REGISTRY: dict[str, type[Method]] = {
    "imae": Strength,
    "in-model-contrast": InModelContrast,
}

__all__ = ["REGISTRY", "Method", "Stream", "parse_method", "split_methods"]


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
            fields[key] = value
    else:
        fields = {str(key): value for key, value in settings.items()}
        name = str(fields.pop("name", ""))

    if name in REGISTRY:
        method = REGISTRY[name]
    else:
        if fields or (name not in MODES and not _is_number(name)):
            known = [*MODES, "a number", *REGISTRY]
            raise UserError(f"method {name!r} does not exist or takes no settings: use {', '.join(known)}")
        return Strength(parse_mode(name))
    types = {field.name: field.type for field in dataclasses.fields(method)}
    values = {}
    for key, value in fields.items():
        if key not in types:
            raise UserError(f"method {name} has no setting {key!r}: it has {', '.join(types)}")
        values[key] = _convert(name, key, types[key], value)
    return method(**values)


def split_methods(text: str) -> list[str]:
    """Cuts `base,expert,in-model-contrast:beta=2,alpha=0.1` into its methods."""
    methods: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        is_setting = "=" in part and ":" not in part.partition("=")[0]
        if is_setting and methods and ":" in methods[-1]:
            methods[-1] += "," + part
        else:
            methods.append(part)
    if not methods:
        raise UserError("no method is given: use, for example, base,expert")
    return methods


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _convert(method: str, key: str, kind: Any, value: Any) -> Any:
    error = UserError(f"method {method}: {key}={value!r} is not a {getattr(kind, '__name__', kind)}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise error
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise error from None
