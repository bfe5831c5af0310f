"""Debian's Chromium, headless, driven by its DevTools protocol over a pipe: no driver, no port, no package."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A tab: `send` calls a method of the protocol, `evaluate` runs JavaScript; `events` keeps what was reported."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = commands, os.fdopen(answers, "rb")
        self.numbers, self.events = itertools.count(1), list[dict[str, Any]]()
        self.session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def receive(self) -> dict[str, Any]:
        text = b"".join(iter(lambda: self.answers.read(1), b"\0"))
        if not text:
            raise RuntimeError("the browser has gone")
        message: dict[str, Any] = json.loads(text)
        return message

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)


@contextmanager
def open_page(profile: Path) -> Iterator[Page]:
    """A tab of a browser of its own, whose profile is in the folder `profile`."""
    assert EXECUTABLE is not None
    own_commands, commands = (os.pipe() for _ in range(2))
    script = f'exec "$0" "$@" 3<&{own_commands[0]} 4>&{commands[1]}'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    command = ["bash", "-c", script, EXECUTABLE, *options, f"--user-data-dir={profile}", "--no-first-run"]
    passed = (own_commands[0], commands[1])
    process = subprocess.Popen(command, pass_fds=passed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for each in passed:
        os.close(each)
    try:
        page = Page(own_commands[1], commands[0])
        try:
            yield page
        finally:
            page.answers.close()
    finally:
        os.close(own_commands[1])
        process.terminate()
        process.wait(timeout=30)
