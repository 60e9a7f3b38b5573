"""What breaks things: a model that misbehaves on request, and makers of damaged files and command lines."""

import os
import random
import signal
import time
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Misbehaving:
    """A subject whose worker does what a prompt says, and else draws at once."""

    inputs: tuple = (("a red ball", 0), ("a blue cup", 1))

    def load(self):
        return self

    def batch(self, inputs, steps):
        for prompt, _ in inputs:
            if prompt == "raise":
                raise RuntimeError("as asked")
            if prompt == "unwritable":
                raise Unwritable
            if prompt == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if prompt == "exit":
                raise SystemExit(3)
            if prompt == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if prompt == "hang":
                time.sleep(3600)
            if prompt == "too few":
                return []
        time.sleep(0.002)
        return [Image.new("RGB", (8, 8), (seed % 256, 0, 0)) for _, seed in inputs]


class Unwritable(Exception):
    def __str__(self):
        raise ValueError("no words")


WRONG_REQUESTS = [
    ("x", "a", 1), ("x", 0, None), ("x", 0, 1, None), (None, 0, 1), ("", 0, 1), ("x", 0.5, 1), ("x", 0, 0), ("x", 0, 1, 0),
    ("x", 0, 10**9), ("x", 0, 1, 10**9), ("x" * 10**6, 0, 1), (b"x", 0, 1), ("x", True, 1), ("x", 0, 1, 1, float("nan")),
    ("x", 0, 1, 1, "now"), ([], 0, 1), ("x", 0, "2"),
]  # fmt: skip
