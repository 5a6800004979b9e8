// What all of the page is made of. Everything that a run says is text, and is put into the page as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const embedded = $("embedded");

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const number = (n) => n.toLocaleString("en");
const seconds = (s) => (s < 10 ? s.toFixed(2) : s.toFixed(0)) + " s";
/** What a model gave where a text belongs: it may be anything. */
const asText = (given) => (typeof given === "string" ? given : given === undefined ? "" : JSON.stringify(given));

const childKeys = new WeakMap();

/** Make the children of an element those that are wanted. One that is there with the same key stays, with its place,
 * its focus and what somebody has marked or opened in it. */
function setChildren(parent, wanted) {
  const there = new Map([...parent.children].filter((c) => childKeys.has(c)).map((c) => [childKeys.get(c), c]));
  const nodes = wanted.map(([key, make]) => {
    const node = there.get(key) || make();
    childKeys.set(node, key);
    return node;
  });
  const kept = new Set(nodes);
  for (const old of [...parent.children]) if (!kept.has(old)) old.remove();
  let at = parent.firstElementChild;
  for (const node of nodes) {
    if (node === at) at = at.nextElementSibling;
    else parent.insertBefore(node, at);
  }
}

/** Put text into an element, with what is searched for marked. */
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
