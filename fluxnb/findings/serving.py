"""What rows of a server under load say; their table is fluxnb.findings.table.LOAD."""

from __future__ import annotations

from fluxnb.study.row import Row


def load_sentence(rows: list[Row]) -> str:
    """What more users do to the rate and to the wait, and whether making requests together pays."""
    users = [r for r in rows if r.ok and "arrivals" not in r.settings]
    if not users:
        return "no load was measured here."
    one_by_one = [r for r in users if r.setting("batching") == 1 and r.images_each == users[0].images_each]
    most = max(one_by_one, key=lambda r: r.users)
    first = min((r for r in one_by_one if r.session == most.session), key=lambda r: r.users)
    said = (
        f"with {most.users} users {most.images_per_s:.3g} images a second are made, "
        f"{most.images_per_s / first.images_per_s:.0%} of a single user's rate, and half of them wait longer than "
        f"**{most.latency_p50:.3g} s** instead of {first.latency_p50:.3g} s, "
        f"{most.shown('queued_s') / most.latency_avg:.0%} of it in the queue"
    )
    same = (r for r in users if r.setting("batching") > 1 and r.users == most.users and r.session == most.session)
    if together := next((r for r in same if r.images_each == most.images_each), None):
        ratio = together.images_per_s / most.images_per_s
        said += f"; made up to {together.setting('batching')} together"
        if (batch := together.shown("batch")) is not None:
            said += f" ({batch:.3g} on average)"
        said += f", {ratio:.2f} times as many images are made"
    return said + "."
