// The list of findings: bars on one axis, grouped, sorted, filtered, one chosen. A listbox for readers of the screen.

import { byId, make, setVariable } from "./dom.js";
import { AXES, percent, position, thresholdName } from "./numbers.js";

const GROUPS = {
  head: ["Head", "more than 10 % of training images"],
  medium: ["Medium", "1 to 10 %"],
  tail: ["Tail", "less than 1 %"],
  other: ["Ungrouped", ""],
};

export class FindingList {
  /**
   * @param {HTMLElement} box the listbox.
   * @param {function(object|null)} chosen told which finding is now chosen, or null.
   */
  constructor(box, chosen) {
    this.box = box;
    this.chosen = chosen;
    this.settings = { sort: "probability", grouping: "groups", scale: "linear", threshold: "f1", filter: "" };
    this.entries = [];
    this.active = null;
    this.selected = null;
    box.addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      const entry = this.entries.find((one) => one.row === row);
      if (!entry) return;
      this.#activate(entry);
      this.select(entry === this.selected ? null : entry);
    });
  }

  /** Show the findings of a study. */
  show(findings) {
    this.entries = findings.map((finding, index) => ({ finding, index, row: this.#row(index) }));
    this.active = this.selected = null;
    this.arrange();
  }

  clear() {
    this.entries = [];
    this.active = this.selected = null;
    this.box.replaceChildren();
    this.box.removeAttribute("aria-activedescendant");
  }

  set(name, value) {
    this.settings[name] = value;
    this.arrange();
  }

  /** Sort, group and filter again, from the settings; then fill every row. */
  arrange() {
    const { grouping, filter } = this.settings;
    const words = filter.trim().toLocaleLowerCase();
    this.box.parentElement.classList.toggle("flat", grouping === "flat");
    this.shown = this.entries.filter((entry) => entry.finding.name.toLocaleLowerCase().includes(words));
    this.shown.sort((one, other) => this.#compare(one, other));
    this.shown.sort((one, other) => !one.finding.trained - !other.finding.trained); // what was never trained comes last
    const parts = grouping === "flat" ? [[null, this.shown]] : this.#grouped();
    this.shown = parts.flatMap(([, entries]) => entries);
    this.box.replaceChildren(...parts.map(([name, entries]) => this.#part(name, entries)));
    if (!this.shown.length && this.entries.length) {
      this.box.append(make("p", { class: "nothing" }, "No finding has this in its name."));
    }
    for (const entry of this.entries) this.#fill(entry);
    if (this.active && !this.shown.includes(this.active)) this.#activate(null);
    this.#summarise();
  }

  /** Go down or up by some rows, choosing what is reached. */
  move(step) {
    if (!this.shown?.length) return;
    const from = this.active ? this.shown.indexOf(this.active) : step > 0 ? -1 : this.shown.length;
    const to = Math.min(this.shown.length - 1, Math.max(0, from + step));
    if (document.activeElement === document.body) this.box.focus({ preventScroll: true }); // so that it is read aloud
    this.#activate(this.shown[to]);
    this.select(this.shown[to]);
  }

  /** Go to the first (0) or last (-1) row. */
  moveTo(place) {
    if (!this.shown?.length) return;
    this.#activate(this.shown.at(place));
    this.select(this.active);
  }

  /** Choose a finding; null chooses none. */
  select(entry) {
    if (entry === this.selected) return;
    this.selected = entry;
    for (const one of this.entries) one.row.setAttribute("aria-selected", String(one === entry));
    this.chosen(entry ? entry.finding : null, entry ? entry.index : null);
  }

  #activate(entry) {
    this.active?.row.classList.remove("active");
    this.active = entry;
    if (!entry) {
      this.box.removeAttribute("aria-activedescendant");
      return;
    }
    entry.row.classList.add("active");
    this.box.setAttribute("aria-activedescendant", entry.row.id);
    entry.row.scrollIntoView({ block: "nearest" });
  }

  #compare(one, other) {
    const { sort } = this.settings;
    if (sort === "name") return one.finding.name.localeCompare(other.finding.name);
    if (sort === "above") return this.#excess(other) - this.#excess(one) || this.#rank(other) - this.#rank(one);
    return this.#rank(other) - this.#rank(one);
  }

  #rank(entry) {
    return entry.finding.probability ?? -1;
  }

  /** How far above its own threshold, in log-odds: fair between common findings and rare ones. */
  #excess(entry) {
    const { probability } = entry.finding;
    const threshold = this.#threshold(entry.finding);
    if (probability === null || threshold === null) return -Infinity;
    return logOdds(probability) - logOdds(threshold);
  }

  #threshold(finding) {
    return finding.thresholds?.[this.settings.threshold] ?? null;
  }

  #above(finding) {
    return finding.above?.[this.settings.threshold] ?? false;
  }

  #grouped() {
    const names = Object.keys(GROUPS);
    const of = (entry) => (names.includes(entry.finding.group) ? entry.finding.group : "other");
    return names.map((name) => [name, this.shown.filter((entry) => of(entry) === name)]).filter(([, some]) => some.length);
  }

  #part(name, entries) {
    const rows = entries.map((entry) => entry.row);
    if (!name) return make("div", { role: "group", "aria-label": "All findings" }, ...rows);
    const [title, meaning] = GROUPS[name];
    const above = entries.filter((entry) => this.#above(entry.finding)).length;
    const heading = make(
      "div", { class: `group ${name}`, id: `group-${name}`, role: "presentation" },
      make("span", { class: `shape ${name}`, "aria-hidden": "true" }),
      make("b", {}, title), make("span", { class: "soft" }, meaning),
      make("span", { class: "count" }, above ? `${above} above` : ""),
    );
    return make("div", { role: "group", "aria-labelledby": `group-${name}` }, heading, ...rows);
  }

  #row(index) {
    return make("div", { class: "row", id: `finding-${index}`, role: "option", "aria-selected": "false" });
  }

  #fill({ finding, row }) {
    const { scale, grouping } = this.settings;
    const threshold = this.#threshold(finding);
    const above = this.#above(finding);
    const group = finding.group in GROUPS ? finding.group : "other";
    row.className = ["row", above && "above", !finding.trained && "untrained", row.classList.contains("active") && "active"]
      .filter(Boolean).join(" ");
    row.dataset.finding = finding.name;
    row.setAttribute("aria-label", sentence(finding, threshold, above, this.settings.threshold));
    const track = make("span", { class: "track", "aria-hidden": "true" });
    if (finding.probability !== null) {
      const bar = make("span", { class: "bar" });
      setVariable(bar, "--to", position(finding.probability, scale));
      track.append(bar);
      if (finding.interval) {
        const whisker = make("span", { class: "whisker" });
        setVariable(whisker, "--from", position(finding.interval[0], scale));
        setVariable(whisker, "--to", position(finding.interval[1], scale));
        track.append(whisker);
      }
    }
    if (threshold !== null && finding.trained) {
      const tick = make("span", { class: "tick" });
      setVariable(tick, "--to", position(threshold, scale));
      track.append(tick);
    }
    const value = finding.trained ? percent(finding.probability) : "never trained";
    row.replaceChildren(
      ...(grouping === "flat" ? [make("span", { class: `shape ${group}`, "aria-hidden": "true" })] : []),
      make("span", { class: "name", title: finding.name }, finding.name,
        finding.calibration_flag ? make("span", { class: "reserve", title: finding.calibration_flag }, "*") : null),
      track,
      make("span", { class: "value" }, value),
    );
  }

  #summarise() {
    const { scale } = this.settings;
    const trained = this.entries.filter((entry) => entry.finding.trained);
    const judged = trained.filter((entry) => this.#threshold(entry.finding) !== null);
    const above = judged.filter((entry) => this.#above(entry.finding)).length;
    const without = trained.length - judged.length;
    const never = this.entries.length - trained.length;
    const scored = trained.some((entry) => entry.finding.probability !== null);
    byId("summary").textContent = !this.entries.length ? "" : !scored ? "none scored" : !judged.length ? "no thresholds"
      : `${above} of ${judged.length} above${without ? `, ${without} without threshold` : ""}`;
    byId("never").textContent = never ? `· ${never} never trained` : "";
    byId("axis").replaceChildren(...AXES[scale].map(([at, words]) => {
      const label = make("span", {}, words);
      setVariable(label, "--to", position(at, scale));
      return label;
    }));
  }
}

/** What a row says when it is read aloud. */
function sentence(finding, threshold, above, name) {
  if (!finding.trained) return `${finding.name}: never trained`;
  if (finding.probability === null) return `${finding.name}: not scored`;
  const parts = [`${finding.name}: ${percent(finding.probability)}`];
  if (finding.interval) parts.push(`interval ${percent(finding.interval[0])} to ${percent(finding.interval[1])}`);
  if (threshold !== null) parts.push(`${above ? "above" : "below"} the ${thresholdName(name)} threshold of ${percent(threshold)}`);
  if (finding.calibration_flag) parts.push(finding.calibration_flag);
  return parts.join(", ");
}

function logOdds(probability) {
  const kept = Math.min(1 - 1e-9, Math.max(1e-9, probability));
  return Math.log(kept / (1 - kept));
}
