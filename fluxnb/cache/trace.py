"""What a cache decided, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """One denoising step: what the gate saw and what it decided."""

    index: int
    reused_at: str | None  # "input" (no block ran), "residual" (one did), or None: computed
    indicator: float | None = None  # None where the gate had nothing to compare with, or doesn't look
    accumulated: float | None = None
    threshold: float | None = None
    said: tuple | None = None  # of a pair of gates: what each of the two said; None: not asked
    first: dict | None = None  # of a pair: what the first gate saw

    @property
    def hit(self) -> bool:
        """Whether the step was reused instead of computed."""
        return self.reused_at is not None


@dataclass
class Trace:
    """The steps of one generation, in order."""

    steps: list[Step] = field(default_factory=list)

    @property
    def mask(self) -> str:
        """One character per step: 1 computed, 0 reused. `Schedule` replays it."""
        return "".join("0" if step.hit else "1" for step in self.steps)

    @property
    def computed(self) -> int:
        """Steps that ran the whole transformer."""
        return sum(not step.hit for step in self.steps)

    @property
    def hit_rate(self) -> float:
        """Share of steps that were reused, 0 to 1; 0 for an empty trace."""
        return 1 - self.computed / len(self.steps) if self.steps else 0.0
