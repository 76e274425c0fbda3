"""Code blocks of the documentation."""

import re
import shlex
from pathlib import Path

from conftest import run_python

ROOT = Path(__file__).parents[2]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run_commands(text: str, directory: Path) -> None:
    """In their order and in one folder, since later ones use what earlier ones wrote."""
    for line in "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        assert program in ("python", "imae")
        if program == "imae":
            arguments = ["-m", "imae_jax", *arguments]
        run = run_python(arguments, directory)
        assert run.returncode == 0, f"{line}\n{run.stderr}"
