// Calls of the server by gRPC-Web, in its binary form: a request is one message in a frame (a byte of flags, four bytes
// of length); an answer has a frame for each message, then one with the status.
import { decode, encode } from "./protobuf.js";

const HEAD_BYTES = 5;
const TRAILERS = 0x80;

/**
 * Why a call has failed, in words. `reason` is the server's; `retryAfter` the seconds after which a retry makes sense;
 * `lost` says that the connection failed, which tells nothing of the generation.
 */
export class CallError extends Error {
  constructor(message, { reason = "", retryAfter, violations = [], lost = false } = {}) {
    super(message);
    this.reason = reason;
    this.retryAfter = retryAfter;
    this.violations = violations;
    this.lost = lost;
  }
}

/** Yields the messages of an answer as they come. Throws a CallError where the call ends with another status than OK. */
export async function* call(service, method, types, message, { apiKey, signal } = {}) {
  const headers = { "content-type": "application/grpc-web+proto", "x-grpc-web": "1" };
  if (apiKey) headers.authorization = `Bearer ${apiKey}`;
  const options = { method: "POST", headers, body: frame(encode(types[0], message)), signal, credentials: "omit", cache: "no-store" };
  let response;
  try {
    response = await fetch(`/safelight.v1.${service}/${method}`, options);
  } catch (error) {
    throw lost(error, "The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  let ended = false;
  for await (const [flags, data] of frames(response.body)) {
    if (flags === TRAILERS) {
      checkStatus(data);
      ended = true;
    } else {
      yield decode(types[1], data);
    }
  }
  if (!ended) throw lost(null, "The connection to the server was lost.");
}

/** The error that a google.rpc.Status stands for; null where that is OK. */
export function errorOf(status) {
  if (!status || status.code === 0) return null;
  const details = { reason: "", violations: [] };
  for (const { type_url: url, value } of status.details) {
    const name = url.slice(url.lastIndexOf("/") + 1);
    if (name === "google.rpc.ErrorInfo") details.reason = decode(name, value).reason;
    else if (name === "google.rpc.RetryInfo") details.retryAfter = seconds(decode(name, value).retry_delay);
    else if (name === "google.rpc.BadRequest") details.violations = decode(name, value).field_violations;
  }
  return new CallError(status.message || `The server says status ${status.code}.`, details);
}

/** A google.protobuf.Duration in seconds; 0 where it is absent. */
export function seconds(duration) {
  return duration ? Number(duration.seconds) + duration.nanos / 1e9 : 0;
}

function frame(message) {
  const framed = new Uint8Array(HEAD_BYTES + message.length);
  new DataView(framed.buffer).setUint32(1, message.length);
  framed.set(message, HEAD_BYTES);
  return framed;
}

async function* frames(stream) {
  const reader = stream.getReader();
  let rest = new Uint8Array(0);
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const data = new Uint8Array(rest.length + value.length);
      data.set(rest);
      data.set(value, rest.length);
      let at = 0;
      while (data.length - at >= HEAD_BYTES) {
        const length = new DataView(data.buffer, at).getUint32(1);
        if (data.length - at - HEAD_BYTES < length) break;
        yield [data[at], data.slice(at + HEAD_BYTES, at + HEAD_BYTES + length)];
        at += HEAD_BYTES + length;
      }
      rest = data.slice(at);
    }
  } catch (error) {
    throw lost(error, "The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});  // where its reader left early, the server is told
  }
}

function checkStatus(data) {
  const lines = new TextDecoder().decode(data).split("\r\n").filter(Boolean);
  const trailers = Object.fromEntries(lines.map((line) => {
    const colon = line.indexOf(":");
    return [line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim()];
  }));
  const code = Number(trailers["grpc-status"] ?? 2);
  if (code === 0) return;
  const details = trailers["grpc-status-details-bin"];
  throw errorOf(details
    ? decode("google.rpc.Status", Uint8Array.from(atob(details), (one) => one.charCodeAt(0)))
    : { code, message: decodeURIComponent(trailers["grpc-message"] ?? ""), details: [] });
}

async function refusal(response) {
  const retryAfter = Number(response.headers.get("retry-after")) || undefined;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // an answer of something between the page and the server
  }
  return new CallError(error.message ?? `The server answered with HTTP status ${response.status}.`, { reason: error.code ?? `HTTP_${response.status}`, retryAfter });
}

function lost(error, message) {
  if (error instanceof CallError || error?.name === "AbortError") return error;
  return new CallError(message, { reason: "UNAVAILABLE", lost: true });
}
