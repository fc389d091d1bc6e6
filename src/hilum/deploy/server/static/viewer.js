// One image on a canvas: window and level, zoom, pan, inversion, and the heat of a finding above it.
// Everything is drawn here from two pictures of the server; nothing goes back to it.

const FULL = { centre: 127.5, width: 255 };
const LARGEST_ZOOM = 16;

/** @returns a canvas of this size that is on no page. */
function sheet(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

export class Viewer {
  /**
   * @param {HTMLCanvasElement} canvas fills its box; its size follows.
   * @param {function(Viewer)} changed told after each change of window, zoom or inversion.
   */
  constructor(canvas, changed = () => {}) {
    this.canvas = canvas;
    this.changed = changed;
    this.tool = "window";
    this.opacity = 0.8;
    this.heat = null;
    this.seen = null; // the part that the model looks at: top, left, height, width as shares
    this.grey = null; // Uint8 per pixel, as the server gave it
    this.windowed = null; // a canvas: grey after window, level and inversion
    this.pointers = new Map();
    this.inverted = false;
    this.home();
    this.observer = new ResizeObserver(() => this.#fit());
    this.observer.observe(canvas);
    this.#listen();
  }

  /** Show a picture; null shows nothing. Window, zoom and inversion begin anew. */
  setPicture(bitmap) {
    if (!bitmap) {
      this.grey = this.windowed = this.heat = null;
      this.draw();
      return;
    }
    this.windowed = sheet(bitmap.width, bitmap.height);
    const context = this.windowed.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
    this.grey = new Uint8Array(bitmap.width * bitmap.height);
    for (let index = 0; index < this.grey.length; index += 1) this.grey[index] = pixels[4 * index];
    this.reset();
  }

  /** Lay the heat of a finding over the picture, or take it away with null. */
  setHeat(bitmap) {
    this.heat = bitmap;
    this.draw();
  }

  setOpacity(share) {
    this.opacity = share;
    this.draw();
  }

  /** Black for white. */
  invert() {
    this.inverted = !this.inverted;
    this.#applyWindow();
  }

  /** As the picture came: whole, full window, not inverted. */
  reset() {
    this.inverted = false;
    this.home();
    this.#applyWindow();
  }

  /** Window and zoom of the whole picture; draws nothing. */
  home() {
    this.window = { ...FULL };
    this.view = { zoom: 1, x: 0, y: 0 }; // x, y: pixels of the page by which the picture's middle is off
  }

  /** Wider is flatter; a higher centre is darker. In grey levels of 0 to 255. */
  windowBy(width, centre) {
    this.window.width = Math.min(510, Math.max(2, this.window.width + width));
    this.window.centre = Math.min(255, Math.max(0, this.window.centre + centre));
    this.#applyWindow();
  }

  /** Zoom by a factor, around a point of the canvas (pixels of the page), the middle without one. */
  zoomBy(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const zoom = Math.min(LARGEST_ZOOM, Math.max(0.5, this.view.zoom * factor));
    const applied = zoom / this.view.zoom;
    const right = x - this.canvas.clientWidth / 2;
    const down = y - this.canvas.clientHeight / 2;
    this.view.x = right - (right - this.view.x) * applied;
    this.view.y = down - (down - this.view.y) * applied;
    this.view.zoom = zoom;
    this.#moved();
  }

  panBy(right, down) {
    this.view.x += right;
    this.view.y += down;
    this.#moved();
  }

  /** The rectangle that the whole picture takes on the canvas: left, top, width, height in pixels of the page. */
  frame() {
    const { clientWidth, clientHeight } = this.canvas;
    const scale = Math.min(clientWidth / this.windowed.width, clientHeight / this.windowed.height) * this.view.zoom;
    const width = this.windowed.width * scale;
    const height = this.windowed.height * scale;
    return [(clientWidth - width) / 2 + this.view.x, (clientHeight - height) / 2 + this.view.y, width, height];
  }

  /** Draw before the next frame, once, however often it is asked for. */
  draw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.#paint();
    });
  }

  /** Nothing is listened to any more. */
  close() {
    this.observer.disconnect();
    cancelAnimationFrame(this.waiting);
    this.grey = this.windowed = this.heat = null;
  }

  #paint() {
    const context = this.canvas.getContext("2d");
    const ratio = this.canvas.width / Math.max(1, this.canvas.clientWidth);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.canvas.clientWidth, this.canvas.clientHeight);
    if (!this.windowed) return;
    if (this.stale) this.#renew();
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    const frame = this.frame();
    context.drawImage(this.windowed, ...frame);
    if (this.heat && this.opacity > 0) {
      context.globalAlpha = this.opacity;
      context.drawImage(this.heat, ...frame);
      context.globalAlpha = 1;
      this.#frameSeen(context, frame);
    }
  }

  /** A dashed frame where heat can be at all, unless that is everywhere. */
  #frameSeen(context, [left, top, width, height]) {
    if (!this.seen || (this.seen[2] > 0.995 && this.seen[3] > 0.995)) return;
    const [down, right, tall, wide] = this.seen;
    context.strokeStyle = "rgb(255 255 255 / 0.45)";
    context.lineWidth = 1;
    context.setLineDash([5, 5]);
    context.strokeRect(left + right * width + 0.5, top + down * height + 0.5, wide * width - 1, tall * height - 1);
    context.setLineDash([]);
  }

  #applyWindow() {
    this.stale = true;
    this.#moved();
  }

  /** Grey after window, level and inversion; once a frame, however fast the hand is. */
  #renew() {
    this.stale = false;
    const table = new Uint32Array(256);
    const lowest = this.window.centre - this.window.width / 2;
    for (let grey = 0; grey < 256; grey += 1) {
      const share = Math.min(1, Math.max(0, (grey - lowest) / this.window.width));
      const level = Math.round(255 * (this.inverted ? 1 - share : share));
      table[grey] = (255 << 24) | (level << 16) | (level << 8) | level; // little-endian, as every browser's machine
    }
    const context = this.windowed.getContext("2d", { willReadFrequently: true });
    const pixels = context.createImageData(this.windowed.width, this.windowed.height);
    const words = new Uint32Array(pixels.data.buffer);
    for (let index = 0; index < words.length; index += 1) words[index] = table[this.grey[index]];
    context.putImageData(pixels, 0, 0);
  }

  #moved() {
    this.changed(this);
    this.draw();
  }

  #fit() {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.round(this.canvas.clientWidth * ratio);
    const height = Math.round(this.canvas.clientHeight * ratio);
    if (!width || !height || (width === this.canvas.width && height === this.canvas.height)) return;
    this.canvas.width = width;
    this.canvas.height = height;
    this.#paint();
  }

  #listen() {
    const canvas = this.canvas;
    canvas.addEventListener("contextmenu", (event) => event.preventDefault()); // the right button pans
    canvas.addEventListener("wheel", (event) => {
      if (!this.windowed) return;
      event.preventDefault();
      const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
      this.zoomBy(Math.exp(-event.deltaY * lines * 0.0015), event.offsetX, event.offsetY);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.windowed) return;
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY, button: event.button, shift: event.shiftKey });
    });
    canvas.addEventListener("pointermove", (event) => this.#drag(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
    canvas.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.altKey && this.#key(event.key, event.shiftKey)) {
        event.preventDefault();
        event.stopPropagation();
      }
    });
  }

  #drag(event) {
    const held = this.pointers.get(event.pointerId);
    if (!held || !this.windowed) return;
    const right = event.clientX - held.x;
    const down = event.clientY - held.y;
    if (this.pointers.size === 2) {
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, pointer]) => pointer);
      const before = Math.hypot(held.x - other.x, held.y - other.y);
      const after = Math.hypot(event.clientX - other.x, event.clientY - other.y);
      const box = this.canvas.getBoundingClientRect();
      if (before > 0) this.zoomBy(after / before, (event.clientX + other.x) / 2 - box.left, (event.clientY + other.y) / 2 - box.top);
      this.panBy(right / 2, down / 2);
    } else if (held.button > 0 || held.shift || this.tool === "pan") {
      this.panBy(right, down);
    } else {
      this.windowBy(right * 0.9, down * 0.6);
    }
    held.x = event.clientX;
    held.y = event.clientY;
  }

  /** @returns {boolean} whether the key meant something to the image that has the focus. */
  #key(key, shift) {
    const step = shift ? 8 : 40;
    const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    if (moves[key]) this.panBy(...moves[key]);
    else if (key === "+" || key === "=") this.zoomBy(1.25);
    else if (key === "-") this.zoomBy(0.8);
    else if (key === "i") this.invert();
    else if (key === "r") this.reset();
    else return false;
    return true;
  }
}
