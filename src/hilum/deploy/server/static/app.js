// The page from top to bottom: what is dropped goes to the server, what comes back is shown, and what the reader does
// with it stays here. Drawing is in viewer.js, the list in findings.js, requests in api.js, buttons in controls.js.
// Past 300 lines: the life of one study, from the drop to its being forgotten.

import { alertWith, hideAlert, report } from "./alerts.js";
import * as api from "./api.js";
import { Cases } from "./cases.js";
import { listenForFiles, listenToControls } from "./controls.js";
import { showDetail } from "./detail.js";
import { announce, byId, icon, make, remembered } from "./dom.js";
import { FindingList } from "./findings.js";
import { bytes, percent, seconds, thresholdName } from "./numbers.js";
import { OF_MODEL, QUIET, Views } from "./views.js";

const MOST_FILES = 4;
const HEATS_KEPT = 12; // findings whose maps stay decoded; a map is as large as its image

const state = { metadata: null, asking: null, waiting: [], files: [], study: null, finding: null, run: null, heats: new Map() };
const list = new FindingList(byId("list"), chooseFinding);
const views = new Views(byId("views"), () => { byId("rerun").hidden = !views.changed(); });
const cases = new Cases();

start();

async function start() {
  listenToControls(list, views);
  listen();
  phase("empty");
  showDetail(null);
  await introduce();
}

function listen() {
  for (const id of ["choose", "another"]) byId(id).addEventListener("click", () => byId("files").click());
  byId("files").addEventListener("change", (event) => { take(event.target.files); event.target.value = ""; });
  listenForFiles(take);
  byId("clear").addEventListener("click", () => { sayForgotten(dismiss()); byId("choose").focus(); });
  byId("stop").addEventListener("click", () => state.run?.abort());
  byId("rerun").addEventListener("click", () => run(views.said()));
  byId("alert-close").addEventListener("click", hideAlert);
  for (const radio of document.querySelectorAll("input[name=by]")) radio.addEventListener("change", showSimilar);
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", () => save(button.dataset.save, button));
  }
  addEventListener("pagehide", () => { if (state.study) forget(state.study.study.id, true); });
  addEventListener("pageshow", (event) => { if (event.persisted) clearAll(); });
}

/** Ask the server who it is; until it answers, nothing can be read, and what is dropped waits. */
function introduce() {
  state.asking ??= ask().finally(() => { state.asking = null; });
  return state.asking;
}

async function ask() {
  try {
    const facts = await api.metadata();
    state.metadata = facts;
    if (facts.notice) byId("notice").textContent = facts.notice;
    byId("model").textContent = [
      `model ${facts.model.digest.slice(0, 8)}`, `${facts.findings.length} findings`,
      facts.model.calibrated ? "calibrated" : "not calibrated",
    ].join("  ·  ");
    byId("model").title = `Hilum ${facts.hilum}`;
    byId("promise").textContent = facts.screened ? "; what is no chest X-ray is withheld"
      : ". This model cannot tell chest X-rays from other pictures: it scores whatever it is given";
    byId("limits").textContent = `Up to ${bytes(facts.limits.file_bytes)} a file.`;
    const names = facts.thresholds ?? [];
    byId("threshold").replaceChildren(...names.map((name) => make("option", { value: name }, thresholdName(name))));
    for (const id of ["threshold", "key-threshold"]) byId(id).hidden = !names.length;
    const threshold = remembered("threshold", names, names[0] ?? "f1");
    byId("threshold").value = threshold;
    list.set("threshold", threshold);
    hideAlert();
    take(state.waiting.splice(0));
  } catch (error) {
    failed(error, introduce);
  }
}

// ---------------------------------------------------------------------------------------------------- a study, read

/** Take the files of one study, look at what can be seen here, send them. */
async function take(files) {
  const chosen = [...files];
  if (!chosen.length) return;
  if (!state.metadata) {
    state.waiting = chosen;
    await introduce();
    return;
  }
  if (chosen.length > MOST_FILES) {
    alertWith(`${chosen.length} files are more than one study has room for here: choose up to ${MOST_FILES}. For folders there is hilum predict.`);
    return;
  }
  const { limits } = state.metadata;
  const large = chosen.find((file) => file.size > limits.file_bytes);
  if (large) {
    alertWith(`${large.name} has ${bytes(large.size)}; the server takes up to ${bytes(limits.file_bytes)} a file.`);
    return;
  }
  const total = chosen.reduce((sum, file) => sum + file.size, 0);
  if (total > limits.study_bytes) {
    alertWith(`Together the images have ${bytes(total)}; the server takes up to ${bytes(limits.study_bytes)} a study.`);
    return;
  }
  dismiss();
  state.files = chosen;
  views.stage(chosen);
  run(null);
}

/** Send the files at hand, with corrected views or none, and show what comes back. */
async function run(corrected) {
  hideAlert();
  state.run?.abort();
  const turn = (state.run = new AbortController());
  const before = state.study?.study.id;
  unchoose();
  phase("working");
  views.accept();
  const began = Date.now();
  const clock = setInterval(() => wait(Math.round((Date.now() - began) / 1000)), 1000);
  let sent = 0;
  const wait = (passed) => {
    byId("progress-words").textContent = sent === null
      ? `Reading${passed > 1 ? `, ${seconds(passed)}` : ""}` : `Sending, ${Math.round(sent * 100)} %`;
    if (sent === null) byId("progress-bar").removeAttribute("value");
    else byId("progress-bar").value = sent;
  };
  wait(0);
  try {
    const study = await api.uploadStudy(state.files, corrected, (share) => { sent = share; wait(0); }, turn.signal);
    if (study.model.digest !== state.metadata.model.digest) await introduce(); // it was started anew, with another model
    if (turn !== state.run) { // cleared while it was on its way
      forget(study.study.id);
      return;
    }
    if (before) forget(before);
    await showStudy(study);
  } catch (error) {
    if (turn !== state.run) return;
    if (error instanceof api.Stopped) {
      if (before) phase("study");
      else clearAll();
      return;
    }
    phase(state.study ? "study" : "failed");
    if (error.image) views.refuse(error.image, error.message);
    failed(error, () => run(corrected));
  } finally {
    clearInterval(clock);
  }
}

async function showStudy(study) {
  state.study = study;
  dropHeats();
  phase("study");
  views.show(study.study.images);
  views.setFinding(null);
  byId("rerun").hidden = true;
  const score = study.model.calibrated ? "probability" : "score";
  byId("key-score").textContent = score;
  byId("sort-score").textContent = `By ${score}`;
  list.show(study.findings);
  showDetail(null);
  showWithheld(study);
  showSimilar();
  announce(study.status === "withheld" ? "The findings of this study are withheld."
    : `Findings are here: ${[byId("summary").textContent, thresholdName(byId("threshold").value)].filter(Boolean).join(" ")}.`);
  await Promise.all(study.study.images.map(async ({ number }) => {
    try {
      const bitmap = await api.image(study.study.id, number);
      if (state.study === study) views.setPicture(number, bitmap);
    } catch (error) {
      if (state.study !== study) return;
      views.setPicture(number, null);
      failed(error, () => showStudy(study));
    }
  }));
}

function showWithheld(study) {
  const box = byId("withheld");
  const withheld = study.status === "withheld";
  const ofImages = (codes) => [...new Set(study.study.images.flatMap((image) => image.flags)
    .filter(({ code }) => codes.includes(code)).map(({ message }) => message))];
  const said = [...study.flags.map(({ message }) => message), ...ofImages(OF_MODEL)];
  const leak = study.model.accepted_leak;
  byId("remark").textContent = [...(leak ? [`Accepted leak: ${leak}.`] : []), ...ofImages(QUIET)].join(" ");
  box.hidden = !withheld && !said.length;
  box.classList.toggle("whole", withheld);
  box.replaceChildren(
    icon("warning"),
    make("div", {},
      withheld ? make("b", {}, "Findings withheld") : null,
      ...said.map((message) => make("p", {}, message))),
  );
  document.body.classList.toggle("is-withheld", withheld);
}

// ---------------------------------------------------------------------------------------------------- one finding

/** Show where the model looked for a finding, and what each image adds to it. */
async function chooseFinding(finding) {
  state.finding = finding;
  showDetail(finding, state.metadata);
  views.setFinding(finding);
  const by = document.querySelector("input[name=by][value=finding]");
  by.disabled = !finding || finding.probability === null;
  byId("by-finding").textContent = finding ? `By ${finding.name}` : "By finding";
  if (by.disabled && by.checked) {
    document.querySelector("input[name=by][value=study]").checked = true;
    showSimilar();
  } else if (by.checked) {
    showSimilar();
  }
  byId("overlay-note").textContent = "";
  if (!finding) return;
  if (!finding.has_map || !state.metadata.maps) {
    byId("overlay-note").textContent = finding.trained && finding.probability !== null ? "no map for this finding" : "";
    return;
  }
  await new Promise((resolve) => setTimeout(resolve, 60)); // a held arrow key passes many findings
  if (state.finding !== finding) return;
  const { study } = state;
  byId("overlay-note").textContent = "…";
  try {
    const heats = await heatsOf(study, finding);
    if (state.finding !== finding || state.study !== study) return;
    byId("overlay-note").textContent = "";
    heats.forEach((bitmap, index) => views.setHeat(study.study.images[index].number, bitmap));
    announce(`Overlay of ${finding.name}, ${percent(finding.probability)}.`);
  } catch (error) {
    if (state.finding !== finding || state.study !== study) return;
    byId("overlay-note").textContent = "the overlay did not come";
    if (error instanceof api.ServerGone || error.status === 404) failed(error, () => chooseFinding(finding));
  }
}

function heatsOf(study, finding) {
  const index = state.metadata.findings.findIndex((one) => one.name === finding.name);
  if (!state.heats.has(index)) {
    const maps = Promise.all(study.study.images.map((image) => (image.scored ? api.heat(study.study.id, index, image.number) : null)));
    maps.catch(() => state.heats.delete(index)); // asked again when it is chosen again
    state.heats.set(index, maps);
    if (state.heats.size > HEATS_KEPT) state.heats.delete(state.heats.keys().next().value);
  }
  return state.heats.get(index);
}

function dropHeats() {
  state.heats = new Map();
}

function unchoose() {
  list.select(null);
}

function showSimilar() {
  if (!state.study) return;
  if (!state.metadata.similar) {
    cases.say("This server was started without an index of cases.");
  } else if (state.study.status === "withheld") {
    cases.say("Withheld with the findings.");
  } else {
    const by = document.querySelector("input[name=by]:checked").value;
    cases.show(state.study.study.id, by === "finding" ? state.finding?.name : null);
  }
}

// ---------------------------------------------------------------------------------------------------- leaving

/** Forget the study, here and on the server; whether the server has. */
function dismiss() {
  const { study } = state;
  state.run?.abort();
  state.run = null;
  clearAll();
  return study ? forget(study.study.id) : Promise.resolve(true);
}

function clearAll() {
  hideAlert();
  unchoose();
  state.study = null;
  state.files = [];
  dropHeats();
  views.clear();
  list.clear();
  cases.clear();
  byId("withheld").hidden = true;
  document.body.classList.remove("is-withheld");
  byId("rerun").hidden = true;
  byId("files").value = "";
  phase("empty");
}

async function sayForgotten(forgotten) {
  if (await forgotten) announce("The study is forgotten.");
}

async function forget(id, leaving = false) {
  try {
    await api.forget(id, leaving);
  } catch (error) {
    if (error.status === 404) return true; // it had forgotten it by itself
    if (byId("alert").hidden) { // what is said there already is about what is wanted now
      alertWith(`The server could not be told to forget the study: ${error.message} It does by itself when others come, after an hour, or when it ends.`,
        [["Try again", () => sayForgotten(forget(id))]]);
    }
    return false;
  }
  return true;
}

async function save(name, button) {
  button.disabled = true;
  try {
    const content = await api.documentFile(state.study.study.id, name);
    const link = make("a", { download: `hilum-${state.study.study.id.slice(0, 8)}-${name}` });
    link.href = URL.createObjectURL(content);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    failed(error, () => save(name, button));
  } finally {
    button.disabled = false;
  }
}

/** Say what went wrong; `again` does the same once more. */
function failed(error, again) {
  report(error, again, {
    limits: state.metadata?.limits, count: state.files.length, fileName: (number) => state.files[number - 1]?.name,
    runAgain: () => run(views.said()), without: (number) => take(state.files.filter((_, index) => index !== number - 1)),
  });
}

function phase(name) {
  document.body.dataset.phase = name;
  document.body.classList.toggle("has-study", Boolean(state.study));
  byId("progress").hidden = name !== "working";
  for (const button of document.querySelectorAll("[data-save]")) button.disabled = name !== "study";
}
