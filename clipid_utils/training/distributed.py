"""One update on many devices, in three forms that give the same numbers: jit over a mesh, shard_map, pmap.

- `jit_form`, the default: the update is written for one device; the arrays have a sharding (NamedSharding), and the
  compiler inserts the communication. Only this form can shard the state itself (`shard_state`).
- `shard_map_form`: the update sees one device's share, and communicates by the name of an axis, inside `jit`.
- `pmap_form`: the same in the older form, which the ancestor used. JAX only maintains it: use it to read older code.

A form takes `make_update` with every argument but `axis`, and a mesh, and returns a `Placed` step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clipid_utils.training.step import TrainState

SMALL = 2**14  # numbers: for smaller leaves a copy on each device costs less than the communication


class Placed(NamedTuple):
    """A compiled step on a mesh, and the functions that bring states and batches in and out."""

    step: Callable[[TrainState, dict], tuple[TrainState, dict]]
    place: Callable[[TrainState], TrainState]  # from a state of `init_state` to a state for `step`
    feed: Callable[[dict], dict]  # from this process's share of a batch, NumPy arrays, to a batch for `step`
    collect: Callable  # from any part of a state that `step` returned to whole arrays on this process's device
    pack: Callable[[TrainState], TrainState] = lambda state: state  # from a state of `step` to one for the disk
    unpack: Callable[[TrainState], TrainState] = lambda state: state  # and back


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """All devices of all processes (or the first `data` x `model`) as a mesh with the axes "data" and "model".

    Raises ValueError if the devices do not divide so, or if a "model" group would have devices of two processes.
    """
    count = jax.device_count()
    if model < 1 or (count % model if data is None else not 0 < data * model <= count):
        raise ValueError(f"{count} devices cannot be divided into {data or 'some'} groups of {model}: set model to a "
                         f"divisor of {count}, or set data too, and data x model to at most {count}")
    if jax.process_count() > 1 and jax.local_device_count() % model:
        raise ValueError(f"the {model} devices of a group share their rows, and would be in several processes with "
                         f"different rows: set model to a divisor of {jax.local_device_count()}")
    data = count // model if data is None else data
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2,
                         devices=jax.devices()[: data * model])


def leaf_spec(shape: tuple[int, ...], mesh: Mesh, axis: str) -> P:
    """The rule that shards a leaf: along its longest side that the axis divides; small leaves are not sharded."""
    size = mesh.shape[axis]
    sides = [side for side in range(len(shape)) if shape[side] % size == 0]
    if size == 1 or math.prod(shape) < SMALL or not sides:
        return P()
    longest = max(sides, key=lambda side: shape[side])
    return P(*(axis if side == longest else None for side in range(len(shape))))


def shard_state(state: TrainState, mesh: Mesh, params: str | None = None, optimizer: str | None = "data") -> TrainState:
    """The sharding of each leaf of a state, by `leaf_spec`.

    `params` is the axis along which parameters, frozen ones too, are sharded: None keeps a copy on every device, "data"
    is fully sharded data parallelism (FSDP; Zhao et al. 2023), and "model" uses that axis instead. `optimizer` is the
    axis for the optimizer's state and the average, which no forward pass needs (ZeRO stage 1, Rajbhandari et al. 2020).
    """

    def along(axis: str | None, tree):
        return jax.tree.map(
            lambda leaf: NamedSharding(mesh, P() if axis is None else leaf_spec(leaf.shape, mesh, axis)), tree)

    return TrainState(along(params, state.params), along(optimizer, state.average), along(optimizer, state.opt_state),
                      *(along(None, part) for part in (state.step, state.key)), along(params, state.frozen),
                      along(None, state.bad))


def _feed(mesh: Mesh) -> Callable[[dict], dict]:
    """The function that puts the rows of this process's share of a batch on its devices."""
    rows = NamedSharding(mesh, P("data"))
    return lambda batch: {name: jax.make_array_from_process_local_data(rows, np.asarray(value))
                          for name, value in batch.items()}


def _put(state, shardings):
    """A copy on the devices of the shardings: the step reuses its input's memory, and the caller keeps the original."""
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)(state)


def _collect(mesh: Mesh) -> Callable:
    whole = NamedSharding(mesh, P())
    return lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), _put(tree, whole))


def jit_form(
    make_update: Callable, mesh: Mesh, *, params: str | None = None, optimizer: str | None = "data"
) -> Placed:
    """The update under `jit`; the batch is sharded along "data", the state as `shard_state` says."""
    update = make_update(axis=None)

    def step(state, batch):
        state, metrics = update(state, batch)
        return jax.lax.with_sharding_constraint(state, shard_state(state, mesh, params, optimizer)), metrics

    def place(state):
        return _put(state, shard_state(state, mesh, params, optimizer))

    return Placed(jax.jit(step, donate_argnums=0), place, _feed(mesh), _collect(mesh))


def shard_map_form(make_update: Callable, mesh: Mesh) -> Placed:
    """The update under `shard_map`: each device of "data" calls it with its rows; each has a copy of the state."""
    whole = NamedSharding(mesh, P())
    mapped = jax.shard_map(make_update(axis="data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=P(),
                           check_vma=False)
    step = jax.jit(mapped, donate_argnums=0)
    return Placed(step, lambda state: _put(state, whole), _feed(mesh), _collect(mesh))


def pmap_form(make_update: Callable, mesh: Mesh) -> Placed:
    """The update under `pmap`: each array of the state has a first axis, one copy a device. For one process only."""
    if jax.process_count() > 1:
        raise ValueError("pmap_form is for one process; with several use jit_form or shard_map_form")
    devices = list(mesh.devices[:, 0])
    mapped = jax.pmap(make_update(axis="data"), axis_name="data", devices=devices, donate_argnums=0)
    per_device = NamedSharding(Mesh(np.array(devices), "data"), P("data"))

    def place(state):
        def copies(state):
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(devices), *x.shape)), state)

        return jax.jit(copies, out_shardings=per_device)(state)

    def feed(batch):
        return {name: np.reshape(value, (len(devices), -1, *np.shape(value)[1:])) for name, value in batch.items()}

    def first(tree):
        return jax.tree.map(lambda x: x[0], tree)  # still on all devices, a copy on each

    def step(state, batch):
        state, metrics = mapped(state, batch)
        return state, first(metrics)

    return Placed(step, place, feed, lambda tree: jax.device_put(first(tree), devices[0]), first, place)
