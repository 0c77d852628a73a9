// The live view: /live every second while it is seen. Rates and times are of the last minute, by
// the difference of two answers; before that much is known, of the time since the page looked.

const WINDOW_S = 60;
let looks = [];  // answers of /live, the oldest first

/** Share p of the histogram's growth between two looks is at or below so many seconds; null: nothing came. */
function quantile(now, then, p) {
  const counts = now.counts.map((count, i) => count - (then?.counts[i] ?? 0));
  const all = counts.at(-1);
  if (!all) return null;
  const i = counts.findIndex((count) => count >= p * all);
  const low = i ? now.bounds[i - 1] : 0, high = now.bounds[i];
  if (high === null) return { s: low, over: true };
  const below = i ? counts[i - 1] : 0;
  return { s: low + (high - low) * (p * all - below) / (counts[i] - below), over: false };
}

function line(values) {
  const most = Math.max(...values, 1e-9), svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${WINDOW_S} 20`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const points = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const first = WINDOW_S - values.length + 1;
  points.setAttribute("points", values.map((v, i) => `${first + i},${19 - 18 * v / most}`).join(" "));
  svg.append(points);
  return svg;
}

function card(name, value, note, ...more) {
  const made = el("div", { className: "card" }, el("dt", {}, name), el("dd", {}, value),
    note ? el("dd", { className: "note" }, note) : null, ...more);
  made.dataset.card = name;
  return made;
}

function bar(share) {
  const inner = el("i");
  inner.style.width = 100 * Math.min(1, share) + "%";
  const made = el("div", { className: "bar" }, inner);
  made.setAttribute("aria-hidden", "true");
  return made;
}

/** Growth per second of one of the totals of a model, look by look. */
function rates(id, name) {
  const found = looks.map((look) => [look.now_s, look.models.find((m) => m.id === id)?.totals[name] ?? 0]);
  return found.slice(1).map(([t, v], i) => Math.max(0, v - found[i][1]) / (t - found[i][0]));
}

function counted(fresh, ever) {
  return fresh ? `${whole(fresh)} in the last minute` : ever ? `${whole(ever)} since the start` : "none yet";
}

function timesTable(now, then) {
  const rows = { ttft_s: "To the first token", itl_s: "Between tokens", queue_s: "In the queue", e2e_s: "Whole request" };
  const cell = (told) => el("td", { className: "n" }, told ? (told.over ? "> " : "") + seconds(told.s) : "–");
  const head = ["Time", "p50", "p90", "p99", "count"].map((text, i) => el("th", { scope: "col", className: i ? "n" : "" }, text));
  const body = Object.entries(rows).map(([name, text]) => {
    const fresh = now.times[name].counts.at(-1) - (then?.times[name].counts.at(-1) ?? 0);
    const base = fresh ? then?.times[name] : undefined;
    return el("tr", {}, el("th", { scope: "row" }, text),
      ...[0.5, 0.9, 0.99].map((p) => cell(quantile(now.times[name], base, p))),
      el("td", { className: "n" }, counted(fresh, now.times[name].counts.at(-1))));
  });
  return el("table", { className: "times" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
}

function factsList(told) {
  const facts = told.facts, list = el("ul", { className: "facts" });
  if (!facts) return list;
  const add = (text) => list.append(el("li", {}, text));
  add(`${facts.architecture} in ${facts.dtype} on ${facts.device}, by the backend ${facts.backend}`);
  add(`context ${whole(facts.max_model_len)} tokens; ${whole(facts.num_blocks)} KV blocks of ${facts.block_size} tokens`);
  add("memory: " + Object.entries(facts.memory_bytes).map(([name, n]) => `${name} ${bytes(n)}`).join(", "));
  facts.notes.forEach(add);
  return list;
}

function showModel(told, then, span) {
  const { requests, totals } = told, before = then?.totals;
  const since = (name) => Math.max(0, totals[name] - (before?.[name] ?? 0));  // less: a new engine
  const asked = since("prefix_cache_queries"), lifetime = totals.prefix_cache_queries;
  const drawn = rates(told.id, "generation_tokens"), computed = rates(told.id, "prompt_tokens");
  const cached = asked ? since("prefix_cache_hits") / asked : lifetime ? totals.prefix_cache_hits / lifetime : 0;
  const used = told.facts ? Math.round(told.kv_usage * told.facts.num_blocks) : 0;
  const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
  const cards = el("dl", { className: "cards" },
    card("Queued", whole(requests.queued), "wait for room"),
    card("Prefill", whole(requests.prefill), "their prompt is computed"),
    card("Decode", whole(requests.decode), "tokens are drawn"),
    card("Finished", whole(sum(totals.finished)), `${whole(sum(totals.refused))} refused, ${whole(totals.preemptions)} preempted`),
    card("KV blocks", percent(told.kv_usage), told.facts ? `${whole(used)} of ${whole(told.facts.num_blocks)}` : "", bar(told.kv_usage)),
    card("Cached share", percent(cached), asked ? "of prompt tokens, last minute" : lifetime ? "of prompt tokens, since start" : "nothing was asked yet", bar(cached)),
    card("Tokens per second", whole(drawn.at(-1) ?? 0), span ? `${whole(since("generation_tokens") / span)} on average` : "", line(drawn)),
    card("Prompt per second", whole(computed.at(-1) ?? 0), span ? `${whole(since("prompt_tokens") / span)} on average` : "", line(computed)));
  const cause = told.cause ? el("p", { className: "wrong" }, told.cause) : null;
  const trouble = Object.entries(told.op_fallbacks).map(([op, n]) => `${op} ×${n}`).join(", ");
  return [el("h2", {}, `${told.id} · ${told.state}`), cause, cards, el("h2", {}, "Times"), timesTable(told, then),
    el("h2", {}, "Device"), factsList(told),
    trouble ? el("p", { className: "wrong" }, `Ops on their slow reference: ${trouble}`) : null].filter(Boolean);
}

/** Whether another process answers now: what only grows has fallen. */
function restarted(now, then) {
  return then.models.some((old) => {
    const told = now.models.find((m) => m.id === old.id);
    return !told || Object.keys(told.times).some((name) => told.times[name].counts.at(-1) < old.times[name].counts.at(-1));
  });
}

function showLive(look) {
  if (looks.length && restarted(look, looks.at(-1))) looks = [];
  looks.push(look);
  while (look.now_s - looks[0].now_s > WINDOW_S || look.now_s < looks[0].now_s) looks.shift();
  const then = looks[0], span = look.now_s - then.now_s;
  $("models").replaceChildren(...look.models.flatMap((told) =>
    showModel(told, then.models.find((m) => m.id === told.id), span)));
}

let probed = false;

async function showBackends() {
  if (probed) return;
  probed = true;
  const answer = await ask("/live/backends", {}, false);
  if (!answer.ok) { probed = false; return; }
  const rows = (await answer.json()).data.map((row) => el("tr", {},
    el("th", { scope: "row" }, row.backend + (row.version ? " " + row.version : "")), el("td", {}, row.state),
    el("td", {}, row.device ? row.device.name : "–"),
    el("td", {}, [row.device ? `score ${row.device.score}` : "", row.reason, row.mend ? "mend: " + row.mend : ""].filter(Boolean).join("; "))));
  $("backends").tBodies[0].replaceChildren(...rows);
}

function tellLive(text) { if ($("live-state").textContent !== text) $("live-state").textContent = text; }

async function look() {
  if (!document.hidden && !$("live").hidden) {
    try {
      const answer = await ask("/live", {}, false);
      if (!answer.ok) throw await errorOf(answer);
      showLive(await answer.json());
      tellLive("");
      showBackends().catch(() => { probed = false; });
    } catch (error) { tellLive(error instanceof TypeError ? "No connection to the server." : error.message); }
  }
  setTimeout(look, 1000);
}
