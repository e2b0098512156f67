"""The Python client: live records and results, and online inference. Needs the extra `client` (grpcio) only.

```python
from sluice.client import connect

with connect("localhost:7443") as client:
    for item in client.subscribe(kinds=["results"], streams=["syslog*"], start="earliest"):
        print(item.device_id, item.sequence, item.label, item.score)
    for answer in client.analyze(["disk full on /dev/sda1"]):
        print(answer.label, answer.score)
    for piece in client.generate("The disk is full because"):  # where the server has a generative model
        print(piece, end="")
```

A subscription that is cut off (network, server restart, drain) resumes by itself, without gap or repeat. To go on in
another process, keep `subscription.resume_token` with what you did with the items and pass it as `resume_token`.

`connect_async` gives the same for asyncio.
"""

from typing import TYPE_CHECKING

from sluice.client.items import Answer, Batch, RecordItem, ResultItem, TextSpan

if TYPE_CHECKING:
    from sluice.client.aio import AsyncFeedClient
    from sluice.client.channel import Tls
    from sluice.client.sync import FeedClient

__all__ = ["Answer", "Batch", "RecordItem", "ResultItem", "TextSpan", "connect", "connect_async"]


def connect(target: str, *, tls: "Tls | None" = None) -> "FeedClient":
    """A client for threads. The connection is made with the first call; close it, or use it in a `with` block.

    Args:
        target: host:port.
        tls: how to trust the server (`sluice.client.channel.Tls`); None for no TLS.
    """
    from sluice.client.sync import FeedClient

    return FeedClient(target, tls)


def connect_async(target: str, *, tls: "Tls | None" = None) -> "AsyncFeedClient":
    """As `connect`, for asyncio."""
    from sluice.client.aio import AsyncFeedClient

    return AsyncFeedClient(target, tls)
