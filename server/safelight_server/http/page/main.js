// The page: the form, the sheet of pictures, and what is remembered in this tab.
import { call } from "./grpc-web.js";
import { ENUMS } from "./messages.js";
import { Picture, Slots, duration } from "./picture.js";

const MAX_STREAMS = 5;  // of the six connections that a browser has to a server one is left, to cancel with
const MAX_PICTURES = 24;
const MAX_SEED = 2n ** 64n - 1n;
const KEY = "safelight-api-key";
const FROM_TEXT = ENUMS["safelight.v1.Task"].TASK_TEXT_TO_IMAGE;

const part = (id) => document.getElementById(id);
const pictures = [];
const NOTHING_YET = part("empty").textContent;
const NO_MODEL = "No model of this server makes pictures from text alone.";

const sheet = {
  slots: new Slots(MAX_STREAMS),
  apiKey: () => part("key").value.trim(),
  say: (text) => { part("news").textContent = text; },
  pin(seed) {
    part("seed").value = String(seed);
    seedChanged();
    sheet.say(`Seed ${seed} is pinned.`);
  },
  branch: (order) => develop([order]),
  changed() {
    const saved = pictures.reduce((sum, one) => sum + one.stepsSaved, 0);
    const cost = pictures.reduce((sum, one) => sum + one.computeSeconds, 0);
    const count = pictures.length === 1 ? "1 picture" : `${pictures.length} pictures`;
    part("totals").textContent = pictures.some((one) => one.ended) ? `${count}, ${saved} steps saved, ${duration(cost)} of compute` : "";
    part("empty").hidden = pictures.length > 0;
  },
};

function develop(orders) {
  const added = orders.map((order) => new Picture(order, sheet));
  part("sheet").prepend(...added.map((one) => one.element));
  pictures.unshift(...added);
  sheet.say(added.length === 1 ? "1 picture is developing." : `${added.length} pictures are developing.`);
  for (const one of added) one.develop();
  while (pictures.length > MAX_PICTURES) pictures.pop().remove();
  sheet.changed();
}

function seedChanged() {
  const seed = part("seed");
  const tooLarge = /^[0-9]+$/.test(seed.value) && BigInt(seed.value) > MAX_SEED;
  seed.setCustomValidity(tooLarge ? `At most ${MAX_SEED}` : "");
  part("unpin").hidden = !seed.value;
}

async function showModels() {
  const types = ["safelight.v1.ListModelsRequest", "safelight.v1.ListModelsResponse"];
  for await (const listed of call("ModelService", "ListModels", types, {}, { apiKey: sheet.apiKey() })) {
    const models = listed.models.filter(({ tasks }) => tasks.includes(FROM_TEXT));  // the page has no picture and mask
    part("empty").textContent = models.length ? NOTHING_YET : NO_MODEL;
    if (!models.length) sheet.say(NO_MODEL);
    const options = models.map(({ name, description, is_default: chosen }) => {
      const option = new Option(name.replace("models/", ""), name, chosen, chosen);
      option.title = description;
      return option;
    });
    part("model").replaceChildren(...options);
    part("model-choice").hidden = models.length < 2;
    const limits = () => {
      const model = models.find(({ name }) => name === part("model").value);
      if (!model) return;
      part("steps").max = model.limits.max_num_inference_steps;
      part("steps").placeholder = String(model.defaults.num_inference_steps);
    };
    part("model").onchange = limits;
    limits();
  }
}

part("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const first = part("seed").value ? BigInt(part("seed").value) : undefined;
  const order = {
    prompt: part("prompt").value.trim(),
    model: part("model").value || undefined,
    steps: part("steps").value ? Number(part("steps").value) : undefined,
    mode: part("cache").value,
  };
  const seeds = Array.from({ length: Number(part("count").value) }, (_, at) => first === undefined ? undefined : BigInt.asUintN(64, first + BigInt(at)));
  develop(seeds.map((seed) => ({ ...order, seed })));
});
part("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    part("ask").requestSubmit();
  }
});
part("seed").addEventListener("input", seedChanged);
part("unpin").addEventListener("click", () => {
  part("seed").value = "";
  seedChanged();
  part("seed").focus();
});
part("key").value = sessionStorage.getItem(KEY) ?? "";
part("key-form").addEventListener("submit", (event) => event.preventDefault());
part("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, sheet.apiKey());
  showModels().catch(() => {});
});
showModels().catch(({ reason }) => {
  if (reason === "UNAUTHENTICATED") part("access").open = true;  // what is asked for then says the rest
});
