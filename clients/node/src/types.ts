import type { ChatPrompt } from "./generated/headrace/v1/ChatPrompt.js";
import type { ChatRequest } from "./generated/headrace/v1/ChatRequest.js";
import type { GenerateRequest } from "./generated/headrace/v1/GenerateRequest.js";
import type { ReasoningParams } from "./generated/headrace/v1/ReasoningParams.js";
import type { SamplingParams } from "./generated/headrace/v1/SamplingParams.js";
import type { StoppingParams } from "./generated/headrace/v1/StoppingParams.js";
import type { TokenizeRequest } from "./generated/headrace/v1/TokenizeRequest.js";

/** A call that the assistant makes of a tool. */
export interface ToolCall {
  /** By which the tool's turn answers it. */
  id: string;
  /** The function. */
  name: string;
  /** JSON, as the model wrote it. */
  arguments: string;
}

/** One turn of a conversation. */
export interface Message {
  role: "system" | "user" | "assistant" | "tool" | (string & {});
  content?: string | null;
  name?: string;
  /** Of an assistant's turn. */
  toolCalls?: ToolCall[];
  /** In a tool's turn, the call that it answers. */
  toolCallId?: string;
  /** Of an assistant's turn. */
  reasoning?: string;
}

/** Tokens of a request. */
export interface Usage {
  numPromptTokens: number;
  numOutputTokens: number;
  /** Of the prompt's. */
  numCachedTokens: number;
  /** Of those that were made. */
  numReasoningTokens: number;
}

/** A new part of a tool call. */
export interface ToolCallDelta {
  /** Which of the choice's calls, from 0. */
  index: number;
  /** In the first delta of a call only. */
  id: string;
  /** In the first delta of a call only. */
  name: string;
  /** New characters of the arguments' JSON. */
  arguments: string;
}

/** A token and how likely it was. */
export interface LikelyToken {
  tokenId: number;
  /** They may be a part of a character. */
  text: Buffer;
  logprob: number;
}

/** How likely a token was, and the likeliest in its place, most likely first. */
export interface TokenLogprob {
  tokenId: number;
  text: Buffer;
  /** Natural logarithm; undefined for the first token of a prompt. */
  logprob?: number;
  top: LikelyToken[];
}

/** "stop", "length", "abort" or "error". */
export type FinishReason = "stop" | "length" | "abort" | "error" | (string & {});

/** New output of one choice. */
export interface Piece {
  text: string;
  reasoning: string;
  toolCalls: ToolCallDelta[];
  tokenIds: number[];
  choice: number;
  /** In the last piece of a choice. */
  finishReason?: FinishReason;
  /** In the last piece of all. */
  usage?: Usage;
  /** Of each of `tokenIds`, where they were asked for. */
  logprobs: TokenLogprob[];
  /** Of the prompt's tokens, in the first piece of a choice, where they were asked for. */
  promptLogprobs: TokenLogprob[];
}

/** A whole answer. Arrays have one entry a choice. */
export interface Reply {
  /** Of the first choice. */
  text: string;
  texts: string[];
  /** Of the first choice. */
  reasoning: string;
  reasonings: string[];
  /** The calls, whole. */
  toolCalls: ToolCall[][];
  tokenIds: number[][];
  /** Of the first choice. */
  finishReason: FinishReason;
  finishReasons: FinishReason[];
  /** Of each of `tokenIds`; empty where nobody asked. */
  logprobs: TokenLogprob[][];
  /** Of the prompt's tokens; empty where nobody asked. */
  promptLogprobs: TokenLogprob[][];
  /** Of all choices together. */
  usage?: Usage;
  requestId: string;
  traceId: string;
}

/** Vectors of texts. */
export interface EmbedReply {
  /** One a text, in their order. */
  embeddings: number[][];
  /** Of all texts together. */
  numPromptTokens: number;
  requestId: string;
  traceId: string;
}

/** A model that can be asked for. */
export interface Model {
  name: string;
  maxModelLen: number;
  /** When it was loaded, seconds since the Unix epoch. */
  loadedUnixS: number;
  /** What vectors it makes; undefined for one that generates text. */
  embedding?: EmbeddingInfo;
}

/** What vectors a model makes. */
export interface EmbeddingInfo {
  /** Numbers in a vector. */
  size: number;
  /** Vectors can be cut to fewer `dimensions`. */
  isMatryoshka: boolean;
  /** Sizes to which they can be cut; empty for any. */
  dimensions: number[];
}

/** What all calls take. */
export interface CallFields {
  /** The call's deadline, milliseconds from now. */
  timeoutMs?: number;
  /** The span that the call belongs to (W3C Trace Context); a new trace by default. */
  traceparent?: string;
  /** The model asked; the client's own by default. */
  model?: string;
}

/** A message's fields without the loader's marks of what is set, and numbers that are numbers. */
type Plain<Message> = {
  [Name in keyof Message as Name extends `_${string}` ? never : Name]?: NonNullable<Message[Name]> extends string
    ? Message[Name]
    : Exclude<Message[Name], string>;
};

/** What a whole output must be. A source of JSON (a schema, choices, a structural tag) may be given as what it is. */
export interface Constraint {
  kind: "json_schema" | "json_object" | "regex" | "ebnf" | "choice" | "structural_tag";
  source?: string | object;
}

/** How the output may be speculated on. */
export interface SpeculativeParams {
  method?: "off" | "ngram" | "auto";
  numSpeculativeTokens?: number;
}

/** How tokens are drawn. */
export type SamplingFields = Omit<Plain<SamplingParams>, "seed" | "logitBias"> & {
  /** A bigint where a number is not exact. */
  seed?: number | bigint | string;
  logitBias?: { tokenId: number; bias: number }[];
};

/** When to stop. */
export type StoppingFields = Plain<StoppingParams>;

interface DrawnFields {
  sampling?: SamplingFields;
  stopping?: StoppingFields;
  constraint?: Constraint;
  speculative?: SpeculativeParams;
}

/** How a conversation is written for the model. */
export type PromptFields = Omit<Plain<ChatPrompt>, "messages" | "tools" | "templateKwargs"> & {
  /** {"type": "function", "function": {"name", "description", "parameters": JSON Schema}}, or JSON of them. */
  tools?: string | object[];
  /** Further variables for the template. */
  templateKwargs?: string | object;
};

type Arguments = "prompt" | "text" | "chat" | "tokenIds" | "model";
/** Fields of a chat: those of the protos. */
export type ChatFields = CallFields & DrawnFields & PromptFields &
  Omit<Plain<ChatRequest>, Arguments | keyof DrawnFields | "reasoning"> & { reasoning?: Plain<ReasoningParams> };
/** Fields of a generation: those of the protos. */
export type GenerateFields = CallFields & DrawnFields & Omit<Plain<GenerateRequest>, Arguments | keyof DrawnFields>;
/** Fields of a tokenize call: those of the protos; of a conversation also how it is written. */
export type TokenizeFields = CallFields & PromptFields & Omit<Plain<TokenizeRequest>, Arguments>;
/** Fields of a detokenize call: those of the protos. */
export type DetokenizeFields = CallFields & { skipSpecialTokens?: boolean };
/** Fields of an embed call: those of the protos. */
export type EmbedFields = CallFields & {
  /** Numbers in each vector, for models whose vectors can be cut; all by default. */
  dimensions?: number;
};
