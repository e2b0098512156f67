"""`client.generate` and `sluice generate`: text as it is made."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sluice.client import connect, connect_async
from sluice.client.aio import AsyncTextStream
from sluice.client.cli import generate, read_prompt
from sluice.client.generating import TextEnd
from sluice.client.render import escaped
from sluice.errors import Backpressure, ConfigError, Permanent, Retryable
from tests.central.feed_support import Topics, running_feed, until
from tests.central.generate_support import Scripted
from tests.client.feed_thread import FeedThread, feed_thread

ROOT = Path(__file__).parents[2]
END = TextEnd("end", 3, 3, "/models/small", "abc")


@pytest.fixture
def engine() -> Scripted:
    return Scripted("The ", "disk\n", "is full.")


@pytest.fixture
def feed(topics: Topics, tmp_path: Path, engine: Scripted) -> Iterator[FeedThread]:
    with feed_thread(topics, tmp_path, engine, request_bytes_max=1 << 16) as found:
        yield found


def run(feed: FeedThread, *arguments: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(generate, ["--target", feed.target, *arguments], input=stdin)


def test_a_text_comes_in_pieces_and_then_says_how_it_ended(feed: FeedThread, engine: Scripted) -> None:
    with connect(feed.target) as client:
        text = client.generate("look", images=[b"GIF"], chat=True, max_new_tokens=7, stop=["x"], deadline_s=2.5)
        assert text.end is None
        assert list(text) == ["The ", "disk\n", "is full."]
        assert text.end == END
    ((prompt, arguments),) = engine.asked
    assert (prompt, list(arguments["images"]), arguments["chat"]) == ("look", [b"GIF"], True)
    assert (arguments["max_new_tokens"], list(arguments["stop"]), arguments["deadline_s"]) == (7, ["x"], 2.5)


def test_what_goes_wrong_is_an_error_of_its_kind(feed: FeedThread, engine: Scripted) -> None:
    with connect(feed.target) as client:
        engine.raises = Backpressure("full", retry_after_s=0.25)
        text = client.generate("x")
        with pytest.raises(Backpressure, match="RESOURCE_EXHAUSTED") as full:
            list(text)
        assert (full.value.retry_after_s, text.end) == (0.25, None)
        for raised, kind in ((Permanent("no"), Permanent), (Retryable("later"), Retryable), (KeyError(), Retryable)):
            engine.raises = raised
            with pytest.raises(kind):
                list(client.generate("x"))
        with pytest.raises(Permanent, match=r"too large for the server \(feed.request_bytes_max\)"):
            list(client.generate("x", images=[bytes(1 << 17)]))
        engine.absent = Permanent("set engine.generation.model")
        with pytest.raises(Permanent, match=r"engine\.generation\.model \(FAILED_PRECONDITION\)"):
            list(client.generate("x"))
        feed.stop()
        with pytest.raises(Retryable, match="UNAVAILABLE"):
            list(client.generate("x"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "\ud800"}, "prompt: not valid Unicode"),
        ({"prompt": "x", "stop": ["\ud800"]}, "stop: not valid Unicode"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens: 0 is not positive"),
        ({"prompt": "x", "max_new_tokens": 1 << 40}, "cannot be sent"),
        ({"prompt": "x", "images": ["no bytes"]}, "cannot be sent"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_it_is(arguments: dict[str, Any], message: str) -> None:
    with connect("127.0.0.1:1") as client, pytest.raises(Permanent, match=message):
        client.generate(**arguments)


async def test_the_asyncio_client_does_the_same_and_a_closed_text_is_over(topics: Topics, tmp_path: Path) -> None:
    engine = Scripted("The ", "disk")
    async with running_feed(topics, tmp_path, engine) as (_, target), connect_async(target) as client:
        text = client.generate("x")
        assert [piece async for piece in text] == ["The ", "disk"]
        assert text.end == TextEnd("end", 3, 2, "/models/small", "abc")
        engine.gate.clear()
        text = client.generate("x")
        assert await anext(text) == "The "
        reading = asyncio.ensure_future(anext(text))
        await asyncio.sleep(0)
        text.close()
        with pytest.raises(Retryable, match="closed"):
            await reading
        await until(lambda: engine.running == 0, "its place is free")
        cancelled = asyncio.ensure_future(_whole(client.generate("x")))
        await until(lambda: engine.running == 1, "it is under way")
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await until(lambda: engine.running == 0, "its place is free, too")
        engine.gate.set()
        engine.raises = Backpressure("full", retry_after_s=0.25)
        with pytest.raises(Backpressure) as full:
            await _whole(client.generate("x"))
        assert full.value.retry_after_s == 0.25


async def test_whoever_is_cancelled_while_the_request_is_being_sent_ends_the_call() -> None:
    class Sending:
        """A call as gRPC leaves it then: cancelled is who reads, not the call."""

        cancelled = False

        async def read(self) -> None:
            await asyncio.Event().wait()

        def cancel(self) -> None:
            self.cancelled = True

    call = Sending()
    reading = asyncio.ensure_future(anext(AsyncTextStream(call)))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert call.cancelled


async def _whole(text: Any) -> str:
    return "".join([piece async for piece in text])


def test_the_command_prints_the_text_and_takes_everything_as_an_option(
    feed: FeedThread, engine: Scripted, tmp_path: Path
) -> None:
    shown = run(feed, "Why?")
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, "The disk\nis full.\n", "")
    images = [tmp_path / "a.png", tmp_path / "b.gif"]
    for image in images:
        image.write_bytes(image.name.encode())
    engine.finish = "length"
    options = [
        "--chat",
        "--max-new-tokens",
        "3",
        "--temperature",
        "0.5",
        "--stop",
        "a",
        "--stop",
        "b",
        "--deadline",
        "9",
    ]
    shown = run(feed, *options, *(f"--image={image}" for image in images), stdin=b"from stdin\n")
    assert (shown.exit_code, shown.stdout) == (0, "The disk\nis full.\n")
    assert shown.stderr == "ended at its limit, after 3 tokens (--max-new-tokens)\n"
    prompt, arguments = engine.asked[-1]
    assert (prompt, list(arguments["images"]), list(arguments["stop"])) == (
        "from stdin",
        [b"a.png", b"b.gif"],
        ["a", "b"],
    )
    assert (arguments["chat"], arguments["temperature"], arguments["deadline_s"]) == (True, 0.5, 9.0)


def test_the_command_gives_one_json_object(feed: FeedThread, engine: Scripted) -> None:
    shown = run(feed, "--json", "x")
    assert json.loads(shown.stdout) == {
        "text": "The disk\nis full.",
        "finish": "end",
        "usage": {"prompt_tokens": 3, "new_tokens": 3},
        "model": "/models/small",
        "model_version": "abc",
    }
    engine.raises = Retryable("the device is gone")
    shown = run(feed, "--json", "x")
    assert (shown.stdout, isinstance(shown.exception, Retryable)) == ("", True)
    shown = run(feed, "x")
    assert (shown.stdout, isinstance(shown.exception, Retryable)) == ("The disk\nis full.\n", True)


def test_a_prompt_from_elsewhere_is_checked(feed: FeedThread) -> None:
    for content, message in ((b"\xff\xfe", "not UTF-8: byte 0"), (b"x" * (1 << 20), "the prompt exceeds")):
        with pytest.raises(ConfigError, match=message):
            read_prompt(io.BytesIO(content))
    main, terminal = os.openpty()
    with os.fdopen(terminal, "rb") as typed, pytest.raises(ConfigError, match="nothing to continue"):
        read_prompt(typed)
    os.close(main)
    assert read_prompt(io.BytesIO(b"a\r\n\n")) == "a\r\n"


def test_a_terminal_is_not_driven_by_the_text() -> None:
    assert escaped("a\x1b[2Jb\n\tc", but="\n\t") == "a\\x1b[2Jb\n\tc"


def test_ctrl_c_ends_it_without_a_traceback_and_frees_its_place(feed: FeedThread, engine: Scripted) -> None:
    engine.gate.clear()
    program = "import sys; from sluice.client.cli import generate; generate(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--target", feed.target, "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.read(4) == b"The ", "the first piece is shown before the others are made"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"\n", b"")
    asyncio.run(until(lambda: engine.left == 1, "its place is free"))
