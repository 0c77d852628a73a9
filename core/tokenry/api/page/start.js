// Follows the server's state, fills the list of models, ties the keys and buttons.

let up = false;

function tellState(text, bad) {
  const state = $("state");
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("bad", Boolean(bad));
}

function describe() {
  const length = models.get(model())?.max_model_len;
  tellState(length ? `context ${whole(length)} tokens` : models.get(model())?.state || "");
}

async function loadModels() {
  const answer = await ask("/v1/models", {}, false);
  if (!answer.ok) {
    tellState(answer.status === 401 ? "this server wants an API key: send a message to give one" : (await errorOf(answer)).message, true);
    return answer.status === 401;
  }
  const chosen = model();
  models.clear();
  for (const one of (await answer.json()).data) models.set(one.id, one);
  const options = [...models.keys()].map((name) => el("option", { value: name }, name));
  $("model").replaceChildren(...options);
  if (models.has(chosen)) $("model").value = chosen;
  describe();
  await fit();
  return true;
}

async function fit() {
  const answer = await ask("/v1/capabilities", {}, false);
  if (!answer.ok) return;
  const told = (await answer.json()).models;
  fitSettings(told.find((one) => one.names.includes(model())));
}

/** Every few seconds: is it ready, and if not, why. */
async function follow() {
  let wait = 5000;
  try {
    const answer = await fetch("/readyz"), told = await answer.json();
    if (!answer.ok) {
      up = false;
      wait = 1000;
      const share = told.progress ? ` ${percent(told.progress)}` : "";
      tellState([told.model, told.status + ":", (told.phase || told.cause || "") + share].filter(Boolean).join(" "), told.status === "dead");
    } else if (!up) {
      up = await loadModels();
    }
  } catch {
    up = false;
    wait = 2000;
    tellState("no connection", true);
  }
  setTimeout(follow, wait);
}

function showTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.id === "tab-" + name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.id.slice(4)).hidden = !chosen;
  }
  if (location.hash.slice(1) !== name) history.replaceState(null, "", name === "chat" ? location.pathname : "#" + name);
}

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.onclick = () => showTab(tab.id.slice(4));
  tab.onkeydown = (event) => {
    const other = { ArrowRight: 1, ArrowLeft: 1, Home: "tab-chat", End: "tab-live" }[event.key];
    if (!other) return;
    event.preventDefault();
    const next = other === 1 ? $(tab.id === "tab-chat" ? "tab-live" : "tab-chat") : $(other);
    showTab(next.id.slice(4));
    next.focus();
  };
}

$("form").onsubmit = async (event) => {
  event.preventDefault();
  if (stop) { stop.abort(); return; }
  if (!models.size && up && await askForKey()) up = await loadModels();
  send();
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!stop) $("form").requestSubmit();
  }
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("asking").open) return;
  hideTip();
  stop?.abort();
});
$("clear").onclick = clear;
$("model").onchange = () => { describe(); fit().catch(() => tellState("no connection", true)); };
$("log").onscroll = hideTip;
$("settings").oninput = keepSettings;
$("defaults").onclick = () => {
  for (const input of [...fields, $("system")]) input.value = "";
  $("probabilities").checked = true;
  keepSettings();
};
restoreSettings();
showTab(location.hash === "#live" ? "live" : "chat");
follow();
look();
