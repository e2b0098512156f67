"""The site's gateway: from MQTT to Kafka, and what is sensitive stays.

A record's path, file by file:

    inbox -> judge (live_policy, classifier, scanner) -> router -> (local -> sealed -> analysis | bridge)

What may leave is an `ExportBatch` and what stays is a `LocalBatch` (`batches`). Pure: `batches`, `router`, `ring`,
`seen`, `policy`. What cannot be processed goes to the `quarantine`; what devices say of themselves passes `status`.
"""
