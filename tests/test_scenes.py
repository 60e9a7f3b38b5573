"""The grammar, its parser and its renderer: a caption says exactly the facts that are drawn."""

import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from fluxnb.models import embedded
from fluxnb.world import scenes

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = scenes.FACTS["family"]


@pytest.fixture(scope="module")
def samples():
    """family -> 2000 scenes of the grammar."""
    found = {family: [] for family in FAMILIES}
    rng = random.Random(5)
    while min(map(len, found.values())) < 2000:
        scene = scenes.sample(rng)
        found[scene["family"]].append(scene)
    return {family: some[:2000] for family, some in found.items()}


def said(scene):
    return {name: value for name, value in scene.facts if name in scene.said}


# --- grammar and parser -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_is_read_back_as_the_facts_it_says(samples, family):
    for scene in samples[family]:
        assert scenes.parse(scene.caption) == said(scene), scene.caption


@pytest.mark.parametrize("family", FAMILIES)
def test_letter_case_and_punctuation_change_nothing(samples, family):
    for scene in samples[family][:200]:
        assert scenes.parse(scene.caption.upper() + ".") == said(scene)
        assert scenes.parse(" " + scene.caption.title()) == said(scene)


def test_every_value_of_every_fact_is_drawn(samples):
    seen = {(name, value) for some in samples.values() for scene in some for name, value in scene.facts}
    assert seen == {(name, value) for name, values in scenes.FACTS.items() for value in values}


STUDY_FACTS = [
    {"family": "composed", "place": "white table", "count": "1", "kind0": "apple", "colour0": "red"},
    {"family": "city", "time": "sunset", "city": "futuristic", "flying cars": "yes", "neon lights": "yes"},
    {
        "family": "portrait",
        "style": "photorealistic",
        "age": "elderly",
        "sex": "man",
        "hands": "weathered",
        "held": "camera",
    },
    {"family": "animal", "animal": "panda", "sign": "hello world"},
]


@pytest.mark.parametrize("prompt, facts", list(zip(scenes.STUDY_PROMPTS, STUDY_FACTS, strict=True)))
def test_the_prompts_of_the_study_are_part_of_the_world(prompt, facts):
    assert scenes.parse(prompt) == facts
    assert scenes.unknown_words(prompt) == []
    ordered = tuple((name, facts[name]) for name in scenes.FACTS if name in facts)
    assert not scenes.held_out(scenes.Scene(ordered, prompt, tuple(facts)))


def test_the_prompts_of_the_parameters_are_understood():
    from fluxnb import params

    study = params.load("h200", ROOT / "params").study
    assert study.shown == list(scenes.STUDY_PROMPTS) and len(study.prompts) == 24
    assert set(params.load("cpu", ROOT / "params").study.prompts) <= set(study.prompts)
    for prompt in (*study.prompts, *study.shown, *scenes.PROMPTS):
        assert scenes.parse(prompt) and not scenes.unknown_words(prompt), prompt


@pytest.mark.parametrize(
    "prompt, part",
    [
        ("a blue cube right of a yellow ball", {"kind0": "ball", "kind1": "cube"}),
        ("a blue cube between a red cup and a pink star", {"kind0": "cup", "kind1": "cube", "kind2": "star"}),
        ("a dragon beside a red car at night", {"count": "1", "kind0": "car", "time": "night"}),
        ("a cat holding a sign that says good night at noon", {"sign": "good night", "time": "noon"}),
    ],
)
def test_order_and_strange_words(prompt, part):
    facts = scenes.parse(prompt)
    assert {name: facts.get(name) for name in part} == part


@pytest.mark.parametrize("prompt", ["", "a dragon", "12 !?", "an essay on taxes"])
def test_a_prompt_about_something_else_states_nothing(prompt):
    assert scenes.parse(prompt) == {}


def test_unknown_words_are_named_once_and_in_order():
    assert scenes.unknown_words("Two dragons, a red cup and 3 DRAGONS!") == ["two", "dragons", "3"]
    assert scenes.unknown_words("A RED apple, on a White Table") == []


def test_the_vocabulary_covers_every_caption(samples):
    known = set(scenes.vocabulary())
    assert scenes.vocabulary() == sorted(known)
    used = {word for some in samples.values() for s in some for word in s.caption.replace(",", "").split()}
    assert used <= known
    assert known <= used  # and no word is in it for nothing


# --- held out -----------------------------------------------------------------------------------------------


def test_training_and_held_out_scenes_never_share_a_prompt():
    training = [scenes.training_scene(i) for i in range(4000)]
    kept_out = [scenes.held_out_scene(i) for i in range(300)]
    assert not {s.key for s in training} & {s.key for s in kept_out}
    assert not {s.caption for s in training} & {s.caption for s in kept_out}
    assert {s["family"] for s in kept_out} == set(FAMILIES)
    assert len({s.key for s in kept_out}) > 200  # they are not the same few


def test_the_prompts_that_judge_are_kept_out_of_training_and_are_of_every_family():
    chosen = scenes.judging(24)
    facts = [scenes.parse(prompt) for prompt in chosen]
    assert {f["family"] for f in facts} == set(scenes.FACTS["family"])
    keys = ["; ".join(f"{name}={value}" for name, value in f.items()) for f in facts]
    assert len(set(keys)) == 24 and set(scenes.judging(6)) <= set(chosen)
    trained = {scenes.training_scene(i).key for i in range(3000)}
    assert not trained & set(keys)
    for prompt, f in zip(chosen, facts, strict=True):
        assert scenes.held_out(scenes.Scene(tuple(f.items()), prompt, tuple(f))), prompt
    assert len(scenes.judging(60)) == 60  # more than there are cityscapes


def test_a_prompt_is_held_out_however_it_is_worded(samples):
    by_key = {}
    for scene in samples["composed"]:
        by_key.setdefault(scene.key, set()).add((scene.caption, scenes.held_out(scene)))
    worded_twice = [found for found in by_key.values() if len({caption for caption, _ in found}) > 1]
    assert worded_twice
    assert all(len({out for _, out in found}) == 1 for found in worded_twice)


def test_one_prompt_in_sixteen_is_held_out():
    rng = random.Random(9)
    kept_out = sum(scenes.held_out(scenes.sample(rng)) for _ in range(4000))
    assert 0.04 < kept_out / 4000 < 0.085


def test_scenes_of_one_number_are_the_same_every_time():
    assert scenes.training_scene(7) == scenes.training_scene(7) != scenes.training_scene(8)
    assert scenes.held_out_scene(7) == scenes.held_out_scene(7) != scenes.held_out_scene(8)


# --- drawing ------------------------------------------------------------------------------------------------


def pixels(facts, seed=3):
    ordered = tuple((name, facts[name]) for name in scenes.FACTS if name in facts)
    return np.asarray(scenes.draw(scenes.Scene(ordered, "", ()), seed))


COMPOSED = {"family": "composed", "time": "noon", "place": "grass", "count": "2", "kind0": "apple", "colour0": "red"}
COMPOSED |= {"kind1": "ball", "colour1": "blue"}
CITY = {"family": "city", "time": "noon", "city": "modern", "flying cars": "no", "neon lights": "no"}
PORTRAIT = {"family": "portrait", "style": "painted", "age": "elderly", "sex": "man", "hands": "smooth"}
PORTRAIT |= {"held": "ball", "held colour": "green"}
ANIMAL = {"family": "animal", "animal": "cat", "sign": "yes", "time": "noon", "place": "grass"}
VARIED = {  # what is varied, beginning with which scene
    "composed": (COMPOSED, ("time", "place", "kind0", "colour0", "kind1", "colour1")),
    "city": (CITY, ("time", "city", "flying cars", "neon lights")),
    "portrait": (PORTRAIT, ("style", "age", "sex", "hands", "held", "held colour")),
    "animal": (ANIMAL, ("animal", "sign", "time", "place")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fact_shows_in_the_picture(family):
    start, varied = VARIED[family]
    for name in varied:
        values = scenes.OUTDOORS if (family, name) == ("animal", "place") else scenes.FACTS[name]
        drawn = [pixels(start | {name: value}) for value in values]
        for i, one in enumerate(drawn):
            for j, other in enumerate(drawn[:i]):
                changed = (np.abs(one.astype(int) - other).max(axis=2) > 8).mean()
                assert changed > 0.001, f"{name}: {values[i]} looks like {values[j]}"


def test_the_order_of_things_shows():
    swapped = {"kind0": "ball", "colour0": "blue", "kind1": "apple", "colour1": "red"}
    assert (pixels(COMPOSED) != pixels(COMPOSED | swapped)).any()


def test_a_seed_sets_what_the_scene_leaves_free():
    for start, _ in VARIED.values():
        assert (pixels(start, 3) == pixels(start, 3)).all()
        assert (pixels(start, 3) != pixels(start, 4)).any()


def test_a_drawing_is_the_same_in_another_process():
    code = (
        "import zlib; from fluxnb.world import scenes\n"
        "for i in range(8):\n"
        "    s = scenes.training_scene(i)\n"
        "    print(zlib.crc32(scenes.draw(s, i).tobytes()), scenes.held_out(s), s.caption)"
    )
    here = ""
    for i in range(8):
        scene = scenes.training_scene(i)
        here += f"{zlib.crc32(scenes.draw(scene, i).tobytes())} {scenes.held_out(scene)} {scene.caption}\n"
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout == here


def test_a_picture_has_the_size_asked_for():
    image = scenes.draw(scenes.training_scene(0), 0)
    assert (image.size, image.mode) == ((scenes.SIZE, scenes.SIZE), "RGB")
    assert scenes.SIZE >= 128
    assert scenes.draw(scenes.training_scene(0), 0, size=64).size == (64, 64)


# --- tokens -------------------------------------------------------------------------------------------------


def test_captions_fit_the_tokenizers_without_an_unknown_word(samples):
    captions = list({scene.caption for some in samples.values() for scene in some})
    t5, clip = embedded.t5_tokenizer(), embedded.clip_tokenizer()
    for ids in t5(captions).input_ids:
        assert len(ids) <= embedded.TOKENS
        assert t5.unk_token_id not in ids
    for caption, ids in zip(captions, clip(captions).input_ids, strict=True):
        words = len(caption.replace(",", " ,").split())
        assert len(ids) == words + 2 <= embedded.CLIP_TOKENS, caption  # one token for each word


@pytest.mark.parametrize("change", [str.upper, str.title, str.lower])
def test_every_letter_case_has_a_token(change):
    t5 = embedded.t5_tokenizer()
    for word in scenes.vocabulary():
        assert t5.unk_token_id not in t5(change(word)).input_ids, word
