"""Memory that runs out, in any technique: its row says so, and the next is measured."""

import inspect

import pytest
import torch

from fluxnb import study
from fluxnb.cache import FirstBlock
from fluxnb.report import catalogue
from fluxnb.technique import Technique

MADE = [entry.made for entry in catalogue.techniques() if issubclass(entry.made, Technique)]
NEEDED = {"side": 64, "stages": 2, "threshold": 0.1, "coarse": 4, "gate": FirstBlock(0.1)}


def one(made) -> Technique:
    """A technique of a class, with the first kind that it has."""
    needed = NEEDED | {"kind": next(iter(getattr(made, "KINDS", [None])))}
    asked = inspect.signature(made).parameters.values()
    return made(**{p.name: needed[p.name] for p in asked if p.default is p.empty})


GPU, MACHINE = torch.OutOfMemoryError("tried to allocate 90 GiB"), MemoryError("no room")


def check(begin, monkeypatch, made: list, way, error) -> None:
    def apply(self, pipe):
        raise type(error)(*error.args)

    s, subject = begin()
    candidates = []
    for technique in map(one, made):
        monkeypatch.setattr(type(technique), "apply", apply)
        candidates.append(way(technique, steps=2))
    baseline, *rows, last = s.compare(subject, study.plain(2), [*candidates, study.fewer_steps(1)])
    assert baseline.ok and last.ok and len(rows) == len(made) > 0
    assert {row.label: row.status for row in rows} == dict.fromkeys((row.label for row in rows), "oom")
    assert {row.reason for row in rows} == {str(error)}
    assert s.compare(subject, study.plain(2), [*candidates, study.fewer_steps(1)]) == [baseline, *rows, last]


def test_a_technique_that_lacks_memory_is_oom_and_what_comes_next_is_measured(begin, made, monkeypatch):
    check(begin, monkeypatch, MADE[:3], study.using, GPU)


@pytest.mark.soak
@pytest.mark.parametrize("error", [GPU, MACHINE], ids=["GPU", "machine"])
@pytest.mark.parametrize("way", ["using", "built"])
@pytest.mark.parametrize("at", range(0, len(MADE), 4))
def test_every_technique_that_lacks_memory_is_oom(begin, made, monkeypatch, at, way, error):
    check(begin, monkeypatch, MADE[at : at + 4], getattr(study, way), error)
