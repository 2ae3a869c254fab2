"""Records the `.bin` files that `test_weights.py` reads: state dicts as torch itself writes them.

    python tests/golden/record_bins.py    # where torch is installed; the tests need none

Each state dict is there as torch writes it today, in its format of before 1.6 (`_old`), and as an `.npz` of the values
(bfloat16 as float32, which numpy can store and which holds it exactly).
"""

from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent


class Tied(torch.nn.Module):
    """As in a masked language model: one matrix under two names, a norm, a buffer of positions."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.register_buffer("position_ids", torch.arange(6).expand((1, -1)))


def views() -> dict[str, torch.Tensor]:
    """Every type and every way in which a tensor lies in a storage."""
    base = torch.randn(6, 5)
    return {
        "float32": base, "transposed": base.T, "tied": base, "columns": base[1:, 1:4], "every_second": base[::2, ::2],
        "one_row_repeated": base[2].expand(3, 5), "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "zero_dim": torch.tensor(2.6592), "an_element": base[3, 4], "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)), "half": torch.randn(2, 3).half(),
        "bfloat16": torch.randn(3, 2).bfloat16(), "bfloat16_transposed": torch.randn(3, 2).bfloat16().T,
        "float64": torch.randn(2, dtype=torch.float64), "int64": torch.tensor([[-(2**62), 3], [5, 2**62]]),
        "int32": torch.tensor([-7, 2**30], dtype=torch.int32), "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
    }


def record(name: str, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, HERE / f"{name}.bin")
    torch.save(state, HERE / f"{name}_old.bin", _use_new_zipfile_serialization=False)
    values = {key: (value.float() if value.dtype == torch.bfloat16 else value).detach() for key, value in state.items()}
    np.savez_compressed(HERE / f"{name}.npz", **{key: value.numpy() for key, value in values.items()})
    sizes = " and ".join(f"{(HERE / f'{name}{old}.bin').stat().st_size / 1e3:.1f}" for old in ("", "_old"))
    print(f"{name}: {len(state)} tensors, {sizes} kB")


if __name__ == "__main__":
    torch.manual_seed(0)
    record("torch_module", Tied().state_dict())
    record("torch_views", views())
