"""One system in one process, driven by JSON lines: `python worker.py SYSTEM --model FOLDER --texts FILE ...`.

Runs in the system's own environment, so it imports nothing but the standard library and `systems/SYSTEM.py`. That
module has `load(model, settings)` which returns an object with

    embed(texts) -> float32 array [texts, width]
    details() -> dict                    optional: what belongs to the last `embed` (padding share) or to the system
    mark()                               optional: `details` counts from here
    micro(texts, rounds) -> dict         optional: its own small measurements
    loop, submit(text, online)           optional: an event loop, and a coroutine that ends with the text's result

Requests, one JSON object a line: {"op": "run", "set": NAME} -> {"seconds"}; {"op": "embed", "set", "count"} -> vectors
as base64 of little-endian float32; {"op": "open_loop", ...} -> latencies; {"op": "micro"}; {"op": "quit"}. The first
line that comes back is {"ready": true, "versions"}. Whatever else is printed goes to stderr.
"""

import argparse
import asyncio
import base64
import gc
import importlib
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

VERSIONS = (
    "torch", "transformers", "tokenizers", "sentence-transformers", "infinity-emb", "ctranslate2", "embed-anything",
    "openvino", "optimum", "optimum-intel", "onnxruntime", "sluice-stream",
)  # fmt: skip


class Worker:
    def __init__(self, system, sets):
        self.system = system
        self.sets = sets

    def run(self, request):
        texts = self.sets[request["set"]]
        options = request.get("options", {})
        gc.collect()
        start = time.perf_counter()
        vectors = self.system.embed(texts, **options)
        seconds = time.perf_counter() - start
        if len(vectors) != len(texts):
            raise RuntimeError(f"{len(vectors)} results for {len(texts)} texts")
        return {"seconds": seconds, "details": self._details()}

    def embed(self, request):
        import numpy as np

        texts = self.sets[request["set"]][: request["count"]]
        vectors = np.asarray(self.system.embed(texts, **request.get("options", {})), "<f4")
        return {"vectors": base64.b64encode(vectors.tobytes()).decode(), "width": int(vectors.shape[1])}

    def micro(self, request):
        return {"micro": self.system.micro(self.sets[request["set"]], request["rounds"])}

    def open_loop(self, request):
        texts = self.sets[request["set"]]
        arrivals = [(due, texts[i], bool(online)) for due, i, online in request["arrivals"]]
        if hasattr(self.system, "mark"):
            self.system.mark()
        measured = self.system.loop.run_until_complete(open_loop(self.system.submit, arrivals, request["drain_s"]))
        return measured | {"details": self._details()}

    def _details(self):
        return self.system.details() if hasattr(self.system, "details") else {}


async def open_loop(submit, arrivals, drain_s):
    """Sends each text when it is due, whatever became of those before it; seconds from the due time to the result.

    What is not answered `drain_s` after the last arrival is cancelled and counted as unfinished: its latency is at
    least what it had waited by then, and that is what is reported for it.
    """
    latencies = [[], []]
    late = []
    unfinished = [0, 0]
    failed = [0, 0]
    start = time.perf_counter() + 0.05

    async def one(due, text, online):
        try:
            await submit(text, online)
        except asyncio.CancelledError:
            unfinished[online] += 1
        except Exception:  # noqa: BLE001 - a refusal is counted as one
            failed[online] += 1
            return
        latencies[online].append(time.perf_counter() - start - due)

    tasks = []
    for due, text, online in arrivals:
        wait = start + due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        late.append(time.perf_counter() - start - due)
        tasks.append(asyncio.ensure_future(one(due, text, online)))
        if wait <= 0:
            await asyncio.sleep(0)
    _, pending = await asyncio.wait(tasks, timeout=drain_s)
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending, timeout=10)
    late.sort()
    return {
        "background_s": latencies[0],
        "online_s": latencies[1],
        "unfinished": unfinished[::-1],
        "failed": failed[::-1],
        "sender_late_s_p99": late[int(0.99 * (len(late) - 1))],
        "seconds": time.perf_counter() - start,
    }


def versions():
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("system")
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--settings", default="{}")
    arguments = parser.parse_args()
    # Not every library asks OMP_NUM_THREADS; nobody gets more than these cores.
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[: int(os.environ["OMP_NUM_THREADS"])])
    # Answers have the real stdout for themselves: libraries print what they like.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message):
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    sets = json.loads(Path(arguments.texts).read_text(encoding="utf-8"))
    module = importlib.import_module(f"systems.{arguments.system}")
    worker = Worker(module.load(arguments.model, json.loads(arguments.settings)), sets)
    answer({"ready": True, "versions": versions()})
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "quit":
            break
        try:
            answer(getattr(worker, request["op"])(request))
        except Exception as error:  # noqa: BLE001 - the host decides what a failure means
            answer({"error": f"{type(error).__name__}: {error}"})
    # Some libraries hang or abort when the interpreter takes their threads down.
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
