"""What a technique is: a named, reversible change to a pipeline.

Anything with these four attributes is one; they compose in one line:

    with applied(pipe, first_block(0.12), some_other()):
        pipe("a red apple on a white table")
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Protocol


class Technique(Protocol):
    """A named, reversible change to a pipeline."""

    name: str  # the field's standard term; decides the colour in every chart
    settings: dict  # plain values: what distinguishes this one from others of the same name
    label: str  # name and settings as a reader wants to see them

    def apply(self, pipe) -> Callable[[], None]:
        """Changes `pipe` in place and returns the function that takes the change back.

        Raises:
            Unavailable: it can't run here; the message begins with what it needs.
        """


class Unavailable(Exception):
    """A technique can't run here. The message says what it needs; it becomes the row's reason."""


def networks(pipe) -> list:
    """The networks that run at every step: the transformer and, where there is one, the ControlNet."""
    return [pipe.transformer, *([pipe.controlnet] if getattr(pipe, "controlnet", None) is not None else [])]


@contextmanager
def applied(pipe, *techniques: Technique):
    """The pipeline with the techniques applied in order; taken back in reverse order, whatever happens."""
    with ExitStack() as stack:
        for technique in techniques:
            stack.callback(technique.apply(pipe))
        yield pipe
