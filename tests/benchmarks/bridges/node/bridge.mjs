// The lean worker that a good Node engineer would write: undici, eventsource-parser, ioredis with automatic
// pipelining, and no xadd awaited one by one. Like the straightforward one it has nothing for what goes wrong.
//
//   node bridge.mjs <URL of vLLM> <URL of Redis>

import { once } from "node:events";
import { StringDecoder } from "node:string_decoder";

import { createParser } from "eventsource-parser";
import { Redis } from "ioredis";
import { Agent, request } from "undici";

const [vllmUrl, redisUrl] = process.argv.slice(2);
const agent = new Agent({ connections: null, pipelining: 1, bodyTimeout: 0, headersTimeout: 0 });
const redis = new Redis(redisUrl, { enableAutoPipelining: true });
const jobs = new Redis(redisUrl);

function fail(error) {
  console.error(error);
  process.exit(1);
}

async function relay(job, fields) {
  const key = `chat:tokens:{${fields.id}}`;
  const { statusCode, body } = await request(`${vllmUrl}/v1/chat/completions`, {
    method: "POST",
    dispatcher: agent,
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...JSON.parse(fields.request), stream: true }),
  });
  if (statusCode !== 200) throw new Error(`status ${statusCode}`);
  let last;
  const parser = createParser({
    onEvent({ data }) {
      if (data === "[DONE]") return;
      for (const choice of JSON.parse(data).choices) {
        const text = choice.delta.content;
        if (text) last = redis.xadd(key, "*", "type", "delta", "content", text).catch(fail);
      }
    },
  });
  const decoder = new StringDecoder("utf8");
  body.on("data", (bytes) => parser.feed(decoder.write(bytes)));
  await once(body, "end");
  await last;
  await redis.xadd(key, "*", "type", "done");
  await redis.xack("chat:jobs", "workers", job);
}

await redis.xgroup("CREATE", "chat:jobs", "workers", "0", "MKSTREAM");
for (;;) {
  const reply = await jobs.xreadgroup(
    "GROUP", "workers", "one", "COUNT", 100, "BLOCK", 1000, "STREAMS", "chat:jobs", ">",
  );
  for (const [job, flat] of reply?.[0][1] ?? []) {
    const fields = {};
    for (let place = 0; place < flat.length; place += 2) fields[flat[place]] = flat[place + 1];
    relay(job, fields).catch(fail);
  }
}
