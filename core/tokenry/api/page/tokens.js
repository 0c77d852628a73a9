// Tokens of an answer with their probabilities: on hover, or with the arrow keys inside the answer.

/** Adds a chunk's text to `body`, a span per token where the tokens spell the text. */
function addTokens(body, text, logprobs) {
  if (!logprobs?.length) { body.append(text); return; }
  const spelled = logprobs.map((one) => one.token).join("") === text;
  const parts = spelled ? logprobs.map((one) => [one.token, [one]]) : [[text, logprobs]];
  for (const [part, facts] of parts) {
    const span = el("span", { className: "tok", textContent: part });
    span.facts = facts;
    body.append(span);
  }
  if (body.tabIndex < 0) {
    body.tabIndex = 0;
    body.setAttribute("role", "group");
    body.setAttribute("aria-label", "Answer; left and right arrow keys tell each token's probability");
  }
}

const shown = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
const likely = (one) => (100 * Math.exp(one.logprob)).toFixed(1) + " %";

function tokenTable(one) {
  const table = el("table", {}, el("caption", {}, `${shown(one.token)}  ${likely(one)}`));
  for (const other of one.top_logprobs || []) {
    const mark = other.token === one.token ? "▸ " : "  ";
    table.append(el("tr", {}, el("td", {}, mark + shown(other.token)), el("td", {}, likely(other))));
  }
  return table;
}

function showTip(span) {
  const tip = $("tip"), at = span.getClientRects()[0];
  if (!at) return;
  tip.replaceChildren(...span.facts.map(tokenTable));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const below = at.bottom + 8 + box.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(at.left, innerWidth - box.width - 8)) + "px";
  tip.style.top = (below ? at.bottom + 6 : Math.max(8, at.top - box.height - 6)) + "px";
}

let marked = null;

function hideTip() {
  $("tip").hidden = true;
  marked?.classList.remove("at");
  marked = null;
}

/** Left and right within a focused answer. */
function stepToken(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const tokens = [...event.currentTarget.querySelectorAll(".tok")];
  if (!step || !tokens.length) return;
  event.preventDefault();
  const now = tokens.indexOf(marked);
  const next = tokens[now < 0 ? (step > 0 ? 0 : tokens.length - 1)
    : Math.max(0, Math.min(tokens.length - 1, now + step))];
  hideTip();
  marked = next;
  next.classList.add("at");
  next.scrollIntoView({ block: "nearest" });
  showTip(next);
  const one = next.facts[0], others = (one.top_logprobs || []).filter((o) => o.token !== one.token);
  say(`${one.token}, ${likely(one)}` + (others.length
    ? "; else " + others.map((o) => `${o.token} ${likely(o)}`).join(", ") : ""));
}

function watchTokens(body) {
  body.onmouseover = (event) => { if (event.target.facts) { hideTip(); showTip(event.target); } };
  body.onmouseleave = hideTip;
  body.onblur = hideTip;
  body.onkeydown = stepToken;
}
