// One picture of the sheet: the call that develops it, what is seen of it, and what its buttons do.
import { follow } from "./follow.js";
import { CallError, call, errorOf, seconds } from "./grpc-web.js";
import { ENUMS } from "./messages.js";

const MODES = ENUMS["safelight.v1.CachePolicy.Mode"];
const DISPOSITIONS = ENUMS["safelight.v1.CacheResult.Disposition"];
const CANCELLED = "GENERATION_CANCELLED";
const CANCEL_MS = 3_000;  // a cancel may get no connection, since other tabs of the page share the browser's six
const SOURCES = {
  [DISPOSITIONS.DISPOSITION_COALESCED]: "developed together with the same picture",
  [DISPOSITIONS.DISPOSITION_EXACT]: "there already",
  [DISPOSITIONS.DISPOSITION_SIMILAR]: "a similar picture, there already",
  [DISPOSITIONS.DISPOSITION_LATENT]: "begun from a near prompt",
};

/** Lets so many calls run at once and the others wait: over HTTP/1.1 a browser has six connections to a server. */
export class Slots {
  #free;
  #waiting = [];

  constructor(free) {
    this.#free = free;
  }

  /** Resolves when there is one. Where the signal aborts first, it throws. */
  take(signal) {
    if (this.#free > 0) {
      this.#free -= 1;
      return Promise.resolve();
    }
    return new Promise((resolve, reject) => {
      this.#waiting.push(resolve);
      signal.addEventListener("abort", () => {
        const at = this.#waiting.indexOf(resolve);
        if (at >= 0) this.#waiting.splice(at, 1);
        reject(signal.reason);
      });
    });
  }

  release() {
    const next = this.#waiting.shift();
    if (next) next();
    else this.#free += 1;
  }
}

/**
 * `order` is what to develop: prompt, model, seed (BigInt or undefined), steps (or undefined), mode, branch (or undefined).
 * `sheet` is what surrounds it: slots, apiKey(), say(text), pin(seed), branch(order), changed().
 */
export class Picture {
  constructor(order, sheet) {
    this.order = order;
    this.sheet = sheet;
    this.element = document.getElementById("picture").content.cloneNode(true).firstElementChild;
    this.#part("h3").textContent = order.prompt;
    this.#part(".cancel").addEventListener("click", () => this.cancel());
    this.#part(".pin").addEventListener("click", () => sheet.pin(this.seed));
    this.#part(".again").addEventListener("click", () => {
      this.#part(".cancel").hidden = false;
      this.#part(".cancel").focus();
      this.develop();
    });
    this.#part(".scrub input").addEventListener("input", () => this.#show(Number(this.#part(".scrub input").value)));
    this.#part(".branch").addEventListener("click", () => this.#openBranch(true));
    this.#part(".close").addEventListener("click", () => this.#openBranch(false));
    this.#part(".branching").addEventListener("submit", (event) => this.#submitBranch(event));
    this.#part(".branching").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#openBranch(false);
    });
  }

  /** Develops it from the beginning; resolves when it has ended, however that was. */
  async develop() {
    this.#reset();
    const { slots } = this.sheet;
    const { signal } = this.leaving;
    let error = null;
    try {
      await slots.take(signal);
      try {
        await this.#follow(signal);
      } finally {
        slots.release();
      }
    } catch (caught) {
      error = caught;
    }
    this.#end(error);
  }

  /** Stops it; what it has shown until then stays. */
  async cancel() {
    if (this.stopping) return;
    this.stopping = true;
    this.#state("Stops");
    if (!this.generation) {
      this.leaving.abort();
      return;
    }
    const types = ["safelight.v1.CancelGenerationRequest", "safelight.v1.CancelGenerationResponse"];
    const limits = { apiKey: this.sheet.apiKey(), signal: AbortSignal.timeout(CANCEL_MS) };
    try {
      for await (const _ of call("GenerationService", "CancelGeneration", types, { name: this.generation }, limits));
    } catch {
      this.leaving.abort();  // a client that leaves cancels its generation too
    }
  }

  /** Frees what it holds. It is not used afterwards. */
  remove() {
    if (!this.ended) this.cancel();  // else the server would keep its state for who comes back
    this.leaving.abort();
    for (const { url } of this.frames) URL.revokeObjectURL(url);
    this.frames = [];
    this.element.remove();
  }

  #part(selector) {
    return this.element.querySelector(selector);
  }

  #reset() {
    for (const { url } of this.frames ?? []) URL.revokeObjectURL(url);
    this.leaving = new AbortController();
    this.frames = [];
    this.pieces = [];
    this.ended = this.stopping = false;
    this.generation = this.finished = undefined;
    this.seed = this.order.seed;
    this.step = this.numSteps = this.stepsSaved = this.computeSeconds = 0;
    this.#part("dl").replaceChildren();
    for (const selector of [".error", ".pin", ".branch", ".branching", ".scrub", "img"]) this.#part(selector).hidden = true;
    for (const selector of [".cancel", "progress"]) this.#part(selector).hidden = false;
    this.#part("progress").value = 0;
    this.#state("Waits to be sent");
  }

  async #follow(signal) {
    this.sentAt = performance.now();
    const lost = () => this.#state("The connection was lost; it is resumed");
    for await (const event of follow(this.#request(), { apiKey: this.sheet.apiKey, signal, lost })) {
      if (event.accepted) this.#accepted(event.generation, event.accepted);
      else if (event.queued) this.#state(`Waits: ${event.queued.position} ahead of it`);
      else if (event.progress) this.#progress(event.progress);
      else if (event.preview) this.#preview(event.preview);
      else if (event.artifact_chunk) this.#piece(event.artifact_chunk);
      else if (event.output_finished) this.step = event.output_finished.step;
      else if (event.finished) this.#finished(event.finished);
    }
  }

  #request() {
    const { prompt, model, seed, steps, mode, branch } = this.order;
    return {
      spec: { model, prompt, num_inference_steps: steps, outputs: [{ seed }] },
      scheduling: { priority: ENUMS["safelight.v1.Priority"].PRIORITY_INTERACTIVE },
      // Work stops at once when the connection is lost; follow.js comes back within the server's default grace.
      disconnect: { action: ENUMS["safelight.v1.DisconnectPolicy.Action"].ACTION_CANCEL },
      cache: { mode: MODES[mode] },
      branch: branch && { generation: branch.generation, output_index: 0, step: branch.step },
    };
  }

  #accepted(generation, accepted) {
    this.generation = generation;
    this.seed = accepted.spec.outputs[0].seed;
    this.numSteps = accepted.spec.num_inference_steps;
    this.#fact("Seed", String(this.seed));
    this.#part(".pin").hidden = false;
    this.#part(".pin").setAttribute("aria-label", `Pin seed ${this.seed}`);
    for (const { message } of accepted.warnings) this.#fact("Note", message);
    this.#state("Accepted");
  }

  #progress({ step, num_steps: steps }) {
    this.step = step;
    this.#part("progress").value = step / steps;
    this.#state(`Step ${step} of ${steps}`);
  }

  #preview(preview) {
    if (preview.step <= (this.frames.at(-1)?.step ?? 0)) return;  // resumed from a step before it
    if (!this.frames.length) this.#fact("First preview", duration((performance.now() - this.sentAt) / 1000));
    this.#frame(preview.step, preview.data, preview.media_type);
  }

  #piece({ data, media_type: kind }) {
    this.pieces.push(data);
    this.kind = kind;
  }

  #frame(step, data, kind) {
    this.frames.push({ step, url: URL.createObjectURL(new Blob([data].flat(), { type: kind })) });
    this.#show(this.frames.length - 1);
  }

  #finished(finished) {
    this.finished = finished;
    this.computeSeconds = seconds(finished.usage?.compute_time);
    const [result] = finished.cache_results;
    this.stepsSaved = result?.num_steps_skipped ?? 0;
    if (result?.disposition === DISPOSITIONS.DISPOSITION_BRANCHED) this.#fact("Branched", `after step ${this.stepsSaved}`);
    else if (SOURCES[result?.disposition]) this.#fact("Origin", SOURCES[result.disposition]);
    if (finished.status && finished.status.code !== 0) return;
    if (this.pieces.length) this.#frame(this.numSteps, this.pieces, this.kind);
    this.pieces = [];
  }

  #end(error) {
    this.ended = true;
    const failure = error ?? errorOf(this.finished?.status);
    const cancelled = failure?.name === "AbortError" || failure?.reason === CANCELLED;
    if (this.finished) {
      this.#fact("Steps saved", this.numSteps ? `${this.stepsSaved} of ${this.numSteps}` : String(this.stepsSaved));
      this.#fact("Compute", duration(this.computeSeconds));
    }
    const hadFocus = document.activeElement === this.#part(".cancel");
    for (const selector of [".cancel", "progress"]) this.#part(selector).hidden = true;
    if (!failure) this.#state("Finished");
    else if (cancelled) this.#state(this.step ? `Cancelled after step ${this.step} of ${this.numSteps}` : "Cancelled");
    else this.#fail(failure);
    this.#offerSteps();
    if (hadFocus) [".again", ".branch", ".pin"].map((one) => this.#part(one)).find((one) => one.offsetParent)?.focus();
    this.sheet.say(`${this.#part(".state").textContent}: ${this.order.prompt}`);
    this.sheet.changed();
  }

  #fail(failure) {
    if (!(failure instanceof CallError)) console.error(failure);
    this.#state("Failed");
    const retry = failure.retryAfter === undefined ? "" : ` Try again in ${Math.max(1, Math.ceil(failure.retryAfter))} s.`;
    const reason = failure.reason ? ` (${failure.reason})` : "";
    const list = this.#part(".error ul");
    list.replaceChildren(...(failure.violations ?? []).map(({ field, description }) => element("li", `${field}: ${description}`)));
    list.hidden = !list.childElementCount;
    this.#part(".error p").textContent = `${failure.message}${reason}.${retry}`.replace(/\.(?= \()|\.(?=\.)/g, "");
    this.#part(".error").hidden = false;
  }

  #offerSteps() {
    const range = this.#part(".scrub input");
    this.#part(".scrub").hidden = this.frames.length < 2;
    range.max = Math.max(0, this.frames.length - 1);
    this.#part(".branch").hidden = this.frames.length < 2 || !this.finished;
    if (this.frames.length) this.#show(this.frames.length - 1);
  }

  #show(at) {
    const { step, url } = this.frames[at];
    const image = this.#part("img");
    const last = step === this.numSteps;
    const name = last ? "Finished picture" : `Step ${step} of ${this.numSteps}`;
    image.src = url;
    image.alt = `${name}: ${this.order.prompt}`;
    image.hidden = false;
    if (!this.ended) return;
    const range = this.#part(".scrub input");
    range.value = at;
    range.setAttribute("aria-valuetext", name);
    this.shownStep = last ? this.frames[Math.max(0, at - 1)].step : step;
    this.#part(".branch").textContent = `Branch from step ${this.shownStep}`;
    if (this.frames.length > 1 && this.#part(".error").hidden && !this.#part(".state").textContent.startsWith("Cancelled")) {
      this.#state(last ? "Finished" : `Step ${step} of ${this.numSteps}`);
    }
  }

  #openBranch(open) {
    const form = this.#part(".branching");
    form.hidden = !open;
    this.#part(".branch").setAttribute("aria-expanded", String(open));
    if (open && !form.querySelector("textarea").value) form.querySelector("textarea").value = this.order.prompt;
    (open ? form.querySelector("textarea") : this.#part(".branch")).focus();
  }

  #submitBranch(event) {
    event.preventDefault();
    const prompt = this.#part(".branching textarea").value.trim();
    if (!prompt) return;
    this.#openBranch(false);
    const branch = { generation: this.generation, step: this.shownStep };
    this.sheet.branch({ ...this.order, prompt, seed: this.seed, steps: this.numSteps, mode: "MODE_DEFAULT", branch });
  }

  #fact(name, value) {
    this.#part("dl").append(element("dt", name), element("dd", value));
  }

  #state(text) {
    this.#part(".state").textContent = text;
  }
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

/** Seconds for people. */
export function duration(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`;
}
