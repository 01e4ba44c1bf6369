"""eval.py: figures counted by hand, the files that come out, what a hostile completion may not do, and bad input."""
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig

import data
import eval as evaluation
import model as M
import rewards
from judge import make_judge

NAN = math.nan
STATES = ["Normal", "Abnormal", "Artifact", "Uncertain"]


def row(task, modality, acc, **other):
    given = dict(id="q", ckpt="c", seed=0, task=task, modality=modality, question="Q?",
                 options=STATES, answer="A", completion="", thought="t", given="A", verdict=None,
                 fmt=1.0, acc=float(acc), con=1.0, grounding=NAN, false_statements=[], group="g", cut_off=False)
    return given | other


ROWS = [  # 3 of 4, 1 of 2 and 0 of 1 right: 4 of 7 overall, where the tasks' mean would be 5/12
    row("anomaly", "MRI", 1), row("anomaly", "MRI", 1, con=0.0), row("anomaly", "CT", 1, fmt=0.0),
    row("anomaly", "CT", 0, con=NAN, given="B", verdict=NAN),
    row("location", "MRI", 1, con=0.0), row("location", "CT", 0, fmt=0.0, con=0.0, given=None, cut_off=True),
    row("pathology", "CT", 0, fmt=0.0, given="C")]


def texts_of(columns, rows):
    """A table's texts, line by line."""
    lines = [[name, *(text for text, *_ in cells)] for name, cells in rows.items()]
    return [["model", *columns], *lines]


def cells_of(results, **shown):
    return [texts_of(*table) for _, *table in evaluation.tables(results, **shown)]


def answers_of(entry, rows):
    """Of a name: {column of the table of answers: text}."""
    _, columns, lines = evaluation.answers_given({"x": entry}, {"x": rows})
    return dict(zip(columns, [text for text, *_ in lines["x"]], strict=True))


def page_of(results, rows, what="what"):
    """eval.html of a report."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation.write_report(Path(folder), results, rows, what)
        return (Path(folder) / "eval.html").read_text()


def accuracies(entries):
    return {name: (e["mean"], e["n"]) for name, e in entries.items()}


def script(monkeypatch, world, texts):
    """Put prepared completions in the place of sampling: M.sample hands them out, batch after batch."""
    queue = list(texts)

    def sample(model, batch, **_):
        n = len(batch["input_ids"])
        mine = [queue.pop(0) for _ in range(n)]
        return M.encode_completions(world.processor, mine)
    monkeypatch.setattr(M, "sample", sample)
    return queue


def run(monkeypatch, *argv):
    """The command line as a shell would start it."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    data.cli(evaluation.main)


@pytest.fixture
def out(world, tmp_path):
    """A folder as sft.py and grpo.py leave it: the phantoms and a checkpoint, linked."""
    (tmp_path / "phantoms").symlink_to(os.path.dirname(world.jsonl))
    (tmp_path / "sft").symlink_to(world.folder)
    return tmp_path


def test_a_process_has_its_device_before_a_judge_is_loaded(out, world, monkeypatch):
    """A local F goes to the process's own GPU: under torchrun not all of them to the first."""
    called = []

    def load(*args, **kwargs):
        called.append("judge")
        raise data.DataError("enough")
    monkeypatch.setattr(evaluation, "make_judge", load)
    monkeypatch.setattr(M, "setup_devices", lambda: called.append("device") or (0, 1, torch.device("cpu")))
    with pytest.raises(data.DataError, match="enough"):
        evaluation.main(["--ckpt", str(out / "sft"), "--judge", "hf:someone/else"])
    assert called == ["device", "judge"]


# ---------------------------------------------------------------------------------------------------------------- the figures

def test_accuracy_is_section_41s():
    """Per task right / questions of that task; overall all right / all questions, which is not the mean of the tasks."""
    s = evaluation.summary(ROWS)
    assert accuracies(s["tasks"]) == {"anomaly": (0.75, 4), "location": (0.5, 2), "pathology": (0.0, 1)}
    assert s["overall"] == {"mean": 4 / 7, "std": 0.0, "n": 7, "runs": 1}
    assert s["overall"]["mean"] != pytest.approx(statistics.fmean([0.75, 0.5, 0]))
    assert accuracies(s["modality"]) == {"MRI": (1.0, 3), "CT": (0.25, 4)}
    assert list(s["tasks"]) == ["anomaly", "location", "pathology"]


def test_rates_and_a_failed_judge():
    """Format over all seven; consistency over the six that F could judge: a failure is neither 0 nor hidden."""
    s = evaluation.summary(ROWS)
    assert s["format"] == {"mean": pytest.approx(4 / 7), "std": 0.0, "n": 7, "runs": 1}
    assert s["consistency"] == {"mean": pytest.approx(3 / 6), "std": 0.0, "n": 6, "runs": 1}
    assert s["judge_failed"] == 1
    assert s["cut_off"] == pytest.approx(1 / 7)
    rows = [row("anomaly", "CT", 1, con=NAN, verdict=NAN)]
    failed = evaluation.summary(rows)
    assert failed["consistency"]["mean"] is None and failed["judge_failed"] == 1
    table, *_ = cells_of({"x": failed | {"params": 1}})
    assert table[1][table[0].index("consistency")] == "-"
    assert answers_of(failed, rows)["F\nfailed"] == "1"


def test_without_thoughts_there_is_no_consistency(world):
    """--thinking none: the answer alone is well formed and right, consistency has no value and F is not said to have failed."""
    r = data.read_records(world.jsonl, thinking="none")[0]
    scored = rewards.score([rewards.answer_text(r)], [r], make_judge())
    rows = [answer | dict(ckpt="c", seed=0, cut_off=False, grounding=NAN) for answer in scored]
    assert rows[0]["completion"] == f"<answer>{r['answer']}</answer>" and rows[0]["fmt"] == rows[0]["acc"] == 1
    s = evaluation.summary(rows)
    assert s["consistency"]["mean"] is None and s["judge_failed"] == 0
    assert s["overall"]["mean"] == 1


def test_a_task_may_not_be_named_as_a_column(world, tmp_path):
    """Its figures would be another column's."""
    rows = [r | dict(task=name, split="test") for r, name in zip(world.records, ("letter", "n", "severity"), strict=False)]
    shutil.copytree(Path(world.jsonl).parent / "images", tmp_path / "images")
    data.write_records(rows, tmp_path / "q.jsonl")
    with pytest.raises(data.DataError, match="task letter, n: the tables have such a column already"):
        evaluation.main(["--ckpt", world.folder, "--data", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "o")])


def test_anomalies_found_and_healthy_images_known(world):
    """Sensitivity 1/3 and specificity 1/2 stand apart, whichever letters the options have; other tasks have none."""
    rows = [row("anomaly", "CT", acc, options=options, answer="AB"[options.index(right)])
            for acc, right, options in ((1, "Abnormal", ["Abnormal", "Normal"]), (0, "Abnormal", ["Normal", "Abnormal"]),
                                        (0, "Abnormal", ["Normal", "Abnormal"]), (1, "Normal", ["Normal", "Abnormal"]),
                                        (0, "Normal", ["Abnormal", "Normal"]))]
    s = evaluation.summary(rows)
    assert accuracies(s["anomaly"]) == {"Abnormal": (pytest.approx(1 / 3), 3), "Normal": (0.5, 2)}
    *_, table = cells_of({"x": s | {"params": 1}})
    assert table == [["model", "Abnormal", "Normal"], ["x", "33.3", "50.0"]]
    other = evaluation.summary([row("pathology", "CT", 1)])
    assert other["anomaly"] == {} and len(cells_of({"x": other | {"params": 1}})) == 2


def test_mean_and_deviation_over_seeds():
    """Accuracies 1/2, 1 and 3/4 of three seeds: mean 3/4 and, over n - 1, deviation 1/4; n stays the questions of one seed."""
    right = {0: (1, 1, 0, 0), 1: (1, 1, 1, 1), 2: (1, 1, 1, 0)}
    rows = [row("anomaly" if i < 2 else "pathology", "CT", acc, seed=s) for s, x in right.items() for i, acc in enumerate(x)]
    s = evaluation.summary(rows)
    assert s["overall"] == {"mean": 0.75, "std": pytest.approx(0.25), "n": 4, "runs": 3}
    assert s["tasks"]["anomaly"] == {"mean": 1.0, "std": 0.0, "n": 2, "runs": 3}
    assert s["tasks"]["pathology"] == {"mean": 0.5, "std": pytest.approx(0.5), "n": 2, "runs": 3}  # 0, 1, 1/2
    table, *_ = cells_of({"x": s | {"params": 3_750_000_000}})
    cells = dict(zip(*table, strict=True))
    assert (cells["overall"], cells["pathology"]) == ("75.0 ± 25.0", "50.0 ± 50.0")
    assert (cells["n"], cells["params, M"]) == ("4", "3750.0")


def test_mean_and_deviation_over_checkpoints():
    """Checkpoints a and b, sampled with two seeds each, are two runs: accuracies 3/4 and 1/4."""
    right = {("a", 0): (1, 1), ("a", 1): (1, 0), ("b", 0): (0, 0), ("b", 1): (1, 0)}
    rows = []
    for (ckpt, seed), answers in right.items():
        rows += [row("anomaly", "CT", acc, seed=seed, ckpt=ckpt) for acc in answers]
    s = evaluation.summary(rows)
    assert s["overall"] == {"mean": 0.5, "std": pytest.approx(math.sqrt(2) / 4), "n": 4, "runs": 2}
    table, *_ = cells_of({"x": s | {"params": 1}})
    assert dict(zip(*table, strict=True))["overall"] == "50.0 ± 35.4"


def test_a_row_of_the_table_may_name_several_checkpoints(tmp_path, monkeypatch):
    """NAME=A,B is one row of two; a folder that has an equals sign in its name is itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    rows = evaluation.checkpoints_of(["out/sft", "GRPO=out/grpo,out1/grpo", "lr=1"])
    assert rows == {"out/sft": ["out/sft"], "GRPO": ["out/grpo", "out1/grpo"], "lr=1": ["lr=1"]}
    for bad in (["=a"], ["x="], ["x=a,,b"], ["a", "a"]):
        with pytest.raises(data.DataError, match="expected"):
            evaluation.checkpoints_of(bad)


def test_rates_have_a_deviation_too():
    """Format 1/2 and 1, consistency 0 and 1 of two seeds; one run's cells have no deviation."""
    rows = [row("anomaly", "CT", 1, con=0.0),
            row("anomaly", "CT", 1, fmt=0.0, con=NAN, verdict=NAN),
            row("anomaly", "CT", 1, seed=1), row("anomaly", "CT", 1, seed=1)]
    s = evaluation.summary(rows)
    assert s["format"] == {"mean": 0.75, "std": pytest.approx(math.sqrt(2) / 4), "n": 2, "runs": 2}
    assert s["consistency"] == {"mean": 0.5, "std": pytest.approx(math.sqrt(2) / 2), "n": 1, "runs": 2}
    table, *_ = cells_of({"x": s | {"params": 1}})
    cells = dict(zip(*table, strict=True))
    assert (cells["format"], cells["consistency"]) == ("75.0 ± 35.4", "50.0 ± 70.7")
    once = evaluation.summary(rows[2:])
    assert once["format"]["std"] == once["consistency"]["std"] == 0
    table, *_ = cells_of({"x": once | {"params": 1}})
    cells = dict(zip(*table, strict=True))
    assert (cells["format"], cells["consistency"]) == ("100.0", "100.0")


def test_groups_come_in_the_papers_order():
    """Tasks of section 3.1 first, in its order, Med-R1's behind them by name; a task without a row has no entry."""
    rows = [row(task, "CT", 1) for task in ("zeta", "pathology", "alpha", "anatomy", "pathology")]
    groups = evaluation.grouped(rows, "task", data.TASKS)
    assert [(name, len(members)) for name, members in groups.items()] == [
        ("anatomy", 1), ("pathology", 2), ("alpha", 1), ("zeta", 1)]


def test_a_name_cannot_break_a_table(world):
    """A line break or a | in a file's task stays in its cell in Markdown; on the page a long name may wrap, and every line has
    as many cells as the header."""
    name, task = "out/" + "very_long_name" * 20, "two\nlines | <b>"
    rows = [row(task, "CT", 1, path=world.records[0]["path"])]
    results = {name: evaluation.summary(rows) | {"params": 1}}
    table, *_ = cells_of(results)
    lines = evaluation.markdown(*evaluation.tables(results)[0]).splitlines()[2:]
    assert len(lines) == 3 and all(len(re.split(r"(?<!\\)\|", x)) == len(table[0]) + 2 for x in lines)
    page = page_of(results, {name: rows})
    assert f'<th scope="row">{name}</th>' in page and re.search(r"body {[^}]*overflow-wrap: anywhere", page)
    for part in page.split("<table>")[1:]:
        assert part.count('<th scope="col">') == part.count("<td") + 1
    assert page.count("<table>") == 3 and page.split("<table>")[1].count("<td") == len(table[0]) - 1
    assert '<th scope="col">two\nlines | &lt;b&gt;</th>' in page


def test_answers_given_show_a_collapse():
    """A policy that always says Normal, or always A, is seen by the shares of its answers."""
    rows = [row("anomaly", "CT", 1, given=given) for given in "AAAB"]
    rows.append(row("anomaly", "CT", 0, given=None))
    given = answers_of(evaluation.summary(rows), rows)
    assert given["anomaly"] == "Normal 60 %,\nAbnormal 20 %,\nunreadable 20 %"
    assert given["letter"] == "A 60 %,\nB 20 %,\nunreadable 20 %"
    rows = [row("anomaly", "CT", 0, given=given) for given in "ABCD"]
    assert answers_of(evaluation.summary(rows), rows)["anomaly"].count("%") == 3


def test_table_1s_columns():
    """The paper's tasks in its order, Med-R1's behind them; "-" where there was no question."""
    ours = evaluation.summary(ROWS) | {"params": 1_100_000}
    theirs = evaluation.summary([row("lesion grading", "Fundus", 1)]) | {"params": 1_100_000}
    results = {"a|b": ours, "c": theirs}
    table, modality, *_ = cells_of(results)
    assert table[0] == ["model", "params, M", "anatomy", "anomaly", "location", "modality",
                        "pathology", "lesion grading", "overall", "format", "consistency", "grounding", "n"]
    assert table[1] == ["a|b", "1.1", "-", "75.0", "50.0", "-", "0.0", "-", "57.1", "57.1", "50.0",
                        "-", "7"]
    assert table[2][2:9] == ["-"] * 5 + ["100.0", "100.0"]
    assert modality == [["model", "MRI", "CT", "Fundus"], ["a|b", "100.0", "25.0", "-"],
                        ["c", "-", "-", "100.0"]]
    lines = evaluation.markdown(*evaluation.tables(results)[0]).splitlines()[2:]  # the | of a name is escaped
    cells = [re.split(r"(?<!\\)\|", line) for line in lines]
    assert len(lines) == 4 and all(len(x) == len(table[0]) + 2 for x in cells)


def test_the_papers_figures_stand_beside(world):
    """--paper: Table 1's seventeen rows (cells read off the paper again here), under our columns, and beside a row the overall
    accuracy of Tables 2 and 3, where they have its name. Tasks that the paper has not are "-"."""
    ours = evaluation.summary(ROWS) | {"params": 1e6}
    other = evaluation.summary([row("lesion grading", "CT", 1)]) | {"params": 1e6}
    table, *_ = cells_of({"Acc-only": ours, "mine": other}, paper=True)
    header, first, second, *paper = table
    assert header[2:8] == [*data.TASKS, "lesion grading"] and (first[0], second[0]) == ("Acc-only", "mine")
    assert header[-1] == "overall in the paper" and (first[-1], second[-1]) == ("78.85 ± 1.08", "-")
    assert all(len(line) == len(header) for line in table)
    rows = {line[0]: dict(zip(header, line, strict=True)) for line in paper}
    assert len(rows) == 17 and {x["lesion grading"] for x in rows.values()} == {x["n"] for x in rows.values()} == {"-"}
    best, grok = rows["MedAD-R1 (paper)"], rows["Grok4-Fast (paper)"]
    assert (best["params, M"], grok["params, M"]) == ("3000", "-")
    assert (best["anatomy"], best["anomaly"], best["location"]) == ("98.87 ± 0.35", "78.24 ± 0.84", "55.90 ± 1.02")
    assert (best["modality"], best["pathology"], best["overall"]) == ("97.14 ± 0.76", "79.49 ± 1.20", "85.15 ± 0.95")
    assert (grok["pathology"], grok["overall"]) == ("39.49 ± 1.05", "77.00 ± 1.00")
    for x in rows.values():  # no row has its overall outside of its tasks
        tasks = [float(x[task].split()[0]) for task in data.TASKS]
        assert min(tasks) < float(x["overall"].split()[0]) < max(tasks)
    assert "(paper)" not in str(cells_of({"a": ours}))


def test_the_square_of_med_r1():
    """Trained on one task (line), asked about all (columns): the cells are the accuracies, the means those of lines and of the
    columns over lines that are named like one; in Markdown the diagonal alone is bold."""
    right = {"anomaly": ((1, 1), (1, 0)), "location": ((0, 0), (1, 1)), "start": ((0, 1), (0, 0))}
    results = {}
    for name, (anomaly, location) in right.items():
        rows = [row("anomaly", "CT", x) for x in anomaly] + [row("location", "CT", x) for x in location]
        results[name] = evaluation.summary(rows) | {"params": 1}
    *_, table = evaluation.tables(results, matrix="task")
    assert texts_of(*table[1:]) == [
        ["model", "anomaly", "location", "mean"], ["anomaly", "100.0", "50.0", "75.0"],
        ["location", "0.0", "100.0", "50.0"], ["start", "50.0", "0.0", "25.0"], ["mean", "50.0", "75.0", "62.5"]]
    text = evaluation.markdown(*table)
    assert re.findall(r"\*\*(.*?)\*\*", text) == ["100.0", "100.0"] and "| anomaly | **100.0** | 50.0 |" in text
    assert "| location | 0.0 | **100.0** |" in text and text.startswith(f"{table[0]}\n\n| model |")


def chain(acc, place="a", con=1.0):
    """Rows of a checkpoint: {image: accuracies of its questions}."""
    rows = []
    for image, answers in acc.items():
        for i, x in enumerate(answers):
            rows.append(row("anomaly", "CT", x, id=f"{image}-{i}", path=image, group=image, ckpt=place, con=con))
    return rows


def interval(figure):
    return figure["mean"], figure["low"], figure["high"]


def test_differences_counted_by_hand():
    """Image p rises in both of its questions, q in neither: the mean is 1/2, and drawing two images of two gives 0, 1/2 or 1,
    the ends with 1/4 each: an interval from 0 to 1. Where every image rises by 1/2 the interval is that point. Checkpoints are
    paired by their place and weigh alike; a question without a value is left out; other questions have no difference."""
    before, after = chain({"p": (0, 0), "q": (1, 1)}, con=NAN), chain({"p": (1, 1), "q": (1, 1)}, "b")
    found = evaluation.difference(before, after)
    assert [*found] == ["accuracy"] and interval(found["accuracy"]) == (0.5, 0.0, 1.0)  # no consistency before, no grounding
    after = chain({"p": (1, 0), "q": (0, 1), "r": (1, 0)}, con=0.0)
    found = evaluation.difference(chain({"p": (0, 0), "q": (0, 0), "r": (0, 0)}), after)
    assert interval(found["accuracy"]) == (0.5, 0.5, 0.5)
    assert interval(found["consistency"]) == (-1.0, -1.0, -1.0)
    one, four = {"p": (0,)}, {"s": (0, 0), "t": (0, 0)}
    rose = chain({"p": (1,)}, "c") + chain(four, "d")
    found = evaluation.difference(chain(one, "a") + chain(four, "b"), rose)
    assert found["accuracy"]["mean"] == 0.5  # of 1 and 0, although one question of five rose
    assert found["accuracy"]["std"] == 0.5**0.5 and found["accuracy"]["runs"] == 2  # of 1 and 0
    assert evaluation.difference(chain(one), chain(four)) == {}
    same = {"p": (1, 1), "q": (0, 0)}  # two checkpoints on the same images are no four images: the ends stay likely
    found = evaluation.difference(chain({"p": (0, 0), "q": (0, 0)}, "a") + chain({"p": (0, 0), "q": (0, 0)}, "b"),
                                  chain(same, "c") + chain(same, "d"))
    assert interval(found["accuracy"]) == (0.5, 0.0, 1.0)


def test_an_image_without_a_value_leaves_the_interval_a_number():
    """Draws of nothing but such images are left out."""
    assert interval(evaluation.bootstrap([{"p": [1.0], "q": []}])) == (1.0, 1.0, 1.0)


def test_differences_stand_in_the_report():
    """Each row minus the one before it, in points; "-" where the questions are others. Of few groups no interval is shown, of
    several checkpoints their deviation."""
    rows = {"a": chain({"p": (0, 0), "q": (1, 1)}), "b": chain({"p": (1, 1), "q": (1, 1)}), "c": chain({"s": (1,)})}
    rows["d"] = chain({str(k): (k % 2,) for k in range(20)})
    rows["e"] = chain({str(k): (1,) for k in range(20)})
    rows["f"] = chain({str(k): (1,) for k in range(20)}, "x") + chain({str(k): (k > 9,) for k in range(20)}, "y")
    rows["g"] = chain({str(k): (1,) for k in range(20)}, "x") + chain({str(k): (1,) for k in range(20)}, "y")
    results, before = {}, None
    for name, answers in rows.items():
        results[name] = evaluation.summary(answers) | {"params": 1}
        if before:
            results[name]["difference"] = evaluation.difference(rows[before], answers)
        before = name
    some = [{str(k): [1.0] if k < 3 else [] for k in range(40)}]
    assert evaluation.bootstrap(some)["groups"] == 3  # those without a value tell nothing
    *_, table = cells_of(results)
    assert table == [["model", "accuracy", "consistency"], ["a", "-", "-"],
                           ["b", "+50.0", "+0.0"], ["c", "-", "-"], ["d", "-", "-"],
                     ["e", "+50.0 (+25.0 to +75.0)", "+0.0 (+0.0 to +0.0)"], ["f", "-", "-"],
                     ["g", "+25.0 ± 35.4 (+14.9 to +35.0)", "+0.0 ± 0.0 (+0.0 to +0.0)"]]


def test_the_interval_covers_the_truth(monkeypatch):
    """Simulated: 100 images whose 2 to 5 questions rise or fall together, by 0.1 in the mean. Of 95 % intervals 93 to 97 % hold
    it; drawn by question, as if those of one image told as much as those of several, not 90 %."""
    monkeypatch.setattr(evaluation, "RESAMPLES", 400)
    rng, held, by_question = np.random.default_rng(0), [], []
    for _ in range(400):
        images = []
        for n, change in zip(rng.integers(2, 6, 100), rng.choice((-0.3, 0.5), 100), strict=True):
            images.append(np.sign(change) * (rng.random(n) < abs(change)))
        several = dict(enumerate(images))
        figure = evaluation.bootstrap([several])
        held.append(figure["low"] <= 0.1 <= figure["high"])
        if len(held) <= 100:
            single = dict(enumerate([x] for image in images for x in image))
            figure = evaluation.bootstrap([single])
            by_question.append(figure["low"] <= 0.1 <= figure["high"])
    assert 0.93 <= np.mean(held) <= 0.97 and np.mean(by_question) < 0.9


# ------------------------------------------------------------------------------------------------------ answering the questions

def test_grounding_is_not_consistency(world, monkeypatch):
    """A gold thought is true; another picture's is consistent and false, and its false sentences are told; nothing is known
    of a record that doesn't say what it shows. The means are over the thoughts that state something."""
    healthy = next(r for r in world.records if r["task"] == "anomaly" and not r["shows"]["lesion"])
    ill = next(r for r in world.records if r["task"] == "anomaly" and r["shows"]["lesion"])
    ill = ill | dict(options=STATES, answer="B")
    texts = [rewards.answer_text(healthy), "<think>There is no lesion. So the image is Normal.</think><answer>A</answer>",
             rewards.answer_text(healthy), "<think>Well.</think><answer>A</answer>"]
    script(monkeypatch, world, texts)
    silent = healthy | dict(id="silent", shows=None)
    rows = evaluation.evaluate(world.net, world.processor, [healthy, ill, silent, healthy], make_judge(), max_new_tokens=99)
    assert [r["grounding"] for r in rows[:2]] == [1.0, 0.0] and math.isnan(rows[2]["grounding"])
    assert rows[1]["con"] == 1.0 and rows[1]["false_statements"] == ["There is no lesion", "So the image is Normal"]
    assert rows[2]["false_statements"] == [] and math.isnan(rows[3]["grounding"])
    entry = evaluation.summary([r | dict(ckpt="c", seed=0) for r in rows])
    assert entry["grounding"]["mean"] == 0.5
    assert answers_of(entry, rows)["nothing\nto ground"] == "2"


def test_rows_follow_the_records(world, monkeypatch):
    """Completions meet the right records over uneven batches, and are scored: gold, wrong, talkative, unfinished."""
    records = world.records[:7]
    texts = [rewards.answer_text(r) for r in records]
    wrong = "ABCD"[("ABCD".index(records[2]["answer"]) + 1) % 4]
    texts[2] = f"<think>{records[2]['thought']}</think><answer>{wrong}</answer>"  # the thought supports another option
    texts[4] = "Well: " + texts[4]
    texts[5] = "<think>It goes on and on"
    left = script(monkeypatch, world, texts)
    rows = evaluation.evaluate(world.net, world.processor, records, make_judge(), max_new_tokens=99, batch=3)
    assert not left and [r["id"] for r in rows] == [r["id"] for r in records]
    assert [r["completion"] for r in rows] == texts
    assert [r["given"] for r in rows] == [wrong if i == 2 else None if i == 5 else r["answer"] for i, r in enumerate(records)]
    assert [r["acc"] for r in rows] == [1, 1, 0, 1, 1, 0, 1]
    assert [r["fmt"] for r in rows] == [1, 1, 1, 1, 0, 0, 1]
    assert [r["con"] for r in rows] == [1, 1, 0, 1, 1, 0, 1]
    assert rows[2]["verdict"] == records[2]["answer"] and rows[0]["thought"] == records[0]["thought"]
    assert not any(r["cut_off"] for r in rows)


def test_greedy_does_not_depend_on_the_batch(world):
    """Images and questions of several lengths: the padding that a batch brings along must not change an answer."""
    few = [evaluation.evaluate(world.net, world.processor, world.mixed, make_judge(), max_new_tokens=8, batch=b)
           for b in (1, 2, 5)]
    assert few[0] == few[1] == few[2]
    assert any(r["completion"] for r in few[0])
    assert any(r["cut_off"] for r in few[0])


def test_seeds_at_a_temperature(world):
    """The same seed gives the same answers, another seed others; greedy ones don't depend on it."""
    def texts(seed, temperature):
        rows = evaluation.evaluate(world.net, world.processor, world.mixed[:2], make_judge(), max_new_tokens=8, seed=seed,
                                   temperature=temperature)
        return [r["completion"] for r in rows]
    assert texts(0, 1.0) == texts(0, 1.0) != texts(1, 1.0)
    assert texts(0, 0.0) == texts(1, 0.0)


def test_a_subset_is_fixed_and_nested(world):
    """The same records at every call, the smaller set inside the larger, in the file's order; 0 is all."""
    few, more = evaluation.subset(world.records, 5), evaluation.subset(world.records, 20)
    ids = [r["id"] for r in world.records]
    assert len(few) == 5 and len(more) == 20 and few == evaluation.subset(world.records, 5)
    assert {r["id"] for r in few} <= {r["id"] for r in more}
    assert [ids.index(r["id"]) for r in more] == sorted(ids.index(r["id"]) for r in more)
    assert more != world.records[:20] and evaluation.subset(world.records, 0) == world.records


# ------------------------------------------------------------------------------------------------------------------- the files

def test_from_checkpoint_to_results(out, monkeypatch, capsys):
    """The whole command on a random model: schema, agreement of results.json with the completions, merge, nothing left half."""
    (out / "results.json").write_text(json.dumps({"elsewhere": {"overall": {"mean": 0.5}}, str(out / "sft"): {"overall": "an old run"}}))
    run(monkeypatch, "--ckpt", out / "sft", "--max_new_tokens", 6, "--questions", 30, "--batch", 16)
    results = json.loads((out / "results.json").read_text())
    assert results["elsewhere"] == {"overall": {"mean": 0.5}} and len(results) == 2
    entry, rows = results[str(out / "sft")], [json.loads(x) for x in (out / "completions-sft.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"ckpt", "seed", "id", "task", "modality", "question", "options", "answer", "completion", "thought",
                            "given", "verdict", "fmt", "acc", "con", "grounding", "false_statements", "group", "cut_off",
                            "read_as"}
    test = data.read_records(str(out / "phantoms" / "phantoms.jsonl"), "test")
    assert {r["id"] for r in rows} == {r["id"] for r in evaluation.subset(test, 30)} and len(rows) == 30
    assert entry["overall"] == {"mean": sum(r["acc"] for r in rows) / 30, "std": 0.0, "n": 30, "runs": 1}
    for key, field in (("tasks", "task"), ("modality", "modality")):
        assert {k: v["n"] for k, v in entry[key].items()} == {k: sum(r[field] == k for r in rows) for k in entry[key]}
        assert all(set(v) == {"mean", "std", "n", "runs"} and 0 <= v["mean"] <= 1 for v in entry[key].values())
        assert sum(v["n"] for v in entry[key].values()) == 30
    for key in ("format", "consistency"):
        assert set(entry[key]) == {"mean", "std", "n", "runs"} and 0 <= entry[key]["mean"] <= 1
    assert entry["params"] == M.load(str(out / "sft"))[0].num_parameters() and entry["knobs"]["max_new_tokens"] == 6
    report, page = (out / "report.md").read_text(), (out / "eval.html").read_text()
    assert f"| {out / 'sft'} | 1.1 |" in report and report in capsys.readouterr().out
    assert page.count("data:image/jpeg;base64,") == 30 <= evaluation.SHOWN
    assert "src=\"http" not in page and "href" not in page
    assert sorted(os.listdir(out)) == ["completions-sft.jsonl", "eval.html", "phantoms", "report.md", "results.json", "sft"]


def test_seeds_through_the_command(out, monkeypatch):
    """Two seeds: every question twice in the completions, n counted once, the deviation in the report."""
    run(monkeypatch, "--ckpt", out / "sft", "--max_new_tokens", 4, "--questions", 5, "--temperature", 1, "--seeds", 3, 8)
    entry = json.loads((out / "results.json").read_text())[str(out / "sft")]
    rows = [json.loads(x) for x in (out / "completions-sft.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in rows] == [3] * 5 + [8] * 5 and len({r["id"] for r in rows}) == 5
    assert entry["overall"]["n"] == 5 and entry["seeds"] == [3, 8]
    assert "0.0 ± 0.0" in (out / "report.md").read_text()


def test_two_checkpoints_of_one_name_and_another_folder(out, world, tmp_path, monkeypatch):
    """a/sft and b/sft keep apart; --out takes the results; JSON holds no NaN."""
    (out / "b").mkdir()
    (out / "b" / "sft").symlink_to(world.folder)
    (out / "b" / "phantoms").symlink_to(out / "phantoms")
    monkeypatch.setattr(evaluation, "make_judge", lambda *_, **__: lambda thoughts, items: [NAN] * len(items))
    script(monkeypatch, world, ["<think>t</think><answer>A</answer>"] * 8)
    run(monkeypatch, "--ckpt", out / "sft", out / "b" / "sft", "--questions", 4, "--out", out / "results")
    names = sorted(p.name for p in (out / "results").iterdir())
    assert [n for n in names if n.startswith("completions")] == ["completions-b-sft.jsonl", "completions-sft.jsonl"]
    results = json.loads((out / "results" / "results.json").read_text(), parse_constant=pytest.fail)
    assert set(results) == {str(out / "sft"), str(out / "b" / "sft")}
    for entry in results.values():
        assert entry["consistency"]["mean"] is None and entry["judge_failed"] == 4
        assert entry["format"]["mean"] == 1
    row = json.loads((out / "results" / "completions-sft.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert row["con"] is None and row["ckpt"] == str(out / "sft")


def test_each_checkpoint_of_a_row_answers_the_phantoms_beside_it(out, world, tmp_path, monkeypatch):
    """Two chains, each with phantoms of its own: one row, and n counts the questions of both."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "sft").symlink_to(world.folder)
    data.make_phantoms(other / "phantoms", 7, 10)
    run(monkeypatch, "--ckpt", f"both={out / 'sft'},{other / 'sft'}", "--max_new_tokens", 4)
    entry = json.loads((out / "results.json").read_text())["both"]
    files = [str(folder / "phantoms" / "phantoms.jsonl") for folder in (out, other)]
    both = [{r["id"] for r in data.read_records(f, "test")} for f in files]
    lines = (out / "completions-both.jsonl").read_text().splitlines()
    rows = [json.loads(x) for x in lines]
    for folder, ids in zip((out, other), both, strict=True):
        assert {r["id"] for r in rows if r["ckpt"] == str(folder / "sft")} == ids
    assert entry["overall"]["n"] == len(rows) == sum(map(len, both))
    assert entry["checkpoints"] == [str(out / "sft"), str(other / "sft")]


def test_a_checkpoint_is_asked_as_it_was_trained(out, world, monkeypatch):
    """Its knobs.json tells where the thought stands, so that --thinking's ablations can be rows of one table; the flag wins."""
    copies = {}
    for thinking in ("none", "after", "before"):
        copies[thinking] = out / f"grpo-{thinking}"
        copies[thinking].mkdir()
        for file in os.listdir(world.folder):
            (copies[thinking] / file).symlink_to(os.path.join(world.folder, file))
        (copies[thinking] / "knobs.json").write_text(json.dumps({"thinking": thinking}))
    answers = {"none": "<answer>A</answer>", "after": "<answer>A</answer><think>t</think>",
               "before": "<think>t</think><answer>A</answer>"}
    script(monkeypatch, world, [answers[x] for x in copies for _ in range(3)])
    run(monkeypatch, "--ckpt", *copies.values(), "--questions", 3)
    results = json.loads((out / "results.json").read_text())
    assert [results[str(folder)]["format"]["mean"] for folder in copies.values()] == [1, 1, 1]
    script(monkeypatch, world, [answers["after"]] * 3)
    run(monkeypatch, "--ckpt", copies["after"], "--questions", 3, "--thinking", "before")
    assert json.loads((out / "results.json").read_text())[str(copies["after"])]["format"]["mean"] == 0


def test_two_processes_answer_as_one(out, world, monkeypatch):
    """torchrun: each question once over all processes, the same completions in the same order and the same figures."""
    flags = ["--ckpt", str(out / "sft"), f"two={out / 'sft'}", "--max_new_tokens", "5", "--questions", "9", "--paper"]
    run(monkeypatch, *flags, "--out", out / "one")
    program = str(Path(evaluation.__file__).resolve())
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program, *flags,
                           "--out", str(out / "both")], text=True, capture_output=True, timeout=120,
                          env=os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stderr
    one, both = out / "one", out / "both"
    for file in ("completions-sft.jsonl", "completions-two.jsonl", "report.md", "eval.html"):
        assert (one / file).read_bytes() == (both / file).read_bytes(), file
    assert len((both / "completions-two.jsonl").read_text().splitlines()) == 9
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, both)]
    for entry in (*results[0].values(), *results[1].values()):
        entry["knobs"].pop("out")
    assert results[0] == results[1] and interval(results[0]["two"]["difference"]["accuracy"]) == (0, 0, 0)


def test_a_completion_cannot_script_the_page(world, tmp_path):
    """Model output, questions, options and names are escaped; the page holds no markup but its own."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    records = [r | dict(question=evil + r["question"], options=[evil + o for o in r["options"]]) for r in world.records[:4]]
    texts = [evil, f"<think>{evil}</think><answer>A</answer>", f"<think>t</think><answer>{evil}</answer>", "{{ 7 * 7 }}"]
    rows = [answer | dict(ckpt=evil, path=record["path"], seed=0, cut_off=False, grounding=NAN, false_statements=[])
            for answer, record in zip(rewards.score(texts, records, make_judge()), records, strict=True)]
    page = page_of({evil: evaluation.summary(rows) | {"params": 1}}, {evil: rows}, evil)
    assert page.count("<script") == 1 and "<img src=x" not in page and page.count("<img ") == 4
    assert "&lt;script&gt;alert(1)" in page and "{{ 7 * 7 }}" in page
    assert page.count("alert(1)") == page.count("&lt;script&gt;alert(1)")


def test_the_page_keeps_two_files_of_the_same_ids_apart(world):
    """Two files may have the same ids: an image stands beside the answers to its own question alone."""
    one, two = world.records[0], world.records[0] | dict(path=world.mixed[1]["path"], question="Another?")
    rows = {}
    for name, record in (("a", one), ("b", two)):
        same = {key: record[key] for key in ("id", "path", "question")}
        rows[name] = [row("anomaly", "CT", 1, completion=f"by {name}", **same)]
    results = {name: evaluation.summary(answers) | {"params": 1} for name, answers in rows.items()}
    images = [evaluation.data_url(record, evaluation.THUMBNAIL, kind="JPEG") for record in (one, two)]
    sections = page_of(results, rows).split("<section")[1:]
    assert [[x in part for x in ("by a", one["question"], images[0])] for part in sections] == [[False] * 3, [True] * 3]
    assert [[x in part for x in ("by b", "Another?", images[1])] for part in sections] == [[True] * 3, [False] * 3]
    both = [answer | dict(ckpt=name) for name in "ab" for answer in rows[name]]
    page = page_of({"ab": evaluation.summary(both) | {"params": 1}}, {"ab": both})
    assert page.count("<img ") == 2
    assert [("by a" in part, "by b" in part) for part in page.split("<img ")[1:]] in ([(True, False), (False, True)],
                                                                                    [(False, True), (True, False)])


def test_one_question(out, world, monkeypatch, capsys):
    """--image, --question and --options print what each checkpoint says, and write nothing."""
    script(monkeypatch, world, ["<think>Grey tissue.</think><answer>B</answer>", "no idea"])
    before, image = sorted(os.listdir(out)), world.records[0]["path"]
    for _ in range(2):
        run(monkeypatch, "--ckpt", out / "sft", "--image", image, "--question", "Q?", "--options", "CT", "MRI")
    said = capsys.readouterr().out
    assert "<think>Grey tissue.</think><answer>B</answer>\n  read as: MRI" in said
    assert "no idea\n  read as: unreadable" in said
    assert sorted(os.listdir(out)) == before


# ------------------------------------------------------------------------------------------------------------------- bad input

def test_bad_input_is_one_sentence(out, world, tmp_path, monkeypatch, capsys):
    """Whatever is wrong with the command, its files or its checkpoint: exit code 2, one line, no traceback, no results."""
    BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "empty.jsonl").write_text("")
    record = {k: v for k, v in world.records[0].items() if k != "path"} | {"image": "gone.png", "split": "test"}
    (tmp_path / "gone.jsonl").write_text(json.dumps(record))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("[1, 2")
    (tmp_path / "a list").mkdir()
    (tmp_path / "a list" / "results.json").write_text("[]")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "knobs.json").write_text('{"thinking": "aloud"}')
    ok, picture = ["--ckpt", out / "sft"], world.records[0]["path"]
    cases = [
        (["--ckpt", out / "none"], "no such folder"),
        (["--ckpt", tmp_path / "bert"], "another architecture (bert)"),
        (["--ckpt", tmp_path / "nowhere" / "sft"], "is not there, expected the phantoms, or --data"),
        ([*ok, out / "sft"], "expected a checkpoint, or NAME=A,B,.., and each name once"),
        ([*ok, "--data", tmp_path / "empty.jsonl"], "holds no records"),
        ([*ok, "--data", tmp_path / "gone.jsonl"], "gone.png is missing"),
        ([*ok, "--split", "val", "--only", "modality=PET"], "no usable record of split 'val' with"),
        ([*ok, "--split", "tset"], "invalid choice: 'tset'"),
        ([*ok, "--seeds", 0, 1], "greedy answers are the same"),
        ([*ok, "--seeds", 1, 1, "--temperature", 1], "expected different ones"),
        ([*ok, "--temperature", -1], "--temperature -1.0: expected at least 0"),
        ([*ok, "--temperature", "nan"], "--temperature nan: expected at least 0"),
        ([*ok, "--batch", 0], "--batch 0: expected at least 1"),
        ([*ok, "--judge", "oracle"], "judge 'oracle' is unknown"),
        ([*ok, "--beam", 4], "unrecognized arguments"),
        ([*ok, "--matrix", "task"], "--matrix task: expected --ckpt NAME=A.., NAME one of anatomy, anomaly"),
        (["--ckpt", tmp_path / "odd"], "thinking 'aloud' is not known"),
        ([*ok, "--out", tmp_path / "broken"], "not a JSON object, expected what an earlier run left"),
        ([*ok, "--out", tmp_path / "a list"], "not a JSON object, expected what an earlier run left"),
        ([*ok, "--image", picture], "one question needs"),
        ([*ok, "--image", picture, "--question", "Q?", "--options", "MRI"], "expected a list of 2 to 6"),
        ([*ok, "--image", tmp_path / "no.png", "--question", "Q?", "--options", "MRI", "CT"], "is missing")]
    for argv, sentence in cases:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *argv)
        said = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and said[-1].startswith("error: ") and sentence in said[-1], (argv, said)
        assert "Traceback" not in "".join(said)
    assert not (out / "results.json").exists()


def test_every_number_has_a_minimum():
    """The least is taken, what lies below it and what is no number are refused by name."""
    numbers = {name for name, knob in evaluation.KNOBS.items() if "type" in knob}
    assert set(evaluation.LEAST) == numbers - {"seeds"}
    for name, least in evaluation.LEAST.items():
        assert getattr(evaluation.parse_args([f"--{name}", str(least)]), name) == least
        for bad in (str(least - 1), "many"):
            with pytest.raises(data.DataError, match=f"--{name}"):
                evaluation.parse_args([f"--{name}", bad])


def test_help_tells_every_knob(capsys):
    """--help names each knob with its default."""
    with pytest.raises(SystemExit):
        evaluation.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, knob in evaluation.KNOBS.items():
        meaning, default = knob["help"].split(":")[0].split(" [")[0], knob.get("default")
        value = default[0] if isinstance(default, list) and default else default
        assert f"--{name}" in said and meaning in said, name
        assert value in (None, []) or f"[{value}]" in said, name


def test_evaluating_leaves_the_policy_alone(world):
    """evaluate leaves the policy as it was, mode and weights (grpo.py calls it in the middle of training)."""
    world.net.train()
    before = {k: v.clone() for k, v in world.net.state_dict().items()}
    try:
        evaluation.evaluate(world.net, world.processor, world.mixed[:2], make_judge(), max_new_tokens=2)
        assert world.net.training
    finally:
        world.net.eval()
    assert all(torch.equal(v, before[k]) for k, v in world.net.state_dict().items())
