"""Which array axis lies on which mesh axis: the only module that writes a `PartitionSpec`.

Weights and activations have different names, so that a rule for one never moves the other.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "anti_mlp": "tensor",
    "gate": None,
    "rank": None,
    "norm": None,
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices, axes `data`, `fsdp` and `tensor`.

    Args:
        data: replicas of the weights; each sees other rows.
        fsdp: shards of the weights along their `embed` axis; each sees other rows.
        tensor: shards of heads, MLP and vocabulary; all see the same rows.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    sizes, devices = (data, fsdp, tensor), jax.device_count()
    if min(sizes) < 1 or np.prod(sizes) != devices:
        raise UserError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {np.prod(sizes)} devices but there "
            f"are {devices}: choose sizes that multiply to {devices}"
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array whose axes have these logical names (None: replicated)."""
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise KeyError(f"no sharding rule for {unknown}: known names are {sorted(RULES)}")
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to its layout under the ambient mesh (`jax.set_mesh`); else a no-op."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def on_shards(
    function: Callable[..., jax.Array],
    inputs: tuple[tuple[str | None, ...], ...],
    output: tuple[str | None, ...],
) -> Callable[..., jax.Array]:
    """Runs a function on each device's part of its arguments under the ambient mesh; else as it is.

    For kernels that XLA cannot partition.

    Args:
        function: of arrays to one array, without communication between devices.
        inputs: the logical names of each argument's axes; the mesh must divide them.
        output: of the result's.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    # Kernels do not say along which mesh axes their results vary, so that this cannot be checked.
    return jax.shard_map(function, in_specs=tuple(map(spec, inputs)), out_specs=spec(output), check_vma=False)


def shardings_of(state: Any, mesh: Mesh) -> Any:
    """The shardings of a tree of NNX variables declared by `params.weight`, as a tree of same form."""
    return jax.tree.map(
        lambda variable: sharding(mesh, *variable.get_metadata("axes")),
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def check_divisible(
    config: LlamaConfig, anti_expert: AntiExpertConfig | None, mesh_shape: Mapping[str, int]
) -> None:
    """Raises a `UserError` that names the width which a mesh axis does not divide."""
    widths = {
        "tensor": {
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
        },
        "fsdp": {"hidden_size": config.hidden_size},
    }
    if anti_expert is not None:
        widths["tensor"]["anti-expert intermediate_size"] = anti_expert.intermediate_size
    for axis, sizes in widths.items():
        for name, size in sizes.items():
            if size % mesh_shape[axis]:
                raise UserError(
                    f"{name} {size} is not divisible by the mesh's {axis} axis of "
                    f"{mesh_shape[axis]}: choose {axis} so that it divides {size}"
                )
