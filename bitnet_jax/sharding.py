"""A mesh of devices for one run: which of them holds which part of its arrays.

Axes: `data` cuts the batch and, as FSDP, the kernels and their optimizer state; `tensor` cuts heads
and feed-forward width (Megatron-LM, arXiv:1909.08053, section 3). RULES is the only place that says
so. Nothing here is needed on a single device: outside of `over` a constraint is the identity.

What travels is what the product wants. A kernel's part is quantized where it lies, with one scale
of the whole tensor, and its codes are gathered: int8, or 2 bits packed four to a byte, where a
16-bit arm gathers its kernel cast to 16 bits. The backward pass gathers them again, so that no
device keeps whole kernels of more than the block at work.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from bitnet_jax.errors import require
from bitnet_jax.initializers import RESIDUAL_PROJECTIONS

# Which mesh axis cuts which axis of the model's arrays.
RULES = {"batch": "data", "embed": "data", "heads": "tensor", "mlp": "tensor"}
AXES = ("runs", "data", "tensor")


class MeshShape(NamedTuple):
    """Devices along the axes of a run's mesh."""

    data: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        return math.prod(self)

    def __str__(self) -> str:
        return f"mesh data={self.data} tensor={self.tensor}"


ONE_DEVICE = MeshShape()


def check(shape: MeshShape, sizes: dict[str, int], batch: int) -> None:
    """Refuse a mesh that does not divide what it cuts.

    sizes: of the axes that `tensor` and `data` cut, by config key; kv heads are what attention's
      heads are cut by. batch: rows of a microbatch. available: devices there are.

    Raises:
      ConfigError: naming the key of the mesh, and what would be right.
    """
    for name, count in zip(shape._fields, shape, strict=True):
        require(count >= 1, f"mesh.{name}", count, "it must be at least 1")
    right = f"it must divide the {batch} rows of a microbatch"
    require(batch % shape.data == 0, "mesh.data", shape.data, right)
    for name, keys in (("data", ("width",)), ("tensor", ("kv_heads", "ff_width"))):
        for key in keys:
            right = f"it must divide model.{key}={sizes[key]}"
            count = getattr(shape, name)
            require(sizes[key] % count == 0, f"mesh.{name}", count, right)


@functools.cache
def mesh(shape: MeshShape, runs: int = 1) -> Mesh:
    """The first devices, as AXES."""
    count = runs * shape.size
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((runs, *shape), AXES, axis_types=types, devices=jax.devices()[:count])


@contextlib.contextmanager
def over(shape: MeshShape) -> Iterator[None]:
    """While a program is traced: its constraints are of this mesh."""
    if shape == ONE_DEVICE:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh(shape).abstract_mesh):
        yield


def constrain(x: Array, *axes: str | None) -> Array:
    """x laid out along logical axes of RULES, from its first on; None is not cut."""
    if not is_cut():
        return x
    return jax.lax.with_sharding_constraint(x, P(*(RULES.get(axis or "") for axis in axes)))


def everywhere(tree: Any) -> Any:
    """Arrays of which every device, and so every process, has all."""
    return jax.tree.map(constrain, tree)


def constrain_tree(tree: Any) -> Any:
    """Parameters, gradients or optimizer state, each laid out by its name (`layout`)."""
    if not is_cut():
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(x, layout(path, x.ndim)), tree
    )


def place(tree: Any, shape: MeshShape) -> Any:
    """Arrays on the devices of a mesh, each laid out by its name; or the shapes of such."""
    devices = mesh(shape)

    def one(path: tuple, x: Any) -> Any:
        sharding = NamedSharding(devices, layout(path, x.ndim))
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def layout(path: tuple, ndim: int) -> P:
    """Of a leaf of a parameter tree, or of one that has its structure: kernels are cut, whatever
    axes lead; all else is on every device."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    if len(names) < 2 or names[-1] != "kernel" or ndim < 2:
        return P()
    return P(*(None,) * (ndim - 2), *(RULES[axis] for axis in kernel_axes(names[-2])))


def kernel_axes(projection: str) -> tuple[str, str]:
    """Logical axes of a kernel [in, out]."""
    inner = "heads" if projection in ("q", "k", "v", "out") else "mlp"
    return (inner, "embed") if projection in RESIDUAL_PROJECTIONS else ("embed", inner)


def gathered(kernel: Array, row_parallel: bool) -> Array:
    """What there is of a kernel [1, D, F] with its FSDP parts together, which a product wants.

    Of 16-bit floats the bits travel, as they lie: a CPU's compiler would send float32.
    row_parallel: whether the `tensor` axis cuts its inputs.
    """
    if not is_cut():
        return kernel
    constrain = jax.lax.with_sharding_constraint
    if kernel.dtype not in (jnp.bfloat16, jnp.float16):
        return constrain(kernel, _whole(row_parallel))
    bits = constrain(jax.lax.bitcast_convert_type(kernel, jnp.uint16), _parts(row_parallel))
    bits = jax.lax.optimization_barrier(constrain(bits, _whole(row_parallel)))
    return jax.lax.bitcast_convert_type(bits, kernel.dtype)


def scattered(kernel: Array, row_parallel: bool) -> Array:
    """The same in parts, as the kernel itself lies."""
    if not is_cut():
        return kernel
    return jax.lax.with_sharding_constraint(kernel, _parts(row_parallel))


def _whole(row_parallel: bool) -> P:
    return P(None, *(("tensor", None) if row_parallel else (None, "tensor")))


def _parts(row_parallel: bool) -> P:
    return P(None, *(("tensor", "data") if row_parallel else ("data", "tensor")))


def is_cut() -> bool:
    """Whether the program that is being traced is one of a mesh."""
    shape = jax.sharding.get_abstract_mesh()
    return not shape.empty and "data" in shape.axis_names
