"""Bugs that histories must find: each is one that a system of this kind had, or that a test here once let through."""

from enum import Enum


class Bug(Enum):
    """Switched on in an actor or in a core's surroundings; the cores themselves stay as they are."""

    PLACE_BEFORE_RECORDS = "the source's place is stored before the records in front of it are"
    DELETE_ON_PUBACK = "the device deletes on the broker's PUBACK instead of the application acknowledgement"
    DROP_WITHOUT_A_WORD = "a full spool drops its oldest batch without declaring it"
    SETTLE_BEFORE_DURABLE = "the gateway acknowledges before Kafka has the record"
    RESENDS_IN_FLIGHT_ARE_SETTLED = "the gateway acknowledges a resend while the first copy is still on its way"
    CUMULATIVE_IS_THE_HIGHEST = "the cumulative acknowledgement is the highest settled sequence"
    NO_RECEIPT = "a batch that stays wholly on the site sends no receipt"
    DOUBT_GOES_TO_THE_CLOUD = "a batch whose classification fails is exported"
    UNKNOWN_FIELDS_CROSS = "the gateway forwards the envelope's own bytes when nothing was withheld"
    LOCAL_AFTER_RECEIPT = "the receipt leaves before the local part is durable"
    NO_DEDUPLICATION = "the lake trusts that nothing comes twice"
    TWO_STEPS = "the lake commits rows and offsets one after the other"
    ZOMBIES_ARE_NOT_FENCED = "the lake commits without checking where the table stands"
    KAFKAS_OFFSET = "the lake continues at the offset committed to Kafka, as soon as it has read"
    CLAIMS_SURVIVE_A_DROP = "a dropped batch keeps its claims on positions"
