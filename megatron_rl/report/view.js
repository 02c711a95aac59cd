"use strict";
// The page of a run. Its state is in the address (#page=..&q=..&f=..&r=..&c=..), so that a link leads to what it shows.

const data = JSON.parse(document.getElementById("data").textContent);
const MAX_LISTED = 300;
const FILTERS = ["everything", "right", "wrong", "cut", "failed", "stored"];
const COLOURS = {
  log_prob: "log-prob", engine_log_prob: "log-prob (engine)", difference: "trainer - engine", advantage: "advantage",
  mask: "mask", entropy: "entropy", none: "no colour",
};

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
const byId = id => document.getElementById(id);
const isNumber = x => typeof x === "number" && Number.isFinite(x);
const shown = (x, digits = 3) => isNumber(x) ? String(+x.toFixed(digits)) : x === null || x === undefined ? "–" : String(x);

// ---- rollouts of all pages, in order

const rollouts = [];
for (const page of data.pages)
  for (const rollout of page.rollouts ?? []) {
    rollout.page = page;
    rollout.index = rollouts.length;
    rollout.promptText = page.prompts[rollout.prompt];
    rollouts.push(rollout);
  }
const pageKey = page => `${page.kind}-${page.step}`;
const title = rollout => `${rollout.page.kind} ${rollout.page.step}${rollout.set ? ` ${rollout.set}` : ""}, group ${rollout.group}`;
const verdict = rollout => rollout.reason === "stored" && rollout.verdict === "failed" ? "stored" : rollout.verdict;
const lowered = [];  // made at the first search
function haystack(rollout) {
  return lowered[rollout.index] ??= `${rollout.promptText}\n${rollout.response}\n${rollout.problem_id ?? ""}`.toLowerCase();
}
function passes(rollout, filter) {
  if (filter === "everything") return true;
  if (filter === "cut") return rollout.finish === "length";
  return verdict(rollout) === filter;
}

// ---- state

const state = { page: "all", q: "", f: "everything", r: null, c: null, m: null };
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(state)) state[key] = given.get(key) ?? { page: "all", q: "", f: "everything" }[key] ?? null;
}
function go(changes) {
  Object.assign(state, changes);
  const address = new URLSearchParams();
  for (const [key, value] of Object.entries(state))
    if (value !== null && value !== "" && value !== "all" && value !== "everything") address.set(key, value);
  history.replaceState(null, "", `#${address}`);
  show();
}

// ---- left: curve and pages

function showCurve() {
  const metric = data.series[state.m] ? state.m : byId("metric").value;
  byId("metric").value = metric;
  const points = (data.series[metric] ?? []).filter(([, value]) => isNumber(value));
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const steps = points.map(point => point[0]), values = points.map(point => point[1]);
  const least = values.reduce((a, b) => Math.min(a, b), Infinity), most = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const first = steps[0] ?? 0, width = Math.max(1, (steps.at(-1) ?? 1) - first), height = most - least || 1;
  line.setAttribute("points", points.map(([s, v]) => `${(240 * (s - first)) / width},${85 - (80 * (v - least)) / height}`).join(" "));
  byId("curve").replaceChildren(line);
  byId("reading").textContent = points.length ? `${shown(least)} to ${shown(most)}, last ${shown(values.at(-1))}` : "no metrics";
  byId("curve").onclick = event => {
    const step = first + (event.offsetX / byId("curve").clientWidth) * width;
    const near = data.pages.filter(page => page.kind === "step").reduce(
      (best, page) => best && Math.abs(best.step - step) <= Math.abs(page.step - step) ? best : page, null);
    if (near) go({ page: pageKey(near), r: null });
  };
}
function pageButton(key, text) {
  const button = element("button", "", text);
  button.dataset.key = key;
  button.onclick = () => go({ page: key, r: null });
  return button;
}
function summary(page) {
  if (page.kind === "trees") return `trees ${page.step}`;
  const right = page.rollouts.filter(rollout => rollout.verdict === "right").length;
  return `${page.kind} ${page.step} · ${right} of ${page.rollouts.length} right`;
}

// ---- middle: what the search found

function snippet(rollout, query) {
  const line = element("span", "snippet");
  line.dir = "auto";
  const inResponse = rollout.response.toLowerCase().indexOf(query), text = inResponse >= 0 ? rollout.response : rollout.promptText;
  const place = query ? text.toLowerCase().indexOf(query) : -1;
  if (place < 0) { line.textContent = rollout.response.slice(0, 160); return line; }
  const start = Math.max(0, place - 60);
  line.append((start ? "…" : "") + text.slice(start, place), element("mark", "", text.slice(place, place + query.length)),
    text.slice(place + query.length, place + query.length + 100));
  return line;
}
function showList() {
  const started = performance.now(), query = state.q.toLowerCase();
  const found = rollouts.filter(rollout => (state.page === "all" || pageKey(rollout.page) === state.page)
    && passes(rollout, state.f) && (!query || haystack(rollout).includes(query)));
  const items = found.slice(0, MAX_LISTED).map(rollout => {
    const button = element("button", String(rollout.index) === state.r ? "chosen" : "");
    button.append(element("b", verdict(rollout), verdict(rollout)),
      ` ${title(rollout)} · ${shown(rollout.reward)} · ${rollout.response_tokens} tokens${rollout.finish === "length" ? ", cut" : ""}`,
      snippet(rollout, query));
    button.onclick = () => go({ r: String(rollout.index) });
    const item = element("li");
    item.append(button);
    return item;
  });
  byId("list").replaceChildren(...items);
  const more = found.length > MAX_LISTED ? `, the first ${MAX_LISTED} are listed` : "";
  byId("count").textContent = `${found.length} of ${rollouts.length} rollouts${more}`;
  document.documentElement.dataset.matches = found.length;
  document.documentElement.dataset.searchMs = Math.round(performance.now() - started);
  return found;
}

// ---- right: a rollout

function numberOf(tokens, kind, place) {
  if (kind === "difference") return tokens.log_prob?.[place] == null ? null : tokens.log_prob[place] - tokens.engine_log_prob?.[place];
  if (kind === "mask") return tokens.mask ? Number(tokens.mask[place]) : 1;
  const values = tokens[kind];
  return Array.isArray(values) ? values[place] : values ?? null;
}
function colour(kind, value, largest) {
  if (!isNumber(value)) return "";
  const shade = (rgb, strength) => strength < 0.02 ? "" : `rgba(${rgb}, ${(0.1 + 0.6 * Math.min(1, strength)).toFixed(2)})`;
  if (kind === "log_prob" || kind === "engine_log_prob") return shade("240, 140, 0", 1 - Math.exp(value));
  if (kind === "advantage") return shade(value > 0 ? "20, 160, 80" : "220, 60, 50", Math.abs(value) / largest);
  if (kind === "entropy") return shade("140, 80, 220", value / 2);
  if (kind === "difference") return shade("40, 120, 220", Math.abs(value) / 0.1);
  return "";
}
function legend(kind, largest) {
  const line = element("p", "legend", {
    log_prob: "probability of a token under the trainer: ", engine_log_prob: "probability of a token under the engine: ",
    advantage: "advantage: ", entropy: "entropy, nats: ", difference: "log-prob of the trainer less that of the engine: ",
    mask: "faint tokens are not in the loss", none: "",
  }[kind]);
  const marks = { log_prob: [0.01, 0.3, 0.6, 0.9], engine_log_prob: [0.01, 0.3, 0.6, 0.9], advantage: [-largest, -largest / 2, 0, largest / 2, largest],
    entropy: [0, 0.5, 1, 2], difference: [0, 0.03, 0.1] }[kind] ?? [];
  for (const mark of marks) {
    const span = element("span", "", shown(mark, 2));
    span.style.background = colour(kind, kind.endsWith("log_prob") ? Math.log(mark) : mark, largest);
    line.append(span);
  }
  return line;
}
function colouredResponse(rollout, kind) {
  const tokens = rollout.tokens, borders = new Map(rollout.borders ?? []);
  const largest = Math.max(1e-9, ...[tokens.advantage ?? 0].flat().filter(isNumber).slice(0, 50000).map(Math.abs));
  const text = element("pre", "text");
  text.dir = "auto";
  tokens.text.forEach((token, place) => {
    const span = element("span", numberOf(tokens, "mask", place) === 0 && kind === "mask" ? "out" : "", token.replace(/\n/g, "↵\n"));
    span.style.background = colour(kind, numberOf(tokens, kind, place), largest);
    const numbers = Object.keys(COLOURS).filter(name => name !== "none").map(name => [name, numberOf(tokens, name, place)]);
    span.title = numbers.filter(([, x]) => isNumber(x)).map(([name, x]) => `${COLOURS[name]} ${shown(x, 4)}`).join("\n");
    if (borders.has(place)) { span.classList.add("border"); span.title += `\nvalue here ${shown(borders.get(place))}`; }
    text.append(span);
  });
  return [legend(kind, largest), text];
}
function facts(rollout) {
  const line = element("div", "facts");
  const all = {
    reward: shown(rollout.reward), ...Object.fromEntries(Object.entries(rollout.parts ?? {}).map(([k, v]) => [`reward/${k}`, shown(v)])),
    reason: rollout.reason, answer: rollout.answer, found: rollout.found, finish: rollout.finish, prompt: `${rollout.prompt_tokens} tokens`,
    response: `${rollout.response_tokens} tokens`, advantage: shown(rollout.advantage), weights: `version ${rollout.weight_version}`,
    origin: rollout.origin, problem: rollout.problem_id,
  };
  for (const [name, value] of Object.entries(all)) {
    if (value === undefined || value === "" || value === "–") continue;
    const fact = element("span", "", `${name} `);
    fact.append(element("b", name === "reason" ? verdict(rollout) : "", value));
    line.append(fact);
  }
  return line;
}
function plain(text, className = "") {
  const made = element("pre", className, text);
  made.dir = "auto";
  return made;
}
function colourSwitch(kinds, chosen) {
  const select = element("select");
  for (const kind of kinds) select.append(new Option(COLOURS[kind], kind));
  select.value = chosen;
  select.onchange = () => go({ c: select.value });
  return select;
}
function showRollout(rollout) {
  const parts = [element("h1", "", title(rollout)), facts(rollout), element("h2", "", "prompt"), plain(rollout.promptText, "prompt"), element("h2", "", "response")];
  if (rollout.tokens) {
    const kinds = Object.keys(COLOURS).filter(kind => kind === "none" || kind === "mask" && rollout.tokens.advantage !== undefined
      || kind !== "mask" && rollout.tokens.text.some((_, place) => isNumber(numberOf(rollout.tokens, kind, place))));
    const chosen = kinds.includes(state.c) ? state.c : kinds[0];
    parts.push(colourSwitch(kinds, chosen), ...colouredResponse(rollout, chosen));
  } else parts.push(plain(rollout.response), element("p", "", "no token details: exp_manager.rollout_texts.groups_with_tokens says for how many groups there are some"));
  const siblings = rollout.page.rollouts.filter(other => other.group === rollout.group);
  if (siblings.length > 1) {
    const grid = element("div", "siblings");
    for (const other of siblings) {
      const card = element("button", other === rollout ? "chosen" : "");
      card.append(element("b", verdict(other), `${other.reason || verdict(other)} ${shown(other.reward)}`), ` ${other.origin === "rollout" ? "" : other.origin} A ${shown(other.advantage)} · ${other.response_tokens} tokens`,
        plain(other.response));
      card.onclick = () => go({ r: String(other.index) });
      grid.append(card);
    }
    parts.push(element("h2", "", "its group"), grid);
  }
  byId("pane").replaceChildren(...parts);
}

// ---- right: trees and chains of a step

function number(label, value) { return element("span", "number", `${label} ${isNumber(value) ? value.toFixed(3) : "–"}`); }
function drawn(piece, sure) {
  const details = element("details"), head = element("summary"), text = element("span", "text");
  details.open = true;
  const advantage = number("A", piece.advantage);
  advantage.classList.add(piece.advantage > 0 ? "up" : piece.advantage < 0 ? "down" : "none");
  for (const [token, p] of piece.tokens) {
    const span = element("span", "", token);
    // The less sure the policy was, the stronger the colour; none where it counts as sure.
    span.style.background = p >= sure ? "" : `rgba(240, 140, 0, ${(0.15 + 0.75 * (1 - p / sure)).toFixed(3)})`;
    span.title = `p = ${p}`;
    text.append(span);
  }
  head.append(number("V", piece.value), advantage, text);
  if (piece.end !== undefined) {
    const kind = piece.reward === null ? "failed" : piece.reward > 0 ? "right" : "wrong";
    head.append(element("span", `ending ${kind}`, `${piece.reason || "?"}${piece.end === "length" ? ", cut" : ""} ${piece.reward ?? ""}`));
  }
  details.append(head, ...piece.pieces.map(inner => drawn(inner, sure)));
  return details;
}
function showTrees(page) {
  const record = page.record, select = element("select"), prompt = plain("", "prompt"), drawing = element("div");
  const buttons = [["open all", true], ["close all", false]].map(([text, open]) => {
    const button = element("button", "", text);
    button.onclick = () => drawing.querySelectorAll("details").forEach(details => { details.open = open; });
    return button;
  });
  select.onchange = () => {
    const found = record.prompts[select.value], sure = record.threshold;
    prompt.textContent = `${found.prompt}\n\nanswer: ${found.answer}`;
    drawing.replaceChildren(...(found.tree ? found.tree.map(piece => drawn(piece, sure)) : found.chains.map(pieces => {
      const chain = element("div", "chain");
      chain.append(...pieces.map(piece => drawn(piece, sure)));
      return chain;
    })));
  };
  record.prompts.forEach((found, index) => select.append(new Option(found.problem_id, index)));
  byId("pane").replaceChildren(element("h1", "", `Trees of step ${page.step}`), select, ...buttons, prompt, drawing);
  if (record.prompts.length) select.onchange();
}

// ---- all of it

function show() {
  for (const button of byId("pages").children) button.classList.toggle("chosen", button.dataset.key === state.page);
  if (byId("query").value !== state.q) byId("query").value = state.q;
  byId("filter").value = state.f;
  showCurve();
  const found = showList(), page = data.pages.find(one => pageKey(one) === state.page);
  const chosen = rollouts[state.r] ?? found[0];
  if (page?.kind === "trees") showTrees(page);
  else if (chosen) showRollout(chosen);
  else byId("pane").replaceChildren(element("p", "", rollouts.length ? "nothing matches" : "no rollouts were recorded"));
}

document.title = byId("name").textContent = data.name;
byId("note").textContent = data.note;
for (const metric of Object.keys(data.series)) byId("metric").append(new Option(metric, metric));
byId("metric").onchange = () => go({ m: byId("metric").value });
for (const filter of FILTERS) byId("filter").append(new Option(filter, filter));
byId("filter").onchange = () => go({ f: byId("filter").value, r: null });
byId("pages").append(pageButton("all", "all"), ...data.pages.map(page => pageButton(pageKey(page), summary(page))));
let waiting = 0;
byId("query").oninput = () => { clearTimeout(waiting); waiting = setTimeout(() => go({ q: byId("query").value, r: null }), 80); };
window.onhashchange = () => { readAddress(); show(); };
readAddress();
if (!location.hash && !rollouts.length && data.pages.length) state.page = pageKey(data.pages[0]);
show();
document.documentElement.dataset.ready = Math.round(performance.now());  // milliseconds since the page was asked for
