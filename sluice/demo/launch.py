"""Runs a command that cannot outlive the process that started it.

`python -m sluice.demo.launch PARENT_PID COMMAND...` asks the kernel for a signal at the parent's death and becomes the
command (`exec`, so the process id stays). This is done here and not in `preexec_fn`, which may deadlock in a parent
that has threads.

Invariants: the signal is tied to the parent *thread* that forked, so that thread must live as long as the child
(`processes.Supervisor` keeps one for this). Where the kernel has no such signal (not Linux), the command simply runs.
Fails with status 127 when the command cannot be executed, 128 when the parent is already gone.
"""

import os
import sys

from sluice.parent import die_with_parent


def command_line(argv: list[str]) -> list[str]:
    """The command line that runs `argv` as a child of this process which dies with it."""
    return [sys.executable, "-m", "sluice.demo.launch", str(os.getpid()), *argv]


def main(arguments: list[str]) -> int:
    """Becomes `arguments[1:]`; returns an exit status only when it could not."""
    parent_pid, *argv = arguments
    die_with_parent()
    if os.getppid() != int(parent_pid):
        return 128  # it died before the kernel knew whom to watch
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - the command is a list built by the caller, never a shell line
    except OSError as error:
        print(f"cannot run {argv[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
