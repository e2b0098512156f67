"""Where records come from: one module per kind.

A source is a `sluice.delivery.Source` of chunks: `deliveries()` yields `Delivery[Chunk]`s in order and ends when the
source is exhausted or stopped. A delivery is acked when its records and its cursors are durable in the spool, so what a
source remembers (its cursors) and what it delivered can never disagree.
"""
