"""Checks what `sluice demo --json` printed: `check_demo.py FILE`. The four promises, on the run that just ended."""

import json
import sys
from pathlib import Path

WANTED = {
    "records_accepted": lambda value: value > 0,
    "records_in_lake": lambda value: value > 0,
    "records_kept_on_site": lambda value: value > 0,
    "records_quarantined": lambda value: value >= 0,
    "records_expired": lambda value: value >= 0,
    "duplicates_in_lake": lambda value: value == 0,
    "results": lambda value: value > 0,
    "feed_records": lambda value: value > 0,
    "canaries_planted": lambda value: value > 0,
    "canaries_found_outside_site": lambda value: value == 0,
    "ledger_balanced": lambda value: value is True,
    "seconds": lambda value: value > 0,
}


def main(path: str) -> int:
    """Returns the exit status."""
    summary = json.loads(Path(path).read_text(encoding="utf-8"))
    wrong = [name for name, good in WANTED.items() if name not in summary or not good(summary[name])]
    for name in WANTED:
        print(f"  {name:28} {summary.get(name, 'missing')}{'   <-- wrong' if name in wrong else ''}")  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
