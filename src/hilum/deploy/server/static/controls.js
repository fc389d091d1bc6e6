// Buttons, choices, keys and dropped files that change how a study is shown, and nothing of the study itself.

import { byId, remember, remembered } from "./dom.js";
import { listenToKeys } from "./keys.js";

let shownOpacity = 80; // per cent, the last one that could be seen

/**
 * Listen to everything that changes how a study looks.
 * @param {object} list the findings (findings.js).
 * @param {object} views the images (views.js).
 */
export function listenToControls(list, views) {
  const setOpacity = (value) => {
    const share = Math.min(100, Math.max(0, value));
    if (share) shownOpacity = share;
    byId("opacity").value = share;
    byId("opacity-value").textContent = `${share} %`;
    views.setOpacity(share / 100);
  };
  const opacity = () => Number(byId("opacity").value);
  byId("opacity").addEventListener("input", () => setOpacity(opacity()));
  byId("invert").addEventListener("click", () => views.invert());
  byId("reset").addEventListener("click", () => views.reset());
  for (const radio of document.querySelectorAll("input[name=tool]")) {
    radio.addEventListener("change", () => views.setTool(radio.value));
  }
  listenToChoices(list);
  byId("theme").addEventListener("click", changeTheme);
  byId("keys").addEventListener("click", () => byId("help").showModal());
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  }
  listenToKeys(list, views, {
    changeTheme,
    useTool: (name) => {
      document.querySelector(`input[name=tool][value=${name}]`).checked = true;
      views.setTool(name);
    },
    stepOpacity: (step) => setOpacity(opacity() + step),
    toggleOverlay: () => setOpacity(opacity() ? 0 : shownOpacity),
  });
}

/**
 * A study may be dropped anywhere on the page.
 * @param {function(FileList)} take is given what was dropped.
 */
export function listenForFiles(take) {
  let depth = 0; // elements of the page that the files are above; one is left after the next is entered
  const shadow = (change) => {
    depth = change === null ? 0 : Math.max(0, depth + change);
    byId("curtain").hidden = depth === 0;
  };
  const onFiles = (name, act) => addEventListener(name, (event) => {
    if (event.dataTransfer?.types.includes("Files")) act(event);
  });
  onFiles("dragenter", () => shadow(1));
  onFiles("dragleave", () => shadow(-1));
  onFiles("dragover", (event) => event.preventDefault());
  onFiles("drop", (event) => {
    event.preventDefault(); // else the browser leaves the page for the file
    shadow(null);
    take(event.dataTransfer.files);
  });
}

/** How findings are arranged, as this browser remembers it. The thresholds wait for the server to name them. */
function listenToChoices(list) {
  byId("filter").addEventListener("input", (event) => list.set("filter", event.target.value));
  for (const [name, otherwise] of [["sort", "probability"], ["grouping", "groups"], ["scale", "linear"]]) {
    const select = byId(name);
    select.value = remembered(name, [...select.options].map((option) => option.value), otherwise);
    list.set(name, select.value);
  }
  for (const name of ["sort", "grouping", "scale", "threshold"]) {
    byId(name).addEventListener("change", (event) => {
      remember(name, event.target.value);
      list.set(name, event.target.value);
    });
  }
}

function changeTheme() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  remember("theme", root.dataset.theme);
}
