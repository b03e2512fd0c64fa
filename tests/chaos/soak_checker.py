"""Checks every request that has ended, from the contents of Redis and the simulators' own records alone.

The checker reads logs by the contract's rules with code of its own, and compares sequences, so it finds missing tokens
and repeated ones.

It also checks the upstream starts of a request. No more of them run at once than the log has attempts. Each appears in
the log: as the start of its attempt, or as a further `opened`. A start without a result (refused, broken off by the
server or by its death, closed before its first delta) need not appear, since the worker repeats it without an entry.
A start does not appear either if a worker on a busy machine gave it up at a time limit before it read anything. Such
starts are counted as given up, and the soak compares their number with the number of jobs.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from soak_jobs import Expected, Plan

from worker.sandbox.simulator.record import Served

__all__ = ["Evidence", "Tally", "Violation", "check", "is_own_trial"]

SEAL = "18446744073709551615-18446744073709551615"
TERMINAL = {"done", "error", "cancelled"}
OWN_TRIAL = {
    "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "model": "reciter",
    "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True},
}  # fmt: skip
"""With this request a worker tests a server at which jobs have failed. No job equals it: each has a temperature."""

Fields = Mapping[str, str]


class Violation(NamedTuple):
    """A breach of the promise. `what` is its class: lost, duplicated, different, or the rule that is broken."""

    what: str
    id: str
    detail: str


class Evidence(msgspec.Struct, kw_only=True):
    """Everything that Redis and the simulators hold of a request."""

    log: Sequence[tuple[str, Fields]] = ()
    log_expiry: int = -2
    """Milliseconds, as PTTL returns them: -1 for a key without an expiry, -2 for no key."""
    tombstone: str = ""
    tombstone_expiry: int = -2
    starts: Sequence[Served] = ()
    """The last record of each request to a simulator."""
    finished: Sequence[Fields] = ()
    """Its `finished` entries of the lifecycle."""
    letters: Sequence[Fields] = ()
    """Its dead letters."""


class Tally(msgspec.Struct, kw_only=True):
    """Sums over all requests."""

    outcomes: Counter[str] = msgspec.field(default_factory=Counter)
    attempts: int = 0
    resumed: int = 0
    restarted: int = 0
    starts: int = 0
    given_up: int = 0
    """Starts that the log does not show."""
    deltas: int = 0
    violations: list[Violation] = msgspec.field(default_factory=list)

    def count(self, what: str) -> int:
        """How many requests have a violation of this class."""
        return len({violation.id for violation in self.violations if violation.what == what})


class _Choice:
    """The sum of the deltas of one choice that were kept."""

    def __init__(self, deltas: Iterable[Fields]) -> None:
        self.content = self.reasoning = self.arguments = self.finish_reason = ""
        self.stop_reason: object = None
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []
        self.ends = 0
        self.after_end = False
        for delta in deltas:
            self.after_end = self.after_end or self.ends > 0
            self.content += delta.get("content", "")
            self.reasoning += delta.get("reasoning", "")
            for call in msgspec.json.decode(delta.get("tool_calls", "[]")):
                self.arguments += (call.get("function") or {}).get("arguments") or ""
            self.token_ids += msgspec.json.decode(delta.get("token_ids", "[]"))
            self.logprobs += msgspec.json.decode(delta.get("logprobs", "{}")).get("content") or []
            self.finish_reason = delta.get("finish_reason", self.finish_reason)
            self.stop_reason = msgspec.json.decode(delta.get("stop_reason", msgspec.json.encode(self.stop_reason)))
            self.ends += "finish_reason" in delta

    @property
    def texts(self) -> tuple[str, str, str]:
        return self.content, self.reasoning, self.arguments


def check(plan: Plan, evidence: Evidence, tally: Tally) -> None:
    """Compare the evidence with the plan, and add the results to the tally."""
    _Check(plan, evidence, tally).run()


class _Check:
    def __init__(self, plan: Plan, evidence: Evidence, tally: Tally) -> None:
        self._plan = plan
        self._evidence = evidence
        self._tally = tally
        self._attempts = 0
        self._kept: list[tuple[tuple[int, int], Fields]] = []
        self._opened: list[tuple[int, Fields]] = []

    def _wrong(self, what: str, detail: object) -> None:
        self._tally.violations.append(Violation(what, self._plan.id, f"{self._plan.kind}: {detail}"))

    def run(self) -> None:
        log = list(self._evidence.log)
        seals = [fields for entry_id, fields in log if entry_id == SEAL]
        if len(seals) != 1 or log[-1][0] != SEAL:
            self._wrong("no seal", f"{len(log)} entries, {len(seals)} seals")
            self._wrong("lost", "it did not end")
            return
        (seal,) = seals
        self._read(log[:-1])
        outcome = seal.get("type", "")
        self._tally.outcomes[outcome] += 1
        self._tally.attempts += self._attempts
        self._check_outcome(outcome, seal)
        if outcome == "done" or self._plan.choices:
            self._check_text(whole=outcome == "done")
        self._check_usage(outcome, seal)
        self._check_leftovers(outcome)
        self._check_starts()

    def _read(self, entries: list[tuple[str, Fields]]) -> None:
        """Read the log as a reader does, and check every id."""
        attempt, n = 0, 1  # `queued` is 0-1
        for entry_id, fields in entries:
            here = _parsed(entry_id)
            kind = fields.get("type", "")
            if here not in {(attempt, n), (attempt + 1, 0)}:
                self._wrong("ids", f"{entry_id} ({kind}) where {attempt}-{n} or {attempt + 1}-0 must come")
            (attempt, n) = here
            place = {"queued": here == (0, 1), "started": here == (1, 0), "claimed": attempt > 1 and n == 0}
            if not place.get(kind, n > 0):
                self._wrong("ids", f"{kind} at {entry_id}")
            if kind in {"resumed", "restarted"} and n != 1:
                self._wrong("ids", f"{kind} at {entry_id}")
            n += 1
            self._add(here, kind, fields)
        self._attempts = attempt

    def _add(self, here: tuple[int, int], kind: str, fields: Fields) -> None:
        self._tally.resumed += kind == "resumed"
        self._tally.restarted += kind == "restarted"
        if kind == "delta":
            self._tally.deltas += 1
            self._kept.append((here, fields))
        elif kind == "opened":
            self._opened.append((here[0], fields))
        elif kind == "restarted":
            self._kept.clear()
        elif kind == "resumed":
            after = _parsed(fields["after"])
            dropped = [delta for where, delta in self._kept if where > after]
            if any(delta.get(name) for delta in dropped for name in ("content", "reasoning", "tool_calls")):
                self._wrong("duplicated", f"resumed after {fields['after']}, which drops published text")
            self._kept = [(where, delta) for where, delta in self._kept if where <= after]
        elif kind in TERMINAL:
            self._wrong("second end", f"{kind} at {here}")

    def _check_outcome(self, outcome: str, seal: Fields) -> None:
        plan = self._plan
        if outcome not in plan.outcomes:
            self._wrong("outcome", f"{outcome} {seal.get('code', '')} {seal.get('message', '')}"[:200])
        elif outcome == "error" and seal.get("code") not in plan.codes:
            self._wrong("outcome", f"error of code {seal.get('code')}")
        if outcome == "done" and seal.get("attempt") != str(self._attempts):
            self._wrong("seal", f"of attempt {seal.get('attempt')} after {self._attempts} attempts")

    def _choices(self) -> dict[int, _Choice]:
        indices = {int(delta.get("index", 0)) for _, delta in self._kept}
        return {
            index: _Choice(delta for _, delta in self._kept if int(delta.get("index", 0)) == index) for index in indices
        }

    def _check_text(self, *, whole: bool) -> None:
        choices = self._choices()
        for index, expected in enumerate(self._plan.choices):
            choice = choices.pop(index, _Choice(()))
            name_of_choice = f"choice {index}"
            self._compare(f"{name_of_choice}, token ids", choice.token_ids, expected.token_ids, whole=whole)
            for name, mine, theirs in zip(Expected._fields, choice.texts, expected[:3], strict=False):
                self._compare(f"{name_of_choice}, {name}", mine, theirs, whole=whole)
            if choice.after_end or choice.ends > 1:
                self._wrong("duplicated", f"{name_of_choice} continues after its end")
            if whole:
                self._compare(f"{name_of_choice}, logprobs", choice.logprobs, expected.logprobs, whole=True)
                ends = (choice.finish_reason, choice.stop_reason)
                if ends != (expected.finish_reason, expected.stop_reason):
                    self._wrong("different", f"{name_of_choice} ended with {ends}, not {expected[-2:]}")
        if choices:
            self._wrong("different", f"choices {sorted(choices)} that were not requested")

    def _compare(self, where: str, mine: Sequence[object], theirs: Sequence[object], *, whole: bool) -> None:
        if not whole:  # an answer that was cut short is a beginning of the expected one
            theirs = theirs[: len(mine)]
        if mine == theirs:
            return
        pairs = enumerate(zip(mine, theirs, strict=False))
        place = next((at for at, (got, due) in pairs if got != due), min(len(mine), len(theirs)))
        self._wrong(_difference(mine, theirs), f"{where}: {len(mine)} of {len(theirs)}, different from {place} on")

    def _check_usage(self, outcome: str, seal: Fields) -> None:
        """The lifecycle has one end of the request, with the usage that the log shows."""
        ends = {(end.get("attempt"), end.get("outcome"), end.get("usage", "{}")) for end in self._evidence.finished}
        if len(ends) != 1:
            self._wrong("lifecycle", f"{len(ends)} different `finished` entries: {sorted(map(str, ends))}"[:300])
            return
        ((attempt, ended, usage),) = ends
        shown = msgspec.json.decode(seal.get("usage", "{}")) or self._counted()
        if (attempt, ended) != (str(self._attempts), outcome):
            self._wrong(
                "lifecycle", f"attempt {attempt}, {ended} there; attempt {self._attempts}, {outcome} in the log"
            )
        if msgspec.json.decode(usage or "{}") != shown:
            self._wrong("usage", f"{usage} in the lifecycle, {shown} in the log")
        if outcome == "done":
            counted = {name: shown.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
            completion = sum(len(choice.token_ids) for choice in self._plan.choices)
            prompt = self._plan.prompt_tokens
            due = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
            if counted != due:
                self._wrong("usage", f"{counted}, not {due}")

    def _counted(self) -> dict[str, int]:
        completion = sum(len(msgspec.json.decode(delta.get("token_ids", "[]"))) for _, delta in self._kept)
        prompt = int(self._opened[-1][1].get("prompt_tokens", 0)) if self._opened else 0
        if not completion or not prompt:
            return {}
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _check_leftovers(self, outcome: str) -> None:
        evidence = self._evidence
        if evidence.log_expiry < 0 or evidence.tombstone_expiry < 0:
            self._wrong("expiry", f"log {evidence.log_expiry} ms, tombstone {evidence.tombstone_expiry} ms")
        elif msgspec.json.decode(evidence.tombstone).get("outcome") != outcome:
            self._wrong("tombstone", f"{evidence.tombstone} for a log that ended with {outcome}")
        letters = Counter((letter.get("queue"), letter.get("job")) for letter in evidence.letters)
        if bool(letters) != self._plan.buried or any(count > 1 for count in letters.values()):
            self._wrong("dead letters", f"{dict(letters)}")

    def _check_starts(self) -> None:
        self._tally.starts += len(self._evidence.starts)
        counting = [start for start in self._evidence.starts if not had_no_result(start)]
        opened = Counter(attempt for attempt, _ in self._opened)
        shown = sum(max(1, opened[attempt]) for attempt in range(1, self._attempts + 1))
        self._tally.given_up += max(0, len(counting) - shown)
        if _at_once(counting) > max(1, self._attempts):
            spans = [
                (start.started, start.ended, start.chunks, start.finished, start.closed_early) for start in counting
            ]
            self._wrong("starts", f"more upstream starts at once than attempts ({self._attempts}): {spans}")
        for start in self._evidence.starts:
            # A start that got token ids and ignored them ends at the limits that were left.
            given = "kv_transfer_params" in start.request
            if start.finished and not start.after and not given and self._plan.choices:
                sent = [tuple(texts) for texts in zip(start.texts, start.reasonings, start.arguments, strict=True)]
                if sent != [choice[:3] for choice in self._plan.choices]:
                    self._wrong("simulator", "it sent another answer than the expected one")


def is_own_trial(start: Served) -> bool:
    """Whether an upstream start is a worker's own test of a server, which belongs to no job."""
    return start.route == "/v1/chat/completions" and start.request == OWN_TRIAL


def had_no_result(start: Served) -> bool:
    """Whether the worker may repeat an upstream start in the same attempt, without an entry in the log."""
    ignored = "kv_transfer_params" in start.request and not start.after
    broken = start.ended is None or start.status != 200 or start.fault not in {None, "no_done"}
    return broken or ignored or not start.chunks


def _at_once(starts: Sequence[Served]) -> int:
    """How many starts ran at the same time, at most."""
    spans = [(start.started, start.ended or 0.0) for start in starts]
    return max((sum(begin <= moment < end for begin, end in spans) for moment, _ in spans), default=0)


def _difference(mine: Sequence[object], theirs: Sequence[object]) -> str:
    if len(mine) < len(theirs):
        return "lost"
    return "duplicated" if len(mine) > len(theirs) else "different"


def _parsed(entry_id: str) -> tuple[int, int]:
    attempt, _, n = entry_id.partition("-")
    return int(attempt), int(n)
