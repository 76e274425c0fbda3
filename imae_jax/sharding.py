"""Which array axis lies on which mesh axis: the only module that writes a `PartitionSpec`.

Weights and activations have different names, so that a rule for one never moves the other.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
AUTO = "auto"

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


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices, axes `data`, `fsdp` and `tensor`.

    Args:
        data: replicas of the weights; each sees other rows.
        fsdp: shards of the weights along their `embed` axis; each sees other rows.
        tensor: shards of heads, MLP and vocabulary; all see the same rows.
        devices: others than this process's, such as those of `imae_jax.targets`.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    sizes = (data, fsdp, tensor)
    number = jax.device_count() if devices is None else len(devices)
    if min(sizes) < 1 or np.prod(sizes) != number:
        raise UserError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {np.prod(sizes)} devices but there "
            f"are {number}: choose sizes that multiply to {number}"
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def model_mesh(
    mesh: Mesh | str | None, config: LlamaConfig, anti_expert: AntiExpertConfig | None
) -> Mesh | None:
    """The mesh for a model.

    Args:
        mesh: None is the default device alone; `fsdp=2,tensor=4` names sizes, where those left out are 1, and
            `data` what the others leave; `auto` takes all devices, with the largest `tensor` that divides the
            model and the devices of a process. Of a CPU, whose devices are virtual and share its memory, it
            takes one. Of a mesh its devices along these three axes are taken, whatever its axis types.
        config, anti_expert: sizes of the model.

    Returns:
        None where there is one device.

    Raises:
        UserError: other axes than the three, sizes that do not multiply to the number of devices, or what is
            no mesh.
    """
    if mesh is None:
        return None
    if isinstance(mesh, Mesh):
        if set(mesh.axis_names) != set(MESH_AXES):
            raise UserError(
                f"the mesh has axes {', '.join(map(str, mesh.axis_names))}: it needs {', '.join(MESH_AXES)}, "
                "of size 1 where there is nothing to spread"
            )
        return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    if not isinstance(mesh, str):
        raise UserError(
            f"mesh {mesh!r} is of type {type(mesh).__name__}: give sizes such as 'fsdp=2,tensor=4', 'auto', "
            "or a jax.sharding.Mesh"
        )
    devices = jax.device_count()
    if mesh != AUTO:
        sizes = _parse_sizes(mesh)
    elif jax.default_backend() == "cpu" and jax.process_count() == 1:
        return None
    else:
        local = jax.local_device_count()
        widths = _sharded_widths(config, anti_expert)["tensor"].values()
        sizes = {"tensor": math.gcd(local, *widths)}
    sizes.setdefault("data", max(1, devices // math.prod(sizes.values())))
    made = make_mesh(**sizes)
    return made if devices > 1 else None


def _parse_sizes(text: str) -> dict[str, int]:
    """`fsdp=2,tensor=4` as a dict."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES or name in sizes or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise UserError(
                f"mesh {text!r}: {part.strip()!r} is no axis with its size: give, for example, "
                f"fsdp=2,tensor=4, each of {', '.join(MESH_AXES)} once at most"
            )
        sizes[name] = int(size)
    return sizes


def mesh_of(array: Any) -> Mesh | None:
    """The mesh over which an array is spread; None for one device."""
    placement = getattr(array, "sharding", None)
    return placement.mesh if isinstance(placement, NamedSharding) else None


def platform() -> str:
    """`cpu`, `gpu`, `tpu` or another: that of the ambient mesh's devices, else JAX's default backend."""
    mesh = jax.sharding.get_abstract_mesh()
    name = jax.default_backend() if mesh.abstract_device is None else mesh.abstract_device.platform
    return "gpu" if name == "cuda" else name


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """A context whose compiled functions run on a mesh; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def row_shards(mesh: Mesh | None = None) -> int:
    """Over how many shards the ambient mesh, or another, spreads the rows of a batch: what should divide
    their number."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[axis] for axis in RULES["batch"]) if not mesh.empty else 1


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array whose axes have these logical names (None: replicated)."""
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise KeyError(f"no sharding rule for {unknown}: known names are {sorted(RULES)}")
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to its layout under the ambient mesh (`jax.set_mesh`); else a no-op.

    An axis that the mesh does not divide, such as that of a single row, is left whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    def divides(size: int, axes: str | tuple[str, ...] | None) -> bool:
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return size % math.prod(mesh.shape[axis] for axis in axes) == 0

    partition = (
        axes if divides(size, axes) else None for size, axes in zip(x.shape, spec(names), strict=True)
    )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*partition))


def on_shards(
    function: Callable[..., jax.Array],
    inputs: tuple[tuple[str | None, ...], ...],
    output: tuple[str | None, ...],
) -> Callable[..., jax.Array]:
    """Runs a function on each device's part of its arguments under the ambient mesh; else as it is.

    For kernels that XLA cannot partition.

    Args:
        function: function of arrays to one array, without communication between devices.
        inputs: the logical names of each argument's axes; the mesh must divide them.
        output: axes of the result's.
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
    for axis, sizes in _sharded_widths(config, anti_expert).items():
        for name, size in sizes.items():
            if size % mesh_shape[axis]:
                raise UserError(
                    f"{name} {size} is not divisible by the mesh's {axis} axis of "
                    f"{mesh_shape[axis]}: choose {axis} so that it divides {size}"
                )


def _sharded_widths(config: LlamaConfig, anti_expert: AntiExpertConfig | None) -> dict[str, dict[str, int]]:
    """What a mesh axis must divide, by axis and name."""
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
    return widths
