"""The inference engine that gateway and central share: text in, label, score, novelty and embedding out.

A text's path, file by file: `service` takes the call, `prepare` checks, hashes and looks it up in the
caches (`results`, `token_cache`) or tokenises it (`tokens`), `scheduler` groups it with texts of like
length, `runner` hands the batch to a `backend` within the limits of `memory`, `tasks` reads the model's
output.

A prompt's path: `generation` admits it, `generation_model` reads it, a driver that `generation_choice` chose generates
(`generation_batched` or `generation_plain`), `generation_text` turns tokens into pieces of text.

`buckets`, `cost`, `scheduler` and `memory` are pure: they know no clock, thread or device.
"""
