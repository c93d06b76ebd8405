"use strict";
// A chat beside what speculation did for it. Speaks to its own server only; keeps nothing but the theme.

const by = (id) => document.getElementById(id);
const talk = by("talk"), say = by("say"), send = by("send"), stop = by("stop");
const STATS_MS = 500, PLACES_SHOWN = 4, LOOKS = 4;
let proposers = [];
let messages = [];
let running = null;

by("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
by("new").addEventListener("click", () => { halt(); messages = []; talk.replaceChildren(); say.focus(); });
by("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  setTheme(dark ? "light" : "dark");
});
stop.addEventListener("click", halt);
say.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") halt(); });

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("specplug-theme", theme); } catch { /* no storage: this page only */ }
}
try { const kept = localStorage.getItem("specplug-theme"); if (kept) document.documentElement.dataset.theme = kept; } catch { /* none */ }

function halt() { if (running) running.abort(); }

function add(kind, text) {
  const line = document.createElement("p");
  line.className = `message ${kind}`;
  line.textContent = text;
  talk.append(line);
  talk.scrollTop = talk.scrollHeight;
  return line;
}

function number(id, fallback) {
  const value = Number.parseFloat(by(id).value);
  return Number.isFinite(value) ? value : fallback;
}

async function ask() {
  const text = say.value.trim();
  if (!text || running) return;
  say.value = "";
  messages.push({ role: "user", content: text });
  add("user", text);
  const line = add("assistant", "");
  running = new AbortController();
  send.disabled = true; stop.disabled = false;
  let said = "";
  try {
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      signal: running.signal,
      body: JSON.stringify({
        messages, stream: true, temperature: number("temperature", 0), max_completion_tokens: number("tokens", 512),
        specplug: { mode: by("mode").value, details: true },
      }),
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.choices.length === 0) showLast(event.specplug);
      else for (const [part, guesser] of event.specplug?.segments ?? []) {
        said += part;
        line.append(guesser ? marked(part, guesser) : part);
      }
      talk.scrollTop = talk.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") add("failed", error.message);
  }
  messages.push({ role: "assistant", content: said });
  running = null;
  send.disabled = false; stop.disabled = true;
  say.focus();
}

function marked(text, guesser) {
  const made = document.createElement("mark");
  made.className = `by-${Math.max(proposers.indexOf(guesser), 0) % LOOKS}`;
  made.title = `guessed by ${guesser}`;
  made.textContent = text;
  return made;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function showLast(figures) {
  if (!figures || figures.steps === undefined) return;
  const parts = [
    `${figures.tokens_per_second ?? "–"} tokens/s`,
    `${figures.accepted_tokens} of ${figures.draft_tokens} guesses accepted`,
    `${figures.mean_acceptance_length.toFixed(2)} tokens per pass`,
    `prompt ${figures.prompt_ms} ms`,
  ];
  if (figures.speedup_over_plain) parts.push(`${figures.speedup_over_plain.toFixed(2)} times plain decoding`);
  by("last").textContent = parts.join(", ");
}

function cell(row, kind, text) {
  const made = document.createElement(kind);
  made.textContent = text;
  row.append(made);
  return made;
}

function share(accepted, guessed) { return guessed ? `${Math.round(100 * accepted / guessed)}%` : "–"; }

function showLegend(names) {
  if (names.join() === proposers.join()) return;
  proposers = names;
  by("sources").replaceChildren(...names.flatMap((name, place) => (place ? [", ", marked(name, name)] : [marked(name, name)])));
}

function showProposers(counted) {
  const drafting = counted.filter((one) => one.method !== "none");
  showLegend(drafting.map((one) => one.method));
  const head = document.createElement("tr");
  for (const name of ["Proposer", "All"]) cell(head, "th", name).scope = "col";
  for (let place = 1; place <= PLACES_SHOWN; place += 1) cell(head, "th", String(place)).scope = "col";
  by("acceptance").tHead.replaceChildren(head);
  const rows = drafting.map((one) => {
    const row = document.createElement("tr");
    const name = cell(row, "th", "");
    name.scope = "row";
    name.append(marked(one.method, one.method));
    const guessed = one.guessed.reduce((a, b) => a + b, 0), accepted = one.accepted.reduce((a, b) => a + b, 0);
    const all = cell(row, "td", `${share(accepted, guessed)} `);
    const bar = document.createElement("meter");
    bar.max = Math.max(guessed, 1); bar.value = accepted;
    bar.title = `${accepted} of ${guessed}`;
    all.append(bar);
    for (let place = 0; place < PLACES_SHOWN; place += 1) cell(row, "td", share(one.accepted[place], one.guessed[place]));
    return row;
  });
  by("acceptance").tBodies[0].replaceChildren(...rows);
}

async function look() {
  try {
    const answer = await fetch("specplug/stats");
    if (!answer.ok) throw new Error(answer.statusText);
    const now = await answer.json();
    by("what").textContent = `${now.model}, profile ${now.profile}`;
    by("rate").textContent = now.tokens_per_second.toFixed(1);
    by("plain").textContent = now.speedup_over_plain && now.tokens_per_second
      ? `${(now.tokens_per_second / now.speedup_over_plain).toFixed(1)} (× ${now.speedup_over_plain.toFixed(2)})` : "–";
    by("waiting").textContent = String(now.waiting);
    by("cache").textContent = share(now.kv_tokens.held, now.kv_tokens.limit);
    by("slots").replaceChildren(...now.slots.map((slot) => {
      const line = document.createElement("li");
      line.className = slot.state;
      cell(line, "span", slot.state);
      cell(line, "span", slot.state === "idle" ? "" : `${slot.prompt_tokens} + ${slot.tokens} tokens`);
      return line;
    }));
    showProposers(now.proposers);
  } catch (error) {
    by("what").textContent = `the server does not answer (${error.message})`;
  }
  setTimeout(look, STATS_MS);
}

look();
