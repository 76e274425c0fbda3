"""Reading and changing checkpoints."""

import json
import shutil

from safetensors.numpy import load_file, save_file


def tensors_of(directory):
    tensors = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    names = [name for file in tensors for name in file]
    assert len(names) == len(set(names))
    return {name: array for file in tensors for name, array in file.items()}


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes if path.exists() else changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def changed_export(directory, path, change):
    """A copy of an export with other tensors; `change` is given all of them."""
    shutil.copytree(directory, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path
