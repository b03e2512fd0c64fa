"""Reading Redis's refusals of an entry."""

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from worker.broker.log_scripts import is_id_taken
from worker.contract.ids import SEAL

KEY = "chat:tokens:{r}"


@pytest.mark.parametrize("last", ["1-5", str(SEAL)])
@pytest.mark.parametrize("refused", ["1-4", "1-5"])
async def test_redis_refuses_an_id_that_is_not_greater_than_the_last(redis: Redis, last: str, refused: str) -> None:
    await redis.xadd(KEY, {"type": "delta"}, id=last)
    await redis.expire(KEY, 60)
    with pytest.raises(ResponseError) as caught:
        await redis.xadd(KEY, {"type": "delta"}, id=refused)
    assert is_id_taken(caught.value)


@pytest.mark.parametrize("text", ["equal or smaller", "exhausted the last possible ID"])
async def test_a_text_that_another_error_quotes_is_no_such_refusal(redis: Redis, text: str) -> None:
    with pytest.raises(ResponseError) as caught:
        await redis.execute_command("NO_XADD", KEY, "1-6", "content", text)  # type: ignore[no-untyped-call]
    assert text in str(caught.value), "Redis quotes the arguments of a command that it does not know"
    assert not is_id_taken(caught.value)
