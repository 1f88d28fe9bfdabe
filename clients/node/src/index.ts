import { randomBytes } from "node:crypto";
import {
  type CallOptions,
  type ChannelCredentials,
  type ClientReadableStream,
  type ClientUnaryCall,
  credentials as channelCredentials,
  Metadata,
  type ServiceError,
} from "@grpc/grpc-js";
import type { ChatRequest } from "./generated/headrace/v1/ChatRequest.js";
import type { ChatResponse__Output } from "./generated/headrace/v1/ChatResponse.js";
import type { DetokenizeRequest } from "./generated/headrace/v1/DetokenizeRequest.js";
import type { DetokenizeResponse__Output } from "./generated/headrace/v1/DetokenizeResponse.js";
import type { EmbedRequest } from "./generated/headrace/v1/EmbedRequest.js";
import type { EmbedResponse__Output } from "./generated/headrace/v1/EmbedResponse.js";
import type { GenerateRequest } from "./generated/headrace/v1/GenerateRequest.js";
import type { GenerateResponse__Output } from "./generated/headrace/v1/GenerateResponse.js";
import type { InferenceClient } from "./generated/headrace/v1/Inference.js";
import type { ListModelsResponse__Output } from "./generated/headrace/v1/ListModelsResponse.js";
import type { TokenizeRequest } from "./generated/headrace/v1/TokenizeRequest.js";
import type { TokenizeResponse__Output } from "./generated/headrace/v1/TokenizeResponse.js";
import { modelOf, pieceOf } from "./answers.js";
import { errorOf } from "./errors.js";
import { Inference } from "./protos.js";
import { fill, inputOf, type Place, put, type Target } from "./requests.js";
import { DEFAULT_RETRIES, type Retries, retryWaitMs, sleep, Stream } from "./stream.js";
import type {
  CallFields,
  ChatFields,
  DetokenizeFields,
  EmbedFields,
  EmbedReply,
  GenerateFields,
  Message,
  Model,
  Reply,
  TokenizeFields,
} from "./types.js";

export * from "./errors.js";
export { DEFAULT_RETRIES, type Retries, Stream } from "./stream.js";
export type * from "./types.js";

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

/**
 * Calls one server, or several behind one name.
 *
 * Calls throw a TypeError for a field that there is not or a value of another type, a RangeError for a value out of range.
 */
export class Client {
  private readonly stub: InferenceClient;
  private readonly retries: Retries;

  /** @param target `host:port` */
  constructor(target = "127.0.0.1:9000", private readonly options: ClientOptions = {}) {
    this.retries = { ...DEFAULT_RETRIES, ...options.retries };
    // What was asked for is read, however long: logprobs of a prompt come in one message, and gRPC would end at 4 MiB.
    this.stub = new Inference(target, options.credentials ?? channelCredentials.createInsecure(), { "grpc.max_receive_message_length": -1 });
  }

  /** End all calls and the connection. */
  close(): void {
    this.stub.close();
  }

  /** The assistant's next turn as it comes; `.read()` waits for the whole of it. */
  streamChat(messages: Message[], fields: ChatFields = {}): Stream<ChatResponse__Output> {
    const prompt: Target = {};
    put("ChatPrompt", prompt, "messages", messages, "messages");
    const request = this.filled("ChatRequest", { prompt }, fields, [["ChatPrompt", prompt]]);
    seed(request);
    return this.open((metadata, options) => this.stub.Chat(request as ChatRequest, metadata, options), request, fields);
  }

  /** The assistant's next turn, whole. */
  async chat(messages: Message[], fields: ChatFields = {}): Promise<Reply> {
    return this.streamChat(messages, fields).read();
  }

  /** A prompt, text or token ids, gone on with, as it comes. */
  streamGenerate(prompt: string | number[], fields: GenerateFields = {}): Stream<GenerateResponse__Output> {
    const request = this.filled("GenerateRequest", inputOf(prompt, "prompt"), fields);
    seed(request);
    return this.open((metadata, options) => this.stub.Generate(request as GenerateRequest, metadata, options), request, fields);
  }

  /** A prompt gone on with, whole. */
  async generate(prompt: string | number[], fields: GenerateFields = {}): Promise<Reply> {
    return this.streamGenerate(prompt, fields).read();
  }

  /** Vectors of texts, each given as text or as token ids. A server that chats with one model and embeds with another has two. */
  async embed(texts: (string | number[])[], fields: EmbedFields = {}): Promise<EmbedReply> {
    if (!Array.isArray(texts)) throw new TypeError(`texts must be an array of texts; got ${typeof texts}`);
    const inputs = texts.map((text, index) => inputOf(text, `texts.${index}`));
    const request: EmbedRequest = this.filled("EmbedRequest", { inputs }, fields);
    const { answer, traceId } = await this.ask<EmbedResponse__Output>(
      (metadata, options, done) => this.stub.Embed(request, metadata, options, done), fields);
    const embeddings = answer.embeddings.map((one) => one.values);
    return { embeddings, numPromptTokens: answer.numPromptTokens, requestId: answer.requestId, traceId };
  }

  /** Token ids of a text, or of a conversation as the model's template writes it with the same fields as in `streamChat`. */
  async tokenize(text: string | Message[], fields: TokenizeFields = {}): Promise<number[]> {
    const chat: Target = {};
    const isText = typeof text === "string";
    if (!isText) put("ChatPrompt", chat, "messages", text, "messages");
    const inside: Place[] = isText ? [] : [["ChatPrompt", chat]];
    const request: TokenizeRequest = this.filled("TokenizeRequest", isText ? { text } : { chat }, fields, inside);
    const { answer } = await this.ask<TokenizeResponse__Output>(
      (metadata, options, done) => this.stub.Tokenize(request, metadata, options, done), fields);
    return answer.tokenIds;
  }

  /** Text of token ids. */
  async detokenize(tokenIds: number[], fields: DetokenizeFields = {}): Promise<string> {
    const known: Target = {};
    put("DetokenizeRequest", known, "tokenIds", tokenIds, "tokenIds");
    const request: DetokenizeRequest = this.filled("DetokenizeRequest", known, fields);
    const { answer } = await this.ask<DetokenizeResponse__Output>(
      (metadata, options, done) => this.stub.Detokenize(request, metadata, options, done), fields);
    return answer.text;
  }

  /** The models that can be asked for. */
  async listModels(fields: Omit<CallFields, "model"> = {}): Promise<Model[]> {
    this.filled("ListModelsRequest", {}, fields);
    const { answer } = await this.ask<ListModelsResponse__Output>(
      (metadata, options, done) => this.stub.ListModels({}, metadata, options, done), fields);
    return answer.models.map(modelOf);
  }

  /** A request: what is known of it, and the fields of the call, some of which may belong to a message inside it. */
  private filled(typeName: string, known: Target, fields: CallFields, inside: Place[] = []): Target {
    const { timeoutMs, traceparent, ...rest } = fields;
    const request: Target = { ...known };
    fill(rest, [[typeName, request], ...inside]);
    request.model ??= this.options.model ?? "";
    return request;
  }

  private open<Answer extends ChatResponse__Output | GenerateResponse__Output>(
    begin: (metadata: Metadata, options: CallOptions) => ClientReadableStream<Answer>,
    request: Target,
    fields: CallFields,
  ): Stream<Answer> {
    const deadline = this.deadline(fields.timeoutMs);
    const { traceparent, traceId } = traceOf(fields.traceparent);
    return new Stream(() => begin(this.metadata(traceparent), { deadline }), pieceOf, {
      traceId,
      numChoices: Number(request.numChoices ?? 1),
      retries: this.retries,
      remainingMs: () => deadline - Date.now(),
    });
  }

  private async ask<Answer>(
    call: (metadata: Metadata, options: CallOptions, done: (error: ServiceError | null, answer?: Answer) => void) => ClientUnaryCall,
    fields: CallFields,
  ): Promise<{ answer: Answer; traceId: string }> {
    const deadline = this.deadline(fields.timeoutMs);
    const { traceparent, traceId } = traceOf(fields.traceparent);
    for (let numDone = 0; ; numDone += 1) {
      try {
        const answer = await new Promise<Answer>((resolve, reject) => {
          call(this.metadata(traceparent), { deadline }, (error, told) => (error ? reject(error) : resolve(told as Answer)));
        });
        return { answer, traceId };
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
function seed(request: Target): void {
  request.sampling = { seed: randomBytes(6).readUIntBE(0, 6), ...(request.sampling as Target | undefined) };
}

/** The trace given, or a new one. */
function traceOf(given: string | undefined): { traceparent: string; traceId: string } {
  const traceparent = given ?? `00-${randomBytes(16).toString("hex")}-${randomBytes(8).toString("hex")}-01`;
  const [, traceId, ...rest] = traceparent.split("-");
  if (!traceId || rest.length !== 2) {
    throw new TypeError(`traceparent must be of the form 00-<trace id>-<span id>-<flags>; got ${traceparent}`);
  }
  return { traceparent, traceId };
}
