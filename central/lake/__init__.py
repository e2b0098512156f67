"""The lake: Delta tables of Parquet files, in which data and Kafka offsets are committed in one atomic step.

From the outside in: `writer` (what a flush does), `commit` (the protocol that keeps zombies out; pure), `fates`
(de-duplication; pure), `pending` (what waits for a flush), `table` (one Delta table), `files` (Parquet), `storage`
(directory or S3), `schema` (columns), `maintenance` (describe, compact, vacuum, verify).
"""
