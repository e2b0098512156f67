"""`python -m sluice`: the `sluice` command of this interpreter, wherever its scripts are installed."""

from sluice.cli import console

if __name__ == "__main__":
    console()
