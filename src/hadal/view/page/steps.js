// One step of a run: what was thought and said, calls with what they did, and its tokens.
"use strict";

/** A call as people read it: parts of text, each with its kind. */
function callParts(call) {
  const name = call.function_name, given = call.arguments;
  const signed = (kind, sign, text) => asText(text).split("\n").map((line) => [kind, `${sign} ${line}`]);
  if (name === "bash" && typeof given.command === "string") {
    const { command, ...others } = given;
    return [["", `$ ${command}${Object.keys(others).length ? `\n${JSON.stringify(others)}` : ""}`]];
  }
  if (name === "str_replace_editor" && typeof given.path === "string") {
    const range = given.view_range === undefined ? "" : ` ${JSON.stringify(given.view_range)}`;
    if (given.command === "view") return [["", `view ${given.path}${range}`]];
    if (given.command === "create") return [["", `create ${given.path}\n`], ...signed("add", "+", given.file_text)];
    if (given.command === "insert") return [["", `insert ${given.path} behind line ${asText(given.insert_line)}\n`], ...signed("add", "+", given.new_str)];
    if (given.command === "str_replace") return [["", `str_replace ${given.path}\n`], ...signed("drop", "-", given.old_str), ...signed("add", "+", given.new_str)];
  }
  return [["", `${name} ${JSON.stringify(given, null, 1)}`]];
}

function showCall(call) {
  const shown = element("pre");
  for (const [kind, text] of callParts(call)) marked(text, kind ? shown.appendChild(element("span", kind)) : shown);
  return shown;
}

function resultFacts(extra) {
  const facts = [];
  if (extra.exit_code !== undefined) facts.push(`exit code ${extra.exit_code}`);
  if (extra.seconds !== undefined) facts.push(seconds(extra.seconds));
  if (extra.full_text) facts.push(`cut; all of it: ${extra.full_text}`);
  return facts.join(" · ");
}

function showResult(result) {
  const shown = element("div"), extra = result.extra || {};
  shown.append(marked(result.content || "", element("pre")));
  shown.append(marked(resultFacts(extra), element("div", extra.failed ? "bad" : "dim")));
  for (const file of extra.files || []) shown.append(showFile(file));
  return shown;
}

/** A call that has no result yet: what it has printed so far. */
function showRunning(said, state) {
  const shown = element("div");
  if (said) shown.append(marked(said, element("pre")));
  shown.append(element("div", "dim", state));
  return shown;
}

/** What a call did to a file. */
function showFile(file) {
  const head = `${file.kind} ${file.path}`;
  if (!file.diff) return marked(head, element("div", "dim"));
  const shown = element("details"), diff = element("pre");
  shown.open = file.diff.length < 1500 || textHas(file.diff);
  for (const line of file.diff.split("\n")) {
    const kind = { "+": "add", "-": "drop" }[line[0]] || "dim";
    diff.append(marked(kind === "dim" ? `${line}\n` : line, element("span", kind)));
  }
  shown.append(marked(head, element("summary", "dim")), diff);
  return shown;
}

// --- tokens of a turn: how sure the model was of each ---

function tokensButton(run, step, shown) {
  const button = element("button", "plain", "tokens");
  button.title = "what the model said, token by token";
  button.setAttribute("aria-expanded", "false");
  button.onclick = async () => {
    const open = shown.querySelector(":scope > .tokens");
    button.setAttribute("aria-expanded", String(!open));
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
  if (all.length) {
    const least = all.reduce((a, b) => Math.min(a, b));
    facts.push(`least probable ${(100 * Math.exp(least)).toFixed(1)} %, mean log-probability ${(all.reduce((a, b) => a + b) / all.length).toFixed(4)}`);
  }
  box.replaceChildren(shown, element("div", "dim", facts.join(" · ")));
}

// --- the whole of a step ---

function stepHead(run, step, shown) {
  const head = element("div", "head"), extra = step.extra || {};
  const link = element("a", "", `#${step.step_id}`);
  link.href = `#/${run}/${step.step_id}`;
  head.append(link, element("span", "who", extra.by || step.source), element("span", "", (step.timestamp || "").slice(11, 19)));
  if (step.metrics) {
    const m = step.metrics;
    head.append(element("span", "", `${number(m.prompt_tokens)} in (${number(m.cached_tokens || 0)} cached), ${number(m.completion_tokens)} out`));
    head.append(element("span", "", seconds(extra.seconds)));
    if (!embedded) head.append(tokensButton(run, step, shown));
    if (extra.bad) head.append(element("span", "bad", extra.bad));
  }
  return head;
}

/** Show a step of a run; `running` has the output of calls without a result. */
function showStep(run, step, running, state) {
  const results = new Map(((step.observation || {}).results || []).map((r) => [r.source_call_id, r]));
  const failed = [...results.values()].some((r) => (r.extra || {}).failed);
  const shown = element("section", `step ${step.source}${failed ? " failed" : ""}`);
  shown.id = `step-${step.step_id}`;
  shown.tabIndex = -1;
  shown.append(stepHead(run, step, shown));
  if (step.reasoning_content) shown.append(marked(step.reasoning_content, element("div", "thought")));
  if (step.source === "system") {
    const more = element("details");
    more.open = textHas(step.message);
    more.append(element("summary", "", "instructions"), marked(step.message, element("pre")));
    shown.append(more);
  } else if (step.message) shown.append(marked(step.message, element("div", "said")));
  for (const problem of (step.extra || {}).problems || []) shown.append(marked(problem, element("div", "void")));
  for (const call of step.tool_calls || []) {
    shown.append(showCall(call));
    const result = results.get(call.tool_call_id);
    shown.append(result ? showResult(result) : showRunning(running[call.tool_call_id], state));
  }
  return shown;
}

/** A reply that is being written, as the model writes it. */
function showPending(pending, state) {
  const shown = element("section", "step agent"), head = element("div", "head");
  shown.id = "pending";
  head.append(element("span", "who", "agent"), element("span", "", `${state === "running" ? "writing" : state}, ${number(pending.tokens)} tokens so far`));
  shown.append(head, element("div", "said dim", pending.text));
  return shown;
}

// --- search ---

const textHas = (text) => Boolean($("search").value) && text.toLowerCase().includes($("search").value.toLowerCase());

/** All that a step shows. */
function textOf(step, running) {
  const extra = step.extra || {};
  const calls = (step.tool_calls || []).flatMap((c) => [callParts(c).map(([, text]) => text).join("\n"), running[c.tool_call_id] || ""]);
  const results = ((step.observation || {}).results || []).flatMap((r) => {
    const files = ((r.extra || {}).files || []).flatMap((f) => [`${f.kind} ${f.path}`, f.diff || ""]);
    return [r.content || "", resultFacts(r.extra || {}), ...files];
  });
  return [step.message, step.reasoning_content || "", ...(extra.problems || []), extra.bad || "", ...calls, ...results].join("\n");
}
