"use strict";
// An expertd client that was written from expert_shard.proto alone, and reads that file to speak to a server.

const fs = require("node:fs");
const os = require("node:os");
const path = require("node:path");
const { parseArgs } = require("node:util");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const PROTO = path.join(__dirname, "../../../proto/expert_shard.proto");
const USAGE = "usage: node client.js HOST:PORT [--input FILE --output FILE]";
const FP8 = "DTYPE_FLOAT8_E4M3FN";
const BF16 = "DTYPE_BFLOAT16";
const BLOCK = 128;
const MESSAGES_IN_FLIGHT = 4;

// --- The service ----------------------------------------------------------------------------------------------------

/** An expertd server: `getShard()` and `execute(request)` return promises, `stream()` opens an ExecuteStream. */
class ExpertShard {
  constructor(address) {
    const loaded = protoLoader.loadSync(PROTO, { keepCase: true, longs: Number, enums: String, defaults: true });
    const { ExpertShard: Stub } = grpc.loadPackageDefinition(loaded).expertd.v1;
    // The server bounds its messages (Limits.max_message_bytes); 4 MiB, the library's own bound, is too low.
    this.stub = new Stub(address, grpc.credentials.createInsecure(), { "grpc.max_receive_message_length": -1 });
  }

  getShard() {
    return new Promise((resolve, reject) => {
      this.stub.GetShard({}, settle(resolve, reject));
    });
  }

  execute(request) {
    return new Promise((resolve, reject) => {
      this.stub.Execute(request, settle(resolve, reject));
    });
  }

  stream() {
    return new ExecuteStream(this.stub.ExecuteStream());
  }

  close() {
    this.stub.close();
  }
}

/** One long-lived stream. Replies come in any order and find their request by its id. */
class ExecuteStream {
  constructor(call) {
    this.call = call;
    this.waiting = new Map();
    call.on("data", (reply) => {
      const { resolve, reject } = this.waiting.get(reply.request_id);
      this.waiting.delete(reply.request_id);
      if (reply.error) reject(refusal(reply.error.code, reply.error.message));
      else resolve(reply);
    });
    call.on("error", (error) => this.abandon(refusal(error.code, error.details)));
    call.on("end", () => this.abandon(new Error("the server ended the stream")));
  }

  execute(request) {
    return new Promise((resolve, reject) => {
      this.waiting.set(request.request_id, { resolve, reject });
      this.call.write(request);
    });
  }

  abandon(error) {
    for (const { reject } of this.waiting.values()) reject(error);
    this.waiting.clear();
  }

  close() {
    this.call.end();
  }
}

/** The callback of a unary call, for a promise. */
function settle(resolve, reject) {
  return (error, reply) => (error ? reject(refusal(error.code, error.details)) : resolve(reply));
}

/** What the server refused, as an error: "INVALID_ARGUMENT: top_k is 9; it must be from 1 to 8". */
function refusal(code, message) {
  return Object.assign(new Error(`${grpc.status[code]}: ${message}`), { status: grpc.status[code] });
}

// --- Numbers as the contract wants them -----------------------------------------------------------------------------

/** float32 values to float8_e4m3fn with one float32 scale per 128 of them. */
function quantize(values) {
  const scales = new Float32Array(Math.ceil(values.length / BLOCK));
  const bytes = new Uint8Array(values.length);
  for (let block = 0; block < scales.length; block++) {
    const first = block * BLOCK;
    const last = Math.min(first + BLOCK, values.length);
    let largest = 1e-10;
    for (let i = first; i < last; i++) largest = Math.max(largest, Math.abs(values[i]));
    scales[block] = Math.fround(largest) / 448;
    for (let i = first; i < last; i++) bytes[i] = toFloat8(Math.fround(values[i] / scales[block]));
  }
  return { bytes, scales };
}

/**
 * One float8_e4m3fn, rounded to nearest even; |value| must not exceed 448.
 *
 * Between two powers of two the code counts steps of an eighth of the lower one, and it goes on counting across powers
 * of two, so a value that is rounded up to the next one needs no special case. Below 2^-6 the steps stay what they are.
 */
function toFloat8(value) {
  const magnitude = Math.abs(value);
  const exponent = Math.max(-6, exponentOf(magnitude));
  const steps = roundToEven(magnitude / 2 ** (exponent - 3));
  const sign = value < 0 || Object.is(value, -0) ? 0x80 : 0;
  return sign | (steps + 8 * (exponent + 6));
}

/** The exponent of a float32: 2^exponent <= value < 2^(exponent + 1), and -127 for zero and subnormals. */
function exponentOf(value) {
  return (float32Bits(value) >>> 23) - 127;
}

function roundToEven(value) {
  const rounded = Math.round(value);
  return value % 1 === 0.5 && rounded % 2 === 1 ? rounded - 1 : rounded;
}

/** float32 values to bfloat16: the upper half of their bits, rounded to nearest even. */
function toBfloat16(values) {
  return Uint16Array.from(values, (value) => {
    const bits = float32Bits(value);
    return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
  });
}

const scratch = new DataView(new ArrayBuffer(4));

function float32Bits(value) {
  scratch.setFloat32(0, value);
  return scratch.getUint32(0);
}

/** A typed array as the `bytes` of a message: both are row-major and little-endian. */
function toBytes(array) {
  return Buffer.from(array.buffer, array.byteOffset, array.byteLength);
}

function toFloat32Array(bytes) {
  return new Float32Array(Uint8Array.from(bytes).buffer);
}

// --- One batch ------------------------------------------------------------------------------------------------------

/** The ExecuteRequest for some tokens, rows of { hidden, ids, weights }. */
function makeRequest(shard, layer, tokens, hiddenDtype, requestId) {
  const hidden = Float32Array.from(tokens.flatMap((token) => token.hidden));
  const quantized = hiddenDtype === FP8 ? quantize(hidden) : { bytes: toBfloat16(hidden), scales: new Float32Array() };
  return {
    request_id: requestId,
    model_fingerprint: shard.model_fingerprint,
    placement_epoch: shard.placement_epoch,
    layer,
    num_tokens: tokens.length,
    top_k: tokens[0].ids.length,
    hidden_dtype: hiddenDtype,
    reply_dtype: "DTYPE_FLOAT32",
    hidden: toBytes(quantized.bytes),
    hidden_scales: toBytes(quantized.scales),
    expert_ids: toBytes(Int32Array.from(tokens.flatMap((token) => token.ids))),
    weights: toBytes(Float32Array.from(tokens.flatMap((token) => token.weights))),
  };
}

/** All tokens in one unary call. */
async function runUnary(server, shard, layer, tokens, hiddenDtype) {
  const request = makeRequest(shard, layer, tokens, hiddenDtype, 1);
  return collect([request], [await server.execute(request)], shard);
}

/** The same tokens as several requests that are in flight on one stream at once. */
async function runStream(server, shard, layer, tokens, hiddenDtype) {
  const stream = server.stream();
  try {
    const size = Math.ceil(tokens.length / MESSAGES_IN_FLIGHT);
    const requests = [];
    for (let first = 0; first < tokens.length; first += size) {
      const part = tokens.slice(first, first + size);
      requests.push(makeRequest(shard, layer, part, hiddenDtype, requests.length + 1));
    }
    const replies = await Promise.all(requests.map((request) => stream.execute(request)));
    return collect(requests, replies, shard);
  } finally {
    stream.close();
  }
}

/** What was sent and what came back, in the order of the requests. */
function collect(requests, replies, shard) {
  const width = shard.config.hidden_size;
  const partials = replies.flatMap((reply) => rows(toFloat32Array(reply.partials), width));
  const receipt = {};
  for (const { receipt_experts: experts, receipt_pairs: pairs } of replies) {
    experts.forEach((expert, index) => (receipt[expert] = (receipt[expert] ?? 0) + pairs[index]));
  }
  return {
    request_ids: replies.map((reply) => reply.request_id),
    hidden: Buffer.concat(requests.map((request) => request.hidden)).toString("base64"),
    scales: requests.flatMap((request) => Array.from(toFloat32Array(request.hidden_scales))),
    partials,
    receipt,
  };
}

function rows(values, width) {
  const count = values.length / width;
  return Array.from({ length: count }, (_, row) => Array.from(values.subarray(row * width, (row + 1) * width)));
}

// --- The program ----------------------------------------------------------------------------------------------------

/** Every way to ask for the same tokens. A refusal is a result too. */
async function runAll(server, shard, layer, tokens) {
  const results = [];
  for (const [rpc, run] of [["Execute", runUnary], ["ExecuteStream", runStream]]) {
    for (const hidden_dtype of [FP8, BF16]) {
      try {
        results.push({ rpc, hidden_dtype, ...(await run(server, shard, layer, tokens, hidden_dtype)) });
      } catch (error) {
        if (!error.status) throw error;
        results.push({ rpc, hidden_dtype, error: error.message });
      }
    }
  }
  return results;
}

/** Tokens of the input file: { layer, hidden: [T][H], ids: [T][k], weights: [T][k] }. */
function readInput(file) {
  const { layer, hidden, ids, weights } = JSON.parse(fs.readFileSync(file, "utf8"));
  return { layer, tokens: hidden.map((row, token) => ({ hidden: row, ids: ids[token], weights: weights[token] })) };
}

/** Five tokens of noise for this server's first experts. */
function randomInput(shard) {
  const noise = (length) => Array.from({ length }, () => Math.random() * 2 - 1);
  const experts = shard.experts.slice(0, shard.config.num_experts_per_tok);
  const tokens = Array.from({ length: 5 }, () => ({
    hidden: noise(shard.config.hidden_size),
    ids: experts,
    weights: experts.map(() => 1 / experts.length),
  }));
  return { layer: shard.layers[0], tokens };
}

function summary({ rpc, hidden_dtype, error, partials, receipt }) {
  const head = `${rpc} ${hidden_dtype}:`;
  if (error) return `${head} ${error}`;
  const norms = partials.slice(0, 5).map((row) => Math.hypot(...row).toFixed(4));
  return `${head} norms of the first partials ${norms.join(" ")}; pairs by expert ${JSON.stringify(receipt)}`;
}

async function main() {
  const options = { input: { type: "string" }, output: { type: "string" } };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  if (positionals.length !== 1 || Boolean(values.input) !== Boolean(values.output)) throw new Error(USAGE);
  if (os.endianness() !== "LE") throw new Error("tensors travel little-endian; this machine is not");
  const server = new ExpertShard(positionals[0]);
  try {
    const shard = await server.getShard();
    console.log(shard);
    const { layer, tokens } = values.input ? readInput(values.input) : randomInput(shard);
    const results = await runAll(server, shard, layer, tokens);
    console.log(results.map(summary).join("\n"));
    if (values.output) fs.writeFileSync(values.output, JSON.stringify({ shard, results }));
    if (results.some((result) => result.error)) process.exitCode = 1;
  } finally {
    server.close();
  }
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
