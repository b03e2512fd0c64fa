"""Chromium over its DevTools protocol and Firefox over WebDriver BiDi: both are JSON over one WebSocket.

A driver of their own would be another program to install in a version that fits. These tests need a few calls only.
"""

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import signal
from abc import ABC, abstractmethod
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil
from waits import eventually
from websockets.asyncio.client import ClientConnection, connect

BrowserName = Literal["chromium", "firefox"]
Params: TypeAlias = dict[str, Any]

_COMMANDS: dict[BrowserName, list[str]] = {
    "chromium": [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
        "--user-data-dir={profile}", "about:blank",
    ],
    "firefox": [
        "firefox-esr", "--headless", "--no-remote", "--profile", "{profile}", "--remote-debugging-port", "0",
    ],
}  # fmt: skip
_LISTENS = re.compile(r"listening on (ws://\S+)")
_PATIENCE = 300.0
"""Seconds for the start of a browser, and for a condition in a page: a busy machine needs half a minute."""


def why_missing(name: BrowserName) -> str:
    """Why this browser cannot be used; empty if it can."""
    command = _COMMANDS[name][0]
    return "" if shutil.which(command) else f"{command} is missing"


class CommandFailed(Exception):
    """A browser refuses a command. It does so too while a page is replaced by another one."""


class Wire:
    """Commands and their results over a WebSocket. Events are dropped."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Params]] = {}
        self._reading = asyncio.create_task(self._read())

    async def call(self, method: str, params: Params | None = None, **more: str) -> Params:
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps({"id": number, "method": method, "params": params or {}, **more}))
        async with asyncio.timeout(_PATIENCE):
            answer = await self._waiting[number]
        if "error" in answer:
            raise CommandFailed(f"{method}: {answer}")
        result: Params = answer["result"]
        return result

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        async for message in self._socket:
            answer = json.loads(message)
            if (number := answer.get("id")) in self._waiting:
                self._waiting.pop(number).set_result(answer)


class Tab(ABC):
    """One tab of a browser."""

    @abstractmethod
    async def evaluate(self, expression: str) -> Any:  # noqa: ANN401 - JSON
        """The value of an expression of JavaScript, awaited if it is a promise."""

    @abstractmethod
    async def reload(self) -> None: ...
    @abstractmethod
    async def resize(self, width: int, height: int) -> None: ...
    @abstractmethod
    async def bring_to_front(self) -> None:
        """Make this tab the visible one. Pages see `document.hidden` in all others, as without `--headless`."""

    @abstractmethod
    async def press(self, text: str) -> None:
        """Bring the tab to the front and type a text; a line feed is Enter, and an escape Escape."""

    @abstractmethod
    async def screenshot(self) -> bytes:
        """The page as a PNG."""

    @abstractmethod
    async def close(self) -> None: ...

    async def wait(self, expression: str) -> Any:  # noqa: ANN401 - JSON
        """Wait until an expression is true, in a page that may be loading; returns its value."""
        value: Any = None

        async def is_true() -> bool:
            nonlocal value
            with suppress(CommandFailed):
                value = await self.evaluate(f"(() => {{ try {{ return {expression} }} catch {{ return null }} }})()")
            return bool(value)

        await eventually(is_true, _PATIENCE)
        return value


class Browser(ABC):
    """A running browser."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    @abstractmethod
    async def open(self, url: str) -> Tab:
        """Open a URL in a new tab."""


class ChromiumTab(Tab):
    def __init__(self, wire: Wire, target: str, session: str) -> None:
        self._wire, self._target, self._session = wire, target, session

    async def _call(self, method: str, params: Params | None = None) -> Params:
        return await self._wire.call(method, params, sessionId=self._session)

    async def evaluate(self, expression: str) -> Any:  # noqa: ANN401
        params = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = await self._call("Runtime.evaluate", params)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def reload(self) -> None:
        await self.evaluate("window.isOld = true")
        await self._call("Page.reload")
        await self.wait("!window.isOld && document.readyState !== 'loading'")

    async def resize(self, width: int, height: int) -> None:
        params = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self._call("Emulation.setDeviceMetricsOverride", params)

    async def bring_to_front(self) -> None:
        await self._call("Page.bringToFront")

    async def press(self, text: str) -> None:
        await self.bring_to_front()
        for key in text:
            name, code = {"\n": ("Enter", 13), "\x1b": ("Escape", 27)}.get(key, (key, 0))
            params = {"key": name, "windowsVirtualKeyCode": code, "text": {"\n": "\r", "\x1b": ""}.get(key, key)}
            await self._call("Input.dispatchKeyEvent", {"type": "keyDown", **params})
            await self._call("Input.dispatchKeyEvent", {"type": "keyUp", **params, "text": ""})

    async def screenshot(self) -> bytes:
        return base64.b64decode((await self._call("Page.captureScreenshot"))["data"])

    async def close(self) -> None:
        await self._wire.call("Target.closeTarget", {"targetId": self._target})


class Chromium(Browser):
    async def open(self, url: str) -> Tab:
        target = (await self.wire.call("Target.createTarget", {"url": url}))["targetId"]
        session = await self.wire.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        tab = ChromiumTab(self.wire, target, session["sessionId"])
        await tab.wait("location.href !== 'about:blank' && document.readyState !== 'loading'")
        return tab


class FirefoxTab(Tab):
    def __init__(self, wire: Wire, context: str) -> None:
        self._wire, self._context = wire, context

    async def _call(self, method: str, **params: object) -> Params:
        return await self._wire.call(method, {"context": self._context, **params})

    async def evaluate(self, expression: str) -> Any:  # noqa: ANN401
        # As JSON, because BiDi has its own form for each value.
        text = f"Promise.resolve({expression}).then((value) => JSON.stringify(value ?? null))"
        params = {"expression": text, "target": {"context": self._context}, "awaitPromise": True}
        answer = await self._wire.call("script.evaluate", params)
        assert answer["type"] == "success", answer
        return json.loads(answer["result"]["value"])

    async def reload(self) -> None:
        await self._call("browsingContext.reload", wait="interactive")

    async def resize(self, width: int, height: int) -> None:
        await self._call("browsingContext.setViewport", viewport={"width": width, "height": height})

    async def bring_to_front(self) -> None:
        await self._call("browsingContext.activate")

    async def press(self, text: str) -> None:
        await self.bring_to_front()
        keys = [{"\n": "\ue007", "\x1b": "\ue00c"}.get(key, key) for key in text]
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        await self._call("input.performActions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    async def screenshot(self) -> bytes:
        return base64.b64decode((await self._call("browsingContext.captureScreenshot"))["data"])

    async def close(self) -> None:
        await self._call("browsingContext.close")


class Firefox(Browser):
    async def open(self, url: str) -> Tab:
        context = (await self.wire.call("browsingContext.create", {"type": "tab"}))["context"]
        params = {"context": context, "url": url, "wait": "interactive"}
        await self.wire.call("browsingContext.navigate", params)
        return FirefoxTab(self.wire, context)


@asynccontextmanager
async def run_browser(name: BrowserName, profile: Path) -> AsyncIterator[Browser]:
    """A headless browser with an empty profile. At the end, its processes are gone."""
    command = [part.format(profile=profile) for part in _COMMANDS[name]]
    environment = os.environ | {"HOME": str(profile), "MOZ_CRASHREPORTER_DISABLE": "1"}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, env=environment, start_new_session=True
    )
    assert process.stderr is not None
    draining = None
    try:
        async with asyncio.timeout(_PATIENCE):
            while not (found := _LISTENS.search((await process.stderr.readline()).decode())):
                assert process.returncode is None, "the browser ended"
        draining = asyncio.create_task(process.stderr.read())  # a full pipe would stop it
        url = found[1] if name == "chromium" else f"{found[1]}/session"
        # A browser offers no Origin, and refuses one.
        async with connect(url, max_size=None, compression=None, open_timeout=_PATIENCE, proxy=None) as socket:
            wire = Wire(socket)
            if name == "firefox":
                await wire.call("session.new", {"capabilities": {}})
            yield Chromium(wire) if name == "chromium" else Firefox(wire)
            await wire.close()
    finally:
        below = psutil.Process(process.pid).children(recursive=True) if process.returncode is None else []
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        for child in below:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        await asyncio.to_thread(psutil.wait_procs, below, 30)
        if draining is not None:
            await draining
