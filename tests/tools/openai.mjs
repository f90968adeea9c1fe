// What tests/tools/test_openai_node.py runs: the official OpenAI package for Node against the server at argv[2], with
// a picture and its mask in the files argv[3] and argv[4]. Prints what came back as one JSON object.
import { createReadStream, readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: `http://${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const few = { num_inference_steps: 200, seed: 7 };  // enough that previews come between them on any machine
const begins = (picture) => Buffer.from(picture, "base64").subarray(0, 4).toString("latin1");

async function developed(stream) {
  const events = [];
  for await (const event of stream) {
    const { type, partial_image_index: index, image_index: image } = event;
    events.push({ type, begins: begins(event.b64_json), index, image });
  }
  return events;
}

const answer = await client.images.generate({ prompt: "a red potion", n: 2, size: "128x128", ...few });
const events = await developed(
  await client.images.generate({ prompt: "x", stream: true, partial_images: 2, ...few }),
);
const refused = await client.images.generate({ prompt: "x", style: "vivid" }).catch((error) => error);
const edited = await client.images.edit({
  image: createReadStream(process.argv[3]),
  mask: await toFile(readFileSync(process.argv[4]), "mask.png", { type: "image/png" }),
  prompt: "a red potion",
  strength: 0.6,
  ...few,
});
const edits = await developed(
  await client.images.edit({
    image: createReadStream(process.argv[3]),
    prompt: "x",
    n: 2,
    stream: true,
    partial_images: 1,
    ...few,
  }),
);
const models = [];
for await (const model of client.models.list()) models.push(model.id);

console.log(
  JSON.stringify({
    pictures: answer.data.map((picture) => begins(picture.b64_json)),
    seeds: answer.safelight.seeds,
    usage: answer.usage,
    events,
    refused: { kind: refused.constructor.name, status: refused.status, param: refused.param, code: refused.code },
    edited: { pictures: edited.data.map((picture) => begins(picture.b64_json)), strength: edited.safelight.strength },
    edits,
    models,
  }),
);
