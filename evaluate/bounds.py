"""What decoding takes on an accelerator that is not here, read from the programs that its compiler makes.

Memory is what the compiler says that a chunk of tokens holds. The time is a bound: the bytes that a step's
instructions read, over the bandwidth that the vendor publishes (the roofline model: Williams, Waterman,
Patterson, doi 10.1145/1498765.1498785). Nothing runs; dispatch, communication and arithmetic come on top.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from imae_jax.compiled import Program, held_bytes
from imae_jax.convert.random_model import abstract_model
from imae_jax.decode import Method
from imae_jax.decode.loop import compile_programs
from imae_jax.evaluate.reporting.tables import Table, number
from imae_jax.evaluate.timing import Workload
from imae_jax.sharding import make_mesh
from imae_jax.targets import Target, abstract_devices, find

GIB = 2**30


def set_up() -> None:
    """Of this process JAX needs no devices, and compiled programs cannot be read back from a cache."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


def bounds(
    target: str, tensor: int, reference: str, dtype: str | None, method: Method, workload: Workload
) -> dict[str, Any]:
    """Figures of one method on `tensor` devices of a kind, of each device.

    Args:
        target: of `imae_jax.targets`.
        tensor: how many devices share heads, MLPs and vocabulary.
        reference: whose sizes the model has, see `random_model`.
        dtype: of the base; default: the checkpoint's.
        method: not resolved.
        workload: its rows and tokens.

    Returns:
        `weight_bytes`; `cache_bytes`; `held_bytes`, with temporaries; `read_bytes`, `bound_ms`, `kernels` and
        `collectives` of a step; `layers`; `compile_s`.

    Raises:
        UserError: the target has no compiler here, or does not divide the model.
        JaxRuntimeError: the program is too large for the device (a TPU).
    """
    devices = abstract_devices(target, tensor)
    mesh = make_mesh(tensor=tensor, devices=devices) if tensor > 1 else None
    units = any(stream.strength for stream in method.streams)
    lm = abstract_model(reference, dtype=dtype, units=units, devices=devices, mesh=mesh)
    models, method = lm.prepare(method, generating=True)
    began = time.perf_counter()
    shape = (workload.batch_size, workload.prompt_tokens, workload.new_tokens)
    chunk = compile_programs(models, method, *shape).chunk
    seconds = time.perf_counter() - began
    figures = {"weight_bytes": _bytes(models.weights), "layers": lm.config.num_layers, "compile_s": seconds}
    return figures | step_figures(chunk, find(target))


def step_figures(chunk: jax.stages.Compiled, target: Target | None) -> dict[str, Any]:
    """What a compiled chunk of decoding tells of its device: see `bounds`.

    Args:
        chunk: from `compile_programs`.
        target: the device's data sheet; without one there is no bound of the time.
    """
    program = Program(chunk.as_text())
    read = program.bytes_read(program.loop)
    return {
        "cache_bytes": chunk.memory_analysis().alias_size_in_bytes,
        "held_bytes": held_bytes(chunk),
        "read_bytes": read,
        "bound_ms": target and read / target.bandwidth / 1e6,
        "kernels": program.kernels(program.loop),
        "collectives": dict(program.collectives(program.loop)),
    }


def bounds_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of `bounds` by method, of which the first is `base`."""
    columns = ("method", "weights GiB", "held GiB", "read GB/token", "× base", "bound ms/token")
    columns += ("kernels a layer", "collectives", "compile s")
    base = next(iter(rows.values()))
    cells = []
    for name, row in rows.items():
        exchanged = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items())
        cells.append(
            (
                name,
                number(row["weight_bytes"] / GIB),
                number(row["held_bytes"] / GIB),
                number(row["read_bytes"] / 1e9),
                number(row["read_bytes"] / base["read_bytes"]),
                number(row["bound_ms"]),
                number(row["kernels"] / row["layers"], 1),
                exchanged or "none",
                number(row["compile_s"], 0),
            )
        )
    return Table(title, columns, tuple(cells))


def _bytes(tree: Any) -> int:
    """On one device; of what is only shapes."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
