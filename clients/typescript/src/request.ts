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

/** Which previews a stream wants. Absent: JPEG after every step, as fast as they are read. */
export interface PreviewOptions {
  /** Such as "image/webp" or "application/x-raw-rgba8"; several: the first that the server has. */
  mediaType?: string | readonly string[];
  /** After every so many steps, and after the first. */
  everySteps?: number;
  /** Longest edge in pixels; larger previews are scaled down. */
  maxEdge?: number;
  /** Bytes a second, averaged over a second. */
  maxBytesPerSecond?: number;
  method?: PreviewMethod;
}

/** What may be said beside the prompt; absent means the server's or the model's default. */
export interface GenerateOptions extends Limits {
  prompt: string;
  /** What guidance leads away from. */
  negativePrompt?: string;
  /** The id of a model. */
  model?: string;
  /** Width in pixels, together with `height` one of the model's sizes. */
  width?: number;
  height?: number;
  /** Seed of the only picture, 0 to 2^64 - 1. Absent: random. */
  seed?: number | bigint;
  /** One for each picture, in place of `seed`. */
  seeds?: readonly (number | bigint)[];
  /**
   * A picture to start from, by its name: "images/SHA256" of one that was uploaded (by `uploadImage`, in Node), or
   * "generations/ID/outputs/INDEX", the picture of another generation.
   */
  initImage?: string;
  /** How much of `initImage` is given up, above 0 and at most 1. */
  strength?: number;
  /** Where `initImage` is developed anew: white, or transparent if it has an alpha channel. Named as that. */
  mask?: string;
  /** Denoising steps. */
  steps?: number;
  /** 1 is without guidance. */
  guidanceScale?: number;
  /** How much of the contrast that guidance adds is taken back, 0 to 1. */
  guidanceRescale?: number;
  /** Where guidance begins and ends, as shares of the steps: [0.2, 0.8]. Other steps cost half. */
  guidanceInterval?: readonly [start: number, end: number];
  /** Its name, such as "ddim" or "euler". */
  sampler?: string;
  /** Of the pictures. Absent: "image/png". */
  mediaType?: string;
  /** Of the pictures, in place of `mediaType`: quality, or alignment and order of raw rows. */
  encoding?: MessageInitShape<typeof PixelEncodingSchema>;
  /** Which previews to send; false: none. */
  preview?: PreviewOptions | false;
  priority?: Priority;
  /** The caller's own, returned by `client.get`. */
  labels?: Record<string, string>;
  /** Which cached results may be used; see `CachePolicy` in the contract. */
  cache?: keyof typeof CACHE_MODES;
  /** Least cosine similarity for "similar", above 0 and at most 1. */
  minSimilarity?: number;
  /**
   * What may be given up under load, such as `{ minNumSteps: 8 }`: steps, decoded previews, the very picture. The last event
   * says what was. Not for Priority.INTERACTIVE.
   */
  qualityFloor?: MessageInitShape<typeof QualityFloorSchema>;
  /** Start from this step of an older generation. */
  branch?: MessageInitShape<typeof BranchSchema>;
  /** A UUID; equal requests with one id are one generation. Absent: a new one. */
  requestId?: string;
}

/** The message of the preview options. */
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
 * The message of `client.generate`'s options.
 *
 * @throws TypeError two options say the same thing. RangeError: a seed is a fraction.
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
