"""One update on many devices, in three forms, with the same numbers in all: jit over a mesh, shard_map, pmap.

- `jit_form`, the default: the update is written as for one device; the arrays say where they lie (NamedSharding), and
  the compiler inserts the exchange. The only form in which the state itself may be cut up (`shard_state`).
- `shard_map_form`: the update sees one device's share and exchanges by name (`axis`), inside `jit`.
- `pmap_form`: the same, in the older form, in which the ancestor was written. JAX keeps it in maintenance only: use it
  to read older code.

A form takes `make_update` with everything but `axis` filled in, and a mesh, and returns a `Placed` step.
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

SMALL = 2**14  # numbers: below it a copy on each device costs less than the exchange


class Placed(NamedTuple):
    """A compiled step on a mesh, and the ways in and out of it."""

    step: Callable[[TrainState, dict], tuple[TrainState, dict]]
    place: Callable[[TrainState], TrainState]  # a state as `init_state` makes it -> as `step` takes it
    feed: Callable[[dict], dict]  # this process's share of a batch, as NumPy arrays -> as `step` takes it
    collect: Callable  # parameters, or another part of a state, as `step` gives it -> whole, on this process's device
    pack: Callable[[TrainState], TrainState] = lambda state: state  # -> as it is kept on disk
    unpack: Callable[[TrainState], TrainState] = lambda state: state  # and back


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """All devices of all processes (or the first `data` x `model`) as a mesh with the axes "data" and "model".

    Raises ValueError where they cannot be cut so, or where the devices of a "model" group would be of two processes.
    """
    count = jax.device_count()
    if model < 1 or data is None and count % model:
        raise ValueError(f"{count} devices cannot be cut into groups of {model}: choose a divisor of {count} as "
                         "model, or name data too")
    if jax.process_count() > 1 and jax.local_device_count() % model:
        raise ValueError(f"the {model} devices of a group share their rows, and would lie in several processes, each "
                         f"with rows of its own: choose a divisor of {jax.local_device_count()} as model")
    data = count // model if data is None else data
    if data * model > count or data < 1:
        raise ValueError(f"a mesh of {data} x {model} wants {data * model} devices, and there are {count}")
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2,
                         devices=jax.devices()[: data * model])


def leaf_spec(shape: tuple[int, ...], mesh: Mesh, axis: str) -> P:
    """The one rule by which a leaf is cut: along its longest side that the axis divides, or not at all when small."""
    size = mesh.shape[axis]
    sides = [side for side in range(len(shape)) if shape[side] % size == 0]
    if size == 1 or math.prod(shape) < SMALL or not sides:
        return P()
    longest = max(sides, key=lambda side: shape[side])
    return P(*(axis if side == longest else None for side in range(len(shape))))


def shard_state(state: TrainState, mesh: Mesh, params: str | None = None, optimizer: str | None = "data") -> TrainState:
    """Where each leaf of a state lies: its sharding, by `leaf_spec`.

    `params` is the axis along which parameters, frozen ones too, are cut: None keeps a copy of them on every device,
    "data" is fully sharded data parallelism (FSDP; Zhao et al. 2023), "model" cuts them across that axis instead.
    `optimizer` is the axis for the optimizer's state and the average, which no forward pass needs (ZeRO stage 1,
    Rajbhandari et al. 2020).
    """

    def along(axis: str | None, tree):
        def of(leaf) -> NamedSharding:
            return NamedSharding(mesh, P() if axis is None else leaf_spec(leaf.shape, mesh, axis))

        return jax.tree.map(of, tree)

    return TrainState(along(params, state.params), along(optimizer, state.average), along(optimizer, state.opt_state),
                      *(along(None, part) for part in (state.step, state.key)), along(params, state.frozen),
                      along(None, state.bad))


def _lay(mesh: Mesh) -> Callable[[dict], dict]:
    """Puts the rows of this process's share of a batch on its devices."""
    rows = NamedSharding(mesh, P("data"))
    return lambda batch: {name: jax.make_array_from_process_local_data(rows, np.asarray(value))
                          for name, value in batch.items()}


def _put(state, shardings):
    """A copy that the caller's arrays have no part in, since the step gives the memory of its own away."""
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)(state)


def _collect(mesh: Mesh) -> Callable:
    whole = NamedSharding(mesh, P())
    return lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), _put(tree, whole))


def jit_form(
    make_update: Callable, mesh: Mesh, *, params: str | None = None, optimizer: str | None = "data"
) -> Placed:
    """The update under `jit`, its batch cut along "data", its state as `shard_state` says."""
    update = make_update(axis=None)

    compiled: list[Callable] = []  # for the first state that comes: all of a run's are of one form

    def step(state, batch):
        if not compiled:
            shardings = shard_state(state, mesh, params, optimizer)
            compiled.append(jax.jit(update, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P()))))
        return compiled[0](state, batch)

    def place(state):
        return _put(state, shard_state(state, mesh, params, optimizer))

    return Placed(step, place, _lay(mesh), _collect(mesh))


def shard_map_form(make_update: Callable, mesh: Mesh) -> Placed:
    """The update under `shard_map`: each device of "data" calls it on its rows; the state is copied on all of them."""
    whole = NamedSharding(mesh, P())
    mapped = jax.shard_map(make_update(axis="data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=P(),
                           check_vma=False)
    step = jax.jit(mapped, donate_argnums=0)
    return Placed(step, lambda state: _put(state, whole), _lay(mesh), _collect(mesh))


def pmap_form(make_update: Callable, mesh: Mesh) -> Placed:
    """The update under `pmap`: every array of the state gets a first axis, one copy a device. One process only."""
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

    def step(state, batch):
        state, metrics = mapped(state, batch)
        return state, jax.tree.map(lambda x: x[0], metrics)

    def first(tree):
        return jax.tree.map(lambda x: x[0], tree)  # which lies on all devices still, as a copy on each

    def collect(tree):
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x.addressable_shards[0].data)[0]), tree)

    return Placed(step, place, feed, collect, first, place)
