// Follows a request by EventSource, through cuts, up to its terminal entry.
import { EventSource } from "eventsource";
import { order, print } from "./lines.mjs";

const { base_url, calls } = await order();
const source = new EventSource(new URL(calls[0].path, base_url));
const ends = new Set(["done", "error", "cancelled"]);
const alive = setInterval(() => {}, 1000); // this package does not keep Node alive while it waits to reconnect
let [text, count] = ["", 0];
const ids = [];
source.onopen = () => print({ opened: true });
source.onerror = () => {
  if (source.readyState !== EventSource.CLOSED) return;
  print({ closed: true, text });
  clearInterval(alive);
};
source.onmessage = ({ data }) => {
  for (const entry of JSON.parse(data)) {
    ids.push(entry.id);
    if (entry.type === "restarted") text = "";
    if (entry.type === "delta") {
      text += entry.content ?? "";
      print({ chunk: ++count });
    }
    if (ends.has(entry.type)) {
      source.close();
      clearInterval(alive);
      print({ outcome: entry.type, text, ids });
    }
  }
};
