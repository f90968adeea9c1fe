/** The exports that the clients for Node and for browsers have in common. */
export { Code } from "@connectrpc/connect";
export { GenerationStream } from "./client.js";
export type { ClientOptions } from "./client.js";
export type { Limits } from "./develop.js";
export { SafelightError } from "./error.js";
export type { Accepted, Event, Finished, Picture, Preview, Progress } from "./event.js";
export type { GenerateOptions, PreviewOptions } from "./request.js";
export { Generation_State, PreviewMethod, Priority } from "./stubs/safelight/v1/generation_pb.js";
export type { Generation } from "./stubs/safelight/v1/generation_pb.js";
export type { Model } from "./stubs/safelight/v1/models_pb.js";
