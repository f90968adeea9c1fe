import { create, toBinary } from "@bufbuild/protobuf";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { Code, createClient } from "@connectrpc/connect";
import type { CallOptions, Transport } from "@connectrpc/connect";
import { develop, Servers } from "./develop.js";
import type { Limits } from "./develop.js";
import { SafelightError } from "./error.js";
import type { Event, Picture } from "./event.js";
import { Received } from "./received.js";
import { generateRequest, previewPolicy } from "./request.js";
import type { GenerateOptions, PreviewOptions } from "./request.js";
import { GenerateRequestSchema, GenerationService } from "./stubs/safelight/v1/generation_pb.js";
import type { Generation } from "./stubs/safelight/v1/generation_pb.js";
import { ModelService } from "./stubs/safelight/v1/models_pb.js";
import type { Model } from "./stubs/safelight/v1/models_pb.js";

/** Options that every client has. */
export interface ClientOptions {
  /** Sent as a bearer token. */
  apiKey?: string;
  /** How long to try to resume a lost generation after its last event; at most 5 s before the first. Default: 60 s. */
  patienceMs?: number;
  /** How often a request is sent again if its refusal says after which time to retry. Default: 3. */
  retries?: number;
}

/** The events of a generation. They can be read once: by `for await`, or by one of the shorthand methods. */
export class GenerationStream implements AsyncIterable<Event> {
  readonly #events: AsyncGenerator<Event, void, void>;

  constructor(events: AsyncGenerator<Event, void, void>) {
    this.#events = events;
  }

  /** Leaving the loop ends the stream. The server then suspends the generation, and cancels it after its grace period. */
  [Symbol.asyncIterator](): AsyncGenerator<Event, void, void> {
    return this.#events;
  }

  /** Waits for all pictures, in the order of the outputs. */
  async pictures(): Promise<Picture[]> {
    const pictures: Picture[] = [];
    for await (const event of this.#events) if (event.type === "picture") pictures[event.outputIndex] = event;
    return pictures;
  }

  /** Waits for all pictures and returns the first. */
  async picture(): Promise<Picture> {
    const [picture] = await this.pictures();
    if (!picture) throw new SafelightError("the generation has no picture", Code.DataLoss);
    return picture;
  }

  /** As `image`, as a `Blob` of the picture's media type. */
  async blob(): Promise<Blob> {
    const { data, mediaType } = await this.picture();
    return new Blob([data], { type: mediaType });
  }
}

/** The common part of the clients for Node and for browsers. */
export class BaseClient {
  readonly #servers: Servers;

  /** `reconnect` makes a new connection to a server by its index. */
  protected constructor(transports: readonly Transport[], options: ClientOptions, reconnect?: (at: number) => Transport) {
    const apiKey = options.apiKey?.trim() ?? "";
    if (!/^[!-~]*$/.test(apiKey)) throw new TypeError("apiKey: it must be visible ASCII characters");
    const headers: Record<string, string> = apiKey ? { authorization: `Bearer ${apiKey}` } : {};
    this.#servers = new Servers(transports, headers, options.patienceMs ?? 60_000, options.retries ?? 3, reconnect);
  }

  /** The connection to the current server, for stubs of other services. It is replaced after the server has drained. */
  get transport(): Transport {
    return this.#servers.transport();
  }

  /** Starts a generation and returns its events. Nothing is sent before the first one is read. */
  generate(options: GenerateOptions): GenerationStream {
    return this.develop(generateRequest(options), options);
  }

  /**
   * As `generate`, but takes a whole GenerateRequest. Without a request id it gets one, so that it can be sent again
   * without running twice.
   */
  develop(message: MessageInitShape<typeof GenerateRequestSchema>, limits: Limits = {}): GenerationStream {
    const request = create(GenerateRequestSchema, message);
    const sent = { ...request, requestId: request.requestId || uuid() };
    toBinary(GenerateRequestSchema, sent); // throws if a value does not fit its field
    const received = new Received(this.#servers.at, "", sent.preview);
    return new GenerationStream(develop(this.#servers, sent, received, limits));
  }

  /** Watches an existing generation, "generations/ID", from its first event on. */
  watch(generation: string, options: Limits & { preview?: PreviewOptions | false } = {}): GenerationStream {
    const received = new Received(this.#servers.at, generation, previewPolicy(options.preview));
    return new GenerationStream(develop(this.#servers, undefined, received, options));
  }

  /** Returns the present state of a generation. */
  async get(generation: string, limits: Limits = {}): Promise<Generation> {
    const response = await this.#servers.ask(limits, (transport, options) =>
      createClient(GenerationService, transport).getGeneration({ name: generation }, options),
    );
    return response.generation!;
  }

  /** Stops a generation and returns its final state, with the step that each output had reached. */
  async cancel(generation: string, limits: Limits = {}): Promise<Generation> {
    const response = await this.#servers.ask(limits, (transport, options) =>
      createClient(GenerationService, transport).cancelGeneration({ name: generation }, options),
    );
    return response.generation!;
  }

  /** Makes a call at the current server; if that cannot be reached, at the next ones in turn. */
  protected ask<Response>(limits: Limits, call: (transport: Transport, options: CallOptions) => Promise<Response>): Promise<Response> {
    return this.#servers.ask(limits, call);
  }

  /** All models of the server. */
  async models(limits: Limits = {}): Promise<Model[]> {
    const models: Model[] = [];
    let pageToken = "";
    do {
      const page = await this.#servers.ask(limits, (transport, options) =>
        createClient(ModelService, transport).listModels({ pageToken }, options),
      );
      models.push(...page.models);
      pageToken = page.nextPageToken;
    } while (pageToken);
    return models;
  }
}

/** The targets of a client, trimmed. Several are given as an array, or separated by commas. */
export function targetsOf(targets: string | readonly string[]): string[] {
  const all = (typeof targets === "string" ? targets.split(",") : targets).map((target) => target.trim());
  if (all.length === 0 || all.includes("")) throw new TypeError(`targets: ${JSON.stringify(targets)} names no server`);
  return all;
}

/** A random UUID. Pages without TLS have no `crypto.randomUUID`. */
function uuid(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6]! & 0x0f) | 0x40;
  bytes[8] = (bytes[8]! & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}
