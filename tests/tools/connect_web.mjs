// What tests/tools/test_grpc_web.py runs: Connect's client for browsers, over gRPC-Web, against the server at argv[2].
// argv[3] is a file with the FileDescriptorSet of the contract. Prints what came back as one JSON object.
import { readFileSync } from "node:fs";
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { Code, createClient } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";

const contract = createFileRegistry(fromBinary(FileDescriptorSetSchema, readFileSync(process.argv[3])));
const transport = createGrpcWebTransport({ baseUrl: `http://${process.argv[2]}`, useBinaryFormat: true });
const client = (service) => createClient(contract.getService(`safelight.v1.${service}`), transport);
const generations = client("GenerationService");

const events = [];
const spec = { prompt: "a red potion", numInferenceSteps: 200, outputs: [{ seed: 7n }] };
for await (const { event } of generations.generate({ spec })) events.push(event);
const [generation] = events.map((event) => event.generation);
const { generation: after } = await generations.getGeneration({ name: generation });

const refused = await client("ModelService").getModel({ name: "models/none" }).catch((error) => error);
const late = await (async () => {
  for await (const _ of generations.generate({ spec: { ...spec, numInferenceSteps: 1000 } }, { timeoutMs: 800 }));
})().catch((error) => error);

const leaving = new AbortController();
const left = await (async () => {
  const request = { spec: { ...spec, numInferenceSteps: 1000 }, disconnect: { resumeGrace: { seconds: 0n } } };
  for await (const { event } of generations.generate(request, { signal: leaving.signal }))
    if (event.event.case === "preview") leaving.abort();
})().catch((error) => error);

console.log(
  JSON.stringify({
    kinds: events.map(({ event }) => event.case),
    picture: events
      .filter(({ event }) => event.case === "artifactChunk")
      .map(({ event }) => Buffer.from(event.value.data).toString("base64")),
    state: after.state,
    refused: { code: Code[refused.code], message: refused.rawMessage },
    late: Code[late.code],
    left: Code[left.code],
  }),
);
