// The panel: who answers on each side, the sliders of a live mix, and the settings of requests.
import { element, find } from "./dom.js";
import { bundleOf, describeFidelity, describeMix, findAdapters, formatWeight, nameKind, nameMix, parseMix, showName, summarizeFidelity } from "./variants.js";

const KEY = "edgelora.choice";
const SIDES = ["Left", "Right"];

/** The panel's state and its elements. onChange: called after each choice. */
export class Panel {
  constructor(onChange) {
    this.onChange = onChange;
    this.models = [];
    this.adaptersByBundle = new Map();
    this.side = 0; // that the cards choose for
    this.names = ["", ""];
    this.weights = {}; // of the sliders, by side
    this.variants = {}; // the variant last chosen, by side
    const kept = this.#read();
    find("compare").checked = kept.compare === true;
    for (const id of ["system", "temperature", "max-tokens", "seed"]) {
      if (typeof kept[id] === "string") find(id).value = kept[id];
      find(id).addEventListener("change", () => this.#keep());
    }
    this.kept = Array.isArray(kept.names) ? kept.names : [];
    find("key").value = readSession("edgelora.key");
    find("key").addEventListener("change", () => { writeSession("edgelora.key", find("key").value); this.onChange(true); });
    find("settings-form").addEventListener("submit", (event) => event.preventDefault());
    find("compare").addEventListener("change", () => this.#choose());
    for (const button of find("slots").querySelectorAll("button")) {
      button.addEventListener("click", () => { this.side = Number(button.dataset.slot); this.show(); });
    }
  }

  get key() { return find("key").value.trim(); }

  get system() { return find("system").value; }

  /** The names of the models to ask, one or two. */
  get asked() { return find("compare").checked ? this.names : this.names.slice(0, 1); }

  /** The options of a request. A field that is empty or wrong is left to the server. */
  get options() {
    const number = (id) => (find(id).value.trim() && find(id).checkValidity() ? Number(find(id).value) : undefined);
    return { temperature: number("temperature"), max_tokens: number("max-tokens"), seed: number("seed") };
  }

  /** Takes over the server's list of models. */
  setModels(found) {
    this.models = found.data.filter((model) => typeof model.id === "string");
    this.adaptersByBundle = findAdapters(this.models);
    const known = (name) => typeof name === "string" && (this.models.some((model) => model.id === name) || this.#isMix(name));
    const [first, second] = [this.models[0], this.models[1] ?? this.models[0]];
    this.names = [first, second].map((model, side) => (known(this.kept[side]) ? this.kept[side] : model?.id ?? ""));
    this.show();
  }

  #adaptersOf(name) {
    return this.adaptersByBundle.get(bundleOf(name)) ?? [];
  }

  #isMix(name) {
    const mix = parseMix(name);
    return mix !== null && Object.keys(mix).every((adapter) => this.#adaptersOf(name).includes(adapter));
  }

  #choose(name) {
    if (name !== undefined) this.names[this.side] = name;
    if (!find("compare").checked) this.side = 0;
    this.show();
    this.#keep();
    this.onChange(false);
  }

  #read() {
    try {
      return JSON.parse(localStorage.getItem(KEY)) ?? {};
    } catch {
      return {};
    }
  }

  #keep() {
    const fields = Object.fromEntries(["system", "temperature", "max-tokens", "seed"].map((id) => [id, find(id).value]));
    try {
      localStorage.setItem(KEY, JSON.stringify({ ...fields, names: this.names, compare: find("compare").checked }));
    } catch { /* it holds for this visit */ }
  }

  /** Shows the cards and sliders of the side that is being chosen for. */
  show() {
    const compares = find("compare").checked;
    find("slots").hidden = !compares;
    for (const button of find("slots").querySelectorAll("button")) {
      const side = Number(button.dataset.slot);
      button.setAttribute("aria-pressed", String(side === this.side));
      button.replaceChildren(element("small", {}, SIDES[side]), ` ${showName(this.names[side])}`);
    }
    const name = this.names[this.side];
    const legend = find("variants").querySelector("legend");
    legend.textContent = compares ? `Variant that answers on the ${SIDES[this.side].toLowerCase()}` : "Variant that answers";
    const focused = document.activeElement?.name === "variant";
    find("variants").replaceChildren(legend, ...this.models.map((model) => this.#makeCard(model, model.id === name)));
    if (focused) find("variants").querySelector("input:checked")?.focus();
    this.#showMixer(name);
  }

  #makeCard(model, chosen) {
    const kind = nameKind(model);
    const input = element("input", { type: "radio", name: "variant", value: model.id, onchange: () => { this.variants[this.side] = model.id; this.#choose(model.id); } });
    input.checked = chosen;
    const mix = Object.entries(model.mix ?? {}).filter(([, weight]) => weight !== 0);
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    const total = mix.reduce((sum, [, weight]) => sum + Math.abs(weight), 0);
    for (const [, weight] of mix) {
      const part = element("i");
      part.style.flexGrow = String(Math.abs(weight) / (total || 1));
      bar.append(part);
    }
    return element("label", { class: "card" }, input,
      element("span", { class: "card-head" }, element("b", {}, model.id), element("span", { class: `tag ${kind}` }, kind)),
      element("span", { class: "mix" }, element("span", {}, describeMix(model)), element("span", {}, summarizeFidelity(model))),
      mix.length > 1 ? bar : null,
      element("span", { class: "faint sentence" }, describeFidelity(model)));
  }

  #showMixer(name) {
    const adapters = this.#adaptersOf(name);
    find("mixer").hidden = !adapters.length;
    if (!adapters.length) return;
    const mix = this.#isMix(name) ? parseMix(name) : null;
    if (mix) this.weights[this.side] = mix;
    const weights = (this.weights[this.side] ??= {});
    find("mixer").classList.toggle("chosen", mix !== null);
    const shown = [...find("sliders").querySelectorAll("input")].map((input) => input.dataset.adapter);
    if (shown.join() !== adapters.join()) find("sliders").replaceChildren(...adapters.map((adapter, at) => this.#makeSlider(adapter, `mix-${at}`)));
    for (const input of find("sliders").querySelectorAll("input")) {
      input.value = String(weights[input.dataset.adapter] ?? 0);
      input.nextElementSibling.textContent = formatWeight(input.value);
    }
    find("mix-name").textContent = mix ? `Asks for ${name}` : "Move a slider to ask this mix instead of a variant.";
  }

  #makeSlider(adapter, id) {
    const output = element("output", { for: id }, "0");
    const input = element("input", { id, type: "range", min: "0", max: "1.5", step: "0.05", "data-adapter": adapter });
    input.addEventListener("input", () => {
      const inputs = [...find("sliders").querySelectorAll("input")];
      const weights = Object.fromEntries(inputs.map((each) => [each.dataset.adapter, Number(each.value)]));
      this.weights[this.side] = weights;
      this.#choose(nameMix(weights, bundleOf(this.names[this.side])) ?? this.variants[this.side] ?? this.models[0].id);
    });
    return element("div", { class: "slider" }, element("label", { for: id }, adapter), input, output);
  }
}

function readSession(key) {
  try { return sessionStorage.getItem(key) ?? ""; } catch { return ""; }
}

function writeSession(key, value) {
  try { sessionStorage.setItem(key, value); } catch { /* it holds until the page is left */ }
}
