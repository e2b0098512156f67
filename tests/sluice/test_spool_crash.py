"""kill -9 of the writer, at random moments: what it was told is durable is there, once, with its place."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from tests.sluice.spool_examples import everything, open_spool

ROOT = Path(__file__).resolve().parent.parent.parent
KILLS = 20

# Appends numbered records for ever, each batch with the place behind it, and says so when append has returned.
WRITER = """
import sys, random
from pathlib import Path
from tests.sluice.spool_examples import Item, open_spool
spool = open_spool(Path(sys.argv[1]), bytes_max=1 << 30)
rng = random.Random(int(sys.argv[2]))
at = int(spool.cursors().get("place", b"0"))
print("open", flush=True)
while True:
    drafts = []
    for _ in range(rng.randint(1, 4)):
        drafts.append(Item(f"r{at}", rng.randint(1, 5), rng.randint(0, 2), rng.choice([0, 3000, 150_000])))
        at += drafts[-1].record_count
    spool.append(drafts, {"place": b"%d" % at})
    print(at, flush=True)
    if rng.random() < 0.2:
        keep = spool.next_sequence - 400
        if keep > 0:
            spool.settle(spool.spool_id, [(0, keep)])
            print("settled", keep, flush=True)
"""


def test_nothing_acknowledged_is_lost_or_repeated_through_twenty_kills(tmp_path: Path) -> None:
    rng = random.Random(1)
    durable = settled = 0
    spool_ids = set()
    for number in range(KILLS):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "s"), str(number)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(rng.randint(1, 25))]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.read().splitlines()
        writer.stdout.close()
        writer.wait(10)
        for line in lines:
            words = line.split()
            if words[:1] == ["settled"] and len(words) == 2:
                settled = max(settled, int(words[1]))
            elif words and words[0].isdigit() and line.endswith("\n"):
                durable = max(durable, int(words[0]))
        with open_spool(tmp_path / "s", bytes_max=1 << 30) as spool:
            spool_ids.add(spool.spool_id)
            assert spool.next_sequence >= durable
            # The place and the records are of the same transaction.
            assert int(spool.cursors().get("place", b"0")) == spool.next_sequence
            items = sorted(everything(spool), key=lambda item: item.first_sequence)
            kept = [s for item in items for s in range(item.first_sequence, item.stop_sequence)]
            assert kept == list(range(kept[0], spool.next_sequence)) if kept else spool.next_sequence == settled
            assert not kept or kept[0] <= settled
            for item in items:
                at = item.first_sequence
                assert item.payload.startswith(f"r{at}@{at}|".encode())
    assert len(spool_ids) == 1
    assert durable > 100
