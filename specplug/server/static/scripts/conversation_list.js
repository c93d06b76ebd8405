// The list of conversations: choose, rename, export, delete.

import { exportOne } from "./conversation_export.js";
import { button, byId, make } from "./elements.js";

/** Show the list. `actions`: choose, rename(conversation, title) and remove. */
export function showList(conversations, current, actions) {
  byId("conversation-list").replaceChildren(...conversations.map((one) => entry(one, one.id === current.id, actions)));
}

function entry(conversation, isCurrent, actions) {
  const item = make("li", { class: isCurrent ? "current" : null });
  const choose = button(conversation.title, () => actions.choose(conversation), {
    class: "title",
    dir: "auto",
    "aria-current": isCurrent ? "true" : null,
  });
  item.append(choose);
  if (!isCurrent) return item;
  const remove = () => {
    if (confirm(`Delete “${conversation.title}”?`)) actions.remove(conversation);
  };
  item.append(
    make(
      "div",
      { class: "tools" },
      button("Rename", () => rename(item, choose, conversation, actions), { class: "quiet" }),
      button("Export", () => exportOne(conversation), { class: "quiet" }),
      button("Delete", remove, { class: "quiet" }),
    ),
  );
  return item;
}

function rename(item, title, conversation, actions) {
  const input = make("input", {
    type: "text",
    dir: "auto",
    maxlength: 200,
    "aria-label": "Title",
    value: conversation.title,
  });
  let ended = false;
  const end = (text) => {
    if (!ended) {
      ended = true;
      actions.rename(conversation, text.trim() || conversation.title);
    }
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) end(input.value);
    if (event.key === "Escape") {
      event.stopPropagation();
      end("");
    }
  });
  input.addEventListener("blur", () => end(input.value));
  title.replaceWith(input);
  input.select();
}
