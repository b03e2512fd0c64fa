"""A long answer that has ended, opened in Chromium: the browser's own parsing and the page's share are in the time."""

import asyncio
import tempfile
from pathlib import Path

from browsers import run_browser, why_missing
from measure import percentile
from rig import RigFailed
from scenarios import Figures, Run

_OPENINGS = 7
_FOLLOW = """
new Promise((resolve, reject) => {
  const began = performance.now(), found = { events: 0, deltas: 0 };
  const source = new EventSource("/requests/%s/events?opening=%d");
  source.onerror = () => { source.close(); reject(new Error("the stream ended too early")); };
  source.onmessage = ({ data }) => {
    found.events += 1;
    for (const entry of JSON.parse(data)) {
      if (entry.type === "delta") found.deltas += 1;
      if (entry.type === "done") { source.close(); resolve({ ms: performance.now() - began, ...found }); }
    }
  };
})
"""


def opened_in_chromium(run: Run, port: int, request_id: str, deltas: int) -> Figures:
    """Milliseconds until a page has all of a log, and the number of its events. Empty without Chromium."""
    if why := why_missing("chromium"):
        run.note(f"the answer that is opened late is not opened in Chromium: {why}")
        return {}
    found = asyncio.run(_open(port, request_id))
    if {each["deltas"] for each in found} != {deltas}:
        raise RigFailed(f"a late page got {[each['deltas'] for each in found]} of {deltas:,} tokens")
    figures: Figures = {
        "edge_browser_ms": percentile([each["ms"] for each in found], 50),
        "edge_browser_frames": max(each["events"] for each in found),
    }
    run.show(f"  in Chromium: {figures['edge_browser_ms']:.0f} ms, {figures['edge_browser_frames']:.0f} frames")
    return figures


async def _open(port: int, request_id: str) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="vllm-relay-chromium-") as profile:
        async with run_browser("chromium", Path(profile)) as browser:
            tab = await browser.open(f"http://127.0.0.1:{port}/")
            return [await tab.evaluate(_FOLLOW % (request_id, number)) for number in range(_OPENINGS)]
