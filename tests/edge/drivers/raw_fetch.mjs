// Calls a server by fetch alone. The text is whole if `[DONE]` has come.
import { add, order, print, seen } from "./lines.mjs";

const { base_url, api_key, headers, calls } = await order();

async function streamed(body) {
  const response = await fetch(`${base_url}/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${api_key}`, ...headers },
    body: JSON.stringify(body),
  });
  if (!response.ok) throw Object.assign(new Error("refused"), { status: response.status, ...(await response.json()).error });
  const choices = [];
  let [rest, count, done, failure, usage] = ["", 0, false, null, undefined];
  for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
    const events = (rest + piece).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith(":")) continue; // a comment: the heartbeat
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") {
        done = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) failure = chunk.error;
      usage = chunk.usage ?? usage;
      add(choices, chunk);
      print({ chunk: ++count });
    }
  }
  if (failure) throw Object.assign(new Error(failure.message), { type: failure.type, code: failure.code });
  if (!done) throw new Error("the stream ended without [DONE]");
  return { choices, usage };
}

for (const { body } of calls) {
  try {
    print(await streamed(body));
  } catch (error) {
    print(seen(error));
  }
}
