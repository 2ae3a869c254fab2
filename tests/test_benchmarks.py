"""The parts of the benchmarks that meet: what one script takes of another, without the time that they measure."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))


def test_the_costs_of_translating_come_from_the_rate_that_was_measured(tmp_path, monkeypatch, capsys):
    import bench_translate
    import turns

    def compare(script, name, examples, rounds, sides):
        rates = dict(zip(sides, (520.0, 130.0), strict=True))
        return {**{side: {"peak_mib": 1} for side in sides}, "median": rates, "ratio": 4.0}

    monkeypatch.setattr(turns, "compare", compare)
    monkeypatch.setattr("clipid_utils.data.translate.usable_cores", lambda: 2)
    out = tmp_path / "translate.json"
    monkeypatch.setattr(sys, "argv", ["bench_translate.py", "--sizes", "opus_mt_beam4", "--out", str(out)])
    bench_translate.main()
    report = json.loads(out.read_text())
    assert report["opus_mt_beam4"]["ours"]["ratio"] == 4.0
    assert report["costs"][0]["hours"] == pytest.approx(12_000_000 * 26 / 520 / 3600, abs=0.1)
    assert "at 520 tokens/s on 2 cores" in capsys.readouterr().out


def test_the_wait_for_a_batch_is_measured_beside_the_step_under_jit(monkeypatch):
    import bench_loader
    import bench_step

    class Batches:
        def __next__(self):
            return {"images": np.zeros((1, 2, 2, 3), np.uint8)}

        def close(self):
            pass

    steps = []
    monkeypatch.setattr(bench_step, "ours", lambda form, size: lambda: steps.append((form, size)))
    monkeypatch.setattr(bench_loader, "ours", lambda workers: Batches())
    found = bench_loader.waiting(0, steps=3)
    assert 0 <= found["data_wait_fraction"] <= 1 and steps == [("jit_form", "vit_b32_bert_base")] * 5
