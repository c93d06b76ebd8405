// A block of code: its language, a copy button, and colours once the block is complete.

import hljs from "../vendor/highlight.js";
import { copyButton } from "./clipboard.js";
import { make } from "./elements.js";
import { sanitised } from "./sanitiser.js";

const LONGEST = 50000; // characters; longer code gets no colours
/** The languages that have colours, each with its other names. */
const LANGUAGES = {
  bash: "console sh shell zsh",
  c: "h",
  cpp: "c++ cc hpp",
  csharp: "cs",
  css: "",
  diff: "patch",
  dockerfile: "",
  go: "golang",
  ini: "toml",
  java: "",
  javascript: "js jsx",
  json: "",
  kotlin: "kt",
  makefile: "make",
  php: "",
  python: "py",
  ruby: "rb",
  rust: "rs",
  sql: "",
  swift: "",
  typescript: "ts tsx",
  xml: "html svg",
  yaml: "yml",
};
const NAMES = new Map(
  Object.entries(LANGUAGES).flatMap(([language, others]) =>
    [language, ...others.split(" ")].map((name) => [name, language]),
  ),
);

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
  const language = NAMES.get(named);
  if (complete && language && code.textContent.length <= LONGEST) colour(code, language);
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
