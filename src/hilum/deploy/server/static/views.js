// The images of a study side by side: what each is said to show, what it contributed, what is wrong with it.

import { icon, make, setVariable } from "./dom.js";
import { bytes, percent } from "./numbers.js";
import { Viewer } from "./viewer.js";

export const VIEWS = {
  PA: "PA", AP: "AP", AP_SUPINE: "AP supine", LATERAL: "Lateral", LL: "Left lateral", RL: "Right lateral",
  OBLIQUE: "Oblique", DECUBITUS: "Decubitus", OTHER: "Other", UNKNOWN: "Unknown",
};
const SOURCES = {
  given: ["given", "The view was given with the image."],
  header: ["from header", "The view is what the DICOM header says."],
  classifier: ["recognised", "A small classifier recognised the view; the file does not state it."],
  unknown: ["not stated", "Neither the file nor the classifier says which view this is."],
};

/** Flags of every image that are about the model: said once, above the images. */
export const OF_MODEL = ["not_screened"];

/** Flags that change nothing of what was read: said once, below the images. */
export const QUIET = ["burned_in_unknown", "burned_in_annotation"];

export class Views {
  /**
   * @param {HTMLElement} box where the images go.
   * @param {function()} corrected told when the reader changes the view of an image.
   */
  constructor(box, corrected) {
    this.box = box;
    this.corrected = corrected;
    this.items = [];
    this.tool = "window";
    this.opacity = 0.8;
  }

  /** Files that were chosen and not yet read: their own pictures where the browser can show them. */
  stage(files) {
    this.clear();
    this.items = files.map((file, index) => this.#item(index + 1, file));
    this.#arrange();
  }

  /** The images as the server read them. */
  show(images) {
    for (const image of images) {
      let item = this.items[image.number - 1];
      if (!item) {
        item = this.#item(image.number, null);
        this.items.push(item);
      }
      this.#describe(item, image);
    }
    this.#arrange();
  }

  /** Give an image its picture from the server. */
  setPicture(number, bitmap) {
    const item = this.items[number - 1];
    item.figure.classList.toggle("blank", !bitmap);
    item.viewer.setPicture(bitmap);
    item.note.textContent = bitmap ? "" : "This image cannot be shown.";
  }

  /** Take the heat away, and say what each image adds to the finding (null: to none). */
  setFinding(finding) {
    this.items.forEach((item) => {
      item.viewer.setHeat(null);
      item.figure.classList.remove("hot");
      this.#share(item, finding);
    });
  }

  setHeat(number, bitmap) {
    const item = this.items[number - 1];
    item.viewer.setHeat(bitmap);
    item.figure.classList.toggle("hot", Boolean(bitmap));
  }

  setOpacity(share) {
    this.opacity = share;
    for (const item of this.items) item.viewer.setOpacity(share);
  }

  setTool(tool) {
    this.tool = tool;
    this.box.dataset.tool = tool;
    for (const item of this.items) item.viewer.tool = tool;
  }

  invert() {
    for (const item of this.#addressed()) item.viewer.invert();
  }

  reset() {
    for (const item of this.#addressed()) item.viewer.reset();
  }

  /** Show one image alone, or all again. */
  enlarge(number) {
    if (number > this.items.length || this.items.length < 2) return;
    this.large = this.large === number ? null : number;
    this.#arrange();
  }

  /** Whether the reader has changed a view since the study was read. */
  changed() {
    return this.items.some((item) => item.image && item.select.value !== item.image.view);
  }

  /** The views that the reader has said, also before an earlier run, "" where none was; null where there is none at all. */
  said() {
    const views = this.items.map(({ image, select }) => (
      image && (select.value !== image.view || image.view_source === "given") ? select.value : ""));
    return views.some(Boolean) ? views : null;
  }

  /** Say why the server could not use an image. */
  refuse(number, reason) {
    const item = this.items[number - 1];
    if (!item) return;
    item.figure.classList.add("refused");
    item.flags.replaceChildren(flag(reason));
  }

  /** Take back what `refuse` said; what is wrong with the image as it was read is said again. */
  accept() {
    for (const item of this.items.filter((one) => one.figure.classList.contains("refused"))) {
      item.figure.classList.remove("refused");
      this.#warn(item);
    }
  }

  clear() {
    for (const item of this.items) item.viewer.close();
    this.items = [];
    this.large = null;
    this.box.replaceChildren();
  }

  /** The images that a key or button without an address is for: the one with the focus, else all that can be seen. */
  #addressed() {
    const within = this.items.filter((item) => item.figure.contains(document.activeElement));
    return within.length ? within : this.items.filter((item) => !item.figure.hidden);
  }

  #arrange() {
    this.box.dataset.count = this.items.length;
    for (const item of this.items) item.figure.hidden = Boolean(this.large) && item.number !== this.large;
    this.box.classList.toggle("alone", Boolean(this.large));
    this.box.replaceChildren(...this.items.map((item) => item.figure));
  }

  #item(number, file) {
    const canvas = make("canvas", {
      tabindex: "0", role: "img", "aria-label": `Image ${number}`, "aria-describedby": "viewer-keys", id: `image-${number}`,
    });
    const window = make("span", { class: "corner window" });
    const zoom = make("span", { class: "corner zoom" });
    const title = make("span", { class: "corner title" }, String(number));
    const note = make("p", { class: "note" }, file ? make("span", {}, bytes(file.size)) : "");
    const flags = make("div", { class: "flags" });
    const select = make("select", { "aria-label": `View of image ${number}`, disabled: "" },
      ...Object.entries(VIEWS).map(([value, words]) => make("option", { value }, words)));
    select.value = "UNKNOWN";
    const source = make("span", { class: "source" });
    const share = make("div", { class: "share" });
    const caption = make("figcaption", {}, make("div", { class: "what" }, select, source), share);
    const stage = make("div", { class: "stage" }, canvas, title, window, zoom, note);
    const figure = make("figure", { class: "view blank" }, flags, stage, caption);
    const viewer = new Viewer(canvas, (one) => {
      window.textContent = `W ${Math.round(one.window.width)}  L ${Math.round(one.window.centre)}${one.inverted ? "  inverted" : ""}`;
      zoom.textContent = one.view.zoom === 1 ? "" : `${Math.round(100 * one.view.zoom)} %`;
    });
    viewer.tool = this.tool;
    viewer.opacity = this.opacity;
    const item = { number, file, figure, viewer, canvas, note, title, flags, select, source, share, image: null };
    select.addEventListener("change", () => {
      this.#source(item);
      this.corrected();
    });
    canvas.addEventListener("dblclick", () => this.enlarge(number));
    if (file) {
      const name = make("span", { class: "file" }, file.name);
      note.prepend(name);
      preview(item);
    }
    return item;
  }

  #describe(item, image) {
    item.image = image;
    item.viewer.seen = image.box;
    item.note.textContent = "";
    item.select.disabled = false;
    item.select.value = image.view in VIEWS ? image.view : "OTHER";
    item.figure.classList.toggle("unscored", !image.scored);
    item.canvas.setAttribute("aria-label", `Image ${image.number}, ${VIEWS[image.view] ?? image.view}, ${image.columns} by ${image.rows} pixels`);
    item.title.textContent = `${image.number}  ${VIEWS[image.view] ?? image.view}`;
    this.#warn(item);
    this.#source(item);
  }

  #warn(item) {
    const { image } = item;
    const once = [...OF_MODEL, ...QUIET];
    const loud = (image?.flags ?? []).filter(({ code }) => !once.includes(code)).map(({ message }) => message);
    if (image && !image.scored) loud[0] = `Not scored. ${loud[0] ?? "This image takes no part in the findings."}`;
    item.flags.replaceChildren(...loud.map((words) => flag(words)));
  }

  #source(item) {
    const changed = item.image && item.select.value !== item.image.view;
    const [words, title] = changed
      ? ["corrected", "Run again to use the corrected view."]
      : (SOURCES[item.image?.view_source] ?? ["", ""]);
    item.source.textContent = words;
    item.source.title = title;
    item.source.classList.toggle("changed", Boolean(changed));
  }

  #share(item, finding) {
    const { image } = item;
    item.share.replaceChildren();
    const own = image?.scored ? finding?.images?.find((one) => one.number === image.number) : null;
    const value = own?.contribution ?? null;
    if (value === null) return;
    const meter = make("span", { class: "meter", "aria-hidden": "true" });
    setVariable(meter, "--to", value);
    item.share.append(
      make("span", { class: "soft" }, "share"),
      meter,
      make("b", { class: "contribution" }, percent(value)),
    );
    if (own.probability !== null) {
      item.share.append(make("span", { class: "soft alone", title: "What this image alone says of the finding" }, `alone ${percent(own.probability)}`));
    }
  }
}

function flag(words) {
  return make("p", { class: "flag" }, icon("warning"), make("span", {}, words));
}

/** A browser shows PNG and JPEG by itself; a DICOM file waits for the server. */
async function preview(item) {
  try {
    const bitmap = await createImageBitmap(item.file);
    if (item.image || !item.figure.isConnected) return;
    item.figure.classList.remove("blank");
    item.viewer.setPicture(bitmap);
  } catch {
    // Not a picture that the browser knows.
  }
}
