"""What rows of a server under load say; their table is fluxnb.findings.table.LOAD."""

from __future__ import annotations

from fluxnb.findings.table import LEAST_SAMPLES
from fluxnb.study.row import Row


def load_sentence(rows: list[Row]) -> str:
    """What more users do to the rate and to the wait, and whether making requests together pays."""
    users = [r for r in rows if r.ok and "arrivals" not in r.settings]
    if not users:
        return "no load was measured here."
    one_by_one = [r for r in users if r.setting("batching") == 1 and r.images_each == users[0].images_each]
    if not one_by_one:
        return "every load here is made together, so there is nothing to compare it with."
    most = max(one_by_one, key=lambda r: r.users)
    first = min((r for r in one_by_one if r.session == most.session), key=lambda r: r.users)
    said = (
        f"{_users(most)} get{'s' * (most.users == 1)} {most.images_per_s:.3g} images a second ({most.n} requests, once)"
    )
    if first is not most:
        said += f", {most.images_per_s / first.images_per_s:.0%} of what {_users(first)} get{'s' * (first.users == 1)}"
    few = min(most.n, first.n) < LEAST_SAMPLES  # most of them come while the queue is still filling
    wait = "latency_avg" if few else "latency_p50"
    said += ", and a request takes " if few else ", and half of the requests take longer than "
    said += f"**{getattr(most, wait):.3g} s**{' on average' * few}"
    if first is not most:
        said += f" instead of {getattr(first, wait):.3g} s"
    said += f", {most.shown('queued_s') / most.latency_avg:.0%} of it in the queue"
    if few:
        said += f" (too few for percentiles, and the queue is filling for the first {most.users})"
    same = (r for r in users if r.setting("batching") > 1 and r.users == most.users and r.session == most.session)
    if together := next((r for r in same if r.images_each == most.images_each), None):
        said += f"; {_made_together(together, together.images_per_s / most.images_per_s)}"
    return said + "."


def _users(row: Row) -> str:
    return f"{row.users} user{'s' * (row.users > 1)}"


def _made_together(row: Row, ratio: float) -> str:
    """What making waiting requests together does to the rate, if any were made together."""
    batch, most = row.shown("batch"), row.setting("batching")
    if batch is not None and batch < 1.05:
        return f"allowed to make up to {most} together, the server made one at a time ({batch:.2f} on average)"
    average = "" if batch is None else f" ({batch:.3g} on average)"
    return f"made up to {most} together{average}, {ratio:.2f} times as many images are made"
