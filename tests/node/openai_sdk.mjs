// OpenAI's own Node client against a server: node --test openai_sdk.mjs, with its address in HEADRACE_URL.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const model = "smollm2-135m-instruct";
const embeddingModel = "all-minilm-l6-v2";
const server = process.env.HEADRACE_URL;
const client = new OpenAI({ baseURL: `${server}/v1`, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const asked = { model, messages: [{ role: "user", content: "What is the capital of Japan?" }], temperature: 0, max_completion_tokens: 12 };
const completed = { model, prompt: "The capital of France is", temperature: 0, max_tokens: 6 };
const parameters = { type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"], additionalProperties: false };
const weather = { type: "function", function: { name: "get_weather", strict: true, parameters } };

const collect = async (stream) => {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
};
const say = async (fields = {}) => (await client.chat.completions.create({ ...asked, ...fields })).choices[0];
const openRequests = async () => {
  const page = await (await fetch(`${server}/metrics`)).text();
  return Number(page.match(/^headrace_router_open_requests\S* (\S+)$/m)[1]);
};

test("a stream says what the whole chat answer says", async () => {
  const whole = await client.chat.completions.create(asked);
  assert.match(whole.choices[0].message.content, /Tokyo/);
  const chunks = await collect(await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } }));
  assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), whole.choices[0].message.content);
  assert.equal(chunks.at(-2).choices[0].finish_reason, whole.choices[0].finish_reason);
  assert.equal(chunks.at(-1).usage.total_tokens, whole.usage.total_tokens);
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
});

test("choices, seeds, stop strings, limits, biases and logprobs", async () => {
  const drawn = { temperature: 1.2, n: 3, seed: 7, top_p: 0.99, frequency_penalty: 0.1, presence_penalty: 0.1 };
  const draw = async () => (await client.chat.completions.create({ ...asked, ...drawn })).choices.map((choice) => choice.message.content);
  const texts = await draw();
  assert.equal(new Set(texts).size, 3);
  assert.deepEqual(await draw(), texts);
  const whole = await say({ logprobs: true, top_logprobs: 2 });
  assert.ok(whole.logprobs.content.every((item) => item.top_logprobs.length === 2 && item.token === item.top_logprobs[0].token));
  assert.equal((await say({ stop: [" Japan"] })).message.content, whole.message.content.split(" Japan")[0]);
  assert.equal((await say({ max_completion_tokens: 2 })).finish_reason, "length");
  const biased = await say({ logit_bias: { 1904: 100 }, max_completion_tokens: 3, logprobs: true });
  assert.equal(new Set(biased.logprobs.content.map((item) => item.token)).size, 1);
  assert.equal((await say({ top_k: 1, temperature: 1.5 })).message.content, whole.message.content);
});

test("completions: batches of prompts, echo with logprobs, streams", async () => {
  const prompts = [completed.prompt, "Two plus two is"];
  const together = (await client.completions.create({ ...completed, prompt: prompts })).choices.map((choice) => choice.text);
  const chunks = await collect(await client.completions.create({ ...completed, prompt: prompts, stream: true }));
  const streamed = ["", ""];
  for (const { index, text } of chunks.flatMap((chunk) => chunk.choices)) streamed[index] += text;
  assert.deepEqual(streamed, together);
  const [echoed] = (await client.completions.create({ ...completed, echo: true, logprobs: 1 })).choices;
  assert.equal(echoed.text, prompts[0] + together[0]);
  assert.equal(echoed.logprobs.tokens.join(""), echoed.text);
});

test("answers keep to a schema and to JSON, and are parsed", async () => {
  const schema = { type: "object", properties: { n: { enum: [1, 2, 3] } }, required: ["n"], additionalProperties: false };
  const response_format = { type: "json_schema", json_schema: { name: "digit", strict: true, schema } };
  const parsed = await client.chat.completions.parse({ ...asked, max_completion_tokens: 32, response_format });
  assert.ok([1, 2, 3].includes(parsed.choices[0].message.parsed.n));
  const free = await say({ response_format: { type: "json_object" } });
  assert.match(free.message.content, /^\s*\{/);
});

test("tools that must be called are called, whole and streamed, and their results are taken", async () => {
  const messages = [{ role: "user", content: "How is the weather in Paris?" }];
  for (const tool_choice of ["required", { type: "function", function: { name: "get_weather" } }]) {
    const fields = { ...asked, messages, tools: [weather], tool_choice, max_completion_tokens: 96, parallel_tool_calls: false };
    const { message } = (await client.chat.completions.create(fields)).choices[0];
    const [call] = message.tool_calls;
    assert.equal(call.function.name, "get_weather");
    assert.equal(typeof JSON.parse(call.function.arguments).city, "string");
    const final = await client.chat.completions.stream(fields).finalChatCompletion();
    assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
    const turns = [...messages, message, { role: "tool", tool_call_id: call.id, content: "sunny" }];
    assert.ok((await say({ messages: turns, tools: [weather] })).message.content);
  }
  const auto = await say({ tools: [weather], tool_choice: "auto", reasoning_effort: "low" });
  assert.ok(auto.message.content || auto.message.tool_calls.length);
});

test("responses, whole, streamed and continued", async () => {
  const fields = { model, input: asked.messages[0].content, temperature: 0, max_output_tokens: 12 };
  const whole = await client.responses.create(fields);
  const events = await collect(await client.responses.create({ ...fields, stream: true }));
  const deltas = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta);
  assert.equal(deltas.join(""), whole.output_text);
  const next = await client.responses.create({ ...fields, input: "And of Italy?", previous_response_id: whole.id });
  assert.ok(next.usage.input_tokens > whole.usage.input_tokens);
  await client.responses.delete(whole.id);
  await assert.rejects(client.responses.retrieve(whole.id), OpenAI.NotFoundError);
});

test("embeddings, in both formats", async () => {
  const fields = { model: embeddingModel, input: ["a cat", "a feline", "revenue"] };
  const { data, usage } = await client.embeddings.create(fields);
  const plain = await client.embeddings.create({ ...fields, encoding_format: "float" });
  const dot = (left, right) => left.reduce((sum, value, index) => sum + value * right[index], 0);
  const vectors = data.map((item) => item.embedding);
  assert.ok(dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2]));
  for (const [index, vector] of vectors.entries()) assert.ok(dot(vector, plain.data[index].embedding) > 0.9999);
  assert.ok(usage.prompt_tokens > 3);
});

test("models are listed and found; errors are the client's own", async () => {
  assert.ok((await collect(await client.models.list())).some(({ id }) => id === model));
  assert.equal((await client.models.retrieve(model)).id, model);
  await assert.rejects(client.models.retrieve("nope"), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ ...asked, model: "nope" }), OpenAI.NotFoundError);
  for (const [param, value] of Object.entries({ temperature: 9, top_p: 0, n: 0, max_completion_tokens: 0 })) {
    for (const stream of [false, true]) {
      await assert.rejects(client.chat.completions.create({ ...asked, [param]: value, stream }), (error) => {
        assert.ok(error instanceof OpenAI.BadRequestError);
        assert.equal(error.param, param);
        return true;
      });
    }
  }
});

// The gauge is set several times a second.
const untilOpen = async (count) => {
  const ends = Date.now() + 5000;
  while ((await openRequests()) !== count) {
    assert.ok(Date.now() < ends, `${count} requests are open within 5 s`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
};

test("a stream that is aborted frees its place", async () => {
  const stream = await client.chat.completions.create({ ...asked, max_completion_tokens: 4000, ignore_eos: true, stream: true });
  for await (const _ of stream) {
    await untilOpen(1);
    break;
  }
  stream.controller.abort();
  await untilOpen(0);
});
