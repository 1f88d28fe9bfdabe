// The Node client over a real port and a scripted service.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { loadPackageDefinition, Metadata, Server, ServerCredentials, status } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { Client, CancelledError, DeadlineExceededError, InvalidRequestError, OverloadedError, UnavailableError } from "headrace-client";

const { headrace } = loadPackageDefinition(
  loadSync("headrace/v1/inference.proto", { includeDirs: [new URL("../proto", import.meta.url).pathname], keepCase: true, longs: String, enums: String, defaults: true }),
);
const server = new Server();
let target = "";
let answer = () => {};
const seen = [];
const asked = [];

const WEATHER = { type: "function", function: { name: "weather", parameters: { type: "object" } } };
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
    Tokenize: (call, done) => {
      asked.push(call.request);
      done(null, { token_ids: [1, 2, 3], max_model_len: 8 });
    },
    Detokenize: (call, done) => done(null, { text: call.request.token_ids.join("-") + call.request.skip_special_tokens }),
    Embed: (call, done) => {
      asked.push(call.request);
      if (call.request.inputs.length) done(null, { request_id: "id2", embeddings: [{ values: [0.5, 1] }, { values: [2, 3] }], num_prompt_tokens: 5 });
      else done({ code: status.INVALID_ARGUMENT, details: "inputs must be", metadata: asMetadata({ "headrace-error-param": "inputs", "x-request-id": "id3" }) });
    },
    ListModels: (call, done) =>
      done(null, {
        models: [
          { name: "m", max_model_len: 8, loaded_unix_s: 7 },
          { name: "e", max_model_len: 8, loaded_unix_s: 7, embedding: { size: 384, is_matryoshka: true, dimensions: [64] } },
        ],
      }),
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
    const reply = await client.chat([{ role: "user", content: "hello" }], { sampling: { temperature: 0.5 }, stopping: { maxTokens: 7, stop: ["x"] }, traceparent });
    assert.equal(reply.text, "Good day");
    assert.deepEqual(reply.finishReasons, ["stop"]);
    assert.deepEqual(reply.usage, { numPromptTokens: 3, numOutputTokens: 2, numCachedTokens: 1, numReasoningTokens: 0 });
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
    assert.equal(await client.detokenize([1, 2], { skipSpecialTokens: false }), "1-2false");
    await client.tokenize([{ role: "user", content: "x" }], { tools: [WEATHER], addGenerationPrompt: false, model: "n" });
    const { model, chat } = asked.at(-1);
    assert.deepEqual([model, JSON.parse(chat.tools), chat.add_generation_prompt], ["n", [WEATHER], false]);
    assert.deepEqual(await client.listModels(), [
      { name: "m", maxModelLen: 8, loadedUnixS: 7 },
      { name: "e", maxModelLen: 8, loadedUnixS: 7, embedding: { size: 384, isMatryoshka: true, dimensions: [64] } },
    ]);
  }));

test("texts become vectors", () =>
  using({ model: "m" }, async (client) => {
    const reply = await client.embed(["abc", [1, 2]], { dimensions: 2, model: "e", traceparent: `00-${"ab".repeat(16)}-${"cd".repeat(8)}-01` });
    assert.deepEqual(reply, { embeddings: [[0.5, 1], [2, 3]], numPromptTokens: 5, requestId: "id2", traceId: "ab".repeat(16) });
    const { model, dimensions, inputs } = asked.at(-1);
    assert.deepEqual([model, dimensions, inputs[0].text, inputs[1].token_ids.ids], ["e", 2, "abc", [1, 2]]);
    await assert.rejects(client.embed([]), (error) => error instanceof InvalidRequestError && error.param === "inputs" && error.requestId === "id3");
    assert.equal(asked.at(-1).model, "m");
  }));

test("reasoning, tool calls and logprobs arrive streamed and joined", () =>
  using({}, async (client) => {
    const likely = { token_id: 1, text: Buffer.from([0xc3]), logprob: -0.5 };
    const told = { ...likely, top: [{ token_id: 2, text: Buffer.from("b"), logprob: -0.25 }, likely] };
    const first = { token_id: 9, text: Buffer.from("<s>"), top: [] };
    const script = [
      { reasoning: "hm", token_ids: [1], logprobs: [told], prompt_logprobs: [first, told] },
      { choice: 1, reasoning: "oh", token_ids: [2] },
      { content: "I ", reasoning: "m", token_ids: [3] },
      { content: "look", tool_calls: [{ index: 0, id: "c0", name: "weather", arguments: '{"a"' }] },
      { choice: 1, tool_calls: [{ index: 0, id: "d0", name: "time", arguments: "{}" }], finish_reason: "FINISH_REASON_ABORT" },
      { tool_calls: [{ index: 0, arguments: ": 1}" }, { index: 1, id: "c1", name: "time" }] },
      { tool_calls: [{ index: 1, arguments: "{}" }], finish_reason: "FINISH_REASON_STOP", usage: { num_prompt_tokens: 3, num_output_tokens: 8, num_reasoning_tokens: 2 } },
    ];
    answer = (call) => {
      for (const message of script) call.write({ request_id: "id1", ...message });
      call.end();
    };
    const logprob = { tokenId: 1, text: Buffer.from([0xc3]), logprob: -0.5 };
    const token = { ...logprob, top: [{ tokenId: 2, text: Buffer.from("b"), logprob: -0.25 }, logprob] };
    const reply = await client.chat([{ role: "user", content: "x" }], { numChoices: 2, logprobs: 2 });
    assert.deepEqual([reply.text, reply.texts, reply.reasoning, reply.reasonings], ["I look", ["I look", ""], "hmm", ["hmm", "oh"]]);
    assert.deepEqual(reply.toolCalls, [
      [{ id: "c0", name: "weather", arguments: '{"a": 1}' }, { id: "c1", name: "time", arguments: "{}" }],
      [{ id: "d0", name: "time", arguments: "{}" }],
    ]);
    assert.deepEqual([reply.tokenIds, reply.finishReason, reply.finishReasons], [[[1, 3], [2]], "stop", ["stop", "abort"]]);
    assert.deepEqual(reply.logprobs, [[token], []]);
    assert.deepEqual(reply.promptLogprobs, [[{ tokenId: 9, text: Buffer.from("<s>"), top: [] }, token], []]);
    assert.deepEqual(reply.usage, { numPromptTokens: 3, numOutputTokens: 8, numCachedTokens: 0, numReasoningTokens: 2 });
    const deltas = [];
    for await (const piece of client.streamChat([{ role: "user", content: "x" }], { numChoices: 2 })) deltas.push(...piece.toolCalls);
    assert.deepEqual(deltas[2], { index: 0, id: "", name: "", arguments: ": 1}" });
  }));

test("types of answers have the fields of the protos", () =>
  using({}, async (client) => {
    const fieldsOf = (name) => headrace.v1[name].type.field.map((field) => field.name.replace(/_([a-z])/g, (_, letter) => letter.toUpperCase()));
    const rpcs = Object.keys(headrace.v1.Inference.service).map((name) => name[0].toLowerCase() + name.slice(1));
    for (const rpc of rpcs) assert.equal(typeof client[rpc], "function", rpc);
    answer = (call) => {
      call.write({ logprobs: [{ logprob: -1, top: [{}] }], usage: {}, tool_calls: [{}], finish_reason: "FINISH_REASON_STOP" });
      call.end();
    };
    const told = [];
    for await (const piece of client.streamChat([])) told.push(piece);
    const sorted = (names) => [...names].sort();
    // The id of a stream's request is the stream's.
    const expected = fieldsOf("ChatResponse").filter((name) => name !== "requestId").map((name) => (name === "content" ? "text" : name));
    assert.deepEqual(sorted(Object.keys(told[0])), sorted(expected));
    assert.deepEqual(sorted(Object.keys(told[0].usage)), sorted(fieldsOf("Usage")));
    assert.deepEqual(sorted(Object.keys(told[0].toolCalls[0])), sorted(fieldsOf("ToolCallDelta")));
    assert.deepEqual(sorted(Object.keys(told[0].logprobs[0])), sorted(fieldsOf("TokenLogprob")));
    assert.deepEqual(sorted(Object.keys(told[0].logprobs[0].top[0])), sorted(fieldsOf("LikelyToken")));
    const [, model] = await client.listModels();
    assert.deepEqual(sorted(Object.keys(model)), sorted(fieldsOf("ModelInfo")));
    assert.deepEqual(sorted(Object.keys(await client.embed(["x"]))), sorted([...fieldsOf("EmbedResponse"), "traceId"]));
  }));

test("all that a chat can ask arrives", () =>
  using({}, async (client) => {
    answer = (call) => pieces(call, ["a"]);
    const toolCalls = [{ id: "c0", name: "weather", arguments: '{"at": "Rome"}' }];
    const turns = [
      { role: "user", content: "hot?", name: "ann" },
      { role: "assistant", content: null, toolCalls, reasoning: "hm" },
      { role: "tool", content: "30", toolCallId: "c0" },
    ];
    await client.chat(turns, {
      tools: [WEATHER],
      toolChoice: "function:weather",
      parallelToolCalls: false,
      templateKwargs: { enable_thinking: false },
      continueFinalMessage: true,
      reasoning: { separate: false, budgetTokens: 5 },
      constraint: { kind: "json_schema", source: { type: "object" } },
      speculative: { method: "ngram", numSpeculativeTokens: 3 },
      sampling: { logitBias: [{ tokenId: 7, bias: -1.5 }], topK: -1, seed: 2n ** 64n - 1n },
      stopping: { ignoreEos: true, stopTokenIds: [4] },
      logprobs: 3, promptLogprobs: 0, skipSpecialTokens: false, priority: -5, cacheSalt: "s",
    });
    const { request } = seen.at(-1);
    const { prompt } = request;
    const call = { id: "c0", type: "function", function: { name: "weather", arguments: '{"at": "Rome"}' } };
    assert.deepEqual(prompt.messages.map((turn) => [turn.role, turn.content, turn.name, turn.tool_calls && JSON.parse(turn.tool_calls), turn.tool_call_id, turn.reasoning]), [
      ["user", "hot?", "ann", "", "", ""],
      ["assistant", "", "", [call], "", "hm"],
      ["tool", "30", "", "", "c0", ""],
    ]);
    assert.deepEqual([JSON.parse(prompt.tools), JSON.parse(prompt.template_kwargs)], [[WEATHER], { enable_thinking: false }]);
    assert.deepEqual([request.tool_choice, request.parallel_tool_calls, prompt.continue_final_message], ["function:weather", false, true]);
    assert.deepEqual([request.reasoning.separate, request.reasoning.stream, request.reasoning.budget_tokens], [false, undefined, 5]);
    assert.deepEqual({ ...request.constraint }, { kind: "CONSTRAINT_KIND_JSON_SCHEMA", source: '{"type":"object"}' });
    assert.deepEqual([request.speculative.method, request.speculative.num_speculative_tokens], ["SPECULATIVE_METHOD_NGRAM", 3]);
    assert.deepEqual([request.sampling.logit_bias, request.sampling.top_k, request.sampling.seed], [[{ token_id: 7, bias: -1.5 }], -1, "18446744073709551615"]);
    assert.deepEqual([request.stopping.ignore_eos, request.stopping.stop_token_ids], [true, [4]]);
    assert.deepEqual([request.logprobs, request.prompt_logprobs, request.skip_special_tokens], [3, 0, false]);
    assert.deepEqual([request.priority, request.cache_salt], [-5, "s"]);
    await client.generate("x", { prompt_logprobs: 2, stopping: { max_tokens: 7 }, sampling: { seed: undefined }, constraint: { kind: "choice", source: ["a", "b"] } });
    const { prompt_logprobs: numTop, stopping, sampling, constraint } = seen.at(-1).request;
    assert.deepEqual([numTop, stopping.max_tokens, constraint.source], [2, 7, '["a","b"]'], "the protos' own spelling names a field too");
    assert.ok(sampling.seed > 0);
  }));

test("what cannot be sent is named", () =>
  using({}, async (client) => {
    const turns = [{ role: "user", content: "x" }];
    const refused = [
      [{ heat: 1 }, TypeError, /no field heat; there are .*sampling/],
      [{ messages: [] }, TypeError, /no field messages/],
      [{ sampling: { heat: 1 } }, TypeError, /no field heat in sampling; there are .*temperature/],
      [{ sampling: [] }, TypeError, /sampling must be an object of .*temperature/],
      [{ sampling: { temperature: "hot" } }, TypeError, /sampling\.temperature must be a number; got 'hot'/],
      [{ sampling: { topK: 1.5 } }, TypeError, /sampling\.topK must be an integer from -2147483648 to 2147483647; got 1\.5/],
      [{ sampling: { seed: -1 } }, RangeError, /sampling\.seed must be an integer from 0 to 18446744073709551615; got -1/],
      [{ sampling: { seed: 2 ** 60 } }, RangeError, /sampling\.seed is a number that is not exact: give a bigint/],
      [{ stopping: { maxTokens: 2 ** 32 } }, RangeError, /stopping\.maxTokens must be an integer from 0 to 4294967295; got 4294967296/],
      [{ stopping: { maxTokens: "7" } }, TypeError, /stopping\.maxTokens must be an integer/],
      [{ stopping: { maxTokens: 1, max_tokens: 2 } }, TypeError, /stopping\.max_tokens is given twice/],
      [{ stopping: { stop: "x" } }, TypeError, /stopping\.stop must be an array; got 'x'/],
      [{ reasoning: { stream: 1 } }, TypeError, /reasoning\.stream must be a boolean; got 1/],
      [{ constraint: { kind: "xml" } }, RangeError, /constraint\.kind must be one of json_schema, .*; got 'xml'/],
      [{ constraint: { kind: "choice", source: [1n] } }, TypeError, /constraint\.source must be what JSON can say/],
      [{ tools: 7 }, TypeError, /tools must be a string; got 7/],
      [{ toolChoice: { name: "f" } }, TypeError, /toolChoice must be a string; got \{ name: 'f' \}/],
      [{ sampling: { logitBias: [{ tokenId: 5 }, { token: 6 }] } }, TypeError, /no field token in sampling\.logitBias\.1/],
    ];
    for (const [fields, Kind, message] of refused) {
      assert.throws(() => client.streamChat(turns, fields), (error) => error instanceof Kind && message.test(error.message), String(message));
    }
    assert.throws(() => client.streamChat([{ role: "user", content: 5 }]), /messages\.0\.content must be a string; got 5/);
    assert.throws(() => client.streamChat([{ role: "user", text: "x" }]), /no field text in messages\.0/);
    assert.throws(() => client.streamChat([{ role: "assistant", toolCalls: [{ id: "c0" }] }]), /messages\.0\.toolCalls\.0 must be an object of id, name and arguments/);
    assert.throws(() => client.streamGenerate([1.5]), /prompt\.0 must be an integer from 0 to 4294967295; got 1\.5/);
    await assert.rejects(client.embed("abc"), /texts must be an array of texts; got string/);
    await assert.rejects(client.embed(["a", 7]), /texts\.1 must be an array; got 7/);
    await assert.rejects(client.tokenize("x", { tools: [] }), /no field tools/);
    await assert.rejects(client.chat(turns, { heat: 1 }), /no field heat/);
    await assert.rejects(client.listModels({ model: "m" }), /no field model/);
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
