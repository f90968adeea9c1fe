/** Safelight's client for pages, over gRPC-Web, which a server speaks at its `--http-port`. */
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { BaseClient, targetsOf } from "./client.js";
import type { ClientOptions } from "./client.js";

export * from "./index.js";

export interface WebClientOptions extends ClientOptions {
  /** Used instead of the global `fetch`. */
  fetch?: typeof globalThis.fetch;
}

/** A client of a server, or of several replicas of one. Nothing is connected before the first call. */
export class Client extends BaseClient {
  /**
   * `targets`: "https://host:port", or "/" for the page's own server. With several replicas, if one fails, the client calls
   * the next one, which continues each generation that was accepted as replicated.
   */
  constructor(targets: string | readonly string[], options: WebClientOptions = {}) {
    super(
      targetsOf(targets).map((target) => {
        if (!/^(https?:\/\/[^/]|\/)/.test(target)) {
          throw new TypeError(`targets: ${JSON.stringify(target)} is neither "https://host:port" nor "/"`);
        }
        return createGrpcWebTransport({ baseUrl: target, fetch: options.fetch });
      }),
      options,
    );
  }
}
