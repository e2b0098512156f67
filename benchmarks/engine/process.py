"""The host's side of `worker.py`: a system in a process of its own, idle unless it is asked."""

import base64
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.engine.rounds import Entry
from benchmarks.engine.texts import Workload

WORKER = Path(__file__).with_name("worker.py")
OURS = "sluice_engine"
READY_S_MAX = 240.0
ANSWER_S_MAX = 600.0


class Unavailable(Exception):
    """The system cannot be measured here; the message is shown in the report."""


@dataclass(frozen=True)
class Place:
    """Where systems run: the same for all of them."""

    model: Path
    texts: Path
    hub: Path
    logs: Path
    threads: int
    passive: bool

    def environment(self) -> dict[str, str]:
        threads = str(self.threads)
        fixed = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "true",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.hub),
            "DO_NOT_TRACK": "1",
            "INFINITY_ANONYMOUS_USAGE_STATS": "0",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
        }
        waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if self.passive else {}
        return {**os.environ, **fixed, **waiting}


@dataclass
class System:
    """One system: what it is called in tables, which module drives it, in which environment.

    Attributes:
        name: unique among the systems of a run.
        module: under `systems/`.
        python: of its environment.
        settings: for the module's `load`.
        options: for each `embed`.
    """

    name: str
    module: str
    python: Path = Path(sys.executable)
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def process_key(self) -> tuple[str, str, str]:
        """Systems that differ in options only share a process."""
        return self.module, str(self.python), json.dumps(self.settings, sort_keys=True)


class Worker:
    """A started process. Close it."""

    def __init__(self, system: System, place: Place) -> None:
        self.name = system.name
        place.logs.mkdir(parents=True, exist_ok=True)
        self._log = place.logs / f"{''.join(c if c.isalnum() else '-' for c in system.name)}.log"
        command = [str(system.python), str(WORKER), system.module, "--model", str(place.model)]
        command += ["--texts", str(place.texts), "--settings", json.dumps(system.settings)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=place.environment()
            )
        self._buffer = b""
        self.versions: dict[str, str] = {}

    def wait_ready(self) -> None:
        try:
            self.versions = self._answer(READY_S_MAX)["versions"]
        except Unavailable:
            self.close()
            raise

    def ask(self, op: str, timeout_s: float = ANSWER_S_MAX, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **request}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise Unavailable(self._last_words()) from error
        return self._answer(timeout_s)

    def vectors(self, set_name: str, count: int, options: dict[str, Any]) -> Any:
        import numpy as np

        answer = self.ask("embed", set=set_name, count=count, options=options)
        flat = np.frombuffer(base64.b64decode(answer["vectors"]), "<f4")
        return flat.reshape(-1, answer["width"])

    def close(self) -> None:
        if self._process.poll() is None:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(b'{"op": "quit"}\n')
                self._process.stdin.close()
                self._process.wait(10)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
        self._process.wait()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise Unavailable(f"no answer within {timeout_s:g} s")
            read = os.read(descriptor, 1 << 20)
            if not read:
                raise Unavailable(self._last_words())
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"it ended: {lines[-1][:300]}" if lines else "it ended without a word"


class Pool:
    """The processes of a run, started when first needed. Use it as a context."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._workers: dict[tuple[str, str, str], Worker] = {}
        self.unavailable: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def start(self, systems: Sequence[System]) -> list[System]:
        """Starts what is not running yet, one after another; those that work, the others noted with their reason."""
        working = []
        for i, system in enumerate(systems):
            # Loading uses one core: the next peer loads beside. Ours measures while it loads, so it does so alone.
            pair = systems[i : i + 2]
            if all(each.module != OURS for each in pair):
                for each in pair:
                    self._launch(each)
            try:
                self.worker(system)
                working.append(system)
            except Unavailable as error:
                self.unavailable[system.name] = str(error)
        return working

    def worker(self, system: System) -> Worker:
        key = system.process_key
        self._launch(system)
        worker = self._workers[key]
        if not worker.versions:
            try:
                worker.wait_ready()
            except Unavailable:
                del self._workers[key]
                raise
        return worker

    def _launch(self, system: System) -> None:
        if system.process_key not in self._workers:
            self._workers[system.process_key] = Worker(system, self.place)

    def stop(self, system: System) -> None:
        """Ends a system's process, for its memory."""
        worker = self._workers.pop(system.process_key, None)
        if worker is not None:
            worker.close()

    @property
    def versions(self) -> dict[str, dict[str, str]]:
        return {worker.name: worker.versions for worker in self._workers.values()}


def entry(pool: Pool, system: System, workload: Workload) -> Entry:
    def run() -> tuple[float, dict[str, Any]]:
        answer = pool.worker(system).ask("run", set=workload.name, options=system.options)
        return answer["seconds"], answer["details"]

    return Entry(system.name, run, len(workload.texts), workload.tokens)
