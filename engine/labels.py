"""Default labels for zero-shot classification of system logs.

A label is known by its descriptions alone; several short ones in the style of the lines to be sorted
separate the labels better than one abstract sentence, and they are also what the calibration is fitted on
(see `tasks`).
"""

from typing import Final

DEFAULT_LABELS: Final[dict[str, tuple[str, ...]]] = {
    "normal operation": (
        "service started successfully and is ready",
        "request completed, status ok",
        "periodic job finished without problems",
        "received block, served block, heartbeat",
        "state changed to running, session established",
        "step count and screen on, routine activity recorded",
    ),
    "error or failure": (
        "unhandled exception, the operation failed",
        "error: task aborted, giving up after retries",
        "process crashed with a segmentation fault, core dumped",
        "error in init, child workers in error state",
        "fatal error, service terminated unexpectedly",
    ),
    "authentication or security": (
        "failed password for invalid user, ssh login rejected",
        "authentication failure, permission denied for user",
        "session opened for user root by sudo",
        "possible break-in attempt detected",
        "access forbidden by rule for client",
    ),
    "network problem": (
        "connection refused or reset by peer",
        "connection timed out, host unreachable",
        "broken connection to the remote server, interrupted while waiting for a message",
        "network link down, packet loss, cannot resolve address",
        "lost connection, reconnecting to host and port",
    ),
    "resource exhaustion": (
        "out of memory: killed process",
        "no space left on device, disk full",
        "too many open files, limit reached",
        "cpu overloaded, queue full, throttling requests",
        "memory usage above threshold, heap exhausted",
    ),
    "hardware": (
        "disk read error, bad sector, i/o error on device",
        "cpu temperature above threshold, fan failure",
        "usb device disconnected, driver reset the device",
        "machine check exception, memory parity error corrected",
        "power supply lost, battery voltage low",
    ),
    "configuration change": (
        "configuration file reloaded, settings updated",
        "package installed and upgraded to a new version",
        "option changed by the administrator, restarting with new parameters",
        "user account created, group membership modified",
        "firewall rule added, policy applied",
    ),
}
