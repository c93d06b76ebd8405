// The server's figures, asked for regularly, and whether it answers at all.

import { getStats } from "./api.js";
import { marked, setProposers } from "./drafted_text.js";
import { byId, make } from "./elements.js";

const EVERY_MS = 500;
const EVERY_MS_WITHOUT_ANSWER = 2000;
const POSITIONS = 3;
export const GONE = "The server does not answer. Start it again with specplug serve";

/** Ask for the figures as long as the page is visible. */
export async function followServer() {
  let wait = EVERY_MS;
  if (!document.hidden) {
    try {
      show(await getStats());
    } catch {
      byId("status").textContent = `${GONE}.`;
      wait = EVERY_MS_WITHOUT_ANSWER;
      setAvailable(false);
    }
  }
  setTimeout(followServer, wait);
}

function setAvailable(available) {
  document.body.classList.toggle("unavailable", !available);
}

function show(stats) {
  setAvailable(true);
  setText("status", `${stats.model}, profile ${stats.profile}`);
  setText("rate", stats.tokens_per_second.toFixed(1));
  setText("waiting", String(stats.waiting));
  setText("context", percent(stats.kv_tokens.held, stats.kv_tokens.limit));
  showSaving(stats.last_minute);
  byId("slots").replaceChildren(
    ...stats.slots.map((slot) =>
      make(
        "li",
        { class: slot.state },
        make("span", {}, slot.state),
        make("span", {}, slot.state === "idle" ? "" : `prompt ${slot.prompt_tokens}, answer ${slot.tokens} tokens`),
      ),
    ),
  );
  showProposers(stats.proposers.filter((one) => one.method !== "none"));
}

// A status region is read aloud when it changes, so that it must not be set to what it says already.
function setText(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

function showSaving(minute) {
  const saved = minute.saved_by_drafting;
  setText("saved", saved === null ? "–" : `${saved.toFixed(2)}x`);
  setText("saved-text", savingText(minute));
}

function savingText(minute) {
  const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
  if (!minute.passes) return "No pass of the model in the last minute.";
  if (!minute.draft_tokens) return `${minute.passes} passes of the model in the last minute, none with drafted tokens.`;
  const made = `${minute.passes} passes for ${minute.tokens} tokens in the last minute, ${minute.plain_passes} of them without drafted tokens.`;
  if (minute.saved_by_drafting === null)
    return `${made} These are too few to tell how long the tokens take without drafting.`;
  return `${made} By the time of these, the tokens would have taken ${seconds(minute.plain_ms)} without drafting; they took ${seconds(minute.compared_ms)}.`;
}

function percent(part, total) {
  return total ? `${Math.round((100 * part) / total)}%` : "–";
}

function sum(numbers) {
  return numbers.reduce((a, b) => a + b, 0);
}

function showProposers(proposers) {
  setProposers(proposers.map((one) => one.method));
  const positions = Array.from({ length: POSITIONS }, (_, index) => index);
  const heads = ["Proposer", "All", ...positions.map((index) => String(index + 1))];
  byId("acceptance").tHead.replaceChildren(make("tr", {}, ...heads.map((name) => make("th", { scope: "col" }, name))));
  byId("acceptance").tBodies[0].replaceChildren(
    ...proposers.map(({ method, guessed, accepted }) => {
      const drafted = sum(guessed);
      const kept = sum(accepted);
      return make(
        "tr",
        {},
        make("th", { scope: "row" }, marked(method, method)),
        make("td", {}, drafted ? `${percent(kept, drafted)} of ${drafted}` : "–"),
        ...positions.map((index) => make("td", {}, percent(accepted[index], guessed[index]))),
      );
    }),
  );
}
