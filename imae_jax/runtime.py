"""What a command sets up in its process, and what it runs on."""

import os
import subprocess
from importlib.metadata import version
from pathlib import Path

from imae_jax import __version__


def set_up() -> None:
    """Quiets third-party chatter and keeps compiled programs for the next run. Not for library code.

    Programs go to `$JAX_COMPILATION_CACHE_DIR`, else to `~/.cache/imae_jax/xla`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        directory = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(directory / "imae_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def versions() -> dict[str, str]:
    """Versions of this library and of what its numbers depend on, and the kind of device."""
    names = ("jax", "jaxlib", "flax", "optax", "tokenizers", "numpy")
    import jax

    device = {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind}
    return {"imae_jax": __version__} | device | {name: version(name) for name in names}


def git_state() -> dict[str, str | bool] | None:
    """Commit of the checkout that this library runs from, and whether files differ; None if installed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
