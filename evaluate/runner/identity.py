"""What identifies a run: its model, its methods' settings, the code and machine that made it."""

import argparse
import dataclasses
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from imae_jax import runtime
from imae_jax.convert.identity import without_places

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from imae_jax.decode import Method
    from imae_jax.language_model import LanguageModel

# The keys of `model_settings` that identify a model.
IDENTITY = ("base_model", "units", "tokenizer")


def model_settings(lm: "LanguageModel", args: argparse.Namespace) -> dict[str, Any]:
    """What identifies a model, loaded with these arguments, in `run.json` and `results.json`."""
    return {
        "model": args.model,
        "base_model": dataclasses.asdict(lm.base),
        "dtype": lm.base.dtype,
        "tokenizer": {"path": args.tokenizer, "sha256": lm.tokenizer.fingerprint},
        "anti_expert": lm.imae and lm.imae["anti_expert"],
        "units": lm.units_fingerprint,
    }


def same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two runs have one model, wherever its directory is."""
    a, b = without_places(a), without_places(b)
    return all(a.get(name) == b.get(name) for name in IDENTITY)


def method_settings(lm: "LanguageModel", method: "Method", resolved: "Method") -> dict[str, Any]:
    """A resolved method's settings, and the fingerprint of the resource that `lm` has loaded for it."""
    settings, fingerprint = resolved.settings(), lm.resource_fingerprint(method)
    return settings if fingerprint is None else settings | {"fingerprint": fingerprint}


def differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two settings differ: dotted names with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield name, a, b


def command_line(program: str, arguments: Sequence[str] | None) -> str:
    """The command line of this run, from `ArgumentParser.prog` and the arguments of `main`."""
    return shlex.join([*program.split(), *(sys.argv[1:] if arguments is None else arguments)])


def environment(mesh: "Mesh | None" = None) -> dict[str, Any]:
    """Mesh, versions, commit and machine: what figures depend on besides the settings."""
    return {
        "mesh": mesh and dict(mesh.shape),
        "versions": runtime.versions(),
        "git": runtime.git_state(),
        "machine": platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
