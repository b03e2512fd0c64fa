"""What must hold of every request once it has ended, judged from Redis and from the simulators' own record alone.

It reads logs by the contract's rules with code of its own, and compares sequences: a token that is there twice shows,
as one that lacks does. Of the upstream starts of a request it holds that never more were going on at once than the log
has attempts, and that each shows in the log: as the one of its attempt, or as a further `opened`. What came to nothing
(refused, broken by the server or by its death, closed before its first delta) need not show, since it is tried again
without a word. What a worker on a busy machine gave up by its limits before it had read of it does not show either:
such starts are counted as given up, for the soak to hold against the number of jobs.
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
"""The request by which a worker tries out a server at which jobs have failed. No job has it: each has a temperature."""

Fields = Mapping[str, str]


class Violation(NamedTuple):
    """Something that must not be. `what` is its class: lost, duplicated, different, or the rule that is broken."""

    what: str
    id: str
    detail: str


class Evidence(msgspec.Struct, kw_only=True):
    """What is left of a request."""

    log: Sequence[tuple[str, Fields]] = ()
    log_expiry: int = -2
    """Milliseconds, as PTTL has it: -1 is for ever, -2 is no key."""
    tombstone: str = ""
    tombstone_expiry: int = -2
    starts: Sequence[Served] = ()
    """The record of each request to a simulator, the last line of each."""
    finished: Sequence[Fields] = ()
    """Its `finished` lines of the lifecycle."""
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
    """Starts beyond those that the log shows, one after the other."""
    deltas: int = 0
    violations: list[Violation] = msgspec.field(default_factory=list)

    def count(self, what: str) -> int:
        """How many requests were lost, or duplicated, or whatever else."""
        return len({violation.id for violation in self.violations if violation.what == what})


class _Choice:
    """What the kept deltas of one choice come to."""

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
    def said(self) -> tuple[str, str, str]:
        return self.content, self.reasoning, self.arguments


def check(plan: Plan, evidence: Evidence, tally: Tally) -> None:
    """Hold the evidence against the plan; what is found goes into the tally."""
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
            self._wrong("lost", "never ended")
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
        """Go through the log as a reader does, with an eye on every id."""
        attempt, n = 0, 1  # `queued` is 0-1
        for entry_id, fields in entries:
            here = _parsed(entry_id)
            kind = fields.get("type", "")
            if here not in {(attempt, n), (attempt + 1, 0)}:
                self._wrong("ids", f"{entry_id} ({kind}) where {attempt}-{n} or {attempt + 1}-0 is due")
            (attempt, n) = here
            place = {"queued": here == (0, 1), "started": here == (1, 0), "claimed": attempt > 1 and n == 0}
            if not place.get(kind, n > 0):
                self._wrong("ids", f"{kind} at {entry_id}")
            if kind in {"resumed", "restarted"} and n != 1:
                self._wrong("ids", f"{kind} at {entry_id}")
            n += 1
            self._take(here, kind, fields)
        self._attempts = attempt

    def _take(self, here: tuple[int, int], kind: str, fields: Fields) -> None:
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
                self._wrong("duplicated", f"resumed after {fields['after']}, which drops text that was shown")
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
            told = f"choice {index}"
            self._compare(f"{told}, token ids", choice.token_ids, expected.token_ids, whole=whole)
            for name, mine, theirs in zip(Expected._fields, choice.said, expected[:3], strict=False):
                self._compare(f"{told}, {name}", mine, theirs, whole=whole)
            if choice.after_end or choice.ends > 1:
                self._wrong("duplicated", f"{told} goes on after its end")
            if whole:
                self._compare(f"{told}, logprobs", choice.logprobs, expected.logprobs, whole=True)
                ends = (choice.finish_reason, choice.stop_reason)
                if ends != (expected.finish_reason, expected.stop_reason):
                    self._wrong("different", f"{told} ended by {ends}, not {expected[-2:]}")
        if choices:
            self._wrong("different", f"choices {sorted(choices)} that nobody asked for")

    def _compare(self, where: str, mine: Sequence[object], theirs: Sequence[object], *, whole: bool) -> None:
        if not whole:  # one that did not come to its end is as long as it is
            theirs = theirs[: len(mine)]
        if mine == theirs:
            return
        pairs = enumerate(zip(mine, theirs, strict=False))
        place = next((at for at, (said, due) in pairs if said != due), min(len(mine), len(theirs)))
        self._wrong(_difference(mine, theirs), f"{where}: {len(mine)} of {len(theirs)}, apart from {place} on")

    def _check_usage(self, outcome: str, seal: Fields) -> None:
        """The lifecycle tells once how the request ended, with the usage that the log shows."""
        told = {(line.get("attempt"), line.get("outcome"), line.get("usage", "{}")) for line in self._evidence.finished}
        if len(told) != 1:
            self._wrong("lifecycle", f"{len(told)} different `finished` lines: {sorted(map(str, told))}"[:300])
            return
        ((attempt, ended, usage),) = told
        shown = msgspec.json.decode(seal.get("usage", "{}")) or self._counted()
        if (attempt, ended) != (str(self._attempts), outcome):
            self._wrong("lifecycle", f"says attempt {attempt}, {ended}; the log {self._attempts}, {outcome}")
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
            self._wrong("tombstone", f"{evidence.tombstone} of a log that ended {outcome}")
        letters = Counter((letter.get("queue"), letter.get("job")) for letter in evidence.letters)
        if bool(letters) != self._plan.buried or any(count > 1 for count in letters.values()):
            self._wrong("dead letters", f"{dict(letters)}")

    def _check_starts(self) -> None:
        self._tally.starts += len(self._evidence.starts)
        counting = [start for start in self._evidence.starts if not came_to_nothing(start)]
        opened = Counter(attempt for attempt, _ in self._opened)
        shown = sum(max(1, opened[attempt]) for attempt in range(1, self._attempts + 1))
        self._tally.given_up += max(0, len(counting) - shown)
        if _at_once(counting) > max(1, self._attempts):
            told = [
                (start.started, start.ended, start.chunks, start.finished, start.closed_early) for start in counting
            ]
            self._wrong("starts", f"more upstream starts at once than attempts ({self._attempts}): {told}")
        for start in self._evidence.starts:
            # One that was given tokens and did not go on after them ends by the limits of what was left.
            given = "kv_transfer_params" in start.request
            if start.finished and not start.after and not given and self._plan.choices:
                sent = [tuple(texts) for texts in zip(start.texts, start.reasonings, start.arguments, strict=True)]
                if sent != [choice[:3] for choice in self._plan.choices]:
                    self._wrong("simulator", "sent another answer than the one expected")


def is_own_trial(start: Served) -> bool:
    """Whether an upstream start is a worker's own and belongs to no job."""
    return start.route == "/v1/chat/completions" and start.request == OWN_TRIAL


def came_to_nothing(start: Served) -> bool:
    """Whether an upstream start may be tried again in the same attempt, without a word in the log."""
    ignored = "kv_transfer_params" in start.request and not start.after
    broken = start.ended is None or start.status != 200 or start.fault not in {None, "no_done"}
    return broken or ignored or not start.chunks


def _at_once(starts: Sequence[Served]) -> int:
    """How many were going on at the same time, at most."""
    spans = [(start.started, start.ended or 0.0) for start in starts]
    return max((sum(begin <= moment < end for begin, end in spans) for moment, _ in spans), default=0)


def _difference(mine: Sequence[object], theirs: Sequence[object]) -> str:
    if len(mine) < len(theirs):
        return "lost"
    return "duplicated" if len(mine) > len(theirs) else "different"


def _parsed(entry_id: str) -> tuple[int, int]:
    attempt, _, n = entry_id.partition("-")
    return int(attempt), int(n)
