// What went wrong, in words, and what can be done about it: again, without one image, later, once the server is back.

import * as api from "./api.js";
import { announce, byId, make } from "./dom.js";
import { bytes } from "./numbers.js";

let clock = 0;

/** Show a sentence and buttons for it, [name, act] each. */
export function alertWith(words, acts = []) {
  stopWaiting();
  byId("alert-words").textContent = words;
  byId("alert-clock").textContent = "";
  byId("alert-acts").replaceChildren(...acts.map(([name, act]) => {
    const button = make("button", { type: "button" }, name);
    button.addEventListener("click", () => { hideAlert(); act(); });
    return button;
  }));
  byId("alert").hidden = false;
}

/** Nothing is wrong any more; nothing is tried again by itself. */
export function hideAlert() {
  stopWaiting();
  byId("alert").hidden = true;
}

/**
 * Say what an error of the server means.
 * @param {Error} error anything that a request threw.
 * @param {function()} again does the same once more.
 * @param {object} study what else can be done: {limits, fileName(number), count, runAgain(), without(number)}.
 */
export function report(error, again, study) {
  if (error instanceof api.ServerGone) {
    alertWith("The server does not answer. What you see stays; the page goes on by itself once the server is back.", [["Try now", again]]);
    clock = setInterval(() => lookFor(again), 3000);
  } else if (error.status === 401) {
    askForToken(again);
  } else if (error.status === 503 || error.status === 429) {
    alertWith(error.message, [["Try now", again]]);
    countDown(error.retryAfter ?? 5, again);
  } else if (error.status === 404) {
    alertWith("The server no longer holds this study: it keeps the latest few, in memory.", study.count ? [["Run again", study.runAgain]] : []);
  } else if (error.image && [413, 422].includes(error.status)) {
    const name = study.fileName(error.image);
    alertWith(`Image ${error.image}${name ? ` (${name})` : ""} cannot be used: ${error.message}${most(error, study.limits)}`,
      study.count > 1 ? [["Go on without it", () => study.without(error.image)]] : []);
  } else if (error.status === 413) {
    alertWith(`Too large for this server: ${error.message}${most(error, study.limits)}`);
  } else if (error instanceof api.ApiError) {
    alertWith(error.message, error.status >= 500 ? [["Try again", again]] : []);
  } else {
    alertWith("Something in this page failed. Reload it.");
    throw error;
  }
}

/** What the server takes, behind an error that says that this is more. */
function most(error, limits) {
  if (error.status !== 413 || !limits) return "";
  if (error.code === "too_large") return ` The server takes up to ${Math.round(limits.pixels / 2 ** 20)} megapixels an image.`;
  return ` The server takes up to ${bytes(limits.file_bytes)} a file and ${bytes(limits.study_bytes)} a study.`;
}

/** The seconds are shown and not read aloud each time: they are outside of what a screen reader hears of the alert. */
function countDown(wait, again) {
  let left = Math.max(1, wait);
  announce(`Trying again in ${left} s.`);
  const tick = () => {
    if (left <= 0) {
      hideAlert();
      again();
      return;
    }
    byId("alert-clock").textContent = `Trying again in ${left} s.`;
    left -= 1;
  };
  clock = setInterval(tick, 1000);
  tick();
}

async function lookFor(again) {
  const mine = clock;
  if (!(await api.alive()) || mine !== clock) return;
  hideAlert();
  again();
}

function stopWaiting() {
  clearInterval(clock);
  clock = 0;
}

function askForToken(again) {
  hideAlert();
  byId("ask-token").showModal();
  byId("token-form").onsubmit = () => {
    api.setToken(byId("token").value);
    byId("token").value = "";
    again();
  };
}
