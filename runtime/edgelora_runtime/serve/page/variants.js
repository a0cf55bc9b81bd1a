// Variants and mixes: the names that requests give, and sentences about them.

/** The bundle that a name starts with, and its slash; empty where the server has one bundle. */
export const bundleOf = (name) => name.slice(0, name.indexOf("/") + 1);

/** Writes a mix as a model's name, such as sql:0.7+medical:0.3, or null if it has no weight. */
export function nameMix(weights, bundle = "") {
  const parts = Object.entries(weights).filter(([, weight]) => weight !== 0);
  return parts.length ? bundle + parts.map(([name, weight]) => `${name}:${formatWeight(weight)}`).join("+") : null;
}

/** Reads such a name back. Returns null for any other name. */
export function parseMix(name) {
  const weights = {};
  for (const part of name.slice(bundleOf(name).length).split("+")) {
    const match = /^(.+):(-?\d+(?:\.\d+)?)$/.exec(part);
    if (!match) return null;
    weights[match[1]] = Number(match[2]);
  }
  return weights;
}

/** Writes a name for people: 0.7 sql + 0.3 medical for a mix, any other as it is. */
export function showName(name) {
  const mix = parseMix(name);
  return mix ? bundleOf(name) + Object.entries(mix).map(([adapter, weight]) => `${formatWeight(weight)} ${adapter}`).join(" + ") : name;
}

export const formatWeight = (weight) => String(Number(Number(weight).toFixed(2)));

/** The adapters that can be mixed at request time, by bundle as bundleOf() names it. */
export function findAdapters(models) {
  const found = new Map();
  for (const model of models) {
    const names = model.live_adapters ?? [];
    if (names.length) found.set(bundleOf(model.id), [...new Set([...(found.get(bundleOf(model.id)) ?? []), ...names])]);
  }
  return found;
}

/** Says in a word what kind of model it is. */
export function nameKind(model) {
  if (model.kind === "router") return "router";
  if (model.kind === "live") return "live";
  return Object.keys(model.mix ?? {}).length ? "merged" : "base";
}

/** Writes a variant's mix, without the weight where it is one adapter alone. */
export function describeMix(model) {
  if (nameKind(model) === "router") return "by the words of each prompt";
  const mix = Object.entries(model.mix ?? {}).filter(([, weight]) => weight !== 0);
  if (!mix.length) return "no adapter";
  if (mix.length === 1 && mix[0][1] === 1) return mix[0][0];
  return mix.map(([adapter, weight]) => `${formatWeight(weight)} ${adapter}`).join(" + ");
}

/** Says in two words what a variant keeps, or nothing if that was not measured. */
export function summarizeFidelity(model) {
  const kept = model.fidelity?.retention;
  return typeof kept === "number" ? `keeps ${percent(kept)}` : "";
}

const percent = (share) => `${(100 * share).toFixed(share < 0.9995 ? 1 : 0)}%`;

/** Says in a sentence what a variant keeps, as the gate measured it at export. */
export function describeFidelity(model) {
  const kind = nameKind(model);
  if (kind === "router") return "Picks a variant for each prompt.";
  const found = model.fidelity;
  if (!found) return "Its fidelity was not measured at export.";
  const agrees = `picks the same next word on ${percent(found.top1)} of ${found.tokens.toLocaleString("en")} held-out tokens`;
  if (found.retention === null || found.retention === undefined) return `The base alone: it ${agrees} as in full precision.`;
  const how = { repaired: " Repaired at export.", live: " Its adapters run beside the base." }[found.outcome] ?? "";
  return `Keeps ${percent(found.retention)} of its adapters' effect, and ${agrees}.${how}`;
}

/** Formats bytes in the unit that reads best. */
export function formatBytes(bytes) {
  let size = bytes;
  for (const unit of ["B", "KiB", "MiB"]) {
    if (size < 1024) return unit === "B" ? `${size} B` : `${size.toFixed(1)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(1)} GiB`;
}

function formatTime(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(1)} s`;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

/** The facts of an answer as [name, value, explanation, class], those that the server told. */
export function listFacts(answer) {
  const { receipt, timings, usage } = answer;
  const facts = [];
  if (receipt) {
    const state = receipt.cold ? "cold" : "warm";
    const meaning = `from the call until the variant could run; it was loaded ${receipt.cold ? "for this" : "already"}`;
    facts.push(["switch", `${formatTime(receipt.milliseconds)}, ${state}`, meaning, state]);
    facts.push(["mapped", formatBytes(receipt.bytes_mapped ?? 0), "bytes opened for the switch"]);
    if (receipt.kv_reused_tokens) facts.push(["reused", `${receipt.kv_reused_tokens} tokens`, "kept from earlier requests"]);
  }
  const speed = timings?.predicted_per_second;
  if (speed) facts.push(["speed", `${speed.toFixed(1)} tokens/s`, "while writing"]);
  const written = usage?.completion_tokens ?? timings?.predicted_n;
  if (written) facts.push(["wrote", `${written} tokens`, "in this answer"]);
  if (timings?.prompt_ms) facts.push(["first word", formatTime(timings.prompt_ms), "to read the prompt"]);
  return facts;
}
