import { Code, createClient } from "@connectrpc/connect";
import type { CallOptions, Transport } from "@connectrpc/connect";
import { SafelightError } from "./error.js";
import type { Event } from "./event.js";
import type { Received } from "./received.js";
import { GenerationService } from "./stubs/safelight/v1/generation_pb.js";
import type { GenerateRequest, GenerationEvent } from "./stubs/safelight/v1/generation_pb.js";

const FIRST_PATIENCE_MS = 5_000; // while no event was received, so that a wrong address fails soon
const FIRST_WAIT_MS = 100;
const MAX_WAIT_MS = 2_000;
const MAX_TIMEOUT_MS = 2 ** 31 - 1; // the longest that setTimeout supports
const DRAINING = "DRAINING"; // reason of a server that accepts no new requests

/** After these reasons the same generation can be resumed; "" is a lost connection. */
const RESUMABLE = new Set(["", "WATCHER_STALLED", "MOVED", "OTHER_MODEL"]);
/** After these reasons the same call can succeed at another replica. */
const ELSEWHERE = new Set([DRAINING, "UNAVAILABLE"]);

/** By what a caller can end a call. */
export interface Limits {
  /** Ends the call and notifies the server. */
  signal?: AbortSignal;
  /** The deadline, in milliseconds from now, over all connections. It is also sent to the server. */
  timeoutMs?: number;
}

/** The servers of a client, and how it connects to them. */
export class Servers {
  /** Index of the server that new calls use. */
  at = 0;
  readonly #transports: Transport[];

  /** `reconnect` makes a new connection to a server; absent in pages, where the browser owns the connections. */
  constructor(
    transports: readonly Transport[],
    readonly headers: Record<string, string>,
    readonly patienceMs: number,
    readonly retries: number,
    readonly reconnect?: (at: number) => Transport,
  ) {
    this.#transports = [...transports];
  }

  get size(): number {
    return this.#transports.length;
  }

  transport(at: number = this.at): Transport {
    return this.#transports[at]!;
  }

  /**
   * Makes new calls use a new connection, which a load balancer may lead to another server; open streams stay
   * on the old one. Generations that are refused at the same time replace a connection only once.
   */
  giveUp(at: number, transport: Transport): void {
    if (this.reconnect && this.#transports[at] === transport) this.#transports[at] = this.reconnect(at);
  }

  /**
   * The server to use after one that failed. Generations that lose a server at the same time move to the same next one,
   * and only the first of them changes the server of new calls.
   */
  next(failed: number): number {
    const after = (failed + 1) % this.size;
    if (this.at === failed) this.at = after;
    return after;
  }

  /** Makes a call at the current server; if that cannot be reached, at the next ones in turn. */
  async ask<Response>(limits: Limits, call: (transport: Transport, options: CallOptions) => Promise<Response>): Promise<Response> {
    const deadline = deadlineOf(limits);
    for (let left = this.size - 1; ; left--) {
      const at = this.at;
      try {
        return await call(this.transport(at), { ...this.options(deadline), signal: limits.signal });
      } catch (error) {
        const failure = SafelightError.from(error, limits.signal);
        if (failure.code !== Code.Unavailable || left === 0) throw failure;
        this.next(at);
      }
    }
  }

  options(deadline: number): CallOptions {
    return { headers: this.headers, timeoutMs: Number.isFinite(deadline) ? remaining(deadline) : undefined };
  }
}

/** Follows a generation over as many connections as necessary. Without a request it only watches. */
export async function* develop(
  servers: Servers,
  request: GenerateRequest | undefined,
  received: Received,
  limits: Limits,
): AsyncGenerator<Event, void, void> {
  const deadline = deadlineOf(limits);
  let [tries, refusals, drains, numEvents] = [0, 0, 0, 0];
  let giveUpAt = performance.now() + Math.min(FIRST_PATIENCE_MS, servers.patienceMs);
  for (;;) {
    let failure: SafelightError;
    const transport = servers.transport(received.at);
    try {
      yield* follow(servers, transport, request, received, deadline, limits.signal);
      return;
    } catch (error) {
      if (!(error instanceof SafelightError)) throw error;
      failure = error;
    }
    if (received.numEvents > numEvents) {
      [tries, refusals, drains, numEvents] = [0, 0, 0, received.numEvents];
      giveUpAt = performance.now() + servers.patienceMs;
    }
    const goesOnElsewhere = received.replicated || !received.name;
    const movable = servers.size > 1 && goesOnElsewhere;
    const draining = failure.reason === DRAINING;
    if (draining) {
      servers.giveUp(received.at, transport);
      if (drains === 0) giveUpAt = performance.now() + servers.patienceMs;
      drains++;
    }
    let waitMs: number;
    if (isResumable(failure, movable)) {
      waitMs = scaled(Math.min(MAX_WAIT_MS, FIRST_WAIT_MS * 2 ** tries), 0.5, 1);
      tries++;
    } else if (draining && goesOnElsewhere) {
      waitMs = scaled(failure.retryAfterMs || FIRST_WAIT_MS, 1, 1.2);
    } else if (isRefusedForNow(failure, received) && refusals < servers.retries) {
      if (refusals === 0) giveUpAt = performance.now() + servers.patienceMs;
      waitMs = scaled(failure.retryAfterMs!, 1, 1.2); // clients must not all retry at the same moment
      refusals++;
    } else {
      throw failure;
    }
    const again = performance.now() + waitMs;
    if (again > giveUpAt || (failure.retryAfterMs !== undefined && again > deadline)) throw failure;
    if (movable && failure.reason !== "WATCHER_STALLED") received.at = servers.next(received.at);
    await sleep(Math.min(waitMs, deadline - performance.now()), limits.signal);
  }
}

/** Receives one connection to its end. */
async function* follow(
  servers: Servers,
  transport: Transport,
  request: GenerateRequest | undefined,
  received: Received,
  deadline: number,
  signal: AbortSignal | undefined,
): AsyncGenerator<Event, void, void> {
  const stream = new AbortController();
  const abort = () => stream.abort(signal?.reason);
  signal?.addEventListener("abort", abort);
  if (signal?.aborted) abort();
  try {
    const options = { ...servers.options(deadline), signal: stream.signal };
    const events = open(transport, request, received, options)[Symbol.asyncIterator]();
    for (;;) {
      const next = await events.next().catch((error: unknown) => {
        throw SafelightError.from(error, signal);
      });
      if (next.done) break;
      const event = next.value.event && received.take(next.value.event);
      if (event) yield event;
    }
  } finally {
    signal?.removeEventListener("abort", abort);
    stream.abort(); // tells the server that nobody watches
  }
  if (!received.finished) {
    const name = received.name || "the generation";
    throw new SafelightError(`the stream of ${name} ended before the generation had finished`, Code.Unavailable);
  }
}

/** Starts the generation, or watches it if it has a name already. */
function open(
  transport: Transport,
  request: GenerateRequest | undefined,
  received: Received,
  options: CallOptions,
): AsyncIterable<{ event?: GenerationEvent }> {
  const service = createClient(GenerationService, transport);
  return request && !received.name
    ? service.generate(request, options)
    : service.watchGeneration(received.watch(), options);
}

/** Whether the same generation can be resumed. `movable`: another server can continue it. */
function isResumable(failure: SafelightError, movable: boolean): boolean {
  const known = RESUMABLE.has(failure.reason) || (movable && ELSEWHERE.has(failure.reason));
  return failure.code === Code.Unavailable && known;
}

/** Whether the server has said when to retry, and nothing has started. */
function isRefusedForNow(failure: SafelightError, received: Received): boolean {
  return failure.retryAfterMs !== undefined && (failure.code === Code.ResourceExhausted || !received.name);
}

function deadlineOf(limits: Limits): number {
  return performance.now() + (limits.timeoutMs ?? Infinity);
}

function remaining(deadline: number): number {
  const ms = deadline - performance.now();
  if (ms <= 0) throw new SafelightError("the deadline has passed", Code.DeadlineExceeded);
  return Math.min(Math.ceil(ms), MAX_TIMEOUT_MS);
}

function scaled(ms: number, least: number, most: number): number {
  return ms * (least + (most - least) * Math.random());
}

/** Waits, unless the caller's signal ends it. */
function sleep(ms: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(SafelightError.aborted(signal));
    const end = () => {
      clearTimeout(timer);
      reject(SafelightError.aborted(signal!));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", end);
      resolve();
    }, ms);
    signal?.addEventListener("abort", end, { once: true });
  });
}
