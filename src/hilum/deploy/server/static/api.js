// The server, as the page sees it: one function per route, and errors that say what to do.
// Every request names itself (X-Hilum), so that another site open in the same browser can ask for nothing.

/** An answer of the server that is not a result. */
export class ApiError extends Error {
  constructor(status, code, message, image = null, retryAfter = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.image = image; // its number from 1, where one image is the reason
    this.retryAfter = retryAfter; // seconds
  }
}

/** No answer at all. */
export class ServerGone extends Error {
  constructor() {
    super("The server does not answer.");
  }
}

/** The reader stopped it. */
export class Stopped extends Error {}

const IN_WORDS = {
  400: "The server could not understand the request.",
  401: "The server asks for its access token.",
  403: "The server does not take requests from this address.",
  404: "The server no longer holds this study.",
  408: "The upload took too long.",
  413: "The images are larger than the server takes.",
  415: "The server does not take files of this kind.",
  429: "Too many requests at once.",
  500: "The server failed on this study.",
  503: "The server is busy.",
};

let token = takeToken();

export function setToken(value) {
  token = value;
  try {
    sessionStorage.setItem("hilum-token", value);
  } catch {
    // The token then lasts as long as the page.
  }
}

export const metadata = () => json("metadata");

/** Whether the server lives; never throws. */
export async function alive() {
  try {
    return (await fetch("healthz", { headers: headers(), cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/**
 * Send one study and wait for its findings.
 * @param {File[]} files the images. Their names stay here: a name may tell who the patient is.
 * @param {string[]|null} views a view per image as the reader corrected it, "" where it was not corrected.
 * @param {function(number|null)} progress share of the bytes that have left, null once all have.
 * @param {AbortSignal} signal stops it.
 */
export function uploadStudy(files, views, progress, signal) {
  const form = new FormData();
  files.forEach((file, index) => form.append("files", file, `image-${index + 1}`));
  if (views) views.forEach((view) => form.append("views", view));
  // fetch does not tell how much of a body has been sent.
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "api/studies");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) progress(event.loaded / event.total);
    });
    request.upload.addEventListener("load", () => progress(null));
    request.addEventListener("error", () => reject(new ServerGone()));
    request.addEventListener("timeout", () => reject(new ServerGone()));
    request.addEventListener("abort", () => reject(new Stopped()));
    request.addEventListener("load", () => {
      if (request.status === 200) resolve(parsed(request.responseText));
      else reject(failure(request.status, request.responseText, request.getResponseHeader("Retry-After")));
    });
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

export const image = (study, number) => picture(`${path(study)}/images/${number}.png`);

export const heat = (study, finding, number) => picture(`${path(study)}/maps/${finding}/${number}.png`);

export function similar(study, count, finding) {
  const query = new URLSearchParams({ count: String(count) });
  if (finding) query.set("finding", finding);
  return json(`${path(study)}/similar?${query}`);
}

/** The thumbnail of a case; its address comes from the server and is only ever asked of the same server. */
export function thumbnail(address) {
  const url = new URL(address.replace(/^\/+/, ""), document.baseURI);
  if (url.origin !== location.origin) throw new ApiError(0, "foreign", "A thumbnail from elsewhere is not shown.");
  return picture(url);
}

/** One of report.json, report.fhir.json, report.html, as a Blob. */
export const documentFile = async (study, name) => (await answer(`${path(study)}/${name}`)).blob();

/** Make the server forget a study. `leaving`: the page is closing, the request outlives it. */
export async function forget(study, leaving = false) {
  await answer(path(study), { method: "DELETE", keepalive: leaving });
}

const path = (study) => `api/studies/${encodeURIComponent(study)}`;

function headers() {
  return token ? { "X-Hilum": "page", Authorization: `Bearer ${token}` } : { "X-Hilum": "page" };
}

async function answer(url, options = {}) {
  let response;
  try {
    response = await fetch(url, { ...options, headers: headers(), cache: "no-store", redirect: "error" });
  } catch {
    throw new ServerGone();
  }
  if (!response.ok) throw failure(response.status, await response.text(), response.headers.get("Retry-After"));
  return response;
}

async function json(url) {
  return parsed(await (await answer(url)).text());
}

async function picture(url) {
  return createImageBitmap(await (await answer(url)).blob());
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new ApiError(500, "not_json", "The server's answer cannot be read. Is something between it and this page?");
  }
}

function failure(status, text, retryAfter) {
  let error = null;
  try {
    error = JSON.parse(text).error;
  } catch {
    // A proxy's page of its own, say; the status speaks.
  }
  const words = typeof error?.message === "string" ? error.message : IN_WORDS[status];
  const wait = Number.parseInt(retryAfter ?? "", 10);
  return new ApiError(
    status,
    typeof error?.code === "string" ? error.code : `http_${status}`,
    words ?? `The server answered ${status}.`,
    Number.isInteger(error?.image) ? error.image : null,
    Number.isFinite(wait) && wait >= 0 ? wait : null,
  );
}

// An address like /#token=... carries the token once; it is taken out of the address at once, so that neither the
// history nor a photograph of the screen has it.
function takeToken() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) {
    history.replaceState(null, "", location.pathname + location.search);
    try {
      sessionStorage.setItem("hilum-token", found);
    } catch {
      // Kept in this page only.
    }
    return found;
  }
  try {
    return sessionStorage.getItem("hilum-token");
  } catch {
    return null;
  }
}
