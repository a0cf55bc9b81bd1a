// Live adapters: their factors as the inputs of the live graph.

const decoder = new TextDecoder();

/** The tensors of a safetensors file: a function from a name to {shape, values}, values in float32, or null. */
export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(decoder.decode(new Uint8Array(buffer, 8, length)));
  return (name) => {
    const entry = header[name];
    if (!entry) return null;
    if (entry.dtype !== "F16") throw new Error(`${name} is ${entry.dtype}, not F16`);
    const [start, end] = entry.data_offsets;
    const halves = new Uint16Array(buffer.slice(8 + length + start, 8 + length + end));
    return { shape: entry.shape, values: Float32Array.from(halves, toFloat) };
  };
}

function toFloat(half) {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/**
 * The inputs of a mix, by name: {dims, values}. slots: live_slots of bundle.json. mix: pairs of an adapter's tensors and its
 * weight. R, the rank of the mix, is the sum of the adapters' ranks. For each slot: `a` is float32 (P · R, columns), and each of
 * `b` is float32 (R, rows), the transposed B times the weight. A module that an adapter lacks has zeros.
 */
export function makeFactors(slots, mix) {
  const inputs = {};
  for (const slot of slots) {
    const found = mix.map(([read, weight]) => ({
      weight,
      modules: slot.modules.map((module) => [read(`${module}.lora_A`), read(`${module}.lora_B`)]),
    }));
    const ranks = found.map(({ modules }) => Math.max(0, ...modules.map(([a]) => a?.shape[0] ?? 0)));
    const rank = ranks.reduce((sum, each) => sum + each, 0);
    const a = new Float32Array(slot.modules.length * rank * slot.columns);
    const b = slot.rows.map((rows) => new Float32Array(rank * rows));
    let at = 0;
    for (const [place, { weight, modules }] of found.entries()) {
      for (const [module, [down, up]] of modules.entries()) {
        if (!down) continue;
        a.set(down.values, (module * rank + at) * slot.columns);
        const [rows, own] = up.shape;
        for (let row = 0; row < rows; row++) {
          for (let index = 0; index < own; index++) b[module][(at + index) * rows + row] = weight * up.values[row * own + index];
        }
      }
      at += ranks[place];
    }
    inputs[slot.a] = { dims: [slot.modules.length * rank, slot.columns], values: a };
    slot.b.forEach((name, module) => (inputs[name] = { dims: [rank, slot.rows[module]], values: b[module] }));
  }
  return inputs;
}

/**
 * An ONNX model without the defaults of these inputs. onnxruntime-web takes no value for an input that has a default, so those
 * that the page gives must have none. It drops entries of GraphProto.initializer (field 5) by TensorProto.name (field 8), and
 * keeps all other bytes: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
 */
export function requireInputs(model, names) {
  const dropped = new Set(names);
  const parts = [];
  for (const field of readFields(model)) {
    if (field.number !== 7) parts.push(field.bytes);
    else {
      const kept = [...readFields(field.content)].filter((each) => !(each.number === 5 && dropped.has(readName(each.content))));
      const graph = join(kept.map((each) => each.bytes));
      parts.push(Uint8Array.of(...writeNumber((7 << 3) | 2), ...writeNumber(graph.length)), graph);
    }
  }
  return join(parts);
}

function readName(tensor) {
  for (const field of readFields(tensor)) if (field.number === 8) return decoder.decode(field.content);
  return "";
}

function* readFields(bytes) {
  let at = 0;
  const readNumber = () => {
    let value = 0;
    for (let shift = 1; ; shift *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * shift;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const start = at;
    const tag = readNumber();
    const kind = tag & 7;
    let content = null;
    if (kind === 0) readNumber();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else {
      const length = readNumber();
      content = bytes.subarray(at, (at += length));
    }
    yield { number: Math.floor(tag / 8), content, bytes: bytes.subarray(start, at) };
  }
}

function writeNumber(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return [...bytes, value];
}

function join(parts) {
  const joined = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.length;
  }
  return joined;
}
