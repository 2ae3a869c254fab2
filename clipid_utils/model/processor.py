"""From pictures and texts to the arrays that the model takes: `CLIPProcessor(images=…, text=…)`.

Its folder is a standard one: `transformers.AutoTokenizer` and `CLIPImageProcessor` open it, and `load` opens theirs for
CLIP, ViT, BERT, RoBERTa and XLM-RoBERTa. A prefix of texts ("query: ") is part of tokenizer.json.
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
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from clipid_utils.files import whole_file, write_json
from clipid_utils.model.pretrained import processor_files
from clipid_utils.model.pretrained.processor_files import IMAGE_MEAN, IMAGE_STD, NO_RULES, TOKENIZER_FILES, TextRules
from clipid_utils.pictures import decode_square

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
Picture = Image.Image | str | os.PathLike | bytes | dict  # an open picture, a path, a file's bytes, {"bytes", "path"}


def train_wordpiece(captions: Iterable[str], vocab_size: int = 4000) -> Tokenizer:
    """A lower-casing WordPiece tokenizer (Schuster & Nakajima 2012, as in BERT) learned from `captions`.

    The same captions give the same tokenizer.
    """
    captions = list(captions)
    learner = _bert_tokenizer(models.WordPiece(unk_token="[UNK]"))
    letters = sorted({c for caption in captions for c in learner.normalizer.normalize_str(caption) if not c.isspace()})
    # The trainer numbers letters inside words in random order, and breaks ties by number: so they are named first
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


class CLIPProcessor:
    """Pictures and texts to numpy arrays.

    `tokenizer` is one of `tokenizers` (with its `special_tokens` if they are not BERT's), one of transformers, which
    knows its special tokens, or None: then texts raise ValueError. `truncated` counts the texts that were cut to
    `max_length` tokens; the first cut warns. With `fixed_length` all texts are padded to `max_length`, as a text tower
    without a mask needs it (SigLIP). `resize` and `resample` are those of `pictures.decode_square`.
    """

    def __init__(
        self, tokenizer: Tokenizer | Any | None, image_size: int, max_length: int,
        image_mean: Sequence[float] = IMAGE_MEAN, image_std: Sequence[float] = IMAGE_STD, *,
        resize: int | tuple[int, int] | None = None, resample: int = Image.Resampling.BICUBIC,
        special_tokens: dict[str, str] | None = None, padding_side: str = "right", truncation_side: str = "right",
        fixed_length: bool = False,
    ):
        if hasattr(tokenizer, "backend_tokenizer"):  # transformers
            special_tokens = special_tokens or {
                name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}
            padding_side, truncation_side = tokenizer.padding_side, tokenizer.truncation_side
            tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # others may let theirs cut and pad
        self.image_size, self.max_length = image_size, max_length
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.resize, self.resample = image_size if resize is None else resize, resample
        self.special_tokens = special_tokens or {token[1:-1].lower() + "_token": token for token in SPECIAL_TOKENS}
        self.padding_side, self.truncation_side, self.fixed_length = padding_side, truncation_side, fixed_length
        self.tokenizer = tokenizer
        self.truncated = 0
        if tokenizer is None:
            return
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.prefix = processor_files.text_prefix(tokenizer)
        added = tokenizer.get_added_tokens_decoder().values() if self.prefix else ()
        self._dividers = [token.content for token in added]
        self.pad_token = self.special_tokens.get("pad_token")
        self.pad_id = None if self.pad_token is None else tokenizer.token_to_id(self.pad_token)
        if self.pad_id is None:
            raise ValueError(f"the tokenizer has no padding token {self.pad_token!r}: name the one it has, "
                             "special_tokens={'pad_token': …}")

    @property
    def decoder(self) -> Callable[[Picture], UInt8[np.ndarray, "S S 3"]]:
        """From a picture to its pixels, for training and use alike. It can be sent to other processes."""
        return functools.partial(decode_square, size=self.image_size, resize=self.resize, resample=self.resample)

    def __call__(
        self, images: Sequence[Picture] | Picture | None = None, text: Sequence[str] | str | None = None
    ) -> dict:
        """`pixel_values` [B, H, W, 3] float32 for images; `input_ids` and `attention_mask` [B, L] int32 for text.

        Raises PictureError or FileNotFoundError for pictures that cannot be read, and ValueError for empty texts.
        """
        if images is None and text is None:
            raise ValueError("give the processor images=[pictures or paths], text=[strings], or both")
        batch = {}
        if images is not None:
            images = [images] if isinstance(images, Picture) else images
            batch["pixel_values"] = self.normalize(np.stack([self.decoder(image) for image in images]))
        if text is not None:
            batch.update(self.tokenize([text] if isinstance(text, str) else list(text)))
        return batch

    def normalize(self, pixels: UInt8[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B H W 3"]:
        """uint8 pixels to float32 with the processor's mean and standard deviation."""
        wide = pixels.shape[:2] + (3 * pixels.shape[2],)  # colours side by side: numpy is fast at long rows
        mean, std = (np.tile(np.asarray(v, np.float32), pixels.shape[2]) for v in (self.image_mean, self.image_std))
        out = np.empty(wide, np.float32)
        for picture, row in zip(pixels.reshape(wide), out, strict=True):  # one picture fits the processor's cache
            np.divide(picture, np.float32(255), out=row)
            row -= mean
            row /= std
        return out.reshape(pixels.shape)

    def tokenize(
        self, texts: Sequence[str], length: int | None = None, multiple: int = 1, *, mark_truncated: bool = False
    ) -> dict[str, Int[np.ndarray, "B L"] | Bool[np.ndarray, " B"]]:
        """Token ids and mask, padded to the longest text, rounded up to a `multiple`, or to `length`.

        With `fixed_length` they have `max_length` tokens whatever `length` and `multiple` are.
        The ids, the padding and the cuts are AutoTokenizer's. An empty text raises ValueError. With `mark_truncated` a
        third array, `truncated`, is True for the texts that were cut.
        """
        if self.tokenizer is None:
            raise ValueError("this checkpoint came without a tokenizer: name its folder, load_clip(…, tokenizer=…)")
        if not len(texts):
            raise ValueError("text is empty: give the processor at least one string")
        for row, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"text[{row}] is {text!r}: an empty caption matches nothing; drop it or write one")
        length = self.max_length if self.fixed_length else length
        limit = min(self.max_length, length or self.max_length)
        ids = [encoding.ids for encoding in self._encode(list(texts))]
        long = [row for row, tokens in enumerate(ids) if len(tokens) > limit]
        if long and not self.truncated:
            longest = max(map(len, ids))
            warnings.warn_explicit(  # with the file's path in the repository, not on this machine, for the notebooks
                f"{len(long)} of {len(ids)} texts are cut to {limit} tokens (longest: {longest}); "
                "see processor.truncated", UserWarning, "clipid_utils/model/processor.py", 0)
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

    @functools.cached_property
    def _unprefixed(self) -> Tokenizer:
        return processor_files.without_prefix(self.tokenizer)

    def _encode(self, texts: list[str], **options) -> list[Encoding]:
        """The tokens of texts. Added tokens, such as </s>, divide a text, and the tokenizer (AutoTokenizer too) would
        put its prefix before each part: a text that has some gets the prefix here, once."""
        encodings = self.tokenizer.encode_batch(texts, **options)
        for row, text in enumerate(texts):
            if any(token in text for token in self._dividers):
                encodings[row] = self._unprefixed.encode(self.prefix + text, **options)
        return encodings

    def _cut(self, text: str, limit: int) -> list[int]:
        """`limit` ids: all special tokens stay, and the text is cut."""
        (encoding,) = self._encode([text], add_special_tokens=False)
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
            for name in (*TOKENIZER_FILES, "tokenizer_config.json"):  # an older one would be taken for this one's
                (folder / name).unlink(missing_ok=True)
        else:
            with whole_file(folder / "tokenizer.json") as file:
                file.write(self.tokenizer.to_str().encode())
            write_json(folder / "tokenizer_config.json", {
                "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.max_length,
                "padding_side": self.padding_side, "truncation_side": self.truncation_side, **self.special_tokens,
            })
        stretched = not isinstance(self.resize, int)
        size = {"height": self.resize[0], "width": self.resize[1]} if stretched else {"shortest_edge": self.resize}
        (folder / "processor_config.json").unlink(missing_ok=True)  # transformers would prefer an older one
        write_json(folder / "preprocessor_config.json", {
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
            "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": int(self.resample),
            "size": size, "crop_size": {"height": self.image_size, "width": self.image_size},
            "rescale_factor": 1 / 255, "image_mean": list(self.image_mean), "image_std": list(self.image_std),
        })

    @classmethod
    def load(
        cls, folder: Path, text_folder: Path | None = None, *, image_size: int | None = None, max_length: int = 10**6,
        needs_tokenizer: bool = True, fixed_length: bool = False, rules: TextRules = NO_RULES,
    ) -> "CLIPProcessor":
        """The processor of a checkpoint folder, of this project or of transformers.

        `text_folder` has the tokenizer if it is in a different folder. Without preprocessor_config.json, pictures are
        prepared like CLIP's, at `image_size`; texts have at most `max_length` tokens. Further `rules` for texts become
        part of the tokenizer. `fixed_length` is for SigLIP. Raises FileNotFoundError for a missing file and ValueError
        for an unsupported one, with its name. If there is no tokenizer and `needs_tokenizer` is False, the processor
        takes pictures only.
        """
        folder, text_folder = Path(folder), Path(folder if text_folder is None else text_folder)
        pictures = processor_files.read_preprocessor(folder, image_size)
        if not needs_tokenizer and not any((text_folder / name).is_file() for name in TOKENIZER_FILES):
            return cls(None, max_length=max_length, **pictures)
        texts = processor_files.read_tokenizer(text_folder, max_length, rules, siglip=fixed_length)
        return cls(**texts, **pictures, fixed_length=fixed_length)
