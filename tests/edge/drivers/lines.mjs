// One order as JSON on standard input; what happens as JSON lines on standard output.

export async function order() {
  let text = "";
  for await (const piece of process.stdin) text += piece;
  return JSON.parse(text);
}

export const print = (line) => process.stdout.write(JSON.stringify(line) + "\n");

// Adds the delta of a chat.completion.chunk to the choices so far.
export function add(choices, chunk) {
  for (const piece of chunk.choices ?? []) {
    const whole = (choices[piece.index] ??= { content: "", reasoning: "", tool_calls: [], finish_reason: null, logprobs: null });
    const delta = piece.delta ?? {};
    whole.content += delta.content ?? "";
    whole.reasoning += delta.reasoning ?? delta.reasoning_content ?? "";
    for (const call of delta.tool_calls ?? []) {
      const one = (whole.tool_calls[call.index] ??= { type: call.type, name: "", arguments: "" });
      one.name += call.function?.name ?? "";
      one.arguments += call.function?.arguments ?? "";
    }
    whole.finish_reason = piece.finish_reason ?? whole.finish_reason;
    if (piece.logprobs?.content) (whole.logprobs ??= []).push(...piece.logprobs.content);
  }
}

// The error as a program sees it: the fields that a caller may branch on.
export const seen = (error) => ({
  error: {
    kind: error.constructor.name,
    status: error.status ?? error.statusCode ?? null,
    message: String(error.error?.message ?? error.message ?? error),
    type: error.type ?? null,
    code: error.code ?? null,
    param: error.param ?? null,
  },
});
