// The theme stands before the first paint, so that a dark room is never lit by a white page. Not a module: modules wait.
"use strict";
(() => {
  let theme = "dark";
  try {
    if (localStorage.getItem("hilum-theme") === "light") theme = "light";
  } catch {
    // A browser that keeps nothing shows the dark one.
  }
  document.documentElement.dataset.theme = theme;
})();
