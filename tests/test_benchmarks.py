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
    monkeypatch.setattr(bench_translate, "CORES", 2)
    out = tmp_path / "translate.json"
    monkeypatch.setattr(sys, "argv", ["bench_translate.py", "--sizes", "opus_mt_beam4", "--out", str(out)])
    bench_translate.main()
    report = json.loads(out.read_text())
    assert report["opus_mt_beam4"]["ours"]["ratio"] == 4.0
    assert report["costs"][0]["hours"] == pytest.approx(12_000_000 * 26 / 520 / 3600, abs=0.1)
    assert "at 520 tokens/s on 2 cores" in capsys.readouterr().out


def test_the_command_line_takes_sizes_of_the_machine_that_is_measured(tmp_path, monkeypatch, capsys):
    import bench_step
    import turns

    def compare(script, name, examples, rounds, sides):
        return {**{side: {"peak_mib": 1} for side in sides}, "median": dict.fromkeys(sides, 8000.0), "ratio": 1.0}

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench_step.py", *arguments, "--out", str(tmp_path / "step.json")])
        return turns.main("bench_step.py", bench_step.__doc__, bench_step.SIZES, bench_step.SIDES, "unused",
                          on_gpu=bench_step.ON_GPU, finish=bench_step.add_utilisation)

    monkeypatch.setattr(turns, "compare", compare)
    monkeypatch.setattr(bench_step, "gpu", lambda: "NVIDIA H200")
    assert {size: list(report) for size, report in main().items()} == dict.fromkeys(bench_step.SIZES,
                                                                                   ["jit", "shard_map", "pmap"])
    (size, report), = main("--gpu", "--sides", "jit").items()
    share = 8000 * bench_step.flops(size) / 989e12
    assert report["utilisation"] == {"of_teraflops": 989.0, **dict.fromkeys(("jit", "torch"), round(share, 4))}
    with pytest.raises(SystemExit):
        main("--gpu", "--sizes", "mini")
    assert "no size mini with --gpu: there are vit_b32_bert_base_bf16" in capsys.readouterr().err


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


def test_milvus_and_faiss_are_measured_beside_exact_search(tmp_path):
    pytest.importorskip("milvus_lite")
    import bench_milvus

    found = bench_milvus.measure(2000, 16, rounds=1, address=None, folder=tmp_path)
    assert [found[name]["recall"] for name in found if "PQ" not in name and "HNSW" not in name] == [1.0] * 4
    assert found["faiss HNSW"]["recall"] > 0.9 and 0 < found["faiss IVF-PQ"]["recall"] < 1
    assert found["Milvus (embedded)"]["bytes"] > found["exact (top_k)"]["bytes"] == 2000 * 16 * 4
    assert all(found[name]["milliseconds"]["alone"] > 0 for name in found)
