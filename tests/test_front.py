"""The front page: what it says for a GPU and a goal, where there are no rows, and what it answers when asked."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import test_recommend as made
from measured import cached, row, stacked
from test_site import configuration

from fluxnb import families, findings, notebooks, params, stacks
from fluxnb.report import asked, choosing, front, pairs
from fluxnb.report.audit import check_page
from fluxnb.report.pages import Page
from fluxnb.report.render import render_template

ROOT = Path(__file__).resolve().parents[1]
REPORTS = Path("/reports")
PAGE = Page(notebooks.FINAL_STACK, "The final stack", "ok", {})


def answered(name="h200"):
    return configuration(name, [*made.TIMED, *made.SEEN], PAGE)


def panel_of(gpus, name, key):
    gpu = next(gpu for gpu in gpus if gpu["name"] == name)
    return next(panel for panel in gpu["panels"] if panel["key"] == key)


def test_a_choice_says_time_before_and_after_with_its_interval_memory_worst_image_and_whose_weights():
    panel = panel_of(choosing.gpus([answered()], ROOT, REPORTS), "h200", "near-lossless")
    (choice,) = [c for c in front.named(answered()) if c.goal.key == "near-lossless"]
    assert panel["times"] == f"{choice.row.speedup:.2f}×" and panel["sure"] == findings.sureness(choice.row)
    assert (panel["before"], panel["after"]) == (f"{choice.row.baseline_s:.3g} s", f"{choice.row.latency_p50:.3g} s")
    assert panel["memory"] == ["33.8", "33.8"] and panel["worst"] == "39.9 dB" and "of 24 images" in panel["seen"]
    assert "random weights at full size" in panel["weights"] and "a hypothesis about FLUX" in panel["weights"]
    titles = [title for title, _ in panel["codes"]]
    assert titles == ["Through fluxnb", "Plain diffusers", "Command and YAML"]
    assert 'accelerate(pipe, "h200/near-lossless")' in panel["codes"][0][1]


def test_what_nothing_stands_for_is_one_sentence_with_the_command_that_fills_it_in():
    few = [row(notebook=notebooks.FINAL_STACK, n=3), stacked(stacks.BF16_STACK, n=3, speedup=1.4)]
    made_ = choosing.gpus([configuration("h200", few, PAGE), answered("h100")], ROOT, REPORTS)
    panel = panel_of(made_, "h200", "balanced")
    assert panel["missing"].startswith("No headline: n = 3, and 10 rounds") and "times" not in panel
    assert f'href="single_gpu/h200/{PAGE.href}"' in panel["missing"] and panel["command"] == "make report GPU=h200"
    unmeasured = panel_of(made_, "a100x4", "one-image-on-all-of-them")
    assert unmeasured["missing"].startswith("Nothing was measured on a100x4 yet")
    assert unmeasured["command"] == "make report GPU=a100x4"
    assert {g["name"] for g in made_} == {*params.choices(ROOT / "params")} - {"smoke"}
    assert [g["name"] for g in made_ if g["first"]] == ["h100"]  # what has answers is what opens


def test_no_headline_of_several_gpus_on_fewer_than_ten_rounds():
    from test_site import divided

    for n, said in ((3, "missing"), (10, "times")):
        (gpu,) = [
            g for g in choosing.gpus([configuration("h200x2", divided(n))], ROOT, REPORTS) if g["name"] == "h200x2"
        ]
        assert said in gpu["panels"][0], n


def test_every_option_stands_on_the_chart_fewer_steps_among_them_and_has_code():
    gpu = next(g for g in choosing.gpus([answered()], ROOT, REPORTS) if g["name"] == "h200")
    labels = [o["label"] for o in gpu["options"]]
    assert {"lean", "lean, cached", "14 steps"} <= set(labels) and len(set(labels)) == len(labels)
    assert [o["seconds"] for o in gpu["options"]] == sorted(o["seconds"] for o in gpu["options"])
    fewer = next(o for o in gpu["options"] if o["label"] == "14 steps")
    assert "num_inference_steps=14" in fewer["code"]
    for o in gpu["options"]:
        assert gpu["chart"].count(f'href="#{o["id"]}"') == 1 and o["code"]
    assert choosing.chart(gpu["options"][:1], "h200") == ""


def test_numbers_on_the_chart_never_lie_on_each_other():
    import re

    rows = [(i, 2.0 + i / 1000, 30.0) for i in range(1, 26)]
    shown = [
        {"number": i, "id": f"o{i}", "label": "a", "said": "b", "seconds": s, "worst": w, "colour": "#000000",
         "control": False, "beyond": False} for i, s, w in rows
    ]  # fmt: skip
    drawn = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', choosing.chart(shown, "h200"))
    places = [(float(x), float(y)) for x, y in drawn]
    assert min(math.dist(a, b) for i, a in enumerate(places) for b in places[:i]) >= 18
    assert all(0 <= x <= choosing.WIDTH and 0 <= y <= choosing.HEIGHT for x, y in places)


def test_switches_are_sorted_by_what_they_gain_and_ruined_images_are_none():
    one = {"speedup_ci_low": 1.5, "speedup_ci_high": 1.7}
    base = row(id="base", again=[0.4], exact="the same image, bit for bit")
    rows = [
        base,
        cached(0.1, 1.6, 40, 14, psnr_min_db=36.0, baseline="base", **one),
        cached(0.5, 3.0, 20, 6, psnr_min_db=12.0, baseline="base"),
        row(family=families.INTERVAL.name, label="every 2nd", speedup=1.9, psnr_min_db=30.0, psnr_db=33.0, id="i",
            baseline="base", speedup_ci_low=1.8, speedup_ci_high=2.0),
    ]  # fmt: skip
    shown = choosing.switches(configuration("cpu", rows), REPORTS)
    assert [s["times"] for s in shown] == ["1.90×", "1.60×"] and not any(s["noise"] for s in shown)
    within = replace(rows[1], id="w", speedup=1.02, speedup_ci_low=0.95, speedup_ci_high=1.08)
    assert [s["noise"] for s in choosing.switches(configuration("cpu", [base, within]), REPORTS)] == [True]
    few = replace(rows[3], n=3, speedup=2.4)  # of three rounds nothing leads, however fast
    enough = replace(rows[1], n=10)
    shown = choosing.switches(configuration("cpu", [base, enough, few]), REPORTS)
    assert [(s["times"], s["few"]) for s in shown] == [("1.60×", False), ("2.40×", True)]
    better = replace(few, id="more", label="every 3rd", n=10, speedup=1.3, settings={"every": 3})
    shown = choosing.switches(configuration("cpu", [base, few, better]), REPORTS)
    assert [(s["label"], s["few"]) for s in shown] == [("every 3rd", False)]  # nor stands for its family
    page = front.site(ROOT, REPORTS, [configuration("h200", [base, enough, few])])
    text = render_template("front.html.j2", "index.html", [], **page)
    assert text.index("1.60×") < text.index("timed in fewer than 10 rounds") < text.index("2.40×")


def explorer(folder, rows):
    """A page as the static explorer writes it: (row, how far its image is from the plain one in dB)."""
    points = [
        {"id": r.id, "label": r.label, "images": {"0": {"figure": i, "base": 0, "psnr": db}}}
        for i, (r, db) in enumerate(rows, 1)
    ]
    case = {"inputs": [["a prompt", 0]], "methods": [{"points": points}]}
    figures = "".join(f'<img id="f{i}" src="data:image/webp;base64,{i}">' for i in range(len(rows) + 1))
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"cases": [case]})
    (folder / "explorer.html").write_text(f'{figures}<script id="data" type="application/json">{data}</script>')


def test_the_image_shown_is_of_the_very_setting_or_says_that_it_is_further_from_the_plain_one(tmp_path):
    c = replace(answered(), folder=tmp_path)
    choice = next(c for c in front.named(c) if c.goal.key == "near-lossless")
    assert pairs.pairs(c) == [] and pairs.of_choice(choice, [], c) is None
    own, nearer, further = choice.seen, made.SEEN[1], made.SEEN[5]
    explorer(tmp_path, [(own, 41.0), (further, 31.0)])
    pair, same = pairs.of_choice(choice, pairs.pairs(c), c)
    assert same and pair.row == own.id and pair.before.endswith(",0") and pair.after.endswith(",1")
    explorer(tmp_path, [(nearer, 47.9), (further, 31.0)])
    pair, same = pairs.of_choice(choice, pairs.pairs(c), c)
    assert not same and pair.row == further.id  # never one that looks better than what is chosen


def test_of_one_family_the_surest_stands_among_the_switches():
    base = row(id="base", again=[0.4], exact="the same image, bit for bit")
    lucky = cached(0.2, 1.9, 40, 14, psnr_min_db=36.0, baseline="base", speedup_ci_low=1.2, speedup_ci_high=2.4)
    sure = cached(0.1, 1.6, 40, 14, psnr_min_db=36.0, baseline="base", speedup_ci_low=1.5, speedup_ci_high=1.7)
    shown = choosing.switches(configuration("cpu", [base, lucky, sure]), REPORTS)
    assert [s["label"] for s in shown] == [sure.label]


def test_options_of_several_sessions_say_so():
    (gpu,) = [g for g in choosing.gpus([answered()], ROOT, REPORTS) if g["options"]]
    assert gpu["sessions"] == ""
    apart = [{**o, "session": str(i), "plain_s": 5.0 + i} for i, o in enumerate(gpu["options"][:2])]
    assert choosing.sessions(apart).startswith("Of 2 sessions, in which the plain pipeline took 5 to 6 s")


def test_an_answer_says_what_is_known_of_images_and_never_inf(tmp_path):
    same = cached(0, 0.98, None, 28, psnr_min_db=None, psnr_identical=6, images=6, label="same")
    worst = cached(0.2, 2.0, 33, 9, psnr_min_db=30.04, images=6, psnr_identical=0, label="worst")
    old = cached(0.3, 2.0, 33, 9, images=None, label="old")
    full = stacked("BF16, cached", images=None)
    c = replace(configuration("cpu", [row(), same, worst, old, full], PAGE), folder=tmp_path)
    for r in c.rows:
        (tmp_path / f"{r.notebook}.html").touch()
    said = {line.subject.removesuffix(" on cpu"): line.said for line in asked.settings(c, tmp_path)}
    assert "6 images identical" in said["same"] and "worst of 6 images 30.0 dB" in said["worst"]
    assert "judged by today's rules" in said["old"] and "nothing of images" in said["BF16, cached"]
    assert not any("inf dB" in words for words in said.values())


def test_memory_that_is_allocated_is_not_called_all_that_must_be_free():
    values = front.site(ROOT, REPORTS, [answered()])
    text = render_template("front.html.j2", "index.html", [], **values)
    assert "GiB<small>allocated, reserve on top" in text


def test_quantization_that_makes_an_image_later_is_not_called_sooner():
    facts = {"gpus": 2, "session": "s", "notebook": notebooks.PARALLEL, "baseline": "b"}
    plain = stacked("pulled, everything", **facts, latency_p50=0.88, samples=[0.87, 0.88, 0.89])
    for seconds, said in ((0.92, "0.96× as fast as without it"), (0.885, "0.99× as fast within the noise as")):
        own = {"latency_p50": seconds, "samples": [seconds - 0.01, seconds, seconds + 0.01]}
        c = replace(configuration("h200x2", [plain, stacked("pulled, quantized", **facts | own)]))
        (line,) = asked.quantized(c, REPORTS)
        assert line.said.startswith("No result yet, n = 3 of 10 rounds: " + said), line.said


def test_what_is_asked_is_answered_from_rows():
    c = configuration("h200", [*made.TIMED, *made.SEEN], PAGE)
    shown = choosing.gpus([c], ROOT, REPORTS)
    lines = asked.lines([c], shown, [], REPORTS)
    goal = next(line for line in lines if line.subject == "H200, near-lossless (35 dB)")
    assert "→" in goal.said and goal.href == "#h200-near-lossless"
    assert any(line.kind == "how" and "MODEL=" in line.said for line in lines)
    for word in ("ST-LPIPS", "ꟻLIP", "gate", "predictor", "adherence", "session", "undecided", "First Block Cache"):
        assert any(line.subject == word and line.href.startswith("glossary.html") for line in lines), word
    (question, first), *_ = asked.examples(lines)
    assert question.startswith("What for H200") and first.kind == "goal"


def test_what_too_few_rounds_are_behind_says_so_first_and_stands_last(tmp_path):
    both = [cached(0.1, 1.6, 40, 14, n=3, id="0" * 10), cached(0.2, 1.5, 40, 12, n=10, id="1" * 10)]
    c = replace(configuration("cpu", [row(), *both]), folder=tmp_path)
    (tmp_path / f"{both[0].notebook}.html").write_text("a page")
    few, enough = asked.settings(c, tmp_path)
    assert few.said.startswith("No result yet, n = 3 of 10 rounds: 1.60×") and not few.settled
    assert enough.said.startswith("1.50× (") and enough.settled
    ordered = [line.settled for line in asked.lines([c], choosing.gpus([c], ROOT, tmp_path), [], tmp_path)]
    assert ordered == sorted(ordered, reverse=True) and not all(ordered)


def test_a_row_s_address_is_its_line_where_a_table_has_it_else_its_page(tmp_path):
    c = replace(configuration("cpu", [row(id="0123456789"), row(id="abcdef0123")]), folder=tmp_path)
    one, other = c.rows
    assert choosing.page_of(c, one, tmp_path) is None
    page = tmp_path / f"{one.notebook}.html"
    page.write_text(f'<tr id="row-{one.id}" class="fx-noise"><td>a</td></tr>')
    assert choosing.page_of(c, one, tmp_path) == f"{page.name}#row-{one.id}"
    assert choosing.page_of(c, other, tmp_path) == page.name


@pytest.mark.parametrize("rows", [[], [row()], [row(label=None, speedup=None, latency_p50=None, n=None, images=None)]])
def test_a_page_of_hardly_any_rows_is_a_page(rows):
    values = front.site(ROOT, REPORTS, [configuration("h200", rows)])
    check_page(render_template("front.html.j2", "index.html", [], **values), "index")
