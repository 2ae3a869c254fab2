"""One update in three forms on eight devices: the numbers of one device, with all that is random, cut or in chunks."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple
from unittest import mock

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import CONFIG, tiny_batch, tiny_clip

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import PRESETS
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.training import distributed
from clipid_utils.training.augment import AugmentConfig
from clipid_utils.training.distributed import Placed, jit_form, leaf_spec, make_mesh, pmap_form, shard_map_form
from clipid_utils.training.loss import clip_loss, siglip_loss
from clipid_utils.training.optimizers import adamw
from clipid_utils.training.step import TrainState, init_state, make_step, make_update

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; conftest.py simulates them on a CPU")

BATCH, STEPS, RATE = 32, 4, 0.02
FEW = 64  # numbers, in place of `SMALL`: of the tiny model's leaves too most are cut
FORMS = {"jit": jit_form, "shard_map": shard_map_form, "pmap": pmap_form}
CUT = {"params=data": (jit_form, "data", (8, 1)), "params=model": (jit_form, "model", (4, 2))}


# --- The whole step, with all that is random in it ------------------------------------------------------------------


def own_share_loss(image_embeds, text_embeds, scale, positives, axis):
    """The ancestor's: every device contrasts its own share alone, and the step takes the mean over the devices."""
    share = len(image_embeds)
    own = jax.lax.dynamic_slice_in_dim(positives, jax.lax.axis_index(axis) * share, share, axis=1)
    return clip_loss(image_embeds, text_embeds, scale, own)


LOSSES = {"clip": clip_loss, "siglip": siglip_loss, "own share": own_share_loss}


@functools.cache
def model_and_processor(bias: bool):
    """The tiny model with one block in each tower, which compiles in half the time of two."""
    one = {"vision": dataclasses.replace(CONFIG.vision, layers=1), "text": dataclasses.replace(CONFIG.text, layers=1)}
    return tiny_clip(logit_scale=1.0, **one, **({"logit_bias": -2.0} if bias else {}))


def batch_of(number: int) -> dict:
    """Pairs that share concepts, and one picture that is in the shares of two devices."""
    batch = tiny_batch(model_and_processor(False)[1], BATCH, seed=number)
    batch["images"][BATCH - 1] = batch["images"][0]
    return batch


class Run(NamedTuple):
    placed: Placed
    start: TrainState  # as it was given to `place`, after all steps
    before: Any  # a copy of it, as NumPy arrays, from before the first one
    metrics: list[dict]
    gradients: dict  # of the first step
    params: dict
    average: dict
    state: TrainState  # as the form has it at the end


def as_numpy(tree):
    """A copy; of a random key its data."""

    def copy(leaf):
        return np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    return jax.tree.map(copy, tree)


def flat(params) -> dict:
    return {name: np.array(value) for name, value in flatten_params(params).items()}


def run(form: str, loss: str = "clip", chunks: int = 1, remat: bool = False) -> Run:
    """Steps of SGD with momentum, whose state after the first step is the gradient. Compiled once for all tests."""
    return _run(form, loss, chunks, remat)


@functools.cache
def _run(form: str, loss: str, chunks: int, remat: bool) -> Run:
    model, processor = model_and_processor(loss == "siglip")
    optimizer = optax.sgd(RATE, momentum=0.9)
    graph, start = init_state(model, optimizer, seed=0)
    options = {
        "image_mean": processor.image_mean, "image_std": processor.image_std, "drop_path": 0.4, "keep_patches": 3,
        "augmentation": AugmentConfig(), "image_image": 0.5, "loss": LOSSES[loss], "chunks": chunks, "remat": remat,
    }
    if loss == "siglip":  # what is slow to compile is not everywhere
        options |= {"augmentation": None, "image_image": 0.0}
    before = as_numpy(start)
    if form == "one":
        step = make_step(graph, optimizer, **options)
        placed = Placed(step, lambda state: jax.tree.map(jnp.array, state), lambda batch: batch, lambda tree: tree)
    elif form in CUT:
        make, params, sides = CUT[form]
        placed = make(functools.partial(make_update, graph, optimizer, **options), make_mesh(*sides), params=params)
    else:
        placed = FORMS[form](functools.partial(make_update, graph, optimizer, **options), make_mesh())
    with mock.patch.object(distributed, "SMALL", FEW):
        state, metrics, gradients = placed.place(start), [], None
        for number in range(STEPS):
            state, values = placed.step(state, placed.feed(batch_of(number)))
            metrics.append({name: float(value) for name, value in values.items()})
            if gradients is None:
                gradients = flat(optax.tree.get(placed.collect(state.opt_state), "trace"))
    params, average = placed.collect((state.params, state.average))
    return Run(placed, start, before, metrics, gradients, flat(params), flat(average), state)


def assert_same(one: Run, other: Run) -> None:
    """Every metric of every step, the first gradient, the parameters and their average at the end."""
    for step, (mine, theirs) in enumerate(zip(one.metrics, other.metrics, strict=True)):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5), step
    for part in ("gradients", "params", "average"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-5, err_msg=f"{part} {name}")


@pytest.mark.parametrize("form, loss", [*((form, "clip") for form in FORMS), ("shard_map", "siglip")])
def test_eight_devices_take_the_steps_of_one(form, loss):
    assert_same(run(form, loss), run("one", loss))


@pytest.mark.parametrize("form", CUT)
def test_a_state_in_pieces_takes_the_same_steps(form):
    assert_same(run(form), run("one"))


@pytest.mark.parametrize(
    "form, loss, remat", [("one", "clip", False), ("jit", "clip", True), ("shard_map", "siglip", False)]
)
def test_the_gradient_in_chunks_is_that_of_the_whole_batch(form, loss, remat):
    """With the keys drawn again: augmentation, drop_path and keep_patches are those of the whole batch.

    Once with each block computed anew in the backward pass too.
    """
    assert_same(run(form, loss, chunks=4, remat=remat), run("one", loss))


def test_these_steps_train_and_are_random():
    """Else the tests above would compare little: every leaf moves, and another key gives another loss."""
    for loss in ("clip", "siglip"):
        made = run("one", loss)
        for name, value in flat(made.start.params).items():
            assert np.abs(made.params[name] - value).max() > (0 if "k_proj.bias" in name else 1e-4), name
    made = run("one")
    state = made.placed.place(made.start._replace(key=jax.random.key(1)))
    _, values = made.placed.step(state, batch_of(0))
    assert abs(float(values["loss"]) - made.metrics[0]["loss"]) > 1e-3


@pytest.mark.parametrize("form", ["one", *FORMS])
def test_the_first_bad_step_is_named_by_all_forms(form):
    made = run(form)
    start = made.start
    kernel = start.params["vision"]["projection"]["kernel"]
    params = jax.tree.map(lambda x: x, start.params)
    params["vision"]["projection"]["kernel"] = kernel.replace(kernel[...].at[0, 0].set(jnp.nan))
    with mock.patch.object(distributed, "SMALL", FEW):
        state = made.placed.place(start._replace(params=params, step=jnp.int32(7)))
    for _ in range(2):
        state, values = made.placed.step(state, made.placed.feed(batch_of(0)))
    assert int(values["bad_step"]) == 7
    assert made.metrics[-1]["bad_step"] == -1


def test_the_ancestors_loss_per_device_is_another_one():
    """Each of its devices has 3 negatives a pair and not 31: a lower loss, another gradient, other parameters."""
    ancestor, whole = run("pmap", "own share"), run("one")
    assert ancestor.metrics[0]["loss"] < whole.metrics[0]["loss"] - 1
    assert abs(ancestor.metrics[0]["gradient_norm"] / whole.metrics[0]["gradient_norm"] - 1) > 0.05
    mine, theirs = (np.concatenate([value.ravel() for value in made.gradients.values()]) for made in (ancestor, whole))
    cosine = mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs)
    assert cosine < 0.95
    apart = max(np.abs(value - whole.params[name]).max() for name, value in ancestor.params.items())
    assert apart > 1e-2


@pytest.mark.parametrize("form", [*FORMS, *CUT])
def test_the_callers_state_outlives_the_steps(form):
    """Steps reuse the memory of the state that they are given; the one that was placed is the caller's still."""
    made = run(form)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(made.start), made.before)


def test_chunks_must_divide_a_devices_share():
    model, processor = model_and_processor(False)
    graph, state = init_state(model, optax.sgd(0.1), seed=0)
    update = make_update(graph, optax.sgd(0.1), image_mean=processor.image_mean, image_std=processor.image_std,
                         augmentation=None, chunks=3)
    with pytest.raises(ValueError, match="a device's 32 pairs cannot be divided into 3 chunks"):
        jax.eval_shape(update, state, batch_of(0))


# --- Where the leaves lie ---------------------------------------------------------------------------------------------


def bytes_per_device(tree) -> dict:
    """The parts of a tree's arrays that each device holds."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held


def share_held(tree) -> float:
    """The part of a tree's bytes that the fullest device holds; the tree lies on all of them."""
    held = bytes_per_device(tree)
    assert min(held.values()) > 0
    return max(held.values()) / sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@given(st.lists(st.integers(1, 600), max_size=4), st.sampled_from([1, 2, 4, 8]), st.sampled_from(["data", "model"]))
def test_a_leaf_is_cut_along_its_longest_side_that_divides(shape, data, axis):
    mesh = make_mesh(data, 8 // data)
    size, spec = mesh.shape[axis], leaf_spec(tuple(shape), mesh, axis)
    shard = NamedSharding(mesh, spec).shard_shape(tuple(shape))
    cut = [side for side, name in enumerate(spec) if name is not None]
    fitting = [side for side, length in enumerate(shape) if length % size == 0]
    if size == 1 or math.prod(shape) < distributed.SMALL or not fitting:
        assert spec == P() and shard == tuple(shape)
    else:
        assert len(cut) == 1 and spec[cut[0]] == axis
        assert cut[0] in fitting and shape[cut[0]] == max(shape[side] for side in fitting)
        assert math.prod(shard) * size == math.prod(shape)


@pytest.mark.parametrize("shape, spec", [
    ((), P()), ((8,), P()), ((128, 127), P()), ((128, 128), P("data", None)), ((768, 3072), P(None, "data")),
    ((30521, 768), P(None, "data")), ((16385,), P()), ((16384,), P("data")), ((127, 129), P()),
])
def test_which_leaves_are_cut(shape, spec):
    assert leaf_spec(shape, make_mesh(), "data") == spec


@pytest.mark.parametrize("sides, params, of_params, of_optimizer", [
    ((8, 1), None, 1, 1 / 8), ((8, 1), "data", 1 / 8, 1 / 8), ((4, 2), "model", 1 / 2, 1 / 4),
])
def test_a_device_holds_its_part_of_the_mini_model(sides, params, of_params, of_optimizer):
    """In bytes, of AdamW's two moments too: what is small, and copied, adds a few percent."""
    model = HybridCLIP(PRESETS["mini"], rngs=nnx.Rngs(0))
    optimizer = adamw(1e-3, 0.1, 1.0)
    _, state = init_state(model, optimizer, 0, ["text.*", "logit_scale"])
    placed = jit_form(lambda axis: lambda state, batch: (state, {}), make_mesh(*sides), params=params).place(state)
    for tree, part in ((placed.params, of_params), (placed.frozen, of_params), (placed.average, of_optimizer),
                       (placed.opt_state, of_optimizer)):
        assert part <= share_held(tree) < part * 1.15
    assert share_held(placed.bad) == 1


@pytest.mark.parametrize("form", ["jit", *CUT])
def test_the_state_lies_cut_after_the_steps(form):
    """As it was placed: a compiled step may not put it together again."""
    _, params, sides = CUT.get(form, (None, None, (8, 1)))
    mesh, state = make_mesh(*sides), run(form).state
    with mock.patch.object(distributed, "SMALL", FEW):
        for tree, axis in ((state.params, params), (state.average, "data"), (state.opt_state, "data")):
            for leaf in jax.tree.leaves(tree):
                spec = P() if axis is None else leaf_spec(leaf.shape, mesh, axis)
                expected = NamedSharding(mesh, spec).shard_shape(leaf.shape)
                assert [shard.data.shape for shard in leaf.addressable_shards] == [expected] * 8
    assert share_held(state.opt_state) < 1.3 / sides[0]
    assert share_held(state.params) < 1.3 / (1 if params is None else mesh.shape[params])


# --- The ways in and out, with an update of a few operations ----------------------------------------------------------


def pull(axis=None):
    """The parameters go towards the batch's mean row, each step a tenth of the way, plus a frozen offset."""

    def update(state, batch):
        mean = batch["rows"].mean(axis=0)
        mean = mean if axis is None else jax.lax.pmean(mean, axis)
        params = {"w": state.params["w"] + 0.1 * (mean - state.params["w"]) + state.frozen["offset"]}
        return state._replace(params=params, step=state.step + 1), {"mean": mean.sum()}

    return update


@pytest.fixture
def toy():
    """A state with all kinds of leaves in it, one large enough to be cut."""
    return TrainState(
        params={"w": jnp.arange(4.0)}, average={"w": jnp.ones(4)},
        opt_state=({"moment": jnp.arange(2.0**15).reshape(-1, 8)}, jnp.int32(3)), step=jnp.int32(5),
        key=jax.random.key(3), frozen={"offset": jnp.full((4,), 0.5)}, bad=jnp.int32(-1),
    )


ROWS = {"rows": np.arange(64, dtype=np.float32).reshape(16, 4), "number": np.arange(16, dtype=np.int32),
        "flag": np.arange(16) % 3 == 0, "images": np.arange(16 * 12, dtype=np.uint8).reshape(16, 2, 2, 3)}
ways = pytest.mark.parametrize("form", FORMS)
meshes = pytest.mark.parametrize("sides", [(8, 1), (4, 2)])


@ways
@meshes
def test_what_is_fed_comes_out(form, sides):
    fed = FORMS[form](pull, make_mesh(*sides)).feed(ROWS)
    assert fed.keys() == ROWS.keys()
    for name, value in ROWS.items():
        assert fed[name].dtype == value.dtype
        np.testing.assert_array_equal(np.reshape(fed[name], value.shape), value)


@pytest.mark.parametrize("form", ["jit", "shard_map"])
def test_every_device_is_fed_its_rows_in_their_order(form):
    mesh = make_mesh(4, 2)
    for name, value in FORMS[form](pull, mesh).feed(ROWS).items():
        shares = {shard.device: np.asarray(shard.data) for shard in value.addressable_shards}
        for number, devices in enumerate(mesh.devices):
            for device in devices:
                np.testing.assert_array_equal(shares[device], ROWS[name][4 * number : 4 * number + 4])


@ways
@meshes
def test_what_is_placed_is_collected(form, sides, toy):
    placed = FORMS[form](pull, make_mesh(*sides))
    state = placed.place(toy)
    parts = ("params", "average", "opt_state", "step", "frozen", "bad")
    whole = placed.collect({part: getattr(state, part) for part in parts})
    for part in parts:
        jax.tree.map(np.testing.assert_array_equal, whole[part], getattr(toy, part))
        for mine, theirs in zip(jax.tree.leaves(whole[part]), jax.tree.leaves(getattr(toy, part)), strict=True):
            assert mine.dtype == theirs.dtype and len(mine.sharding.device_set) == 1


@ways
@meshes
def test_a_state_on_disk_has_no_axis_of_devices_and_comes_back(form, sides, toy):
    """Packed, all forms have the leaves of `init_state`: one form can continue from the state of a different one."""
    placed = FORMS[form](pull, make_mesh(*sides))
    packed = placed.pack(placed.place(toy))
    assert jax.tree.structure(packed) == jax.tree.structure(toy)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(packed), as_numpy(toy))
    back = placed.unpack(packed)
    assert [leaf.shape for leaf in jax.tree.leaves(back)] == [leaf.shape for leaf in jax.tree.leaves(placed.place(toy))]
    state, values = placed.step(back, placed.feed(ROWS))
    assert float(values["mean"]) == pytest.approx(ROWS["rows"].mean(axis=0).sum())
    assert int(placed.collect(state.step)) == 6


@ways
@meshes
def test_steps_leave_the_callers_state_and_take_the_placed_one(form, sides, toy):
    placed, before, rows = FORMS[form](pull, make_mesh(*sides)), as_numpy(toy), np.copy(ROWS["rows"])
    first = state = placed.place(toy)
    expected = before.params["w"]
    for _ in range(3):
        state, _ = placed.step(state, placed.feed(ROWS))
        expected = expected + 0.1 * (rows.mean(axis=0) - expected) + 0.5
    np.testing.assert_allclose(placed.collect(state.params)["w"], expected, rtol=1e-5)
    assert first.params["w"].is_deleted()  # its memory was used again
    jax.tree.map(np.testing.assert_array_equal, as_numpy(toy), before)
    np.testing.assert_array_equal(ROWS["rows"], rows)


def test_pmap_is_for_one_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="pmap_form is for one process; with several use jit_form or shard_map_form"):
        pmap_form(pull, make_mesh())


@pytest.mark.parametrize("sides, shape", [
    ({}, (8, 1)), ({"model": 2}, (4, 2)), ({"model": 8}, (1, 8)), ({"data": 1}, (1, 1)), ({"data": 3}, (3, 1)),
    ({"data": 2, "model": 3}, (2, 3)),
])
def test_a_mesh_takes_the_first_devices(sides, shape):
    mesh = make_mesh(**sides)
    assert mesh.axis_names == ("data", "model") and mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices()[: math.prod(shape)])


def test_devices_that_share_their_rows_are_of_one_process(monkeypatch):
    """Two processes would put different pictures under the same rows."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert make_mesh(model=4).devices.shape == (2, 4)
    with pytest.raises(ValueError, match="a divisor of 4"):
        make_mesh(model=8)


@pytest.mark.parametrize("sides", [
    {"data": 9}, {"data": 5, "model": 2}, {"data": 0}, {"data": -1}, {"model": 9}, {"data": 1, "model": 0},
    {"model": 0}, {"model": -1}, {"model": 3},
])
def test_a_mesh_that_cannot_be(sides):
    """The last one would leave two of eight devices idle, and say nothing."""
    with pytest.raises(ValueError, match="devices"):
        make_mesh(**sides)
