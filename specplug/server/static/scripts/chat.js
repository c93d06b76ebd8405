// The chat: sends messages, shows the answers, and keeps the conversations.

import { addEvent, emptyAnswer, requestMessages } from "./answer.js";
import { ServerGone, streamAnswer } from "./api.js";
import { exportAll } from "./conversation_export.js";
import { showList } from "./conversation_list.js";
import { byId, make } from "./elements.js";
import { AnswerView, QuestionView } from "./message_view.js";
import { closeOverlay } from "./panels.js";
import { GONE } from "./server_panel.js";
import { settings } from "./settings.js";
import * as storage from "./storage.js";

const SAVE_EVERY_MS = 3000;
const NEAR_END_PX = 80;
const TITLE_LENGTH = 60;
const SAID = {
  complete: "The answer is complete.",
  length: "The answer reached its longest length.",
  stopped: "Stopped.",
};
const log = byId("conversation");

export class Chat {
  constructor() {
    this.conversations = [];
    this.views = new Map(); // message -> its view, of those on the page
    this.running = null; // AbortController of the answer under way
    this.followsEnd = true; // unless the reader has scrolled up
    this.lastTop = 0;
    this.startNew();
  }

  async load() {
    const kept = await storage.loadAll();
    for (const message of kept.flatMap(({ messages }) => messages)) {
      if (message.outcome === "running") message.outcome = "stopped"; // the page was closed
    }
    this.conversations.push(...kept.filter(({ id }) => this.conversations.every((one) => one.id !== id)));
    this.showList();
  }

  // -- conversations ------------------------------------------------------------------------------------------------

  startNew() {
    const now = Date.now();
    this.choose({
      id: `${now}-${Math.random()}`,
      title: "New conversation",
      system: settings.system,
      changed: now,
      messages: [],
    });
    byId("message").focus();
  }

  choose(conversation) {
    this.current = conversation;
    this.showAll();
    closeOverlay();
  }

  /** Use changed settings. */
  async apply() {
    this.current.system = settings.system;
    this.showWelcome();
    if (settings.keep) await Promise.all(this.conversations.map((one) => storage.save(one)));
    else await storage.removeAll();
    this.showList();
  }

  rename(conversation, title) {
    conversation.title = title;
    this.save(conversation);
    byId("conversation-list").querySelector(".current .title")?.focus();
  }

  async remove(conversation) {
    if (conversation === this.current) this.stop();
    conversation.messages = []; // an answer that just ends has nothing to keep
    this.conversations = this.conversations.filter((one) => one !== conversation);
    await storage.remove(conversation.id);
    this.startNew();
  }

  async removeAll() {
    this.stop();
    for (const conversation of this.conversations) conversation.messages = [];
    this.conversations = [];
    await storage.removeAll();
    this.startNew();
  }

  exportAll() {
    exportAll(this.conversations);
  }

  save(conversation) {
    if (!conversation.messages.length) return;
    if (!this.conversations.includes(conversation)) this.conversations.push(conversation);
    if (settings.keep) storage.save(conversation);
    this.showList();
  }

  // -- messages -----------------------------------------------------------------------------------------------------

  send(text) {
    const { current } = this;
    if (!this.conversations.includes(current)) current.title = text.replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
    current.messages.push({ role: "user", content: text });
    this.showLast();
    return this.answer(current);
  }

  /** Send an edited question again, in place of it and of all that follows. */
  resend(message, text) {
    this.cutFrom(message);
    this.send(text);
    byId("message").focus();
  }

  /** Have an answer made again, without all that follows the question. */
  retry(message) {
    this.cutFrom(message);
    this.answer(this.current);
    byId("message").focus();
  }

  cutFrom(message) {
    this.stop();
    this.current.messages.splice(this.current.messages.indexOf(message));
    this.showAll();
  }

  stop() {
    this.running?.abort();
  }

  async answer(conversation) {
    const controller = new AbortController(),
      answer = emptyAnswer();
    const body = {
      messages: requestMessages(conversation.system, conversation.messages),
      temperature: settings.temperature,
      max_completion_tokens: settings.maxTokens,
      specplug: { mode: settings.drafting ? "auto" : "off", details: true },
    };
    conversation.messages.push(answer);
    conversation.changed = Date.now();
    this.showLast();
    this.setRunning(controller, "The model answers.");
    this.save(conversation);
    let savedAt = Date.now();
    try {
      for await (const event of streamAnswer(body, controller.signal)) {
        addEvent(answer, event);
        this.views.get(answer)?.update();
        if (Date.now() > savedAt + SAVE_EVERY_MS) {
          savedAt = Date.now();
          this.save(conversation);
        }
      }
      if (answer.outcome === "running") answer.outcome = "complete";
    } catch (error) {
      answer.outcome = error.name === "AbortError" ? "stopped" : "failed";
      answer.error = error instanceof ServerGone ? `${GONE}; your message is kept.` : error.message;
    }
    this.views.get(answer)?.update();
    if (conversation.messages.includes(answer)) this.save(conversation);
    if (this.running === controller) this.setRunning(null, answer.error || SAID[answer.outcome]);
  }

  // -- what is shown ------------------------------------------------------------------------------------------------

  setRunning(controller, said) {
    this.running = controller;
    byId("send").disabled = controller !== null;
    byId("stop").disabled = controller === null;
    log.setAttribute("aria-busy", String(controller !== null));
    byId("announcer").textContent = said;
  }

  showAll() {
    this.views.clear();
    log.replaceChildren();
    this.showWelcome();
    for (const message of this.current.messages) this.showOne(message);
    log.scrollTop = log.scrollHeight;
    this.showList();
  }

  showLast() {
    this.showOne(this.current.messages.at(-1));
    this.followsEnd = true;
    log.scrollTop = log.scrollHeight;
  }

  showOne(message) {
    log.querySelector(".welcome")?.remove();
    const view =
      message.role === "user"
        ? new QuestionView(message, (text) => this.resend(message, text))
        : new AnswerView(message, () => this.retry(message));
    view.afterShow = () => {
      if (this.followsEnd) log.scrollTop = log.scrollHeight;
    };
    this.views.set(message, view);
    log.append(view.element);
  }

  noteScroll() {
    if (log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX) this.followsEnd = true;
    else if (log.scrollTop < this.lastTop) this.followsEnd = false;
    this.lastTop = log.scrollTop;
  }

  showWelcome() {
    log.querySelector(".system")?.remove();
    if (this.current.system.trim()) {
      log.prepend(
        make(
          "details",
          { class: "system" },
          make("summary", {}, "System prompt"),
          make("div", { class: "source", dir: "auto" }, this.current.system),
        ),
      );
    }
    if (!this.current.messages.length && !log.querySelector(".welcome")) {
      log.append(
        make("p", { class: "welcome" }, "Write a message below. The answer comes from the model on this server."),
      );
    }
  }

  async showList() {
    this.conversations.sort((a, b) => b.changed - a.changed);
    showList(this.conversations, this.current, {
      choose: (conversation) => this.choose(conversation),
      rename: (conversation, title) => this.rename(conversation, title),
      remove: (conversation) => this.remove(conversation),
    });
    byId("kept").textContent =
      settings.keep && (await storage.lasts())
        ? "Conversations are kept in this browser only."
        : "Conversations are lost when this page is closed.";
  }
}
