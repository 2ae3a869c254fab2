"""Target tokens per second of beam search, in turns with MarianMTModel.generate of transformers on torch.

Both sides: one model, of opus-mt's size and random weights, one list of token ids, the same beam, and as many steps,
since the shortest and the longest translation have one length. Ours is CTranslate2 as `Translator` opens it, in int8,
or in float32 as torch has it; its decoder has the target language's pieces alone (translation/marian.py). Theirs is
float32, or bfloat16 where the size says so. The sides alternate, as turns.py has it. At the end it prints the hours and
the cost of many captions, computed from the rate measured here.

With `--gpu` both sides are on a GPU in float16, with the same ids many times over, each in its own best batches.

    python benchmarks/bench_translate.py [--gpu] [--rounds 3] [--sizes opus_mt_beam4 …] [--out FILE]
"""

import json
import os
from pathlib import Path

import numpy as np
import turns

SOURCE, TARGET = 24, 26  # assumed tokens of a caption on either side
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SENTENCES = 84 * CORES  # captions a run: with fewer, cores wait at its end, as they do at the end of a shard alone
THEIR_BATCH = 28  # sentences; torch on two cores is slower with 12, 42 or 84
ON_GPU_SENTENCES, ON_GPU_BATCH = 2048, 1024
SIZES = {  # target tokens a run, timed runs a round
    "opus_mt_beam4": (SENTENCES * TARGET, 2),
    "opus_mt_beam1": (SENTENCES * TARGET, 2),
    "opus_mt_beam4_float32": (SENTENCES * TARGET, 2),  # ours in torch's precision
    "opus_mt_beam4_bfloat16": (SENTENCES * TARGET, 2),  # torch in the precision that some CPUs are fast in
}
ON_GPU = {"opus_mt_beam4_gpu": (ON_GPU_SENTENCES * TARGET, 1)}
CONFIG = {  # Helsinki-NLP/opus-mt-en-id's
    "vocab_size": 54796, "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "max_position_embeddings": 512,
    "activation_function": "swish", "scale_embedding": True, "pad_token_id": 54795, "eos_token_id": 0,
    "decoder_start_token_id": 54795, "forced_eos_token_id": 0,
}
PIECES = 32_000  # of each language: opus-mt's vocabulary has both languages; shared pieces are in it once
CAPTIONS = 12_000_000
CORE_HOUR = 0.04  # US dollars, about the price of a core of a large machine on demand in a cloud; yours may differ
GPU_HOUR = 4.0  # US dollars, about the price of an H100 or H200 on demand in a cloud; yours may differ
EFFICIENCY = {2: 1.0, 16: 0.9, 96: 0.7}  # assumed of each core, beside the two measured: they share memory and clock


def beam(size: str) -> int:
    return int(size.split("beam")[1][0])


def sentences(size: str) -> np.ndarray:
    count = ON_GPU_SENTENCES if size in ON_GPU else SENTENCES
    return np.random.default_rng(0).integers(2, CONFIG["vocab_size"] - 1, (count, SOURCE))


def ours(size: str):
    """A function that translates all sentences."""
    import ctranslate2

    from clipid_utils.data.translation.translate import Translator

    folder = Path("build/bench/opus_mt_size")
    if not (folder / "vocab.json").is_file():
        write_random_model(folder)
    translator = Translator(folder, beam=beam(size), device="cuda" if size in ON_GPU else "cpu")
    if size.endswith("float32"):
        from clipid_utils.data.translation.marian import converted_folder

        translator.engine = ctranslate2.Translator(
            str(converted_folder(folder, "float32")), inter_threads=translator.workers, intra_threads=1)
    ids = [[f"t{token}" for token in row] + ["</s>"] for row in sentences(size)]
    rows = max(1, translator.batch_tokens // SOURCE)  # as the Translator cuts batches
    batches = [ids[start : start + rows] for start in range(0, len(ids), rows)]

    def run():
        running = [translator.engine.translate_batch(
            batch, asynchronous=True, beam_size=translator.beam, min_decoding_length=TARGET, max_decoding_length=TARGET,
        ) for batch in batches]
        assert all(len(result.result().hypotheses[0]) == TARGET for batch in running for result in batch)

    return run


def write_random_model(folder: Path) -> None:
    """The folder of a Marian model with random weights, whose target has the last PIECES pieces of the vocabulary."""
    import torch
    from sentencepiece import SentencePieceTrainer
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from transformers import MarianConfig, MarianMTModel

    from clipid_utils.paths import DATA

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    MarianMTModel(MarianConfig(**CONFIG)).save_pretrained(folder)
    tokens = ["</s>", "<unk>", *(f"t{number}" for number in range(2, CONFIG["vocab_size"] - 1)), "<pad>"]
    pieces = {"source": tokens[2 : PIECES + 2], "target": tokens[-PIECES - 1 : -1]}
    for side, own in pieces.items():  # only their names matter: no text is cut into them
        SentencePieceTrainer.train(input=str(DATA / "parallel" / "captions.tsv"), model_prefix=str(folder / side),
                                   vocab_size=1000, minloglevel=2)
        model = ModelProto.FromString((folder / f"{side}.model").read_bytes())
        del model.pieces[3:]
        model.pieces.extend(ModelProto.SentencePiece(piece=piece, score=-i) for i, piece in enumerate(own))
        (folder / f"{side}.spm").write_bytes(model.SerializeToString())
        (folder / f"{side}.model").unlink()
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))


def theirs(size: str):
    """The same on torch, in batches of THEIR_BATCH or ON_GPU_BATCH and in eval mode."""
    import torch
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    dtype = torch.float16 if size in ON_GPU else torch.bfloat16 if size.endswith("bfloat16") else torch.float32
    device, rows = ("cuda", ON_GPU_BATCH) if size in ON_GPU else ("cpu", THEIR_BATCH)
    model = MarianMTModel(MarianConfig(**CONFIG)).eval().to(device, dtype)
    words = sentences(size)
    ids = torch.from_numpy(np.concatenate([words, np.zeros((len(words), 1), np.int64)], axis=1)).to(device)

    def run():
        with torch.inference_mode():
            for batch in ids.split(rows):
                made = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), num_beams=beam(size),
                                      do_sample=False, min_new_tokens=TARGET, max_new_tokens=TARGET)
                assert made.shape == (len(batch), TARGET + 1)  # the first starts the decoder

    return run


def costs(tokens_per_second: float, cores: int) -> list[dict]:
    """Hours and dollars for CAPTIONS, from the rate that `cores` have here."""
    rows = []
    for count, efficiency in EFFICIENCY.items():
        hours = CAPTIONS * TARGET / (tokens_per_second / cores * count * efficiency) / 3600
        rows.append({"cores": count, "efficiency": efficiency, "hours": round(hours, 1),
                     "dollars": round(hours * count * CORE_HOUR)})
    return rows


def add_costs(report: dict) -> None:
    """Hours and dollars for CAPTIONS, from the measured rate."""
    if "opus_mt_beam4" in report:
        rate = report["opus_mt_beam4"]["ours"]["median"]["ours"]
        report["costs"] = costs(rate, CORES)
        print(f"\n{CAPTIONS:,} captions of {TARGET} tokens, beam 4, at {rate:.0f} tokens/s on {CORES} cores:")
        for row in report["costs"]:
            print(f"{row['cores']:4} cores at {row['efficiency']:.0%} of that each: {row['hours']:8.1f} h, "
                  f"{row['dollars']} $ at {CORE_HOUR} $ a core and hour")
    for size in ON_GPU.keys() & report.keys():
        hours = CAPTIONS * TARGET / report[size]["ours"]["median"]["ours"] / 3600
        report["gpu_costs"] = {"hours": round(hours, 2), "dollars": round(hours * GPU_HOUR)}
        print(f"{CAPTIONS:,} captions of {TARGET} tokens on this GPU: {hours:.2f} h, {hours * GPU_HOUR:.0f} $ at "
              f"{GPU_HOUR} $ an hour")


def main() -> None:
    turns.main(__file__, __doc__, SIZES, {"ours": ours, "torch": theirs}, "build/bench/translate.json", on_gpu=ON_GPU,
               finish=add_costs)


if __name__ == "__main__":
    main()
