"""One run of the demo: start, watch, drain in order, search, balance.

Order of the drain: the sample stream ends, the agent (it empties its spool), then the lake and the analysis catch up,
then gateway and central end, and only then, with nothing moving, Kafka and the lake are searched and the books are
read. Every wait has a deadline; a part that dies ends the run with the end of its log.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from sluice.demo.canaries import SampleMaker
from sluice.demo.evidence import Evidence, SealedEvidence, gather, look_into_sealed
from sluice.demo.feeder import Feeder
from sluice.demo.lake_view import RECORDS, RESULTS, LakeView
from sluice.demo.listener import Listener
from sluice.demo.pipeline import CENTRAL, EDGE, GATEWAY, PARTS, Pipeline, plain_environment
from sluice.demo.processes import ManagedProcess, ending
from sluice.demo.readings import Reading
from sluice.demo.screen import Screen, View
from sluice.demo.sources import SAMPLE_STREAM, demo_sources
from sluice.demo.stages import Rates, Stages, batches_per_length, stages
from sluice.demo.summary import Summary, broken_promises
from sluice.errors import Permanent

START_DEADLINE_S: Final = 180.0
INPUT_DEADLINE_S: Final = 15.0
PART_DEADLINE_S: Final = 40.0
LEDGER_DEADLINE_S: Final = 120.0
SITE_QUIET_S: Final = 8.0
_TICK_S: Final = 0.5


class Interrupted(Permanent):
    """Asked to end before there was anything to drain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says.

    Attributes:
        root: an empty folder.
        seconds: how long records flow; None until `stop`.
        tail: files or globs instead of the host's log files.
        backlog_bytes: read of what is in the log files already.
        drain_seconds: for lake and analysis to catch up.
        feed_port: 0 for any free one.
        seed: of the sample stream.
    """

    root: Path
    seconds: float | None
    tail: tuple[str, ...]
    backlog_bytes: int
    drain_seconds: float
    feed_port: int
    seed: int


class DemoRun:
    """See the module's docstring.

    Args:
        options: of the run.
        stop: set it to end: the run drains then.
        screen: for progress and the live table.
    """

    def __init__(self, options: Options, stop: threading.Event, screen: Screen) -> None:
        self._options = options
        self._stop = stop
        self._screen = screen
        self._pipeline = Pipeline(
            options.root, demo_sources(options.tail, options.backlog_bytes), feed_port=options.feed_port
        )
        self._lake = LakeView(self._pipeline.folders.lake)
        self._rates = Rates()
        self._readings: dict[str, Reading] = {part: Reading() for part in PARTS}
        self._rss_bytes_max = 0
        self._site_results = -1
        self._site_results_s = 0.0
        self._problems: list[str] = []

    def run(self) -> Summary:
        """The whole run; nothing of it is left when it returns but files.

        Raises:
            ProcessFailed: a part died, or was not ready in time.
            Interrupted: stopped before records flowed.
        """
        begun_s = time.monotonic()
        with ExitStack() as stack:
            stack.enter_context(self._pipeline)
            agent = self._start()
            listener = stack.enter_context(Listener(self._pipeline.feed_target))
            feeder = stack.enter_context(Feeder(agent.stdin, SampleMaker(self._options.seed)))
            flowing_s = time.monotonic()
            with self._screen:
                self._watch(listener, flowing_s)
                seconds = time.monotonic() - flowing_s
                self._drain(agent, feeder, listener)
            numbers = self._conclude(feeder, listener)
        seconds_total = time.monotonic() - begun_s
        numbers |= {"seconds": round(seconds, 1), "seconds_total": round(seconds_total, 1)}
        return Summary(**numbers, problems=(*self._problems, *broken_promises(numbers)))

    # --- start

    def _start(self) -> ManagedProcess:
        pipeline = self._pipeline
        self._screen.say("sluice demo: starting embedded brokers (MQTT, Kafka)")
        self._await_ready(pipeline.start_brokers())
        self._screen.say("sluice demo: starting gateway and central: the engine loads its model")
        self._await_ready([pipeline.start(GATEWAY), pipeline.start(CENTRAL)])
        agent = pipeline.start(EDGE, stdin=subprocess.PIPE)
        self._await_ready([agent])
        self._screen.say(f"sluice demo: records flow; the feed is at {pipeline.feed_target}")
        return agent

    def _await_ready(self, processes: list[ManagedProcess]) -> None:
        deadline_s = time.monotonic() + START_DEADLINE_S
        while not all(process.ready() for process in processes):
            self._check_alive()
            if time.monotonic() > deadline_s:
                late = next(process for process in processes if not process.ready())
                raise late.failure(f"was not ready after {START_DEADLINE_S:g} s")
            if self._stop.wait(0.1):
                raise Interrupted("stopped before records flowed")

    def _check_alive(self) -> None:
        for process in self._pipeline.supervisor.ended():
            raise process.failure(ending(process.returncode))

    # --- watch

    def _watch(self, listener: Listener, flowing_s: float) -> None:
        ends_s = None if self._options.seconds is None else flowing_s + self._options.seconds
        while ends_s is None or time.monotonic() < ends_s:
            self._check_alive()
            self._look(listener, "Ctrl-C drains and sums up" if ends_s is None else "running")
            tick_s = _TICK_S if ends_s is None else min(_TICK_S, max(0.0, ends_s - time.monotonic()))
            if self._stop.wait(tick_s):
                return

    def _look(self, listener: Listener, headline: str) -> Stages:
        """Reads the parts that run, and draws."""
        for part in PARTS:
            process = self._pipeline.supervisor.processes.get(part)
            reading = self._pipeline.read(part) if process is not None and process.alive else None
            if reading:
                self._readings[part] = reading
        self._sample_memory()
        edge, gateway, central = (self._readings[part] for part in PARTS)
        now = stages(edge, gateway, central, feed_records=listener.records, feed_results=listener.results)
        self._rates.add(time.monotonic(), now)
        if self._screen.enabled:
            batches = batches_per_length(gateway, central)
            self._screen.show(View(f"sluice demo · {headline}", now, self._rates.per_s(), batches, listener.last()))
        return now

    def _sample_memory(self) -> None:
        agent = self._pipeline.supervisor.processes[EDGE]
        try:
            self._rss_bytes_max = max(self._rss_bytes_max, psutil.Process(agent.pid).memory_info().rss)
        except psutil.Error:
            return  # it has ended

    # --- drain

    def _drain(self, agent: ManagedProcess, feeder: Feeder, listener: Listener) -> None:
        self._screen.say("sluice demo: draining: the sources end, the agent empties its spool")
        feeder.close()
        self._until(lambda: self._taken(feeder) >= feeder.written, INPUT_DEADLINE_S, "the sample stream is read")
        self._stop_part(EDGE)
        self._screen.say("sluice demo: draining: lake and analysis catch up")
        deadline_s = time.monotonic() + self._options.drain_seconds

        def left_s() -> float:
            return max(1.0, deadline_s - time.monotonic())

        def drawing(check: Callable[[], bool]) -> Callable[[], bool]:
            def look_and_check() -> bool:
                self._look(listener, "draining")
                return check()

            return look_and_check

        # The agent's last word on how much it accepted must be in the lake before the books can be read.
        self._until(drawing(lambda: self._lake.agents_ended() >= 1), left_s(), "the agent's last status is in the lake")
        ledger = self._ledger(wait_s=left_s())
        if not ledger["balanced"]:
            self._problems.append("the ledger did not balance within the drain's deadline")
        self._until(drawing(lambda: self._analysed(ledger["kept_on_site"])), left_s(), "every text is analysed")
        self._until(drawing(lambda: self._heard_all(listener)), left_s(), "the client has everything")
        for part in (GATEWAY, CENTRAL):
            self._stop_part(part)

    def _until(self, check: Callable[[], bool], deadline_s: float, what: str) -> None:
        """Waits until `check` holds; a deadline that passes is a problem, and the run goes on."""
        ends_s = time.monotonic() + deadline_s
        pause = threading.Event()
        while not check():
            for process in self._pipeline.supervisor.ended():
                if process.name != EDGE:
                    raise process.failure(ending(process.returncode))
            if time.monotonic() > ends_s:
                self._problems.append(f"not within {deadline_s:.0f} s: {what}")
                return
            pause.wait(_TICK_S)

    def _taken(self, feeder: Feeder) -> float:
        reading = self._pipeline.read(EDGE)
        if reading:
            self._readings[EDGE] = reading
        refused = reading.total("sluice_stdin_line_refused_lines_total")
        if refused:
            feeder.written = min(feeder.written, int(refused))
            self._problems.append(f"the agent refused {refused:.0f} lines of the sample stream")
        return reading.total("sluice_accepted_records_total", stream=SAMPLE_STREAM)

    def _analysed(self, kept_on_site: int) -> bool:
        """Whether every text has its result.

        Of what stayed on the site only the number of records is known here, and one without a text has no result: there
        it also counts when nothing more comes.
        """
        texts = self._lake.rows(RECORDS, "text <> ''")
        results = self._lake.rows(RESULTS, "origin = 'site'")
        if results != self._site_results:
            self._site_results, self._site_results_s = results, time.monotonic()
        settled = results >= kept_on_site or time.monotonic() - self._site_results_s > SITE_QUIET_S
        return settled and self._lake.rows(RESULTS, "origin = 'cloud'") >= texts

    def _heard_all(self, listener: Listener) -> bool:
        if listener.error is not None:
            raise listener.error
        return listener.records >= self._lake.rows(RECORDS) and listener.results >= self._lake.rows(RESULTS)

    def _stop_part(self, part: str) -> None:
        status = self._pipeline.supervisor.processes[part].stop(PART_DEADLINE_S)
        if status != 0:
            log = self._pipeline.supervisor.processes[part].log_tail()
            self._problems.append(f"{part} {ending(status)}; the end of its log:\n{log}")

    # --- conclude

    def _conclude(self, feeder: Feeder, listener: Listener) -> dict[str, Any]:
        self._screen.say(
            "sluice demo: searching every Kafka topic, every file of the lake, logs and metrics for canaries"
        )
        metrics = {part: self._readings[part].text for part in PARTS}
        evidence = gather(self._pipeline, feeder.canaries, feeder.beacons, metrics)
        sealed = look_into_sealed(self._pipeline, feeder.canaries)
        ledger = self._ledger(wait_s=0.0)
        if evidence.unopened:
            self._problems.append(f"{evidence.unopened} compressed frames were too large to be searched")
        return self._numbers(evidence, sealed, ledger, feeder, listener)

    def _numbers(
        self, evidence: Evidence, sealed: SealedEvidence, ledger: dict[str, Any], feeder: Feeder, listener: Listener
    ) -> dict[str, Any]:
        _, gateway, central = (self._readings[part] for part in PARTS)
        return {
            "records_accepted": ledger["accepted"],
            "records_in_lake": self._lake.rows(RECORDS),
            "records_kept_on_site": ledger["kept_on_site"],
            "records_quarantined": ledger["quarantined"],
            "records_expired": ledger["expired"],
            "records_dropped": ledger["dropped"],
            "records_in_spool": ledger["in_spool"],
            "duplicates_in_lake": self._lake.duplicates(),
            "results": listener.results,
            "results_in_lake": self._lake.rows(RESULTS),
            "feed_records": listener.records,
            "canaries_planted": len(feeder.canaries),
            "canaries_found_outside_site": len(evidence.leaked),
            "canaries_leaked": evidence.leaked[:5],
            "canaries_sealed": sealed.canaries_readable,
            "canaries_sealed_in_clear": sealed.canaries_in_clear,
            "beacons_planted": len(feeder.beacons),
            "beacons_found": evidence.beacons_found,
            "bytes_searched": evidence.bytes_searched,
            "ledger_balanced": ledger["balanced"],
            "agent_rss_bytes_max": self._rss_bytes_max,
            "batches_by_length": batches_per_length(gateway, central),
            "labels": dict(listener.labels.most_common()),
        }

    def _ledger(self, wait_s: float) -> dict[str, Any]:
        """What `sluice ledger` says, as a user would ask it."""
        argv = [sys.executable, "-m", "sluice", "ledger", "--lake", str(self._pipeline.folders.lake)]
        argv += ["--json", "--wait", f"{wait_s:.1f}"]
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=wait_s + LEDGER_DEADLINE_S,
            env=plain_environment(),
            check=False,
        )
        try:
            books: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError as error:
            raise Permanent(f"sluice ledger failed with status {done.returncode}: {done.stderr.strip()}") from error
        return books
