// Small things that both views use: elements, requests with the API key, what is said aloud.

const $ = (id) => document.getElementById(id);

/** An element: el("p", {className: "note"}, "text", child, ...). */
function el(tag, props, ...children) {
  const made = Object.assign(document.createElement(tag), props || {});
  made.append(...children.filter((child) => child != null));
  return made;
}

const memory = {
  get: (name) => { try { return sessionStorage.getItem(name) || ""; } catch { return ""; } },
  set: (name, value) => { try { sessionStorage.setItem(name, value); } catch { /* not kept, then */ } },
};

/** What a screen reader says next. */
function say(text) { $("said").textContent = text; }

function headers() {
  const key = memory.get("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

let asking = null, refused = false;

/** Ask for a key, once for all who wait for it; true if one was given. */
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("asking"), before = document.activeElement;
    $("key").value = "";
    dialog.returnValue = "";
    dialog.onclose = () => {
      const given = dialog.returnValue === "ok" && $("key").value.trim();
      if (given) memory.set("key", given);
      refused = !given;
      asking = null;
      before?.focus?.();
      resolve(Boolean(given));
    };
    dialog.showModal();
    $("key").focus();
  });
  return asking;
}

/** fetch with the key. A 401 asks for another one: always for what the user did, once for polls. */
async function ask(url, init = {}, wanted = true) {
  let answer = await fetch(url, { ...init, headers: headers() });
  while (answer.status === 401 && (wanted || !refused) && await askForKey()) {
    answer = await fetch(url, { ...init, headers: headers() });
  }
  return answer;
}

/** The error of an answer that is not ok, as the server tells it. */
async function errorOf(answer) {
  let told = null;
  try { told = (await answer.json()).error; } catch { /* no JSON: a proxy's page */ }
  const error = Error(told?.message || `The server answered ${answer.status}.`);
  return Object.assign(error, { code: told?.code, status: answer.status });
}

const whole = (n) => Math.round(n).toLocaleString("en");
const percent = (share) => (100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0) + " %";
function seconds(s) { return s < 1 ? (1000 * s).toFixed(s < 0.01 ? 1 : 0) + " ms" : s.toFixed(2) + " s"; }
function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i++; }
  return n.toFixed(i && n < 100 ? 1 : 0) + " " + units[i];
}
