import { status as Status, type Metadata, type ServiceError } from "@grpc/grpc-js";

/** What a call may throw, split by what the caller can do. */
export class HeadraceError extends Error {
  /** The server's stable code, for example "invalid_request"; gRPC's status where the server did not answer. */
  readonly code: string;
  /** The request field it is about; empty where there is none. */
  readonly param: string;
  /** The request's id in the server's logs and traces; empty where it never got one. */
  readonly requestId: string;
  /** Milliseconds after which a retry makes sense; undefined where the server did not say. */
  readonly retryAfterMs: number | undefined;

  constructor(message: string, told: { code: string; param?: string; requestId?: string; retryAfterMs?: number }) {
    super(message);
    this.name = new.target.name;
    this.code = told.code;
    this.param = told.param ?? "";
    this.requestId = told.requestId ?? "";
    this.retryAfterMs = told.retryAfterMs;
  }
}

/** The request can never succeed as sent. */
export class InvalidRequestError extends HeadraceError {}
/** It names a model that is not served. */
export class NotFoundError extends InvalidRequestError {}
/** The server asks for a key, or for another one. */
export class UnauthenticatedError extends HeadraceError {}
/** Too much is open; come back after `retryAfterMs`. */
export class OverloadedError extends HeadraceError {}
/** The call's deadline passed. */
export class DeadlineExceededError extends HeadraceError {}
/** The call was cancelled, here or by an operator. */
export class CancelledError extends HeadraceError {}
/** The server, or a stage of it, cannot be reached. */
export class UnavailableError extends HeadraceError {}
/** This request only failed. */
export class RequestFailedError extends HeadraceError {}

const CLASSES = new Map<Status, typeof HeadraceError>([
  [Status.INVALID_ARGUMENT, InvalidRequestError],
  [Status.OUT_OF_RANGE, InvalidRequestError],
  [Status.FAILED_PRECONDITION, InvalidRequestError],
  [Status.UNIMPLEMENTED, InvalidRequestError],
  [Status.NOT_FOUND, NotFoundError],
  [Status.UNAUTHENTICATED, UnauthenticatedError],
  [Status.PERMISSION_DENIED, UnauthenticatedError],
  [Status.RESOURCE_EXHAUSTED, OverloadedError],
  [Status.DEADLINE_EXCEEDED, DeadlineExceededError],
  [Status.CANCELLED, CancelledError],
  [Status.UNAVAILABLE, UnavailableError],
]);

/** The error of a call that gRPC ended. */
export function errorOf(failure: ServiceError, requestId: string): HeadraceError {
  const code = first(failure.metadata, "headrace-error-code");
  // A message over its size limit has the same status as a full queue, and no retry helps it.
  const isTooLarge = code === "request_too_large" || failure.details?.includes("larger than max");
  const Kind = isTooLarge ? InvalidRequestError : (CLASSES.get(failure.code) ?? RequestFailedError);
  const retryMs = first(failure.metadata, "headrace-retry-after-ms");
  return new Kind(failure.details || Status[failure.code] || "the call failed", {
    code: code || (Status[failure.code] ?? "unknown").toLowerCase(),
    param: first(failure.metadata, "headrace-error-param"),
    requestId: first(failure.metadata, "x-request-id") || requestId,
    ...(retryMs ? { retryAfterMs: Number(retryMs) } : {}),
  });
}

/** The first value of a name, as text; empty where there is none. */
export function first(metadata: Metadata | undefined, name: string): string {
  return String(metadata?.get(name)[0] ?? "");
}
