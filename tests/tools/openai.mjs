// What tests/tools/test_openai_node.py runs: the official OpenAI package for Node against the server at argv[2].
// Prints what came back as one JSON object.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `http://${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const few = { num_inference_steps: 40, seed: 7 };
const begins = (picture) => Buffer.from(picture, "base64").subarray(0, 4).toString("latin1");

const answer = await client.images.generate({ prompt: "a red potion", n: 2, size: "128x128", ...few });
const events = [];
for await (const event of await client.images.generate({ prompt: "x", stream: true, partial_images: 2, ...few })) {
  events.push({ type: event.type, begins: begins(event.b64_json), index: event.partial_image_index });
}
const refused = await client.images.generate({ prompt: "x", style: "vivid" }).catch((error) => error);
const models = [];
for await (const model of client.models.list()) models.push(model.id);

console.log(
  JSON.stringify({
    pictures: answer.data.map((picture) => begins(picture.b64_json)),
    seeds: answer.safelight.seeds,
    usage: answer.usage,
    events,
    refused: { kind: refused.constructor.name, status: refused.status, param: refused.param, code: refused.code },
    models,
  }),
);
