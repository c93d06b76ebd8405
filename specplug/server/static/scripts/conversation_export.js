// Saves conversations as files: one as Markdown, all as JSON.

import { make } from "./elements.js";

/** Download a conversation as Markdown. */
export function exportOne(conversation) {
  const pieces = [`# ${conversation.title}`];
  if (conversation.system) pieces.push("## System", conversation.system);
  for (const message of conversation.messages) {
    pieces.push(message.role === "assistant" ? "## Model" : "## You", message.content || "(no answer)");
  }
  download(`${fileName(conversation.title)}.md`, "text/markdown", `${pieces.join("\n\n")}\n`);
}

/** Download conversations as JSON, with messages as the API takes them. */
export function exportAll(conversations) {
  const all = conversations.map(({ title, system, changed, messages }) => ({
    title,
    system,
    changed: new Date(changed).toISOString(),
    messages: messages.map((message) => ({ role: message.role, content: message.content })),
  }));
  download("conversations.json", "application/json", `${JSON.stringify(all, null, 2)}\n`);
}

function fileName(title) {
  return (
    title
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 60) || "conversation"
  );
}

function download(name, type, text) {
  const href = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}
