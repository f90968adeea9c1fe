/**
 * The runner of the TypeScript client: reads cases, runs them, and prints the outcomes, a JSON object a line each.
 * With `--web` the client is the one for browsers. See clients/CONFORMANCE.md.
 */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { fromJson } from "@bufbuild/protobuf";
import type { JsonValue } from "@bufbuild/protobuf";
import * as node from "./node.js";
import { Generation_StateSchema, GenerateRequestSchema } from "./stubs/safelight/v1/generation_pb.js";
import type { GenerateRequest } from "./stubs/safelight/v1/generation_pb.js";
import * as web from "./web.js";

interface Case {
  name: string;
  targets: string[];
  ca_file: string;
  cert_file: string;
  key_file: string;
  server_name: string;
  api_key: string;
  requests: JsonValue[];
  timeout_s: number;
  patience_s: number;
  retries: number;
  max_message_bytes: number;
  pause_s: number;
  cancel_at_step: number;
  watch_again: boolean;
  init_image_file: string;
  mask_file: string;
  guidance_interval: [number, number] | [];
  guidance_rescale: number;
  min_num_steps: number;
  measure: boolean;
}

type Client = node.Client | web.Client;

function clientOf(given: Case): Client {
  const options = { apiKey: given.api_key, patienceMs: given.patience_s * 1000, retries: given.retries };
  if (process.argv.includes("--web")) return new web.Client(given.targets.map((target) => `http://${target}`), options);
  const own = given.cert_file ? { cert: readFileSync(given.cert_file), key: readFileSync(given.key_file) } : {};
  const tls = given.ca_file ? { ca: readFileSync(given.ca_file), ...own, serverName: given.server_name } : false;
  const limit = given.max_message_bytes ? { maxMessageBytes: given.max_message_bytes } : {};
  return new node.Client(given.targets, { ...options, ...limit, tls });
}

async function generate(client: Client, given: Case, json: JsonValue) {
  const request = fromJson(GenerateRequestSchema, json);
  if (given.init_image_file && client instanceof node.Client) {
    request.spec!.initImage = (await client.uploadImage(readFileSync(given.init_image_file))).name;
    request.spec!.mask = (await client.uploadImage(readFileSync(given.mask_file))).name;
  }
  const limits = given.timeout_s ? { timeoutMs: given.timeout_s * 1000 } : {};
  const seen = {
    code: "OK",
    reason: "",
    message: "",
    violations: {},
    retry_after_s: null as number | null,
    generation: "",
    reliable: [] as string[],
    steps: [] as [number, number][],
    previews: [] as object[],
    pictures: [] as object[],
    num_steps: 0,
    cancelled: null as { state: string; steps: number[] } | null,
    watched: null as object | null,
    received_us: [] as number[],
  };
  try {
    for await (const event of asked(client, given, request, limits)) {
      switch (event.type) {
        case "accepted":
          seen.generation = event.generation;
          seen.reliable.push(event.type);
          break;
        case "progress":
          seen.steps.push([event.outputIndex, event.step]);
          if (given.cancel_at_step && event.step >= given.cancel_at_step && !seen.cancelled) {
            const ended = await client.cancel(seen.generation);
            seen.cancelled = { state: stateName(ended.state), steps: ended.outputs.map((output) => output.step) };
          }
          break;
        case "preview":
          if (given.measure) {
            seen.received_us.push(Math.round((performance.timeOrigin + performance.now()) * 1000));
            break;
          }
          seen.previews.push({ ...image(event), step: event.step, num_bytes: event.data.length, num_dropped: event.numDropped });
          await sleep(given.pause_s * 1000);
          break;
        case "picture":
          seen.reliable.push(event.type);
          seen.pictures.push({ ...image(event), seed: String(event.seed), sha256: digest(event) });
          break;
        case "finished":
          seen.reliable.push(event.type);
          seen.num_steps = Number(event.usage?.numSteps);
      }
    }
  } catch (error) {
    if (!(error instanceof node.SafelightError)) throw error;
    const { message, reason, fieldViolations: violations, retryAfterMs } = error;
    Object.assign(seen, { code: codeName(error.code), message, reason, violations });
    if (retryAfterMs !== undefined) seen.retry_after_s = retryAfterMs / 1000;
  }
  if (given.watch_again && seen.code === "OK") seen.watched = await watchAgain(client, seen.generation);
  return seen;
}

/** Sends the case's message as it is, or its plain options if the case has some. */
function asked(client: Client, given: Case, request: GenerateRequest, limits: { timeoutMs?: number }): AsyncIterable<node.Event> {
  const { guidance_interval: guidanceInterval, guidance_rescale: guidanceRescale, min_num_steps: minNumSteps } = given;
  if (guidanceInterval.length === 0 && !minNumSteps) return client.develop(request, limits);
  const spec = request.spec!;
  return client.generate({
    ...limits,
    prompt: spec.prompt,
    steps: spec.numInferenceSteps,
    seeds: spec.outputs.map((output) => output.seed!),
    guidanceScale: spec.guidanceScale,
    ...(guidanceInterval.length === 2 ? { guidanceInterval, guidanceRescale } : {}),
    ...(minNumSteps ? { qualityFloor: { minNumSteps } } : {}),
  });
}

/** Watches a generation again: the events, and what the server reports about the generation and its models. */
async function watchAgain(client: Client, name: string) {
  const reliable: string[] = [];
  const sha256: string[] = [];
  for await (const event of client.watch(name, { preview: false })) {
    if (event.type === "picture") sha256[event.outputIndex] = digest(event);
    if (event.type !== "progress" && event.type !== "preview") reliable.push(event.type);
  }
  const state = stateName((await client.get(name)).state);
  return { reliable, sha256, state, models: (await client.models()).map((model) => model.name) };
}

function image({ outputIndex, mediaType, widthPx, heightPx, strideBytes }: node.Preview | node.Picture) {
  return { output_index: outputIndex, media_type: mediaType, width_px: widthPx, height_px: heightPx, stride_bytes: strideBytes };
}

function digest(picture: node.Picture): string {
  return createHash("sha256").update(picture.data).digest("hex");
}

function stateName(state: node.Generation_State): string {
  return Generation_StateSchema.value[state]!.name;
}

/** The name of a code in gRPC's specification, such as "RESOURCE_EXHAUSTED"; Connect says ResourceExhausted. */
function codeName(code: node.Code): string {
  return code === node.Code.Canceled ? "CANCELLED" : node.Code[code].replace(/(?<!^)([A-Z])/g, "_$1").toUpperCase();
}

async function atOnce<Seen>(works: (() => Promise<Seen>)[]): Promise<Seen[]> {
  return Promise.all(works.map((work) => work()));
}

async function inTurn<Seen>(works: (() => Promise<Seen>)[]): Promise<Seen[]> {
  const all: Seen[] = [];
  for (const work of works) all.push(await work());
  return all;
}

for await (const line of createInterface({ input: process.stdin })) {
  const given = JSON.parse(line) as Case;
  const client = clientOf(given);
  const generations = await (given.measure ? inTurn : atOnce)(given.requests.map((request) => () => generate(client, given, request)));
  console.log(JSON.stringify({ case: given.name, generations }));
  if (client instanceof node.Client) client.close();
}
