"""The names of every key and channel in Redis, all under one prefix."""

import re
from dataclasses import dataclass

GROUP = "workers"
"""The consumer group of every job stream."""

DEFAULT_QUEUE = "default"
"""The queue whose job stream has no suffix."""


def is_queue_name(text: str) -> bool:
    """Whether a text is a valid queue name: 1 to 64 characters of `A-Za-z0-9_-`."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) is not None


PAUSE = "pause:"
DRAIN = "drain:"
"""What the fields of the control hash begin with, before the name of a queue or of a worker."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one installation. Installations that share a Redis have different prefixes or databases."""

    prefix: str = "chat"
    database: int = 0

    def jobs(self, queue: str = DEFAULT_QUEUE) -> str:
        """The stream of waiting jobs of a queue."""
        return f"{self.prefix}:jobs" if queue == DEFAULT_QUEUE else f"{self.prefix}:jobs:{queue}"

    def tokens(self, request_id: str) -> str:
        """The token log of a request. The braces put it and its tombstone into one cluster slot."""
        return f"{self.prefix}:tokens:{{{request_id}}}"

    def ended(self, request_id: str) -> str:
        """The tombstone of a request: its outcome, kept longer than the log."""
        return f"{self.prefix}:ended:{{{request_id}}}"

    def feed(self, request_id: str) -> str:
        """The pub/sub channel that carries the log's entries as Redis accepts them.

        Pub/sub ignores databases, so the channel contains the number of the database. Without it, followers in one
        database would get the entries of another.
        """
        within = f"{self.database}:" if self.database else ""
        return f"{self.prefix}:feed:{within}{{{request_id}}}"

    @property
    def cancel(self) -> str:
        """The pub/sub channel of cancel hints, which are sent in addition to the seal. A message is a request id.

        All databases share the channel. A worker that gets a hint from another database reads its own log, which has
        no seal.
        """
        return f"{self.prefix}:cancel"

    def presence(self, worker: str) -> str:
        """The pub/sub channel to which only this worker subscribes. It shows that its connection to Redis is open.

        Nothing is published there. The name begins as those of the feeds, so that no user needs another right; it is no
        feed, since its end has no braces.
        """
        return f"{self.prefix}:feed:worker:{worker}"

    @property
    def lifecycle(self) -> str:
        """The stream of the starts and ends of all requests. Workers remove its oldest records."""
        return f"{self.prefix}:lifecycle"

    @property
    def lifecycle_losses(self) -> str:
        """The hash of the number of records that each group of the lifecycle has lost, in the lifecycle's slot."""
        return f"{self.prefix}:lost:{{{self.lifecycle}}}"

    @property
    def dead(self) -> str:
        """The capped stream of dead letters."""
        return f"{self.prefix}:dead"

    @property
    def workers(self) -> str:
        """The hash with one field for each live worker."""
        return f"{self.prefix}:workers"

    @property
    def control(self) -> str:
        """The hash of what operators ask of the workers, and the pub/sub channel of hints for workers.

        A field is `pause:<queue>` or `drain:<worker>`, its value a `ControlEntry`. A hint is the field that
        has changed, or `handed-over` when jobs were. All databases share the channel: a hint only means that workers
        should look.
        """
        return f"{self.prefix}:control"

    @property
    def queues(self) -> str:
        """The set of the names of all queues that a producer or a worker has used."""
        return f"{self.prefix}:queues"

    @property
    def probe(self) -> str:
        """A stream that never exists: an XADD NOMKSTREAM to it shows whether Redis accepts writes."""
        return f"{self.prefix}:probe"

    @property
    def gateways(self) -> str:
        """The pub/sub channel over which the processes of gateways ask each other whose client is still connected.

        Its name begins as those of the feeds, so that no user needs another right. All databases share the channel.
        """
        return f"{self.prefix}:feed:gateways"

    # Keys of the gateway. All have an expiry; without them it would only limit and remember less.

    @property
    def gateway_processes(self) -> str:
        """The sorted set of the records of gateway processes, for operators; a score is when it was renewed (Unix ms).

        Its name begins as those below, so that the gateway's user needs no other right.
        """
        return f"{self.prefix}:gateway:processes"

    def asked(self, fingerprint: str) -> str:
        """The young requests of a gateway with one owner and body, which a retry may attach to: id and Unix ms."""
        return f"{self.prefix}:gateway:asked:{{{fingerprint}}}"

    def unanswered(self, fingerprint: str) -> str:
        """Those of them of which no byte was sent, which a browser's hidden re-send may attach to."""
        return f"{self.prefix}:gateway:unanswered:{{{fingerprint}}}"

    def running(self, owner: str) -> str:
        """The requests of an owner (a hash) that have not been seen to end: id and Unix ms of the start."""
        return f"{self.prefix}:gateway:running:{{{owner}}}"

    def waiting(self, owner: str) -> str:
        """Those of them that have not been seen to start."""
        return f"{self.prefix}:gateway:waiting:{{{owner}}}"

    def rate(self, owner: str, minute: int) -> str:
        """The number of requests of an owner (a hash) in a minute since 1970."""
        return f"{self.prefix}:gateway:rate:{{{owner}}}:{minute}"
