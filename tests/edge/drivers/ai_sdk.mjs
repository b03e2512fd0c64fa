// Calls a server by AI SDK and its provider for servers that are compatible with OpenAI.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";
import { order, print, seen } from "./lines.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const { base_url, api_key, retries, headers, calls, client_js } = await order();
// Node reads a file named .js as CommonJS, so it is imported from its text.
const { resumingFetch: fetch } = client_js ? await import(`data:text/javascript,${encodeURIComponent(client_js)}`) : {};

// A body of OpenAI's API as the arguments of AI SDK, which builds such a body from them again.
function asked({ model, messages, tools, tool_choice, stream, stream_options, ...rest }) {
  const provider = createOpenAICompatible({
    name: "server",
    baseURL: base_url,
    apiKey: api_key,
    headers,
    fetch,
    includeUsage: Boolean(stream_options?.include_usage),
    transformRequestBody: (body) => ({ ...body, ...rest }),
  });
  const named = (tools ?? []).map(({ function: { name, description, parameters } }) => [
    name,
    tool({ description, inputSchema: jsonSchema(parameters) }),
  ]);
  const more = tools ? { tools: Object.fromEntries(named) } : {};
  if (tool_choice?.function) more.toolChoice = { type: "tool", toolName: tool_choice.function.name };
  return { model: provider(model), messages, maxRetries: retries, ...more };
}

const counts = ({ inputTokens, outputTokens, totalTokens }) => ({ inputTokens, outputTokens, totalTokens });
const calledTools = (all) => all.map(({ toolName, input }) => ({ name: toolName, arguments: input }));

async function streamed(body) {
  let [text, reasoning, count, failure, end] = ["", "", 0, null, {}];
  const tools = [];
  for await (const part of streamText({ ...asked(body), onError: () => {} }).fullStream) {
    if (part.type === "text-delta") text += part.text;
    if (part.type === "reasoning-delta") reasoning += part.text;
    if (part.type === "tool-call") tools.push(part);
    if (part.type === "error") failure = part.error;
    if (part.type === "finish") end = { finish_reason: part.finishReason, usage: counts(part.totalUsage) };
    if (part.type.endsWith("-delta")) print({ chunk: ++count });
  }
  return { text, reasoning, tools: calledTools(tools), ...end, ...(failure ? seen(failure) : {}) };
}

async function whole(body) {
  const { text, reasoningText, toolCalls, finishReason, usage } = await generateText(asked(body));
  return {
    text,
    reasoning: reasoningText ?? "",
    tools: calledTools(toolCalls),
    finish_reason: finishReason,
    usage: counts(usage),
  };
}

for (const { body } of calls) {
  try {
    print(await (body.stream ? streamed : whole)(body));
  } catch (error) {
    print(seen(error));
  }
}
