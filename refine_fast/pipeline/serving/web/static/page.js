"use strict";
// Texts of documents and queries are set with textContent only.

const element = (id) => document.getElementById(id);
const ORDER = ["blend", "fused", "base", "BM25"];
const ABOUT = {
  blend: "what is served",
  fused: "passage vectors of the tuned model",
  base: "passage vectors of the base model",
  BM25: "words",
};
let shown = "blend";
let current = null; // {query, marked}
let asked = 0;

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

async function call(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer; is refine-fast serve still running?");
  }
  const value = await response.json().catch(() => ({ error: `HTTP status ${response.status}` }));
  if (!response.ok) throw new Error(value.error || `HTTP status ${response.status}`);
  return value;
}

function passage(hit) {
  const [start, end] = hit.sentence.in_text;
  // Python counts characters, JavaScript UTF-16 units.
  const letters = Array.from(hit.text);
  const text = make("p", { className: "text", tabIndex: -1 });
  text.append(
    letters.slice(0, start).join(""),
    make("mark", { textContent: letters.slice(start, end).join("") }),
    letters.slice(end).join(""),
  );
  const [from, to] = hit.sentence.in_source;
  const button = make("button", { type: "button", textContent: "This answers it" });
  const card = make("article", { tabIndex: 0 });
  card.dataset.id = hit.id;
  if (hit.title) card.append(make("h3", { textContent: hit.title }));
  const place = make("p", { className: "place" });
  place.append(
    make("bdi", { textContent: hit.source || hit.id }),
    ` · characters ${from}–${to} · score ${hit.score.toFixed(3)}`,
  );
  card.append(text, place, button);
  button.addEventListener("click", () => judge(card));
  showMark(card);
  return make("li", {}, card);
}

function showMark(card) {
  const answers = current.marked.has(card.dataset.id);
  card.classList.toggle("answers", answers);
  const button = card.querySelector("button");
  button.setAttribute("aria-pressed", String(answers));
  button.textContent = answers ? "✓ Answers it" : "This answers it";
}

async function judge(card) {
  const { query, marked } = current;
  const id = card.dataset.id;
  const answers = !marked.has(id);
  try {
    const { marks } = await call("/api/judge", { query, doc_id: id, answers });
    answers ? marked.add(id) : marked.delete(id);
    for (const other of document.querySelectorAll("article")) showMark(other);
    say(`${marks} ${marks === 1 ? "mark" : "marks"} saved in judged.jsonl`);
  } catch (error) {
    say(`Not saved: ${error.message}`);
  }
}

function say(text) {
  element("status").textContent = text;
}

function choose(name) {
  shown = name;
  for (const section of document.querySelectorAll("section")) {
    section.classList.toggle("shown", section.dataset.system === name);
  }
  for (const tab of element("tabs").children) {
    tab.setAttribute("aria-pressed", String(tab.dataset.system === name));
  }
}

function show(found) {
  current = { query: found.query, marked: new Set(found.marked) };
  const names = ORDER.filter((name) => name in found.systems);
  const columns = names.map((name) => {
    const hits = found.systems[name];
    const title = make("h2", { textContent: `${name} ` }, make("small", { textContent: ABOUT[name] }));
    const list = hits.length
      ? make("ol", {}, ...hits.map(passage))
      : make("p", { className: "none", textContent: "No passage shares a word with the query." });
    const section = make("section", {}, title, list);
    section.dataset.system = name;
    section.setAttribute("aria-label", name);
    return section;
  });
  element("columns").replaceChildren(...columns);
  element("tabs").replaceChildren(
    ...names.map((name) => {
      const tab = make("button", { type: "button", textContent: name });
      tab.dataset.system = name;
      tab.addEventListener("click", () => choose(name));
      return tab;
    }),
  );
  choose(names.includes(shown) ? shown : names[0]);
}

async function search() {
  const query = element("query").value;
  if (!query.trim()) return;
  const mine = ++asked;
  say("Searching…");
  const start = performance.now();
  try {
    const found = await call("/api/search", { query, k: 10 });
    if (mine !== asked) return; // a newer query is on its way
    show(found);
    say(`${Math.round(performance.now() - start)} ms`);
  } catch (error) {
    if (mine === asked) say(`Not found: ${error.message}`);
  }
}

function move(sideways, down) {
  const names = Array.from(document.querySelectorAll("section"), (x) => x.dataset.system);
  const card = document.activeElement.closest("article");
  let place = 0;
  if (card) {
    const cards = Array.from(card.closest("section").querySelectorAll("article"));
    place = cards.indexOf(card) + down;
    shown = card.closest("section").dataset.system;
  }
  const next = names[names.indexOf(shown) + sideways];
  if (!next) return;
  choose(next);
  const cards = document.querySelectorAll(`section[data-system="${next}"] article`);
  if (place < 0) return element("query").focus();
  const target = cards[Math.min(place, cards.length - 1)];
  if (target) target.focus();
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});

document.addEventListener("keydown", (event) => {
  const typing = event.target === element("query");
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (typing) {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      search();
    } else if (event.key === "ArrowDown" && !event.target.value.includes("\n")) {
      event.preventDefault();
      move(0, 0);
    } else if (event.key === "Escape") {
      event.target.blur();
    }
    return;
  }
  const actions = {
    "/": () => element("query").focus(),
    ArrowUp: () => move(0, -1),
    ArrowDown: () => move(0, 1),
    ArrowLeft: () => move(-1, 0),
    ArrowRight: () => move(1, 0),
    a: () => {
      const card = document.activeElement.closest("article");
      if (card) judge(card);
    },
  };
  if (event.key in actions) {
    event.preventDefault();
    actions[event.key]();
  }
});

call("/api/about").then(
  (about) => {
    const { sentences, lexical } = about.blend;
    element("about").textContent =
      `${about.passages.toLocaleString("en")} passages · blend: best sentence ${sentences}, ` +
      `BM25 ${lexical} · ${about.marks} marks`;
  },
  (error) => say(error.message),
);
element("query").focus();
