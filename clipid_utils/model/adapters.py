"""Low-rank adapters (LoRA, Hu et al. 2022): the blocks' matrices stay frozen, and two thin ones beside each learn.

    adapted = add_adapters(model, rank=8)     # train the parameters that fit "*.lora_*"
    model = merge_adapters(adapted)           # an ordinary model again; save_clip does this by itself
"""

from flax import nnx

from clipid_utils.model import layers


def add_adapters(model: nnx.Module, rank: int, *, sides: tuple[str, ...] = ("vision", "text"), seed: int = 0):
    """A copy of the model with adapters beside the products of attention and MLP in its blocks; its output is the same.

    The second matrix begins at 0, and the arrays of the model are shared, not copied. In EfficientNet the products are
    the convolutions of one pixel. Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of the adapters is {rank}: give 1 or more")
    model, rngs = nnx.clone(model), nnx.Rngs(seed)
    places = [(module, name) for side in sides for module, name in _places(getattr(model, side).blocks, layers.Linear)]
    for module, name in places:
        linear = getattr(module, name)
        d_in, d_out = linear.kernel.shape
        setattr(module, name, nnx.LoRA(d_in, rank, d_out, base_module=linear, dtype=linear.dtype, rngs=rngs))
    return model


def merge_adapters(model: nnx.Module):
    """The model with its adapters added to its matrices; a model without adapters as it is."""
    found = list(_places(model, nnx.LoRA))
    if not found:
        return model
    model = nnx.clone(model)
    for module, name in _places(model, nnx.LoRA):
        adapter = getattr(module, name)
        linear = adapter.base_module
        linear.kernel[...] = linear.kernel[...] + adapter.lora_a[...] @ adapter.lora_b[...]
        setattr(module, name, linear)
    return model


def _places(model: nnx.Module, kind: type) -> list[tuple[nnx.Module, str]]:
    """The modules that have a part of this kind, and its name there."""
    return [(module, name) for _, module in nnx.iter_modules(model) if not isinstance(module, nnx.LoRA)
            for name, part in vars(module).items() if isinstance(part, kind)]
