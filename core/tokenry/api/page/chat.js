// The chat: what was said, one answer at a time, and the settings that its request carries.

let turns = [];        // {role, content, calls, reasoning, shown}
let stop = null;       // AbortController while an answer is under way
const models = new Map();  // served name -> its entry of /v1/models

const model = () => $("model").value;
const fields = [...document.querySelectorAll("[data-field]")];

/** The settings as fields of the request; null if one of them is wrong (and is told). */
function settings() {
  const given = {};
  $("tools-wrong").textContent = "";
  for (const input of fields) {
    if (input.disabled) continue;
    if (!input.checkValidity()) { $("settings").open = true; input.reportValidity(); return null; }
    const text = input.value.trim();
    if (!text) continue;
    const name = input.dataset.field;
    if (name !== "tools") { given[name] = input.type === "number" ? Number(text) : input.value; continue; }
    try { given.tools = JSON.parse(text); } catch (error) {
      $("settings").open = true;
      $("tools-wrong").textContent = `The tools are not JSON: ${error.message}`;
      input.focus();
      return null;
    }
  }
  if ($("probabilities").checked && !$("probabilities").disabled) {
    Object.assign(given, { logprobs: true, top_logprobs: 5 });
  }
  return given;
}

function keepSettings() {
  const kept = Object.fromEntries(fields.map((input) => [input.dataset.field, input.value]));
  memory.set("settings", JSON.stringify({ ...kept, system: $("system").value,
    probabilities: $("probabilities").checked }));
}

function restoreSettings() {
  let kept = {};
  try { kept = JSON.parse(memory.get("settings") || "{}"); } catch { /* of another version */ }
  for (const input of fields) input.value = kept[input.dataset.field] || "";
  $("system").value = kept.system || "";
  $("probabilities").checked = kept.probabilities !== false;
}

/** Fields that this model cannot honour are switched off, with the reason. */
function fitSettings(capabilities) {
  const chat = capabilities?.endpoints?.["/v1/chat/completions"];
  for (const input of [...fields, $("probabilities")]) {
    const name = input.dataset.field || "logprobs";
    const why = chat && !chat.fields?.includes(name)
      ? chat.refused?.[name] || chat.why || "not served by this model" : "";
    input.disabled = Boolean(why);
    input.title = why;
  }
}

function atEnd() { const log = $("log"); return log.scrollHeight - log.scrollTop - log.clientHeight < 60; }
function toEnd() { $("log").scrollTop = $("log").scrollHeight; }

function addTurn(role, text, name) {
  $("hello")?.remove();
  const body = el("div", { className: "body", textContent: text, tabIndex: -1 });
  const shown = el("article", { className: role }, el("h2", { className: "hidden" }, name), body);
  shown.setAttribute("aria-label", name);
  shown.body = body;
  $("log").append(shown);
  toEnd();
  return shown;
}

function addNote(text, kind, ...more) {
  const note = el("p", { className: kind }, text + " ", ...more);
  if (kind === "failed") note.setAttribute("role", "alert");
  $("log").append(note);
  toEnd();
  return note;
}

function button(text, does) { return el("button", { type: "button", className: "quiet", onclick: does }, text); }

/** Forget the older half of the turns: what still fits goes on. */
function dropOldest() {
  const asked = turns.filter((turn) => turn.role === "user").length;
  let left = Math.max(1, asked >> 1);
  while (left && turns.length) {
    turns.shift().shown.remove();
    if (!turns.length || turns[0].role === "user") left--;
  }
}

function tellFull(text, again) {
  const note = addNote(text, "note", button("Drop the oldest turns", () => {
    if (stop) return;
    note.remove();
    dropOldest();
    if (again) send(); else $("text").focus();
  }));
}

const inRequest = ({ role, content, calls }) =>
  ({ role, content, ...(calls?.length ? { tool_calls: calls } : {}) });

/** Reads the answer's events into `answer`, which is shown as it comes. */
async function readAnswer(response, answer) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ") || frame === "data: [DONE]") continue;
      const event = JSON.parse(frame.slice(6));
      if (event.error) throw Object.assign(Error(event.error.message), event.error);
      if (event.usage) answer.usage = event.usage;
      if (event.choices?.[0]) answer.take(event.choices[0]);
    }
  }
}

function newAnswer(shown) {
  const answer = { text: "", reasoning: "", calls: [], why: "", usage: null, sent: performance.now(), first: 0, last: 0 };
  let thinking = null;
  answer.take = (choice) => {
    const delta = choice.delta || {}, follow = atEnd();
    answer.why = choice.finish_reason || answer.why;
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (thought || delta.content || delta.tool_calls) {
      answer.last = performance.now();
      answer.first = answer.first || answer.last;
    }
    if (thought) {
      if (!thinking) {
        thinking = el("div");
        shown.body.before(el("details", { className: "thinking", open: true }, el("summary", {}, "Reasoning"), thinking));
      }
      answer.reasoning += thought;
      thinking.append(thought);
    }
    if (delta.content) {
      answer.text += delta.content;
      addTokens(shown.body, delta.content, choice.logprobs?.content);
    }
    for (const part of delta.tool_calls || []) takeCall(answer, shown, part);
    if (follow) toEnd();
  };
  return answer;
}

function takeCall(answer, shown, part) {
  const call = answer.calls[part.index] ??=
    { id: "", type: "function", function: { name: "", arguments: "" } };
  call.id = part.id || call.id;
  call.function.name += part.function?.name || "";
  call.function.arguments += part.function?.arguments || "";
  const boxes = shown.querySelectorAll(".call");
  const box = boxes[part.index] || el("div", { className: "call" }, el("strong"), el("pre"));
  if (!box.isConnected) { shown.append(box); shown.body.classList.add("said"); }
  box.firstChild.textContent = "Tool call: " + call.function.name;
  box.lastChild.textContent = call.function.arguments;
}

function figures(answer) {
  const told = [], drawn = answer.usage?.completion_tokens;
  if (drawn) told.push(`${whole(drawn)} tokens`);
  if (drawn > 1 && answer.last > answer.first) {
    told.push(`${((drawn - 1) * 1000 / (answer.last - answer.first)).toFixed(0)} per second`);
  }
  if (answer.first) told.push(`first after ${seconds((answer.first - answer.sent) / 1000)}`);
  const cached = answer.usage?.prompt_tokens_details?.cached_tokens;
  if (cached) told.push(`${whole(cached)} of ${whole(answer.usage.prompt_tokens)} prompt tokens from the cache`);
  return told.join(" · ");
}

/** Ask for the next answer to `turns`; what it came to: {answer, fault, stopped}. */
async function request(shown, given) {
  const answer = newAnswer(shown);
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns.map(inRequest)];
  const body = { model: model(), messages, stream: true, stream_options: { include_usage: true }, ...given };
  let fault = null, stopped = false;
  stop = new AbortController();
  $("send").textContent = "Stop";
  $("log").setAttribute("aria-busy", "true");
  try {
    const response = await ask("/v1/chat/completions",
      { method: "POST", signal: stop.signal, body: JSON.stringify(body) });
    if (!response.ok) throw await errorOf(response);
    await readAnswer(response, answer);
    if (!answer.why) fault = Error("The answer broke off: the connection ended.");
  } catch (error) {
    stopped = error.name === "AbortError";
    if (!stopped) fault = error instanceof TypeError ? Error(`No connection to the server (${error.message}).`) : error;
  }
  stop = null;
  $("send").textContent = "Send";
  $("log").removeAttribute("aria-busy");
  return { answer, fault, stopped };
}

/** Under the last answer: its figures, and what can be done with it. */
function finish(turn, answer, stopped) {
  turn.shown.body.classList.add("said");
  const told = [stopped ? "stopped" : "", figures(answer)].filter(Boolean).join(" · ");
  const again = button("Regenerate", regenerate);
  again.classList.add("again");
  const copy = button("Copy", async () => {
    try { await navigator.clipboard.writeText(turn.content); say("Copied"); } catch { say("The browser does not let it be copied"); }
  });
  document.querySelectorAll(".again").forEach((old) => old.remove());
  turn.shown.append(el("div", { className: "row" }, el("span", { className: "note" }, told), again, copy));
  toEnd();
}

/** The answer to the turns as they are. `undo` puts things back if there is none. */
async function respond(given, undo) {
  const shown = addTurn("assistant", "", model());
  watchTokens(shown.body);
  say("The answer is being written");
  const { answer, fault, stopped } = await request(shown, given);
  const calls = answer.calls.filter(Boolean);
  if (!shown.isConnected) return;  // "New" came in between
  if (answer.text || calls.length || answer.reasoning) {
    const turn = { role: "assistant", content: answer.text, calls, shown };
    turns.push(turn);
    finish(turn, answer, stopped);
  } else {
    shown.remove();
    if (fault || stopped) undo();
    else addNote("The answer is empty.", "note", button("Regenerate", (event) => { event.target.parentNode.remove(); regenerate(); }));
  }
  if (fault?.code === "context_length_exceeded" && turns.length) {
    tellFull("The conversation fills the model's context.", true);
  } else if (fault) {
    addNote(fault.message, "failed");
  } else if (answer.why === "length") {
    const limited = given.max_tokens && answer.usage?.completion_tokens >= given.max_tokens;
    if (limited) addNote("The answer ends here: it reached the longest answer that the settings allow.", "note");
    else tellFull("The answer ends here: the context is full.", false);
  } else if (answer.why === "content_filter") addNote("The answer was filtered.", "note");
  say(stopped ? "Stopped" : fault ? "" : "The answer is complete");
  $("text").focus();
}

async function send() {
  const text = $("text").value.trim();
  if (!text || stop || !models.has(model())) return;
  const given = settings();
  if (!given) return;
  const mine = { role: "user", content: text, shown: addTurn("user", text, "You") };
  turns.push(mine);
  $("text").value = "";
  await respond(given, () => {
    turns = turns.filter((turn) => turn !== mine);
    mine.shown.remove();
    $("text").value = $("text").value || text;
  });
}

async function regenerate() {
  if (stop || !turns.length) return;
  const given = settings();
  if (!given) return;
  const old = turns.at(-1).role === "assistant" ? turns.pop() : null;
  old?.shown.remove();
  document.querySelectorAll("#log > .note, #log > .failed").forEach((note) => note.remove());
  await respond(given, () => {
    if (!old) return;
    turns.push(old);
    $("log").append(old.shown);
  });
}

function clear() {
  stop?.abort();
  turns = [];
  hideTip();
  $("log").replaceChildren();
  $("text").focus();
}
