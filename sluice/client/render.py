"""Items as lines: JSON for programs, one line for people. Pure.

Texts come from devices and may hold anything: control characters are shown escaped, so that a log line cannot drive the
reader's terminal.
"""

import base64
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import click
import msgspec

from sluice.client.generating import TextEnd
from sluice.client.items import Answer, Item, RecordItem

TEXT_CHARS_MAX: Final = 200
# Of an embedding: float16.
_NUMBER_BYTES: Final = 2
# A colour per label, so that the eye can sort them; stable across runs.
_COLOURS: Final = ("green", "yellow", "magenta", "cyan", "blue", "bright_red", "bright_green", "bright_magenta")


def json_line(item: Item | Answer, **more: int) -> str:
    """The item, with `more` beside, as one line of JSON; bytes are base64, spool ids hexadecimal, NaN is null."""
    return msgspec.json.encode(as_dict(item) | more).decode()


def as_dict(item: Item | Answer) -> dict[str, Any]:
    """The item as plain values."""
    if isinstance(item, RecordItem):
        record = item.record
        body: dict[str, Any] = {
            "kind": "record",
            **_identity(item),
            "event_time_us": record.event_time_us,
            "received_time_us": item.received_time_us,
            "text": record.text,
            "metrics": dict(record.metrics),
            "labels": dict(record.labels),
        }
        if record.payload or record.content_type:
            body |= {"payload": _base64(record.payload), "content_type": record.content_type}
        return body
    if isinstance(item, Answer):
        body = {name: getattr(item, name) for name in item.__slots__}
        # Bytes that were no UTF-8 are shown as such: JSON cannot hold them.
        body["text"] = item.text.encode(errors="backslashreplace").decode()
        body["spans"] = [asdict(span) for span in item.spans]
        if item.error is None:
            del body["error"], body["error_code"]
        if not item.spans:
            del body["spans"]
    else:
        body = {"kind": "result", **_identity(item)}
        body |= {name: getattr(item, name) for name in item.__slots__ if name not in body}
        body["spool_id"] = item.spool_id.hex()
    body |= {"score": round(item.score, 6), "novelty": round(item.novelty, 6), "embedding": _base64(item.embedding)}
    return body


def pretty_line(item: Item) -> str:
    """The item as one line for people, with ANSI colours (`click.echo` strips them where there is no terminal)."""
    # A result of a record that stayed on its site says when it was made: the record's own time stays there too.
    time_us = item.record.event_time_us if isinstance(item, RecordItem) else item.event_time_us or item.created_time_us
    place = printable(f"{item.site}/{item.device_id}")
    head = f"{click.style(clock_time(time_us), dim=True)}  {place}  {click.style(printable(item.stream), bold=True)}"
    if isinstance(item, RecordItem):
        return f"{head}  {click.style(f'#{item.sequence}', dim=True)}  {_content(item)}"
    verdict = click.style(f"{printable(item.label) or item.task} {item.score:.2f}", fg=colour_of(item.label))
    extra = f"  novelty {item.novelty:.2f}" if item.novelty and item.task != "novelty" else ""
    where = "  (on site)" if item.origin == "site" else ""
    return f"{head}  {click.style(f'#{item.sequence}', dim=True)}  {verdict}{extra}{where}"


def pretty_answer(answer: Answer, task: str = "") -> str:
    """The answer to a question for `task` as one line for people."""
    text = printable(answer.text)
    if answer.error is not None:
        return f"{click.style(answer.error_code, fg='red')}  {printable(answer.error)}  {text}"
    parts = _verdict(answer, task)
    parts += [f"{printable(span.label)} {printable(answer.text[span.start : span.end])!r}" for span in answer.spans]
    if answer.novelty or task == "novelty":
        parts.append(f"novelty {answer.novelty:.2f}")
    if answer.embedding:
        parts.append(f"embedding of {len(answer.embedding) // _NUMBER_BYTES:,} numbers (--json shows them)")
    cut = click.style("  (truncated)", fg="yellow") if answer.truncated else ""
    return f"{'  '.join(parts)}  {text}{cut}"


def _verdict(answer: Answer, task: str) -> list[str]:
    """Label and score, for the tasks that give them."""
    if task in {"embed", "novelty"}:
        return []
    if task == "tokens" and not answer.spans:
        return ["nothing found"]
    return [click.style(f"{printable(answer.label) or '-'} {answer.score:.2f}", fg=colour_of(answer.label))]


def clock_time(time_us: int) -> str:
    """UTC date and time to the millisecond; the bare number when no calendar has it (device clocks lie)."""
    try:
        return datetime.fromtimestamp(time_us / 1_000_000, UTC).isoformat(sep=" ", timespec="milliseconds")[:-6]
    except (ValueError, OverflowError, OSError):
        return f"{time_us} us"


def printable(text: str) -> str:
    """At most `TEXT_CHARS_MAX` characters, control characters escaped."""
    return escaped(text[:TEXT_CHARS_MAX]) + ("…" if len(text) > TEXT_CHARS_MAX else "")


def escaped(text: str, but: str = "") -> str:
    """The text, control characters escaped `but` for these."""
    return "".join(
        c if c.isprintable() or c in but else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


def json_text(text: str, end: TextEnd) -> str:
    """A generated text and what it took, as one line of JSON."""
    usage = {"prompt_tokens": end.prompt_tokens, "new_tokens": end.new_tokens}
    whole = {"text": text, "finish": end.finish, "usage": usage, "model": end.model, "model_version": end.model_version}
    return msgspec.json.encode(whole).decode()


def colour_of(label: str) -> str:
    """A colour that belongs to the label."""
    return _COLOURS[sum(label.encode(errors="replace")) % len(_COLOURS)]


def _content(item: RecordItem) -> str:
    record = item.record
    parts = [printable(record.text)] if record.text else []
    parts += [f"{printable(name)}={value:g}" for name, value in list(record.metrics.items())[:12]]
    if len(record.metrics) > 12:
        parts.append(f"and {len(record.metrics) - 12} more metrics")
    parts += [f"{printable(name)}={printable(value)}" for name, value in list(record.labels.items())[:6]]
    if record.payload:
        parts.append(f"[{len(record.payload)} bytes {printable(record.content_type)}]")
    return " ".join(parts)


def _identity(item: Item) -> dict[str, Any]:
    return {
        "device_id": item.device_id,
        "spool_id": item.spool_id.hex(),
        "sequence": item.sequence,
        "site": item.site,
        "stream": item.stream,
    }


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()
