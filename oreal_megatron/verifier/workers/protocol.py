"""What the pool and its worker server say to each other over the control socket."""

from __future__ import annotations

import struct

FORK, KILL = b"F", b"K"
COMMAND = struct.Struct("!cq")
"""A command to the server: what, and of which process id (0 for FORK, whose socket comes along)."""
REPLY = struct.Struct("!q")
"""The server's answer: a process id."""
