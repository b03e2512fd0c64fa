"""A callback ends what a task waits for, and a cancellation by somebody else stays one."""

import asyncio

import pytest

from worker.vllm.interrupt import TaskInterrupt


async def test_an_interrupt_raises_timeout_error_within_the_context() -> None:
    wait = TaskInterrupt()
    asyncio.get_running_loop().call_soon(wait.interrupt)
    with pytest.raises(TimeoutError):
        await _wait_forever(wait)
    assert wait.has_come
    await asyncio.sleep(0)  # the task goes on: nothing of the cancellation is left


async def test_an_interrupt_after_the_context_has_no_effect() -> None:
    wait = TaskInterrupt()
    with wait:
        pass
    wait.interrupt()
    await asyncio.sleep(0)
    assert not wait.has_come


async def test_the_context_can_be_entered_again_after_an_interrupt() -> None:
    wait = TaskInterrupt()
    asyncio.get_running_loop().call_soon(wait.interrupt)
    with pytest.raises(TimeoutError):
        await _wait_forever(wait)
    with wait:
        await asyncio.sleep(0)
    assert not wait.has_come


@pytest.mark.parametrize("interrupt_comes_first", [True, False])
async def test_a_cancellation_of_the_task_is_no_timeout(*, interrupt_comes_first: bool) -> None:
    wait = TaskInterrupt()
    task = asyncio.create_task(_wait_forever(wait))
    await asyncio.sleep(0)
    for act in (wait.interrupt, task.cancel) if interrupt_comes_first else (task.cancel, wait.interrupt):
        act()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _wait_forever(wait: TaskInterrupt) -> None:
    with wait:
        await asyncio.Event().wait()
