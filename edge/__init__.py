"""The edge agent: sources, batcher, uplink, with the kernel's spool. It knows no engine, no Kafka, no torch.

`Agent` is loaded when it is asked for, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge.agent import Agent
    from sluice.record import Record, Sensitivity

__all__ = ["Agent", "Record", "Sensitivity"]


def __getattr__(name: str) -> Any:
    if name == "Agent":
        from edge.agent import Agent

        return Agent
    if name in {"Record", "Sensitivity"}:
        from sluice import record

        return getattr(record, name)
    raise AttributeError(f"module 'edge' has no attribute {name!r}")
