// A generation over as many connections as it takes: a stream that is lost is resumed where it stopped.
import { CallError, call } from "./grpc-web.js";

const PATIENCE_MS = 30_000;  // after the last event; as long as the state is kept for who comes back
const FIRST_WAIT_MS = 100;
const MAX_WAIT_MS = 2_000;
const RESUMABLE = new Set(["WATCHER_STALLED", "MOVED"]);
const UNKNOWN = "GENERATION_NOT_FOUND";
const FORGOTTEN = "The server no longer knows this picture: it was started anew, or too much time has passed.";
const GENERATE = ["Generate", ["safelight.v1.GenerateRequest", "safelight.v1.GenerateResponse"]];
const WATCH = ["WatchGeneration", ["safelight.v1.WatchGenerationRequest", "safelight.v1.WatchGenerationResponse"]];

/**
 * Yields the events of a generation, each piece of its picture once. `lost` is called where a connection is lost and will
 * be tried again. Throws a CallError where the server refuses or ends it, or where nothing came for `PATIENCE_MS`.
 */
export async function* follow(request, { apiKey, signal, lost }) {
  let name = "", sequence = 0n, numBytes = 0n, tries = 0, lastAt = performance.now(), done = false;
  while (!done) {
    const watch = { name, after_sequence: sequence, artifact_offsets: [{ output_index: 0, offset: numBytes }] };
    const [[method, types], message] = name ? [WATCH, watch] : [GENERATE, request];
    try {
      for await (const { event } of call("GenerationService", method, types, message, { apiKey: apiKey(), signal })) {
        name = event.generation;
        tries = 0;
        lastAt = performance.now();
        if (event.sequence > sequence) sequence = event.sequence;
        if (event.artifact_chunk) {
          if (event.artifact_chunk.offset !== numBytes) continue;
          numBytes += BigInt(event.artifact_chunk.data.length);
        }
        if (event.finished) done = true;
        yield event;
      }
      if (!done) throw new CallError("The stream ended before the picture had.", { reason: "UNAVAILABLE", lost: true });
    } catch (error) {
      if (done) return;  // all has come
      if (name && error.reason === UNKNOWN) throw new CallError(FORGOTTEN, { reason: UNKNOWN });
      const resumable = name && (error.lost || RESUMABLE.has(error.reason));
      const waitMs = Math.min(MAX_WAIT_MS, FIRST_WAIT_MS * 2 ** tries) * (0.5 + Math.random() / 2);
      if (!resumable || performance.now() + waitMs > lastAt + PATIENCE_MS) throw error;
      tries += 1;
      lost();
      await sleep(waitMs, signal);
    }
  }
}

function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const end = () => { clearTimeout(timer); reject(signal.reason); };
    const timer = setTimeout(() => { signal.removeEventListener("abort", end); resolve(); }, ms);
    if (signal.aborted) end();
    else signal.addEventListener("abort", end, { once: true });
  });
}
