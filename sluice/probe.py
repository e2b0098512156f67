"""A container's health check: `python -m sluice.probe URL` exits with 0 when the URL answers 200 within two seconds."""

import sys
import urllib.error
import urllib.request


def probe(url: str, timeout_s: float = 2.0) -> bool:
    """Whether the URL answers 200."""
    if not url.startswith(("http://", "https://")):
        return False
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:  # noqa: S310 - the scheme is checked above
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(0 if len(sys.argv) == 2 and probe(sys.argv[1]) else 1)
