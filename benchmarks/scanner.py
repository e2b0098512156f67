"""The scanner alone: texts per second on 200-character texts, 5% of them with personal data.

Run: python benchmarks/scanner.py [--texts 40000] [--share 0.05]
"""

import argparse
import random
import time

from gateway.scanner import Scanner
from protos import record_pb2

VALUES = (
    "bob@example.com", "Anna.Lee+iot@sub.corp.example.co.uk", "+1 415-555-2671", "+49 30 901820", "13800138000",
    "138 0013 8000", "11010519491231002X", "DE89370400440532013000", "GB29 NWBK 6016 1331 9268 19",
    "4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "536-22-1234",
)  # fmt: skip
PROSE = (
    "the pump station reported normal pressure and flow while bearing temperature rose slightly after the morning "
    "shift change operator noted unusual vibration near valve seven conveyor belt speed was reduced maintenance done"
)
WORDS = PROSE.split()


def log_line(rng: random.Random) -> str:
    return rng.choice(
        (
            f"2026-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}T{rng.randrange(24):02d}:00:12.123Z level=INFO",
            f"seq={rng.randrange(10**12)} epoch={rng.randrange(99)} temp={rng.uniform(10, 90):.3f}",
            f"lat={rng.uniform(-90, 90):.6f} lon={rng.uniform(-180, 180):.6f}",
            f"req={rng.getrandbits(128):032x} took {rng.randrange(5000)} ms",
            f"size={rng.randrange(10**6)} crc={rng.getrandbits(32)}",
        )
    )


def filler(rng: random.Random, characters: int, log: bool) -> str:
    parts: list[str] = []
    while sum(map(len, parts)) + len(parts) < characters:
        parts.append(log_line(rng) if log and rng.random() < 0.25 else rng.choice(WORDS))
    return " ".join(parts)[:characters]


def make(count: int, share: float, seed: int = 1) -> tuple[list[str], list[bool]]:
    rng = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        log, personal = rng.random() < 0.4, rng.random() < share
        if personal:
            value, at = rng.choice(VALUES), rng.randrange(40, 140)
            texts.append(f"{filler(rng, at, log)} {value} {filler(rng, 200 - at - len(value), log)}")
        else:
            texts.append(filler(rng, 200, log))
        labels.append(personal)
    return texts, labels


def batches(texts: list[str], size: int = 1000) -> list[bytes]:
    return [
        record_pb2.RecordBatch(
            records=[record_pb2.Record(event_time_us=1_760_000_000_000_000 + i, text=t) for t in texts[at : at + size]]
        ).SerializeToString()
        for i, at in enumerate(range(0, len(texts), size))
    ]


def metrics_batch(count: int) -> bytes:
    rng = random.Random(2)
    names = [f"host.cpu.core{i}.percent" for i in range(8)]
    return record_pb2.RecordBatch(
        records=[
            record_pb2.Record(
                event_time_us=1_760_000_000_000_000 + i,
                metrics={n: rng.gauss(50, 20) for n in names},
                labels={"host": "node-1"},
            )
            for i in range(count)
        ]
    ).SerializeToString()


def best_seconds(scanner: Scanner, data: list[bytes], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for one in data:
            scanner.scan(one)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=40_000)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    scanner = Scanner()
    for share in (0.0, options.share):
        texts, labels = make(options.texts, share)
        data = batches(texts)
        seconds = best_seconds(scanner, data, options.rounds)
        hit = [index in found for one in data for found in [scanner.scan(one)] for index in range(1000)]
        true = sum(h and p for h, p in zip(hit, labels, strict=False))
        false = sum(h and not p for h, p in zip(hit, labels, strict=False))
        print(
            f"texts with personal data {share:.0%}: {len(texts) / seconds:,.0f} texts/s, "
            f"recall {true / max(1, sum(labels)):.4f}, false positives {false / max(1, len(labels) - sum(labels)):.5f}"
        )
    one = metrics_batch(options.texts)
    print(f"clean metrics (8 a record): {options.texts / best_seconds(scanner, [one], options.rounds):,.0f} records/s")


if __name__ == "__main__":
    main()
