"""A page in the browser over an index of pictures: search, labels and heat maps, in Indonesian and offline.

    serve("foto/", model="mini", port=7860)   # or build(index, model, processor).launch(**LOOK)
"""

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from PIL import Image

from clipid_utils.inference import heatmap
from clipid_utils.inference.index import SHOWN_SIDE, PictureIndex, build_index
from clipid_utils.inference.search import query_embeds, search
from clipid_utils.inference.zeroshot import class_names, classifier_weights
from clipid_utils.model.pretrained.load import load_clip
from clipid_utils.paths import CACHE
from clipid_utils.pictures import PictureError, decode_square, open_picture
from clipid_utils.plots import heatmap_overlay

QUERIES = ["kucing tidur", "burung di air", "bangunan tua", "alat musik"]
OCCLUSION, PATCHES = "Tutup bagian gambar satu per satu", "Bandingkan tiap petak"
DROP = "# Letakkan gambar di sini\natau klik untuk memilih berkas"
# gradio opens fewer kinds of pictures than the library. A question that comes during an answer waits
EVENT = {"preprocess": False, "trigger_mode": "always_last", "api_visibility": "private"}
PART = 32  # names that are encoded between two steps of the progress bar
LOOK = {  # of `launch`; the fonts are the browser's, because the page works without a network
    "theme": gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    "css": """
.gradio-container { width: 100%; max-width: 90rem !important; margin: auto }
#results .grid-wrap { max-height: none; padding-top: 2.2rem }
#results .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(11rem, 44%), 1fr)) }
#results .caption-label { left: 0; right: 0; max-width: none; text-align: left; border-radius: 0 }
.confidence-set { font-family: var(--font) }
""",
}


class Mistake(ValueError):
    """A mistake that the user of the page can correct; the message says how, in Indonesian."""


def forgiving(answer: Callable) -> Callable:
    """Shows a mistake as a message on the page, and leaves the last answer as it is."""
    @functools.wraps(answer)
    def wrapped(*inputs):
        try:
            return answer(*inputs)
        except PictureError:
            message = "Gambar ini tidak dapat dibaca. Coba berkas lain, misalnya JPEG atau PNG."
        except Mistake as mistake:
            message = str(mistake)
        gr.Warning(message, title="Belum bisa")
        return gr.skip()

    return wrapped


class Answers:
    """The page's callbacks. A picture is {"path", …}, as gradio gives it before it opens the file, or None.

    The library opens the pictures, so that a query has the pixels of the index and all its kinds of files.
    """

    def __init__(self, index: PictureIndex, model: nnx.Module, processor: object):
        self.index, self.model, self.processor = index, model, processor

    @forgiving
    def find(self, text: str, picture: dict | None, weight: float | int, count: float | int) -> gr.Gallery | dict:
        """The pictures that are most like a text, a picture, or both, with their similarities and paths."""
        text = text.strip()
        if not text and picture is None:
            raise Mistake("Tulis kata yang dicari atau letakkan sebuah gambar.")
        with warnings.catch_warnings(record=True, action="always") as caught:
            path = picture and picture["path"]
            query = query_embeds(self.model, self.processor, text or None, path, weight)
        if any("knows no part" in str(found.message) for found in caught):
            gr.Warning(f"Model tidak mengenal “{text}”, jadi hasilnya sembarang. Coba kata lain.", title="Perhatian")
        (scores,), (rows,) = search(self.index, query, int(count))
        asked = " dan ".join([f"“{text}”"] * bool(text) + ["gambar"] * (picture is not None))
        return gr.Gallery(self._shown(rows, scores), label=f"Hasil untuk {asked}", selected_index=None)

    def refresh(self, text: str, picture: dict | None, weight: float | int, count: float | int) -> gr.Gallery | dict:
        """`find` for the sliders. Without a query, nothing changes."""
        return self.find(text, picture, weight, count) if text.strip() or picture else gr.skip()

    def _shown(self, rows, scores=None) -> list[tuple]:
        captions = [self.index.labels[row] for row in rows]
        if scores is not None:
            numbers = [f"{score:.2f}".replace(".", ",") for score in scores]  # 0,58 in Indonesian
            captions = [f"{number} · {caption}" for number, caption in zip(numbers, captions, strict=True)]
        return [(self.index.picture(row), caption) for row, caption in zip(rows, captions, strict=True)]

    @forgiving
    def label(self, picture: dict | None, own: str, progress=gr.Progress()) -> dict:  # noqa: B008
        """The probability of each label: of the user's own, with commas between them, or of the 1,000 class names."""
        if picture is None:
            raise Mistake("Letakkan sebuah gambar dulu.")
        names = list(dict.fromkeys(name for part in own.split(",") if (name := part.strip())))
        if len(names) == 1:
            raise Mistake("Tulis paling sedikit dua label, dipisahkan koma, supaya model dapat memilih.")
        embeds = query_embeds(self.model, self.processor, image=picture["path"])[0]
        weights = classifier_weights(self.model, self.processor, names) if names else self._class_weights(progress)
        chances = np.asarray(jax.nn.softmax(float(self.model.scale()) * weights @ embeds))
        return dict(zip(names or class_names(), chances.tolist(), strict=True))

    def _class_weights(self, progress: gr.Progress) -> np.ndarray:
        if not hasattr(self, "_weights"):
            names = class_names()
            starts = progress.tqdm(range(0, len(names), PART), "Membaca 1.000 nama benda")
            self._weights = np.concatenate([
                classifier_weights(self.model, self.processor, names[start : start + PART]) for start in starts])
        return self._weights

    @forgiving
    def heat(self, picture: dict | None, text: str, way: str) -> Figure | dict:
        """The picture's middle square, and over it how well each of its parts fits the text."""
        text = text.strip()
        if picture is None or not text:
            raise Mistake("Letakkan sebuah gambar dan tulis frasanya.")
        image = open_picture(picture["path"], short_side=SHOWN_SIDE)
        if way == PATCHES:
            others = [query for query in QUERIES if query != text]
            heat = heatmap.patch_similarity(self.model, self.processor, image, text, others)
        else:
            heat = heatmap.occlusion(self.model, self.processor, image, text)
        size, resize = self.processor.image_size, self.processor.resize
        times = -(-SHOWN_SIDE // size)
        resize = resize * times if isinstance(resize, int) else (resize[0] * times, resize[1] * times)
        figure = heatmap_overlay(decode_square(image, size * times, resize=resize), {text: heat}, size=4.0)
        figure.set_dpi(150)
        return figure


@functools.cache
def build(index: PictureIndex, model: nnx.Module, processor: object) -> gr.Blocks:
    """The page, in three tabs."""
    answers, size = Answers(index, model, processor), f"{len(index):,}".replace(",", ".")
    samples = [[index.picture(row)] for row in np.unique(np.linspace(0, len(index) - 1, 6).astype(int))]
    page = gr.Blocks(title="CLIP-Indonesian", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600))
    with page:
        gr.Markdown(f"# Cari gambar dengan bahasa Indonesia\n{size} gambar dapat dicari dengan kata, dengan gambar, "
                    "atau dengan keduanya. Semuanya dihitung di komputer ini; tidak ada yang dikirim keluar.")
        with gr.Tab("Cari"):
            _search_tab(answers)
        with gr.Tab("Tebak isi"):
            _label_tab(answers, samples)
        with gr.Tab("Peta panas"):
            _heat_tab(answers, samples)
    return page


def _search_tab(answers: Answers) -> None:
    slider = functools.partial(gr.Slider, min_width=240, buttons=[])
    with gr.Row():
        with gr.Column(scale=3):
            text = gr.Textbox(label="Kata yang dicari", placeholder="kucing tidur", autofocus=True)
            examples = gr.Examples(QUERIES, text, label="Contoh")
            with gr.Row():
                weight = slider(0, 1, 0.7, step=0.05, label="Bobot kata (0: gambar saja)")
                count = slider(1, 48, 12, step=1, label="Jumlah hasil")
            button = gr.Button("Cari", variant="primary")
        picture = _drop(label="Seperti gambar ini", scale=2)
    gallery = gr.Gallery(answers._shown(range(min(12, len(answers.index)))), label="Gambar dalam folder",
                         elem_id="results", format="jpeg", height="auto", object_fit="cover",
                         interactive=False, buttons=[])
    gr.Markdown("Angka di bawah gambar menunjukkan kemiripannya dengan kueri. Nilai tertinggi adalah 1.")
    query = {"inputs": [text, picture, weight, count], "outputs": gallery, **EVENT}
    gr.on([text.submit, button.click, picture.upload], answers.find, **query)
    gr.on([weight.release, count.release, picture.clear], answers.refresh, **query)
    examples.load_input_event.then(answers.find, **query)


def _label_tab(answers: Answers, samples: list[list[Image.Image]]) -> None:
    with gr.Row():
        with gr.Column():
            picture = _drop(label="Gambar")
            examples = gr.Examples(samples, picture, label="Contoh")
        with gr.Column():
            own = gr.Textbox(label="Label sendiri, dipisahkan koma", placeholder="anjing, kucing, burung",
                             info="Jika kosong, model memilih dari 1.000 nama benda dan hewan.")
            button = gr.Button("Tebak", variant="primary")
            labels = gr.Label(label="Label yang paling cocok", num_top_classes=5)
            gr.Markdown("Persentase hanya membandingkan label-label itu. Label yang benar mungkin tidak ada "
                        "di antaranya.")
    query = {"inputs": [picture, own], "outputs": labels, **EVENT}
    gr.on([picture.upload, own.submit, button.click], answers.label, **query)
    examples.load_input_event.then(answers.label, **query)


def _heat_tab(answers: Answers, samples: list[list[Image.Image]]) -> None:
    with gr.Row():
        with gr.Column():
            picture = _drop(label="Gambar")
            gr.Examples(samples, picture, label="Contoh")
        with gr.Column():
            text = gr.Textbox(label="Frasa", placeholder="mata kucing")
            way = gr.Radio([OCCLUSION, PATCHES], value=OCCLUSION, label="Cara",
                           info="Cara pertama lebih lambat, tetapi lebih tepat menggambarkan cara kerja model.")
            button = gr.Button("Buat peta", variant="primary")
            gr.Markdown("Jingga: bagian yang cocok dengan frasa. Biru: bagian yang tidak cocok. "
                        "Model hanya melihat bagian persegi di tengah gambar.")
    figure = gr.Plot(show_label=False)
    gr.on([text.submit, button.click], answers.heat, [picture, text, way], figure, **EVENT)


def _drop(label: str, **options) -> gr.Image:
    """A place to drop a picture."""
    return gr.Image(label=label, sources=["upload"], placeholder=DROP, height=300, buttons=[], **options)


def serve(folder: str | os.PathLike, *, model: str, port: int) -> None:
    """Indexes a folder of pictures and shows its page at http://127.0.0.1:PORT, on this machine only, until Ctrl-C.

    `model` is an argument of `load_clip`. Raises the errors of `load_clip` and `build_index`, and OSError if the port
    is taken.
    """
    clip = load_clip(model)
    page = build(build_index(*clip, Path(folder), cache=CACHE / "search"), *clip)
    try:
        page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, show_error=True,
                    footer_links=[], **LOOK)
    except OSError as error:
        raise OSError(f"port {port} of 127.0.0.1 is not free: choose a different one with --port") from error
    print(f"http://127.0.0.1:{port} (Ctrl-C ends)", flush=True)
    page.block_thread()
