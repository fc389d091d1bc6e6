// What is known of the chosen finding, in words and figures.

import { byId, make } from "./dom.js";
import { percent, thresholdName } from "./numbers.js";

/** Fill the panel of the chosen finding; null says how to choose one. */
export function showDetail(finding, metadata) {
  const box = byId("detail");
  box.classList.toggle("none", !finding);
  if (!finding) {
    box.replaceChildren(make("p", { class: "soft" }, "Choose a finding to see where the model looked, and which image carried it."));
    return;
  }
  const parts = [
    make("h2", {}, make("span", { class: `shape ${finding.group ?? "other"}`, "aria-hidden": "true" }),
      make("span", { class: "finding-name" }, finding.name),
      make("span", { class: "figure" }, finding.trained ? percent(finding.probability) : "")),
  ];
  if (!finding.trained) {
    parts.push(make("p", { class: "soft" }, "The model was never trained on this finding: it says nothing about it."));
  } else if (finding.probability === null) {
    parts.push(make("p", { class: "soft" }, "Not scored in this study."));
  } else {
    parts.push(meaning(finding), points(finding, metadata.thresholds ?? []));
    if (finding.calibration_flag) parts.push(make("p", { class: "reserved" }, `* ${sentenceCase(finding.calibration_flag)}`));
    if (!finding.has_map) parts.push(make("p", { class: "soft" }, "The model has no map for this finding."));
  }
  box.replaceChildren(...parts);
}

function meaning(finding) {
  if (!finding.interval) return make("p", { class: "soft" }, "No interval: the model keeps too few validation studies for it, or none.");
  const [low, high] = finding.interval;
  return make("p", {}, "Of the validation studies that scored like this, ",
    make("b", {}, `${percent(low)} to ${percent(high)}`), " were positive (95 % interval).");
}

function points(finding, names) {
  if (!finding.thresholds) return make("p", { class: "soft" }, "No operating points were chosen for it.");
  const known = names.filter((name) => name in finding.thresholds);
  return make("dl", { class: "points" }, ...known.flatMap((name) => [
    make("dt", {}, thresholdName(name)),
    make("dd", { class: finding.above?.[name] ? "is-above" : "" }, percent(finding.thresholds[name]),
      make("span", { class: "soft" }, finding.above?.[name] ? "above" : "below")),
  ]));
}

const sentenceCase = (words) => words.charAt(0).toLocaleUpperCase() + words.slice(1);
