"use strict";
// A chat, and the server's figures beside it. The page sends requests to its own server only and stores only the theme.

const byId = (id) => document.getElementById(id);
const conversation = byId("conversation"), input = byId("message"), send = byId("send"), stop = byId("stop");
const STATS_MS = 500, POSITIONS_SHOWN = 4, MARK_STYLES = 4;
let proposers = [];
let messages = [];
let running = null;

byId("form").addEventListener("submit", (event) => { event.preventDefault(); sendMessage(); });
byId("new").addEventListener("click", () => { stopAnswer(); messages = []; conversation.replaceChildren(); input.focus(); });
byId("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  setTheme(dark ? "light" : "dark");
});
stop.addEventListener("click", stopAnswer);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); sendMessage(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stopAnswer(); });

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("specplug-theme", theme); } catch { /* without storage the theme lasts until a reload */ }
}
try {
  const stored = localStorage.getItem("specplug-theme");
  if (stored) document.documentElement.dataset.theme = stored;
} catch { /* no storage */ }

function stopAnswer() { if (running) running.abort(); }

function addMessage(role, text) {
  const paragraph = document.createElement("p");
  paragraph.className = `message ${role}`;
  paragraph.textContent = text;
  conversation.append(paragraph);
  conversation.scrollTop = conversation.scrollHeight;
  return paragraph;
}

function numberIn(id, fallback) {
  const value = Number.parseFloat(byId(id).value);
  return Number.isFinite(value) ? value : fallback;
}

async function sendMessage() {
  const text = input.value.trim();
  if (!text || running) return;
  input.value = "";
  messages.push({ role: "user", content: text });
  addMessage("user", text);
  const paragraph = addMessage("assistant", "");
  running = new AbortController();
  send.disabled = true; stop.disabled = false;
  let answer = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      signal: running.signal,
      body: JSON.stringify({
        messages, stream: true, temperature: numberIn("temperature", 0), max_completion_tokens: numberIn("tokens", 512),
        specplug: { mode: byId("mode").value, details: true },
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.choices.length === 0) showLastAnswer(event.specplug);
      else for (const [segment, proposer] of event.specplug?.segments ?? []) {
        answer += segment;
        paragraph.append(proposer ? marked(segment, proposer) : segment);
      }
      conversation.scrollTop = conversation.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") addMessage("failed", `The answer failed: ${error.message}`);
  }
  messages.push({ role: "assistant", content: answer });
  running = null;
  send.disabled = false; stop.disabled = true;
  input.focus();
}

function marked(text, proposer) {
  const mark = document.createElement("mark");
  mark.className = `proposer-${Math.max(proposers.indexOf(proposer), 0) % MARK_STYLES}`;
  mark.title = `drafted by ${proposer}`;
  mark.textContent = text;
  return mark;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let unfinished = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    unfinished += value;
    const parts = unfinished.split("\n\n");
    unfinished = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function showLastAnswer(figures) {
  if (!figures || figures.steps === undefined) return;
  const parts = [
    `${figures.tokens_per_second ?? "–"} tokens/s`,
    `${figures.accepted_tokens} of ${figures.draft_tokens} draft tokens accepted`,
    `${figures.mean_acceptance_length.toFixed(2)} tokens per model pass`,
    `prompt evaluated in ${figures.prompt_ms} ms`,
  ];
  if (figures.speedup_over_plain) parts.push(`saved by drafting: ${figures.speedup_over_plain.toFixed(2)}x (estimate)`);
  byId("last").textContent = parts.join(", ");
}

function addCell(row, tag, text) {
  const cell = document.createElement(tag);
  cell.textContent = text;
  row.append(cell);
  return cell;
}

function percent(part, total) { return total ? `${Math.round(100 * part / total)}%` : "–"; }

function showLegend(names) {
  if (names.join() === proposers.join()) return;
  proposers = names;
  byId("sources").replaceChildren(...names.flatMap((name, index) => (index ? [", ", marked(name, name)] : [marked(name, name)])));
}

function showProposers(counts) {
  const drafting = counts.filter((one) => one.method !== "none");
  showLegend(drafting.map((one) => one.method));
  const head = document.createElement("tr");
  for (const name of ["Proposer", "All"]) addCell(head, "th", name).scope = "col";
  for (let position = 1; position <= POSITIONS_SHOWN; position += 1) addCell(head, "th", String(position)).scope = "col";
  byId("acceptance").tHead.replaceChildren(head);
  const rows = drafting.map((one) => {
    const row = document.createElement("tr");
    const name = addCell(row, "th", "");
    name.scope = "row";
    name.append(marked(one.method, one.method));
    const drafted = one.guessed.reduce((a, b) => a + b, 0), accepted = one.accepted.reduce((a, b) => a + b, 0);
    const all = addCell(row, "td", `${percent(accepted, drafted)} `);
    const bar = document.createElement("meter");
    bar.max = Math.max(drafted, 1); bar.value = accepted;
    bar.title = `${accepted} of ${drafted}`;
    all.append(bar);
    for (let i = 0; i < POSITIONS_SHOWN; i += 1) addCell(row, "td", percent(one.accepted[i], one.guessed[i]));
    return row;
  });
  byId("acceptance").tBodies[0].replaceChildren(...rows);
}

async function refreshStats() {
  try {
    const response = await fetch("specplug/stats");
    if (!response.ok) throw new Error(response.statusText);
    const stats = await response.json();
    byId("status").textContent = `${stats.model}, profile ${stats.profile}`;
    byId("rate").textContent = stats.tokens_per_second.toFixed(1);
    const speedup = stats.tokens_per_second ? stats.speedup_over_plain : null;
    byId("speedup").textContent = speedup ? `${speedup.toFixed(2)}x` : "–";
    byId("speedup").title = speedup ? `Estimate for plain decoding: ${(stats.tokens_per_second / speedup).toFixed(1)} tokens/s` : "";
    byId("waiting").textContent = String(stats.waiting);
    byId("context").textContent = percent(stats.kv_tokens.held, stats.kv_tokens.limit);
    byId("slots").replaceChildren(...stats.slots.map((slot) => {
      const item = document.createElement("li");
      item.className = slot.state;
      addCell(item, "span", slot.state);
      addCell(item, "span", slot.state === "idle" ? "" : `prompt ${slot.prompt_tokens}, answer ${slot.tokens} tokens`);
      return item;
    }));
    showProposers(stats.proposers);
  } catch (error) {
    byId("status").textContent = `The server does not respond (${error.message}). Is specplug serve still running?`;
  }
  setTimeout(refreshStats, STATS_MS);
}

refreshStats();
