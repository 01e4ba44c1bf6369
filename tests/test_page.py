"""eval.html and watch.html: the charts' numbers, what the filters show, and what a hostile completion may not do."""
import html
import json
import re
import shutil
import subprocess
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from test_eval import NAN, page_of, row, run

import eval as evaluation

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</p></svg></style><script>document.title = 'gone'</script><img src=x onerror=alert(2)>\u202e\u05d0\u05d1 {{ 7 * 7 }}"


def metrics(folder, steps, **figures):
    """A run's folder with a metrics.jsonl, each figure a function of the step."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(dict(step=s) | {key: f(s) for key, f in figures.items()}) for s in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def charts_of(page):
    """The page's charts -> [(title, SVG element)], read as XML: they are well formed."""
    found = []
    for text in re.findall(r"<svg.*?</svg>", page, re.S):
        svg = ElementTree.fromstring(text)
        found.append((svg.find("title").text, svg))
    return found


def points_of(svg, look):
    """The points of its lines of a class, "raw", "" or "grid"."""
    lines = [x.get("points").split() for x in svg.iter("polyline") if x.get("class") == look]
    return [[tuple(map(float, point.split(","))) for point in line] for line in lines]


def entries(rows, **other):
    return {name: evaluation.summary(answers) | dict(params=1) | other for name, answers in rows.items()}


def answers(world, name, n=60, **other):
    """n rows on the world's questions: every third wrong, every second inconsistent."""
    rows = []
    for i, r in enumerate(world.records[:n]):
        same = {key: r[key] for key in ("id", "task", "modality", "question", "options", "answer", "path")}
        rows.append(row(**same, acc=i % 3 > 0, con=float(i % 2), ckpt=name, completion=f"by {name}") | other)
    return rows


# ------------------------------------------------------------------------------------------------------------------ charts

@pytest.mark.parametrize("low, high, texts", [
    (0, 353, "0 100 200 300 400"), (0.7, 0.98, "0.7 0.8 0.9 1"), (1, 1, "0 0.2 0.4 0.6 0.8 1"),
    (0, 0, "0 0.2 0.4 0.6 0.8 1"), (-0.3, 0.1, "-0.3 -0.2 -0.1 0 0.1"), (0, 1e-7, "0 2e-08 4e-08 6e-08 8e-08 1e-07"),
    (0.3, 0.3 + 1e-16, "0 0.1 0.2 0.3"), (2_000_000, 9_000_000, "2000000 4000000 6000000 8000000 10000000")])
def test_ticks(low, high, texts):
    """Axes have round numbers, also where all values are the same or differ by a rounding error."""
    assert list(evaluation.ticks([high, low]).values()) == texts.split()


def test_ticks_enclose_any_numbers():
    """Whatever is drawn lies on the axis: between the first tick and the last, of 2 to 7, evenly apart."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        low = rng.normal() * 10 ** rng.uniform(-9, 9)
        high = low + 10 ** rng.uniform(-6, 9)
        ticks = list(evaluation.ticks([low, high]))
        assert 2 <= len(ticks) <= 7 and len(set(np.diff(ticks).round(12) > 0)) == 1
        assert ticks[0] <= low + 1e-6 * (high - low) and ticks[-1] >= high - 1e-6 * (high - low)


def test_a_chart_places_its_points():
    """Axes enclose the points, x from 0: the first ticks are at the lower left, the last at the upper right, y rises upwards."""
    chart = evaluation.chart("t", {"a": [("", [(1, 0.5), (10, 1)])], "b": []}, "step")
    assert list(chart["xs"]) == [0, 2, 4, 6, 8, 10] and list(chart["ys"].values()) == ["0.5", "0.6", "0.7", "0.8", "0.9", "1"]
    page = evaluation.page(charts=[chart], runs={"a": ["a"], "b": ["b"]})
    (title, svg), = charts_of(page)
    assert title == "t" and points_of(svg, "") == [[(70.8, 166), (348, 24)]]
    assert [(x.get("x"), x.get("y")) for x in svg.iter("text") if x.text == "10"] == [("348.0", "180")]
    assert [(x.get("x"), x.get("y")) for x in svg.iter("text") if x.text == "0.5"] == [("35", "170.0")]


def test_a_curve_is_the_log_and_its_running_mean(tmp_path):
    """40 steps are averaged by twos, each with the one before it; the first stands alone."""
    folder = metrics(tmp_path / "a", 40, reward=lambda s: s % 2)
    chart, minutes = evaluation.curves({"a": [folder]})
    assert (chart["title"], chart["unit"], minutes["unit"]) == ("reward, Eq. (3)", "step", "minutes")
    (look, raw), (strong, mean) = chart["lines"]["a"]
    assert (look, strong) == ("raw", "") and list(chart["lines"]) == ["a"]
    assert raw == [[s, s % 2] for s in range(1, 41)]
    assert mean == [[1, 1]] + [[s, 0.5] for s in range(2, 41)]


def test_a_long_run_is_thinned(tmp_path):
    """Of 5,000 steps POINTS are drawn, the first and the last among them; a short one has its points marked."""
    folders = [metrics(tmp_path / "long", 5000, kl=lambda s: s / 1000), metrics(tmp_path / "short", 3, kl=lambda s: 1.0)]
    chart, _ = evaluation.curves({"a": folders})
    (_, raw), (_, mean), *short = chart["lines"]["a"]
    assert len(raw) == len(mean) == evaluation.POINTS and raw[0] == [1, 0.001] and raw[-1] == [5000, 5]
    dots = [("dot", [[step, 1], [step, 1]]) for step in (1, 2, 3)]
    assert short == [("raw", [[1, 1], [2, 1], [3, 1]]), ("", [[1, 1], [2, 1], [3, 1]]), *dots]


def test_which_curves_there_are(tmp_path):
    """The loss is that of SFT, not of Con-GRPO; a figure that no run has makes no chart; a folder without a log none."""
    runs = {"sft": [metrics(tmp_path / "sft", 5, loss=float, seconds=lambda s: 6.0)],
            "grpo": [metrics(tmp_path / "grpo", 5, loss=float, reward=float, seconds_rollout=lambda s: 30.0,
                             seconds_waiting=lambda s: 30.0, peak_mb_update=float, consistency=lambda s: None)],
            "base": [str(tmp_path / "nothing")]}
    charts = evaluation.curves(runs)
    titles = {chart["title"]: [name for name, strokes in chart["lines"].items() if strokes] for chart in charts}
    assert titles == {"reward, Eq. (3)": ["grpo"], "loss, Eq. (1)": ["sft"], "seconds per step": ["sft"], "seconds of sampling": ["grpo"],
                      "seconds waited for the slowest process": ["grpo"]}
    assert [chart["unit"] for chart in charts] == ["step", "minutes"] * 5 and {tuple(chart["lines"]) for chart in charts} == {tuple(runs)}
    strokes = {chart["title"]: sum(chart["lines"].values(), []) for chart in charts if chart["unit"] == "minutes"}
    ends = {title: lines[-1][1][-1][0] for title, lines in strokes.items()}
    assert ends["loss, Eq. (1)"] == pytest.approx(0.5) and ends["reward, Eq. (3)"] == pytest.approx(5)
    assert evaluation.curves({"base": [str(tmp_path / "nothing")]}) == []


def test_a_half_written_line_of_a_log_is_passed_over(tmp_path):
    """The others are read; nan was written as null."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl": 0.5, "seconds": 60}\n{"step": 2, "kl": null}\n{"step": 3, "kl": 0.')
    assert evaluation.steps_of(str(tmp_path)) == [dict(step=1, kl=0.5, seconds=60, minutes=1), dict(step=2, kl=None, minutes=1)]


def test_the_pages_charts_have_the_right_points(world, tmp_path):
    """In the page: every line with its number of points, inside the axes, a title for each chart, a name for each colour."""
    folders = [metrics(tmp_path / name, 30, reward=lambda s: 1 / s, held_out_accuracy=lambda s: 0.5) for name in "ab"]
    rows = {"first": answers(world, folders[0]), "second": answers(world, folders[1])}
    page = page_of(entries(rows), rows)
    charts = charts_of(page)
    assert [title for title, _ in charts] == ["reward, Eq. (3)"] * 2 + ["held-out accuracy"] * 2
    for _, svg in charts:
        for look in ("raw", ""):
            lines = points_of(svg, look)
            assert [len(points) for points in lines] == [30, 30]
            assert all(40 <= x <= 348 and 24 <= y <= 166 for points in lines for x, y in points)
        assert [x.find("title").text for x in svg.iter("g")] == ["first", "second"]
    assert re.findall('style="--k: (.)">&#9679; (.*?):', page) == [("0", "first"), ("1", "second")]


# ------------------------------------------------------------------------------------------------------------------ tables

def test_the_best_of_each_column_and_the_map_are_marked(world, monkeypatch):
    """The largest number of a column is bold, ties too; none where all are equal, nor counts, differences, or the paper's rows,
    which are of other questions. Cells are coloured by their number, with a bar of one deviation where there are several runs;
    a square's diagonal is marked."""
    def of(mean, std=0.0, runs=1):
        return dict(mean=mean, runs=runs, std=std)
    plain = evaluation.table("Plain", {
        "x": {"params": "3.0", "a": of(0.095, std=0.01, runs=3), "c": of(1.0), "n": "7"},
        "y": {"params": "1.0", "a": of(0.10501), "b": of(0.05), "c": of(1.0), "n": "9"},
        "z": {"a": of(0.10499), "b": dict(mean=0.06, low=0.01, high=0.09, std=0.0, runs=1, groups=20), "c": of(1.0)},
        "MedAD-R1 (paper)": {"a": "98.87 ± 0.35"}})
    square = evaluation.square("modality", {"CT": {"CT": of(0.9), "MRI": None}, "MRI": {"CT": of(0.2), "MRI": of(0.8)}})
    monkeypatch.setattr(evaluation, "tables", lambda *_: [square, plain])
    rows = {"a": answers(world, "a", 3)}
    page = page_of(entries(rows), rows)
    cells = re.findall(r'<td class="([^"]*)"(?:\s+style="--mean: ([\d.]+)%(?:; --std: ([\d.]+)%)?")?>([^<]*)</td>', page)
    assert [(look, share, text) for look, share, _, text in cells[:9]] == [
        ("own", "90.0", "90.0"), ("", "", "-"), ("best", "90.0", "90.0"), ("", "20.0", "20.0"), ("own", "80.0", "80.0"),
        ("", "50.0", "50.0"), ("", "55.0", "55.0"), ("", "80.0", "80.0"), ("", "70.0", "70.0")]
    plain = cells[9:29]
    assert [text for look, _, _, text in plain if look == "best"] == ["10.5", "10.5"]
    marked = [(text, mean, std) for _, mean, std, text in plain if mean]
    assert marked == [("9.5 ± 1.0", "9.5", "1.0"), ("100.0", "100.0", ""), ("10.5", "10.5", ""), ("100.0", "100.0", ""),
                      ("5.0", "5.0", ""), ("10.5", "10.5", ""), ("100.0", "100.0", "")]


# ---------------------------------------------------------------------------------------------------------------- examples

@pytest.mark.parametrize("acc, con, kinds", [
    (1, 1, "right"), (0, 0, "wrong"), (0, 1, "wrong consistent-but-wrong"), (1, 0, "right right-but-inconsistent"),
    (1, NAN, "right"), (0, NAN, "wrong"), (NAN, NAN, ""), (None, None, "")])
def test_kinds_of_example(acc, con, kinds):
    """Without a verdict an answer is right or wrong alone; without an answer it is neither."""
    assert evaluation.kinds_of(dict(acc=acc, con=con)) == kinds.split()


def test_every_filter_finds_an_example(world):
    """Of 160 questions SHOWN are chosen, each once, and every task, kind and name that occurs is among them, however rare."""
    rows = {name: answers(world, name, 160) for name in "ab"}
    rare = next(r for r in rows["a"] if r["task"] == "location")
    for r in rows["a"]:
        r |= dict(acc=1.0, con=1.0)
    rare |= dict(acc=0.0, con=1.0)
    chosen = evaluation.examples(rows)
    ids = [question["b"]["id"] for question in chosen]
    assert len(ids) == len(set(ids)) == evaluation.SHOWN and rare["id"] in ids
    for name, answered in rows.items():
        every = {(r["task"], kind) for r in answered for kind in evaluation.kinds_of(r)}
        shown = {(question[name]["task"], kind) for question in chosen for kind in evaluation.kinds_of(question[name])}
        assert shown == every
    assert evaluation.examples({"a": []}) == []


def test_what_an_example_tells(world):
    """What F said, what it saw where letters were cut, its failure, a completion that was cut off, and false sentences."""
    rows = answers(world, "a", 3)
    thought = "A bright rim. So the answer is B."
    rows[0] |= dict(thought=thought, verdict="B", false_statements=["There is <a> rim."])
    rows[1] |= dict(verdict=NAN, acc=1.0)
    rows[2] |= dict(thought=None, verdict=None, cut_off=True, given=None)
    page = page_of(entries({"a": rows}), {"a": rows})
    parts = {i: part for i, part in re.findall(r'<section.*?<p>(phantom-[\w-]+), (.*?)</section>', page, re.S)}
    told = [parts[r["id"]] for r in rows]
    assert "F: B" in told[0] and "\nnot so in the image: There is &lt;a&gt; rim." in told[0]
    assert "\nF saw (unless --judge_sees raw): A bright rim.\n" in told[0]
    assert "F: failed" in told[1] and "F saw" not in told[1] and "cut off" not in told[1]
    assert "F: undecided" in told[2] and "cut off at the limit" in told[2] and "unreadable" in told[2]


def test_a_long_completion_is_cut_and_a_hostile_one_stays_text(world):
    """Markup, a template, text from right to left and 100,000 characters: escaped in every place, and the page stays small."""
    rows = answers(world, EVIL, completion=EVIL + "x" * 100_000, thought=f"{EVIL} B", verdict=EVIL, false_statements=[EVIL])
    rows = [r | dict(id=f"{r['id']}{EVIL}", task=EVIL, modality=EVIL, question=EVIL, options=[EVIL] * 4) for r in rows]
    page = page_of({EVIL: evaluation.summary(rows) | dict(params=1)}, {EVIL: rows}, EVIL)
    assert page.count("<script") == page.count("</script") == page.count("</style") == 1
    assert page.count("<img ") == page.count("<section") == 60 and "<img src=x" not in page and page.count("</svg") == 0
    assert "{{ 7 * 7 }}" in page and "49" not in re.sub(r"base64,[^\"]*|\d+\.\d+", "", page).split("</style>")[-1]
    assert "(the rest is in completions-*.jsonl)" in page and len(page) < 3e6


def test_the_page_is_small_and_needs_no_network(world):
    """60 examples of 3 checkpoints: under 3 MB, each image once, and nothing is loaded from elsewhere."""
    rows = {name: answers(world, name, 160) for name in ("base", "sft", "grpo")}
    page = page_of(entries(rows), rows)
    assert len(page.encode()) < 3e6 and page.count("data:image/jpeg;base64,") == evaluation.SHOWN
    assert "default-src 'none'" in page and not re.search(r"(src|href)=\"(?!data:)|url\(|@import", page)
    assert page.count("by sft") == evaluation.SHOWN


# ---------------------------------------------------------------------------------------------------------------- in a browser

DRIVER = """<pre></pre><script>
const shown = [];
for (const [name, value] of CASES) {
  form.elements[name].value = value;
  form.elements[name].dispatchEvent(new Event("change", {bubbles: true}));
  const ids = [...document.querySelectorAll("section")].filter(x => getComputedStyle(x).display != "none")
    .map(x => x.querySelector("p").textContent.split(",")[0]);
  shown.push([ids, form.elements.count.value]);
}
document.querySelector("pre").textContent = JSON.stringify([document.title, shown]);
</script></html>"""


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_choices_in_a_browser(world, tmp_path):
    """What is chosen of task, kind and checkpoint, one after the other, shows just the questions that fit, and says how many. A
    hostile completion and a hostile name do nothing."""
    rows = {"a": answers(world, "a", completion=EVIL), EVIL: answers(world, "b")}
    for i, r in enumerate(rows[EVIL]):
        r |= dict(acc=float(i % 4 == 0), con=1.0)
    both = list(zip(*rows.values(), strict=True))
    cases = [
        ("task", "", both),
        ("task", "location", [x for x in both if x[0]["task"] == "location"]),
        ("answer", "wrong", [x for x in both if x[0]["task"] == "location" and not (x[0]["acc"] and x[1]["acc"])]),
        ("model", "a", [x for x in both if x[0]["task"] == "location" and not x[0]["acc"]]),
        ("task", "", [x for x in both if not x[0]["acc"]]),
        ("answer", "consistent-but-wrong", [x for x in both if not x[0]["acc"] and x[0]["con"]]),
        ("model", "", [x for x in both if not x[0]["acc"] and x[0]["con"] or not x[1]["acc"]]),
        ("answer", "right-but-inconsistent", [x for x in both if x[0]["acc"] and not x[0]["con"]]),
        ("model", EVIL, [])]
    page = page_of(entries(rows), rows)
    choices = json.dumps([(name, value) for name, value, _ in cases]).replace("<", "\\u003c")
    (tmp_path / "eval.html").write_text(page.replace("</html>", DRIVER.replace("CASES", choices)))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=1000", "--dump-dom", (tmp_path / "eval.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    title, shown = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", dom, re.S)[1]))
    assert title == "Evaluation"
    for (name, value, expected), (ids, count) in zip(cases, shown, strict=True):
        assert set(ids) == {r["id"] for r, _ in expected}, (name, value)
        assert len(ids) == int(count), (name, value)


# --------------------------------------------------------------------------------------------------------------- while it trains

def test_watch_follows_a_run(tmp_path, monkeypatch, capsys):
    """The page grows with every step, a half-written line waits for its end, and the page reloads itself. Ctrl-C is the way out,
    no error; a run without a step yet is waited for; several runs go to --out. A bad folder is one sentence."""
    folder, new, pages = tmp_path / "grpo", tmp_path / "new", []
    new.mkdir()
    metrics(folder, 12, reward=float)
    log = (folder / "metrics.jsonl").read_text()
    halves = [len("".join(log.splitlines(True)[:n])) + 5 for n in range(1, 12)] + [len(log)]  # ends within a line

    def sleep(seconds):
        pages.append((tmp_path / "pages" / "watch.html").read_text())
        if len(pages) == len(halves):
            raise KeyboardInterrupt
        (folder / "metrics.jsonl").write_text(log[:halves[len(pages)]])
    # Not the module's own: the threads of other tests sleep, too.
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(sleep=sleep, strftime=time.strftime))
    (folder / "metrics.jsonl").write_text(log[:halves[0]])
    run(monkeypatch, "--watch", folder, new, "--out", tmp_path / "pages")
    assert [len(points_of(charts_of(page)[0][1], "raw")[0]) for page in pages] == list(range(1, 13))
    assert all('http-equiv="refresh"' in page and "<section" not in page for page in pages)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--watch", tmp_path / "none")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "none: no such folder" in said and "Traceback" not in said
