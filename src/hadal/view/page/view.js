// One run: its header, its steps as they come, where one is in them, and keys.
"use strict";

/** What is shown: the run's name (null for none), what is known of it, and the number of the step that is chosen or waited for. */
let current, run = null, tag = null, place = null, awaited = null;
/** A number for each run that was opened: what still comes for an earlier one is dropped. */
let visit = 0, timer = null;

const FOLLOW_MS = 1000, LOOK_AGAIN_MS = 5000;

// --- header ---

function title(steps) {
  return (steps.find((s) => s.source === "user") || { message: "" }).message;
}

/** How it ended, in words, with the reason where it did not go well. */
function outcome(extra) {
  const score = extra.score === undefined ? "" : extra.score === null ? ", void" : extra.score ? ", solved" : ", not solved";
  const why = extra.score ? "" : extra.score_detail || (extra.outcome === "scored" ? "" : extra.stop_text);
  return `${extra.stop_reason || extra.state}${score}${why ? `: ${why}` : ""}`;
}

function showHeader() {
  const { extra, final_metrics: sums, steps } = run, task = title(steps) || current;
  $("title").textContent = $("title").title = task;
  document.title = `${task.slice(0, 80)} · hadal`;
  const turns = steps.filter((s) => s.source === "agent");
  const model = turns.reduce((t, s) => t + s.extra.seconds, 0);
  const results = turns.flatMap((s) => (s.observation || { results: [] }).results);
  const tools = results.reduce((t, r) => t + (r.extra.seconds || 0), 0);
  const facts = [
    outcome(extra), `${turns.length} turns`,
    `${number(sums.total_prompt_tokens)} prompt tokens, ${number(sums.total_cached_tokens)} of them cached`,
    `${number(sums.total_completion_tokens)} said`, `model ${seconds(model)}, tools ${seconds(tools)}`,
  ];
  if (extra.box) facts.push(`box ${extra.box}`);
  $("facts").replaceChildren(...facts.map((f) => element("span", "", f)));
  showContext(turns);
}

/** What of the context of a turn goes to what. */
function partsOf(step) {
  const parts = (step.metrics.extra || {}).context || {};
  return Object.entries(parts).map(([part, tokens]) => `${part} ${number(tokens)}`).join(", ");
}

function showContext(turns) {
  const most = Math.max(1, ...turns.map((s) => s.metrics.prompt_tokens + s.metrics.completion_tokens));
  const picture = $("context"), make = (n) => document.createElementNS("http://www.w3.org/2000/svg", n);
  picture.setAttribute("viewBox", `0 0 ${Math.max(24, turns.length)} 100`);
  picture.setAttribute("preserveAspectRatio", "none");
  const limit = run.extra.window;
  $("share").hidden = !turns.length;
  const share = limit ? `, ${(100 * most / limit).toFixed(1)} % of ${number(limit)}` : "", parts = turns.length ? partsOf(turns.at(-1)) : "";
  $("share").textContent = `context of each turn: at most ${number(most)} tokens${share}; from the cache in colour${parts && ` · at last ${parts}`}`;
  picture.replaceChildren(...turns.flatMap((step, at) => {
    const whole = 100 * (step.metrics.prompt_tokens + step.metrics.completion_tokens) / most;
    const cached = 100 * (step.metrics.cached_tokens || 0) / most;
    return [[whole, ""], [cached, "cached"]].map(([height, kind]) => {
      const bar = make("rect");
      for (const [k, v] of Object.entries({ x: at + 0.05, y: 100 - height, width: 0.9, height })) bar.setAttribute(k, v);
      if (kind) bar.setAttribute("class", kind);
      const tip = make("title");
      tip.textContent = `turn ${at + 1}: ${number(step.metrics.prompt_tokens)} tokens, ${number(step.metrics.cached_tokens || 0)} cached\n${partsOf(step)}`;
      bar.append(tip);
      return bar;
    });
  }));
}

// --- steps ---

/** Show a step, whatever is in it: one that cannot be shown well is shown as it was written down. */
function showSafely(step, running, state) {
  try {
    return showStep(current, step, running, state);
  } catch (error) {
    const shown = element("section", "step");
    shown.id = `step-${step.step_id}`;
    shown.append(element("div", "bad", `cannot be shown as a step: ${error}`), element("pre", "", JSON.stringify(step, null, 1)));
    return shown;
  }
}

/** Show the steps that are searched for; those that say the same as before are left alone. */
function showSteps() {
  const { running = {}, pending, state, stop_reason: over } = run.extra, wanted = $("search").value;
  const steps = wanted ? run.steps.filter((s) => textHas(textOf(s, running))) : run.steps;
  $("found").textContent = `${wanted ? `${number(steps.length)} of ` : ""}${number(run.steps.length)} steps`;
  const parts = steps.map((step) => {
    const open = (step.tool_calls || []).filter((c) => c.tool_call_id in running).map((c) => running[c.tool_call_id]);
    return [JSON.stringify([current, wanted, step, open, open.length ? state : ""]), () => showSafely(step, running, state)];
  });
  if (pending && !over && !wanted) parts.push([JSON.stringify([current, pending, state]), () => showPending(pending, state)]);
  setChildren($("steps"), parts);
  mark();
}

const nodeOf = (step) => document.getElementById(`step-${step}`);

function mark() {
  for (const old of $("steps").querySelectorAll(".current")) if (old !== nodeOf(place)) old.classList.remove("current");
  nodeOf(place)?.classList.add("current");
}

/** Choose a step: one that a search hides is found again, one that is not there yet is waited for. */
function choose(step) {
  if (!nodeOf(step) && $("search").value && run.steps.some((s) => s.step_id === step)) {
    $("search").value = "";
    showSteps();
  }
  awaited = nodeOf(step) ? null : step;
  say(awaited ? `there is no step ${step} yet` : "");
  if (awaited) return;
  place = step;
  mark();
  nodeOf(step).scrollIntoView({ block: "nearest" });
  nodeOf(step).focus({ preventScroll: true });
}

/** Choose the next step that is shown, or the one before. */
function move(by) {
  const shown = [...$("steps").querySelectorAll(".step[id^=step-]")], at = shown.indexOf(nodeOf(place));
  const next = shown[at < 0 ? 0 : Math.min(Math.max(at + by, 0), shown.length - 1)];
  if (next) choose(Number(next.id.slice("step-".length)));
}

// --- a run, and what comes to it ---

/** Say what is wrong with the run that is shown. */
function say(text) {
  $("note").textContent = text;
}

function update(next) {
  const follows = run && $("steps").scrollTop + $("steps").clientHeight > $("steps").scrollHeight - 40;
  run = next;
  showHeader();
  showSteps();
  if (follows) $("steps").scrollTop = $("steps").scrollHeight;
  if (awaited !== null) choose(awaited);
}

/** Ask for the run; null if nobody answers, which the list says. */
async function ask() {
  try {
    const headers = tag ? { "if-none-match": tag } : {};
    const reply = await fetch(`api/runs/${encodeURIComponent(current)}`, { cache: "no-store", headers });
    return { status: reply.status, tag: reply.headers.get("etag"), said: reply.ok ? await reply.json() : await reply.text() };
  } catch { return null; }
}

/** Show a run and what comes to it, its score and its going on too; whatever fails is tried again. */
async function follow(mine) {
  const reply = await ask();
  if (mine !== visit) return;
  timer = setTimeout(follow, run && run.extra.stop_reason ? LOOK_AGAIN_MS : FOLLOW_MS, mine);
  if (!reply || reply.status === 304) return;
  if (reply.status !== 200) { say(reply.said); return; }
  tag = reply.tag;
  say("");
  update(reply.said);
}

function closeRun() {
  clearTimeout(timer);
  visit += 1;
  [current, run, tag, place, awaited] = [null, null, null, null, null];
  $("search").value = "";
  for (const part of ["title", "facts", "context", "found", "note"]) $(part).replaceChildren();
  $("share").hidden = $("save").hidden = $("about").hidden = true;
  document.title = "hadal: runs";
}

/** Show what the address names: a run, and a step of it. */
async function openRun() {
  const [, id, step] = location.hash.split("/"), name = embedded ? embedded.dataset.run : id || null;
  if (name !== current) {
    closeRun();
    current = name;
    const mine = visit;
    $("steps").replaceChildren(...(current === null ? [element("p", "empty", $("steps").dataset.empty)] : []));
    $("about").hidden = current === null;
    if (!embedded) showList(current);
    if (embedded) update(JSON.parse(embedded.textContent));
    else if (current !== null) {
      $("save").hidden = false;
      $("save").href = `export/${encodeURIComponent(current)}.html`;
      await follow(mine);
    }
    if (mine !== visit) return;
    $("steps").scrollTop = 0;
  }
  if (current === null || !/^\d+$/.test(step)) return;
  if (run) choose(Number(step));
  else awaited = Number(step);
}

// --- keys and start ---

function changeTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
}

document.addEventListener("keydown", (event) => {
  const field = event.target;
  if (field.matches("input, select")) {
    if (event.key !== "Escape") return;
    if (field.matches("input") && field.value) { // of itself, Chromium would empty it and tell nobody
      field.value = "";
      field.oninput();
    }
    field.blur();
    return;
  }
  const does = { j: () => move(1), k: () => move(-1), "/": () => $("search").focus(), t: changeTheme };
  if (does[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); does[event.key](); }
});
$("theme").onclick = changeTheme;
$("filter").oninput = $("outcome").onchange = () => showList(current);
$("search").oninput = () => run && showSteps();
addEventListener("hashchange", openRun);
if (embedded) {
  document.body.classList.add("single");
  openRun();
} else {
  loadList(() => current).then(openRun);
  setInterval(loadList, 3000, () => current);
}
