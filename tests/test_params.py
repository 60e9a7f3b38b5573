import ast
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fluxnb import installed, notebooks, params
from fluxnb.errors import UserError
from fluxnb.params import schema
from fluxnb.world import scenes

NAMES = [
    *("a100", "a100x2", "a100x4", "a100x8", "a6000", "cpu", "h100", "h100x2", "h100x4", "h100x8"),
    *("h200", "h200x2", "h200x4", "h200x8", "smoke"),
]


@pytest.fixture
def folder(tmp_path):
    """A copy of the project's params/ with one more file, mine.yaml, to write into."""
    copy = tmp_path / "params"
    shutil.copytree(params.find_folder(), copy)
    (copy / "mine.yaml").write_text("gpu: {match: cpu}\n")
    return copy


@pytest.fixture
def message(folder):
    """The sentence that loading mine.yaml with these lines ends in."""

    def write_and_load(text, base=None):
        (folder / "mine.yaml").write_text(text)
        if base is not None:
            (folder / "base.yaml").write_text(base)
        with pytest.raises(UserError) as caught:
            params.load("mine", folder)
        sentence = str(caught.value)
        assert "\n" not in sentence and sentence.endswith(".")
        return sentence

    return write_and_load


def mine(folder, text):
    (folder / "mine.yaml").write_text(text)
    return params.load("mine", folder)


def test_choices_are_the_files_in_natural_order():
    assert params.choices() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_the_project_loads(name):
    loaded = params.load(name)
    base, count = re.fullmatch(r"(.+?)(?:x(\d+))?", name).groups()
    assert loaded.gpu.count == int(count or 1)
    expected = f"reports/multi_gpu/{count}gpu/{base}" if count else f"reports/single_gpu/{name}"
    assert loaded.report_dir.as_posix() == expected
    assert loaded.own_dir.as_posix() == expected.replace("reports/", "reports/own/", 1)
    on_gpu = name not in ("cpu", "smoke")
    assert loaded.study.models == (["embedded", "flux-dev-random"] if on_gpu else ["embedded"])
    assert loaded.study.distilled == ["embedded-schnell", *(["flux-schnell-random"] if on_gpu else [])]
    assert loaded.gpu.match == (base.upper() if on_gpu else {"cpu": "cpu", "smoke": "any"}[name])
    assert (loaded.gpu.memory_gib is not None) == on_gpu


def test_the_defaults_are_those_of_the_study():
    loaded = params.load("a100")
    cache = loaded.notebooks["05_first_block_cache"]
    assert cache["thresholds"] == [0, 0.01, 0.05, 0.1, 0.12, 0.15, 0.2, 0.3, 0.35, 0.4, 0.5, 0.8]
    assert cache["fewer_steps"] == [24, 20, 16, 14, 12, 10, 8, 6, 5, 4, 3]
    assert (loaded.study.steps, loaded.study.full_size.steps, loaded.study.full_size.width) == (28, 28, 1024)
    assert loaded.study.width is None and "A red apple on a white table" in loaded.study.shown


def test_mappings_are_merged_and_lists_are_replaced(folder):
    base = mine(folder, "gpu: {match: cpu}")
    own = mine(folder, "gpu: {match: cpu}\nstudy:\n  seeds: [7]\n  full_size: {steps: 4}\n")
    assert own.study.seeds == [7]
    assert own.study.full_size.steps == 4
    assert own.study.full_size.width == base.study.full_size.width
    assert own.study.prompts == base.study.prompts


def test_a_section_without_lines_changes_nothing(folder):
    assert mine(folder, "gpu: {match: cpu}\nstudy:\n  # seeds: [1]\n").study == mine(folder, "gpu: {match: cpu}").study


def test_no_key_is_there_that_nothing_reads():
    """A key that a user may set and that changes nothing promises what isn't there."""
    own = Path(schema.__file__)
    files = [p.read_text("utf-8") for p in own.parents[1].rglob("*.py") if p != own]
    read = {n.attr for text in files for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)}
    for kind in (schema.GpuParams, schema.StudyParams, schema.FullSize):
        described = {"memory_gib"}  # of the GPU, for who reads the file
        assert {key.name for key in dataclasses.fields(kind)} - described <= read, kind


def test_whole_numbers_are_taken_for_numbers(folder):
    loaded = mine(folder, "gpu: {match: cpu, memory_gib: 3}\nstudy: {guidance_scale: 4}\n")
    assert type(loaded.study.guidance_scale) is float and type(loaded.gpu.memory_gib) is float
    assert type(loaded.notebooks["05_first_block_cache"]["thresholds"][0]) is float


def test_null_is_taken_where_it_means_something(folder):
    assert mine(folder, "gpu: {match: cpu}\nstudy: {width: 512}\n").study.width == 512
    assert mine(folder, "gpu: {match: cpu}\nstudy: {width: null}\n").study.width is None


def test_a_notebook_is_told_the_gpu_and_asks_for_its_values():
    smoke = params.load("smoke")
    assert smoke.for_notebook("00_environment") == {"gpu": "smoke"}
    assert vars(smoke.given("00_environment")) == {"matmul_size": 256, "repeats": 2}
    assert vars(smoke.given("99_without_a_section")) == {}


def test_a_notebook_may_put_its_own_values_over_the_file_s():
    smoke, stem = params.load("smoke"), "05_first_block_cache"
    other = params.overridden(smoke, stem, {"thresholds": [0, 0.1, 0.5, 3], "intervals": (2, 5)})
    assert other.given(stem).thresholds == [0, 0.1, 0.5, 3] and other.given(stem).intervals == [2, 5]
    assert other.given(stem).fewer_steps == smoke.given(stem).fewer_steps
    assert other.digest != smoke.digest and params.overridden(smoke, stem, {}) == smoke


@pytest.mark.parametrize(
    "given, part",
    [
        ({"thresholds": [-1]}, "thresholds[0] is -1; allowed is"),
        ({"thresholds": "0.1"}, 'thresholds is "0.1"; allowed is a list'),
        ({"thresholds": [0.5]}, "grid_thresholds has 0; allowed are values of thresholds: 0.5"),
        ({"treshold": [0.5]}, "treshold is not a known key (did you mean thresholds?)"),
        ({"repeats": 3}, "repeats is not a known key; it belongs into the section 00_environment"),
    ],
)
def test_a_value_that_no_file_could_hold_is_no_notebook_s_either(given, part):
    with pytest.raises(UserError) as caught:
        params.overridden(params.load("smoke"), "05_first_block_cache", given)
    assert str(caught.value).startswith(f"05_first_block_cache.ipynb: {part}") and str(caught.value).endswith(".")


def test_names_are_taken_from_those_who_define_them():
    from fluxnb import notebooks, stacks
    from fluxnb.models import use_cases
    from fluxnb.techniques import kinds

    def choices(stem, name):
        return list(params.NOTEBOOKS[stem][name].choices)

    assert choices(notebooks.COMPILATION, "variants") == list(stacks.COMPILED)
    assert choices(notebooks.PARALLEL, "ways") == list(stacks.WAYS)
    assert choices(notebooks.PARALLEL, "stacks") == list(stacks.DIVIDED)
    assert choices(notebooks.FINAL_STACK, "around") == list(stacks.AROUND)
    assert choices(notebooks.FINAL_STACK, "quantization") == list(kinds.TORCHAO)
    assert choices(notebooks.USE_CASES, "use_cases") == list(use_cases.USE_CASES)


def test_what_judges_is_kept_out_of_training_and_what_is_shown_is_the_documents_own(folder):
    study = mine(folder, "gpu: {match: cpu}\nstudy: {judged: 5}").study
    assert study.prompts == list(scenes.judging(5)) and study.shown == list(scenes.STUDY_PROMPTS)
    own = mine(folder, "gpu: {match: cpu}\nstudy: {prompts: [a cat, a dog], judged: 1}").study
    assert own.prompts == ["a cat"] and own.shown == ["a cat", "a dog"]


def test_what_is_given_away_is_a_copy():
    smoke = params.load("smoke")
    before = smoke.digest
    smoke.given("01_baseline").dtypes.clear()
    smoke.resolved()["study"]["seeds"].clear()
    smoke.resolved()["01_baseline"]["dtypes"].clear()
    assert smoke.digest == before


def test_resolved_is_plain_and_complete():
    resolved = params.load("smoke").resolved()
    assert json.loads(json.dumps(resolved)) == resolved
    assert list(resolved) == ["gpu", "study", *params.NOTEBOOKS]
    assert resolved["study"]["full_size"]["rounds"] == 5


def test_digest_changes_with_the_values_only(folder):
    one = mine(folder, "gpu: {match: cpu}\nstudy: {guidance_scale: 4, seeds: [1]}\n").digest
    assert re.fullmatch("[0-9a-f]{64}", one)
    assert mine(folder, "# a remark\nstudy:\n  seeds: [1]\n  guidance_scale: 4.0\ngpu: {match: cpu}\n").digest == one
    assert mine(folder, "gpu: {match: cpu}\nstudy: {guidance_scale: 4, seeds: [2]}\n").digest != one


def test_describe_names_every_key_with_a_help_text():
    documented = {d.path: d for d in params.describe()}

    def paths(values, path=""):
        for name, value in values.items():
            yield from paths(value, f"{path}{name}.") if isinstance(value, dict) else [path + name]

    assert set(documented) == set(paths(params.load("smoke").resolved()))
    assert all(d.help and d.allowed and d.type for d in documented.values())
    assert documented["study.steps"][:4] == ("study.steps", "int", "a whole number from 1 to 200", 28)
    assert documented["study.width"].type == "int or null" and documented["study.width"].default is None
    assert documented["05_first_block_cache.thresholds"].type == "list of number"
    assert documented["gpu.match"].default == "per GPU"
    assert documented["13_final_stack.phases"].thorough == "True" and documented["gpu.match"].thorough == ""
    assert "4294967295" in documented["study.seeds"].allowed


SHORT = "gpu: {match: cpu}\n12_load: {requests: 20, images: [1]}\n"
FULL = SHORT + "thorough: {12_load: {requests: 50, images: [1, 4, 16]}, study: {full_size: {rounds: 9}}}\n"


def test_a_thorough_run_has_its_section_over_the_others_and_a_short_one_says_what_it_leaves_out(folder):
    short = mine(folder, FULL)
    full = params.load("mine", folder, thorough=True)
    assert short.notebooks["12_load"]["requests"] == 20 and short.digest == mine(folder, SHORT).digest
    mine(folder, FULL)
    assert (full.notebooks["12_load"]["requests"], full.notebooks["12_load"]["images"]) == (50, [1, 4, 16])
    assert (full.study.full_size.rounds, full.study.full_size.steps) == (9, short.study.full_size.steps)
    said = " ".join(short.lacks("12_load"))
    assert "(`requests`): 20 instead of 50" in said and "(`images`): without 4, 16" in said
    assert "(`full_size.rounds`): 5 instead of 9" in said
    assert len(short.lacks("09_vae")) == 1 and full.lacks("12_load") == []
    assert (full.own_dir, full.build_dir) == (short.own_dir, short.build_dir)  # the rows are the same rows


@pytest.mark.parametrize("given, thorough", [("1", True), ("0", False), ("", False), (None, False)])
def test_a_notebook_is_thorough_where_its_run_is(folder, monkeypatch, given, thorough):
    monkeypatch.delenv(params.THOROUGH, raising=False)
    if given is not None:
        monkeypatch.setenv(params.THOROUGH, given)
    mine(folder, FULL)
    chosen = params.chosen("mine", folder)
    assert chosen.thorough is thorough and chosen.given("12_load").requests == (50 if thorough else 20)


def test_thorough_is_yes_or_no(folder, monkeypatch):
    monkeypatch.setenv(params.THOROUGH, "very")
    with pytest.raises(UserError, match="THOROUGH=very isn't allowed: give 1"):
        params.chosen("mine", folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_the_project_is_fit_for_a_thorough_run(name):
    short, full = params.load(name), params.load(name, thorough=True)
    assert full.thorough and full.more == short.more
    assert bool(short.more) == (short.digest != full.digest)


@pytest.mark.parametrize("name", ["h10", "base", "", "../params/h100", "H100", "h100.yaml"])
def test_an_unknown_gpu_lists_the_choices(name):
    with pytest.raises(UserError) as caught:
        params.load(name)
    assert f"GPU={name} is not known" in str(caught.value)
    assert ", ".join(NAMES) in str(caught.value)


def test_an_unknown_gpu_is_guessed():
    with pytest.raises(UserError, match=r"did you mean h100\?"):
        params.load("H100")


@pytest.mark.parametrize(
    "text, parts",
    [
        (
            "study: {stepz: 8}",
            ["study.stepz is not a known key (did you mean steps?)", "allowed here: models, distilled, prompts"],
        ),
        ("study: {full_size: {stpes: 8}}", ["study.full_size.stpes", "did you mean steps?"]),
        (
            "05_first_block_cache: {thresold: [0.1]}",
            ["05_first_block_cache.thresold", "did you mean thresholds?"],
        ),
        ("studdy: {steps: 8}", ["studdy is not a known section (did you mean study?)", "01_baseline"]),
        ("steps: 8", ["steps is not a known section", "belongs into the section study"]),
        ("study: {thresholds: [0.1]}", ["study.thresholds", "belongs into the section 05_first_block_cache"]),
        ("study: {on: 8}", ["study.True is not a known key"]),
        (
            'study: {steps: "8"}',
            ['study.steps is "8"; allowed is a whole number from 1 to 200', "take the quotes away"],
        ),
        ("study: {steps: 8.5}", ["study.steps is 8.5"]),
        ("study: {steps: 8.0}", ["study.steps is 8.0"]),
        ("study: {steps: true}", ["study.steps is true"]),
        ("study: {guidance_scale: yes}", ["study.guidance_scale is true; allowed is a number from 0 to 30"]),
        ("study: {steps: null}", ["study.steps is null"]),
        ("study: {steps: [8]}", ["study.steps is [8]"]),
        ("study: {steps: 0}", ["study.steps is 0"]),
        ("study: {steps: 201}", ["study.steps is 201"]),
        ("study: {rounds: 2}", ["study.rounds is 2; allowed is a whole number from 3"]),
        ("study: {width: 1000}", ["study.width is 1000", "multiple of 16 or null"]),
        ("study: {seeds: [1, -1]}", ["study.seeds[1] is -1"]),
        ("study: {seeds: [1, 2, 1]}", ["study.seeds[2] repeats 1", "none twice"]),
        ("study: {seeds: []}", ["study.seeds is []", "at least one entry"]),
        ("study: {seeds: 1}", ["study.seeds is 1; allowed is a list"]),
        ("study: {prompts: [no]}", ["study.prompts[0] is false", "put quotes around it"]),
        ("study: {prompts: [a: b]}", ['study.prompts[0] is {"a": "b"}', "put quotes around it"]),
        ('study: {prompts: [" "]}', ['study.prompts[0] is " "; allowed is', "text that is not empty"]),
        (
            "study: {full_size: 8}",
            ["study.full_size is 8; allowed is a section with steps, width, height, rounds"],
        ),
        ("study: [1]", ["study is [1]; allowed is a section with models"]),
        (
            "01_baseline: {dtypes: [bfloat]}",
            ['dtypes[0] is "bfloat"', "float32, float16, bfloat16 (did you mean bfloat16?)"],
        ),
        (
            "00_environment: {matmul_size: 128}",
            ["matmul_size is 128; allowed is a whole number from 256 to 16384"],
        ),
        ("05_first_block_cache: {thresholds: [-0.1]}", ["thresholds[0] is -0.1", "of at least 0"]),
        ("05_first_block_cache: {thresholds: [.inf]}", ["thresholds[0] is Infinity"]),
        ("05_first_block_cache: {thresholds: [.nan]}", ["thresholds[0] is NaN"]),
        ("05_first_block_cache: {thresholds: [1e-3]}", ["YAML reads 1e-3 as text: write 1.0e-3"]),
        ("05_first_block_cache: {grid_thresholds: [0, 0.07]}", ["grid_thresholds has 0.07", "0.05, 0.1"]),
        (
            "05_first_block_cache: {fewer_steps: [4, 28]}",
            ["fewer_steps has 28", "below study.steps, which is 28"],
        ),
        ("thorough: {study: {stepz: 8}}", ["thorough.study.stepz is not a known key (did you mean steps?)"]),
        ("thorough: {studdy: {steps: 8}}", ["thorough.studdy is not a known section (did you mean study?)"]),
        ("thorough: {steps: 8}", ["thorough.steps is not a known section", "belongs into the section study"]),
        ("thorough: {gpu: {count: 2}}", ["thorough.gpu is not a known section"]),
        ("thorough: {study: {steps: 0}}", ["thorough.study.steps is 0; allowed is a whole number from 1 to 200"]),
        ("thorough: 1", ["thorough is 1; allowed is a section with study"]),
        (
            "thorough: {05_first_block_cache: {fewer_steps: [28]}}",
            ["thorough.05_first_block_cache.fewer_steps has 28", "below study.steps, which is 28"],
        ),
        ("gpu: {count: 0}", ["gpu.count is 0"]),
        ("gpu: {memory_gib: -1}", ["gpu.memory_gib is -1"]),
        ("gpu: {memory_gib: 1" + "0" * 400 + "}", ["gpu.memory_gib is 1000"]),
    ],
)
def test_each_mistake_has_its_sentence(message, text, parts):
    sentence = message(text if text.startswith("gpu") else f"gpu: {{match: cpu}}\n{text}\n")
    assert sentence.startswith("params/mine.yaml: ")
    for part in parts:
        assert part in sentence
    assert len(sentence) < 700


def test_the_number_that_the_hint_proposes_is_read_as_a_number(folder):
    text = "gpu: {match: cpu}\n05_first_block_cache: {thresholds: [1.0e-3], grid_thresholds: [0.001]}\n"
    assert mine(folder, text).notebooks["05_first_block_cache"]["thresholds"] == [0.001]


def test_a_mistake_in_base_yaml_is_blamed_on_it(message, folder):
    base = (folder / "base.yaml").read_text()
    sentence = message("gpu: {match: cpu}\n", base.replace("steps: 28", "steps: 28x", 1))
    assert sentence.startswith('params/base.yaml: study.steps is "28x"')


def test_a_missing_key_is_named_with_what_it_means(message, folder):
    assert "gpu.match is missing in params/base.yaml and params/mine.yaml" in message("study: {steps: 28}\n")
    base = (folder / "base.yaml").read_text()
    sentence = message("gpu: {match: cpu}\n", base.replace("    height: 1024\n", ""))
    assert "study.full_size.height is missing" in sentence and "image height in pixels" in sentence


def test_values_that_contradict_each_other_are_blamed_on_the_file_that_says_so(message, folder):
    assert message("gpu: {match: cpu}\nstudy: {steps: 20}\n").startswith(
        "params/base.yaml: 05_first_block_cache.fewer_steps has 24"
    )


def test_the_name_of_a_file_and_its_count_agree(folder):
    (folder / "h100x3.yaml").write_text("gpu: {match: H100, count: 2}\n")
    with pytest.raises(UserError, match=r"params/h100x3.yaml: gpu.count is 2; allowed is 3"):
        params.load("h100x3", folder)


@pytest.mark.parametrize(
    "data, part",
    [
        (b"gpu: {match: cpu", "is not valid YAML"),
        (b"gpu:\n  match: cpu\n\tcount: 1\n", "line 3 is not valid YAML"),
        (
            b"gpu: {match: cpu}\nstudy:\n  steps: 8\n  steps: 9\n",
            "line 4 is not valid YAML: the key steps stands there twice",
        ),
        (b"gpu: {match: cpu}\ngpu: {count: 1}\n", "line 2 is not valid YAML: the key gpu stands there twice"),
        (b"gpu: !!python/object/apply:os.system [true]\n", "not valid YAML"),
        (b"gpu: {match: 2026-99-99}\n", "not valid YAML"),
        (b"gpu: {match: &a [*a]}\n", "line 1 is not valid YAML: a value holds itself"),
        (b"\xff\xfe\x00g", "is not UTF-8 text"),
        (b"- gpu\n", "sections are allowed: gpu, study"),
        (b"", "gpu.match is missing"),
    ],
)
def test_a_file_that_is_no_yaml_of_sections(folder, data, part):
    (folder / "mine.yaml").write_bytes(data)
    with pytest.raises(UserError) as caught:
        params.load("mine", folder)
    assert "mine.yaml" in str(caught.value) and part in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(folder):
    (folder / "mine.yaml").unlink()
    (folder / "mine.yaml").mkdir()
    with pytest.raises(UserError, match="params/mine.yaml cannot be read: Is a directory"):
        params.load("mine", folder)


def test_the_folder_around_the_working_directory_is_found(folder, monkeypatch):
    inside = folder.parent / "notebooks" / "deep"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert params.find_folder() == folder
    assert "mine" in params.choices()


def test_without_a_params_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(installed, "__file__", str(tmp_path / "site-packages" / "fluxnb" / "installed.py"))
    with pytest.raises(UserError, match="no params/base.yaml here"):
        params.load("cpu")


@pytest.mark.parametrize(
    "name, detected, count",
    [
        ("cpu", "cpu", 0),
        ("smoke", "cpu", 0),
        ("smoke", "NVIDIA H200", 1),
        ("h100", "NVIDIA H100 80GB HBM3", 1),
        ("h100", "NVIDIA H100 80GB HBM3", 8),
        ("h100x4", "NVIDIA H100 PCIe", 4),
        ("h100x4", "NVIDIA H100 PCIe", None),
        ("a100", "NVIDIA A100-SXM4-80GB", 1),
        ("a6000", "NVIDIA RTX A6000", 1),
        ("h200", "nvidia h200", 1),
    ],
)
def test_the_right_gpu_passes(name, detected, count):
    params.check_gpu(params.load(name), detected, False, count)


@pytest.mark.parametrize(
    "name, detected, count, parts",
    [
        (
            "h100",
            "NVIDIA H200",
            1,
            ["for 1 CUDA device named H100", "has 1 × NVIDIA H200", "use GPU=h200, or set FORCE=1"],
        ),
        ("h100", "cpu", 0, ["named H100 but this machine has no CUDA device", "use GPU=cpu"]),
        ("cpu", "NVIDIA H200", 1, ["for no CUDA device but", "NVIDIA H200", "use GPU=h200"]),
        ("cpu", "NVIDIA H200", 2, ["use GPU=h200 or GPU=h200x2, or"]),
        ("h100x4", "NVIDIA H100 80GB HBM3", 2, ["for 4 CUDA devices named H100", "has 2 × NVIDIA H100"]),
        ("a100", "NVIDIA RTX A1000", 1, ["A1000: add a params file for it (`python -m", "NAME`), or set FORCE=1"]),
        ("h200", "NVIDIA GH200 480GB", 1, ["GH200"]),
    ],
)
def test_the_wrong_gpu_stops_with_both_names_unless_forced(name, detected, count, parts):
    loaded = params.load(name)
    with pytest.raises(UserError) as caught:
        params.check_gpu(loaded, detected, False, count)
    for part in (f"GPU={name} is for", *parts):
        assert part in str(caught.value)
    params.check_gpu(loaded, detected, True, count)


def test_detect_gpu_names_the_first_cuda_device(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert params.detect_gpu() == ("cpu", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA H200 number {index}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert params.detect_gpu() == ("NVIDIA H200 number 0", 4)


def test_reading_parameters_does_not_import_torch():
    code = "import sys; from fluxnb import params; params.load('cpu'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=params.find_folder().parent).returncode == 0


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_a_model_of_random_weights_that_is_asked_for_has_a_short_list_of_its_own(gpu, monkeypatch):
    plain, own = params.load(gpu), params.load(gpu, random=True)
    for stem in (notebooks.COMPILATION, notebooks.QUANTIZATION, notebooks.FINAL_STACK):
        assert plain.notebooks[stem] != own.notebooks[stem]
    monkeypatch.setenv("FLUXNB_MODEL", "flux2-klein-random")
    assert params.chosen(gpu).notebooks == own.notebooks
    assert params.load("smoke").notebooks == params.load("smoke", random=True).notebooks
