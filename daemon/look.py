# SPDX-License-Identifier: Apache-2.0
"""How the page looks and how it renews itself: two inline texts, which the policy allows by their hashes."""

from __future__ import annotations

# Ink, paper, and one colour, which means trouble.
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --ink: #1c1f23; --dim: #63686e; --line: #dcdcd6; --bar: #5b6670; --ever: #c3c6c4; --bad: #c8321f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --ink: #e8e8e4; --dim: #9a9fa5; --line: #2e3238; --bar: #a3adb6; --ever: #4a5057; --bad: #ff7a66;
  }
}
* { box-sizing: border-box; margin: 0; padding: 0; }
html { background: var(--paper); -webkit-text-size-adjust: 100%; }
body {
  color: var(--ink); font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; max-width: 90rem; margin: 0 auto; padding: 1.75rem 1.75rem 3rem;
}
a { color: inherit; text-decoration-color: var(--ever); text-underline-offset: .2em; }
a:hover { text-decoration-color: currentColor; }
header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .25rem 2rem; }
h1 { font-size: 1.9rem; line-height: 1.15; font-weight: 650; letter-spacing: -.02em; width: 100%; }
.dim, nav, .why, .says, .remarks, figcaption, th { color: var(--dim); }
nav a { margin-right: 1.1rem; }
nav a:last-child { margin-right: 0; }
.bad { color: var(--bad); }
.head.bad, .card.bad { color: inherit; } .head.bad .word, .card.bad .figure { color: var(--bad); }
.notes { list-style: none; margin-top: .75rem; }
.silent { display: none; color: var(--bad); font-weight: 600; margin-bottom: .75rem; }
.stale .silent { display: block; }
.stale .board, .stale h1 { opacity: .45; }
.board { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 0 2.25rem; margin: 1.5rem 0 2.5rem; }
.resource { display: contents; }
.head { display: block; text-decoration: none; border-top: 3px solid var(--ink); padding: .5rem 0 1.5rem; order: 0; }
.head.bad { border-color: var(--bad); }
.head h2 { font-size: .8rem; font-weight: 650; letter-spacing: .06em; text-transform: uppercase; color: var(--ink); }
.word { font-size: 1.5rem; font-weight: 600; line-height: 1.25; letter-spacing: -.01em; }
.head.calm .word { color: var(--dim); font-weight: 400; }
.why { overflow-wrap: anywhere; min-height: 1.45em; }
.cards { order: 1; min-width: 0; }
.card { border-top: 1px solid var(--line); padding: .6rem 0 1.75rem; }
.card h3 { font-size: 14px; font-weight: 600; display: flex; justify-content: space-between; gap: 1rem; }
.card h3 a { font-weight: 400; color: var(--dim); }
.sum { display: flex; justify-content: space-between; align-items: flex-end; gap: .75rem; margin: .3rem 0 .25rem; }
.figure { font-size: 2rem; font-weight: 600; line-height: 1.15; letter-spacing: -.02em; white-space: nowrap; }
.says, figcaption { font-size: 13px; } .says { overflow-wrap: anywhere; min-height: 2.9em; }
.trail { flex: 0 0 6.5rem; text-align: right; font-size: 12px; line-height: 1.45; padding-bottom: 1.2rem; }
.trail svg { height: 30px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.now { fill: var(--bar); } .more { fill: var(--bad); }
.card.bad .now, .card.bad .dot { fill: var(--bad); }
.ever { fill: none; stroke: var(--ever); stroke-width: 1.25; }
.axis { stroke: var(--line); } .mark { stroke: var(--ink); stroke-dasharray: 2 2; }
.line { fill: none; stroke: var(--bar); stroke-width: 1.5; stroke-linejoin: round; stroke-linecap: round; }
.card.bad .line { stroke: var(--bad); } .dot { fill: var(--bar); }
svg text { fill: var(--dim); font-size: 11px; }
table { border-collapse: collapse; width: 100%; }
th { font-weight: 400; text-align: left; }
th, td { padding: .16rem 0 .16rem .9rem; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; overflow-wrap: anywhere; }
.card table { margin-top: .6rem; font-size: 13px; }
.card th + th, .card td + td { text-align: right; white-space: nowrap; }
.card td { border-top: 1px solid var(--line); }
.remarks { list-style: none; margin-top: .5rem; font-size: 13px; overflow-wrap: anywhere; }
.measured h2, .about h2 { font-size: 1.05rem; font-weight: 650; margin-bottom: .5rem; }
.measured { order: 2; border-top: 1px solid var(--line); padding-top: .6rem; font-size: 13px; }
.measured h2 { font-size: 14px; margin: 0; }
.measured td { border-top: 1px solid var(--line); }
.measured td:first-child, .measured td:nth-child(n + 5) { white-space: nowrap; }
.measured p { margin-top: .75rem; }
code { font: 12px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.about { margin-top: 2.5rem; max-width: 46rem; color: var(--dim); }
.about h2 { color: var(--ink); }
.about p { margin-bottom: .5rem; }
@media (min-width: 68.01rem) {
  .board { grid-template-rows: auto auto 1fr; }
  .cards { grid-row: 2 / span 2; }
  .measured { grid-area: 3 / 1 / auto / span 2; }
  .resource:nth-child(-n + 2) .cards { grid-row: 2; }
}
@media (max-width: 68rem) {
  .cards { display: contents; }
  .card { order: 1; grid-column: span 2; min-width: 0; }
  .measured { grid-column: 1 / -1; }
}
@media (max-width: 44rem) {
  body { padding: 1.1rem 1rem 2rem; }
  h1 { font-size: 1.6rem; }
  .board { gap: 0 1.25rem; margin-top: 1.1rem; }
  .head { padding-bottom: 1rem; }
  .word { font-size: 1.3rem; }
  .head { grid-column: span 2; }
  .card { grid-column: 1 / -1; }
  .measured thead { display: none; }
  .measured tr { display: block; border-top: 1px solid var(--line); padding: .5rem 0; }
  .measured td { display: grid; grid-template-columns: 5.5rem 1fr; border: 0; padding: .1rem 0; }
  .measured td:nth-child(n + 5) { white-space: normal; }
  .measured td::before { content: attr(data-label); color: var(--dim); }
}
"""

# Fetches the page again and changes only what differs, so that nothing flickers, and a selection or a tooltip stays.
SCRIPT = """
"use strict";
const EVERY = 2000;
function change(old, now) {
  if (old.isEqualNode(now)) return;
  if (old.nodeType !== 1 || old.nodeName !== now.nodeName || old.childNodes.length !== now.childNodes.length) {
    old.replaceWith(now);
    return;
  }
  for (const {name} of [...old.attributes]) if (!now.hasAttribute(name)) old.removeAttribute(name);
  for (const {name, value} of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const fresh = [...now.childNodes];
  [...old.childNodes].forEach((child, i) => change(child, fresh[i]));
}
let answered = new Date(), timer = 0;
function silent() {
  if (!document.body.classList.contains("stale")) document.querySelector(".silent").textContent =
    `No answer since ${answered.toLocaleTimeString()}; what is below is from then.`;
  document.body.classList.add("stale");
  later();
}
function later() {
  clearTimeout(timer);
  timer = setTimeout(renew, EVERY);
}
function renew() {
  if (document.hidden) return;
  const request = new XMLHttpRequest();
  request.open("GET", location.pathname);
  request.responseType = "document";
  request.timeout = 10000;
  request.onload = () => {
    const page = request.response;
    if (request.status !== 200 || !page || !page.querySelector(".board")) return silent();
    answered = new Date();
    document.title = page.title;
    document.querySelector("link").replaceWith(page.querySelector("link"));
    change(document.body, page.body);
    later();
  };
  request.onerror = request.ontimeout = silent;
  request.send();
}
document.addEventListener("visibilitychange", renew);
later();
"""

# What a test computes from the texts above; the server has no library of hashes in memory.
STYLE_HASH = "sha256-Q/Hqh/29/fBNFyMvdjocYkQdbweC9J8Knccupw2Liyg="
SCRIPT_HASH = "sha256-fVJSCp/3kTz/LQ2o1Qj9hjjcRnoQZFbx+O3U1fA2TjQ="

POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src '{STYLE_HASH}'",
        f"script-src '{SCRIPT_HASH}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
