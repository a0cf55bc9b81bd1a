// Runs a bundle's variants with onnxruntime-web, in a worker, so that the page stays alive while a step is computed.
// It is told {type: "open", threads}, {type: "ask", variant, mix, prompt, limit} and {type: "stop"}, and says {type: "opened",
// manifest}, {type: "state", text}, {type: "token", token, text}, {type: "done", reason, seconds, prompt} or {type: "failed", text}.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { Template } from "./node_modules/@huggingface/jinja/dist/index.js";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
import { makeFactors, readSafetensors, requireInputs } from "./live.js";

const ROOM = 128; // positions that the keys and values grow by
const CHUNK = 64; // tokens of a prompt that are read in one step
const say = (type, more) => postMessage({ type, ...more });
const bundle = {};
let opened = null; // the session that is open, with the name of its graph: one at a time, since each holds its weights
let stopped = false;

async function fetchFile(name, kind = "arrayBuffer") {
  const response = await fetch(`bundle/${name}`);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response[kind]();
}

async function open({ threads }) {
  if (threads) ort.env.wasm.numThreads = threads;
  bundle.manifest = await fetchFile("bundle.json", "json");
  if (bundle.manifest.model.cache === "growing") throw new Error("This page does not run graphs that Optimum traced.");
  const has = (name) => name in bundle.manifest.files;
  bundle.config = has("tokenizer_config.json") ? await fetchFile("tokenizer_config.json", "json") : {};
  bundle.tokenizer = new Tokenizer(await fetchFile("tokenizer.json", "json"), bundle.config);
  bundle.template = has("chat_template.jinja") ? new Template(await fetchFile("chat_template.jinja", "text")) : null;
  say("opened", { manifest: bundle.manifest });
}

/** Token ids of a prompt: of a conversation of one message, or of a plain text for a bundle without a chat template. */
function encode(prompt) {
  if (!bundle.template) return bundle.tokenizer.encode(prompt).ids;
  const text = bundle.template.render({
    messages: [{ role: "user", content: prompt }],
    add_generation_prompt: true,
    bos_token: bundle.config.bos_token ?? "",
    eos_token: bundle.config.eos_token ?? "",
  });
  return bundle.tokenizer.encode(text, { add_special_tokens: false }).ids;
}

/** Opens the graph of a variant. The browser keeps the weights, which variants share as files, and the session copies them. */
async function openGraph(variant) {
  const { file, blobs } = variant.graphs.cpu;
  if (opened?.file === file) return opened.session;
  await opened?.session.release();
  opened = null;
  say("state", { text: `reading ${blobs.length} files` });
  const slots = bundle.manifest.live_slots;
  const given = ["logits_to_keep", ...(variant.kind === "live" ? slots.flatMap((slot) => [slot.a, ...slot.b]) : [])];
  const model = requireInputs(new Uint8Array(await fetchFile(file)), given);
  const externalData = await Promise.all(
    blobs.map(async (path) => ({ path, data: new Uint8Array(await fetchFile(path)) })),
  );
  say("state", { text: "opening" });
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"], externalData });
  opened = { file, session };
  return session;
}

async function readMix(weights) {
  const named = Object.entries(weights).filter(([, weight]) => weight !== 0);
  const files = await Promise.all(named.map(([name]) => fetchFile(bundle.manifest.adapters[name].file)));
  const mix = files.map((file, place) => [readSafetensors(file), named[place][1]]);
  const inputs = makeFactors(bundle.manifest.live_slots, mix);
  return Object.fromEntries(
    Object.entries(inputs).map(([name, { dims, values }]) => [name, new ort.Tensor("float32", values, dims)]),
  );
}

/** The keys and values of one text: float32 (1, heads, room, size) for each layer. The room grows as the text does. */
class Cache {
  constructor({ layers, kv_heads, head_size }) {
    Object.assign(this, { heads: kv_heads, size: head_size, room: 0, length: 0 });
    this.names = Array.from({ length: layers }, (_, layer) => ["key", "value"].map((part) => `${layer}.${part}`)).flat();
    this.values = Object.fromEntries(this.names.map((name) => [name, new Float32Array(0)]));
  }

  feeds(count) {
    const room = Math.ceil((this.length + count) / ROOM) * ROOM;
    if (room > this.room) for (const name of this.names) this.values[name] = this.enlarge(this.values[name], room);
    this.room = Math.max(room, this.room);
    const dims = [1, this.heads, this.room, this.size];
    return Object.fromEntries(
      this.names.map((name) => [`past_key_values.${name}`, new ort.Tensor("float32", this.values[name], dims)]),
    );
  }

  enlarge(values, room) {
    const larger = new Float32Array(this.heads * room * this.size);
    for (let head = 0; head < this.heads && this.room; head++) {
      const [from, to] = [head * this.room * this.size, (head + 1) * this.room * this.size];
      larger.set(values.subarray(from, to), head * room * this.size);
    }
    return larger;
  }

  take(results, count) {
    for (const name of this.names) this.values[name] = results[`present.${name}`].data;
    this.length += count;
  }
}

/** Reads tokens, and returns the likeliest next one. */
async function step(session, cache, tokens, factors) {
  const ids = BigInt64Array.from(tokens, BigInt);
  const mask = new BigInt64Array(cache.length + tokens.length).fill(1n);
  const results = await session.run({
    ...cache.feeds(tokens.length),
    ...factors,
    input_ids: new ort.Tensor("int64", ids, [1, tokens.length]),
    attention_mask: new ort.Tensor("int64", mask, [1, mask.length]),
    logits_to_keep: new ort.Tensor("int64", BigInt64Array.of(1n), [1]),
  });
  cache.take(results, tokens.length);
  return results.logits.data.reduce((best, logit, token, logits) => (logit > logits[best] ? token : best), 0);
}

async function ask({ variant: name, mix, prompt, limit }) {
  stopped = false;
  const { manifest, tokenizer } = bundle;
  const variant = manifest.variants[name];
  if (variant.texts) throw new Error(`${name} has a tokenizer of its own, which this page does not read.`);
  const session = await openGraph(variant);
  const factors = variant.kind === "live" ? await readMix(mix ?? variant.live) : {};
  const cache = new Cache(manifest.model);
  const ids = encode(prompt);
  const ends = new Set(manifest.model.eos_token_ids);
  const written = [];
  let shown = "";
  let reason = "length";
  let token = 0;
  say("state", { text: `reading ${ids.length} tokens` });
  const started = performance.now();
  for (let at = 0; at < ids.length; at += CHUNK) token = await step(session, cache, ids.slice(at, at + CHUNK), factors);
  const first = performance.now();
  while (written.length < limit) {
    if (ends.has(token)) reason = "stop";
    if (stopped) reason = "stopped";
    if (reason !== "length" || cache.length >= manifest.model.context_length) break;
    written.push(token);
    const text = tokenizer.decode(written, { skip_special_tokens: true });
    const whole = text.endsWith("\ufffd") ? shown : text; // the bytes of a character may come in several tokens
    say("token", { token, text: whole.slice(shown.length) });
    shown = whole;
    if (written.length < limit) token = await step(session, cache, [token], factors);
    await new Promise((resolve) => setTimeout(resolve)); // lets a message to stop come in
  }
  const seconds = { prompt: (first - started) / 1e3, answer: (performance.now() - first) / 1e3 };
  say("done", { reason, seconds, prompt: ids, tokens: written });
}

const calls = { open, ask, stop: () => (stopped = true) };

onmessage = async ({ data }) => {
  try {
    await calls[data.type](data);
  } catch (error) {
    say("failed", { text: String(error?.message ?? error) });
  }
};
