// Keys of the page. Those of an image that has the focus are in viewer.js, and come first.

import { byId } from "./dom.js";

/**
 * Listen to the keyboard.
 * @param {object} list the findings (findings.js).
 * @param {object} views the images (views.js).
 * @param {object} acts {changeTheme, useTool(name), stepOpacity(step), toggleOverlay}.
 */
export function listenToKeys(list, views, acts) {
  const always = {
    "?": () => byId("help").showModal(),
    t: acts.changeTheme,
  };
  const withStudy = {
    j: () => list.move(1),
    k: () => list.move(-1),
    i: () => views.invert(),
    r: () => views.reset(),
    w: () => acts.useTool("window"),
    p: () => acts.useTool("pan"),
    o: acts.toggleOverlay,
    "[": () => acts.stepOpacity(-10),
    "]": () => acts.stepOpacity(10),
    "/": () => byId("filter").focus(),
    Escape: () => list.select(null),
    ...Object.fromEntries([1, 2, 3, 4].map((number) => [String(number), () => views.enlarge(number)])),
  };
  const offControls = { // buttons and sliders have these keys themselves
    ArrowDown: () => list.move(1),
    ArrowUp: () => list.move(-1),
    PageDown: () => list.move(10),
    PageUp: () => list.move(-10),
    Home: () => list.moveTo(0),
    End: () => list.moveTo(-1),
    Enter: () => list.select(list.active),
    " ": () => list.select(list.active),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.matches("input:not([type=radio], [type=range], [type=file]), select, textarea")) {
      leaveFilter(event, list);
      return;
    }
    const study = document.body.dataset.phase === "study";
    const controls = event.target.matches("button, input, a");
    const act = always[event.key] ?? (study ? withStudy[event.key] ?? (controls ? null : offControls[event.key]) : null);
    if (!act) return;
    event.preventDefault();
    act();
  });
}

/** From the filter, Enter and the arrow go to what it found; Escape empties it. */
function leaveFilter(event, list) {
  if (event.target.id !== "filter" || !["Escape", "ArrowDown", "Enter"].includes(event.key)) return;
  event.preventDefault();
  if (event.key === "Escape") {
    event.target.value = "";
    list.set("filter", "");
  }
  byId("list").focus();
  if (event.key !== "Escape") list.moveTo(0);
}
