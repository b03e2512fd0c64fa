// Calls the server of the page by fetch, and by the openai client. What comes of the calls stands in `window.results`.
import OpenAI from "openai";

const ai = new OpenAI({ baseURL: `${location.origin}/v1`, apiKey: "none", maxRetries: 2, dangerouslyAllowBrowser: true });
const delta = (chunk) => chunk.choices[0]?.delta.content ?? "";

async function* chunksOf(response) {
  let [rest, isWhole] = ["", false];
  for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events.filter((event) => event.startsWith("data: "))) {
      if (event === "data: [DONE]") isWhole = true;
      else yield JSON.parse(event.slice(6));
    }
  }
  if (!isWhole) throw new Error("the stream ended without [DONE]");
}

const calls = {
  async fetch(body, signal) {
    const init = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal };
    const response = await fetch("/v1/chat/completions", init);
    if (!response.ok) throw new Error(`status ${response.status}`);
    return body.stream ? chunksOf(response) : response.json();
  },
  openai: (body, signal) => ai.chat.completions.create(body, { signal }),
};

// Begins a call; `stop` aborts it after its first text. The result has the text and, if the call failed, the error.
window.start = async (client, body, { stop = false } = {}) => {
  const [stopping, result] = [new AbortController(), { text: "", error: "" }];
  try {
    const answer = await calls[client](body, stopping.signal);
    if (!body.stream) result.text = answer.choices[0].message.content;
    else
      for await (const chunk of answer) {
        result.text += delta(chunk);
        if (stop && result.text) stopping.abort();
      }
  } catch (error) {
    result.error = `${error.constructor.name}: ${error.message}`;
  }
  window.results.push(result);
};
window.results = [];
