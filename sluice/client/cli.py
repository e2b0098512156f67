"""`sluice tail`, `sluice analyze` and `sluice generate`: the feed on a terminal. Need the extra `client` only."""

import base64
import binascii
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click

from sluice.errors import ConfigError, SluiceError

if TYPE_CHECKING:
    from sluice.client.channel import Tls
    from sluice.client.items import Answer
    from sluice.client.sync import FeedClient, Subscription, TextStream

DEFAULT_TARGET: Final = "127.0.0.1:7443"
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_AGO: Final = re.compile(r"(\d{1,9})([smhd])")


def connection_options(command: Any) -> Any:
    """Adds the options that say where the feed is."""
    for option in (
        click.option("--tls-server-name", help="Name in the server's certificate, when it is not the target's host."),
        click.option("--tls-key", help="Client key (PEM)."),
        click.option("--tls-certificate", help="Client certificate (PEM) for mTLS."),
        click.option("--tls-ca", help="CA certificate (PEM); switches TLS on."),
        click.option("--target", default=DEFAULT_TARGET, show_default=True, envvar="SLUICE_TARGET", help="host:port."),
    ):
        command = option(command)
    return command


@click.command()
@connection_options
@click.option("--kinds", default="", help="records, results; both by default.")
@click.option("--site", "sites", multiple=True, metavar="GLOB", help="Only these sites; may be repeated.")
@click.option("--device", "devices", multiple=True, metavar="GLOB", help="Only these devices; may be repeated.")
@click.option("--stream", "streams", multiple=True, metavar="GLOB", help="Only these streams; may be repeated.")
@click.option("--label", "labels", multiple=True, metavar="GLOB", help="Only results with these labels.")
@click.option("--score-min", default=0.0, help="Only results with at least this score.")
@click.option("--from", "begin", default="latest", show_default=True, help="latest, earliest, 10m, 2h, or a token.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--limit", type=click.IntRange(min=1), help="End after so many items.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="End after so many seconds.")
def tail(kinds: str, begin: str, as_json: bool, limit: int | None, timeout: float | None, **options: Any) -> None:
    """Shows records and results as they arrive; resumes by itself when the server restarts."""
    start = parse_begin(begin, time.time())
    with connected(options) as client:
        subscription = client.subscribe(
            kinds=[kind.strip() for kind in kinds.split(",") if kind.strip()],  # type: ignore[misc]
            on_wait=lambda why, delay_s: click.echo(f"{client.target}: {why}; again in {delay_s:.1f} s", err=True),
            **start,
            **options,
        )
        show_items(subscription, as_json=as_json, limit=limit, timeout_s=timeout)
        if not as_json and subscription.resume_token:
            click.echo(f"continue with --from {token_text(subscription.resume_token)}", err=True)


@click.command()
@connection_options
@click.argument("texts", nargs=-1)
@click.option("--file", "file", type=click.File("rb"), help="A file with one text per line, in UTF-8; - for stdin.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option(
    "--task",
    default="",
    help="classify (default): a label and how sure that is; novelty: distance to what the stream usually says, from 0 "
    "(said all the time) to 1; tokens: names in the texts; embed: a vector.",
)
@click.option("--model", default="", help="One of the server's models, by name; default: one that offers the task.")
@click.option("--stream", default="", help="Whose texts they are; novelty is kept per stream, and needs one.")
@click.option("--embed", is_flag=True, help="Add the embedding; --json shows it: little-endian float16 in base64.")
@click.option("--deadline", type=click.FloatRange(min=0, min_open=True), help="Seconds per text.")
def analyze(
    texts: tuple[str, ...], file: BinaryIO | None, as_json: bool, deadline: float | None, **options: Any
) -> None:
    """Asks the engine about texts, given as arguments or as lines of a file; exits with 1 when one has no answer.

    Empty lines are passed over. While results go elsewhere than to the terminal, it shows how far the file is done.
    """
    from sluice.client.lines import Lines, Progress

    if not texts and file is None:
        raise ConfigError('nothing to analyse: give texts ("disk full") or --file FILE')
    if options["task"] == "novelty" and not options["stream"]:
        raise ConfigError("--task novelty tells a text from what its stream usually says: give --stream NAME")
    shown = file is not None and sys.stderr.isatty() and not sys.stdout.isatty()
    lines = Lines(file) if file is not None else None
    progress = Progress(_replace_line if shown else lambda _: None, time.monotonic, _size(file))
    with connected(options) as client:
        try:
            for answer in client.analyze(chain(texts, lines or ()), deadline_s=deadline, **options):
                line, bytes_done = lines.taken() if lines is not None and answer.index >= len(texts) else (0, 0)
                _show_answer(answer, options["task"], line, as_json=as_json)
                progress.answered(answer.error is not None, bytes_done)
        finally:
            progress.end()
    if progress.failed:
        click.echo(f"{progress.failed:,} of {progress.count:,} texts have no result", err=True)
        sys.exit(1)


def _show_answer(answer: "Answer", task: str, line: int, *, as_json: bool) -> None:
    """One line; with the number of the file's line, where it comes from one."""
    from sluice.client.render import json_line, pretty_answer

    if as_json:
        click.echo(json_line(answer, line=line) if line else json_line(answer))
        return
    where = f"line {line}: " if line and answer.error is not None else ""
    click.echo(where + pretty_answer(answer, task))


@click.command()
@connection_options
@click.argument("prompt", required=False)
@click.option("--image", "images", type=click.File("rb"), multiple=True, help="An image file; may be repeated.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="End after so many tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: no chance in it.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End in front of this text; may be repeated.")
@click.option("--deadline", type=click.FloatRange(min=0, min_open=True), help="Seconds for the whole text.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, when the text is complete.")
def generate(
    prompt: str | None, images: tuple[BinaryIO, ...], deadline: float | None, as_json: bool, **options: Any
) -> None:
    """Continues PROMPT with the server's generative model, and shows the text as it is made.

    Without PROMPT it is read from stdin, without the line end behind it.
    """
    from sluice.client.channel import MESSAGE_BYTES_MAX

    text = prompt if prompt is not None else read_prompt(sys.stdin.buffer)
    # A byte more than can be sent: what is too large is refused, and not cut.
    files = [image.read(MESSAGE_BYTES_MAX + 1) for image in images]
    with connected(options) as client:
        show_text(client.generate(text, images=files, deadline_s=deadline, **options), as_json=as_json)


def read_prompt(content: BinaryIO) -> str:
    """A prompt from stdin.

    Raises:
        ConfigError: a terminal, too much, or bytes that are no UTF-8.
    """
    from sluice.client.analyzing import TEXT_BYTES_MAX

    if content.isatty():
        raise ConfigError('nothing to continue: give a prompt ("The disk is full because"), or pipe one in')
    data = content.read(TEXT_BYTES_MAX + 1)
    if len(data) > TEXT_BYTES_MAX:
        raise ConfigError(f"the prompt exceeds {TEXT_BYTES_MAX} bytes")
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt is not UTF-8: byte {error.start}") from error


def show_text(stream: "TextStream", *, as_json: bool) -> None:
    """Prints a text as it comes, or whole as JSON; ends with 130 on Ctrl-C, as shells expect it."""
    from sluice.client.render import escaped, json_text

    pieces = []
    # Whoever reads a pipe gets the text as it is; a terminal must not be driven by it.
    terminal = sys.stdout.isatty()
    try:
        for piece in stream:
            pieces.append(piece)
            if not as_json:
                click.echo(escaped(piece, but="\n\t") if terminal else piece, nl=False)
    except BrokenPipeError:
        return  # enough was seen
    except (KeyboardInterrupt, SluiceError) as ended:
        if not as_json:
            _end_line(pieces)
        if isinstance(ended, KeyboardInterrupt):
            sys.exit(130)
        raise
    finally:
        stream.close()
    assert stream.end is not None, "a text that is complete has an end"
    if as_json:
        click.echo(json_text("".join(pieces), stream.end))
        return
    _end_line(pieces)
    if stream.end.finish == "length":
        click.echo(f"ended at its limit, after {stream.end.new_tokens:,} tokens (--max-new-tokens)", err=True)


def _end_line(pieces: Sequence[str]) -> None:
    if pieces and not pieces[-1].endswith("\n"):
        click.echo()


def _replace_line(line: str) -> None:
    click.echo(f"\r\x1b[K{line}", err=True, nl=False)


def _size(file: BinaryIO | None) -> int:
    """Bytes in a file; 0 for a pipe or a terminal."""
    try:
        status = os.fstat(file.fileno()) if file is not None else None
    except OSError:  # no file at all, but something in memory
        return 0
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else 0


def connected(options: dict[str, Any]) -> "FeedClient":
    """A client as the connection's options say; takes them out of `options`."""
    from sluice.client import connect

    tls = [options.pop(f"tls_{name}") for name in ("ca", "certificate", "key", "server_name")]
    return connect(options.pop("target"), tls=tls_of(*tls))


def show_items(subscription: "Subscription", *, as_json: bool, limit: int | None, timeout_s: float | None) -> None:
    """Prints items until the limit, the time or Ctrl-C ends it."""
    from sluice.client.render import json_line, pretty_line

    timer = threading.Timer(timeout_s, subscription.close) if timeout_s is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    shown = 0
    try:
        with closing(iter(subscription)) as items:  # type: ignore[type-var]
            for item in items:
                click.echo(json_line(item) if as_json else pretty_line(item))
                shown += 1
                if limit is not None and shown >= limit:
                    return
    except (KeyboardInterrupt, BrokenPipeError):
        return  # both mean: enough
    finally:
        if timer is not None:
            timer.cancel()
        subscription.close()


def parse_begin(text: str, now_s: float) -> dict[str, Any]:
    """`--from` as arguments of `subscribe`.

    Args:
        text: latest, earliest, a number with s, m, h or d, or a token as `tail` prints it.
        now_s: seconds since 1970.

    Raises:
        ConfigError: when it is none of these.
    """
    if text in {"latest", "earliest"}:
        return {"start": text}
    ago = _AGO.fullmatch(text)
    if ago:
        return {"start": max(0, int((now_s - int(ago[1]) * _SECONDS[ago[2]]) * 1_000_000))}
    try:
        # Even the shortest token is far longer than a misspelt word.
        if len(text) >= 40:
            return {"resume_token": base64.b64decode(text + "=" * (-len(text) % 4), altchars="-_", validate=True)}
    except (binascii.Error, ValueError):
        pass
    raise ConfigError(f"--from {text[:64]!r} is neither latest, earliest, a time such as 10m, nor a resume token")


def token_text(token: bytes) -> str:
    """A token as one word."""
    return base64.urlsafe_b64encode(token).decode().rstrip("=")


def tls_of(ca: str | None, certificate: str | None, key: str | None, server_name: str | None) -> "Tls | None":
    """TLS as the options say; None when none of them was given.

    Raises:
        ConfigError: when certificate and key do not come together, or a file is not there.
    """
    from sluice.client.channel import Tls

    if not (ca or certificate or key):
        return None
    if bool(certificate) != bool(key):
        raise ConfigError("--tls-certificate and --tls-key go together")
    for path in (ca, certificate, key):
        if path and not Path(path).is_file():
            raise ConfigError(f"{path}: no such file")
    return Tls(ca, certificate, key, server_name)
