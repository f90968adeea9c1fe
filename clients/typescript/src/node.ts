/** Safelight's client for Node, over gRPC. */
import { createHash } from "node:crypto";
import type { SecureContextOptions } from "node:tls";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { createClient } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import { BaseClient, targetsOf } from "./client.js";
import type { ClientOptions } from "./client.js";
import type { Limits } from "./develop.js";
import { ImageService } from "./stubs/safelight/v1/images_pb.js";
import type { Image, UploadImageRequestSchema } from "./stubs/safelight/v1/images_pb.js";

export * from "./index.js";
export type { Image } from "./stubs/safelight/v1/images_pb.js";

const PIECE_BYTES = 32 << 10; // the most that a server accepts in one message

/** How the server's certificate is checked, and this client's own certificate. */
export interface TlsOptions extends Pick<SecureContextOptions, "ca" | "cert" | "key"> {
  /** The name in the server's certificate, if it is not the target's host. */
  serverName?: string;
}

export interface NodeClientOptions extends ClientOptions {
  /** Use TLS; true: trust the certificate authorities that Node knows. Absent: plain text. */
  tls?: boolean | TlsOptions;
  /** The largest message that is received; a larger one is `Code.ResourceExhausted`. Default: 4 MiB. */
  maxMessageBytes?: number;
}

/** A connection to a server, or to several replicas of one. Nothing is connected before the first call. */
export class Client extends BaseClient {
  readonly #sessions: Http2SessionManager[];
  readonly #givenUp: Http2SessionManager[];

  /**
   * `targets`: "host:port". With several replicas, if one fails, the client calls the next one, which continues each
   * generation that was accepted as replicated. node:http2 does not support proxies, so none is used.
   */
  constructor(targets: string | readonly string[], options: NodeClientOptions = {}) {
    const { tls } = options;
    const scheme = tls ? "https" : "http";
    const given = typeof tls === "object" ? tls : {};
    const nodeOptions = {
      ca: given.ca,
      cert: given.cert,
      key: given.key,
      ...(given.serverName ? { servername: given.serverName } : {}),
    };
    const sessionOf = (target: string) => {
      if (!/^[^/@]+:\d+$/.test(target) || !URL.canParse(`${scheme}://${target}`)) {
        throw new TypeError(`targets: ${JSON.stringify(target)} is not "host:port"`);
      }
      // A server may take 5 s to answer a connection. While a stream is open, one that is frozen is noticed within 15 s.
      const keepalive = { connectTimeoutMs: 5_000, pingIntervalMs: 10_000, pingTimeoutMs: 5_000 };
      return new Http2SessionManager(`${scheme}://${target}`, keepalive, nodeOptions);
    };
    // Node's flow-control window for a stream is 64 KiB: previews wait at the server, where newer ones replace older ones.
    const transportOf = (session: Http2SessionManager) =>
      createGrpcTransport({ baseUrl: session.authority, sessionManager: session, readMaxBytes: options.maxMessageBytes ?? 4 << 20 });
    const all = targetsOf(targets);
    const sessions = all.map(sessionOf);
    const givenUp: Http2SessionManager[] = [];
    super(sessions.map(transportOf), options, (at) => {
      // Open streams of the old connection continue. It ends with its server, or when it was idle for 15 minutes.
      const alive = givenUp.filter((one) => one.state() !== "closed" && one.state() !== "error");
      givenUp.splice(0, givenUp.length, ...alive, sessions[at]!);
      sessions[at] = sessionOf(all[at]!);
      return transportOf(sessions[at]);
    });
    this.#sessions = sessions;
    this.#givenUp = givenUp;
  }

  /**
   * Uploads a picture: PNG, JPEG or WebP. Its name can then be `initImage` or `mask`, for as long as the server keeps it.
   * Pages cannot do this, since gRPC-Web has no streams from the client.
   */
  async uploadImage(data: Uint8Array, limits: Limits = {}): Promise<Image> {
    const response = await this.ask(limits, (transport, options) =>
      createClient(ImageService, transport).uploadImage(pieces(data), options),
    );
    return response.image!;
  }

  /** Closes all connections, and with them the streams that are open. */
  close(): void {
    for (const session of [...this.#sessions, ...this.#givenUp]) session.abort();
  }
}

/** The messages that upload a picture: its digest and its size, then its bytes. */
async function* pieces(data: Uint8Array): AsyncGenerator<MessageInitShape<typeof UploadImageRequestSchema>> {
  yield { sha256: createHash("sha256").update(data).digest(), totalBytes: BigInt(data.length) };
  for (let start = 0; start < data.length; start += PIECE_BYTES) yield { data: data.subarray(start, start + PIECE_BYTES) };
}
