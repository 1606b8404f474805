// The network: two graphs, run by ONNX Runtime Web on one thread, so that any file server will do.

import * as ort from "./runtime/ort.wasm.bundle.min.mjs";

const GRAPHS = { overview: "overview.onnx", focus: "focus.onnx" };
const WASM = "runtime/ort-wasm-simd-threaded.wasm";
const SHOWN = 5; // classes

export class Network {
  /** Fetches and opens both graphs. `tell` is called with the share that has come, 0 to 1. */
  static async load(about, tell) {
    const all = Object.values(about.bytes).reduce((sum, bytes) => sum + bytes, 0);
    let come = 0;
    const count = (bytes) => tell(Math.min((come += bytes) / all, 1));
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = await fetchBytes(WASM, count);
    const open = async (file) => ort.InferenceSession.create(await fetchBytes(file, count), { executionProviders: ["wasm"] });
    return new Network(about, await open(GRAPHS.overview), await open(GRAPHS.focus));
  }

  constructor(about, overview, focus) {
    Object.assign(this, { about, overview, focus });
    this.last = Promise.resolve();
  }

  /** A photo's features, context prior and map of the overview. */
  glance(photo) {
    return this.alone(() => this.overview.run({ images: this.prepare(photo.square) }));
  }

  /** What the closer look finds of a glance with a context prior: {classes, first, outputs}. */
  async look(glance, prior) {
    const outputs = await this.alone(() => this.focus.run({ features: glance.features, prior }));
    const shares = softmax(outputs.logits.data);
    const order = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]).slice(0, SHOWN);
    return { classes: order.map((i) => ({ name: this.about.classes[i], share: shares[i] })), first: order[0], outputs };
  }

  /** One run at a time: a session cannot run twice at once. */
  alone(run) {
    const result = this.last.then(run);
    this.last = result.catch(() => {});
    return result;
  }

  /** The square of a photo as a tensor (1, 3, S, S), normalised. */
  prepare(square) {
    const { side, mean, std } = this.about;
    const small = shrink(square, side);
    const pixels = small.getContext("2d").getImageData(0, 0, side, side).data;
    const values = new Float32Array(3 * side * side);
    for (let channel = 0; channel < 3; channel++) {
      for (let i = 0; i < side * side; i++) {
        values[channel * side * side + i] = (pixels[4 * i + channel] / 255 - mean[channel]) / std[channel];
      }
    }
    return new ort.Tensor("float32", values, [1, 3, side, side]);
  }
}

/** A context prior of zeros. */
export function zeroPrior(prior) {
  return new ort.Tensor("float32", new Float32Array(prior.data.length), prior.dims);
}

/** A context prior that is everywhere its own mean over the photo. */
export function uniformPrior(prior) {
  const [, channels, height, width] = prior.dims;
  const places = height * width;
  const values = new Float32Array(prior.data.length);
  for (let channel = 0; channel < channels; channel++) {
    const own = prior.data.subarray(channel * places, (channel + 1) * places);
    values.fill(own.reduce((sum, value) => sum + value, 0) / places, channel * places, (channel + 1) * places);
  }
  return new ort.Tensor("float32", values, prior.dims);
}

// Halved until the last step, since browsers' own filters leave out pixels where they shrink far.
function shrink(square, side) {
  let canvas = square;
  while (canvas.width > side) {
    const next = Math.max(side, Math.ceil(canvas.width / 2));
    const half = new OffscreenCanvas(next, next);
    const context = half.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(canvas, 0, 0, next, next);
    canvas = half;
  }
  if (canvas.width === side) return canvas;
  const large = new OffscreenCanvas(side, side);
  large.getContext("2d").drawImage(canvas, 0, 0, side, side);
  return large;
}

function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

async function fetchBytes(file, count) {
  const answer = await fetch(file);
  if (!answer.ok) throw new Error(`${file} cannot be fetched (${answer.status}); is the folder whole?`);
  const parts = [];
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    count(value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
