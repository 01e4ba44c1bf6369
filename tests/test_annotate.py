"""judge.py annotate: forty phantoms' thoughts written by a test server, bad ones of each kind caught, a person's page."""
import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from test_judges import WAITS, Server

import data
import judge as J
from data import DataError

# What a bad writer makes of a phantom's thought {t} with answer {a}, and the words by which it must be rejected.
BAD = {
    "premature": ("So it is {a}. {t0} So it is {a}.", "before its last sentence"),
    "letter": ("Option {l} fits. {t0} So it is {a}.", "before its last sentence"),
    "one step": ("So it is {a}.", "fewer than two steps"),
    "another": ("{t0} So it is {o}.", "does not lead to the answer"),
    "modality": ("{t0} The image is {m}. So it is {a}.", "but the modality is"),
    "region": ("{t0} It shows the {r}. So it is {a}.", "but the anatomy is"),
    "finding": ("{t0} There is a {f}. So it is {a}.", "finding|pathology"),
    "tags": ("{t0} <answer>{l}</answer> So it is {a}.", "tags"),
}


def forty(world):
    """40 questions of the phantoms, of all tasks, and what is true of each image."""
    records, known = world.records[:40], {}
    for r in records:
        known.setdefault(r["image"], dict(modality=r["modality"], anatomy=r["anatomy"]))[r["task"]] = gold(r)
    return records, known


def gold(r):
    return r["options"]["ABCDEF".index(r["answer"])]


def spoiled(kind, r, known):
    """A bad thought of this kind for a record, or None where this kind can't be told from its record."""
    true = known[r["image"]]
    kinds = {x for names in data.KINDS.values() for x in names}
    if kind == "finding" and "pathology" not in true and true.get("anomaly") != "Normal":
        return None

    def other(names, x):
        return next(n for n in sorted(names) if n != x and {n, x} not in data.ALIKE and n not in r["options"])
    return BAD[kind][0].format(
        t0=r["thought"].rpartition(". ")[0] + ".", a=gold(r), l=r["answer"], o=r["options"]["ABCDEF".index(r["answer"]) - 1],
        m=other(data.MODALITIES, r["modality"]), r=other(data.ANATOMIES, r["anatomy"]), f=other(kinds, true.get("pathology")))


class Annotators(Server):
    """Describer and writer. bad: {record id: (kind of bad thought, how many attempts are bad)}."""

    def __init__(self, records, known, bad=()):
        self.known, self.bad, self.told, self.lock = known, dict(bad), Counter(), threading.Lock()
        self.images = {J.data_url(r, J.SIDE): r["image"] for r in records}
        self.asked = {(r["image"], r["question"], *r["options"]): r for r in records}
        super().__init__(reply=self.said, fault=lambda prompt, n: None)

    def said(self, content):
        url, text = content[0]["image_url"]["url"], content[1]["text"]
        image = self.images[url]
        with self.lock:
            if text == J.DESCRIBE:
                self.told["described", image] += 1
                return f"Picture {image} <|im_end|>"
            options = re.findall(r"^[A-F]\) (.*)$", text, re.M)
            r = self.asked[(image, re.search(r"Question: (.*)", text)[1], *options)]
            assert f"Picture {image} < |im_end|>" in text and f"The right answer is {gold(r)}." in text
            n = self.told["written", r["id"]] = self.told["written", r["id"]] + 1
            kind, attempts = self.bad.get(r["id"], (None, 0))
            assert ("Your last attempt was rejected" in text) == (n > 1)
            assert n == 1 or re.search(BAD[kind][1], text.split("rejected, because it ")[1].split("It was:")[0])
            return spoiled(kind, r, self.known) if n <= attempts else r["thought"]


@pytest.fixture
def box(world, tmp_path, monkeypatch):
    """A folder with the forty questions (thoughts taken out, all to train on) and their images; short waits between tries."""
    monkeypatch.setattr(J, "WAITS", WAITS)
    shutil.copytree(Path(world.jsonl).parent / "images", tmp_path / "images")
    data.write_records([r | dict(thought=None, split="train") for r in forty(world)[0]], tmp_path / "in.jsonl")
    return tmp_path


def annotate(box, server, *flags, out="cot.jsonl"):
    spec = ("--describer", server.spec, "--writer", server.spec) if server else ()
    J.main(["annotate", str(box / "in.jsonl") if server else str(box / "cot.jsonl"), "--out", str(box / out), *spec, *flags])
    return [json.loads(line) for line in (box / out).read_text().splitlines()]


def test_every_kind_of_bad_thought_is_caught_and_no_good_one(world):
    """Rule by rule, on all forty records: the spoiled thought is rejected with its own reason, the gold thought is not."""
    records, known = forty(world)
    judge, told = J.make_judge(), Counter()
    for r in records:
        verdict, = judge([r["thought"]], [r])
        assert J.faults(r["thought"], r, known[r["image"]], verdict) == []
        for kind, (_, reason) in BAD.items():
            if thought := spoiled(kind, r, known):
                wrong = J.faults(thought, r, known[r["image"]], *judge([thought], [r]))
                assert any(re.search(reason, x) for x in wrong), (kind, thought, wrong)
                told[kind] += 1
    assert len(told) == len(BAD) and min(told.values()) >= 10


def test_an_option_that_is_not_true_is_a_hallucination(world):
    """Findings of real sources, which no list here holds: the record's other options are false, unless denied."""
    r = dict(world.records[0], options=["COVID-19", "bacterial pneumonia", "C."], answer="A", task="pathology", modality="CT")
    known = dict(modality="CT", anatomy="unknown", pathology="COVID-19")
    for thought, wrong in (("Haze on both sides, no bacterial pneumonia. So it is COVID-19.", []),
                           ("There is bacterial pneumonia. So it is COVID-19.",
                            ["names bacterial pneumonia, but the pathology is COVID-19"])):
        assert J.faults(thought, r, known, "A") == wrong


@pytest.mark.parametrize("unit", ["cyst because ", "so cyst. ", "answer is ", "B) ", "\n", "no "])
def test_rules_are_linear_in_the_thought(unit, world):
    """Eight times the text takes about eight times as long, whatever a writer's server sends."""
    r = dict(world.records[0], options=["cyst", "glioma"], answer="A", task="pathology")

    def seconds(n):
        began = time.process_time()
        J.faults(unit * (n // len(unit)), r, dict(modality="MRI", anatomy="Brain", pathology="cyst"), "A")
        return time.process_time() - began
    short, long = (min(seconds(n) for _ in range(3)) for n in (4_000, 32_000))
    assert long < 30 * short + 0.02


def test_an_empty_description_is_none(world):
    """The writer is not asked."""
    r = world.records[0]
    assert J.write_thought(r, {r["image"]: ""}, None, None, None) == ("", ["got no description"])


def test_good_words_are_not_taken_for_bad(world):
    """A denial, a hint on the way and a conclusion in the last sentence's usual words pass."""
    r = dict(world.records[0], question="What is the kind of lesion?", options=["cyst", "glioma", "abscess", "plaques"],
             answer="A", task="pathology", modality="MRI", anatomy="Brain")
    known = dict(modality="MRI", anatomy="Brain", pathology="cyst", location="Left Upper")
    for thought in ("A dark disc is seen, which fits a cyst. There is no thick rim, so an abscess is unlikely. "
                    "So the correct answer is cyst.",
                    "This is an MRI of the Brain. An empty disc lies in the Left Upper. Therefore the finding is cyst.",
                    "An empty disc is seen; it is not a glioma. I choose cyst as the answer.",
                    "An empty disc is seen, without a thick rim, abscess or plaques. So the finding is cyst.",
                    "Unlike a glioma, the disc is empty and sharp. It is darker than plaques would be. So the finding is cyst.",
                    "The image, not a CT, shows a dark disc. This is a cyst."):
        assert J.faults(thought, r, known, *J.make_judge()([thought], [r])) == [], thought


def test_what_lies_beside_a_lesion_or_was_told(world):
    """Skin is seen beside a breast, not beside a brain. A thought may not speak of the description, nor of a given answer."""
    r = dict(world.records[0], options=["Normal", "Abnormal"], answer="B", task="anomaly", modality="Ultrasound")

    def wrong(thought, anatomy="Breast"):
        return J.faults(thought, r, dict(modality="Ultrasound", anatomy=anatomy), "B")
    assert wrong("Below the Skin lies a dark disc. So the image is Abnormal.") == []
    assert wrong("Below the Skin lies a dark disc. So the image is Abnormal.", "Brain") == ["names Skin, but the anatomy is Brain"]
    for told in ("The description names a dark disc.", "As the question states, it is ill.", "Since the answer is given, look."):
        assert wrong(f"{told} So the image is Abnormal.") == ["speaks of what it was told"]


def test_a_thought_that_was_cut_off_is_not_accepted(world):
    """However well what there is of it would do."""
    r = world.records[0]
    writer = SimpleNamespace(ask=lambda *_: (r["thought"], True))
    assert J.write_thought(r, {r["image"]: "dark"}, {}, writer, J.make_judge())[1] == ["was cut off at max_tokens"]


def test_forty_phantoms_through_the_server(world, box, capsys):
    """Bad writers of each kind: those who mend their ways are accepted after a retry, the stubborn are left out and counted;
    each image is described once; the spending is told; a second run asks nothing and keeps the first one's file."""
    records, known = forty(world)
    ids, kinds = iter(records), list(BAD)
    bad = {}
    for n, kind in enumerate(kinds):
        r = next(r for r in ids if spoiled(kind, r, known))
        bad[r["id"]] = (kind, 1 if n % 2 else 9)
    server = Annotators(records, known, bad)
    made = annotate(box, server)
    stubborn = {k for k, (_, n) in bad.items() if n == 9}
    assert [r["id"] for r in made] == [r["id"] for r in records if r["id"] not in stubborn]
    assert all(r["thought"] == g["thought"] for r in made for g in records if g["id"] == r["id"])
    said = capsys.readouterr().out
    assert "40 questions: 36 thoughts accepted, 4 left out" in said
    assert {server.told["described", r["image"]] for r in records} == {1}
    # a stubborn one's third prompt is its second (temperature 0): it is not asked again
    assert all(server.told["written", r["id"]] == (2 if r["id"] in bad else 1) for r in records)
    assert f"writer: {40 + len(BAD)} calls; failures: none" in said
    n, first = len(server.calls), (box / "cot.jsonl").read_text()
    assert annotate(box, server) == made and len(server.calls) == n
    assert (box / "cot.jsonl.1").read_text() == first
    data.read_records(box / "cot.jsonl")  # images are where the file says


def test_thoughts_that_are_there_stay_and_test_questions_are_not_asked(world, box, capsys):
    """Of ten questions three have a thought that no rule would accept, and two are held out: five are asked about, the three
    come out as they were. A picture that is missing is told before the server is asked."""
    records, known = forty(world)
    rows = [r | dict(thought="As I see it." if k < 3 else None, split="test" if k > 7 else "train") for k, r in enumerate(records[:10])]
    data.write_records(rows, box / "in.jsonl")
    server = Annotators(records, known)
    made = annotate(box, server)
    assert [r["thought"] for r in made] == ["As I see it."] * 3 + [r["thought"] for r in records[3:8]]
    assert {x for kind, x in server.told if kind == "written"} == {r["id"] for r in records[3:8]}
    said = capsys.readouterr().out
    assert "5 questions: 5 thoughts accepted, 0 left out" in said
    assert "3 had a thought, which stays; 2 of val and test were not asked about and are left out" in said
    n = len(server.calls)
    (box / rows[7]["image"]).unlink()
    with pytest.raises(DataError, match="is missing"):
        annotate(box, server, out="other.jsonl")
    data.write_records(rows[:3], box / "in.jsonl")
    with pytest.raises(DataError, match="no question of split train lacks a thought"):
        annotate(box, server, out="other.jsonl")
    assert len(server.calls) == n


def test_several_findings_of_one_image(world, box):
    """Each thought is held against its own question's answer, not against that of another question of the task; where an image
    is normal, "No" is no lesion."""
    asked = (("Effusion?", "Yes"), ("Fracture?", "No"), ("Nodule?", "No"), ("Oedema?", "Yes"))
    rows = [dict(world.records[0], id=q, task="pathology", question=q, options=["Yes", "No"], answer="AB"[a == "No"], thought=None,
                 split="train") for q, a in asked]
    thoughts = {q: f"The image is grey. {'A' if a == 'Yes' else 'No'} {q[:-1].lower()} is seen. So it is {a}." for q, a in asked}
    assert "nodule" in data.KINDS["Thyroid"] + data.KINDS["Lung"]
    data.write_records(rows, box / "in.jsonl")
    with Server(reply=lambda content: thoughts.get(re.search(r"Question: (.*)|$", content[1]["text"])[1], "A picture."),
                fault=lambda prompt, n: None) as server:
        assert [r["id"] for r in annotate(box, server)] == [q for q, _ in asked]
    assert J.faults(thoughts["Nodule?"], rows[2], dict(anomaly="Normal"), "B") == []
    named = dict(rows[0], id="Which?", question="Which finding?", options=["nodule", "cyst", "mass"], answer="A")
    thoughts |= {"Which finding?": "A round spot, a nodule, is seen. So it is nodule.",
                 "Bulla?": "A thin black space, a bulla, is seen. So it is Yes."}
    data.write_records([named, dict(rows[0], id="Bulla?", question="Bulla?")], box / "in.jsonl")
    with Server(reply=lambda content: thoughts.get(re.search(r"Question: (.*)|$", content[1]["text"])[1], "A picture."),
                fault=lambda prompt, n: None) as server:
        assert [r["id"] for r in annotate(box, server, out="both.jsonl")] == ["Which?", "Bulla?"]
    r = dict(rows[0], task="modality", options=["CT scan", "MRI scan"], answer="A", modality="CT")
    wrong = J.faults("The bone is bright as in MRI images. So it is CT scan.", r, dict(modality="CT", anatomy="Brain"), "A")
    assert wrong == ["names MRI, but the modality is CT"]
    r, normal = dict(rows[0], options=["No lesion", "Nodule"], answer="A"), dict(anomaly="Normal")
    assert J.faults("The lung is clear. So the image shows No lesion.", r, normal, "A") == []
    wrong = J.faults("There is a mass in the lung. So the image shows No lesion.", r, normal, "A")
    assert wrong == ["names mass, but the pathology is none"]


def test_a_killed_annotation_goes_on(world, box, monkeypatch):
    """Killed while F is asked, with a torn last line: what was described and written is not asked
    for again; where the server or F failed, the next run goes on."""
    records, known = forty(world)
    monkeypatch.setattr(J, "WAITS", WAITS[:1])
    server, make, thoughts = Annotators(records, known), J.make_judge, []

    def dying(*args, **kwargs):
        def f(asked, items):
            thoughts.extend(asked)
            if len(thoughts) > 20:
                raise KeyError("killed")
            return [math.nan] * len(asked)
        f.usage = make(*args, **kwargs).usage
        return f
    broken = {r["question"] for r in records[-3:]}
    server.fault = lambda content, n: "500" if any(f"Question: {q}\n" in content[1]["text"] for q in broken) else None
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(J, "make_judge", dying)
        annotate(box, server)
    whole = sum(r["question"] not in broken for r in records)
    while len(thoughts) < whole:  # the threads of a process that is killed would be gone
        time.sleep(0.01)
    with open(box / "cot.jsonl.replies", "a") as f:
        f.write('\n["tried", "ph')
    assert 30 <= whole <= 37 and not (box / "cot.jsonl").exists()
    assert len(annotate(box, server)) == whole
    server.fault = lambda content, n: None
    assert len(annotate(box, server)) == 40
    assert set(server.told.values()) == {1}  # each image described once, each thought written once


def test_a_dead_f_ends_the_annotation(world, box, monkeypatch):
    """It is asked anew for each thought, each time until its limits: without an end thousands of thoughts take hours to fail."""
    server, make = Annotators(*forty(world)), J.make_judge

    def dead(*args, **kwargs):
        def f(asked, items):
            return [math.nan] * len(asked)
        f.usage = ["TimeoutError"]
        return f
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"32 thoughts in a row .*F: TimeoutError \(1 times\)"):
        patch.setattr(J, "make_judge", dead)
        annotate(box, server)
    assert J.make_judge is make and len(annotate(box, server)) == 40
    assert set(server.told.values()) == {1}  # what had come was kept


def test_decisions_are_applied_to_the_thoughts_that_were_read(world, box, capsys):
    """Accepted stay, rejected and undecided go, a decision on another wording of the thought counts as none."""
    records, known = forty(world)
    made = annotate(box, Annotators(records, known))
    said = {J.key_of(r["id"], r["thought"] + "!" * (k == 2)): k != 1 for k, r in enumerate(made[:5])}
    (box / "decisions.json").write_text(json.dumps(said))
    kept = annotate(box, None, "--decisions", str(box / "decisions.json"), "--review", str(box / "again.html"), out="verified.jsonl")
    assert [r["id"] for r in kept] == [made[k]["id"] for k in (0, 3, 4)] and (box / "again.html").exists()
    assert "40 thoughts: 3 accepted, 1 rejected, 36 not decided" in capsys.readouterr().out
    listed = json.dumps(dict.fromkeys(said, []))
    for broken in ("", "[1]", "{}x", "null", '[{"thought": []}]', listed, "[" * 200_000):
        (box / "decisions.json").write_text(broken)
        with pytest.raises(DataError, match="decisions"):
            annotate(box, None, "--decisions", str(box / "decisions.json"), out="verified.jsonl")


EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&"


def test_the_page_escapes_what_models_say(world):
    """Thoughts, descriptions, questions and ids are text on the page, and it loads nothing from elsewhere."""
    r = world.records[0] | dict(thought=EVIL, id=EVIL, question=EVIL, options=[EVIL, "b"], modality=EVIL)
    page = J.PAGE.render(records=[r], described={r["image"]: EVIL}, image_of=J.data_url, key_of=J.key_of,
                         options_text=J.options_text)
    assert page.count("<script") == 1 and page.count("<img") == 1 and "onerror=alert(1)>" not in page
    assert not re.search(r"""(?:src|href)="(?!data:)|url\(|@import""", page)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_a_person_clicks_through_the_page(world, box):
    """In headless Chromium: two accepted, one rejected, one of them changed; what the link saves is applied by --decisions."""
    records, known = forty(world)
    made = annotate(box, Annotators(records, known), "--review", str(box / "page.html"))
    clicks = """<script>const b = document.querySelectorAll("button"); for (const k of [0, 3, 5, 4]) b[k].click();
    document.title = document.querySelector("a").textContent;</script>"""
    (box / "clicked.html").write_text((box / "page.html").read_text() + clicks)
    dom = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={box}/chrome",
                          "--dump-dom", (box / "clicked.html").as_uri()], capture_output=True, text=True, timeout=60).stdout
    assert "<title>Save 3 decisions</title>" in dom and dom.count('class="accept"') == 2 and dom.count('class="reject"') == 1
    href = re.search(r'download="decisions.json" href="data:application/json,([^"]*)"', dom)[1]
    (box / "decisions.json").write_text(unquote(href))
    kept = annotate(box, None, "--decisions", str(box / "decisions.json"), out="verified.jsonl")
    assert [r["id"] for r in kept] == [made[0]["id"], made[2]["id"]]


@pytest.mark.parametrize("flags, told", [
    (["--describer", "hf:x"], "--writer"), ([], "--decisions"),
    (["--describer", "lexical", "--writer", "lexical"], "no chat server"),
    (["--describer", "hf:x", "--writer", "hf:x"], "expected openai:BASE_URL#MODEL"),
    (["--describer", "openai:http://me:secret@h#m", "--writer", "hf:x"], "OPENAI_API_KEY"), (["--concurrency", "0"], "--concurrency"),
    (["--decisions", "/no/where"], "/no/where"), (["--nonsense"], "nonsense"), (["--out", "/tmp/elsewhere.jsonl"], "folder"),
    (["--review", "out.jsonl", "--out", "out.jsonl"], "--review")])
def test_bad_commands_are_one_sentence(flags, told, box):
    """Said before anything is written."""
    before = sorted(box.rglob("*"))
    with pytest.raises(DataError, match=re.escape(told)) as error:
        J.main(["annotate", str(box / "in.jsonl"), "--out", str(box / "out.jsonl"), *flags])
    assert "\n" not in str(error.value) and "secret" not in str(error.value) and sorted(box.rglob("*")) == before
