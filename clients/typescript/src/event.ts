import type * as pb from "./stubs/safelight/v1/generation_pb.js";

/** The first event: the request was admitted. `generation` is its name, "generations/ID", for `watch` and `cancel`. */
export type Accepted = pb.Accepted & { readonly type: "accepted"; readonly generation: string };

/** An output has made a denoising step. */
export type Progress = pb.Progress & { readonly type: "progress" };

/** How an output looks after a step, encoded as its `mediaType` says. */
export type Preview = pb.Preview & { readonly type: "preview"; readonly data: Uint8Array<ArrayBuffer> };

/** A finished picture. Its SHA-256 has been checked. */
export interface Picture {
  readonly type: "picture";
  readonly outputIndex: number;
  readonly mediaType: string;
  readonly widthPx: number;
  readonly heightPx: number;
  /** Bytes from one row to the next for raw pixels, else 0. */
  readonly strideBytes: number;
  readonly seed: bigint;
  readonly data: Uint8Array<ArrayBuffer>;
}

/** The last event: the generation has succeeded. */
export type Finished = pb.Finished & { readonly type: "finished"; readonly generation: string };

/** Something that happened to a generation; `type` tells which event it is. */
export type Event = Accepted | Progress | Preview | Picture | Finished;
