// Similar cases: thumbnails of an index, by the whole study or by the chosen finding.

import * as api from "./api.js";
import { byId, make } from "./dom.js";

const COUNT = 8;
const SAME = 0.9995; // written as 1.000: no two films are so much alike

export class Cases {
  constructor() {
    this.box = byId("cases");
    this.asked = 0;
  }

  /** Ask for cases and show them. `finding`: the name by which to search, null: by the study. */
  async show(study, finding) {
    const turn = (this.asked += 1);
    this.box.setAttribute("aria-busy", "true");
    try {
      const { cases } = await api.similar(study, COUNT, finding);
      if (turn !== this.asked) return; // a later question is on its way
      this.box.replaceChildren(...cases.map((one) => this.#card(one, finding)));
      byId("cases-remark").hidden = !cases.some((one) => one.similarity >= SAME);
      if (!cases.length) this.say("The index holds no other case.");
    } catch (error) {
      if (turn === this.asked) this.say(error.message);
    } finally {
      if (turn === this.asked) this.box.removeAttribute("aria-busy");
    }
  }

  say(words) {
    this.asked += 1;
    this.box.removeAttribute("aria-busy");
    byId("cases-remark").hidden = true;
    this.box.replaceChildren(make("li", { class: "soft said" }, words));
  }

  clear() {
    this.asked += 1;
    byId("cases-remark").hidden = true;
    this.box.replaceChildren();
  }

  #card(one, finding) {
    const canvas = make("canvas", { width: "160", height: "160", "aria-hidden": "true" });
    const labels = labelsOf(one);
    const shown = labels.length > 3 ? 2 : 3;
    const button = make(
      "button", { type: "button", class: "case", "aria-label": `Case ${one.rank}, similarity ${one.similarity.toFixed(2)}, ${labels.join(", ")}` },
      make("span", { class: "thumb" }, canvas, make("span", { class: "rank" }, one.similarity.toFixed(2))),
      make("span", { class: "labels" }, ...labels.slice(0, shown).map((name) => label(name, finding)),
        labels.length > shown ? make("span", {}, `and ${labels.length - shown} more`) : null),
    );
    button.addEventListener("click", () => this.#open(one, finding, canvas));
    if (one.thumbnail) this.#paint(one, canvas);
    return make("li", {}, button);
  }

  async #paint(one, canvas) {
    try {
      const bitmap = await api.thumbnail(one.thumbnail);
      canvas.width = bitmap.width;
      canvas.height = bitmap.height;
      canvas.getContext("2d").drawImage(bitmap, 0, 0);
    } catch {
      // A case without its picture still has its labels.
    }
  }

  #open(one, finding, thumbnail) {
    const canvas = make("canvas", { width: String(thumbnail.width), height: String(thumbnail.height), "aria-hidden": "true" });
    canvas.getContext("2d").drawImage(thumbnail, 0, 0);
    const facts = [
      ["Similarity", one.similarity.toFixed(3)], ["View", one.view || "not stated"], ["Dataset", one.dataset || "not stated"],
      ["Study", one.study_id ?? "not shown"],
    ];
    byId("case-body").replaceChildren(
      canvas,
      make("div", {},
        make("h3", {}, "Labels"),
        make("p", { class: "labels" }, ...labelsOf(one).map((name) => label(name, finding))),
        make("dl", { class: "facts" }, ...facts.flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]))),
    );
    byId("case-title").textContent = `Similar case ${one.rank}`;
    byId("case").showModal();
  }
}

/** A case whose licence lets no copy be passed on has null in place of its labels. */
function labelsOf(one) {
  if (one.findings === null) return ["not shown to other machines"];
  return one.findings.length ? one.findings : ["no positive label"];
}

function label(name, finding) {
  return make("span", { class: name === finding ? "label same" : "label", title: name }, name);
}
