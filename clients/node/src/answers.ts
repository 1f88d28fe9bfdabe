import type { ChatResponse__Output } from "./generated/headrace/v1/ChatResponse.js";
import type { GenerateResponse__Output } from "./generated/headrace/v1/GenerateResponse.js";
import type { ModelInfo__Output } from "./generated/headrace/v1/ModelInfo.js";
import type { TokenLogprob__Output } from "./generated/headrace/v1/TokenLogprob.js";
import { valuesOf } from "./protos.js";
import type { FinishReason, Model, Piece, Reply, TokenLogprob, ToolCall, ToolCallDelta } from "./types.js";

const FINISH_REASONS = new Map([...valuesOf("FinishReason")].map(([short, name]) => [name, short]));

/** A piece of an answer. */
export function pieceOf(message: ChatResponse__Output | GenerateResponse__Output): Piece {
  const isChat = "content" in message;
  const piece: Piece = {
    text: isChat ? message.content : message.text,
    reasoning: isChat ? message.reasoning : "",
    toolCalls: isChat ? message.toolCalls : [],
    tokenIds: message.tokenIds,
    choice: message.choice,
    logprobs: message.logprobs.map(logprobOf),
    promptLogprobs: message.promptLogprobs.map(logprobOf),
  };
  const finishReason = finishReasonOf(message.finishReason);
  if (finishReason) piece.finishReason = finishReason;
  if (message.usage) piece.usage = message.usage;
  return piece;
}

/** A reply to be filled by `add`. */
export function emptyReply(numChoices: number, traceId: string): Reply {
  const each = <Value>(make: () => Value): Value[] => Array.from({ length: numChoices }, make);
  return {
    text: "",
    texts: each(() => ""),
    reasoning: "",
    reasonings: each(() => ""),
    toolCalls: each(() => []),
    tokenIds: each(() => []),
    finishReason: "",
    finishReasons: each(() => ""),
    logprobs: each(() => []),
    promptLogprobs: each(() => []),
    requestId: "",
    traceId,
  };
}

/** Take a piece into a reply. */
export function add(reply: Reply, piece: Piece): void {
  const { choice } = piece;
  reply.texts[choice] += piece.text;
  reply.reasonings[choice] += piece.reasoning;
  reply.finishReasons[choice] ||= piece.finishReason ?? "";
  extend(reply.tokenIds[choice], piece.tokenIds);
  extend(reply.logprobs[choice], piece.logprobs);
  extend(reply.promptLogprobs[choice], piece.promptLogprobs);
  for (const delta of piece.toolCalls) addDelta(reply.toolCalls[choice] ?? [], delta);
  if (piece.usage) reply.usage = piece.usage;
  reply.text = reply.texts[0] ?? "";
  reply.reasoning = reply.reasonings[0] ?? "";
  reply.finishReason = reply.finishReasons[0] ?? "";
}

/** A model that can be asked for. */
export function modelOf({ name, maxModelLen, loadedUnixS, embedding }: ModelInfo__Output): Model {
  return { name, maxModelLen, loadedUnixS, ...(embedding ? { embedding } : {}) };
}

// A loop, since a prompt's tokens may be more than a call takes arguments.
function extend<Value>(target: Value[] | undefined, values: Value[]): void {
  for (const value of values) target?.push(value);
}

function addDelta(calls: ToolCall[], delta: ToolCallDelta): void {
  while (calls.length <= delta.index) calls.push({ id: "", name: "", arguments: "" });
  const call = calls[delta.index]!;
  call.id ||= delta.id;
  call.name ||= delta.name;
  call.arguments += delta.arguments;
}

/** Undefined before the end. A reason that this version does not know is told by its number. */
function finishReasonOf(reason: string | number): FinishReason | undefined {
  return typeof reason === "number" ? String(reason) : FINISH_REASONS.get(reason);
}

function logprobOf({ tokenId, text, logprob, top }: TokenLogprob__Output): TokenLogprob {
  return logprob === undefined ? { tokenId, text, top } : { tokenId, text, logprob, top };
}
