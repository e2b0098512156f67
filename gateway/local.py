"""What stays on the site: into the sealed store, then to on-site analysis.

This module must not import the bridge (an import contract holds it): there is no way from here to the cloud but the
derived results of `analysis`, which carry the fields that the policy lists.
"""

from gateway.batches import LocalBatch
from gateway.sealed import SealedStore


class LocalSink:
    """A `Sink` of `LocalBatch`es.

    Args:
        store: where they become durable. Analysis follows the store on its own; it can neither delay nor fail a write.
    """

    def __init__(self, store: SealedStore) -> None:
        self._store = store

    async def write(self, batch: LocalBatch) -> None:
        """Returns if and only if the records are durable on the site.

        Raises:
            Backpressure: the store is full: stop acknowledging, try again after `retry_after_s`.
            Retryable: not durable; may be tried again.
        """
        await self._store.write(batch)
