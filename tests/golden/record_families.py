"""Records the references of `test_families.py`: tiny random models of today's families, and what torch makes of them.

    pip install open_clip_torch sentence-transformers   # beside torch and transformers 5; the tests need none of them
    python tests/golden/record_families.py

Each .npz has the files of a checkpoint folder as bytes (`file:<name>`), and for each case its inputs and outputs.
Weights are drawn as in `record.py`.
"""

import functools
import json
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
import transformers
from record import EVEN, ODD, ROBERTA, WORDS, Case, pictures, random_texts, randomise, save_folder

END = 39
texts = functools.partial(random_texts, ids=(3, END), seed=5)


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def whole(name: str, model, inputs: dict[str, Case], *, masked: bool = True, size: int = 16) -> None:
    """A whole model of transformers; SigLIP's processor gives it no mask."""
    randomise(model, seed=len(name))
    cases = {}
    for case, batch in inputs.items():
        given = batch if masked else {"input_ids": batch["input_ids"]}
        out = model(pixel_values=pictures(2, size), **given)
        cases[case] = {"pixel_values": pictures(2, size), **batch, "image_embeds": out.image_embeds,
                       "text_embeds": out.text_embeds, "logits_per_image": out.logits_per_image}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_folder(name, Path(folder), cases)


def record_whole() -> None:
    lengths = [7, 3, 5]
    siglip = transformers.SiglipConfig(
        text_config={**ODD, "vocab_size": 40, "max_position_embeddings": 8, "projection_size": 24},
        vision_config={**EVEN, "image_size": 18, "patch_size": 4})  # 18 is no multiple of 4, as 384 is none of 14
    inputs = {"right": texts(lengths, 8, pad=1), "left": texts(lengths, 8, pad=1, side="left"),
              "longest": texts([8], 8)}
    whole("siglip", transformers.SiglipModel(siglip), inputs, masked=False, size=18)
    vision = {**ODD, "image_size": 16, "patch_size": 4}
    for name, end, activation in (("clip_whole", END, "gelu"), ("clip_whole_old", 2, "quick_gelu")):
        text = {**EVEN, **WORDS, "eos_token_id": end, "bos_token_id": 0, "pad_token_id": 1, "hidden_act": activation}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision | {"hidden_act": activation},
                                         projection_dim=16)
        inputs = {"padded with the end": texts(lengths, 9, end=END, pad=END),
                  "padded with 0": texts(lengths, 9, end=END), "longest": texts([10], 10, end=END)}
        whole(name, transformers.CLIPModel(config), inputs)
    text = {**EVEN, **WORDS, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    config = transformers.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=16)
    whole("metaclip_2", transformers.MetaClip2Model(config),
          {"right": texts(lengths, 9, end=2, pad=1), "longest": texts([10], 10, end=2)})


def record_towers() -> None:
    mean_cases = {"right": texts([7, 3, 5], 7), "left": texts([7, 3, 5], 7, side="left"), "one_token": texts([1], 1),
                  "longest": texts([10], 10)}
    distil = transformers.DistilBertConfig(vocab_size=40, max_position_embeddings=10, dim=24, n_layers=2, n_heads=4,
                                           hidden_dim=48)
    modern = transformers.ModernBertConfig(
        vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3,
        max_position_embeddings=24, local_attention=6, pad_token_id=0, eos_token_id=2, bos_token_id=1, cls_token_id=1,
        sep_token_id=2)
    long = {"right": texts([20, 9, 14], 20), "left": texts([20, 9, 14], 20, side="left"), "longest": texts([24], 24)}
    for name, model, cases in (("distilbert", transformers.DistilBertModel(distil), mean_cases),
                               ("modernbert", transformers.ModernBertModel(modern), long)):
        randomise(model, seed=len(name))
        found = {}
        for case, batch in cases.items():
            hidden = model(**batch).last_hidden_state
            weight = batch["attention_mask"][..., None].float()
            found[case] = {**batch, "mean": (hidden * weight).sum(1) / weight.sum(1)}
            if case != "left":
                found[case]["first"] = hidden[:, 0]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            save_folder(name, Path(folder), found)
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2,
                                       image_size=28, patch_size=4)
    model = randomise(transformers.Dinov2Model(config), seed=6)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 20}, "do_center_crop": True,
                     "crop_size": {"height": 16, "width": 16}}
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))
        pixels = pictures(2, 16)
        save_folder("dinov2", Path(folder), {"smaller pictures": {"pixel_values": pixels,
                                                           "pooled": model(pixels).pooler_output}})


def without_torchvision() -> None:
    """Gives open_clip empty modules in place of torchvision, of which it needs only names here."""
    class Anything(types.ModuleType):
        def __getattr__(self, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"BICUBIC": 3, "BILINEAR": 2, "NEAREST": 0})

    for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc"):
        module = Anything(f"torchvision{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
        parent, _, child = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def record_open_clip() -> None:
    without_torchvision()
    import open_clip
    from safetensors.torch import save_file

    def record(name: str, model_cfg: dict, hf_config: transformers.PretrainedConfig | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            if hf_config is not None:
                hf_config.save_pretrained(root / "text")
                named = {"hf_model_name": str(root / "text"), "hf_tokenizer_name": str(root / "text")}
                model_cfg = {**model_cfg, "text_cfg": {**named, **model_cfg["text_cfg"]}}
                model = open_clip.CustomTextCLIP(**{**model_cfg, "text_cfg": {
                    **model_cfg["text_cfg"], "hf_model_pretrained": False}})
                model_cfg["text_cfg"] |= {"hf_model_name": "text", "hf_tokenizer_name": "text"}
            else:
                model = open_clip.CLIP(**model_cfg)
            randomise(model, seed=len(name))
            inputs = texts([7, 3, 5], 8, end=END, pad=1 if hf_config is not None else 0)
            pixels = pictures(2, 16)
            image, words = unit(model.encode_image(pixels)), unit(model.encode_text(inputs["input_ids"]))
            settings = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
            (root / "open_clip_config.json").write_text(json.dumps(settings))
            save_file(model.state_dict(), root / "open_clip_model.safetensors")
            logits = model.logit_scale.exp() * image @ words.T
            save_folder(name, root, {"right": {"pixel_values": pixels, **inputs, "image_embeds": image,
                                               "text_embeds": words, "logits_per_image": logits}})

    vision = {"image_size": 16, "patch_size": 4, "width": 24, "layers": 2, "head_width": 6, "mlp_ratio": 2.0}
    xlm_r = transformers.XLMRobertaConfig(**ODD, **ROBERTA)
    for name, pooler, projection in (("open_clip_mean_mlp", "mean_pooler", "mlp"),
                                     ("open_clip_cls_linear", "cls_pooler", "linear")):
        text = {"hf_pooler_type": pooler, "hf_proj_type": projection}
        record(name, {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, xlm_r)
    text = {"context_length": 8, "vocab_size": 40, "width": 24, "heads": 4, "layers": 1}
    record("open_clip_own_text", {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}, None)


def record_m_clip() -> None:
    """The code of multilingual-clip's model: a transformer, the mean over the mask, and a linear layer."""
    config = transformers.XLMRobertaConfig(**ODD, **ROBERTA)
    transformer, linear = transformers.XLMRobertaModel(config), torch.nn.Linear(24, 16)
    both = randomise(torch.nn.ModuleDict({"transformer": transformer, "LinearTransformation": linear}), seed=8)
    cases = {}
    for side in ("right", "left"):
        batch = texts([7, 3, 5], 7, pad=1, side=side)
        hidden, weight = transformer(**batch)[0], batch["attention_mask"].float()
        cases[side] = {**batch, "features": linear((hidden * weight[..., None]).sum(1) / weight.sum(1)[:, None])}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config.save_pretrained(root / "base")
        (root / "config.json").write_text(json.dumps(
            {"architectures": ["MultilingualCLIP"], "model_type": "M-CLIP", "modelBase": "base", "numDims": 16,
             "transformerDimensions": 24}))
        torch.save(both.state_dict(), root / "pytorch_model.bin")
        save_folder("m_clip", root, cases)


def record_sentence_transformers() -> None:
    from sentence_transformers.models import Dense, Normalize, Pooling

    def record(name: str, model, pooling: str, *after) -> None:
        randomise(torch.nn.ModuleList([model, *after]), seed=9)
        pool = Pooling(24, pooling_mode=pooling)
        with tempfile.TemporaryDirectory() as folder:
            root, modules = Path(folder), []
            model.save_pretrained(root)
            for number, module in enumerate(after and (pool, *after) or (pool,), 1):
                path = root / f"{number}_{type(module).__name__}"
                path.mkdir()
                module.save(str(path))
                modules.append({"idx": number, "name": str(number), "path": path.name,
                                "type": f"sentence_transformers.models.{type(module).__name__}"})
            first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
            (root / "modules.json").write_text(json.dumps([first, *modules]))
            cases = {}
            for side in ("right", "left") if pooling == "mean" else ("right",):
                batch = texts([7, 3, 5], 7, side=side)
                features = {"token_embeddings": model(**batch)[0], "attention_mask": batch["attention_mask"]}
                for module in (pool, *after):
                    features = module(features)
                cases[side] = {**batch, "features": features["sentence_embedding"]}
            save_folder(name, root, cases)

    distil = transformers.DistilBertConfig(vocab_size=40, max_position_embeddings=10, dim=24, n_layers=1, n_heads=4,
                                           hidden_dim=48)
    record("st_distilbert_dense", transformers.DistilBertModel(distil), "mean",
           Dense(24, 16, bias=False, activation_function=torch.nn.Identity()))
    bert = transformers.BertModel(transformers.BertConfig(**ODD, **WORDS))
    record("st_bert_cls_tanh", bert, "cls", Dense(24, 24), Normalize())
    record("st_bert_mean", transformers.BertModel(transformers.BertConfig(**ODD, **WORDS)), "mean", Normalize())


if __name__ == "__main__":
    with torch.no_grad():
        record_whole()
        record_towers()
        record_m_clip()
        record_open_clip()
        record_sentence_transformers()
