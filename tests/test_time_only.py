"""Use cases that no model here is trained for: they run, have the tokens they should, and leave others alone."""

import copy

import pytest
import torch
from small import load

from fluxnb import params
from fluxnb.cache import Cache, Schedule
from fluxnb.models import pipelines, time_only
from fluxnb.models.use_cases import IP_ADAPTER, KONTEXT, REDUX, TIME_ONLY
from fluxnb.study import subject as subjects
from fluxnb.technique import applied

SIDE = 64


@pytest.fixture(scope="module")
def subject():
    given = subjects.given(pipelines.describe("embedded"), "float32", params.load("smoke").study)
    return subjects.replace(given, width=SIDE, height=SIDE).part(1, 1)


@pytest.fixture(scope="module")
def pipe():
    return load(1)


def tokens_seen(pipe):
    """Where the tokens of every call of the first single block are written down."""
    seen = []

    def note(block, args, given):
        seen.append(given["hidden_states"].shape[1] + given["encoder_hidden_states"].shape[1])

    hook = pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    return seen, hook


@pytest.mark.parametrize("case", TIME_ONLY)
@torch.no_grad()
def test_it_runs_with_the_tokens_that_it_has_and_under_a_cache(case, subject, pipe):
    own, base = subject.for_time(case), pipe
    if not own.shares:
        base = copy.deepcopy(pipe)
    loaded = own.load(base)
    seen, hook = tokens_seen(loaded.pipe)
    plain = loaded.batch(own.inputs, 3)[0]
    hook.remove()
    assert plain.size == (SIDE, SIDE)
    assert set(seen) == {time_only.tokens(case, own.model.tokens, SIDE, SIDE)} and len(seen) == 3
    with applied(loaded.pipe, cache := Cache(Schedule("101", False))):
        cached = loaded.batch(own.inputs, 3)[0]
    assert cached.tobytes() != plain.tobytes() and cache.trace.computed == 2
    assert not own.model.judged and own.runs(3) == 3
    assert pipe.transformer.config.in_channels == pipe.transformer.x_embedder.in_features == 64


def test_the_tokens_of_the_published_sizes():
    assert time_only.tokens(KONTEXT, 512, 1024, 1024) == 8704
    assert time_only.tokens(REDUX, 512, 1024, 1024) == 512 + 4096 + 729


def test_an_ip_adapter_has_weights_of_its_own(subject):
    assert not subject.for_time(IP_ADAPTER).shares and subject.for_time(KONTEXT).shares


def test_a_model_of_flux_2_has_none_of_them_and_says_so(subject):
    for case in TIME_ONLY:
        assert pipelines.lacks("flux2-klein-tiny", case).startswith("FLUX.2 has txt2img here")
        assert pipelines.lacks("embedded", case) == ""
