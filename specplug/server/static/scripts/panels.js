// The lists beside the chat: open at the side of a wide window, closed or over the chat in a narrow one.

import { byId } from "./elements.js";

const PANELS = [
  ["conversations", "show-conversations"],
  ["server", "show-server"],
];
const wide = matchMedia("(min-width: 64rem)");

export function usePanels() {
  for (const [panel, opener] of PANELS) byId(opener).addEventListener("click", () => show(panel, byId(panel).hidden));
  wide.addEventListener("change", reset);
  document.addEventListener("keydown", (event) => {
    const open = PANELS.find(([panel]) => !byId(panel).hidden);
    if (event.key !== "Escape" || wide.matches || !open) return;
    event.stopImmediatePropagation();
    closeOverlay();
    byId(open[1]).focus();
  });
  reset();
}

/** Close what lies over the chat in a narrow window. */
export function closeOverlay() {
  if (!wide.matches) PANELS.forEach(([panel]) => show(panel, false));
}

function reset() {
  PANELS.forEach(([panel]) => show(panel, wide.matches));
}

function show(panel, open) {
  if (open && !wide.matches) closeOverlay();
  byId(panel).hidden = !open;
  byId(PANELS.find(([name]) => name === panel)[1]).setAttribute("aria-expanded", String(open));
}
