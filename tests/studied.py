"""What tests of the study measure with: a pipeline that makes noise in no time, a technique that can't be had."""

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fluxnb import families
from fluxnb.measure import stats
from fluxnb.models import pipelines
from fluxnb.study.subject import Loaded, Subject
from fluxnb.technique import IDENTICAL, Technique

LOAD = Subject.load


class Broken(Technique):
    """A technique whose `apply` raises, or does nothing."""

    settings = {"level": 1}
    family, exact = families.HOST, IDENTICAL

    def __init__(self, name, error):
        self.name = self.label = name
        self.error = error

    def apply(self, pipe):
        if self.error is None:
            return lambda: None
        raise type(self.error)(*self.error.args)  # a new one: it keeps what was there when it was raised


class FakePipe:
    """A pipeline as far as measuring needs one."""

    def __init__(self):
        self.transformer = SimpleNamespace(device=torch.device("cpu"))
        self.vae = SimpleNamespace(encode=lambda: None, decode=lambda: None)
        self.components = {}

    def encode_prompt(self):
        pass


def noise(calls):
    """`Loaded.batch` that notes (prompt, seed, steps) of every image in `calls`."""

    def one(prompt, seed, steps):
        calls.append((prompt, seed, steps))
        rng = np.random.default_rng(zlib.crc32(f"{prompt} {seed} {steps}".encode()))
        return Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))

    def batch(self, inputs, steps):
        self.pipe.encode_prompt()
        self.pipe.vae.decode()
        return [one(prompt, seed, steps) for prompt, seed in inputs]

    return batch


def load(self, base=None):
    """`Subject.load` of a pipeline that makes nothing by itself."""
    pipe = FakePipe()
    for technique in self.built:
        technique.apply(pipe)
    return Loaded(self, pipe, 0.5, pipelines.weights_gib(self.model.name, self.dtype))


def again_from_the_table(rows):
    """Checks that every speedup follows from the samples in the table."""
    by_id = {row.id: row for row in rows}
    for row in (r for r in rows if r.speedup is not None):
        base = row.samples if row.family == families.BASELINE.name else by_id[row.baseline].samples
        own = row.again if row.family == families.BASELINE.name else row.samples
        assert row.speedup == pytest.approx(np.median(np.divide(base, own)), rel=1e-9)
        assert row.baseline_s == pytest.approx(np.median(base), rel=1e-9)
        assert (row.speedup, row.speedup_ci_low, row.speedup_ci_high) == pytest.approx(stats.speedup(base, own))
        assert row.family == families.BASELINE.name or by_id[row.baseline].session == row.session
