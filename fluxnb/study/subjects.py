"""Which models a notebook runs: those of study.models and study.distilled, told apart by what their images show."""

from __future__ import annotations

from functools import cached_property

from fluxnb.errors import UserError
from fluxnb.measure import telemetry
from fluxnb.models import embedded, pipelines
from fluxnb.params import Params
from fluxnb.study.subject import Subject, given


class Subjects:
    """The models of a configuration, with its prompts, seeds and sizes."""

    params: Params
    notebook: str

    @cached_property
    def subjects(self) -> list[Subject]:
        """Every model of this configuration, in the order of study.models."""
        return [self.subject(name) for name in self.params.study.models]

    @property
    def judged(self) -> list[Subject]:
        """Those whose images mean something."""
        return [subject for subject in self.subjects if subject.model.judged]

    @property
    def full_size(self) -> list[Subject]:
        """Those that aren't the study's own small ones: with random weights, for time and memory, or the user's own."""
        measured = self.params.study.full_size.own
        return [s for s in self.subjects if not s.model.judged or (s.model.own and measured)]

    @property
    def own(self) -> list[Subject]:
        """Those of `full_size` with weights of the user's: what they decide and draw means something."""
        return [subject for subject in self.full_size if subject.model.own]

    @property
    def random(self) -> list[Subject]:
        """Those of `full_size` that show time and memory only."""
        return [subject for subject in self.full_size if not subject.model.own]

    @cached_property
    def few_steps(self) -> list[Subject]:
        """The models that take a few steps of their own: of study.distilled, then of study.models, as yours may be."""
        named = [self.subject(name) for name in self.params.study.distilled or []]
        return list(dict.fromkeys([*named, *(subject for subject in self.subjects if subject.model.few)]))

    @property
    def every(self) -> list[Subject]:
        """`subjects`, and those of `few_steps` that aren't among them."""
        return list(dict.fromkeys([*self.subjects, *self.few_steps]))

    @property
    def many_steps(self) -> list[Subject]:
        """Those of `judged` that don't take a few steps only."""
        return [subject for subject in self.judged if not subject.model.few]

    @property
    def distilled(self) -> list[Subject]:
        """Those of `few_steps` whose images mean something."""
        return [subject for subject in self.few_steps if subject.model.judged]

    @property
    def distilled_random(self) -> list[Subject]:
        """Those of `few_steps` that show time and memory only."""
        return [subject for subject in self.few_steps if not subject.model.judged]

    def subject(self, name: str, dtype: str | None = None) -> Subject:
        """A model by name with this configuration's prompts, seeds and size."""
        dtype = dtype or ("bfloat16" if telemetry.machine()["gpus"] else "float32")
        return given(pipelines.describe(name), dtype, self.params.study)

    def first_judged(self) -> Subject:
        """The first of the study's models whose images mean something, of many steps where one is. Raises UserError."""
        if self.judged:
            return (self.many_steps or self.judged)[0]
        raise UserError(
            f"{self.notebook} judges images, and no model of study.models has trained weights: add `{embedded.NAME}`, "
            f"or a hub id or folder with real weights, to study.models in params/{self.params.name}.yaml."
        )

    def sized(self, prompts: int, steps: int, few: int) -> list[tuple[Subject, int]]:
        """`full_size`, each with its steps: the user's as they are judged, random ones at a few steps."""
        own = [(subject.part(prompts), self.steps(subject, steps)) for subject in self.own]
        return [*own, *((subject, few) for subject in self.random)]

    def steps(self, subject: Subject, most: int = 200) -> int:
        """The full number of denoising steps for this model, at most as many."""
        own, full = self.params.study, self.params.study.full_size
        return min(most, subject.model.steps or (own.steps if subject.model.small else full.steps))
