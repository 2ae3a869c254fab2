"""The losses against double loops, their laws, and one loss on eight devices in all three forms of parallel JAX."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clipid_utils.model.ops import normalize
from clipid_utils.training.loss import clip_loss, image_image_loss, positive_pairs, same_concept, siglip_loss


def naive_clip_loss(images, texts, scale, positives=None):
    """Radford et al.'s loss, one pair at a time, in float64."""
    count = len(images)
    positives = np.eye(count, dtype=bool) if positives is None else positives
    total = 0.0
    for i in range(count):
        right = [j for j in range(count) if positives[i, j]]
        to_texts = [scale * float(np.dot(images[i], texts[j])) for j in range(count)]
        to_images = [scale * float(np.dot(texts[i], images[j])) for j in range(count)]
        for logits in (to_texts, to_images):
            log_sum = max(logits) + math.log(sum(math.exp(x - max(logits)) for x in logits))
            total += sum(log_sum - logits[j] for j in right) / len(right)
    return total / (2 * count)


def naive_siglip_loss(images, texts, scale, bias, positives=None):
    """Zhai et al.'s equation 1, one pair at a time, in float64."""
    count, total = len(images), 0.0
    for i in range(count):
        for j in range(count):
            right = i == j if positives is None else positives[i, j]
            logit = scale * float(np.dot(images[i], texts[j])) + bias
            total += math.log1p(math.exp(-logit if right else logit))
    return total / count


def naive_image_image_loss(images, scale, positives):
    """Khosla et al.'s equation 2, one pair of pictures at a time, in float64; 0 where no picture has another."""
    terms = []
    for i in range(len(images)):
        others = [j for j in range(len(images)) if j != i]
        right = [j for j in others if positives[i, j]]
        if right:
            logits = {j: scale * float(np.dot(images[i], images[j])) for j in others}
            log_sum = max(logits.values()) + math.log(sum(math.exp(x - max(logits.values())) for x in logits.values()))
            terms.append(sum(log_sum - logits[j] for j in right) / len(right))
    return sum(terms) / len(terms) if terms else 0.0


def unit(rng, count, width):
    vectors = rng.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@st.composite
def embedded_batches(draw):
    """Images, texts, scale and concepts of a batch; few shapes, since JAX compiles for each."""
    count, width = draw(st.sampled_from([(2, 1), (5, 4), (9, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    concepts = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    scale = draw(st.floats(0.125, 100.0, width=32))
    return unit(rng, count, width), unit(rng, count, width), scale, jnp.asarray(concepts, jnp.int32)


def as_jax(*arrays):
    return [jnp.asarray(array) for array in arrays]


few = settings(max_examples=30)


@few
@given(embedded_batches())
def test_clip_loss_is_the_double_loop(batch):
    images, texts, scale, concepts = batch
    for positives in (None, same_concept(concepts)):
        mask = None if positives is None else np.asarray(positives)
        loss, naive = clip_loss(*as_jax(images, texts), scale, positives), naive_clip_loss(images, texts, scale, mask)
        np.testing.assert_allclose(loss, naive, rtol=1e-4, atol=1e-4)


@few
@given(embedded_batches(), st.floats(-20, 5, width=32))
def test_siglip_loss_is_the_double_loop(batch, bias):
    images, texts, scale, concepts = batch
    for positives in (None, same_concept(concepts)):
        mask = None if positives is None else np.asarray(positives)
        loss = siglip_loss(*as_jax(images, texts), scale, bias, positives)
        naive = naive_siglip_loss(images, texts, scale, bias, mask)
        np.testing.assert_allclose(loss, naive, rtol=1e-4, atol=1e-4)


@few
@given(embedded_batches())
def test_image_image_loss_is_the_double_loop(batch):
    images, _, scale, concepts = batch
    positives = same_concept(concepts)
    loss = image_image_loss(jnp.asarray(images), scale, positives)
    naive = naive_image_image_loss(images, scale, positives)
    np.testing.assert_allclose(loss, naive, rtol=1e-4, atol=1e-4)


def test_pictures_without_another_of_their_concept_are_left_out():
    images = jnp.asarray(unit(np.random.default_rng(0), 5, 4))
    value, gradient = jax.value_and_grad(image_image_loss)(images, 10.0, same_concept(jnp.arange(5)))
    assert float(value) == 0 and not np.asarray(gradient).any()


@few
@given(embedded_batches(), st.randoms())
def test_the_order_of_the_pairs_and_of_the_two_sides_does_not_matter(batch, random):
    images, texts, scale, concepts = batch
    order = np.array(random.sample(range(len(images)), len(images)))
    loss = clip_loss(*as_jax(images, texts), scale, same_concept(concepts))
    shuffled = clip_loss(*as_jax(images[order], texts[order]), scale, same_concept(concepts[order]))
    swapped = clip_loss(*as_jax(texts, images), scale, same_concept(concepts))
    np.testing.assert_allclose([shuffled, swapped], [loss, loss], rtol=1e-4, atol=1e-4)


@few
@given(embedded_batches())
def test_different_concepts_are_the_plain_loss(batch):
    images, texts, scale, _ = batch
    positives = same_concept(jnp.arange(len(images)))
    np.testing.assert_allclose(clip_loss(*as_jax(images, texts), scale, positives),
                               clip_loss(*as_jax(images, texts), scale), rtol=1e-6)


@few
@given(embedded_batches())
def test_no_loss_is_below_the_entropy_of_its_targets(batch):
    """Cross-entropy is at least the targets' own entropy: the mean log of how many positives a row has."""
    images, texts, scale, concepts = batch
    positives = same_concept(concepts)
    least = float(jnp.log(positives.sum(axis=1)).mean())
    assert float(clip_loss(*as_jax(images, texts), scale, positives)) >= least - 1e-4
    corners = jnp.eye(5)[concepts]  # the least is reached where concepts are orthogonal and pairs of one concept alike
    np.testing.assert_allclose(clip_loss(corners, corners, 100.0, positives), least, atol=1e-5)


@pytest.mark.parametrize("count", [2, 7, 64])
def test_a_model_that_knows_nothing_pays_log_batch(count):
    same = jnp.ones((count, 3)) / math.sqrt(3)
    assert float(clip_loss(same, same, 10.0)) == pytest.approx(math.log(count), rel=1e-5)


def test_equal_concepts_or_equal_captions_make_positives():
    """Both numbers of a caption have to be equal; without captions the concepts decide alone."""
    batch = {"concepts": jnp.array([1, 1, 2, 3, 4]),
             "caption_ids": jnp.array([[5, 6], [7, 8], [7, 8], [5, 9], [0, 6]], jnp.int32)}
    expected = np.eye(5, dtype=bool)
    expected[0, 1] = expected[1, 0] = True
    np.testing.assert_array_equal(positive_pairs({"concepts": batch["concepts"]}), expected)
    expected[1, 2] = expected[2, 1] = True
    np.testing.assert_array_equal(positive_pairs(batch), expected)


def products(jaxpr) -> list:
    """All matrix products of a program, also in its inner programs."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("axis", [None, "data"])
@pytest.mark.parametrize("name", ["clip", "siglip", "image_image"])
def test_logits_are_products_in_full_precision(mesh, name, axis):
    """And their gradients: a TPU's default is bfloat16."""
    def gradient(images, texts):
        def of(images, texts):
            positives = same_concept(jnp.arange(len(images)), axis)
            if name == "image_image":
                return image_image_loss(images, 3.0, positives, axis)
            return (clip_loss if name == "clip" else lambda i, t, s, p, a: siglip_loss(i, t, s, -2.0, p, a))(
                images, texts, 3.0, positives, axis)

        return jax.grad(of, (0, 1))(images, texts)

    if axis is not None:
        gradient = jax.shard_map(gradient, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    found = products(jax.make_jaxpr(gradient)(jnp.ones((16, 4)), jnp.ones((16, 4))).jaxpr)
    highest = jax.lax.Precision.HIGHEST
    assert len(found) >= 3 and all(product.params["precision"] == (highest, highest) for product in found)


def test_two_pictures_of_one_concept_are_no_negatives():
    """With the mask, moving the two apart brings nothing; without it, the loss asks for it."""
    positives = same_concept(jnp.array([4, 4, 9]))

    def loss(apart, mask):
        pairs = normalize(jnp.array([[1.0, 0, apart], [1, 0, -apart], [0, 1, 0]]))
        return clip_loss(pairs, pairs, 20.0, mask)

    assert loss(0.3, None) < loss(0.0, None)
    assert loss(0.3, positives) > loss(0.0, positives)


@pytest.mark.parametrize("loss", [clip_loss, lambda i, t, s: siglip_loss(i, t, s, -10.0)])
def test_one_pair_has_no_negatives(loss):
    with pytest.raises(ValueError, match="at least 2 pairs.*no negatives"):
        loss(jnp.ones((1, 4)), jnp.ones((1, 4)), 1.0)


def test_huge_scales_and_bfloat16_stay_finite():
    rng = np.random.default_rng(0)
    images, texts = as_jax(unit(rng, 16, 8), unit(rng, 16, 8))
    value, gradients = jax.value_and_grad(lambda i, t: clip_loss(i, t, 1e4), (0, 1))(images, texts)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert np.isfinite(siglip_loss(images, texts, 1e4, -10.0))


# --- Eight devices -------------------------------------------------------------------------------------------------

BATCH, WIDTH, EMBED = 32, 6, 8


@pytest.fixture(scope="module")
def problem():
    """Two linear towers with their scale, and a batch in which some pairs share a concept."""
    rng = np.random.default_rng(0)
    params = {"image": rng.normal(size=(WIDTH, EMBED)), "text": rng.normal(size=(WIDTH, EMBED)), "logit_scale": 1.5}
    batch = {"image": rng.normal(size=(BATCH, WIDTH)), "text": rng.normal(size=(BATCH, WIDTH))}
    params, batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))
    ids = np.stack([np.arange(BATCH) // 2 % 5, np.where(np.arange(BATCH) < 20, np.arange(BATCH) % 3, 7)], axis=1)
    return params, batch | {"concepts": jnp.asarray(rng.integers(0, 20, BATCH), jnp.int32),
                            "caption_ids": jnp.asarray(ids, jnp.int32)}


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices; conftest.py simulates them where JAX runs on the CPU")
    return Mesh(np.array(jax.devices()[:8]), ("data",))


def towers(params, batch):
    return normalize(batch["image"] @ params["image"]), normalize(batch["text"] @ params["text"])


def global_loss(params, batch):
    """As every step of this project computes it: on whatever batch there is."""
    return clip_loss(*towers(params, batch), jnp.exp(params["logit_scale"]), positive_pairs(batch))


def assert_same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)


def split(batch):
    return jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)


def test_eight_devices_by_jit_and_sharding(problem, mesh):
    params, batch = problem
    shared = jax.device_put(batch, NamedSharding(mesh, P("data")))
    assert len(shared["image"].sharding.device_set) == 8
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    assert_same(jax.jit(jax.value_and_grad(global_loss))(everywhere, shared), jax.value_and_grad(global_loss)(*problem))


def part_of(name, params, batch, masked, axis):
    """A loss of the library's on this device's share, of which `axis` has eight; without an axis on the whole batch."""
    images, texts = towers(params, batch)
    scale, positives = jnp.exp(params["logit_scale"]), positive_pairs(batch, axis) if masked else None
    if name == "clip":
        return clip_loss(images, texts, scale, positives, axis)
    if name == "siglip":
        return siglip_loss(images, texts, scale, -2.0 * params["logit_scale"], positives, axis)
    return image_image_loss(images, scale, positives, axis)


CONCEPTS = {
    "mixed": np.arange(BATCH) * 7 % 20,
    "one pair": np.where(np.isin(np.arange(BATCH), (3, 29)), 99, np.arange(BATCH)),  # of two devices, six have none
    "none": np.arange(BATCH),
    "one device's own": np.where(np.arange(BATCH) < 4, 0, np.arange(BATCH)),
    "all one": np.zeros(BATCH),
}


@pytest.mark.parametrize("form", ["shard_map", "pmap"])
@pytest.mark.parametrize("name, masked", [("clip", False), ("clip", True), ("siglip", False), ("siglip", True),
                                          ("image_image", True)])
def test_the_mean_of_the_devices_parts_is_the_whole_loss(problem, mesh, form, name, masked):
    """And the mean of their gradients its gradient, for parameters that all devices share."""
    params, batch = problem

    def part(params, batch):
        return jax.lax.pmean(jax.value_and_grad(lambda p: part_of(name, p, batch, masked, "data"))(params), "data")

    if form == "shard_map":
        mapped = jax.shard_map(part, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
        of_devices = jax.jit(mapped)
    else:
        pmapped = jax.pmap(part, axis_name="data", in_axes=(None, 0), devices=list(mesh.devices))

        def of_devices(params, batch):
            return jax.tree.map(lambda x: x[0], pmapped(params, split(batch)))

    of_whole = jax.jit(jax.value_and_grad(lambda p, b: part_of(name, p, b, masked, None)))
    alone = {key: value for key, value in batch.items() if key != "caption_ids"}  # else captions make more positives
    others = [alone | {"concepts": jnp.asarray(concepts, jnp.int32)} for concepts in CONCEPTS.values()]
    for case in [batch, *others] if masked else [batch]:
        assert_same(of_devices(params, case), of_whole(params, case))


def test_siglips_texts_go_round_and_clips_are_gathered(mesh):
    """No device has more than its share of the scores at a time: b x b, not b x B. Seen in the program itself."""
    batch, width = 8 * 4, 6

    def program(loss):
        part = jax.shard_map(lambda i, t: jax.grad(loss)(i, t)[None], mesh=mesh, in_specs=(P("data"), P("data")),
                             out_specs=P("data"), check_vma=False)
        return str(jax.make_jaxpr(part)(jnp.ones((batch, width)), jnp.ones((batch, width))))

    round_ = program(lambda images, texts: siglip_loss(images, texts, 2.0, -10.0, None, "data"))
    gathered = program(lambda images, texts: clip_loss(images, texts, 2.0, None, "data"))
    assert "ppermute" in round_ and "all_gather" not in round_ and f"f32[4,{batch}]" not in round_
    assert "all_gather" in gathered and f"f32[4,{batch}]" in gathered


@pytest.mark.parametrize("loss", [clip_loss, lambda i, t, s, p, axis: siglip_loss(i, t, s, -10.0, p, axis)])
def test_one_pair_a_device_is_enough_and_one_of_all_is_not(mesh, loss):
    """What counts is the whole batch."""
    def of(count):
        part = jax.shard_map(lambda x: jax.lax.pmean(loss(x, x, 2.0, None, axis="data"), "data"), in_specs=P("data"),
                             mesh=Mesh(mesh.devices[:count], ("data",)), out_specs=P(), check_vma=False)
        return float(part(jnp.eye(count, 4)))

    assert of(2) == pytest.approx(float(loss(jnp.eye(2, 4), jnp.eye(2, 4), 2.0, None, axis=None)), rel=1e-5)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        of(1)


def test_a_loss_per_device_is_another_loss(problem, mesh):
    """The ancestor averaged each device's loss over its own share: fewer negatives, a lower loss, other gradients."""
    params, batch = problem
    step = jax.pmap(jax.value_and_grad(global_loss), in_axes=(None, 0), devices=list(mesh.devices))
    losses, gradients = step(params, split(batch))
    loss, gradient = jax.value_and_grad(global_loss)(*problem)
    assert float(losses.mean()) < float(loss) - 0.5
    mine, theirs = (jnp.concatenate([g["image"].ravel(), g["text"].ravel()])
                    for g in (gradient, jax.tree.map(lambda g: g.mean(axis=0), gradients)))
    cosine = float(mine @ theirs / jnp.linalg.norm(mine) / jnp.linalg.norm(theirs))
    assert cosine < 0.95


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_batch_cut_into_shares_always_has_a_lower_loss(seed):
    """Every share has fewer negatives than the whole, whatever the embeddings are."""
    rng = np.random.default_rng(seed)
    images, texts = as_jax(unit(rng, 16, 4), unit(rng, 16, 4))
    shares = [float(clip_loss(images[i : i + 4], texts[i : i + 4], 5.0)) for i in range(0, 16, 4)]
    assert np.mean(shares) < float(clip_loss(images, texts, 5.0))
