// A block of code: its language, a copy button, and colours once the block is complete.

import hljs from "../vendor/highlight.js";
import { copyButton } from "./clipboard.js";
import { make } from "./elements.js";
import { sanitised } from "./sanitiser.js";

const LONGEST = 50000; // characters; longer code gets no colours
const LANGUAGES = new Set(
  (
    "bash c cpp csharp css diff dockerfile go ini java javascript json kotlin makefile php python " +
    "ruby rust sql swift typescript xml yaml"
  ).split(" "),
);
const ALIASES = {
  "c++": "cpp",
  cc: "cpp",
  hpp: "cpp",
  cs: "csharp",
  console: "bash",
  golang: "go",
  h: "c",
  html: "xml",
  js: "javascript",
  jsx: "javascript",
  kt: "kotlin",
  make: "makefile",
  patch: "diff",
  py: "python",
  rb: "ruby",
  rs: "rust",
  sh: "bash",
  shell: "bash",
  svg: "xml",
  toml: "ini",
  ts: "typescript",
  tsx: "typescript",
  yml: "yaml",
  zsh: "bash",
};

/** Put a bar with a copy button over a `pre`, and colour it if it is complete. */
export function finishCode(pre, complete) {
  const code = pre.querySelector("code") ?? pre;
  const named = (code.className.match(/language-(\S+)/)?.[1] ?? "").toLowerCase();
  const frame = make("div", { class: "code", dir: "ltr" });
  pre.replaceWith(frame);
  pre.tabIndex = 0; // so that the keyboard can scroll it
  frame.append(
    make(
      "div",
      { class: "bar" },
      make("span", {}, named),
      copyButton(() => code.textContent, "Copy code"),
    ),
    pre,
  );
  const language = ALIASES[named] ?? named;
  if (complete && LANGUAGES.has(language) && code.textContent.length <= LONGEST) colour(code, language);
}

async function colour(code, language) {
  if (!hljs.getLanguage(language)) {
    const grammar = await import(`../vendor/languages/${language}.js`).catch(() => null);
    if (!grammar) return; // the server is gone; the code is readable without colours
    hljs.registerLanguage(language, grammar.default);
  }
  const html = hljs.highlight(code.textContent, { language, ignoreIllegals: true }).value;
  code.replaceChildren(sanitised(html));
}
