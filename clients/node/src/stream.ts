import type { ClientReadableStream, Metadata, ServiceError } from "@grpc/grpc-js";
import { add, emptyReply } from "./answers.js";
import { CancelledError, errorOf, first, OverloadedError, UnavailableError, type HeadraceError } from "./errors.js";
import type { Piece, Reply } from "./types.js";

/** When a call is made again: the server cannot be reached or is overloaded, and nothing of the answer has come yet. */
export interface Retries {
  /** Most retries of a call; 0 for none. */
  num: number;
  /** Wait before the first, milliseconds, where the server does not say how long; each next one is twice as long. */
  firstWaitMs: number;
  /** Longest wait; a server that asks for more is not waited for. */
  longestWaitMs: number;
}

export const DEFAULT_RETRIES: Retries = { num: 3, firstWaitMs: 200, longestWaitMs: 5000 };

/** How long to wait before the next try, milliseconds; undefined for no further try. */
export function retryWaitMs(retries: Retries, error: HeadraceError, numDone: number, remainingMs: number): number | undefined {
  if (numDone >= retries.num || !(error instanceof OverloadedError || error instanceof UnavailableError)) return undefined;
  const guess = Math.min(retries.firstWaitMs * 2 ** numDone * (0.75 + Math.random() / 2), retries.longestWaitMs);
  const waitMs = error.retryAfterMs ?? guess;
  return waitMs > retries.longestWaitMs || waitMs >= remainingMs ? undefined : waitMs;
}

export const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** An answer as it comes: `for await` its pieces, `cancel()` when enough is there. Leaving the loop early cancels too. */
export class Stream<Message> implements AsyncIterable<Piece> {
  /** Of the trace that the call is part of, 32 hex digits. */
  readonly traceId: string;
  /** Its id in the server's logs; known with the first piece. */
  requestId = "";
  /** Times the call was made again. */
  numRetries = 0;
  private call: ClientReadableStream<Message> | undefined;
  private isCancelled = false;

  constructor(
    private readonly begin: () => ClientReadableStream<Message>,
    private readonly toPiece: (message: Message) => Piece,
    private readonly options: { traceId: string; numChoices: number; retries: Retries; remainingMs: () => number },
  ) {
    this.traceId = options.traceId;
  }

  async *[Symbol.asyncIterator](): AsyncIterator<Piece> {
    let hasBegun = false;
    for (;;) {
      if (this.isCancelled) throw new CancelledError("the call was cancelled", { code: "aborted", requestId: this.requestId });
      const call = (this.call = this.begin());
      call.on("metadata", (metadata: Metadata) => (this.requestId = first(metadata, "x-request-id") || this.requestId));
      try {
        for await (const message of call) {
          hasBegun = true;
          yield this.toPiece(message as Message);
        }
        return;
      } catch (failure) {
        const error = errorOf(failure as ServiceError, this.requestId);
        this.requestId = error.requestId;
        const canRetry = !hasBegun && !this.isCancelled;
        const waitMs = canRetry ? retryWaitMs(this.options.retries, error, this.numRetries, this.options.remainingMs()) : undefined;
        if (waitMs === undefined) throw error;
        await sleep(waitMs);
        this.numRetries += 1;
      } finally {
        call.cancel();
      }
    }
  }

  /** Give up the rest; the server frees what it holds at once. */
  cancel(): void {
    this.isCancelled = true;
    this.call?.cancel();
  }

  /** Wait for the whole answer. */
  async read(): Promise<Reply> {
    const reply = emptyReply(this.options.numChoices, this.traceId);
    for await (const piece of this) add(reply, piece);
    reply.requestId = this.requestId;
    return reply;
  }
}
