// The page: a variant, the weights of live adapters, a prompt, and the answer as it is written.

const LIMIT = 256; // tokens of an answer
const find = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
let manifest = null;

const heard = {
  opened(said) {
    manifest = said.manifest;
    for (const [name, { kind }] of Object.entries(manifest.variants)) find("variant").add(new Option(`${name} (${kind})`, name));
    find("variant").value = manifest.default_variant;
    for (const [name, { file }] of Object.entries(manifest.adapters)) if (file) addSlider(name);
    showMix();
    setBusy(false);
    find("state").textContent = `${self.crossOriginIsolated ? "" : "one thread: this server sends no Cross-Origin headers. "}ready`;
  },
  state: ({ text }) => (find("state").textContent = text),
  token: ({ text }) => find("answer").append(text),
  done({ reason, seconds, prompt, tokens }) {
    const speed = tokens.length > 1 ? ((tokens.length - 1) / seconds.answer).toFixed(1) : "0";
    find("state").textContent = `${reason}: read ${prompt.length} tokens in ${seconds.prompt.toFixed(2)} s, wrote ${tokens.length}, ${speed} tokens/s`;
    setBusy(false);
  },
  failed({ text }) {
    find("state").textContent = `failed: ${text}`;
    setBusy(manifest === null);
  },
};

function addSlider(name) {
  const label = document.createElement("label");
  const slider = Object.assign(document.createElement("input"), { type: "range", min: -1, max: 1.5, step: 0.05, value: 0, name });
  const shown = document.createElement("output");
  slider.addEventListener("input", () => (shown.textContent = slider.value));
  label.append(name, slider, shown);
  find("mix").append(label);
}

/** Shows the sliders for a live variant, at the weights of that variant. */
function showMix() {
  const { kind, live } = manifest.variants[find("variant").value];
  find("mix").hidden = kind !== "live";
  for (const slider of find("mix").querySelectorAll("input")) {
    slider.value = live[slider.name] ?? 0;
    slider.dispatchEvent(new Event("input"));
  }
}

function setBusy(busy) {
  find("ask").disabled = busy;
  find("stop").disabled = !busy || manifest === null;
}

find("variant").addEventListener("change", showMix);
find("stop").addEventListener("click", () => worker.postMessage({ type: "stop" }));
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  find("answer").replaceChildren();
  setBusy(true);
  const mix = Object.fromEntries([...find("mix").querySelectorAll("input")].map((slider) => [slider.name, Number(slider.value)]));
  worker.postMessage({ type: "ask", variant: find("variant").value, mix, prompt: find("prompt").value, limit: LIMIT });
});
worker.addEventListener("message", ({ data }) => heard[data.type](data));
worker.addEventListener("error", (event) => heard.failed({ text: event.message }));
worker.postMessage({ type: "open" });
