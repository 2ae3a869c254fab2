"""Near copies: the index finds what comparing all with all finds, also in the mirror; signatures are resumed."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipid_utils.data.cleaning import near_copies as copies
from clipid_utils.data.cleaning.near_copies import KEYS, NearIndex, Signatures, near_copies, sign, sign_all, signatures


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def random_keys(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures with many near copies among them, half of these mirrored, some just beyond a limit."""
    rng = np.random.default_rng(seed)
    origin = rng.integers(0, max(1, count // 3), count)
    base = rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    shift = rng.integers(-7, 8, (count, 1, 1, 1)) * rng.choice([-1, 1], (count, 32, 32, 3), p=[0.1, 0.9])
    thumbnails = np.clip(base[origin].astype(int) + shift, 0, 255).astype(np.uint8)
    keys = np.zeros(count, KEYS)
    for name in ("hash", "mirrored"):
        flips = rng.random((count, 64)) < rng.choice([0, 0.08], (count, 1))
        keys[name] = rng.integers(0, 2**64, count, np.uint64)[origin] ^ np.packbits(flips, 1).view(np.uint64)[:, 0]
    turned = rng.random(count) < 0.5
    thumbnails[turned] = thumbnails[turned, :, ::-1]
    keys["hash"][turned], keys["mirrored"][turned] = keys["mirrored"][turned], keys["hash"][turned].copy()
    keys["sha256"][:, 0] = np.arange(count)
    return keys, thumbnails


def all_with_all(left: Signatures, right: Signatures, max_bits: int = 10, max_difference: float = 6.0) -> np.ndarray:
    """Whether each pair is a near copy [L, R], compared one by one."""
    bits = np.unpackbits((left.hashes[:, None] ^ right.hashes).view(np.uint8).reshape(-1, 8), axis=1).sum(1)
    difference = [np.abs(right.thumbnails.astype(int) - one).mean((1, 2, 3)) for one in left.thumbnails.astype(int)]
    shape = len(left.hashes), len(right.hashes)
    return (bits.reshape(shape) <= max_bits) & (np.reshape(difference, shape) <= max_difference)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 60), st.booleans(), st.sampled_from([2, 512]),
       st.sampled_from([(10, 6.0), (11, 6.0), (3, 60.0)]))
def test_the_index_finds_all_near_copies_and_no_others(seed, count, mirrored, chunk, limits):
    keys, thumbnails = random_keys(seed, count)
    among = np.flatnonzero(np.random.default_rng(seed).random(count) < 0.8)
    asked = Signatures(keys["mirrored"], thumbnails[:, :, ::-1]) if mirrored else Signatures(keys["hash"], thumbnails)
    right = Signatures(keys["hash"], thumbnails).take(among)
    expected = all_with_all(asked, right, *limits)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("CHUNK", "MAX_BITS", "MAX_DIFFERENCE"), (chunk, *limits), strict=True):
            patch.setattr(copies, name, value)
        assert near_copies(asked, right).tolist() == np.argwhere(expected).tolist()
        index = NearIndex(right.thumbnails.__getitem__)
        index.add(right.hashes)
        found = list(index.find(asked, one_is_enough=True))
    assert [row for row, _ in found] == np.flatnonzero(expected.any(1)).tolist()
    assert all(numbers[0] == expected[row].argmax() and expected[row, numbers].all() for row, numbers in found)


def test_the_pictures_of_the_test_above_have_near_copies_also_in_the_mirror():
    for seed in range(5):
        keys, thumbnails = random_keys(seed, 60)
        seen = Signatures(keys["hash"], thumbnails)
        for asked in (seen, Signatures(keys["mirrored"], thumbnails[:, :, ::-1])):
            assert 10 < (all_with_all(asked, seen) & ~np.eye(60, dtype=bool)).sum() < 60 * 59


def test_a_picture_is_not_its_own_copy():
    seen = signatures([picture(1), picture(2), picture(1)])
    index = NearIndex(seen.thumbnails.__getitem__)
    index.add(seen.hashes)
    found = {row: numbers.tolist() for row, numbers in index.find(seen, own=np.arange(3), one_is_enough=True)}
    assert found == {0: [2], 2: [0]}


def test_a_smaller_and_a_mirrored_copy_are_found():
    files = [encoded(picture(1, 400, 300), "JPEG", quality=90), encoded(picture(1, 120, 90), "JPEG", quality=60),
             encoded(picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)), encoded(picture(2))]
    keys, thumbnails = map(np.stack, zip(*map(sign, files), strict=True))
    seen, mirrored = Signatures(keys["hash"], thumbnails), Signatures(keys["mirrored"], thumbnails[:, :, ::-1])
    assert near_copies(seen, seen).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [3, 3]]
    assert near_copies(mirrored, seen).tolist() == [[0, 2], [1, 2], [2, 0], [2, 1]]


def test_the_keys_of_a_picture_are_its_hashes_and_the_sha256_of_its_file(tmp_path):
    content = encoded(picture(3))
    (tmp_path / "a.png").write_bytes(content)
    keys, thumbnail = sign(str(tmp_path / "a.png"))
    expected = signatures([picture(3)])
    assert keys["hash"] == expected.hashes[0] and (thumbnail == expected.thumbnails[0]).all()
    assert keys["mirrored"] == signatures([picture(3)], mirrored=True).hashes[0]
    assert (sign(content)[0] == keys).all() and sign(content + b" ")[0]["hash"] == keys["hash"]
    assert (sign(content + b" ")[0]["sha256"] != keys["sha256"]).any()
    assert sign(content[: len(content) // 2]) is None and sign(b"<html>") is None


def test_an_interrupted_call_continues_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "CHUNK", 2)
    files, asked = [encoded(picture(seed)) for seed in range(7)], []
    files[4] = b"broken"

    def pictures(start: int):
        for number in range(start, 7):
            asked.append(number)
            yield files[number]

    def failing(start: int):
        yield from files[start:5]
        raise KeyboardInterrupt

    whole = sign_all(pictures, 7, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        sign_all(failing, 7, tmp_path / "part")
    with open(tmp_path / "part.keys", "ab") as file:
        file.write(b"half a key")
    asked.clear()
    again = sign_all(pictures, 7, tmp_path / "part")
    assert asked == [4, 5, 6]
    assert all((one == other).all() for one, other in zip(whole, again, strict=True))
    assert [bool(key["sha256"].any()) for key in again[0]] == [True] * 4 + [False] + [True] * 2
