"""The kernel that all parts share: records, codec, spool, configuration, service lifecycle, telemetry, ledger, CLI.

It imports no deployable (`edge`, `gateway`, `central`) and no engine; an import contract in CI keeps it so.
"""

__version__ = "0.1.0"
