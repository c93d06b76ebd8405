// The record of an answer, and what is sent of a conversation. No elements of the page.

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

/** The messages of a request. Messages of one role in a row, as after a failed answer, are joined. */
export function requestMessages(system, messages) {
  const sent = system.trim() ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    const { role, content } = message;
    const last = sent.at(-1);
    if (!content) continue;
    if (last?.role === role) last.content += `\n\n${content}`;
    else sent.push({ role, content });
  }
  return sent;
}
