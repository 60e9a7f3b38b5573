"""A FLUX of the user's in place of the study's models: what its files say, what is asked for, its rows and pages."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fluxnb import families, notebooks, params, study
from fluxnb.cache import planning, teacache
from fluxnb.errors import UserError
from fluxnb.models import embedded, facts, full_size, pipelines
from fluxnb.report import own
from fluxnb.report.configurations import configurations, name_of
from fluxnb.study import fitted
from fluxnb.techniques import peers
from fluxnb.world import scenes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def small_flux(tmp_path_factory):
    """A FLUX that isn't the embedded one, as diffusers saves it: 128 pixels, 24 tokens, four heads, random weights."""
    folder = tmp_path_factory.mktemp("a model ü") / "My flux"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            embedded,
            "TRANSFORMER",
            embedded.TRANSFORMER | {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 4},
        )
        pipe = embedded.build()
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        full_size.randomize(getattr(pipe, part), 1)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    """No model is asked for, nothing is remembered of one."""
    for variable in facts.GIVEN:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(teacache, "FITS", {})
    monkeypatch.setattr(planning, "MADE", {})
    facts.read.cache_clear()


@pytest.fixture
def copied(small_flux, tmp_path):
    """A copy to change: (folder, change), where change(file, name=value) sets what a file says; None takes it out."""
    folder = shutil.copytree(small_flux, tmp_path / "model")

    def change(file, **values):
        path = folder / file
        said = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))

    return folder, change


def sentence(error) -> str:
    """The message of a UserError, checked to be one line that ends like a sentence."""
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# --- what its files say -------------------------------------------------------------------------------------


def test_size_tokens_and_steps_are_read_from_the_folder(small_flux):
    found = facts.read(str(small_flux))
    assert (found.width, found.height, found.tokens, found.steps, found.guided) == (128, 128, 24, 28, True)
    model = pipelines.describe(str(small_flux))
    assert (model.width, model.height, model.tokens, model.steps) == (128, 128, 24, 28)
    assert model.judged and model.own and not model.checked


def test_without_guidance_and_without_a_shift_by_size_it_is_a_schnell(copied):
    folder, change = copied
    change("transformer/config.json", guidance_embeds=False)
    change("scheduler/scheduler_config.json", use_dynamic_shifting=False, shift=1.0)
    change("tokenizer_2/tokenizer_config.json", model_max_length=512)
    found = facts.read(str(folder))
    assert (found.steps, found.tokens, found.guided) == (4, 256, False)


@pytest.mark.parametrize(
    "file, said, variable, given, got",
    [
        ("vae/config.json", {"sample_size": 32}, "SIZE", "64x96", ("width", 64)),
        ("vae/config.json", {"sample_size": None}, "SIZE", "64", ("height", 64)),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 10**30}, "TOKENS", "24", ("tokens", 24)),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": None}, "TOKENS", "8", ("tokens", 8)),
        ("transformer/config.json", {"guidance_embeds": False}, "STEPS", "8", ("steps", 8)),
    ],
)
def test_what_the_files_do_not_say_is_asked_for_by_the_name_of_its_variable(copied, file, said, variable, given, got):
    folder, change = copied
    change(file, **said)
    with pytest.raises(UserError) as error:
        facts.read(str(folder))
    assert f"give {variable}=" in sentence(error) and str(folder) in str(error.value)
    assert getattr(facts.read(str(folder), **{variable.lower(): given}), got[0]) == got[1]


@pytest.mark.parametrize(
    "given",
    [
        {"size": "big"}, {"size": "100x100"}, {"size": "128x"}, {"size": "8192x8192"}, {"size": "-64"},
        {"tokens": "0"}, {"tokens": "513"}, {"tokens": "1e2"}, {"steps": "0"}, {"steps": "3.5"}, {"steps": "²"},
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(small_flux, given):
    ((name, value),) = given.items()
    with pytest.raises(UserError) as error:
        facts.read(str(small_flux), **given)
    assert f"{name.upper()}={value}" in sentence(error)


@pytest.mark.parametrize(
    "change, part",
    [
        ({"in_channels": 384, "out_channels": 64}, "Fill and Control"),
        ({"_class_name": "SD3Transformer2DModel"}, "has SD3Transformer2DModel, not FLUX.1's"),
    ],
)
def test_another_kind_of_model_is_refused(copied, change, part):
    folder, set_ = copied
    set_("transformer/config.json", **change)
    with pytest.raises(UserError) as error:
        facts.read(str(folder))
    assert part in sentence(error)


@pytest.mark.parametrize("name", ["nope", "a/b/c", "./nope", "embedded", "flux-dev-random"])
def test_no_such_model(name, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        facts.read(name)
    assert "folder" in sentence(error)


def test_a_model_of_the_hub_is_asked_for_its_files_only(small_flux, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, file):
        asked.append(file)
        return str(small_flux / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = facts.read("someone/flux")
    assert (found.name, found.width, found.tokens, found.folder) == ("someone/flux", 128, 24, "someone-flux")
    assert len(asked) == 4 and all(file.endswith(".json") for file in asked)


def test_the_hub_knows_no_such_model(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def download(*_):
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        OSError.__init__(error, "404")
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match="^The hub has no model someone/fluxx"):
        facts.read("someone/fluxx")


def test_its_folder_is_safe_for_paths_and_no_other_models(tmp_path, monkeypatch):
    def folder(name):
        return facts.Facts(name, 128, 128, 24, 28, True).folder

    names = ["/a/flux", "/b/flux", "~/flux", "/a/fl ux", "/a/…", "someone/FLUX.1-dev", "/a/" + "x" * 300, "/a/.."]
    made = [folder(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,70}", name) for name in made), made
    assert folder("someone/FLUX.1-dev") == "someone-FLUX.1-dev"


def test_below_ones_home_a_folder_is_named_from_there(copied, monkeypatch):
    folder, _ = copied
    monkeypatch.setenv("HOME", str(folder.parent))
    found = facts.read(str(folder))
    assert found.name == "~/model"
    assert pipelines.transformer_config(found.name)["num_attention_heads"] == 4


# --- what is measured ---------------------------------------------------------------------------------------


@pytest.fixture
def asked(small_flux, monkeypatch):
    """`make report MODEL=…` asks for the small FLUX."""
    monkeypatch.setenv(facts.MODEL, str(small_flux))
    return str(small_flux)


def test_a_model_has_rows_pages_and_images_of_its_own(asked, tmp_path):
    chosen, plain = params.chosen("cpu"), params.load("cpu")
    assert chosen.study.models == [asked]
    place, others = own(chosen, tmp_path), own(plain, tmp_path)
    assert place.reports.parent == others.reports and place.reports.name == chosen.model.folder
    assert place.images != others.images and place.title == f"cpu, {chosen.model.folder}"
    assert name_of(place.reports) == place.title and name_of(others.reports) == "cpu"
    assert name_of(Path("reports/own/multi_gpu/2gpu/h100/someone-flux")) == "h100x2, someone-flux"
    stems = [path.stem for path in notebooks.sources(ROOT, model=place.model)]
    assert not set(stems) & set(notebooks.OF_EMBEDDED) and notebooks.FINAL_STACK in stems
    assert chosen.digest != plain.digest


def test_other_steps_are_other_parameters(asked, monkeypatch):
    before = params.chosen("cpu").digest
    monkeypatch.setenv(facts.STEPS, "7")
    assert params.chosen("cpu").digest != before


@pytest.mark.parametrize("variable", [facts.SIZE, facts.TOKENS, facts.STEPS])
def test_what_is_about_a_model_needs_one(monkeypatch, variable):
    monkeypatch.setenv(variable, "64")
    with pytest.raises(UserError, match=r"=64 is about a model of yours: give MODEL="):
        params.chosen("cpu")


def opened(root, monkeypatch, gpu="cpu"):
    monkeypatch.chdir(root)
    return study.Study(params.chosen(gpu), notebooks.TEACACHE, root)


def test_its_subject_is_made_as_its_files_say(asked, study_root, monkeypatch):
    monkeypatch.setenv(facts.SIZE, "64x96")
    monkeypatch.setenv(facts.STEPS, "7")
    s = opened(study_root, monkeypatch)
    (subject,) = s.judged
    assert (subject.width, subject.height, subject.model.tokens, s.steps(subject)) == (64, 96, 24, 7)
    assert s.steps(subject, 4) == 4 and not subject.checked
    assert len(subject.prompts) == s.params.study.full_size.judged and subject.seeds == (s.params.study.seeds[0],)


def test_at_full_size_it_is_measured_as_random_weights_are_and_judged_as_trained_ones(asked, study_root, monkeypatch):
    assert opened(study_root, monkeypatch).full_size == []  # compiled stacks take minutes on a CPU
    s = opened(study_root, monkeypatch, "h100")
    assert s.full_size == s.own == s.judged and s.random == []
    ((few, steps),) = s.sized(2, 100, 3)
    assert (len(few.prompts), steps) == (2, 28)
    monkeypatch.delenv(facts.MODEL)
    s = opened(study_root, monkeypatch, "h100")
    assert [subject.model.name for subject in s.random] == ["flux-dev-random"] and s.own == []
    assert s.sized(2, 100, 3) == [(s.random[0], 3)]


def test_tokens_and_how_it_is_put_together_decide_its_rows(asked, copied, monkeypatch):
    folder, change = copied

    def digest():
        facts.read.cache_clear()
        return study.subject.given(pipelines.describe(str(folder)), "float32", params.load("cpu").study).digest

    digests = [digest()]
    change("tokenizer_2/tokenizer_config.json", model_max_length=20)
    digests.append(digest())
    change("scheduler/scheduler_config.json", shift=2.0)
    digests.append(digest())
    (folder / teacache.FILE).write_text("{}")
    assert digest() == digests[-1]
    assert len(set(digests)) == 3


def test_teacaches_polynomial_is_fitted_to_it_once(asked, study_root, monkeypatch):
    with pytest.raises(UserError, match="TeaCache has no coefficients"):
        teacache.coefficients(asked)
    monkeypatch.setenv(facts.STEPS, "6")
    s = opened(study_root, monkeypatch)
    fitted.know(s)
    calls, fit = [], teacache.fit
    monkeypatch.setattr(teacache, "fit", lambda loaded, steps: calls.append(loaded.subject) or fit(loaded, steps))
    found = teacache.coefficients(asked)
    assert len(found) == teacache.DEGREE + 1 and len(calls) == 1
    assert not set(calls[0].prompts) & {*s.subject(asked).prompts, *scenes.judging(60)}  # what judges fits nothing
    again = opened(study_root, monkeypatch)
    fitted.know(again)
    assert teacache.coefficients(asked) == found and len(calls) == 1
    assert not list(Path(asked).rglob(teacache.FILE))  # nothing is written into a folder of the user's


def test_its_plans_are_made_once_when_they_are_asked_for_and_kept_beside_its_rows(asked, study_root, monkeypatch):
    with pytest.raises(UserError, match=r"no plan of .*: make one with `python -m fluxnb plan --model"):
        planning.of(asked, 4)
    monkeypatch.setenv(facts.STEPS, "4")
    monkeypatch.setattr(planning, "FEW", (1, 1))
    s = opened(study_root, monkeypatch)
    fitted.know(s)
    calls, make = [], planning.make
    monkeypatch.setattr(planning, "make", lambda *given: calls.append(1) or make(*given))
    found = planning.of(asked, 4)
    assert [plan.mask.count("1") for plan in found.values()] == [2] and calls == [1]  # its params' counts are of 28
    fitted.know(opened(study_root, monkeypatch))
    assert planning.of(asked, 4) == found and calls == [1]
    made = peers.at_equal_steps([peers.PLANNED, families.DPCACHE], asked, 4, [2])
    assert [one.gate.mask for ones in made.values() for one in ones][0] == found[2].mask and len(made) == 2
    assert not list(Path(asked).rglob(planning.FILE))  # nothing is written into a folder of the user's


def test_what_takes_too_much_memory_to_plan_is_one_sentence(asked, study_root, monkeypatch):
    def full(*given):
        raise MemoryError

    monkeypatch.setattr(planning, "make", full)
    fitted.know(opened(study_root, monkeypatch))
    with pytest.raises(UserError, match="takes more memory than is free here"):
        planning.MADE[asked]()


def test_a_controlnet_of_another_model_is_not_taken(asked, study_root, monkeypatch):
    s = opened(study_root, monkeypatch)
    assert s.judged[0].able(["txt2img", "ControlNet txt2img"]) == ["txt2img"]
    assert "belongs to FLUX.1-dev" in pipelines.lacks_controlnet(asked)
    with pytest.raises(UserError, match="is built otherwise: give a ControlNet of its own"):
        pipelines.load_controlnet(asked)
    assert pipelines.lacks_controlnet("embedded") == pipelines.lacks_controlnet("flux-dev-random") == ""


def test_the_live_explorer_is_about_it(asked, small_flux, user_root, monkeypatch):
    pytest.importorskip("ipywidgets")
    from fluxnb import explore

    monkeypatch.setenv(facts.SIZE, "64x96")
    monkeypatch.setenv(facts.STEPS, "4")
    made = explore.Explorer()
    assert (made.model.name, made.full) == (asked, 4)
    made.gate.value = families.FIRST_BLOCK.name
    made.start().wait()
    assert made.latest is not None and made.latest.own[0].image.size == (64, 96), made.said.value


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(small_flux, copy_project, tmp_path_factory):
    """(root, what the command said) of one page, with the smallest parameters."""
    root = copy_project(tmp_path_factory.mktemp("own"))
    return root, run(root, "--model", str(small_flux), "--only", "02", "--thorough")


def run(root, *options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLUXNB_")}
    environment |= {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fluxnb", "report", "--gpu", "smoke", *options]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)


def test_the_report_is_about_the_model(reported, small_flux):
    root, done = reported
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = root.glob("reports/own/single_gpu/smoke/*/results.csv")
    rows = [row for row in csv.DictReader(table.open(encoding="utf-8")) if row["model"]]
    assert {row["model"] for row in rows} == {str(small_flux)} and {row["weights"] for row in rows} == {"trained"}
    assert {(row["width"], row["height"]) for row in rows} == {("128", "128")}
    assert any(row["psnr_db"] or row["psnr_identical"] not in ("", "0") for row in rows)
    for page in (table.with_name(f"{notebooks.ATTENTION}.html"), table.with_name("index.html")):
        assert table.parent.name in page.read_text(encoding="utf-8")
    assert f"about {small_flux}, so without what is about the study's own models: " in done.stdout
    assert not (table.parent / f"{notebooks.EMBEDDED}.html").exists()
    state = json.loads((root / "build/smoke/models" / table.parent.name / f"{notebooks.ATTENTION}.json").read_text())
    assert state["thorough"] and not state["left_out"]
    assert f"What to switch on for {small_flux}: " in done.stdout  # a thorough run ends with it, too
    (configuration,) = configurations(root, own=True)
    assert configuration.model == table.parent.name
    assert notebooks.EMBEDDED not in [page.stem for page in configuration.pages]


@pytest.mark.parametrize(
    "options, part",
    [
        (["--model", "./nope"], "model_index.json"),
        (["--model", "nope"], "There is no model 'nope'"),
        (["--steps", "4"], "STEPS=4 is about a model of yours"),
        (["--replay"], "leave MODEL out"),
        (["--only", "15"], "There is no notebook '15'"),
    ],
)
def test_one_sentence_and_status_2_before_anything_is_measured(reported, small_flux, options, part):
    root, _ = reported
    model = [] if {"--model", "--steps"} & set(options) else ["--model", str(small_flux)]
    done = run(root, *model, *options)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1


# --- a folder that doesn't fit ------------------------------------------------------------------------------


def edited(path, change):
    """Changes the tensors of a safetensors file in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def nan(tensors):
    tensors[min(tensors)].view(-1)[0] = float("nan")


def infinite(tensors):
    tensors[max(tensors)].view(-1)[-1] = float("-inf")


@pytest.mark.parametrize(
    "part, change, said",
    [
        ("transformer", nan, "weights in its transformer that are no numbers in float32 (NaN or infinite)"),
        ("vae", infinite, "weights in its vae that are no numbers"),
        ("text_encoder_2", nan, "weights in its text_encoder_2 that are no numbers"),
        ("transformer", lambda tensors: tensors.update(odd=tensors[min(tensors)].clone()), "no place for, odd"),
        ("transformer", lambda tensors: tensors.pop("x_embedder.weight"), "has no weights for x_embedder.weight"),
    ],
)
def test_weights_that_are_no_numbers_lacking_or_too_many_are_refused(copied, part, change, said):
    folder, _ = copied
    edited(next((folder / part).glob("*.safetensors")), change)
    with pytest.raises(UserError) as error:
        pipelines.load(str(folder), "float32", "cpu")
    assert said in sentence(error)


@pytest.mark.parametrize(
    "file, values, said",
    [
        ("transformer/config.json", {"num_layers": 10**6}, "weights of 1 transformer_blocks"),
        ("transformer/config.json", {"num_single_layers": -1}, "num_single_layers -1 in the configuration"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "num_hidden_layers 1 in the configuration"),
        ("text_encoder_2/config.json", {"num_layers": 10**6}, "num_layers 1000000 in the configuration"),
        ("transformer/config.json", {"num_attention_heads": 10**9}, "There is too little memory to load the model"),
        ("vae/config.json", {"scaling_factor": None, "shift_factor": "x"}, "no number as shift_factor"),
        ("scheduler/scheduler_config.json", {"base_shift": float("nan")}, "no number as base_shift"),
        ("model_index.json", {"vae": []}, "has no vae in its model_index.json"),
        ("model_index.json", {"transformer": "FluxTransformer2DModel"}, "has no transformer in its model_index.json"),
        ("model_index.json", {"tokenizer": [None, None]}, "has no tokenizer in its model_index.json"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused_before_anything_is_built(copied, file, values, said):
    folder, change = copied
    change(file, **values)
    with pytest.raises(UserError) as error:
        pipelines.load(str(folder), "float32", "cpu")
    assert said in sentence(error)


@pytest.mark.parametrize("written", ["[]", "3", "null", "[" * 5000, '{"a":' * 5000, "", "\ufeff[]"])
def test_an_index_of_another_shape_is_refused(copied, written):
    folder, _ = copied
    (folder / "model_index.json").write_text(written, encoding="utf-8")
    with pytest.raises(UserError) as error:
        pipelines.check(str(folder))
    assert "model_index.json cannot be read" in sentence(error)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_words_is_refused(copied, part):
    folder, _ = copied
    (folder / part / "tokenizer.json").unlink()
    with pytest.raises(UserError) as error:
        pipelines.check(str(folder))
    assert f"has no words in its {part}" in sentence(error)
