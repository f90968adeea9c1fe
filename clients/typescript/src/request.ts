import type { MessageInitShape } from "@bufbuild/protobuf";
import type { Limits } from "./develop.js";
import { CachePolicy_Mode, PreviewMethod, Prompt_Role } from "./stubs/safelight/v1/generation_pb.js";
import type {
  BranchSchema,
  GenerateRequestSchema,
  PixelEncodingSchema,
  PreviewPolicySchema,
  Priority,
  QualityFloorSchema,
} from "./stubs/safelight/v1/generation_pb.js";

const CACHE_MODES = {
  default: CachePolicy_Mode.DEFAULT,
  bypass: CachePolicy_Mode.BYPASS,
  latent: CachePolicy_Mode.ALLOW_LATENT,
  similar: CachePolicy_Mode.ALLOW_SIMILAR,
};

/** Which previews to send on a stream. Absent: a JPEG after every step, as fast as they are read. */
export interface PreviewOptions {
  /** Media type, such as "image/webp" or "application/x-raw-rgba8"; of several, the server uses the first it offers. */
  mediaType?: string | readonly string[];
  /** Send a preview after every so many steps, and after the first. */
  everySteps?: number;
  /** Longest edge in pixels; larger previews are scaled down. */
  maxEdge?: number;
  /** Most bytes a second, averaged over a second. */
  maxBytesPerSecond?: number;
  method?: PreviewMethod;
}

/** Options beside the prompt. An absent one means the server's or the model's default. */
export interface GenerateOptions extends Limits {
  prompt: string;
  /** What the picture should not show: guidance leads away from it. */
  negativePrompt?: string;
  /** The id of a model. */
  model?: string;
  /** Width in pixels; with `height` it must be one of the model's sizes. */
  width?: number;
  height?: number;
  /** Seed of the only picture, 0 to 2^64 - 1. Absent: random. */
  seed?: number | bigint;
  /** A seed for each picture, instead of `seed`. */
  seeds?: readonly (number | bigint)[];
  /**
   * A picture to start from, by its name: "images/SHA256" of one that was uploaded (by `uploadImage`, in Node), or
   * "generations/ID/outputs/INDEX", the picture of another generation.
   */
  initImage?: string;
  /** How far the picture may depart from `initImage`, above 0 and at most 1. */
  strength?: number;
  /** The mask, named as `initImage`: white (or, with an alpha channel, transparent) parts are developed anew. */
  mask?: string;
  /** Denoising steps. */
  steps?: number;
  /** Scale of classifier-free guidance; 1: no guidance. */
  guidanceScale?: number;
  /** How much of the contrast that guidance adds is taken back, from 0 to 1. */
  guidanceRescale?: number;
  /** Where guidance begins and ends, as shares of the steps: [0.2, 0.8]. Steps outside cost half. */
  guidanceInterval?: readonly [start: number, end: number];
  /** Name of the sampler, such as "ddim" or "euler". */
  sampler?: string;
  /** Media type of the pictures. Absent: "image/png". */
  mediaType?: string;
  /** Encoding of the pictures, instead of `mediaType`: with quality, or alignment and order of raw rows. */
  encoding?: MessageInitShape<typeof PixelEncodingSchema>;
  /** Which previews to send; false: no previews. */
  preview?: PreviewOptions | false;
  priority?: Priority;
  /** Labels of the caller's own, which `client.get` returns. */
  labels?: Record<string, string>;
  /** Which cached results may be used; see `CachePolicy` in the contract. */
  cache?: keyof typeof CACHE_MODES;
  /** Minimum cosine similarity for "similar", above 0 and at most 1. */
  minSimilarity?: number;
  /**
   * How far the server may lower the quality under load, such as `{ minNumSteps: 8 }`. The last event says what was lowered.
   * Not for Priority.INTERACTIVE.
   */
  qualityFloor?: MessageInitShape<typeof QualityFloorSchema>;
  /** Starts from this step of an older generation instead of noise. */
  branch?: MessageInitShape<typeof BranchSchema>;
  /** A UUID. Equal requests with the same id become one generation. Absent: a new UUID. */
  requestId?: string;
}

/** Converts the preview options to a message. */
export function previewPolicy(preview: PreviewOptions | false | undefined): MessageInitShape<typeof PreviewPolicySchema> | undefined {
  if (preview === undefined) return undefined;
  if (preview === false) return { method: PreviewMethod.NONE };
  const { mediaType = [], everySteps, maxEdge, maxBytesPerSecond, method } = preview;
  return {
    accept: [mediaType].flat().map((one) => ({ mediaType: one as string })),
    maxEdgePx: maxEdge,
    cadence: everySteps === undefined ? undefined : { case: "everyNSteps", value: everySteps },
    maxBytesPerSecond: maxBytesPerSecond === undefined ? undefined : BigInt(maxBytesPerSecond),
    method,
  };
}

/**
 * Converts the options of `client.generate` to a message.
 *
 * @throws TypeError if two options contradict each other, RangeError if a seed is not a whole number.
 */
export function generateRequest(options: GenerateOptions): MessageInitShape<typeof GenerateRequestSchema> {
  if (options.seed !== undefined && options.seeds) throw new TypeError("seed: already said by seeds");
  if (options.mediaType !== undefined && options.encoding) throw new TypeError("mediaType: already said by encoding");
  const interval = options.guidanceInterval;
  const seeds = options.seeds ?? (options.seed === undefined ? [] : [options.seed]);
  return {
    requestId: options.requestId,
    spec: {
      prompt: options.prompt,
      prompts: options.negativePrompt ? [{ role: Prompt_Role.NEGATIVE, text: options.negativePrompt }] : [],
      model: options.model ? `models/${options.model}` : "",
      widthPx: options.width,
      heightPx: options.height,
      numInferenceSteps: options.steps,
      guidanceScale: options.guidanceScale,
      guidanceRescale: options.guidanceRescale,
      guidanceInterval: interval && { start: interval[0], end: interval[1] },
      initImage: options.initImage,
      strength: options.strength,
      mask: options.mask,
      sampler: options.sampler ? { name: options.sampler } : undefined,
      outputs: seeds.map((seed) => ({ seed: BigInt(seed) })),
    },
    preview: previewPolicy(options.preview),
    encoding: options.encoding ?? { mediaType: options.mediaType ?? "image/png" },
    scheduling: { priority: options.priority },
    labels: options.labels,
    cache: { mode: CACHE_MODES[options.cache ?? "default"], minSimilarity: options.minSimilarity },
    qualityFloor: options.qualityFloor,
    branch: options.branch,
  };
}
