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

/** What every client can be told. */
export interface ClientOptions {
  /** Sent as a bearer token. */
  apiKey?: string;
  /** How long a lost generation is asked for again since its last event; at most 5 s before the first. Default: 60 s. */
  patienceMs?: number;
  /** How often a request is sent again that was refused with the time after which to retry. Default: 3. */
  retries?: number;
}

/** The events of a generation, to be read once: by `for await`, or by one of the shorthands. */
export class GenerationStream implements AsyncIterable<Event> {
  readonly #events: AsyncGenerator<Event, void, void>;

  constructor(events: AsyncGenerator<Event, void, void>) {
    this.#events = events;
  }

  /** Leaving the loop ends the stream. The server suspends the generation, and cancels it after its grace. */
  [Symbol.asyncIterator](): AsyncGenerator<Event, void, void> {
    return this.#events;
  }

  /** All pictures, in the order of the outputs, when the generation has finished. */
  async pictures(): Promise<Picture[]> {
    const pictures: Picture[] = [];
    for await (const event of this.#events) if (event.type === "picture") pictures[event.outputIndex] = event;
    return pictures;
  }

  /** The first picture, when the generation has finished. */
  async picture(): Promise<Picture> {
    const [picture] = await this.pictures();
    if (!picture) throw new SafelightError("the generation has no picture", Code.DataLoss);
    return picture;
  }

  /** The first picture as a `Blob` of its media type. */
  async blob(): Promise<Blob> {
    const { data, mediaType } = await this.picture();
    return new Blob([data], { type: mediaType });
  }
}

/** What the clients for Node and for browsers have in common. */
export class BaseClient {
  readonly #servers: Servers;

  /** `reconnect` makes a new connection to a server by its index. */
  protected constructor(transports: readonly Transport[], options: ClientOptions, reconnect?: (at: number) => Transport) {
    const apiKey = options.apiKey?.trim() ?? "";
    if (!/^[!-~]*$/.test(apiKey)) throw new TypeError("apiKey: it must be visible ASCII characters");
    const headers: Record<string, string> = apiKey ? { authorization: `Bearer ${apiKey}` } : {};
    this.#servers = new Servers(transports, headers, options.patienceMs ?? 60_000, options.retries ?? 3, reconnect);
  }

  /** The connection to the current server, for stubs of other services; another one after a server has drained. */
  get transport(): Transport {
    return this.#servers.transport();
  }

  /** Starts a generation when it is first read, and watches it. */
  generate(options: GenerateOptions): GenerationStream {
    return this.develop(generateRequest(options), options);
  }

  /**
   * As `generate`, of a whole message of the contract. Without a request id it gets one, so that it can be sent again
   * without running twice.
   */
  develop(message: MessageInitShape<typeof GenerateRequestSchema>, limits: Limits = {}): GenerationStream {
    const request = create(GenerateRequestSchema, message);
    const sent = { ...request, requestId: request.requestId || uuid() };
    toBinary(GenerateRequestSchema, sent); // a value that does not fit its field is an error here
    const received = new Received(this.#servers.at, "", sent.preview);
    return new GenerationStream(develop(this.#servers, sent, received, limits));
  }

  /** Watches a generation that exists, "generations/ID", from its first event on. */
  watch(generation: string, options: Limits & { preview?: PreviewOptions | false } = {}): GenerationStream {
    const received = new Received(this.#servers.at, generation, previewPolicy(options.preview));
    return new GenerationStream(develop(this.#servers, undefined, received, options));
  }

  /** What is known of a generation. */
  async get(generation: string, limits: Limits = {}): Promise<Generation> {
    const response = await this.#servers.ask(limits, (transport, options) =>
      createClient(GenerationService, transport).getGeneration({ name: generation }, options),
    );
    return response.generation!;
  }

  /** Stops a generation and returns it as it ended, with the step that each output had reached. */
  async cancel(generation: string, limits: Limits = {}): Promise<Generation> {
    const response = await this.#servers.ask(limits, (transport, options) =>
      createClient(GenerationService, transport).cancelGeneration({ name: generation }, options),
    );
    return response.generation!;
  }

  /** Makes a call at the current server, and at each next one while one cannot be reached. */
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

/** The targets of a client, each trimmed. Several are an array, or separated by commas. */
export function targetsOf(targets: string | readonly string[]): string[] {
  const all = (typeof targets === "string" ? targets.split(",") : targets).map((target) => target.trim());
  if (all.length === 0 || all.includes("")) throw new TypeError(`targets: ${JSON.stringify(targets)} names no server`);
  return all;
}

/** A random UUID; `crypto.randomUUID` is missing in pages without TLS. */
function uuid(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6]! & 0x0f) | 0x40;
  bytes[8] = (bytes[8]! & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}
