/** Tests of what the conformance suite cannot observe; the network is simulated in this process. */
import assert from "node:assert/strict";
import { test } from "node:test";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { createRouterTransport, ConnectError } from "@connectrpc/connect";
import type { HandlerContext } from "@connectrpc/connect";
import { sha256 } from "@noble/hashes/sha2.js";
import { BaseClient } from "./client.js";
import type { ClientOptions } from "./client.js";
import * as node from "./node.js";
import { GenerationService } from "./stubs/safelight/v1/generation_pb.js";
import type { GenerateRequest, GenerateResponseSchema } from "./stubs/safelight/v1/generation_pb.js";
import * as web from "./web.js";

type Answers = AsyncIterable<MessageInitShape<typeof GenerateResponseSchema>>;

/** A client of a server whose `Generate` is the given function. */
class FakeClient extends BaseClient {
  constructor(generate: (request: GenerateRequest, context: HandlerContext) => Answers, options: ClientOptions = {}) {
    super([createRouterTransport(({ service }) => service(GenerationService, { generate }))], options);
  }
}

const generation = "generations/one";

/** A generation of one picture, in pieces of two bytes. */
async function* picture(data: Uint8Array, digest: Uint8Array = sha256(data)): Answers {
  yield { event: { generation, sequence: 1n, event: { case: "accepted", value: { spec: { outputs: [{ seed: 7n }] } } } } };
  for (let offset = 0; offset < data.length; offset += 2) {
    const end = offset + 2 >= data.length;
    const piece = { data: data.slice(offset, offset + 2), offset: BigInt(offset), totalBytes: BigInt(data.length) };
    const value = { ...piece, mediaType: "image/png", sha256: end ? digest : new Uint8Array() };
    yield { event: { generation, event: { case: "artifactChunk", value } } };
  }
  yield { event: { generation, sequence: 2n, event: { case: "finished", value: {} } } };
}

test("a picture is put together from its pieces", async () => {
  const data = new Uint8Array([1, 2, 3, 4, 5]);
  const found = await new FakeClient(() => picture(data)).generate({ prompt: "a potion" }).picture();
  assert.deepEqual([found.data, found.seed], [data, 7n]);
  const blob = await new FakeClient(() => picture(data)).generate({ prompt: "a potion" }).blob();
  assert.deepEqual([blob.type, blob.size], ["image/png", 5]);
});

test("a damaged picture is an error and not a picture", async () => {
  const client = new FakeClient(() => picture(new Uint8Array([1, 2, 3]), new Uint8Array(32)));
  await assert.rejects(client.generate({ prompt: "a potion" }).picture(), { name: "SafelightError", code: node.Code.DataLoss });
});

test("options become the fields of the request", async () => {
  let sent: GenerateRequest | undefined;
  const client = new FakeClient((request) => {
    sent = request;
    return picture(new Uint8Array(1));
  });
  const preview = { mediaType: "image/webp", everySteps: 2, maxEdge: 64 };
  await client.generate({ prompt: "a potion", width: 512, height: 256, seeds: [1, 2n], steps: 0, preview }).pictures();
  assert.match(sent!.requestId, /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
  assert.deepEqual([sent!.spec!.widthPx, sent!.spec!.heightPx, sent!.spec!.numInferenceSteps], [512, 256, 0]);
  assert.deepEqual(sent!.spec!.outputs.map((output) => output.seed), [1n, 2n]);
  assert.deepEqual([sent!.preview!.accept[0]!.mediaType, sent!.preview!.maxEdgePx], ["image/webp", 64]);
  assert.deepEqual(sent!.preview!.cadence, { case: "everyNSteps", value: 2 });
});

test("guidance of some steps and a quality floor are plain options", async () => {
  let sent: GenerateRequest | undefined;
  const client = new FakeClient((request) => {
    sent = request;
    return picture(new Uint8Array(1));
  });
  const guidance = { guidanceInterval: [0.25, 0.75], guidanceRescale: 0.5 } as const;
  await client.generate({ prompt: "a potion", ...guidance, qualityFloor: { minNumSteps: 8 } }).pictures();
  const { guidanceInterval: interval, guidanceRescale } = sent!.spec!;
  assert.deepEqual([interval!.start, interval!.end, guidanceRescale], [0.25, 0.75, 0.5]);
  assert.deepEqual([sent!.qualityFloor!.minNumSteps, sent!.qualityFloor!.cheaperPreviews], [8, false]);
});

test("the caller's signal ends the stream, and the server's too", async () => {
  const caller = new AbortController();
  let server: AbortSignal | undefined;
  const client = new FakeClient(async function* (_, context) {
    server = context.signal;
    yield* picture(new Uint8Array(1));
    await new Promise(() => {});
  });
  await assert.rejects(
    async () => {
      const { signal } = caller;
      for await (const event of client.generate({ prompt: "a potion", signal })) if (event.type === "picture") caller.abort();
    },
    { name: "SafelightError", code: node.Code.Canceled },
  );
  assert.equal(server?.aborted, true);
});

test("leaving the loop lets the server know", async () => {
  let server: AbortSignal | undefined;
  const client = new FakeClient(async function* (_, context) {
    server = context.signal;
    yield* picture(new Uint8Array(1));
    await new Promise(() => {});
  });
  for await (const event of client.generate({ prompt: "a potion" })) if (event.type === "accepted") break;
  assert.equal(server?.aborted, true);
});

test("the deadline and the caller's signal end a wait between two tries", async () => {
  const lost = () => {
    throw new ConnectError("gone", node.Code.Unavailable);
  };
  const request = { prompt: "a potion" };
  const late = new FakeClient(lost).generate({ ...request, timeoutMs: 150 }).picture();
  await assert.rejects(late, { code: node.Code.DeadlineExceeded });
  const timedOut = new FakeClient(lost).generate({ ...request, signal: AbortSignal.timeout(150) }).picture();
  await assert.rejects(timedOut, { code: node.Code.DeadlineExceeded });
});

test("a call that its server has cancelled without a reason is lost", () => {
  const cancelled = new ConnectError("CANCELLED", node.Code.Canceled, { "grpc-status": "1" });
  assert.equal(node.SafelightError.from(cancelled).code, node.Code.Unavailable);
  const aborted = node.SafelightError.from(new ConnectError("aborted", node.Code.Canceled), AbortSignal.abort());
  assert.equal(aborted.code, node.Code.Canceled);
});

test("what cannot be sent is an error at once, of its own kind", () => {
  const client = new FakeClient(() => picture(new Uint8Array(1)));
  assert.throws(() => client.generate({ prompt: "a potion", seed: -1 }), /seed/);
  assert.throws(() => client.generate({ prompt: "a potion", seed: 1.5 }), RangeError);
  assert.throws(() => client.generate({ prompt: "a potion", seed: 1, seeds: [1] }), /already said by seeds/);
  assert.throws(() => client.generate({ prompt: "a potion", width: 1.5, height: 1 }), /width_px/);
});

test("targets and keys that cannot be are refused", () => {
  for (const wrong of ["", "one:1,", "http://one:1", "one", "one:x", "one:99999"]) {
    assert.throws(() => new node.Client(wrong), /^TypeError: targets/);
  }
  for (const wrong of ["", "one:1", "ftp://one"]) assert.throws(() => new web.Client(wrong), /^TypeError: targets/);
  assert.throws(() => new node.Client("one:1", { apiKey: "two words" }), /^TypeError: apiKey/);
  new node.Client(["[::1]:8421", "other:8421"]).close();
  new web.Client("/");
});
