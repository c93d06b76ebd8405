// Starts the page: connects the chat, the settings, the panels and the server's figures to the elements.

import { Chat } from "./chat.js";
import { byId } from "./elements.js";
import { usePanels } from "./panels.js";
import { followServer } from "./server_panel.js";
import { useDialog } from "./settings.js";
import { useTheme } from "./theme.js";

useTheme();
usePanels();
const chat = new Chat();
const message = byId("message");
const dialog = byId("settings");

function send() {
  const text = message.value.trim();
  if (!text || chat.running) return;
  message.value = "";
  chat.send(text);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("new").addEventListener("click", () => chat.startNew());
byId("stop").addEventListener("click", () => {
  chat.stop();
  message.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !dialog.open) chat.stop();
});
byId("conversation").addEventListener("scroll", () => chat.noteScroll(), { passive: true });
useDialog(
  () => chat.current.system,
  () => chat.apply(),
);
byId("export-all").addEventListener("click", () => chat.exportAll());
byId("delete-all").addEventListener("click", () => {
  if (confirm("Delete all conversations?")) {
    dialog.close();
    chat.removeAll();
  }
});
chat.load();
followServer();
