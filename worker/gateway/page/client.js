// resumingFetch: a `fetch` whose event streams survive a gateway that is killed, restarted or unreachable for a while.
//   import { resumingFetch } from "https://gateway.example/client.js";
//   const openai = new OpenAI({ baseURL: "https://gateway.example/v1", apiKey, fetch: resumingFetch });
//
// It repeats a request with a cursor, so the gateway sends what is missing, and nothing comes twice:
//   POST …/chat/completions   Idempotency-Key names the answer; Relay-After is the number of `data:` frames received.
//   GET …/events              Last-Event-ID is the last `id:` received.
// Other requests, answers without a stream, and first answers that are not 2xx pass through untouched.

const BUSY = new Set([408, 409, 425, 429, 500, 502, 503, 504]); // a gateway or a proxy that may answer later
const INTERRUPTED = /^data: \{"error":.*"code": ?"interrupted"/m; // the gateway stops, and the answer goes on

// `limit`: ms to try without a byte. `silence`: ms without a byte that end a connection; comments come every 15 s.
export const withResume = ({ fetch: send = (...args) => fetch(...args), limit = 60_000, silence = 45_000 } = {}) => {
  const failed = new Map(); // keys of failed calls by body: an SDK that calls again wants the same answer
  return async (input, init = {}) => {
    const method = (init.method ?? input.method ?? "GET").toUpperCase();
    const { pathname } = new URL(input.url ?? input, globalThis.location?.href);
    const isChat = method === "POST" && pathname.endsWith("/chat/completions");
    if (!isChat && !(method === "GET" && pathname.endsWith("/events"))) return send(input, init);

    const signal = init.signal ?? input.signal;
    const stop = new AbortController(); // aborted by the caller's signal, and by a cancel of the body
    const abort = () => stop.abort(signal.reason);
    signal?.aborted ? abort() : signal?.addEventListener("abort", abort, { once: true });
    const request = new Request(input, init);
    const body = isChat ? await request.text() : undefined; // as text, which can be sent again
    const headers = new Headers(request.headers);
    if (failed.size > 100) failed.clear();
    if (isChat && !headers.has("idempotency-key")) {
      const again = Number(headers.get("x-stainless-retry-count")) > 0 && failed.get(body)?.shift();
      headers.set("idempotency-key", again || crypto.getRandomValues(new Uint32Array(4)).join("-"));
    }
    const remember = () => failed.set(body, [...(failed.get(body) ?? []), headers.get("idempotency-key")]);
    let [failures, failingSince] = [0, 0];
    const pause = async (error, patience = limit) => { // before the next try; throws if there is none
      failingSince ||= Date.now();
      if (stop.signal.aborted || error.isFinal || Date.now() - failingSince > patience) throw error;
      const backoff = Math.max(Math.min(5000, 50 * 2 ** failures++), Math.min(error.wait * 1000, 10_000) || 0);
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, backoff * (1 + Math.random() / 2));
        stop.signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
      });
    };
    const connect = async (first) => {
      for (;;) {
        try {
          const response = await send(input, { ...init, method, headers, body, signal: stop.signal });
          const isSame = !isChat || response.headers.get("x-request-id") === first?.headers.get("x-request-id");
          if (!first || (response.ok && isSame)) return response;
          response.body?.cancel();
          const about = { isFinal: !BUSY.has(response.status), wait: response.headers.get("retry-after") };
          throw Object.assign(new Error(`the stream broke and cannot go on: HTTP ${response.status}`), about);
        } catch (error) {
          await pause(error, first ? limit : limit / 6); // a wrong URL is reported sooner
        }
      }
    };
    const first = await connect().catch((error) => (remember(), Promise.reject(error)));
    if (BUSY.has(first.status)) remember(); // an SDK repeats the call after these
    const isStream = first.headers.get("content-type")?.startsWith("text/event-stream");
    if (!first.ok || !isStream || (isChat && !first.headers.has("x-request-id"))) return first;

    let [reader, decoder, text, isOver] = [first.body.getReader(), new TextDecoder(), "", false];
    const takeEvents = () => { // takes the whole events out of `text`, and moves the cursor behind them
      for (let taken = ""; ; ) {
        const event = /^[^]*?\n\n/.exec(text)?.[0];
        if (!event) return taken;
        if (INTERRUPTED.test(event)) return reader.cancel(), taken; // the next read ends, as after a cut
        [taken, text] = [taken + event, text.slice(event.length)];
        if (!/^data:/m.test(event)) continue; // a comment
        failures = 0;
        if (isChat) headers.set("relay-after", Number(headers.get("relay-after")) + 1);
        else headers.set("last-event-id", /^id: ?(.*)/m.exec(event)?.[1] ?? headers.get("last-event-id") ?? "");
        isOver ||= isChat && /^data: (\[DONE\]|\{"error":)/m.test(event);
      }
    };
    const pull = async (controller) => {
      for (let taken = ""; !taken; ) {
        try {
          const timer = setTimeout(() => reader.cancel(), silence);
          const { done, value } = await reader.read().finally(() => clearTimeout(timer));
          if (done) throw new Error("the stream ended too early");
          failingSince = 0;
          text += decoder.decode(value, { stream: true });
          if ((taken = takeEvents())) controller.enqueue(new TextEncoder().encode(taken));
        } catch (error) {
          if (isOver) return controller.close();
          await pause(error);
          const response = await connect(first);
          if (response.status === 204) return controller.close(); // the end of this log was received
          [reader, decoder, text] = [response.body.getReader(), new TextDecoder(), ""];
        }
      }
    };
    return new Response(new ReadableStream({ pull, cancel: (reason) => stop.abort(reason) }), first);
  };
};

export const resumingFetch = withResume();
