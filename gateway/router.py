"""From a verdict to the two parts of a batch: what stays on the site and what leaves. Pure.

Invariants:
  * There is always exactly one `ExportBatch`, and it covers the whole range: what does not leave is a gap in it, so a
    batch that stays wholly on the site still sends its receipt.
  * Only a record whose decision is CLOUD leaves. DROP is declared and kept nowhere. Anything else stays.
  * A verdict that does not fit its batch keeps all of it on the site.

Write the local part first: a receipt must not leave before what it speaks of is durable.
"""

from typing import Final, NamedTuple

from gateway.batches import Decision, ExportBatch, LocalBatch, Verdict
from sluice.record import GapReason, RecordBatch, Route

#: For batches whose classification failed: they stay.
IN_DOUBT: Final = Verdict(Decision(Route.LOCAL, "in-doubt"))


class Parts(NamedTuple):
    """What a batch becomes. `local` is None when nothing stays."""

    local: LocalBatch | None
    export: ExportBatch


def route(batch: RecordBatch, verdict: Verdict) -> Parts:
    """Cuts a batch by a verdict.

    Args:
        batch: in canonical form, as `codec.decode` gives it.
        verdict: the decision for each of its present records.
    """
    if not batch.present_count:
        return Parts(None, ExportBatch.of(batch, {}))
    if any(not 0 <= index < batch.present_count for index in verdict.exceptions):
        verdict = IN_DOUBT
    if verdict.default.leaves and not verdict.exceptions:
        return Parts(None, ExportBatch.of(batch, {}))
    withheld: dict[GapReason, list[int]] = {GapReason.WITHHELD: [], GapReason.DROPPED: []}
    for index, sequence in enumerate(batch.sequences()):
        decision = verdict.at(index)
        if not decision.leaves:
            withheld[GapReason.WITHHELD if decision.stays else GapReason.DROPPED].append(sequence)
    return Parts(LocalBatch.of(batch, verdict), ExportBatch.of(batch, withheld))
