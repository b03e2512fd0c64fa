"""The end of an ordinary job by one script: seal, expiry, tombstone, lifecycle, feed, acknowledgement."""

from itertools import chain

from redis.exceptions import RedisError

from ..contract.entries import Terminal, to_fields, to_json
from ..contract.ids import SEAL
from ..contract.keys import GROUP, Keys
from ..contract.records import Lifecycle, Tombstone
from ..redisio.batching import CommandBatcher
from ..redisio.scripts import Script
from .cluster_publisher import AnyPublisher
from .feed import encode
from .job_queue import Delivery
from .lifecycle import LifecycleWriter
from .log_writer import LogWriter
from .publisher import Publisher

_END = Script(f"""
local last = call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not last or last[1] ~= ARGV[1] or call('XLEN', KEYS[1]) ~= tonumber(ARGV[2]) then return 0 end
local record = 12 + ARGV[11]
call('XADD', KEYS[1], 'NOMKSTREAM', '{SEAL}', unpack(ARGV, 12, record - 1))
call('EXPIRE', KEYS[1], ARGV[3])
call('SET', ARGV[4], ARGV[5], 'EX', ARGV[6])
call('XADD', unpack(ARGV, record))
if ARGV[8] ~= '' then call('PUBLISH', ARGV[7], ARGV[8]) end
call('XACK', ARGV[9], '{GROUP}', ARGV[10])
return 1
""")
"""Ends a job, up to the first command that Redis refuses, if the log ends as its owner knows it: the seal's fence.

KEYS is the log. ARGV: the id of the last entry and the number of entries that the log must have; seconds until it
expires; the tombstone's key, the tombstone, and seconds until that expires; the feed's channel and the message to it,
empty for none; the job's stream and id; the number of words of the seal, and these; the words of the XADD to the
lifecycle. Returns 1 when all commands were executed, 0 when none was.

The other keys are no KEYS: Redis would refuse the whole call to a user who has no right to the lifecycle. Each argument
costs Redis time, so ARGV has no words that the script knows.
"""


class JobEnder:
    """Ends jobs that this process has answered.

    It ends none in a cluster, whose keys are on several servers, and none if `replicas` must have the end of a log
    before its job is acknowledged.
    """

    def __init__(
        self, batcher: CommandBatcher, keys: Keys, lifecycle: LifecycleWriter, publisher: AnyPublisher,
        replicas: int = 0,
    ) -> None:  # fmt: skip
        self._batcher = batcher
        self._keys = keys
        self._lifecycle = lifecycle
        self._feed = publisher.feed if isinstance(publisher, Publisher) and not replicas else None

    async def end(
        self, log: LogWriter, delivery: Delivery, end: Terminal, record: Lifecycle, tombstone: Tombstone,
        *, retention: int, remember: int,
    ) -> bool:  # fmt: skip
        """Do all steps at the end of a job, in their order, if all entries of the log are written.

        The seal is not read again before the acknowledgement: Redis has executed both in one step, and its replicas
        get both or neither. `retention` and `remember` are seconds.

        Returns false if not all steps are known to be done, for any reason. The caller then does them one by one, and
        finds those that are done. Redis may have the lifecycle's record twice then.
        """
        if self._feed is None:
            return False
        seal = to_fields(end)
        ended, jobs = self._keys.ended(log.request_id), self._keys.jobs(delivery.queue)
        unpublished = self._feed.take_unpublished(log)
        message = "" if unpublished is None else encode([*unpublished, (str(SEAL), seal)]).decode()
        arguments = (
            *(str(log.accepted), str(log.length), str(retention)),
            *(ended, to_json(tombstone), str(remember)),
            *(log.feed, message),
            *(jobs, delivery.id),
            *(str(2 * len(seal)), *chain(*seal.items())),
            *self._lifecycle.words(record),
        )
        try:
            if await _END.run(self._batcher, [log.key], arguments):
                return True
        except (RedisError, OSError):  # who does the steps one by one gets the error again, and handles it
            pass
        if unpublished:
            self._feed.publish(log.feed, unpublished)
        return False
