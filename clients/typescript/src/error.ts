import { Code, ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./stubs/google/rpc/error_details_pb.js";

/** Codes by which a transport reports a connection that was lost or could not be made. */
const LOST = new Set([
  Code.Aborted,
  Code.Canceled,
  Code.DataLoss,
  Code.Internal,
  Code.ResourceExhausted,
  Code.Unavailable,
  Code.Unknown,
]);

/** Says why the server refused a call, why a generation failed, or that no server could be reached. */
export class SafelightError extends Error {
  override readonly name = "SafelightError";
  /** The gRPC status code. */
  readonly code: Code;
  /** A stable name for programs, such as "QUEUE_FULL"; empty if the server sent none. */
  readonly reason: string = "";
  /** What to change in an invalid request: a description by the path of each field. */
  readonly fieldViolations: Readonly<Record<string, string>> = {};
  /** Milliseconds after which to retry; undefined if the server sent no time. */
  readonly retryAfterMs: number | undefined;

  constructor(message: string, code: Code, cause?: unknown) {
    super(message, { cause });
    this.code = code;
    if (!(cause instanceof ConnectError)) return;
    this.reason = cause.findDetails(ErrorInfoSchema)[0]?.reason ?? "";
    const violations = cause.findDetails(BadRequestSchema).flatMap((detail) => detail.fieldViolations);
    this.fieldViolations = Object.fromEntries(violations.map((one) => [one.field, one.description]));
    const delay = cause.findDetails(RetryInfoSchema)[0]?.retryDelay;
    if (delay) this.retryAfterMs = Number(delay.seconds) * 1000 + delay.nanos / 1e6;
  }

  /** The error of a failed call. `signal`: the caller's, which may have ended the call. */
  static from(error: unknown, signal?: AbortSignal): SafelightError {
    if (error instanceof SafelightError) return error;
    const failure = ConnectError.from(error);
    const fromServer = failure.metadata.has("grpc-status");
    if (signal?.aborted && !fromServer) return SafelightError.aborted(signal);
    const code = fromServer ? codeOfServer(failure) : codeOfTransport(failure);
    return new SafelightError(failure.rawMessage, code, failure);
  }

  /** The error of a call that the caller's signal has ended. */
  static aborted(signal: AbortSignal): SafelightError {
    const timedOut = signal.reason instanceof Error && signal.reason.name === "TimeoutError";
    return timedOut
      ? new SafelightError("the caller's signal timed out", Code.DeadlineExceeded, signal.reason)
      : new SafelightError("the caller aborted the call", Code.Canceled, signal.reason);
  }
}

/** The code of a status. A server that stops sends Canceled without a reason; that counts as a lost connection. */
function codeOfServer(failure: ConnectError): Code {
  const bare = failure.findDetails(ErrorInfoSchema).length === 0;
  return failure.code === Code.Canceled && bare ? Code.Unavailable : failure.code;
}

/** The code of an error that is not a status of the server. */
function codeOfTransport(failure: ConnectError): Code {
  if (failure.rawMessage === "HTTP 413") return Code.ResourceExhausted;
  if (/ larger than configured readMaxBytes /.test(failure.rawMessage)) return failure.code;
  const answered = failure.rawMessage.startsWith("HTTP "); // the answer of something that does not speak gRPC-Web
  return LOST.has(failure.code) && !answered ? Code.Unavailable : failure.code;
}
