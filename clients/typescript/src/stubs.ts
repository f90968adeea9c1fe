/** The messages and services of the contract, for `client.develop` and for stubs of other services. */
export * from "./stubs/safelight/v1/cache_pb.js";
export * from "./stubs/safelight/v1/generation_pb.js";
export * from "./stubs/safelight/v1/images_pb.js";
export * from "./stubs/safelight/v1/models_pb.js";
export * from "./stubs/safelight/v1/quotas_pb.js";
