// Calls a gateway through resumingFetch, and prints what arrived as JSON.
// Usage: node resuming_fetch.mjs <file of client.js> <URL> <what> [<limit in ms>]

import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";

const [path, url, what, limit = "30000"] = process.argv.slice(2);
// Node reads a file named .js as CommonJS, so it is imported from its text.
const source = await readFile(path, "base64");
const { withResume, resumingFetch } = await import(`data:text/javascript;base64,${source}`);
const fetch = withResume({ limit: Number(limit), silence: what === "silent" ? 300 : 45_000 });
const body = JSON.stringify({ model: "reciter", messages: [{ role: "user", content: "Recite" }], stream: true });
const post = (init = {}, send = fetch) =>
  send(`${url}/v1/chat/completions`, { method: "POST", body, headers: { "content-type": "application/json" }, ...init });

const openai = async () => {
  const { default: OpenAI } = await import("openai");
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.API_KEY ?? "k", fetch, maxRetries: 1 });
  const messages = [{ role: "user", content: process.env.PROMPT ?? "Recite" }];
  const stream = await client.chat.completions.create({ model: "reciter", messages, stream: true });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
  return { text };
};

const calls = {
  openai,
  silent: async () => ({ text: await (await post()).text() }),
  text: async () => ({ text: await (await post()).text() }),
  default: async () => ({ text: await (await post({}, resumingFetch)).text() }),
  request: async () => ({ text: await (await fetch(new Request(`${url}/v1/chat/completions`, { method: "POST", body }))).text() }),
  refused: async () => {
    const response = await post();
    return { status: response.status, text: await response.text() };
  },
  other: async () => ({ text: await (await fetch(`${url}/requests`, { method: "POST", body })).text() }),
  events: async () => ({ text: await (await fetch(`${url}/requests/1/events`)).text() }),
  ownKey: async () => ({ text: await (await post({ headers: { "idempotency-key": "mine", "relay-after": "21" } })).text() }),
  retried: async () => {
    const statuses = [];
    for (const count of ["0", "1", "0"]) {
      const response = await post({ headers: { "x-stainless-retry-count": count } });
      statuses.push(response.status);
      await response.body.cancel();
    }
    return { statuses };
  },
  // Aborts after 0.3 s, in whatever state the call is then.
  abort: async () => {
    const controller = new AbortController();
    const timer = sleep(300).then(() => controller.abort(new Error("enough")));
    const response = await post({ signal: controller.signal });
    const reading = response.text();
    await timer;
    return { text: await reading };
  },
  cancel: async () => {
    const response = await post();
    const reader = response.body.getReader();
    const { value } = await reader.read();
    await reader.cancel();
    return { first: new TextDecoder().decode(value) };
  },
};

try {
  console.log(JSON.stringify(await calls[what]()));
} catch (error) {
  console.log(JSON.stringify({ error: error.message, name: error.name }));
}
