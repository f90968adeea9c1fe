import type { MessageInitShape } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";
import { sha256 } from "@noble/hashes/sha2.js";
import { SafelightError } from "./error.js";
import type { Event, Preview } from "./event.js";
import { Accepted_Durability } from "./stubs/safelight/v1/generation_pb.js";
import type {
  ArtifactChunk,
  GenerationEvent,
  PreviewPolicySchema,
  WatchGenerationRequestSchema,
} from "./stubs/safelight/v1/generation_pb.js";

/** What was received of a generation so far, over all connections. */
export class Received {
  numEvents = 0;
  finished = false;
  /** Another replica can continue it. */
  replicated = false;
  #sequence = 0n;
  #seeds: bigint[] = [];
  readonly #parts = new Map<number, { data: Uint8Array<ArrayBuffer>; numBytes: number }>();

  /** `at`: index of the server that the generation uses. `name`: of the generation; empty until it is accepted. */
  constructor(
    public at: number,
    public name: string,
    readonly preview: MessageInitShape<typeof PreviewPolicySchema> | undefined,
  ) {}

  /** The request that continues where the last connection ended. */
  watch(): MessageInitShape<typeof WatchGenerationRequestSchema> {
    const artifactOffsets = [...this.#parts].map(([outputIndex, part]) => ({ outputIndex, offset: BigInt(part.numBytes) }));
    return { name: this.name, afterSequence: this.#sequence, artifactOffsets, preview: this.preview };
  }

  /** The event that a message is for the caller; undefined for a piece of a picture and for details of the protocol. */
  take(message: GenerationEvent): Event | undefined {
    this.name = message.generation;
    this.numEvents++;
    if (message.sequence > this.#sequence) this.#sequence = message.sequence;
    const { case: kind, value } = message.event;
    switch (kind) {
      case "accepted":
        this.#seeds = (value.spec?.outputs ?? []).map((output) => output.seed ?? 0n);
        this.replicated = value.durability === Accepted_Durability.REPLICATED;
        return { type: "accepted", generation: this.name, ...value };
      case "progress":
        return { type: "progress", ...value };
      case "preview":
        return { type: "preview", ...value } as Preview;
      case "artifactChunk":
        return this.#artifact(value);
      case "finished":
        this.finished = true;
        return value.status?.code ? undefined : { type: "finished", generation: this.name, ...value };
      default:
        return undefined;
    }
  }

  #artifact(chunk: ArtifactChunk): Event | undefined {
    const { outputIndex } = chunk;
    const part = this.#parts.get(outputIndex) ?? { data: new Uint8Array(Number(chunk.totalBytes)), numBytes: 0 };
    if (chunk.offset !== BigInt(part.numBytes)) return undefined;
    const end = part.numBytes + chunk.data.length;
    if (end > part.data.length) throw new SafelightError(`output ${outputIndex} is longer than announced`, Code.DataLoss);
    part.data.set(chunk.data, part.numBytes);
    part.numBytes = end;
    this.#parts.set(outputIndex, part);
    if (end < part.data.length || chunk.sha256.length === 0) return undefined;
    if (!equal(sha256(part.data), chunk.sha256)) {
      throw new SafelightError(`output ${outputIndex} arrived damaged`, Code.DataLoss);
    }
    return {
      type: "picture",
      outputIndex,
      mediaType: chunk.mediaType,
      widthPx: chunk.widthPx,
      heightPx: chunk.heightPx,
      strideBytes: chunk.strideBytes,
      seed: this.#seeds[outputIndex] ?? 0n,
      data: part.data,
    };
  }
}

function equal(one: Uint8Array, other: Uint8Array): boolean {
  return one.length === other.length && one.every((byte, index) => byte === other[index]);
}
