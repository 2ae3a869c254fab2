"""Checkpoints: what comes back is what was saved, bit for bit, and nothing that goes wrong costs an earlier one."""

import json
import logging
import resource
import shutil
import signal
import subprocess
from contextlib import closing, contextmanager
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from resume_worker import Process, free_port, noise, save_and_die, share_a_checkpoint
from tiny import tiny_clip

from clipid_utils.data.batches.prefetch import Steps
from clipid_utils.training import checkpoint as module
from clipid_utils.training.checkpoint import Checkpoints
from clipid_utils.training.optimizers import adamw, muon, warmup_cosine
from clipid_utils.training.step import init_state

MODEL = tiny_clip()[0]


def values(tree):
    """All leaves as numpy, copied: keys as their data."""
    plain = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return [np.array(leaf) for leaf in jax.tree.leaves(plain)]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    for a, b in zip(values(one), values(other), strict=True):
        assert a.tobytes() == b.tobytes()


def iterator(of=40):
    return iter(grain.MapDataset.range(of).shuffle(seed=1).batch(4).to_iter_dataset())


def folders(folder):
    return sorted(path.name for path in folder.iterdir())


def frozen_half(schedule, weight_decay, clip_norm):
    """A chain and a partition with states of no leaves: EmptyState, MaskedNode."""
    labels = lambda params: jax.tree.map(lambda leaf: "on" if leaf.ndim == 2 else "off", params)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(clip_norm),
                       optax.partition({"on": optax.adam(schedule), "off": optax.set_to_zero()}, labels))


@pytest.mark.parametrize("optimizer", [adamw, muon, frozen_half])
def test_a_training_state_comes_back_bit_for_bit(tmp_path, optimizer):
    transform = optimizer(warmup_cosine(1e-2, 10, 2), 0.1, 1.0)
    _, state = init_state(MODEL, transform, seed=3)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)) if x.dtype == jnp.float32 else x, state)
    odd = jnp.asarray([np.nan, -0.0, np.inf, 1e-45], jnp.float32)
    state = state._replace(average={"odd": odd, "half": odd.astype(jnp.bfloat16)})
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(7, state, extra={"best": 0.5, "lines": [1, 2]})
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest() == 7
        restored, extra = checkpoints.restore(state)
        assert extra == {"best": 0.5, "lines": [1, 2]}
        assert_same(state, restored)
    assert (jax.random.split(restored.key) == jax.random.split(state.key)).all()


def test_keys_of_another_kind_and_many_keys_come_back(tmp_path):
    state = {"rbg": jax.random.key(1, impl="rbg"), "many": jax.random.split(jax.random.key(2), 5)}
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state)
        restored, _ = checkpoints.restore(state)
    assert_same(state, restored)
    assert jax.random.key_impl(restored["rbg"]) == jax.random.key_impl(state["rbg"])


def test_the_last_ones_are_kept(tmp_path):
    with closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        assert checkpoints.latest() is None
        for step in (9, 10, 100):
            checkpoints.save(step, noise(step))
    assert folders(tmp_path) == ["10", "100"]
    with closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        assert checkpoints.latest() == 100
        checkpoints.save(101, noise(101))
        checkpoints.wait()
        assert folders(tmp_path) == ["100", "101"]
        assert_same(noise(101), checkpoints.restore(noise(0))[0])


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(FileNotFoundError, match="has no checkpoint"):
            checkpoints.restore(noise(0))


def test_a_state_given_away_after_save_is_saved_as_it_was(tmp_path):
    place = NamedSharding(Mesh(jax.devices(), "data"), P("data"))
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for step in range(3):
            state = {str(i): jnp.asarray(np.random.default_rng(i).random((256, 1024), np.float32)) for i in range(8)}
            state |= {"spread": jax.device_put(state["0"] + 1, place)}
            expected = values(state)
            checkpoints.save(step, state)
            for _ in range(3):
                state = advance(state)
            jax.block_until_ready(state)
            restored, _ = checkpoints.restore(state)
            for a, b in zip(expected, values(restored), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_another_number_of_devices_resumes(tmp_path, devices):
    rng = np.random.default_rng(0)
    host = {"w": rng.random((16, 6), np.float32), "b": rng.random(3, np.float32)}

    def placed(count):
        mesh = Mesh(np.array(jax.devices()[-count:]), "data")
        spread, same = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        return {"w": jax.device_put(host["w"], spread), "b": jax.device_put(host["b"], same),
                "key": jax.device_put(jax.random.key(4), same)}

    for folder, before, after in [("down", 8, devices), ("up", devices, 8)]:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed(after))
        with closing(Checkpoints(tmp_path / folder)) as checkpoints:
            checkpoints.save(1, placed(before))
            restored, _ = checkpoints.restore(like)
        assert_same(placed(after), restored)
        for name, leaf in restored.items():
            assert leaf.sharding == like[name].sharding


def test_the_data_goes_on_where_it_was(tmp_path):
    data = iterator()
    for _ in range(3):
        next(data)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, noise(3), data=data)
        rest = [batch.tolist() for batch in data]
        assert len(rest) == 7
        again = iterator()
        checkpoints.restore(noise(0), data=again)
        assert [batch.tolist() for batch in again] == rest


def test_another_number_of_processes_takes_over_only_what_is_the_same_for_all(tmp_path):
    assert module._position(tmp_path, [{"step": 5}] * 4) == {"step": 5}
    assert module._position(tmp_path, [{"anything": 5}]) == {"anything": 5}
    for states in ([{"step": 5}, {"step": 6}], [{"workers_state": {}}] * 2):
        with pytest.raises(ValueError, match="written by 2 processes.* resume with 2 processes"):
            module._position(tmp_path, states)


def test_another_model_or_optimizer_is_named(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros((2, 3)), "old": jnp.zeros(2), "step": jnp.int32(1)})
        like = {"w": jnp.zeros((2, 4)), "new": jnp.zeros(2), "step": jnp.float32(1)}
        with pytest.raises(ValueError) as caught:
            checkpoints.restore(like)
        for words in (str(tmp_path / "1"), "different model or optimizer", "4 differences in all",
                      "w 'float32[2, 3]', now 'float32[2, 4]'", "old 'float32[2]', now None",
                      "step 'int32[]', now 'float32[]'"):
            assert words in str(caught.value)


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_file_is_named_and_the_step_before_it_resumes(tmp_path, damage):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, noise(step))
        checkpoints.wait()
        path = biggest_file(tmp_path / "2")
        damage(path)
        with pytest.raises(OSError) as caught:
            checkpoints.restore(noise(0))
        for words in (str(path), f"delete the folder {tmp_path / '2'};", "resumes from step 1"):
            assert words in str(caught.value)
        shutil.rmtree(tmp_path / "2")
        assert_same(noise(1), checkpoints.restore(noise(0))[0])
        checkpoints.save(2, noise(2))
        assert_same(noise(2), checkpoints.restore(noise(0))[0])


def test_every_file_that_matters_is_watched(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, noise(1))
        checkpoints.wait()
        noticed = set()
        for path in sorted((tmp_path / "1").rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                path.write_bytes(content[: len(content) // 2])
                try:
                    assert_same(noise(1), checkpoints.restore(noise(0))[0])
                except OSError as error:
                    assert str(path) in str(error) and "starts from the beginning" in str(error)
                    noticed.add(path.relative_to(tmp_path / "1").as_posix())
                path.write_bytes(content)
    sums = json.loads((tmp_path / "1" / "checksums.json").read_text())
    assert noticed == {*sums, "checksums.json"} and "run.json" in noticed
    assert any(name.startswith("ocdbt.process_0/d/") for name in noticed)  # the arrays


@contextmanager
def no_file_larger_than(size):
    """As on a full disk, a write beyond it fails; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 12 MB, where the tests may mount one."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_on_a_disk_full_at_any_point_of_a_save_the_one_before_stays(small_disk):
    run = small_disk / "run"
    with closing(Checkpoints(run)) as checkpoints:
        checkpoints.save(1, noise(1, 500_000))
    for left in (0, 4, 12, 40, 200, 1500):  # KB; a save takes 2000
        with closing(Checkpoints(run)) as checkpoints:
            (small_disk / "fill").write_bytes(bytes(shutil.disk_usage(small_disk).free - left * 1024))
            with pytest.raises(OSError, match=r"step 2 was not written \(.*No space left on device\); .* is of step 1"):
                checkpoints.save(2, noise(2, 500_000))
                checkpoints.wait()
        (small_disk / "fill").unlink()
        with closing(Checkpoints(run)) as checkpoints:
            assert_same(noise(1, 500_000), checkpoints.restore(noise(0, 500_000))[0])
    with closing(Checkpoints(run)) as checkpoints:
        checkpoints.save(2, noise(2, 500_000))
    assert folders(run) == ["1", "2"]


@pytest.mark.parametrize("told", ["wait", "save"])
def test_a_failed_save_is_told_once_and_costs_no_earlier_one(tmp_path, told):
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(1, noise(1, 10**6))
        checkpoints.wait()
        with no_file_larger_than(10**6):
            checkpoints.save(2, noise(2, 10**6))
            while checkpoints._writer._async_manager._thread.is_alive():  # it fails before the next call
                pass
        with pytest.raises(OSError) as caught:
            checkpoints.wait() if told == "wait" else checkpoints.save(3, noise(3))
        for words in (str(tmp_path), "step 2 was not written (File too large)", "last whole one is of step 1",
                      "Free space"):
            assert words in str(caught.value)
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        assert_same(noise(1, 10**6), checkpoints.restore(noise(0, 10**6))[0])
        checkpoints.save(4, noise(4))
    assert folders(tmp_path) == ["4"]


def test_the_log_is_quiet_but_for_errors(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        for step in range(3):
            checkpoints.save(step, noise(step))
        checkpoints.restore(noise(0))
        assert not caplog.records
        with no_file_larger_than(10**6), pytest.raises(OSError):
            checkpoints.save(3, noise(3, 10**6))
            checkpoints.wait()
        assert not any(record.exc_info for record in caplog.records)
    caplog.clear()
    for message in ("Task exception was never retrieved\n… in OCDBT database at …", "of something else"):
        logging.getLogger("asyncio").error(message)
    assert len(caplog.records) == 1  # other users of these loggers are heard


POINTS = ["begun", "written", "sealed"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folders of runs killed in the middle of their second save: once the folder is there, and near the end."""
    runs = {point: tmp_path_factory.mktemp(point) for point in POINTS}
    for process in [Process(save_and_die, folder, point, log=folder.with_suffix(".log"))
                    for point, folder in runs.items()]:
        process.ends(-signal.SIGKILL)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_in_the_middle_of_a_save_the_one_before_resumes(killed, point):
    folder = killed[point]
    assert [name for name in folders(folder) if name != "1"], "the kill came too early"
    with closing(Checkpoints(folder, keep=1)) as checkpoints:
        assert checkpoints.latest() == 1
        assert_same(noise(1), checkpoints.restore(noise(0))[0])
        checkpoints.save(2, noise(2))
        checkpoints.wait()
        assert folders(folder) == ["2"]
        assert_same(noise(2), checkpoints.restore(noise(0))[0])


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_that_one_process_resumes(tmp_path):
    with free_port() as port:
        for process in [Process(share_a_checkpoint, tmp_path / "run", rank, port, log=tmp_path / f"{rank}.log",
                                devices=2) for rank in range(2)]:
            process.ends(0)
    assert folders(tmp_path / "run") == ["2"]
    states = json.loads((tmp_path / "run" / "2" / "run.json").read_text())["data"]
    assert states == [{"step": 1}] * 2
    data = iter(Steps(lambda step: {"rows": np.arange(8 * step, 8 * step + 8)}))
    with closing(Checkpoints(tmp_path / "run")) as checkpoints:
        restored, _ = checkpoints.restore({"w": jnp.zeros((8, 4)), "b": jnp.zeros(3)}, data=data)
    np.testing.assert_array_equal(restored["w"], np.arange(32).reshape(8, 4))
    assert next(data)["rows"].tolist() == list(range(8, 16))
