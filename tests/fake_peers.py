"""Contenders that misbehave, for test_peers.py; their processes import this module."""

import os
import signal
import time
from dataclasses import replace

from resnet_fused.peers import fused, torch_eager
from resnet_fused.peers.peer import PEER, Peer, Ready


def shifted(model, x, task):
    """Other numbers: every logit is larger by 1."""
    return Ready(lambda: model(x) + 1)


def transposed(model, x, task):
    """An output of another shape."""
    return Ready(lambda: model(x).T)


def poisoned(model, x, task):
    """One logit is NaN."""

    def call():
        y = model(x).clone()
        y[0, 0] = float("nan")
        return y

    return Ready(call)


def refusing(model, x, task):
    raise ValueError("it cannot be set up\nand says so in two lines")


def tiring(model, x, task):
    """It works for a few calls: the first, that which is weighed, and those of a first turn."""
    left = 4

    def call():
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("out of memory")
        time.sleep(0.1)  # a turn's length
        return model(x)

    return Ready(call)


def hanging(model, x, task):
    time.sleep(1000)


def crashing(model, x, task):
    os.kill(os.getpid(), signal.SIGSEGV)


def killed(model, x, task):
    """Ended as Linux ends a process for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def leaving(model, x, task):
    os._exit(3)


def not_here(task):
    return "made for another machine"


SHIFTED = Peer("shifted", PEER, ("torch",), shifted)
TRANSPOSED = Peer("transposed", PEER, ("torch",), transposed)
POISONED = Peer("poisoned", PEER, ("torch",), poisoned)
REFUSING = Peer("refusing", PEER, ("no such package",), refusing)
TIRING = Peer("tiring", PEER, ("torch",), tiring)
HANGING = Peer("hanging", PEER, ("torch",), hanging)
CRASHING = Peer("crashing", PEER, ("torch",), crashing)
KILLED = Peer("killed", PEER, ("torch",), killed)
LEAVING = Peer("leaving", PEER, ("torch",), leaving)
ABSENT = Peer("absent", PEER, ("torch",), shifted, not_here)
HONEST = [torch_eager.NCHW, torch_eager.CHANNELS_LAST, fused.peer("strict"), fused.peer("fast")]
WRONG_FUSED = replace(fused.peer("strict"), prepare=shifted)
