// Calls a server by the openai client for Node.
import OpenAI from "openai";
import { add, order, print, seen } from "./lines.mjs";

const { base_url, api_key, retries, headers, calls, client_js } = await order();
// Node reads a file named .js as CommonJS, so it is imported from its text.
const { resumingFetch: fetch } = client_js ? await import(`data:text/javascript,${encodeURIComponent(client_js)}`) : {};
const client = new OpenAI({ baseURL: base_url, apiKey: api_key, maxRetries: retries, defaultHeaders: headers, fetch });

function whole(completion) {
  const choices = completion.choices.map(({ message, finish_reason, logprobs }) => ({
    content: message.content ?? "",
    reasoning: message.reasoning ?? "",
    tool_calls: (message.tool_calls ?? []).map((call) => ({ type: call.type, ...call.function })),
    finish_reason,
    logprobs: logprobs?.content ?? null,
  }));
  return { choices, usage: completion.usage, model: completion.model, object: completion.object };
}

async function streamed(body) {
  const [choices, shared] = [[], {}];
  let count = 0;
  for await (const chunk of await client.chat.completions.create(body)) {
    add(choices, chunk);
    if (chunk.usage) shared.usage = chunk.usage;
    Object.assign(shared, { model: chunk.model, object: chunk.object });
    print({ chunk: ++count });
  }
  return { choices, ...shared };
}

for (const { kind, body } of calls) {
  try {
    if (kind === "models") {
      const models = [];
      for await (const model of client.models.list()) models.push({ id: model.id, object: model.object });
      print({ models });
    } else if (body.stream) print(await streamed(body));
    else print(whole(await client.chat.completions.create(body)));
  } catch (error) {
    print(seen(error));
  }
}
