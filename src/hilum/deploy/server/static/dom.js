// Elements from values. Words from files, labels and servers become text nodes and nothing else: there is no way in this
// module to write markup.

/** The element with this id, which the page has. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * An element.
 * @param {string} name its tag.
 * @param {object} attributes strings; `class`, `title`, `role`, `aria-*`, ...; undefined and null are left out.
 * @param {...(Node|string|number|null)} children strings are text.
 */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(key, String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined).map(asNode));
  return element;
}

/** A picture of the page's own sheet of icons. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  picture.setAttribute("class", "icon");
  picture.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  picture.append(use);
  return picture;
}

/** Put a number of a rule of the style sheet on one element; works under a policy without inline style. */
export function setVariable(element, name, value) {
  element.style.setProperty(name, String(value));
}

/** Say something to a screen reader, without moving the focus. */
export function announce(words) {
  byId("status").textContent = words;
}

/** A choice that this browser remembers: never anything of a study. */
export function remembered(name, allowed, otherwise) {
  try {
    const value = localStorage.getItem(`hilum-${name}`);
    return allowed.includes(value) ? value : otherwise;
  } catch {
    return otherwise;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(`hilum-${name}`, value);
  } catch {
    // Private windows may keep nothing; the choice then lasts as long as the page.
  }
}

function asNode(child) {
  return child instanceof Node ? child : document.createTextNode(String(child));
}
