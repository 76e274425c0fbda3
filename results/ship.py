"""Writes a run's units as the package ships them, in float16: `python results/ship.py RUN OUT`."""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from imae_jax.convert.imae_dir import CONFIG_FILE, WEIGHTS_FILE, read_config


def main() -> None:
    run, out = map(Path, sys.argv[1:])
    units = load_file(run / "imae" / WEIGHTS_FILE)
    imae = read_config(run / "imae")
    imae["training"]["config"]["out"] = run.name  # Not where it lay on its maker's machine.
    out.mkdir(parents=True, exist_ok=True)
    halves = {name: array.astype(np.float16) for name, array in units.items()}
    (out / WEIGHTS_FILE).write_bytes(save(halves))  # `save_file` makes files that only their owner can read.
    (out / CONFIG_FILE).write_text(json.dumps(imae, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
