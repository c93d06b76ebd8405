// The record of an answer, and what is sent of a conversation. No elements of the page.

const OPENING = "<think>";
const CLOSING = "</think>";
const CLOSING_LINE = /(^|\n)[ \t]*<\/think>[ \t]*(\n|$)/;

/** An answer without text. `outcome`: running, then complete, length, stopped or failed. */
export function emptyAnswer() {
  return { role: "assistant", content: "", reasoning: "", segments: [], figures: null, outcome: "running", error: "" };
}

/** Add one event of the stream. `segments` are pairs of text and the proposer that drafted it, or null. */
export function addEvent(answer, event) {
  const choice = event.choices[0];
  if (!choice) answer.figures = event.specplug ?? null;
  answer.content += choice?.delta.content ?? "";
  answer.reasoning += choice?.delta.reasoning_content ?? "";
  if (choice?.finish_reason === "length") answer.outcome = "length";
  for (const [text, proposer] of (choice && event.specplug?.segments) ?? []) {
    const last = answer.segments.at(-1);
    if (last && last[1] === proposer) last[0] += text;
    else answer.segments.push([text, proposer]);
  }
}

/** The reasoning and the text of an answer. Reasoning may be between <think> and </think> in its content. */
export function parts({ content, reasoning, outcome }) {
  const start = content.trimStart();
  if (start.startsWith(OPENING)) {
    const end = start.indexOf(CLOSING);
    if (end < 0) return { reasoning: reasoning + start.slice(OPENING.length), text: "" };
    return {
      reasoning: reasoning + start.slice(OPENING.length, end),
      text: start.slice(end + CLOSING.length).trimStart(),
    };
  }
  if (outcome === "running" && OPENING.startsWith(start)) return { reasoning, text: "" };
  const closing = CLOSING_LINE.exec(content); // where the prompt ends with <think>, the answer has only the other mark
  if (closing) {
    return {
      reasoning: reasoning + content.slice(0, closing.index),
      text: content.slice(closing.index + closing[0].length).trimStart(),
    };
  }
  return { reasoning, text: content };
}

/** The messages of a request. Messages of one role in a row, as after a failed answer, are joined. */
export function requestMessages(system, messages) {
  const sent = system.trim() ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    const content = message.role === "assistant" ? parts(message).text : message.content;
    const last = sent.at(-1);
    if (!content) continue;
    if (last?.role === message.role) last.content += `\n\n${content}`;
    else sent.push({ role: message.role, content });
  }
  return sent;
}
