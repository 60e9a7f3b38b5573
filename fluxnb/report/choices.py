"""What is recommended on a configuration, by model: what front page, recipes and README share."""

from __future__ import annotations

from contextlib import suppress

from fluxnb import findings
from fluxnb.errors import UserError
from fluxnb.findings.recommend import Choice
from fluxnb.measure import stats
from fluxnb.models import pipelines
from fluxnb.report.configurations import Configuration
from fluxnb.report.progress import OWN_DIVISIONS
from fluxnb.study.row import Row


def answers(c: Configuration) -> list[list[Choice]]:
    """For each model that was measured for it, the best row for each goal."""
    return [found for base in findings.references(c.rows) if (found := findings.choices(c.rows, base))]


def named(c: Configuration, few: bool = False) -> list[Choice]:
    """The answer that recipes have the names of: that of the model of most steps, as FLUX.1-dev; [] without any.

    Args:
        few: of models of few steps without guidance instead, as FLUX.1-schnell.
    """
    bases = [base for base in findings.references(c.rows) if takes_few(base.model) == few]
    return findings.choices(c.rows, bases[0]) if bases else []


def takes_few(model: str | None) -> bool:
    """Whether a model takes few steps without guidance; False of one that isn't here any more."""
    with suppress(UserError):
        return bool(model) and pipelines.describe(model).few
    return False


def soonest(c: Configuration) -> Row | None:
    """The row of one image divided over GPUs that is there first, at full size, in BF16 and without a cache.

    None where no row has the rounds that a headline needs.
    """
    own = (r for r in findings.of(findings.divided(c.rows), *OWN_DIVISIONS) if findings.ends(r))
    return min((r for r in own if r.n >= stats.HEADLINE), key=lambda r: r.latency_p50, default=None)
