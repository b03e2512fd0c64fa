// Follows a request by EventSource, through cuts, up to its terminal entry.
import { EventSource } from "eventsource";
import { order, print } from "./lines.mjs";

const { base_url, calls } = await order();
const source = new EventSource(new URL(calls[0].path, base_url));
const ends = new Set(["done", "error", "cancelled"]);
let [text, count] = ["", 0];
const ids = [];
source.onopen = () => print({ opened: true });
source.onerror = () => {
  if (source.readyState === EventSource.CLOSED) print({ closed: true, text });
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
      print({ outcome: entry.type, text, ids });
    }
  }
};
