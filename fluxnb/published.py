"""Published figures, as data (published.csv): what the reports set ours beside."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).parent / "published.csv"
NUNCHAKU_FBCACHE = "001_de02caf251e2be3b.txt"  # the Nunchaku FB-Cache experiment on an A6000


@lru_cache(maxsize=1)
def table():
    """Every published figure: source, kind, gpu, model, steps, size, batch, technique, metric, value, unit."""
    import pandas as pd

    return pd.read_csv(FILE)


def first_block_shares() -> dict[float, float]:
    """Threshold -> share of the uncached time, in the Nunchaku FB-Cache experiment (second inference)."""
    rows = table()
    rows = rows[(rows.source == NUNCHAKU_FBCACHE) & (rows.metric == "latency_second")]
    seconds = {
        float(name.split("(")[1].rstrip(")")): value for name, value in zip(rows.technique, rows.value, strict=True)
    }
    return {threshold: value / seconds[0.0] for threshold, value in sorted(seconds.items())}
