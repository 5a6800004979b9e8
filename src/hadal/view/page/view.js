// The page of runs. Everything that a run says is text, and is put into the page as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const embedded = document.getElementById("embedded");
let runs = [], current = null, run = null, tag = null, place = 0, timer = null;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const number = (n) => n.toLocaleString("en");
const seconds = (s) => (s < 10 ? s.toFixed(2) : s.toFixed(0)) + " s";

// --- list ---

function matches(row) {
  const wanted = $("outcome").value, text = $("filter").value.toLowerCase();
  const is = { solved: row.score === 1, unsolved: row.score === 0, running: row.state === "running", interrupted: row.state === "interrupted" };
  if (wanted && !(wanted in is ? is[wanted] : row.outcome === wanted)) return false;
  return !text || `${row.id} ${row.task} ${row.state}`.toLowerCase().includes(text);
}

function colour(row) {
  if (row.outcome === "void") return "void";
  if (row.score === 1) return "good";
  return row.outcome === "failed" || row.score === 0 ? "bad" : "dim";
}

function showList() {
  const shown = runs.filter(matches);
  $("count").textContent = `${number(shown.length)} of ${number(runs.length)}`;
  $("runs").replaceChildren(...shown.map((row) => {
    const item = element("li");
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", String(row.id === current));
    item.append(element("div", "what", row.task || row.id));
    const facts = element("div", "dim");
    const score = row.score === null ? "" : row.score === 1 ? " · solved" : " · not solved";
    facts.append(element("span", colour(row), row.state + score));
    facts.append(` · ${row.turns} turns · ${number(row.tokens)} tokens · ${row.id}`);
    item.append(facts);
    item.onclick = () => { location.hash = `#/${row.id}`; };
    return item;
  }));
}

async function loadList() {
  try {
    runs = await (await fetch("api/runs")).json();
    $("away").hidden = true;
  } catch { // asked again soon
    $("away").hidden = false;
  }
  showList();
}

// --- one run ---

function title(steps) {
  return (steps.find((s) => s.source === "user") || { message: "" }).message;
}

function showFacts() {
  const { extra, final_metrics: sums, steps } = run;
  $("title").textContent = title(steps) || current;
  const turns = steps.filter((s) => s.source === "agent");
  const model = turns.reduce((t, s) => t + s.extra.seconds, 0);
  const results = turns.flatMap((s) => (s.observation || { results: [] }).results);
  const tools = results.reduce((t, r) => t + (r.extra.seconds || 0), 0);
  const score = extra.score === undefined ? "" : extra.score === null ? ", void" : extra.score ? ", solved" : `, not solved: ${extra.score_detail}`;
  const facts = [
    `${extra.stop_reason || extra.state}${score}`, `${turns.length} turns`,
    `${number(sums.total_prompt_tokens)} prompt tokens, ${number(sums.total_cached_tokens)} of them cached`,
    `${number(sums.total_completion_tokens)} said`, `model ${seconds(model)}, tools ${seconds(tools)}`,
  ];
  if (extra.box) facts.push(`box ${extra.box}`);
  $("facts").replaceChildren(...facts.map((f) => element("span", "", f)));
  showContext(turns);
}

function showContext(turns) {
  const most = Math.max(1, ...turns.map((s) => s.metrics.prompt_tokens + s.metrics.completion_tokens));
  const picture = $("context"), make = (n) => document.createElementNS("http://www.w3.org/2000/svg", n);
  picture.setAttribute("viewBox", `0 0 ${Math.max(24, turns.length)} 100`);
  picture.setAttribute("preserveAspectRatio", "none");
  const limit = run.extra.window;
  $("fill").hidden = !turns.length;
  $("fill").textContent = `context of each turn: at most ${number(most)} tokens${limit ? `, ${(100 * most / limit).toFixed(1)} % of ${number(limit)}` : ""}; from the cache in colour`;
  picture.replaceChildren(...turns.flatMap((step, at) => {
    const whole = 100 * (step.metrics.prompt_tokens + step.metrics.completion_tokens) / most;
    const cached = 100 * (step.metrics.cached_tokens || 0) / most;
    return [[whole, ""], [cached, "cached"]].map(([height, kind]) => {
      const bar = make("rect");
      for (const [k, v] of Object.entries({ x: at + 0.05, y: 100 - height, width: 0.9, height })) bar.setAttribute(k, v);
      if (kind) bar.setAttribute("class", kind);
      const tip = make("title");
      tip.textContent = `turn ${at + 1}: ${number(step.metrics.prompt_tokens)} tokens, ${number(step.metrics.cached_tokens || 0)} cached`;
      bar.append(tip);
      return bar;
    });
  }));
}

function marked(text, into) {
  const wanted = $("search").value;
  if (!wanted) { into.append(text); return into; }
  const low = text.toLowerCase(), key = wanted.toLowerCase();
  let from = 0;
  for (let at = low.indexOf(key); at >= 0; at = low.indexOf(key, from)) {
    into.append(text.slice(from, at), element("mark", "", text.slice(at, at + key.length)));
    from = at + key.length;
  }
  into.append(text.slice(from));
  return into;
}

function showCall(call) {
  const name = call.function_name, given = call.arguments;
  if (name === "str_replace_editor" && typeof given.path === "string") {
    if (given.command === "view") return marked(`view ${given.path}${given.view_range ? ` ${given.view_range.join(" to ")}` : ""}`, element("pre"));
    if (given.command === "create") return showNew(`create ${given.path}\n`, given.file_text);
    if (given.command === "insert") return showNew(`insert ${given.path} behind line ${given.insert_line}\n`, given.new_str);
  }
  if (name === "bash" && typeof given.command === "string") return marked(`$ ${given.command}`, element("pre"));
  if (typeof given.old_str === "string" && typeof (given.new_str || "") === "string") {
    const shown = element("pre", "", `${given.command} ${given.path}\n`);
    for (const line of given.old_str.split("\n")) shown.append(element("span", "drop", `- ${line}`));
    for (const line of (given.new_str || "").split("\n")) shown.append(element("span", "add", `+ ${line}`));
    return shown;
  }
  return marked(`${name} ${JSON.stringify(given, null, 1)}`, element("pre"));
}

function showNew(head, text) {
  const shown = element("pre", "", head);
  for (const line of String(text ?? "").split("\n")) shown.append(element("span", "add", `+ ${line}`));
  return shown;
}

function showResult(result) {
  const shown = element("div"), extra = result.extra || {};
  shown.append(marked(result.content || "", element("pre")));
  const facts = [];
  if (extra.exit_code !== undefined) facts.push(`exit code ${extra.exit_code}`);
  if (extra.seconds !== undefined) facts.push(seconds(extra.seconds));
  if (extra.full_text) facts.push(`cut; all of it: ${extra.full_text}`);
  shown.append(element("div", extra.failed ? "bad" : "dim", facts.join(" · ")));
  for (const file of extra.files || []) shown.append(showFile(file));
  return shown;
}

/** A call that has no result yet: what it has printed so far. */
function showRunning(said) {
  const shown = element("div");
  if (said) shown.append(marked(said, element("pre")));
  shown.append(element("div", "dim", run.extra.state));
  return shown;
}

/** What a call did to a file. */
function showFile(file) {
  const head = `${file.kind} ${file.path}`;
  if (!file.diff) return element("div", "dim", head);
  const shown = element("details"), lines = element("pre");
  shown.open = file.diff.length < 1500;
  for (const line of file.diff.split("\n")) {
    const kind = { "+": "add", "-": "drop" }[line[0]] || "dim";
    lines.append(element("span", kind, kind === "dim" ? `${line}\n` : line));
  }
  shown.append(element("summary", "dim", head), lines);
  return shown;
}

// --- tokens of a turn: how sure the model was of each ---

function tokensButton(step, shown) {
  const button = element("button", "plain", "tokens"), run = current;
  button.title = "what the model said, token by token";
  button.onclick = async () => {
    const open = shown.querySelector(":scope > .tokens");
    if (open) { open.remove(); return; }
    const box = element("div", "tokens", "…");
    shown.append(box);
    try {
      const reply = await fetch(`api/runs/${encodeURIComponent(run)}/tokens/${step.step_id}`);
      if (reply.ok) showTokens(box, (await reply.json()).said, step.metrics);
      else box.textContent = await reply.text();
    } catch { box.textContent = "No answer: has hadal view ended?"; }
  };
  return button;
}

function showTokens(box, said, metrics) {
  const shown = element("pre");
  for (const piece of said) {
    const logprobs = piece.logprobs || [], least = Math.min(0, ...logprobs);
    const token = element("span", "token", piece.text || "∅");
    token.style.setProperty("--doubt", Math.min(1, -least / 3).toFixed(3));
    token.title = piece.ids.map((id, at) => `id ${id}${at in logprobs ? `, log-probability ${logprobs[at].toFixed(4)}, ${(100 * Math.exp(logprobs[at])).toFixed(1)} %` : ""}`).join("\n");
    shown.append(token);
  }
  const all = said.flatMap((piece) => piece.logprobs || []);
  const facts = [`${number(metrics.cached_tokens || 0)} tokens from the cache, ${number(metrics.prompt_tokens - (metrics.cached_tokens || 0))} read, ${number(metrics.completion_tokens)} said`];
  if (all.length) facts.push(`least probable ${(100 * Math.exp(Math.min(...all))).toFixed(1)} %, mean log-probability ${(all.reduce((a, b) => a + b) / all.length).toFixed(4)}`);
  box.replaceChildren(shown, element("div", "dim", facts.join(" · ")));
}

function showStep(step) {
  const failed = step.observation && step.observation.results.some((r) => r.extra.failed);
  const shown = element("section", `step ${step.source}${failed ? " failed" : ""}`);
  shown.id = `step-${step.step_id}`;
  const head = element("div", "head");
  const link = element("a", "", `#${step.step_id}`);
  link.href = `#/${current}/${step.step_id}`;
  const who = step.extra && step.extra.by ? step.extra.by : step.source;
  head.append(link, element("span", "who", who), element("span", "", (step.timestamp || "").slice(11, 19)));
  if (step.metrics) {
    const m = step.metrics;
    head.append(element("span", "", `${number(m.prompt_tokens)} in (${number(m.cached_tokens || 0)} cached), ${number(m.completion_tokens)} out`));
    head.append(element("span", "", seconds(step.extra.seconds)));
    if (!embedded) head.append(tokensButton(step, shown));
    if (step.extra.bad) head.append(element("span", "bad", step.extra.bad));
  }
  shown.append(head);
  if (step.reasoning_content) shown.append(marked(step.reasoning_content, element("div", "thought")));
  if (step.source === "system") {
    const more = element("details");
    more.append(element("summary", "", "instructions"), marked(step.message, element("pre")));
    shown.append(more);
  } else if (step.message) shown.append(marked(step.message, element("div", "said")));
  for (const problem of (step.extra && step.extra.problems) || []) shown.append(element("div", "void", problem));
  const results = new Map(((step.observation || {}).results || []).map((r) => [r.source_call_id, r]));
  for (const call of step.tool_calls || []) {
    shown.append(showCall(call));
    const result = results.get(call.tool_call_id);
    shown.append(result ? showResult(result) : showRunning((run.extra.running || {})[call.tool_call_id]));
  }
  return shown;
}

/** A reply that is being written, as the model writes it. */
function showPending() {
  const { pending, state, stop_reason: over } = run.extra;
  if (!pending || over) return;
  const shown = element("section", "step agent"), head = element("div", "head");
  shown.id = "pending";
  head.append(element("span", "who", "agent"), element("span", "", `${state === "running" ? "writing" : state}, ${number(pending.tokens)} tokens so far`));
  shown.append(head, element("div", "said dim", pending.text));
  $("steps").append(shown);
}

function textOf(step) {
  return [step.message, step.reasoning_content, ...(step.tool_calls || []).map((c) => JSON.stringify(c.arguments)),
    ...((step.observation || {}).results || []).map((r) => r.content)].join("\n").toLowerCase();
}

function showSteps() {
  const wanted = $("search").value.toLowerCase();
  const steps = wanted ? run.steps.filter((s) => textOf(s).includes(wanted)) : run.steps;
  $("found").textContent = wanted ? `${number(steps.length)} of ${number(run.steps.length)} steps` : `${number(run.steps.length)} steps`;
  $("steps").replaceChildren(...steps.map(showStep));
}

/** Put what is new into the page; steps that were there stay, so that nobody loses their place. */
function update(next) {
  const same = run && !$("search").value ? Math.max(0, run.steps.length - 1) : 0;
  const follows = $("steps").scrollTop + $("steps").clientHeight > $("steps").scrollHeight - 40;
  run = next;
  showFacts();
  if (!same) showSteps();
  else {
    [...$("steps").children].slice(same).forEach((old) => old.remove());
    $("steps").append(...run.steps.slice(same).map(showStep));
    $("found").textContent = `${number(run.steps.length)} steps`;
  }
  showPending();
  if (same && follows) $("steps").scrollTop = $("steps").scrollHeight;
}

/** Show a run, and what comes to it; whatever fails is tried again. */
async function follow() {
  const asked = current;
  let next = null;
  try {
    const headers = tag ? { "if-none-match": tag } : {};
    const reply = await fetch(`api/runs/${encodeURIComponent(asked)}`, { cache: "no-store", headers });
    next = reply.ok ? await reply.json() : null;
    if (asked !== current) return;
    if (next) tag = reply.headers.get("etag");
    else if (!run && reply.status !== 304) $("steps").replaceChildren(element("p", "empty", await reply.text()));
  } catch { /* the list says that nobody answers */ }
  if (next && asked === current) update(next);
  if (asked === current && !(run && run.extra.stop_reason)) timer = setTimeout(follow, 1000);
}

function go(to) {
  const steps = [...$("steps").children];
  if (!steps.length) return;
  place = Math.min(Math.max(to, 0), steps.length - 1);
  steps.forEach((s, at) => s.classList.toggle("current", at === place));
  steps[place].scrollIntoView({ block: "nearest" });
}

async function open() {
  const [, id, step] = decodeURIComponent(location.hash).split("/");
  if (!id) return;
  if (id !== current) {
    clearTimeout(timer);
    [current, run, tag, place] = [id, null, null, 0];
    $("search").value = "";
    $("save").hidden = Boolean(embedded);
    $("save").href = `export/${encodeURIComponent(id)}.html`;
    if (embedded) update(JSON.parse(embedded.textContent));
    else { showList(); await follow(); }
    $("steps").scrollTop = 0;
  }
  if (step) go($("steps").querySelectorAll(".step").length ? [...$("steps").children].findIndex((s) => s.id === `step-${step}`) : 0);
}

// --- keys and start ---

function changeTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
}

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const keys = { j: () => go(place + 1), k: () => go(place - 1), "/": () => $("search").focus(), t: changeTheme };
  if (keys[event.key] && !event.ctrlKey && !event.metaKey) { event.preventDefault(); keys[event.key](); }
});
$("theme").onclick = changeTheme;
$("filter").oninput = $("outcome").onchange = showList;
$("search").oninput = () => run && showSteps();
addEventListener("hashchange", open);
if (embedded) {
  document.body.classList.add("single");
  if (!location.hash) location.hash = `#/${embedded.dataset.run}`;
  open();
} else {
  loadList().then(open);
  setInterval(loadList, 3000);
}
