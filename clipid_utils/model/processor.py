"""From pictures and texts to the arrays the model takes: `CLIPProcessor(images=…, text=…)`.

The folder is a standard one: `transformers.AutoTokenizer` and `CLIPImageProcessor` open what `save` writes, and `load`
opens theirs of CLIP, ViT, BERT, RoBERTa and XLM-RoBERTa.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from clipid_utils.files import open_picture, to_rgb
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.model.pretrained.processor_files import (
    IMAGE_MEAN,
    IMAGE_STD,
    NO_LENGTH,
    TOKENIZER_FILES,
    read_preprocessor,
    read_tokenizer,
    write_json,
)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MOST_PIXELS = 2**24


def train_wordpiece(captions: Iterable[str], vocab_size: int = 4000) -> Tokenizer:
    """A lower-casing WordPiece tokenizer (Schuster & Nakajima 2012, as in BERT) learned from `captions`.

    The same captions give the same tokenizer.
    """
    captions = list(captions)
    learner = _bert_tokenizer(models.WordPiece(unk_token="[UNK]"))
    letters = sorted({c for caption in captions for c in learner.normalizer.normalize_str(caption) if not c.isspace()})
    # The trainer numbers letters inside words in the order of a hash table and breaks ties by number: name them first
    learner.train_from_iterator(captions, trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *("##" + c for c in letters)], show_progress=False
    ))
    tokenizer = _bert_tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return tokenizer


def _bert_tokenizer(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def resize_and_crop(
    image: Image.Image, size: int, resize: int | tuple[int, int] | None = None,
    resample: int = Image.Resampling.BICUBIC,
) -> UInt8[np.ndarray, "H W 3"]:
    """The middle square of a picture whose short side was brought to `size` pixels (bicubic), as CLIP does.

    `resize` is another length for the short side, or the (height, width) to which the picture is stretched, as for ViT;
    where that is less than `size` the rest is black. For RGB pictures the same bytes as CLIPImageProcessor's (PIL), but
    where that would build a picture of over 2**24 pixels (at 224 of one 335 times as long as wide): the square alone is
    built then, whose values may be rounded otherwise.
    """
    image, resize = to_rgb(image), size if resize is None else resize
    if isinstance(resize, int):
        width, height = (int(side * resize / min(image.size)) for side in image.size)
    else:
        height, width = resize
    left, top = (width - size) // 2, (height - size) // 2
    if width * height > MOST_PIXELS and left >= 0 and top >= 0:
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return np.asarray(image.resize((size, size), resample, box=box))
    return np.asarray(image.resize((width, height), resample).crop((left, top, left + size, top + size)))


def _decode(picture: object, **settings) -> np.ndarray:
    return resize_and_crop(open_picture(picture), **settings)


class CLIPProcessor:
    """Images and texts to numpy arrays.

    `tokenizer` is one of `tokenizers` (with its `special_tokens` where they are not BERT's), one of transformers, which
    brings them along, or None, which refuses texts. `truncated` counts the texts cut to `max_length` tokens since the
    processor was made; the first cut warns. For `resize` and `resample` see `resize_and_crop`.
    """

    def __init__(
        self, tokenizer: Tokenizer | Any | None, image_size: int, max_length: int,
        image_mean: Sequence[float] = IMAGE_MEAN, image_std: Sequence[float] = IMAGE_STD, *,
        resize: int | tuple[int, int] | None = None, resample: int = Image.Resampling.BICUBIC,
        special_tokens: dict[str, str] | None = None, padding_side: str = "right", truncation_side: str = "right",
    ):
        if hasattr(tokenizer, "backend_tokenizer"):  # transformers
            special_tokens = special_tokens or {
                name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}
            padding_side, truncation_side = tokenizer.padding_side, tokenizer.truncation_side
            tokenizer = tokenizer.backend_tokenizer
        self.image_size, self.max_length = image_size, max_length
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.resize, self.resample = image_size if resize is None else resize, resample
        self.special_tokens = special_tokens or {token[1:-1].lower() + "_token": token for token in SPECIAL_TOKENS}
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self.tokenizer = tokenizer
        self.truncated = 0
        if tokenizer is None:
            return
        self.pad_token = self.special_tokens.get("pad_token")
        self.pad_id = None if self.pad_token is None else tokenizer.token_to_id(self.pad_token)
        if self.pad_id is None:
            raise ValueError(f"the tokenizer has no padding token {self.pad_token!r}: name the one it has, "
                             "special_tokens={'pad_token': …}")

    def __call__(
        self, images: Sequence[Image.Image] | Image.Image | None = None, text: Sequence[str] | str | None = None
    ) -> dict:
        """`pixel_values` [B, H, W, 3] float32 for images; `input_ids` and `attention_mask` [B, L] int32 for text."""
        if images is None and text is None:
            raise ValueError("give the processor images=[PIL pictures], text=[strings], or both")
        batch = {}
        if images is not None:
            images = [images] if isinstance(images, Image.Image) else list(images)
            if not images:
                raise ValueError("images is empty: give the processor at least one picture")
            pixels = [resize_and_crop(image, self.image_size, self.resize, self.resample) for image in images]
            batch["pixel_values"] = self.normalize(np.stack(pixels))
        if text is not None:
            batch.update(self.tokenize([text] if isinstance(text, str) else list(text)))
        return batch

    @property
    def decoder(self) -> Callable[[object], np.ndarray]:
        """From a picture (path, bytes, PIL, or a dict of datasets) to its uint8 pixels [S, S, 3]."""
        return functools.partial(_decode, size=self.image_size, resize=self.resize, resample=self.resample)

    def normalize(self, pixels: UInt8[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B H W 3"]:
        """uint8 pixels to float32 with CLIP's mean and standard deviation."""
        wide = pixels.shape[:2] + (3 * pixels.shape[2],)  # colours side by side: long rows are what numpy is fast at
        mean, std = (np.tile(np.asarray(v, np.float32), pixels.shape[2]) for v in (self.image_mean, self.image_std))
        out = np.empty(wide, np.float32)
        for picture, row in zip(pixels.reshape(wide), out, strict=True):  # one at a time stays in the cache
            np.divide(picture, np.float32(255), out=row)
            row -= mean
            row /= std
        return out.reshape(pixels.shape)

    def tokenize(
        self, texts: Sequence[str], length: int | None = None, multiple: int = 1, *, mark_truncated: bool = False
    ) -> dict[str, Int[np.ndarray, "B L"] | Bool[np.ndarray, " B"]]:
        """Token ids and mask, padded to the longest text, rounded up to a `multiple`, or to `length`.

        The ids are AutoTokenizer's, padded and cut on the sides it would; an empty text raises ValueError. With
        `mark_truncated` a third array, `truncated`, says which texts were cut.
        """
        if self.tokenizer is None:
            raise ValueError("this checkpoint came without a tokenizer: name where its is, load_clip(…, tokenizer=…)")
        if not len(texts):
            raise ValueError("text is empty: give the processor at least one string")
        for row, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"text[{row}] is {text!r}: an empty caption matches nothing; drop it or write one")
        limit = min(self.max_length, length or self.max_length)
        ids = [encoding.ids for encoding in self._whole().encode_batch(list(texts))]
        long = [row for row, tokens in enumerate(ids) if len(tokens) > limit]
        if long and not self.truncated:
            longest = max(map(len, ids))
            warnings.warn_explicit(  # the file as the repository names it: a notebook holds no machine's path
                f"{len(long)} of {len(ids)} texts are cut to {limit} tokens (the longest has {longest}); further cuts "
                "are counted in processor.truncated", UserWarning, "clipid_utils/model/processor.py", 0)
        self.truncated += len(long)
        for row in long:
            ids[row] = self._cut(texts[row], limit)
        width = length or min(self.max_length, -(-max(map(len, ids)) // multiple) * multiple)
        input_ids = np.full((len(ids), width), self.pad_id, np.int32)
        attention_mask = np.zeros((len(ids), width), np.int32)
        for row, tokens in enumerate(ids):
            start = width - len(tokens) if self.padding_side == "left" else 0
            input_ids[row, start : start + len(tokens)] = tokens
            attention_mask[row, start : start + len(tokens)] = 1
        marks = {"truncated": np.isin(np.arange(len(ids)), long)} if mark_truncated else {}
        return {"input_ids": input_ids, "attention_mask": attention_mask, **marks}

    def _whole(self) -> Tokenizer:
        """The tokenizer, neither cutting nor padding, whatever its file or another of its users has set."""
        if self.tokenizer.truncation is not None:  # asked first: no change under another thread's use
            self.tokenizer.no_truncation()
        if self.tokenizer.padding is not None:
            self.tokenizer.no_padding()
        return self.tokenizer

    def _cut(self, text: str, limit: int) -> list[int]:
        """`limit` ids: the special tokens all stay, the text gives way."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        room = limit - self.tokenizer.num_special_tokens_to_add(False)
        if room < 1:
            raise ValueError(f"{limit} tokens leave no room for a text: give {limit - room + 1} or more")
        encoding.truncate(room, direction=self.truncation_side)
        return self.tokenizer.post_process(encoding).ids

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and preprocessor_config.json into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is None:
            for name in (*TOKENIZER_FILES, "tokenizer_config.json"):  # another's would be taken for this one's
                (folder / name).unlink(missing_ok=True)
        else:
            partial = folder / "tokenizer.json.partial"
            self._whole().save(str(partial))
            partial.replace(folder / "tokenizer.json")
            write_json(folder / "tokenizer_config.json", {
                "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.max_length,
                "padding_side": self.padding_side, "truncation_side": self.truncation_side, **self.special_tokens,
            })
        stretched = not isinstance(self.resize, int)
        size = {"height": self.resize[0], "width": self.resize[1]} if stretched else {"shortest_edge": self.resize}
        (folder / "processor_config.json").unlink(missing_ok=True)  # an older save's, by transformers, which prefers it
        write_json(folder / "preprocessor_config.json", {
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
            "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": int(self.resample),
            "size": size, "crop_size": {"height": self.image_size, "width": self.image_size},
            "rescale_factor": 1 / 255, "image_mean": list(self.image_mean), "image_std": list(self.image_std),
        })

    @classmethod
    def load(
        cls, folder: Path, text_folder: Path | None = None, *, needs_tokenizer: bool = True
    ) -> "CLIPProcessor":
        """The processor of a checkpoint folder: what `save` wrote, or one of transformers with its own tokenizer.

        `text_folder` holds the tokenizer where the two towers come from two folders. Without preprocessor_config.json
        pictures are made as CLIP's, at the size that config.json states. A missing file raises FileNotFoundError and
        one that cannot be followed ValueError; both name it. Where no tokenizer is there and `needs_tokenizer` is
        False, only texts will be refused.
        """
        folder, text_folder = Path(folder), Path(folder if text_folder is None else text_folder)
        if not needs_tokenizer and not any((text_folder / name).is_file() for name in TOKENIZER_FILES):
            return cls(None, max_length=NO_LENGTH, **read_preprocessor(folder))
        return cls(**read_tokenizer(text_folder), **read_preprocessor(folder))

    @classmethod
    def from_towers(
        cls, vision: str | os.PathLike, text: str | os.PathLike, *, image_size: int | None = None,
        vision_revision: str | None = None, text_revision: str | None = None,
    ) -> "CLIPProcessor":
        """The processor to `HybridCLIP.from_towers`: pictures as the one tower takes them, texts as the other."""
        folder = fetch_checkpoint(vision, revision=vision_revision, weights=False)
        processor = cls.load(folder, fetch_checkpoint(text, revision=text_revision, weights=False))
        if image_size is not None:
            old, resize = processor.image_size, processor.resize
            sides = (resize,) if isinstance(resize, int) else resize
            scaled = tuple(round(side * image_size / old) for side in sides)
            processor.image_size, processor.resize = image_size, scaled[0] if isinstance(resize, int) else scaled
        return processor
