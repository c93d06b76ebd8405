// Light or dark: as the system asks, until the button decides.

import { byId } from "./elements.js";

const KEY = "specplug-theme";
const root = document.documentElement;

export function useTheme() {
  try {
    setTheme(localStorage.getItem(KEY));
  } catch {
    /* no storage */
  }
  byId("theme").addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    setTheme(dark ? "light" : "dark");
    try {
      localStorage.setItem(KEY, root.dataset.theme);
    } catch {
      /* without storage the theme lasts until a reload */
    }
  });
}

function setTheme(theme) {
  if (theme) root.dataset.theme = theme;
}
