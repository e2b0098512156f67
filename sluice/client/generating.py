"""A request for text, and what its last message says. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from protos import feed_pb2
from sluice.client.analyzing import Priority, priority_of, refusal
from sluice.errors import Permanent


@dataclass(frozen=True, slots=True)
class TextEnd:
    """How a text ended, and what it took.

    Attributes:
        finish: the model ended it (`end`), at the limit (`length`), in front of a stop text (`stop`).
        prompt_tokens: with special tokens and those of the images.
        new_tokens: generated.
    """

    finish: Literal["", "end", "length", "stop"]
    prompt_tokens: int
    new_tokens: int
    model: str
    model_version: str


def build_request(
    prompt: str,
    *,
    images: Sequence[bytes] = (),
    chat: bool = False,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    priority: Priority = "online",
    deadline_s: float | None = None,
) -> feed_pb2.GenerateRequest:
    """The request; see `FeedClient.generate`.

    Raises:
        Permanent: naming what cannot be sent.
    """
    for name, text in [("prompt", prompt), *(("stop", each) for each in stop)]:
        if wrong := refusal(text):
            raise Permanent(f"{name}: {wrong}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise Permanent(f"max_new_tokens: {max_new_tokens} is not positive")
    try:
        return feed_pb2.GenerateRequest(
            prompt=prompt,
            images=images,
            chat=chat,
            max_new_tokens=max_new_tokens or 0,
            temperature=temperature,
            stop=stop,
            priority=priority_of(priority),
            # 0 would be the server's default.
            deadline_ms=0 if deadline_s is None else max(1, int(deadline_s * 1000)),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise Permanent(f"the request cannot be sent: {error}") from error


def end_of(message: feed_pb2.GenerateResponse) -> TextEnd | None:
    """What the last message says; None for any other."""
    if not message.HasField("end"):
        return None
    end = message.end
    names: dict[int, Literal["end", "length", "stop"]] = {
        feed_pb2.GenerateEnd.FINISH_END: "end",
        feed_pb2.GenerateEnd.FINISH_LENGTH: "length",
        feed_pb2.GenerateEnd.FINISH_STOP: "stop",
    }
    return TextEnd(names.get(end.finish, ""), end.prompt_tokens, end.new_tokens, end.model, end.model_version)
