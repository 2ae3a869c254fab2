"""The search for near copies in cells finds what comparing all with all finds; signatures are resumed."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipid_utils.data.cleaning import copy_search
from clipid_utils.data.cleaning.copy_search import KEYS, CopySearch, cells, sign, sign_all
from clipid_utils.data.cleaning.near_copies import Signatures, near_copies, signatures


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def random_keys(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of which many are near copies of one another, some just beyond either limit."""
    rng = np.random.default_rng(seed)
    origin = rng.integers(0, max(1, count // 3), count)
    base = rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    shift = rng.integers(-7, 8, (count, 1, 1, 1)) * rng.choice([-1, 1], (count, 32, 32, 3), p=[0.1, 0.9])
    thumbnails = np.clip(base[origin].astype(int) + shift, 0, 255).astype(np.uint8)
    keys = np.zeros(count, KEYS)
    for name in ("hash", "mirrored"):
        flips = rng.random((count, 64)) < rng.choice([0, 0.08], (count, 1))
        keys[name] = rng.integers(0, 2**64, count, np.uint64)[origin] ^ np.packbits(flips, 1).view(np.uint64)[:, 0]
    keys["cell"], keys["sha256"][:, 0] = cells(thumbnails), np.arange(count)
    return keys, thumbnails


def pairs(search: CopySearch, rows: np.ndarray, **options) -> set[tuple[int, int]]:
    return {(row, int(other)) for row, found in search.copies(rows, **options) for other in found}


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 60), st.booleans(), st.sampled_from([3, 512]))
def test_the_search_in_cells_misses_nothing(seed, count, mirrored, chunk):
    keys, thumbnails = random_keys(seed, count)
    among = np.flatnonzero(np.random.default_rng(seed).random(count) < 0.8)
    seen = Signatures(keys["hash"], thumbnails)
    asked = Signatures(keys["mirrored"], thumbnails[:, :, ::-1]) if mirrored else seen
    expected = {(row, int(among[other])) for row, other in near_copies(asked, seen.take(among)).tolist()}
    expected = {pair for pair in expected if pair[0] != pair[1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy_search, "CHUNK", chunk)
        search = CopySearch(keys, thumbnails.__getitem__, among)
        assert pairs(search, np.arange(count), mirrored=mirrored) == expected
        some = pairs(search, np.arange(count), mirrored=mirrored, one_is_enough=True)
    assert some <= expected and {row for row, _ in some} == {row for row, _ in expected}


def test_the_pictures_of_the_test_above_do_have_near_copies():
    found = [len(pairs(CopySearch(*(made := random_keys(seed, 60))[:1], made[1].__getitem__, np.arange(60)),
                       np.arange(60))) for seed in range(5)]
    assert min(found) > 10 and max(found) < 60 * 59


def test_a_smaller_and_a_mirrored_copy_are_found():
    files = [encoded(picture(1, 400, 300), "JPEG", quality=90), encoded(picture(1, 120, 90), "JPEG", quality=60),
             encoded(picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)), encoded(picture(2))]
    signed = [sign(file) for file in files]
    keys, thumbnails = np.stack([key for key, _ in signed]), np.stack([thumbnail for _, thumbnail in signed])
    search = CopySearch(keys, thumbnails.__getitem__, np.arange(4))
    assert pairs(search, np.arange(4)) == {(0, 1), (1, 0)}
    assert pairs(search, np.arange(4), mirrored=True) == {(0, 2), (2, 0), (1, 2), (2, 1)}


def test_a_signature_is_that_of_near_copies_and_of_the_bytes(tmp_path):
    content = encoded(picture(3))
    (tmp_path / "a.png").write_bytes(content)
    keys, thumbnail = sign(str(tmp_path / "a.png"))
    expected = signatures([picture(3)])
    assert keys["hash"] == expected.hashes[0] and (thumbnail == expected.thumbnails[0]).all()
    assert keys["mirrored"] == signatures([picture(3)], mirrored=True).hashes[0]
    assert (sign(content)[0] == keys).all() and sign(content + b" ")[0]["hash"] == keys["hash"]
    assert (sign(content + b" ")[0]["sha256"] != keys["sha256"]).any()
    assert sign(content[: len(content) // 2]) is None and sign(b"<html>") is None


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(copy_search, "CHUNK", 2)
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
