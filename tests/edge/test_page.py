"""The page in Chromium and Firefox, with a gateway as a process, a worker, and the simulated vLLM."""

import json
import signal

import httpx
import pytest
from browsers import Browser, Tab
from conftest import StartSimulator, StartWorker
from edge_fixtures import StartReplica
from redis.asyncio import Redis
from replicas import Replica
from steered_clock import SteeredClock
from waits import eventually
from written_log import START, WrittenLog, delta

from worker import Client
from worker.broker.queue_depth import live_records
from worker.client.async_client import State
from worker.contract.keys import Keys
from worker.engine.application import Worker
from worker.gateway.keys import hash_of
from worker.sandbox.simulator.server import Options, Scenario, Simulator

with_worker = pytest.mark.usefixtures("worker")

STORY = "Tell me a long story"
ANSWER = "document.querySelector('article:last-child .answer')?.textContent"
STATE = "document.querySelector('article:last-child')?.className"
NOTE = "document.querySelector('article:last-child .note')?.textContent"
KEY = "sk-relay-test-0123456789abcdef0123456789abcdef"
ID = "location.hash.slice(1)"


@pytest.fixture
def clock() -> SteeredClock:
    """A clock by which answers halt only if a test says where."""
    return SteeredClock()


@pytest.fixture
async def simulator(start_simulator: StartSimulator, clock: SteeredClock) -> Simulator:
    """Slow enough that a test can act in the middle of the story."""
    return await start_simulator(Options(scenario=Scenario(rate=40.0)), clock=clock)


@pytest.fixture
async def worker(start_worker: StartWorker, simulator: Simulator, redis: Redis) -> Worker:
    """A worker whose model a gateway lists: the page reads the list once."""
    worker = await start_worker(simulator, lease=60, gap_timeout=300)

    async def is_listed() -> bool:
        return any(record.models for record in await live_records(redis, Keys()))

    await eventually(is_listed)
    return worker


async def ask(tab: Tab, text: str = STORY) -> str:
    """Send a prompt by keyboard; returns the id of its request once it has text."""
    await tab.wait("document.getElementById('model').value")
    await tab.evaluate("document.getElementById('prompt').focus()")
    turns = await tab.evaluate("document.querySelectorAll('article').length")
    await tab.press(f"{text}\n")
    await tab.wait(f"document.querySelectorAll('article').length > {turns}")
    await tab.wait(f"{ANSWER}.length > 20")
    hash_: str = await tab.evaluate(ID)
    return hash_.rsplit(",", maxsplit=1)[-1]


async def text_of(client: Client, request_id: str) -> str:
    return (await client.result(request_id)).text


@with_worker
async def test_an_answer_arrives_and_another_tab_catches_up(
    browser: Browser, replica: Replica, client: Client, clock: SteeredClock
) -> None:
    clock.allow(50)
    first = await browser.open(replica.url)
    request_id = await ask(first)
    assert await first.evaluate(STATE) == "running"
    second = await browser.open(f"{replica.url}/#{request_id}")
    await second.wait(f"{ANSWER}.length > 20")
    clock.release()
    for tab in (first, second):
        await tab.bring_to_front()
        await tab.wait(f"{STATE} === 'done'")
        assert await tab.evaluate(ANSWER) == await text_of(client, request_id)
        assert "tokens, prompt" in await tab.evaluate(NOTE)


@with_worker
async def test_a_reload_in_the_middle_goes_on_from_where_it_was(
    browser: Browser, replica: Replica, client: Client
) -> None:
    tab = await browser.open(replica.url)
    request_id = await ask(tab)
    await tab.reload()
    await tab.wait(f"{ANSWER}.length > 20")
    assert await tab.evaluate("document.querySelector('.prompt').textContent") == STORY
    await tab.wait(f"{STATE} === 'done'")
    assert await tab.evaluate(ANSWER) == await text_of(client, request_id)
    assert await ask(tab, "Who are you?") != request_id
    assert await tab.evaluate("document.querySelectorAll('article').length") == 2


@with_worker
async def test_a_cancel_by_keyboard_ends_the_answer(
    browser: Browser, replica: Replica, client: Client, clock: SteeredClock
) -> None:
    clock.allow(50)
    tab = await browser.open(replica.url)
    request_id = await ask(tab)
    await tab.press("\x1b")
    await tab.wait(f"{STATE} === 'cancelled'")
    assert (await client.status(request_id)).outcome == "cancelled"


@with_worker
async def test_a_gateway_that_is_killed_under_the_page_loses_nothing(
    browser: Browser, start_replica: StartReplica, client: Client
) -> None:
    replica = await start_replica()
    tab = await browser.open(replica.url)
    request_id = await ask(tab)
    await replica.end(signal.SIGKILL)
    replica = await start_replica(port=replica.port)
    await tab.wait(f"{STATE} === 'done'")
    assert await tab.evaluate(ANSWER) == await text_of(client, request_id)
    assert await replica.end(signal.SIGTERM) == 0


@with_worker
async def test_a_proxy_that_answers_for_a_gateway_does_not_end_the_page(
    browser: Browser, replica: Replica, client: Client, clock: SteeredClock
) -> None:
    """As nginx does while a gateway is restarted."""
    clock.allow(50)
    request_id = await ask(await browser.open(replica.url))
    tab = await browser.open(replica.url)
    await tab.wait("document.getElementById('model').value")
    await tab.evaluate(
        "void (window.fetch = async () => new Response('<html>502 Bad Gateway</html>', { status: 502 }))"
    )
    await tab.evaluate(f"void (location.hash = '{request_id}')")
    await tab.wait(f"{ANSWER}?.length > 20")
    clock.release()
    await tab.wait(f"{STATE} === 'done'")
    assert await tab.evaluate(ANSWER) == await text_of(client, request_id)


@with_worker
async def test_two_tabs_and_a_third_work_beside_six_open_answers(
    browser: Browser, replica: Replica, client: Client
) -> None:
    """A browser has six connections to a host. Each page needs one for all of its answers, and one now and then."""
    request = {"model": "reciter", "messages": [{"role": "user", "content": STORY}]}
    ids = [await client.enqueue(request) for _ in range(6)]
    tabs = [await browser.open(f"{replica.url}/#{','.join(ids)}") for _ in range(2)]
    for tab in tabs:
        await tab.bring_to_front()
        await tab.wait(
            "[...document.querySelectorAll('.answer')].filter((a) => a.textContent.length > 20).length === 6"
        )
    tabs.append(await browser.open(f"{replica.url}/#{','.join(ids)}"))
    request_id = await ask(tabs[-1], "Who are you?")
    texts: list[str] = []
    for tab in tabs:
        await tab.bring_to_front()
        await tab.wait("[...document.querySelectorAll('article')].every(({ className }) => className === 'done')")
        streams = "performance.getEntriesByType('resource').filter(({ name }) => name.includes('/events'))"
        assert await tab.evaluate(f"{streams}.every(({{ name }}) => name.includes('/events?ids='))")
        texts = await tab.evaluate("[...document.querySelectorAll('.answer')].map((a) => a.textContent)")
        assert texts[:6] == [await text_of(client, found) for found in ids]
    assert texts[6:] == [await text_of(client, request_id)]


async def test_each_of_eight_tabs_follows_an_answer_while_it_is_visible(
    browser: Browser, replica: Replica, client: Client, redis: Redis, http: httpx.AsyncClient
) -> None:
    """A browser has six connections to a host. A hidden tab holds none, and continues where it was."""
    body = {"model": "reciter", "messages": [{"role": "user", "content": "a"}]}
    posts = [await http.post(f"{replica.url}/requests", json=body | {"seed": n}) for n in range(8)]
    logs = [WrittenLog(redis, post.json()["id"]) for post in posts]
    for log in logs:
        await log.append(START, delta(1, 1))
    tabs: list[Tab] = []
    for log in logs:
        tabs.append(await browser.open(f"{replica.url}/#{log.id}"))
        await tabs[-1].wait(f"{ANSWER} === '1-1 '")
        await tabs[-1].evaluate("document.getElementById('running').open = true")
        await tabs[-1].wait("document.querySelectorAll('#list button').length === 8")
    for log in logs:
        await log.append(delta(1, 2))
    for tab in tabs:
        await tab.bring_to_front()
        await tab.wait(f"{ANSWER} === '1-1 1-2 '")
    for log in logs:
        await log.append(delta(1, 3))
    for tab in tabs[::-1]:
        await tab.bring_to_front()
        await tab.wait(f"{ANSWER} === '1-1 1-2 1-3 '")
    await tabs[0].evaluate("document.querySelector('.cancel').click()")
    await tabs[0].wait(f"{STATE} === 'cancelled'")
    for tab in tabs[::7]:
        await tab.bring_to_front()
        await tab.wait("document.querySelectorAll('#list button').length === 7")
    for log in logs[1:]:
        await client.cancel(log.id)


async def test_an_answer_that_began_again_is_replaced(browser: Browser, replica: Replica, client: Client) -> None:
    """The entries come from the test, as a worker writes them that cannot continue an answer."""
    request_id = await client.enqueue({"model": "reciter", "messages": [{"role": "user", "content": "a"}]})
    log = f"chat:tokens:{{{request_id}}}"
    redis = client._redis
    await redis.xadd(log, {"type": "started", "worker": "w"}, "1-0")
    await redis.xadd(log, {"type": "delta", "content": "the old text <b>"}, "1-1")
    tab = await browser.open(f"{replica.url}/#{request_id}")
    await tab.wait(f"{ANSWER} === 'the old text <b>'")
    await redis.xadd(log, {"type": "claimed", "worker": "v"}, "2-0")
    await redis.xadd(log, {"type": "restarted"}, "2-1")
    await redis.xadd(log, {"type": "delta", "content": "the new text"}, "2-2")
    await tab.wait(f"{ANSWER} === 'the new text'")
    await client.cancel(request_id)
    await tab.wait(f"{STATE} === 'cancelled'")


@with_worker
async def test_a_key_is_asked_for_once_and_is_in_no_url(
    browser: Browser, start_replica: StartReplica, client: Client
) -> None:
    keys = f'[[keys]]\nname = "page"\nhash = "sha256:{hash_of(KEY)}"\n'
    replica = await start_replica(no_auth="false", keys=keys, token_secret="s" * 32)
    tab = await browser.open(replica.url)
    await tab.wait("document.getElementById('login').open")
    await tab.press(f"{KEY}\n")
    request_id = await ask(tab)
    await tab.evaluate("document.getElementById('running').open = true")
    await tab.wait(f"document.getElementById('list').textContent.includes('{request_id[:8]}')")
    await tab.wait(f"{STATE} === 'done'")
    urls: list[str] = await tab.evaluate("performance.getEntriesByType('resource').map(({ name }) => name)")
    assert not [url for url in [*urls, await tab.evaluate("location.href")] if KEY in url]
    assert [url for url in urls if "token=rt_" in url]
    await tab.reload()
    await tab.wait(f"{STATE} === 'done'")
    assert not await tab.evaluate("document.getElementById('login').open")
    assert (await client.status(request_id)).state is State.ENDED


@with_worker
async def test_the_page_fits_a_phone(browser: Browser, replica: Replica) -> None:
    tab = await browser.open(replica.url)
    await tab.resize(360, 640)
    await ask(tab)
    await tab.wait(f"{STATE} === 'done'")
    assert await tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert await tab.evaluate("document.querySelector('#ask button').getBoundingClientRect().bottom <= innerHeight")
    assert await tab.evaluate("document.getElementById('turns').scrollHeight > 300")
    assert (await tab.screenshot()).startswith(b"\x89PNG")


async def test_a_long_answer_that_is_opened_late_comes_in_few_frames(
    browser: Browser, replica: Replica, client: Client
) -> None:
    request_id = await client.enqueue({"model": "reciter", "messages": [{"role": "user", "content": "a"}]})
    log = f"chat:tokens:{{{request_id}}}"
    async with client._redis.pipeline(transaction=False) as pipe:
        pipe.xadd(log, {"type": "started", "worker": "w"}, "1-0")
        for number in range(1, 10_001):
            pipe.xadd(log, {"type": "delta", "content": f"word{number} "}, f"1-{number}")
        await pipe.execute()
    tab = await browser.open(f"{replica.url}/#{request_id}")
    await tab.wait(f"{ANSWER}.endsWith('word10000 ')")
    counted = await tab.evaluate(
        "new Promise((resolve) => { let frames = 0; const began = performance.now();"
        f"const source = new EventSource('/requests/{request_id}/events');"
        "source.onmessage = ({ data }) => { frames += 1; if (JSON.parse(data).some(({ id }) => id === '1-10000'))"
        "{ source.close(); resolve([frames, performance.now() - began]); } } })"
    )
    assert counted[0] <= 20
    await client.cancel(request_id)


@with_worker
async def test_a_fetch_of_the_browser_survives_a_killed_gateway(
    browser: Browser, start_replica: StartReplica, client: Client
) -> None:
    """`/client.js`, imported as a module, and the browser's own fetch."""
    replica = await start_replica()
    tab = await browser.open(f"{replica.url}/healthz")
    body = {"model": "reciter", "messages": [{"role": "user", "content": STORY}], "stream": True}
    await tab.evaluate(
        "import('/client.js').then(async ({ resumingFetch }) => { window.text = '';"
        f"const init = {{ method: 'POST', body: JSON.stringify({json.dumps(body)}) }};"
        "const response = await resumingFetch('/v1/chat/completions', init);"
        "window.requestId = response.headers.get('x-request-id');"
        "const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();"
        "(async () => { for (let read; (read = await reader.read()), !read.done; ) window.text += read.value;"
        "})().then(() => window.isOver = true, (error) => window.isOver = String(error)); return true; })"
    )
    await tab.wait("window.text.split('data:').length > 5")
    await replica.end(signal.SIGKILL)
    await start_replica(port=replica.port)
    assert await tab.wait("window.isOver") is True
    frames = [line[6:] for line in (await tab.evaluate("window.text")).splitlines() if line.startswith("data: {")]
    text = "".join(json.loads(frame)["choices"][0]["delta"].get("content", "") for frame in frames)
    assert text == await text_of(client, await tab.evaluate("window.requestId"))
