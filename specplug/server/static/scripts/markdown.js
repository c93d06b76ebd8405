// Markdown to sanitised elements, also while the text still grows. HTML in the text is shown as characters.

import { Marked } from "../vendor/marked.js";
import { finishCode } from "./code_blocks.js";
import { make } from "./elements.js";
import { sanitised } from "./sanitiser.js";

const LONGEST = 400000; // characters; a longer text is shown without markup

const escaped = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => (/^<br\s*\/?>$/i.test(text.trim()) ? "<br>" : escaped(text)),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`, // nothing is fetched
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

/** Renders a growing text into an element. Only the blocks that changed are made again. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.blocks = []; // {raw, complete, element}
  }

  update(text, finished) {
    const tokens = blocksOf(text);
    const namesLinks = Object.keys(tokens.links ?? {}).length > 0; // then a link may be known only after its block was made
    const blocks = tokens.map((token, index) => {
      const known = finished && namesLinks ? null : this.blocks[index];
      const complete = finished || index < tokens.length - 1;
      return known?.raw === token.raw && known.complete === complete
        ? known
        : { raw: token.raw, complete, element: render(token, complete) };
    });
    for (const old of this.blocks) if (!blocks.includes(old)) old.element.remove();
    blocks.forEach((block, index) => {
      const there = this.element.children[index];
      if (there !== block.element) this.element.insertBefore(block.element, there ?? null);
    });
    this.blocks = blocks;
  }
}

function blocksOf(text) {
  if (text.length > LONGEST) return [{ raw: text, plain: true }];
  try {
    const tokens = marked.lexer(text),
      { links } = tokens;
    return Object.assign(
      tokens.filter((token) => token.type !== "space" && token.type !== "def"),
      { links },
    );
  } catch {
    // too deeply nested for the parser
    return [{ raw: text, plain: true }];
  }
}

function render(token, complete) {
  const block = make("div", { class: "block", dir: "auto" });
  if (token.plain) return make("div", { class: "block plain", dir: "auto" }, token.raw);
  try {
    block.append(sanitised(marked.parser([token])));
  } catch {
    return make("div", { class: "block plain", dir: "auto" }, token.raw);
  }
  for (const link of block.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const element of block.querySelectorAll("p, li, td, th, blockquote, h1, h2, h3, h4, h5, h6"))
    element.dir = "auto";
  for (const table of block.querySelectorAll("table")) {
    const scroll = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(scroll);
    scroll.append(table);
  }
  for (const pre of block.querySelectorAll("pre")) finishCode(pre, complete);
  return block;
}
