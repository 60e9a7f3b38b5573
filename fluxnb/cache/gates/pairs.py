"""Two gates on the same steps, by a rule."""

from __future__ import annotations

from fluxnb.cache.gates.base import INPUT, RESIDUAL, Gate, read
from fluxnb.errors import UserError
from fluxnb.families import COMBINED


class _Two(Gate):
    """Two gates on the same steps; each keeps its own memory."""

    family = COMBINED
    word = ""  # between the two, in the label
    unites = staticmethod(any)  # whether one of the two is enough

    def __init__(self, first: Gate, second: Gate, **options):
        super().__init__(**options)
        if isinstance(first, _Two) or isinstance(second, _Two):
            raise UserError("Gates are combined two at a time: give two single gates, such as TeaCache and FirstBlock.")
        if alone := [gate.name for gate in (first, second) if gate.alone]:
            raise UserError(f"{alone[0]} looks at two points of a step, so it isn't combined with another gate.")
        self.gates = self.first, self.second = first, second
        self.looks_at_input = first.looks_at_input or second.looks_at_input
        self.whole = first.whole or second.whole

    @property
    def settings(self) -> dict:
        first, second = ({"gate": g.name, **g.settings} for g in self.gates)
        return {"rule": type(self).__name__, "first": first, "second": second, **self.options}

    @property
    def reuses(self) -> bool:
        return self.unites(gate.reuses for gate in self.gates)

    @property
    def rule(self) -> str:
        return f"{self.gates[0].label} {self.word} {self.gates[1].label}"

    @property
    def mark(self) -> str:
        return "/".join(gate.mark for gate in self.gates)

    def meet(self, pipe):
        for gate in self.gates:
            gate.meet(pipe)

    def share(self, group):
        super().share(group)
        for gate in self.gates:
            gate.share(group)

    def new_state(self, total=None):
        return {"states": tuple(gate.new_state(total) for gate in self.gates), "said": [None, None], "due": {}}

    def called(self, state, image, given):
        for gate, own in zip(self.gates, state["states"], strict=True):
            gate.called(own, image, given)

    def computed(self, state, index, residual):
        for gate, own in zip(self.gates, state["states"], strict=True):
            gate.computed(own, index, residual)

    def seen(self, state):
        seen = [gate.seen(own) for gate, own in zip(self.gates, state["states"], strict=True)]
        return {**seen[1], "said": tuple(state["said"]), "first": seen[0]}

    def forced(self, index, total, run):
        return super().forced(index, total, run) or any(g.forced(index, total, run) for g in self.gates)


class Cascade(_Two):
    """The first gate that says reuse wins; the second is asked only about steps that the first would compute.

    With TeaCache first, a step is reused before any block has run if TeaCache allows it, and after the first
    block if First Block Cache does. The one gate that reads twice in a step: TeaCache's answer is needed
    before the first block, FirstBlock's after it. Source: this study's own combination; none was found published.
    """

    word = "then"

    @property
    def points(self):
        return self.gates[0].points | self.gates[1].points

    def ask(self, state, index, point, seen):
        if point == INPUT:
            state["said"] = [None, None]
        for i, (gate, own) in enumerate(zip(self.gates, state["states"], strict=True)):
            if state["said"][i] is None:
                state["said"][i] = gate.ask(own, index, point, seen)
            if state["said"][i]:
                return True
        return None if point == INPUT and None in state["said"] else False


class _Together(_Two):
    """Both gates look, what they measured is read at once, then the rule decides."""

    @property
    def point(self):
        return RESIDUAL if RESIDUAL in (g.point for g in self.gates) else INPUT

    def ask(self, state, index, point, seen):
        for i, (gate, own) in enumerate(zip(self.gates, state["states"], strict=True)):
            if gate.point == point:
                state["due"][i] = gate.measure(own, index, seen)
        if point != self.point:
            return None
        changes = read([state["due"][0], state["due"][1]], self.group)
        state["due"] = {}
        pairs = zip(self.gates, state["states"], changes, strict=True)
        state["said"] = [gate.decide(own, index, change) for gate, own, change in pairs]
        return self.unites(state["said"])


class Either(_Together):
    """Reuses if one of the two gates would; both look at every step, so a reused one has run the first block.

    Source: this study's own combination.
    """

    word = "or"


class Both(_Together):
    """Reuses only if both gates would. Source: this study's own combination."""

    word = "and"
    unites = staticmethod(all)
