// Searches pictures by words and by pictures, all inside this browser. inference/page.py wrote the folder.
// Vectors have unit length, and the score of two of them is their cosine. The visitor's texts are in index.html.
import { env, InferenceSession, Tensor } from "./library/ort.wasm.min.mjs";
import { Tokenizer } from "./library/tokenizers.min.mjs";

const MOST_PIXELS = 100e6; // of a photo: the browser needs 4 bytes for each
const SIDE = 480; // pixels of the long side of a photo on the page, as in page.py
const TIMES = 4; // the browser reduces a larger photo to so many times the model's side; Pillow's way does the rest
const MANY = 24; // pictures that are drawn at once
const MOST_LABELS = 20, MOST_NAMED = 4; // labels of the visitor's own; unreadable files that are named
const NO_MEANING = "\ue000"; // a letter that no vocabulary has

const $ = (id) => document.getElementById(id);
const here = (path) => new URL(path, import.meta.url).href;
let page, rules, limits, tokenizer; // of the JSON files
let items = []; // { name, alt, url, width, height, vector, credit, licence, mine }, the visitor's first
let labels = []; // { name, vector }
let like = null, opened = null; // the items that the visitor searches with and that is in the dialog
let shown = { items: [], scores: null, most: MANY };
let turn = 0; // of the last search: an older one that ends later is forgotten
let adding = Promise.resolve(); // the photos that were given before

// ---- The model
env.wasm.wasmPaths = here("library/");
env.wasm.numThreads = 1; // more need headers that simple servers do not send
env.wasm.proxy = true; // in a worker, so that the page stays quick
const encoders = {}; // promises of sessions

async function fetchAll(path, heard = () => {}) {
  const response = await fetch(here(path));
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  const count = new TransformStream({ transform(part, out) { heard(part.length); out.enqueue(part); } });
  return new Response(response.body.pipeThrough(count)).arrayBuffer();
}
const fetchJson = async (path) => JSON.parse(new TextDecoder().decode(await fetchAll(path)));
const SESSION = { executionProviders: ["wasm"], extra: { session: { disable_quant_qdq: "1" } } }; // floats, made once
const load = async (path, heard) => InferenceSession.create(await fetchAll(path, heard), SESSION);

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
function unit(vector) {
  const length = Math.sqrt(dot(vector, vector)) || 1;
  return Float32Array.from(vector, (value) => value / length);
}

/** The unit vectors of page.eight_bits. */
function unitRows(bytes, count) {
  const all = new Int8Array(bytes), width = all.length / count;
  return Array.from({ length: count }, (_, row) => unit(all.subarray(row * width, (row + 1) * width)));
}

// ---- Texts
/** The ids and the mask of CLIPProcessor.tokenize: special tokens stay when a long text is cut. */
export function tokens(text) {
  const { model_max_length: limit, truncation_side, padding_side, pad_token } = limits;
  let { ids } = tokenizer.encode(text);
  if (ids.length > limit) {
    const plain = tokenizer.encode(text, { add_special_tokens: false }).ids, room = limit - (ids.length - plain.length);
    const start = ids.findIndex((_, i) => plain.every((id, k) => ids[i + k] === id));
    const kept = truncation_side === "left" ? plain.slice(-room) : plain.slice(0, room);
    ids = [...ids.slice(0, start), ...kept, ...ids.slice(start + plain.length)];
  }
  const padding = Array(page.fixed_length ? limit - ids.length : 0).fill(tokenizer.token_to_id(pad_token));
  const parts = [[ids, 1], [padding, 0]];
  if (padding_side === "left") parts.reverse();
  return { ids: parts.flatMap(([part]) => part), mask: parts.flatMap(([part, seen]) => part.map(() => seen)) };
}

/** Whether the tokenizer knows no part of a text; a prefix and marks of a space (▁ and Ġ) count as no part. */
export function isUnknown(text) {
  const [encoding, nothing] = [text, NO_MEANING].map((words) => tokenizer.encode(words, { add_special_tokens: false }));
  const start = encoding.ids.findIndex((id, i) => id !== nothing.ids[i]), unknown = tokenizer.token_to_id(page.unknown);
  const isPart = (id, i) => i >= start && id !== unknown && /[^▁Ġ]/.test(encoding.tokens[i]);
  return start < 0 || !encoding.ids.some(isPart);
}

export async function textVector(text) {
  const { ids, mask } = tokens(text), session = await encoders.text;
  const tensor = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  return (await session.run({ input_ids: tensor(ids), attention_mask: tensor(mask) })).text_embeds.data;
}

/** wording.counted: the name after its Indonesian classifier, "seekor kucing". */
function counted(name) {
  const words = name.toLowerCase().replace(/[:,]/g, " ").trim().split(/\s+/);
  const heads = words.map((_, i) => words.slice(0, words.length - i).join(" ")); // the longest first
  const known = page.classifiers.includes(words[0]) ? undefined : heads.find((head) => Object.hasOwn(page.heads, head));
  return `${page.heads[known] ?? ""} ${name}`.trim();
}

/** zeroshot.classifier_weights of one name. */
export async function labelVector(name) {
  const vectors = [];
  for (const template of page.templates)
    vectors.push(await textVector(template.replace("{counted}", () => counted(name)).replace("{name}", () => name)));
  return unit(vectors[0].map((_, i) => vectors.reduce((sum, vector) => sum + vector[i], 0)));
}

// ---- Pictures
const FILTERS = { // by Pillow's numbers: the reach and the kernel
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  3: [2, (x) => { // bicubic, a = -0.5
    const far = Math.abs(x);
    return far < 1 ? (1.5 * far - 2.5) * far * far + 1 : far < 2 ? ((-0.5 * far + 2.5) * far - 4) * far + 2 : 0;
  }],
};

/** For each of `count` new pixels from `offset` on: the first old pixel and the weights, as Pillow computes them. */
function weights(size, resized, offset, count, [reach, kernel]) {
  const scale = size / resized, wide = Math.max(scale, 1);
  return Array.from({ length: count }, (_, i) => {
    if (i + offset < 0 || i + offset >= resized) return { first: 0, values: [] }; // outside of the picture: black
    const centre = (i + offset + 0.5) * scale, first = Math.max(0, Math.trunc(centre - reach * wide + 0.5));
    const last = Math.min(size, Math.trunc(centre + reach * wide + 0.5));
    const values = Array.from({ length: last - first }, (_, k) => kernel((first + k - centre + 0.5) / wide));
    const sum = values.reduce((a, b) => a + b);
    return { first, values: values.map((value) => Math.round(value / sum * 2 ** 22)) };
  });
}

/** Sums of three channels of bytes, from `start` on at every `step`, in Pillow's fixed point. */
function blend(from, start, step, { first, values }, to, at) {
  for (let channel = 0; channel < 3; channel++) {
    let sum = 2 ** 21;
    for (let k = 0, i = start + first * step + channel; k < values.length; k++, i += step) sum += from[i] * values[k];
    to[at + channel] = sum >> 22; // a clamped array
  }
}

/** pictures.decode_square: the middle square of RGBA pixels, resized as Pillow does it, as RGB bytes. */
export function square({ data, width, height }) {
  const { size, crop_size: { width: side }, resample } = rules, short = Math.min(width, height);
  const resized = size.shortest_edge ? [width, height].map((length) => Math.trunc(length * size.shortest_edge / short))
    : [size.width, size.height];
  const [across, down] = [width, height].map((length, axis) =>
    weights(length, resized[axis], Math.floor((resized[axis] - side) / 2), side, FILTERS[resample]));
  const rows = down.filter(({ values }) => values.length), top = rows[0].first;
  const bottom = rows.at(-1).first + rows.at(-1).values.length;
  const narrow = new Uint8ClampedArray((bottom - top) * side * 3), out = new Uint8ClampedArray(side * side * 3);
  for (let y = top; y < bottom; y++)
    across.forEach((taps, x) => blend(data, y * width * 4, 4, taps, narrow, ((y - top) * side + x) * 3));
  down.forEach((taps, y) => {
    for (let x = 0; x < side; x++) blend(narrow, (x - top * side) * 3, side * 3, taps, out, (y * side + x) * 3);
  });
  return out;
}

export async function pictureVector(pixels) {
  const { image_mean: mean, image_std: std, crop_size: { width: side } } = rules, session = await encoders.image;
  const values = Float32Array.from(pixels, (value, i) => (value / 255 - mean[i % 3]) / std[i % 3]);
  return (await session.run({ pixel_values: new Tensor("float32", values, [1, side, side, 3]) })).image_embeds.data;
}

/** A canvas with the upright picture of a file, on white. Raises Error, with a text for the visitor. */
export async function openPicture(file) {
  const url = URL.createObjectURL(file), image = new Image(), broken = new Error(t("broken", { name: file.name }));
  await new Promise((resolve, reject) => Object.assign(image, { onload: resolve, onerror: reject, src: url }))
    .catch(() => { throw broken; }).finally(() => URL.revokeObjectURL(url));
  const { naturalWidth: width, naturalHeight: height } = image; // known before the pixels are decoded
  if (width * height > MOST_PIXELS)
    throw new Error(t("huge", { name: file.name, size: width * height / 1e6, most: MOST_PIXELS / 1e6 }));
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const scale = TIMES * rules.crop_size.width / Math.min(width, height);
  if (scale < 1) Object.assign(options, { resizeWidth: Math.ceil(width * scale), resizeQuality: "high" });
  const bitmap = await createImageBitmap(file, options).catch(() => { throw broken; });
  return onWhite(bitmap, bitmap.width, bitmap.height);
}

function onWhite(picture, width, height) {
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", { willReadFrequently: true });
  Object.assign(context, { fillStyle: "white", imageSmoothingQuality: "high" });
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0, width, height);
  picture.close?.();
  return canvas;
}

async function readFile(file) {
  const canvas = await openPicture(file), { width, height } = canvas;
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const vector = await pictureVector(square(canvas.getContext("2d").getImageData(0, 0, width, height)));
  const small = onWhite(canvas, Math.ceil(width * scale), Math.ceil(height * scale));
  const url = URL.createObjectURL(await small.convertToBlob({ type: "image/jpeg", quality: 0.85 }));
  return { name: file.name, alt: file.name, url, width: small.width, height: small.height, vector, mine: true };
}

/** Adds photos to the collection, after those that were given before. A single one is searched with at once. */
function add(files) {
  const given = [...files], added = [], problems = [];
  adding = adding.then(async () => {
    for (const [i, file] of given.entries()) {
      say("reading", { place: i + 1, count: given.length });
      showProgress(i + 0.5, given.length);
      await readFile(file).then((item) => added.push(item), (error) => problems.push(error.message));
    }
    showProgress();
    items = [...added, ...items];
    if (given.length === 1 && added.length) return setLike(added[0]);
    if (added.length) await setLike(null, "");
    showProblems(problems);
    say(added.length ? "added" : "none_added", { count: added.length });
  }).catch(fail);
  return adding;
}

// ---- Search
async function find() {
  const mine = ++turn, words = $("words").value.trim(), picture = like, start = performance.now();
  showProblems([]);
  if (!words && !picture) return show("all", { count: items.length }, items);
  let query = words ? await textVector(words) : picture.vector;
  if (mine !== turn) return;
  const weight = words && picture ? Number($("weight").value) : 1;
  if (weight < 1) query = unit(query.map((value, i) => weight * value + (1 - weight) * picture.vector[i]));
  const scored = items.map((item) => [item, dot(query, item.vector)]).sort((a, b) => b[1] - a[1]);
  const [found, scores] = [0, 1].map((part) => scored.map((pair) => pair[part]));
  const kind = !picture ? "by_words" : words ? "by_both" : "by_picture";
  show(kind, { words, picture: picture?.name }, found, scores);
  if (words && isUnknown(words)) showProblems([t("unknown", { words })]);
  say("sorted", { count: items.length, time: performance.now() - start });
}
const search = () => find().catch(fail);

function show(heading, values, list, scores = null) {
  shown = { items: list, scores, most: MANY };
  write($("heading"), heading, values);
  draw();
}

function setLike(item, words = $("words").value) {
  like = item;
  $("words").value = words;
  $("like").hidden = !item;
  if (item) [$("like-picture").src, $("like-name").textContent] = [item.url, item.name];
  showBalance();
  return search();
}

/** The five best labels of the opened picture among `candidates`. */
function showLabels(candidates) {
  const powers = candidates.map(({ name, vector }) => [name, Math.exp(page.scale * (dot(vector, opened.vector) - 1))]);
  const sum = powers.reduce((total, [, power]) => total + power, 0);
  const lines = powers.sort((a, b) => b[1] - a[1]).slice(0, 5).map(([name, power]) => make(
    "li", {}, make("span", { textContent: name, lang: "id" }), make("b", { textContent: percent(power / sum) }),
    make("progress", { value: power / sum, max: 1, ariaHidden: "true" })));
  $("labels").replaceChildren(...lines);
  write($("label-note"), candidates === labels ? "of_all" : "of_own", { count: labels.length });
}

async function showOwnLabels() {
  const names = [...new Set($("own-labels").value.split(",").map((name) => name.trim()).filter(Boolean))];
  const item = opened, own = [];
  if (!names.length) return showLabels(labels);
  const note = (key, values) => write($("label-note"), key, values);
  if (names.length < 2 || names.length > MOST_LABELS) return note("own_labels", { most: MOST_LABELS });
  for (const name of names) {
    note("reading_label", { name });
    own.push({ name, vector: await labelVector(name) });
  }
  if (opened === item) showLabels(own);
}

// ---- The page
const texts = JSON.parse($("texts").textContent); // key -> [Indonesian, English]
const written = new Map(); // element -> the key and the values of its text
let english = false;
const number = (value, digits = 0) => value.toLocaleString(
  english ? "en" : "id", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value) => `${number(100 * value)}%`;
const t = (key, values = {}) => texts[key][Number(english)].replace(/\{(\w+)\}/g, (_, name) =>
  typeof values[name] === "number" ? number(values[name]) : values[name]);

const write = (element, key, values) => {
  written.set(element, [key, values]);
  element.textContent = t(key, values);
};
const say = (key, values) => write($("status"), key, values);
const showProgress = (value = 0, most = 0) => Object.assign($("progress"), { hidden: !most, max: most || 1, value });

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function draw(more = 0) {
  shown.most += more;
  $("results").replaceChildren(...shown.items.slice(0, shown.most).map((item, i) => {
    const caption = make("span", { className: "caption" }, make("span", { textContent: item.name, className: "name" }));
    if (shown.scores) caption.prepend(make("b", { textContent: number(shown.scores[i], 2) }));
    const image = make("img", { src: item.url, alt: item.alt === item.name ? "" : item.alt, loading: "lazy" });
    const entry = make("li", { className: item.mine ? "mine" : "" }, make(
      "button", { type: "button", className: "picture", onclick: () => openItem(item) }, image, caption));
    entry.style.setProperty("--shape", Math.min(2.4, Math.max(0.6, item.width / item.height)));
    return entry;
  }));
  $("more").hidden = shown.items.length <= shown.most;
  $("everything").hidden = !shown.scores;
}

function openItem(item) {
  opened = item;
  Object.assign($("detail-picture"), { src: item.url, alt: item.alt });
  $("detail-name").textContent = item.name;
  const [author, link] = (item.credit ?? "").split(/,? (?=https?:)/);
  const source = link && make("a", { href: link, target: "_blank", rel: "noreferrer", textContent: t("source") });
  const facts = [author, item.licence, source].filter(Boolean);
  $("detail-credit").replaceChildren(...facts.flatMap((fact) => [" · ", fact]).slice(1));
  $("own-labels").value = "";
  showLabels(labels);
  $("detail").showModal();
}

function showBalance() {
  const weight = Number($("weight").value);
  $("balance").hidden = !like || !$("words").value.trim();
  write($("weight-text"), "balance", { words: percent(weight), picture: percent(1 - weight) });
  $("weight").ariaValueText = $("weight-text").textContent;
}

function showProblems(problems) {
  const rest = problems.length - MOST_NAMED, lines = problems.slice(0, MOST_NAMED);
  if (rest > 0) lines.push(t("more_problems", { count: rest }));
  $("problems").replaceChildren(...lines.map((line) => make("li", { textContent: line })));
}

function fail(error) {
  console.error(error);
  showProgress();
  showProblems([t("failed", { reason: error.message })]);
}

/** Index.html is in Indonesian, with the English in data-en, data-en-placeholder and data-en-aria-label. */
function translate() {
  english = location.hash === "#en";
  document.documentElement.lang = english ? "en" : "id";
  for (const [property, key] of [["textContent", "en"], ["placeholder", "enPlaceholder"], ["ariaLabel", "enAriaLabel"]])
    for (const element of document.querySelectorAll("body *")) if (element.dataset[key]) {
      const first = element[`indonesian-${property}`] ??= element[property];
      element[property] = english ? element.dataset[key] : first;
    }
  $("language").lang = english ? "id" : "en";
  written.forEach(([key, values], element) => { element.textContent = t(key, values); });
  if (page) draw();
}

function listen() {
  const on = (id, event, act) => $(id).addEventListener(event, act);
  const sent = (act) => (event) => { event.preventDefault(); act(); };
  on("search", "submit", sent(search));
  on("own", "submit", sent(() => showOwnLabels().catch(fail)));
  for (const chip of document.querySelectorAll(".chip"))
    chip.onclick = () => { $("words").value = chip.textContent; showBalance(); search(); };
  on("words", "input", () => { showBalance(); if (!$("words").value) search(); });
  on("weight", "input", showBalance);
  on("weight", "change", search);
  on("choose", "click", () => $("files").click());
  on("files", "change", () => { add($("files").files); $("files").value = ""; });
  on("unlike", "click", () => { setLike(null); $("words").focus(); });
  on("everything", "click", () => { setLike(null, ""); $("heading").focus(); });
  on("more", "click", () => { draw(MANY); $("results").children[shown.most - MANY].firstChild.focus(); });
  on("close", "click", () => $("detail").close());
  on("detail", "click", ({ target }) => { if (target === $("detail")) target.close(); });
  on("similar", "click", () => { $("detail").close(); setLike(opened); $("heading").focus(); });
  on("language", "click", () => { history.replaceState(null, "", english ? "#" : "#en"); translate(); });
  const dropping = (is) => document.body.classList.toggle("dropping", is);
  const withFiles = (act) => (event) => event.dataTransfer.types.includes("Files") && sent(() => act(event))(event);
  addEventListener("dragover", withFiles(() => dropping(true)));
  addEventListener("dragleave", ({ relatedTarget }) => { if (!relatedTarget) dropping(false); });
  addEventListener("drop", withFiles(({ dataTransfer }) => { dropping(false); add(dataTransfer.files); }));
  addEventListener("paste", ({ clipboardData }) => { if (clipboardData.files.length) add(clipboardData.files); });
}

async function start() {
  translate();
  say("loading");
  let pictures, names, settings, done = 0;
  [page, rules, settings, limits, pictures, names] = await Promise.all([
    fetchJson("page.json"), fetchJson("model/preprocessor_config.json"), fetchJson("model/tokenizer.json"),
    fetchJson("model/tokenizer_config.json"), fetchAll("vectors/pictures.bin"), fetchAll("vectors/labels.bin")]);
  pictures = unitRows(pictures, page.pictures.length);
  items = page.pictures.map((picture, i) => ({ ...picture, url: here(picture.file), vector: pictures[i] }));
  labels = unitRows(names, page.labels.length).map((vector, i) => ({ name: page.labels[i], vector }));
  $("model").textContent = page.model;
  tokenizer = new Tokenizer(settings, limits);
  const heard = (count) => showProgress(done += count, page.size);
  encoders.text = load("model/text_encoder.onnx", heard);
  encoders.image = encoders.text.then(() => load("model/image_encoder.onnx", heard));
  search();
  listen();
  await encoders.text;
  say("ready");
  await encoders.image;
  showProgress();
  for (const item of items.filter(({ file }) => file)) // from now on the page needs no network
    item.url = URL.createObjectURL(new Blob([await fetchAll(item.file)], { type: "image/webp" }));
  document.body.dataset.ready = "all";
}

start().catch(fail);
