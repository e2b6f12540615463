"""Runs a command that ends when its parent does, and not at SIGUSR1.

    python -m oreal_megatron.servers.die_with_parent PARENT_PID COMMAND...

A trainer that is killed cannot end its servers, so the kernel does (prctl(2), PR_SET_PDEATHSIG, which survives exec).
SGLang's own worker processes do the same.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Replaces this process with the command, unless the parent has ended already."""
    parent = int(sys.argv[1])
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    if os.getppid() != parent:  # the parent ended before prctl
        sys.exit(1)
    # A scheduler sends USR1 to all processes of a job; the trainer, which stops at it, still needs its servers.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
