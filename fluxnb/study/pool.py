"""The pipelines that are loaded: who needs one asks for it, and what doesn't fit beside it is freed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from fluxnb.measure import latency
from fluxnb.models import pipelines
from fluxnb.study.subject import Loaded, Subject
from fluxnb.technique import Unavailable

SPARE = 0.12  # share of the memory that is left to what images need while they are made


@dataclass
class _Held:
    loaded: Loaded
    own_gib: float  # without what it shares with `base`
    base: str | None  # the pipeline that it shares weights with


class Pool:
    """Loaded pipelines, by `Subject.pipeline`; the one used longest ago is freed first.

    Args:
        capacity_gib: memory of the device; found out by default.
    """

    def __init__(self, capacity_gib: float | None = None):
        self.capacity_gib = _capacity_gib() if capacity_gib is None else capacity_gib
        self._held: dict[str, _Held] = {}
        self._pinned: set[str] = set()
        self._refused: dict[str, str] = {}  # why; the exception itself would keep the pipeline that it came from

    def get(self, subject: Subject) -> Loaded:
        """The subject, loaded. Raises Unavailable if a technique that is built in can't run here."""
        name = subject.pipeline
        if name in self._refused:
            raise Unavailable(self._refused[name])
        if name not in self._held:
            self._load(name, subject)
        self._held[name] = held = self._held.pop(name)  # used last
        return replace(held.loaded, subject=subject)

    @contextmanager
    def holding(self, subjects: list[Subject]) -> Iterator[None]:
        """Inside, none of these is freed to make room for another."""
        before = set(self._pinned)
        self._pinned |= {subject.pipeline for subject in subjects}
        try:
            yield
        finally:
            self._pinned = before

    def fit(self, subjects: list[Subject]) -> bool:
        """Whether all of these have room at the same time, each as large as it is while it is being loaded."""
        sizes = {subject.pipeline: self._size(subject) for subject in subjects}
        return sum(sizes.values()) <= (1 - SPARE) * self.capacity_gib

    def release(self, subject: Subject | None = None) -> None:
        """Frees a subject's pipeline and what shares its weights; all pipelines without one."""
        names = list(self._held) if subject is None else [subject.pipeline]
        for name in names:
            self._free(name)
        latency.free_memory()

    def release_others(self, subject: Subject) -> None:
        """Frees all pipelines but the subject's."""
        for name in [name for name in self._held if name != subject.pipeline]:
            self._free(name)
        latency.free_memory()

    def beside(self, subject: Subject) -> bool:
        """Whether other pipelines than the subject's are loaded."""
        return any(name != subject.pipeline for name in self._held)

    def _load(self, name: str, subject: Subject) -> None:
        base = self._base(subject)
        self._make_room(0.0 if base else self._size(subject), keep=base)
        try:
            loaded = self._loaded(name, subject, base)
        except torch.cuda.OutOfMemoryError:
            if self._pinned or not self._held:
                raise
            loaded = None
        if loaded is None:  # once more with the memory to itself
            base = None
            self.release()
            loaded = self._loaded(name, subject)
        shared = self._held[base].loaded.load_gib if base else 0.0
        self._held[name] = _Held(loaded, loaded.load_gib - shared, base)

    def _loaded(self, name: str, subject: Subject, base: str | None = None) -> Loaded:
        try:
            return subject.load(self._held[base].loaded.pipe if base else None)
        except Unavailable as reason:
            self._refused[name] = str(reason)
            raise

    def _base(self, subject: Subject) -> str | None:
        """The loaded pipeline whose weights the subject can share: the same model's for text-to-image."""
        plain = replace(subject, use_case="txt2img").pipeline
        return plain if subject.use_case != "txt2img" and subject.shares and plain in self._held else None

    def _make_room(self, needed_gib: float, keep: str | None) -> None:
        room = (1 - SPARE) * self.capacity_gib - needed_gib
        for name in list(self._held):
            if sum(held.own_gib for held in self._held.values()) <= room:
                return
            if name in self._held and name not in self._pinned and name != keep:
                self._free(name)
                latency.free_memory()

    def _free(self, name: str) -> None:
        for other in [n for n, held in self._held.items() if held.base == name]:
            self._free(other)
        self._held.pop(name, None)

    def _size(self, subject: Subject) -> float:
        """GiB of its weights; a quantized transformer is as large as the others until it has been quantized."""
        if held := self._held.get(subject.pipeline):
            return held.loaded.load_gib
        same = [h.loaded for h in self._held.values() if not h.loaded.subject.built and h.base is None]
        same = [o for o in same if (o.subject.model, o.subject.dtype) == (subject.model, subject.dtype)]
        return same[0].load_gib if same else pipelines.weights_gib(subject.model.name, subject.dtype)


def _capacity_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / latency.GIB
    import psutil

    return psutil.virtual_memory().total / latency.GIB
