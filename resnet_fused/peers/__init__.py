"""The comparison with what a user would pick instead: every peer on this machine, measured in one interleaved run."""

from .peer import Peer, Ready, Task
from .race import run, run_blocks
from .registry import contenders

__all__ = ["Peer", "Ready", "Task", "contenders", "run", "run_blocks"]
