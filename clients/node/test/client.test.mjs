// The Node client over a real port and a scripted service.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { loadPackageDefinition, Metadata, Server, ServerCredentials, status } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { Client, CancelledError, DeadlineExceededError, InvalidRequestError, OverloadedError, UnavailableError } from "headrace-client";

const { headrace } = loadPackageDefinition(
  loadSync("headrace/v1/inference.proto", { includeDirs: [new URL("../proto", import.meta.url).pathname], keepCase: true, longs: Number, enums: String, defaults: true }),
);
const server = new Server();
let target = "";
let answer = () => {};
const seen = [];

const pieces = (call, texts) => {
  call.sendMetadata(asMetadata({ "x-request-id": "id1" }));
  for (const [index, text] of texts.entries()) {
    const isLast = index === texts.length - 1;
    call.write({
      request_id: "id1", content: text, text, token_ids: [index], choice: 0,
      finish_reason: isLast ? "FINISH_REASON_STOP" : "FINISH_REASON_UNSPECIFIED",
      ...(isLast ? { usage: { num_prompt_tokens: 3, num_output_tokens: texts.length, num_cached_tokens: 1 } } : {}),
    });
  }
  call.end();
};
const asMetadata = (values) => {
  const metadata = new Metadata();
  for (const [name, value] of Object.entries(values)) metadata.set(name, value);
  return metadata;
};
const refuse = (call, code, details, values) => call.emit("error", { code, details, metadata: asMetadata(values) });

before(async () => {
  const stream = (call) => {
    seen.push({ request: call.request, metadata: call.metadata });
    answer(call);
  };
  server.addService(headrace.v1.Inference.service, {
    Chat: stream,
    Generate: stream,
    Tokenize: (call, done) => done(null, { token_ids: [1, 2, 3], max_model_len: 8 }),
    Detokenize: (call, done) => done(null, { text: call.request.token_ids.join("-") }),
    ListModels: (call, done) => done(null, { models: [{ name: "m", max_model_len: 8, loaded_unix_s: 7 }] }),
  });
  const port = await new Promise((resolve, reject) =>
    server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (error, bound) => (error ? reject(error) : resolve(bound))),
  );
  target = `127.0.0.1:${port}`;
});
after(() => server.forceShutdown());

const using = async (options, work) => {
  const client = new Client(target, options);
  try {
    await work(client);
  } finally {
    client.close();
  }
};

test("a chat whole and in pieces", () =>
  using({ model: "m", apiKey: "k".repeat(16) }, async (client) => {
    answer = (call) => pieces(call, ["Good", " day"]);
    const traceparent = `00-${"ab".repeat(16)}-${"cd".repeat(8)}-01`;
    const reply = await client.chat([{ role: "user", content: "hello" }], { sampling: { temperature: 0.5 }, stopping: { max_tokens: 7, stop: ["x"] }, traceparent });
    assert.equal(reply.text, "Good day");
    assert.deepEqual(reply.finishReasons, ["stop"]);
    assert.deepEqual(reply.usage, { numPromptTokens: 3, numOutputTokens: 2, numCachedTokens: 1 });
    assert.equal(reply.requestId, "id1");
    assert.equal(reply.traceId, "ab".repeat(16));
    const { request, metadata } = seen.at(-1);
    assert.equal(request.model, "m");
    assert.deepEqual(request.prompt.messages.map((turn) => [turn.role, turn.content]), [["user", "hello"]]);
    assert.equal(request.sampling.temperature, 0.5);
    assert.ok(request.sampling.seed > 0);
    assert.equal(request.stopping.max_tokens, 7);
    assert.deepEqual(metadata.get("traceparent"), [traceparent]);
    assert.deepEqual(metadata.get("authorization"), [`Bearer ${"k".repeat(16)}`]);
    const texts = [];
    for await (const piece of client.streamGenerate([4, 5])) texts.push(piece.text);
    assert.deepEqual(texts, ["Good", " day"]);
    assert.deepEqual(seen.at(-1).request.token_ids.ids, [4, 5]);
  }));

test("tokens and models", () =>
  using({}, async (client) => {
    assert.deepEqual(await client.tokenize("x"), [1, 2, 3]);
    assert.deepEqual(await client.tokenize([{ role: "user", content: "x" }]), [1, 2, 3]);
    assert.equal(await client.detokenize([1, 2]), "1-2");
    assert.deepEqual(await client.listModels(), [{ name: "m", maxModelLen: 8 }]);
  }));

test("errors are split by what can be done", () =>
  using({ retries: { num: 0 } }, async (client) => {
    answer = (call) => refuse(call, status.INVALID_ARGUMENT, "top_p must be", { "headrace-error-code": "invalid_request", "headrace-error-param": "top_p" });
    await assert.rejects(client.generate("x"), (error) => error instanceof InvalidRequestError && error.param === "top_p" && error.code === "invalid_request");
    answer = (call) => refuse(call, status.RESOURCE_EXHAUSTED, "full", { "headrace-retry-after-ms": "2500" });
    await assert.rejects(client.generate("x"), (error) => error instanceof OverloadedError && error.retryAfterMs === 2500);
    answer = () => {};
    await assert.rejects(client.generate("x", { timeoutMs: 150 }), DeadlineExceededError);
    assert.throws(() => client.streamGenerate("x", { traceparent: "none" }), TypeError);
    const nowhere = new Client("127.0.0.1:1", { retries: { num: 1, firstWaitMs: 10 } });
    await assert.rejects(nowhere.generate("x"), UnavailableError);
    nowhere.close();
  }));

test("a call that met a full queue is made again with the same seed", () =>
  using({ timeoutMs: 20_000 }, async (client) => {
    const seeds = [];
    answer = (call) => {
      seeds.push(call.request.sampling.seed);
      if (seeds.length < 3) refuse(call, status.RESOURCE_EXHAUSTED, "full", { "headrace-retry-after-ms": "20" });
      else pieces(call, ["a"]);
    };
    const stream = client.streamGenerate("x");
    assert.equal((await stream.read()).text, "a");
    assert.equal(stream.numRetries, 2);
    assert.equal(new Set(seeds).size, 1);
  }));

test("cancelling and leaving the loop reach the server", () =>
  using({}, async (client) => {
    for (const leave of ["cancel", "break"]) {
      let cancelled;
      const told = new Promise((resolve) => (cancelled = resolve));
      answer = (call) => {
        call.on("cancelled", cancelled);
        call.write({ request_id: "id1", text: "a", token_ids: [1] });
      };
      const stream = client.streamGenerate("x");
      const work = (async () => {
        for await (const piece of stream) {
          assert.equal(piece.text, "a");
          if (leave === "break") break;
          stream.cancel();
        }
      })();
      if (leave === "break") await work;
      else await assert.rejects(work, CancelledError);
      await told;
    }
  }));
