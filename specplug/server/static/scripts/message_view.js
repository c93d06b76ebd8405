// One message on the page: its text, its reasoning, its buttons, and the editor of a question.

import { copyButton } from "./clipboard.js";
import { DraftedView } from "./drafted_text.js";
import { button, make } from "./elements.js";
import { MarkdownView } from "./markdown.js";

const BUSY_SHARE = 4; // rendering takes at most one part in this many of the time
const SHORTEST_MS = 40;

/** A question of the user. `resend(text)` is called with the edited text. */
export class QuestionView {
  constructor(message, resend) {
    this.message = message;
    this.resend = resend;
    this.element = make("article", { class: "message user", "aria-label": "You" });
    this.show();
  }

  show() {
    this.editing = button("Edit", () => this.edit(), { class: "quiet" });
    const tools = make(
      "div",
      { class: "tools" },
      copyButton(() => this.message.content),
      this.editing,
    );
    this.element.replaceChildren(make("div", { class: "text", dir: "auto" }, this.message.content), tools);
  }

  edit() {
    const area = make("textarea", { rows: 4, dir: "auto", "aria-label": "Edit the message" });
    area.value = this.message.content;
    const cancel = () => {
      this.show();
      this.editing.focus();
    };
    const send = () => {
      if (area.value.trim()) this.resend(area.value.trim());
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    const tools = make(
      "div",
      { class: "tools" },
      button("Send again", send, { class: "primary" }),
      button("Cancel", cancel),
      make("span", { class: "small" }, "What follows this message is removed."),
    );
    this.element.replaceChildren(area, tools);
    area.focus();
  }
}

/** An answer of the model. `retry()` is called to have it made again. */
export class AnswerView {
  constructor(message, retry) {
    this.message = message;
    this.reasoningText = make("div", { class: "source", dir: "auto" });
    this.reasoningTitle = make("summary");
    this.reasoning = make("details", { class: "reasoning" }, this.reasoningTitle, this.reasoningText);
    this.body = make("div", { class: "markdown" });
    this.drafted = make("div", { class: "drafted", hidden: true });
    this.note = make("p", { class: "note", hidden: true });
    this.drafting = button("Show drafted text", () => this.toggleDrafted(), {
      class: "quiet",
      "aria-pressed": "false",
    });
    this.copying = copyButton(() => this.message.content, "Copy answer");
    const retrying = button("Retry", retry, { class: "quiet retry" });
    this.tools = make("div", { class: "tools" }, this.copying, retrying, this.drafting);
    this.element = make(
      "article",
      { class: "message assistant", "aria-label": "Model" },
      this.reasoning,
      this.body,
      this.drafted,
      this.note,
      this.tools,
    );
    this.markdown = new MarkdownView(this.body);
    this.tookMs = 0;
    this.show();
  }

  /** Show what the message has now: at once where the answer has ended, else soon. */
  update() {
    if (this.message.outcome !== "running") {
      clearTimeout(this.waiting);
      this.waiting = null;
      this.show();
    } else
      this.waiting ??= setTimeout(
        () => {
          this.waiting = null;
          this.show();
        },
        Math.max(SHORTEST_MS, this.tookMs * BUSY_SHARE),
      );
  }

  show() {
    const began = performance.now(),
      running = this.message.outcome === "running";
    const { reasoning, content: text } = this.message;
    this.reasoning.hidden = !reasoning.trim();
    this.reasoningTitle.textContent = running && !text ? "Reasoning …" : "Reasoning";
    this.reasoningText.textContent = reasoning.trim();
    this.element.classList.toggle("running", running);
    this.tools.hidden = running && !text;
    this.copying.hidden = !text;
    this.drafting.hidden = !this.message.segments.length;
    this.showNote();
    if (this.drafted.hidden) this.markdown.update(text, !running);
    else this.draftedView.update(this.message);
    this.tookMs = performance.now() - began;
    this.afterShow?.();
  }

  toggleDrafted() {
    const shown = this.drafted.hidden;
    this.drafted.hidden = !shown;
    this.body.hidden = shown;
    this.drafting.setAttribute("aria-pressed", String(shown));
    if (shown) this.draftedView ??= new DraftedView(this.drafted);
    this.show();
  }

  showNote() {
    const { outcome, error } = this.message;
    const notes = {
      length: "The answer reached the longest length that the settings or the context allow.",
      stopped: "Stopped.",
      failed: error,
    };
    this.note.hidden = !(outcome in notes);
    this.note.textContent = notes[outcome] ?? "";
    this.note.classList.toggle("failed", outcome === "failed");
  }
}
