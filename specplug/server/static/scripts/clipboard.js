// Buttons that copy text.

import { button, byId } from "./elements.js";

const SHOWN_MS = 1500;

/** A button that copies what `text()` returns. */
export function copyButton(text, label = "Copy") {
  const copying = button(
    "Copy",
    async () => {
      const outcome = (await copy(text())) ? "Copied" : "Not copied";
      copying.textContent = outcome;
      byId("announcer").textContent = outcome;
      setTimeout(() => {
        copying.textContent = "Copy";
      }, SHOWN_MS);
    },
    { "aria-label": label, class: "quiet" },
  );
  return copying;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // on a page without TLS there is no clipboard, but on this machine's own address
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
