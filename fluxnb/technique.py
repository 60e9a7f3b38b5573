"""What a technique is: a named, reversible change to a pipeline.

They compose in one line:

    with applied(pipe, first_block(0.12), some_other()):
        pipe("a red apple on a white table")
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager

from fluxnb.families import Family

# How far a technique's image is from the one without it, the nearest first.
IDENTICAL, ROUNDING, ANOTHER = "identical", "rounding", "another image"
EXACT_TERMS = {
    IDENTICAL: "the image without it, bit for bit",
    ROUNDING: "the same arithmetic in another order or by another kernel, so that numbers are rounded elsewhere",
    ANOTHER: "what is computed is something else, and so is the image, a little or a lot",
}
EXACTNESS = tuple(EXACT_TERMS)

# What techniques leave on a transformer, for those that come after them.
BLOCKS = "_fluxnb_blocks"  # some of its blocks are run as one: (double blocks, single blocks)
RECORDED = "_fluxnb_recorded"  # its steps are replayed from a recording
SHARED = "_fluxnb_shared"  # it has a share of the tokens: the process group that has them all
AHEAD = "_fluxnb_ahead"  # its modulations are computed ahead


class Technique:
    """A named, reversible change to a pipeline. Subclasses give the class attributes, and `apply`."""

    # class attributes, or properties where they depend on what was chosen
    name: str  # the field's standard term
    settings: dict  # plain values: what distinguishes this one from others of the same name
    label: str  # name and everything that distinguishes it, as a reader wants to see it
    family: Family  # decides the colour in every chart
    exact: str  # one of EXACTNESS
    terms: dict = {}  # made-up words of its label, each with half a sentence
    proof: dict  # what shows that it did something, filled in by `apply` or while images are made; may be missing

    @property
    def mark(self) -> str:
        """What a chart writes at its point: the value of its family's dial where it has one, else its label."""
        value = self.settings.get(self.family.dial)
        return self.label if value is None else f"{value:g}"

    def apply(self, pipe) -> Callable[[], None]:
        """Changes `pipe` in place and returns the function that takes the change back.

        Raises:
            Unavailable: it can't run here; the message begins with what it needs.
        """
        raise NotImplementedError


class Unavailable(Exception):
    """A technique can't run here. The message says what it needs; it becomes the row's reason."""


def least_exact(*techniques: Technique) -> str:
    """How far the image is from the one without any of the techniques: as far as the furthest of them takes it."""
    return max((t.exact for t in techniques), key=EXACTNESS.index, default=IDENTICAL)


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


class attribute:  # noqa: N801  read as a function: with attribute(owner, name, value)
    """`owner.name` is `value` inside; afterwards the instance has the attribute only if it had it before.

    A class, not a generator: a generator that nobody holds is closed, which would take the change back.
    """

    def __init__(self, owner, name: str, value):
        self.owner, self.name, self.value = owner, name, value

    def __enter__(self):
        own = vars(self.owner)
        self.had, self.before = self.name in own, own.get(self.name)
        own[self.name] = self.value  # past nn.Module.__setattr__, which would register a module

    def __exit__(self, *_):
        if self.had:
            vars(self.owner)[self.name] = self.before
        else:
            vars(self.owner).pop(self.name, None)
