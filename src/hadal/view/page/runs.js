// The list of runs: filters, and rows that are links.
"use strict";

let runs = [];

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

function showRow(row, chosen) {
  const item = element("li"), link = element("a");
  link.href = `#/${row.id}`;
  if (chosen) link.setAttribute("aria-current", "page");
  link.append(element("div", "what", row.task || row.id));
  const facts = element("div", "dim");
  const score = row.score === null ? "" : row.score === 1 ? " · solved" : " · not solved";
  const isVoid = row.outcome === "void" && row.state !== "void" ? " · void" : "";
  facts.append(element("span", colour(row), row.state + score + isVoid));
  facts.append(` · ${row.turns} turns · ${number(row.tokens)} tokens · ${row.id}`);
  link.append(facts);
  item.append(link);
  return item;
}

/** Show the list; a row that says the same is left alone, so that nobody loses their place in it. */
function showList(current) {
  const shown = runs.filter(matches);
  $("count").textContent = `${number(shown.length)} of ${number(runs.length)}`;
  const focused = document.activeElement.closest("#runs a");
  setChildren($("runs"), shown.map((row) => {
    const chosen = row.id === current;
    return [JSON.stringify([row, chosen]), () => showRow(row, chosen)];
  }));
  if (focused && !focused.isConnected) $("runs").querySelector(`a[href="${CSS.escape(focused.hash)}"]`)?.focus();
}

async function loadList(current) {
  try {
    const reply = await fetch("api/runs");
    if (reply.ok) runs = await reply.json();
    $("away").textContent = reply.ok ? "" : await reply.text();
  } catch { // asked again soon
    $("away").textContent = "No answer: has hadal view ended?";
  }
  showList(current());
}
