"""Schedules for a model of random weights: recorded masks and masks made from published times; what gates decided."""

import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from fluxnb import families, findings, notebooks
from fluxnb.cache import teacache
from fluxnb.errors import UserError
from fluxnb.measure import telemetry
from fluxnb.report import html, show
from fluxnb.study.row import Row

OWN, OTHER = notebooks.FIRST_BLOCK, notebooks.TEACACHE
SUBJECT = SimpleNamespace(model=SimpleNamespace(name="m", weights="trained"), inputs=[("a cat", 3)])


def candidate(mark):
    about = {"mark": mark, "label": f"FBCache {mark}", "family": families.FIRST_BLOCK.name}
    return SimpleNamespace(steps=4, meaning=about)


def scheduled(mask, **changed):
    about = {"notebook": OWN, "family": families.SCHEDULE.name, "label": f"old {mask}", "steps": len(mask)}
    return Row(settings={"mask": mask}, **about | changed)


@dataclass
class Kept:
    """A study that kept some masks, and has some rows."""

    masks: dict
    found: list = field(default_factory=list)
    notebook: str = OWN

    @property
    def results(self):
        return SimpleNamespace(rows=lambda: self.found)

    def traces(self, subject, c):
        if c.meaning["mark"] not in self.masks:
            raise UserError("A replay makes no images.")
        return [{"mask": mask} for mask in self.masks[c.meaning["mark"]]]

    def steps(self, subject):
        return 4

    def loaded(self, subject):
        raise UserError("A replay measures nothing.")


@pytest.fixture
def replay(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text('{"machine": {}}')
    monkeypatch.setenv(telemetry.REPLAY, str(tmp_path / "run.json"))


@pytest.fixture
def said(monkeypatch):
    """The markup of all that was shown."""
    shown: list[str] = []
    monkeypatch.setattr(html, "_show", lambda markup, *_: shown.append(markup))
    return shown


def test_a_recorded_mask_is_that_of_the_first_image_and_equal_ones_stand_together():
    s = Kept({"0": ["1111"], "0.1": ["1101", "1001"], "0.2": ["1010"], "0.4": ["1010"], "0.8": ["10100"]})
    found = findings.recorded(s, SUBJECT, [candidate(mark) for mark in s.masks], 4)
    assert found == {"as threshold 0.1 decided on m": "1101", "as thresholds 0.2 and 0.4 decided on m": "1010"}


def test_a_replay_takes_the_masks_of_its_rows(replay):
    rows = [scheduled("1100"), scheduled("1010", notebook=OTHER), scheduled("11000"), scheduled("1001", steps=5)]
    compiled = scheduled("1000")
    compiled.settings["compile"] = "blocks"
    assert findings.recorded(Kept({}, [*rows, compiled]), SUBJECT, [candidate("0.1")], 4) == {"old 1100": "1100"}


def test_without_a_replay_masks_that_are_not_there_are_an_error():
    with pytest.raises(UserError, match="A replay makes"):
        findings.recorded(Kept({}), SUBJECT, [candidate("0.1")], 4)


def test_schedules_are_the_recorded_masks_and_those_of_published_shares_once_each():
    shares = {0.0: 1.0, 0.05: 1.0, 0.1: 0.75, 0.2: 0.5, 0.4: 0.01}
    found = findings.schedules({"first": "1010", "again": "1010"}, shares, 4, first_block=False)
    assert [cache.settings["mask"] for cache in found] == ["1010", "1110", "1000"]  # 0.2 would compute 1010, too
    assert found[0].label == "prescribed schedule, random weights, first: 2 of 4, no block run"
    assert found[2].label.endswith("as many as the share of time published for 0.4: 1 of 4, no block run")
    assert all(cache.label.startswith(findings.PRESCRIBED) for cache in found)  # no name reads like a cache's speedup


def test_how_far_decisions_differ_between_images_is_said(said):
    s = Kept({"0.1": ["1101", "1001"], "0.2": ["1000", "1000"]})
    show.spread(s, SUBJECT, [candidate(mark) for mark in s.masks])
    assert "<code>m</code>: over 2 images, FBCache 0.1: hit rate 38%, 2 to 3 computed, 2 different masks" in said[0]


def test_a_fit_is_drawn_with_what_it_explains(said, monkeypatch):
    changes = ((0.1, 0.2), (0.2, 0.3), (0.3, 0.35))
    fit = teacache.Fit((1.0, 0.1), 0.93, 4, 1, changes)
    monkeypatch.setattr(teacache, "fit", lambda loaded, steps: fit)
    s = Kept({})
    s.loaded = lambda subject: None
    show.fit(s, SUBJECT)
    assert "R² = 0.93 of the output's change (3 steps of 1 image)" in said[0]
    least = re.search(
        r"never falls below ([\d.]+) for changes up to 0.5: a threshold T then allows at most T / \1 reused", said[0]
    )
    assert float(least[1]) == pytest.approx(0.17, abs=0.02)  # of FLUX.1-dev's polynomial
    assert "at 3 steps, with fitted and published." in said[1]


def test_a_replay_says_that_it_can_not_fit(said, replay):
    show.fit(Kept({}), SUBJECT)
    show.spread(Kept({}), SUBJECT, [candidate("0.1")])
    assert len(said) == 2 and all("fx-not-measured" in markup for markup in said)
