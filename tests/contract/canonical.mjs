// Another implementation of RFC 8785: for a JSON list of {"json": <text>} on standard input, the canonical form of each
// text and its SHA-256 on standard output. This is how the vectors are made; a new one is a line with its `json`:
//   npm install --prefix /tmp/jcs canonicalize@5.1.0
//   export CANONICALIZE=/tmp/jcs/node_modules/canonicalize/lib/canonicalize.js
//   node canonical.mjs < canonical.json > new.json && mv new.json canonical.json
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { default: canonicalize } = await import(pathToFileURL(process.env.CANONICALIZE).href);
const vectors = JSON.parse(readFileSync(0, "utf8")).map(({ json }) => {
  const canonical = canonicalize(JSON.parse(json));
  return JSON.stringify({ json, canonical, sha256: createHash("sha256").update(canonical).digest("hex") });
});
console.log(`[\n${vectors.join(",\n")}\n]`);
