import { randomBytes } from "node:crypto";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import {
  type CallOptions,
  type ChannelCredentials,
  type ClientUnaryCall,
  credentials as channelCredentials,
  loadPackageDefinition,
  Metadata,
  type ServiceError,
} from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import type { ProtoGrpcType } from "./generated/inference.js";
import type { ChatRequest } from "./generated/headrace/v1/ChatRequest.js";
import type { ChatResponse__Output } from "./generated/headrace/v1/ChatResponse.js";
import type { DetokenizeResponse__Output } from "./generated/headrace/v1/DetokenizeResponse.js";
import type { GenerateRequest } from "./generated/headrace/v1/GenerateRequest.js";
import type { GenerateResponse__Output } from "./generated/headrace/v1/GenerateResponse.js";
import type { InferenceClient } from "./generated/headrace/v1/Inference.js";
import type { ListModelsResponse__Output } from "./generated/headrace/v1/ListModelsResponse.js";
import type { SamplingParams } from "./generated/headrace/v1/SamplingParams.js";
import type { StoppingParams } from "./generated/headrace/v1/StoppingParams.js";
import type { TokenizeResponse__Output } from "./generated/headrace/v1/TokenizeResponse.js";
import type { Usage__Output } from "./generated/headrace/v1/Usage.js";
import { errorOf } from "./errors.js";
import { DEFAULT_RETRIES, type Piece, type Retries, retryWaitMs, sleep, Stream, type Usage } from "./stream.js";

export * from "./errors.js";
export { DEFAULT_RETRIES, type Piece, type Reply, type Retries, Stream, type Usage } from "./stream.js";

/** One turn of a conversation. */
export interface Message {
  role: "system" | "user" | "assistant" | "tool";
  content: string;
  name?: string;
}

/** A model that can be asked for. */
export interface Model {
  name: string;
  maxModelLen: number;
}

/** What all calls of a client have in common. */
export interface ClientOptions {
  /** The model that calls mean; empty for the only one that is served. */
  model?: string;
  /** Sent with every call. */
  apiKey?: string;
  /** Deadline of calls that name none, milliseconds; none by default. */
  timeoutMs?: number;
  retries?: Partial<Retries>;
  /** TLS, from `credentials.createSsl(…)` of @grpc/grpc-js; the clear by default. */
  credentials?: ChannelCredentials;
  metadata?: Record<string, string>;
}

interface CallFields {
  /** The call's deadline, milliseconds from now. */
  timeoutMs?: number;
  /** The span that the call belongs to (W3C Trace Context); a new trace by default. */
  traceparent?: string;
  /** How tokens are drawn: temperature, top_p, seed, … */
  sampling?: SamplingParams;
  /** When to stop: max_tokens, stop, … */
  stopping?: StoppingParams;
}

/** Fields of a chat, by the names of the protos. */
export type ChatFields = CallFields & Omit<ChatRequest, "model" | "prompt" | "sampling" | "stopping">;
/** Fields of a generation, by the names of the protos. */
export type GenerateFields = CallFields & Omit<GenerateRequest, "model" | "text" | "token_ids" | "prompt" | "sampling" | "stopping">;

const PROTOS = join(dirname(dirname(fileURLToPath(import.meta.url))), "proto");
const LOADED = loadPackageDefinition(
  // 64-bit integers stay text where a number cannot hold them: a seed, for one.
  loadSync("headrace/v1/inference.proto", { includeDirs: [PROTOS], keepCase: true, longs: Number, enums: String, oneofs: true, defaults: true }),
) as unknown as ProtoGrpcType;

/** Calls one server, or several behind one name. */
export class Client {
  private readonly stub: InferenceClient;
  private readonly retries: Retries;

  /** @param target `host:port` */
  constructor(target = "127.0.0.1:9000", private readonly options: ClientOptions = {}) {
    this.retries = { ...DEFAULT_RETRIES, ...options.retries };
    this.stub = new LOADED.headrace.v1.Inference(target, options.credentials ?? channelCredentials.createInsecure());
  }

  /** End all calls and the connection. */
  close(): void {
    this.stub.close();
  }

  /** The assistant's next turn as it comes; `.read()` waits for the whole of it. */
  streamChat(messages: Message[], fields: ChatFields = {}): Stream<ChatResponse__Output> {
    const { timeoutMs, traceparent, sampling, stopping, ...rest } = fields;
    const request: ChatRequest = {
      ...rest,
      model: this.options.model ?? "",
      prompt: { messages },
      sampling: { seed: drawnSeed(), ...sampling },
      stopping: stopping ?? null,
    };
    return this.open(
      (metadata, options) => this.stub.Chat(request, metadata, options),
      (message) => pieceOf(message, message.content),
      { timeoutMs, traceparent, numChoices: fields.num_choices ?? 1 },
    );
  }

  /** The assistant's next turn, whole. */
  chat(messages: Message[], fields: ChatFields = {}) {
    return this.streamChat(messages, fields).read();
  }

  /** A prompt, text or token ids, gone on with, as it comes. */
  streamGenerate(prompt: string | number[], fields: GenerateFields = {}): Stream<GenerateResponse__Output> {
    const { timeoutMs, traceparent, sampling, stopping, ...rest } = fields;
    const request: GenerateRequest = {
      ...rest,
      ...(typeof prompt === "string" ? { text: prompt } : { token_ids: { ids: prompt } }),
      model: this.options.model ?? "",
      sampling: { seed: drawnSeed(), ...sampling },
      stopping: stopping ?? null,
    };
    return this.open(
      (metadata, options) => this.stub.Generate(request, metadata, options),
      (message) => pieceOf(message, message.text),
      { timeoutMs, traceparent, numChoices: fields.num_choices ?? 1 },
    );
  }

  /** A prompt gone on with, whole. */
  generate(prompt: string | number[], fields: GenerateFields = {}) {
    return this.streamGenerate(prompt, fields).read();
  }

  /** Token ids of a text, or of a conversation as the model's template writes it. */
  async tokenize(text: string | Message[]): Promise<number[]> {
    const prompt = typeof text === "string" ? { text } : { chat: { messages: text } };
    const request = { model: this.options.model ?? "", ...prompt };
    return (await this.ask<TokenizeResponse__Output>((metadata, options, done) => this.stub.Tokenize(request, metadata, options, done))).token_ids;
  }

  /** Text of token ids. */
  async detokenize(tokenIds: number[]): Promise<string> {
    const request = { model: this.options.model ?? "", token_ids: tokenIds };
    return (await this.ask<DetokenizeResponse__Output>((metadata, options, done) => this.stub.Detokenize(request, metadata, options, done))).text;
  }

  /** The models that can be asked for. */
  async listModels(): Promise<Model[]> {
    const answer = await this.ask<ListModelsResponse__Output>((metadata, options, done) =>
      this.stub.ListModels({}, metadata, options, done));
    return answer.models.map((model) => ({ name: model.name, maxModelLen: model.max_model_len }));
  }

  private open<Message>(
    begin: (metadata: Metadata, options: CallOptions) => import("@grpc/grpc-js").ClientReadableStream<Message>,
    toPiece: (message: Message) => Piece,
    told: { timeoutMs: number | undefined; traceparent: string | undefined; numChoices: number },
  ): Stream<Message> {
    const deadline = this.deadline(told.timeoutMs);
    const traceparent = told.traceparent ?? newTraceparent();
    const traceId = traceparent.split("-")[1];
    if (!traceId || traceparent.split("-").length !== 4) {
      throw new TypeError(`traceparent must be of the form 00-<trace id>-<span id>-<flags>; got ${traceparent}`);
    }
    return new Stream(() => begin(this.metadata(traceparent), { deadline }), toPiece, {
      traceId,
      numChoices: told.numChoices,
      retries: this.retries,
      remainingMs: () => deadline - Date.now(),
    });
  }

  private async ask<Answer>(
    call: (metadata: Metadata, options: CallOptions, done: (error: ServiceError | null, answer?: Answer) => void) => ClientUnaryCall,
  ): Promise<Answer> {
    const deadline = this.deadline(undefined);
    const traceparent = newTraceparent();
    for (let numDone = 0; ; numDone += 1) {
      try {
        return await new Promise<Answer>((resolve, reject) => {
          call(this.metadata(traceparent), { deadline }, (error, answer) => (error ? reject(error) : resolve(answer as Answer)));
        });
      } catch (failure) {
        const error = errorOf(failure as ServiceError, "");
        const waitMs = retryWaitMs(this.retries, error, numDone, deadline - Date.now());
        if (waitMs === undefined) throw error;
        await sleep(waitMs);
      }
    }
  }

  private deadline(timeoutMs: number | undefined): number {
    const limit = timeoutMs ?? this.options.timeoutMs;
    return limit === undefined ? Infinity : Date.now() + limit;
  }

  private metadata(traceparent: string): Metadata {
    const metadata = new Metadata();
    for (const [name, value] of Object.entries(this.options.metadata ?? {})) metadata.set(name, value);
    metadata.set("traceparent", traceparent);
    if (this.options.apiKey) metadata.set("authorization", `Bearer ${this.options.apiKey}`);
    return metadata;
  }
}

/** Drawn here, so that a retry goes on along the same path. A number that JavaScript holds exactly. */
function drawnSeed(): number {
  return randomBytes(6).readUIntBE(0, 6);
}

function newTraceparent(): string {
  return `00-${randomBytes(16).toString("hex")}-${randomBytes(8).toString("hex")}-01`;
}

function pieceOf(message: ChatResponse__Output | GenerateResponse__Output, text: string): Piece {
  const reasons = { FINISH_REASON_STOP: "stop", FINISH_REASON_LENGTH: "length" } as const;
  const finishReason = reasons[message.finish_reason as keyof typeof reasons];
  const piece: Piece = { text, tokenIds: message.token_ids, choice: message.choice };
  if (finishReason) piece.finishReason = finishReason;
  if (message.usage) piece.usage = usageOf(message.usage);
  return piece;
}

function usageOf(usage: Usage__Output): Usage {
  return {
    numPromptTokens: usage.num_prompt_tokens,
    numOutputTokens: usage.num_output_tokens,
    numCachedTokens: usage.num_cached_tokens,
  };
}
