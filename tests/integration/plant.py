"""A pipeline under load of which every record is known: what went in is compared with what came out, one by one.

Load: a generator, whose records carry an index; a log of numbered lines, of which some hold personal data; and a log of
few lines, which are analysed. All three remember their place in the agent's spool, so a killed agent loses and repeats
nothing, and the comparison is exact.

The agent and gateway are as in the demo. Central runs its roles `lake` and `feed`; `analysis` is a process of its own,
since an engine takes ten seconds to load and is not what is killed most. The gateway's own engine is off for the same
reason.
"""

import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import IO, Any, Self

from sluice.demo.canaries import Canary, Sample, SampleMaker
from sluice.demo.evidence import Evidence, gather
from sluice.demo.lake_view import IDENTITY, LEDGER, QUARANTINE, RECORDS, RESULTS, LakeView
from sluice.demo.pipeline import CENTRAL, EDGE, GATEWAY, PARTS, Pipeline
from tests.brokers.base import KafkaBroker, MqttBroker
from tests.brokers.clients import eventually

START_TIMEOUT_S = 90.0
SETTLE_TIMEOUT_S = 120.0
LINES_PER_S = 100
NOTES_PER_S = 3
GENERATED_PER_S = 300
ANALYSIS = "analysis"
OVERRIDES: dict[str, dict[str, Any]] = {
    EDGE: {"uplink": {"ack_timeout_s": 2.0, "ack_timeout_s_max": 4.0}, "batch": {"age_s_max": 0.2}},
    GATEWAY: {"local": {"analysis": {"enabled": False}}},
    CENTRAL: {
        "roles": ["lake", "feed"],
        "feed": {"analyze": False},
        "lake": {"flush_interval_s": 0.5, "flush_idle_s": 0.2},
        "analysis": {"streams": ["notes"]},
        # A precision that is measured at the start may differ after a restart, and results say which one it was.
        "engine": {"precision": "fp32"},
    },
}


class LineWriter:
    """Appends numbered lines to a log; every tenth holds a canary, every tenth a beacon."""

    def __init__(self, path: Path, lines_per_s: int, *, seed: int | None = None) -> None:
        self.path = path
        self.harmless: list[str] = []
        self.personal: list[str] = []
        self.canaries: list[Canary] = []
        self.beacons: list[Canary] = []
        self._maker = None if seed is None else SampleMaker(seed)
        self._lines_per_s = lines_per_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name=path.name, daemon=True)
        path.touch()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _write(self) -> None:
        tick_s = 0.05
        owed = 0.0
        with self.path.open("a", encoding="utf-8") as file:
            while not self._stop.wait(tick_s):
                owed += self._lines_per_s * tick_s
                for _ in range(int(owed)):
                    self._line(file)
                owed -= int(owed)
                file.flush()

    def _line(self, file: IO[str]) -> None:
        number = len(self.harmless) + len(self.personal)
        sample = self._sample() if self._maker and number % 5 == 0 else None
        text = f"line {number} {sample.record['text'] if sample else 'the step took 12 ms'}"
        if sample is not None:
            self.canaries += sample.canaries
            self.beacons += sample.beacons
        (self.personal if sample and sample.canaries else self.harmless).append(text)
        file.write(f"{text}\n")

    def _sample(self) -> Sample:
        """The next one that carries its token in its text."""
        assert self._maker is not None
        while True:
            [sample] = self._maker.take(1)
            if all(token.carrier == "text" for token in (*sample.canaries, *sample.beacons)):
                return sample


class Plant:
    """The pipeline and its load; use in a `with` block."""

    def __init__(
        self, root: Path, mqtt: MqttBroker, kafka: KafkaBroker, *, seed: int, policy_file: Path | None = None
    ) -> None:
        (root / "input").mkdir(parents=True)
        self.lines = LineWriter(root / "input" / "app.log", LINES_PER_S, seed=seed)
        self.notes = LineWriter(root / "input" / "notes.log", NOTES_PER_S)
        sources = [
            {"kind": "generator", "stream": "load", "rate_per_s": float(GENERATED_PER_S), "text_bytes": 80},
            {"kind": "tail", "stream": "logs", "paths": [str(self.lines.path)], "sensitivity": "internal"},
            {"kind": "tail", "stream": "notes", "paths": [str(self.notes.path)], "sensitivity": "public"},
        ]
        policy = {"policy": {"file": str(policy_file)}} if policy_file else {}
        overrides = {**OVERRIDES, GATEWAY: {**OVERRIDES[GATEWAY], **policy}}
        self.pipeline = Pipeline(root / "run", sources, mqtt_port=mqtt.port, kafka_port=kafka.port, overrides=overrides)
        self.lake = LakeView(self.pipeline.folders.lake)

    def __enter__(self) -> Self:
        for part in (GATEWAY, CENTRAL, EDGE):
            self.pipeline.start(part)
        self.pipeline.start_role(ANALYSIS)
        for process in self.pipeline.supervisor.processes.values():
            process.wait_ready(START_TIMEOUT_S)
        self.lines.start()
        self.notes.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.stop()
        self.notes.stop()
        self.pipeline.supervisor.close()

    def works(self, part: str) -> bool:
        """Whether the part has moved records since it was started."""
        metric = {
            EDGE: "sluice_uplink_acked_records_total",
            GATEWAY: "sluice_bridge_records_total",
            CENTRAL: "sluice_lake_table_rows_total",
        }[part]
        return self.pipeline.read(part).total(metric) > 0

    def restart(self, part: str) -> None:
        if part == ANALYSIS:
            self.pipeline.start_role(ANALYSIS)
        else:
            self.pipeline.start(part)

    def drain(self) -> None:
        """The input ends, everything settles, all parts end in order."""
        self.lines.stop()
        self.notes.stop()
        lines = len(self.lines.harmless) + len(self.notes.harmless)
        eventually(
            lambda: self.lake.rows(RECORDS, "stream <> 'load'") >= lines, "all lines in the lake", SETTLE_TIMEOUT_S
        )
        self._stop(EDGE)
        eventually(lambda: self.lake.agents_ended() == 1, "the agent's last status in the lake", SETTLE_TIMEOUT_S)
        self.ledger(wait_s=SETTLE_TIMEOUT_S)
        notes = len(self.notes.harmless)
        eventually(lambda: self.lake.rows(RESULTS) >= notes, "all notes analysed", SETTLE_TIMEOUT_S)
        for part in (GATEWAY, ANALYSIS, CENTRAL):
            self._stop(part)

    def _stop(self, part: str) -> None:
        process = self.pipeline.supervisor.processes[part]
        assert process.stop(40.0) == 0, f"{part}: {process.log_tail()}"

    def ledger(self, wait_s: float = 0.0) -> dict[str, Any]:
        argv = [sys.executable, "-m", "sluice", "ledger", "--lake", str(self.lake.folder), "--json"]
        argv += ["--wait", str(wait_s)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=wait_s + 60, check=False)
        books: dict[str, Any] = json.loads(done.stdout)
        return books

    def sealed_texts(self) -> list[str]:
        argv = [sys.executable, "-m", "sluice", "sealed", "query", "--json", "--limit", "0"]
        argv += ["--config", str(self.pipeline.folders.config(GATEWAY))]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
        return [json.loads(line)["text"] for line in done.stdout.splitlines()]

    def check(self) -> dict[str, Any]:
        """Every promise, on what is there after `drain`. Returns the ledger."""
        books = self.ledger()
        assert books["balanced"], books
        assert self.lake.duplicates() == 0
        assert books["quarantined"] == books["expired"] == books["dropped"] == books["in_spool"] == 0, books
        self._check_records(books)
        self._check_results()
        evidence = self.search()
        assert evidence.leaked == ()
        assert evidence.unopened == 0
        assert evidence.beacons_found == len(self.lines.beacons) > 0
        return books

    def _check_records(self, books: dict[str, Any]) -> None:
        texts = Counter(dict(self.lake.query(RECORDS, "text, count(*)", "where stream <> 'load' group by text")))
        assert texts == Counter(self.lines.harmless + self.notes.harmless), "each line exactly once"
        indexes = "count(*), count(distinct metrics['index']), min(metrics['index']), max(metrics['index'])"
        [(rows, distinct, low, high)] = self.lake.query(RECORDS, indexes, "where stream = 'load'")
        assert rows == distinct == high + 1, "each generated record exactly once, without a hole"
        assert low == 0
        assert sorted(self.sealed_texts()) == sorted(self.lines.personal), "each personal line exactly once, sealed"
        assert books["kept_on_site"] == len(self.lines.personal) > 0
        assert books["in_lake"] == rows + sum(texts.values())
        assert self.lake.rows(QUARANTINE) == 0
        assert self.lake.rows(LEDGER) > 0

    def _check_results(self) -> None:
        counts = f"count(*), count(distinct ({IDENTITY})), count(distinct stream)"
        notes = len(self.notes.harmless)
        assert self.lake.query(RESULTS, counts) == [(notes, notes, 1)], "each note has one result"

    def search(self) -> Evidence:
        metrics = {part: self.pipeline.read(part).text for part in PARTS}
        return gather(self.pipeline, self.lines.canaries, self.lines.beacons, metrics)
