"""data.py: bad input gets one sentence, files survive a round trip, phantoms are what their records say."""
import base64
import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import rewards  # noqa: E402

MED_R1 = ROOT.parent / "shared" / "data" / "med_r1"


def record(**changes):
    good = {"id": "x1", "image": "images/a.png", "modality": "CT", "anatomy": "Lung", "task": "modality", "source": "test",
            "question": "What is it?", "options": ["MRI", "CT", "OCT", "X-ray"], "answer": "B", "thought": None, "group": "p1",
            "split": "train"}
    return {**good, **changes}


def write(folder, *lines, name="q.jsonl"):
    file = folder / name
    file.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return file


def image_of(folder, name="a.png"):
    return {"id": "x1", "path": str(folder / name)}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    file = data.make_phantoms(tmp_path_factory.mktemp("p") / "phantoms", seed=3, n_images=260)
    return file, data.read_records(file)


# ---- records ----------------------------------------------------------------------------------------------------------------
BAD = {  # what line 2 holds -> what the sentence must say
    "broken json": ('{"id": "x2", ', "broken JSON"),
    "not an object": ("[1, 2]", "expected a JSON object"),
    "a number": ("7", "expected a JSON object"),
    "deep nesting": ("[" * 100_000, ""),
    "missing key": ({k: v for k, v in record().items() if k != "question"}, "key 'question' is missing"),
    "wrong type of id": (record(id=5), "'id' is 5, expected a non-empty string"),
    "empty question": (record(question="  "), "'question'"),
    "wrong type of thought": (record(thought=["a"]), "'thought'"),
    "options no list": (record(options="MRI"), "'options'"),
    "option no text": (record(options=["MRI", 3]), "'options'"),
    "one option": (record(options=["MRI"], answer="A"), "'options' is ['MRI'], expected a list of 2 to 6"),
    "seven options": (record(options=list("abcdefg")), "'options'"),
    "duplicate options": (record(options=["MRI", "CT", "mri "]), "no two the same"),
    "answer beyond": (record(answer="E"), "'answer' is 'E', expected one of A, B, C, D"),
    "answer is text": (record(answer="CT"), "'answer' is 'CT'"),
    "answer is a run of letters": (record(answer="AB"), "'answer' is 'AB'"),
    "answer is null": (record(answer=None), "'answer' is None"),
    "no task": (record(task=" "), "'task' is ' ', expected a non-empty string"),
    "nearly a task": (record(task="Anomaly"), "'task' is 'Anomaly', expected 'anomaly'"),
    "unknown split": (record(split="dev"), "'split' is 'dev', expected one of train, val, test"),
    "shows is a text": (record(shows="a cyst"), "'shows' is 'a cyst', expected texts or null for modality"),
    "shows lacks a key": (record(shows={"modality": "CT"}), "'shows' is {'modality': 'CT'}"),
    "shows an unknown style": (record(shows=dict.fromkeys(data.SHOWS, "cyst")), "the style one of solid, cystic"),
    "tag in the thought": (record(id="x2", thought="so </think> it is"), "'thought' holds </think>, expected none of the tags"),
    "same id": (record(), "id 'x1' was already used in"),
    "surrogate in path": (json.dumps(record(id="x2", image="\ud800.png")), ""),
    "null byte in path": (record(id="x2", image="a\0.png"), ""),
    **{f"path {p}": (record(id="x2", image=p), "leaves the data folder") for p in (
        "../a.png", "images/../../a.png", "/etc/passwd", "images\\..\\..\\a.png", "C:\\a.png", "~/a.png", "..",
        "\\\\host\\a.png")},
}


@pytest.mark.parametrize("line, sentence", BAD.values(), ids=BAD)
def test_bad_line(tmp_path, line, sentence):
    """Every malformed record is refused in one sentence that names file and line, never skipped and never a traceback."""
    file = write(tmp_path, record(), line)
    with pytest.raises(data.DataError) as e:
        data.read_records(file)
    assert f"{file}, line 2: " in str(e.value) and sentence in str(e.value) and "\n" not in str(e.value)


def test_bad_lines_are_counted(tmp_path):
    """The first is told, and how many more there are, so that they need not be mended one at a time."""
    file = write(tmp_path, record(answer="Z"), record(id="x2"), record(id="x3", split="all"), "{")
    with pytest.raises(data.DataError, match=r"line 1: 'answer' is 'Z'.*; 3 lines can't be used$"):
        data.read_records(file)


def test_bad_file(tmp_path):
    """Missing, empty and binary files, a folder and an absent split are told by name."""
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.jsonl").mkdir()
    cases = {tmp_path / "no.jsonl": "No such file", write(tmp_path, name="e.jsonl"): "holds no records",
             write(tmp_path, " ", "", name="s.jsonl"): "holds no records", tmp_path / "b.jsonl": "UTF-8",
             tmp_path / "d.jsonl": "directory",
             write(tmp_path, "{}", name="o.json"): "holds no records", write(tmp_path, "[", name="b.json"): "b.json"}
    for file, sentence in cases.items():
        with pytest.raises(data.DataError, match=sentence) as e:
            data.read_records(file)
        assert str(file) in str(e.value)
    with pytest.raises(data.DataError, match="no usable record of split 'test'"):
        data.read_records(write(tmp_path, record()), split="test")


def test_link_out_of_the_folder(tmp_path):
    """A link inside the data folder must not open files outside it; a link that stays inside is fine."""
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    os.symlink(tmp_path / "secret.png", tmp_path / "in" / "images" / "a.png")
    os.symlink(tmp_path / "in" / "images", tmp_path / "in" / "same")
    with pytest.raises(data.DataError, match="images/a.png. leaves the data folder, .* through a link"):
        data.read_records(write(tmp_path / "in", record()))
    assert data.read_records(write(tmp_path / "in", record(image="same/b.png")))[0]["path"].endswith("in/images/b.png")


def test_neighbour_folder_is_outside(tmp_path):
    """/data-private is not inside /data: the check compares folders, not prefixes."""
    for name in ("data", "data-private"):
        (tmp_path / name).mkdir()
    os.symlink(tmp_path / "data-private", tmp_path / "data" / "link")
    with pytest.raises(data.DataError, match="leaves the data folder"):
        data.read_records(write(tmp_path / "data", record(image="link/a.png")))


def test_round_trip(tmp_path):
    """What is written is read back the same, "path" apart, with umlauts and line breaks; nothing else is left in the folder."""
    other = record(id="x2", question="Größe?\nWo, \u2028?", options=["a", "b"], answer="A", thought="So.", split="test")
    records = [record(), other]
    file = tmp_path / "new" / "q.jsonl"
    data.write_records([{**r, "path": "/elsewhere"} for r in records], file)
    back = data.read_records([str(file)])
    assert [{k: v for k, v in r.items() if k != "path"} for r in back] == records
    assert back[0]["path"] == os.path.realpath(tmp_path / "new" / "images" / "a.png")
    assert [r["id"] for r in data.read_records(file, split="test")] == ["x2"] and os.listdir(tmp_path / "new") == ["q.jsonl"]


def test_failed_write_keeps_the_old_file(tmp_path):
    """A write that fails half way leaves the old file whole and no rest behind."""
    file = write(tmp_path, record())
    with pytest.raises(TypeError):
        data.write_records([record(), record(options={1, 2})], file)
    assert len(data.read_records(file)) == 1 and os.listdir(tmp_path) == ["q.jsonl"]


def test_texts():
    """The prompt is question, lettered options, instruction; the target is Eq. (1)'s; a record without a thought has none."""
    options = "A) MRI\nB) CT\nC) OCT\nD) X-ray\n"
    assert rewards.question_text(record()) == f"What is it?\n{options}{rewards.INSTRUCTIONS['before']}"
    assert rewards.answer_text(record(thought="So CT.")) == "<think>So CT.</think><answer>B</answer>"
    with pytest.raises(data.DataError, match="'x1' has no thought"):
        rewards.answer_text(record())


# ---- images -----------------------------------------------------------------------------------------------------------------
def test_bad_images(tmp_path):
    """Missing, not an image, a folder, truncated (PNG and JPEG), damaged: one sentence with the record and the file."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("t.png", "t.jpg"):
        noise.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:len(whole) // 2])
    noise.save(tmp_path / "d.png")
    whole = bytearray((tmp_path / "d.png").read_bytes())
    whole[45:60] = b"\xff" * 15
    (tmp_path / "d.png").write_bytes(whole)
    (tmp_path / "n.png").write_text("hello")
    (tmp_path / "e.png").write_bytes(b"")
    (tmp_path / "f.png").mkdir()
    for name, why in {"no.png": "is missing", "n.png": "is not an image", "e.png": "is not an image", "f.png": "broken",
                      "t.png": "truncated", "t.jpg": "truncated", "d.png": "broken"}.items():
        with pytest.raises(data.DataError, match=why) as e:
            data.load_image(image_of(tmp_path, name))
        assert "record 'x1'" in str(e.value) and name in str(e.value)


@pytest.mark.parametrize("w, h", [(0, 5), (5, 0), (8193, 8192), (31623, 31623), (100_000, 100_000)])
def test_too_few_or_many_pixels(tmp_path, w, h, recwarn):
    """An image of 0, 2^26 + 8192, 10^9 or 10^10 pixels is refused from its header (the file holds no more), with no warning."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(data.DataError, match="'x1'.*has more than 67108864 pixels" if w * h else "'x1'.*has no pixels"):
        data.load_image(image_of(tmp_path))
    assert not recwarn.list


def test_every_kind_of_image_becomes_rgb(tmp_path):
    """16-bit, grey, palette, transparent and CMYK images come out as 8-bit RGB of the same content."""
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))  # (8, 64)
    grey = Image.fromarray(ramp)
    grey.save(tmp_path / "L.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "I16.png")
    Image.fromarray(ramp.astype(np.uint16) * 16).save(tmp_path / "I12.tif")  # 12 bits used, as scanners do
    Image.fromarray(ramp.astype(np.float32) / 252).save(tmp_path / "F.tif")
    Image.merge("RGBA", [grey] * 3 + [Image.new("L", grey.size, 128)]).save(tmp_path / "RGBA.png")
    grey.convert("P").save(tmp_path / "P.png", transparency=3)
    grey.convert("LA").save(tmp_path / "LA.png")
    Image.merge("RGB", [grey] * 3).convert("CMYK").save(tmp_path / "CMYK.tif")
    grey.point(lambda x: 255 * (x > 127)).convert("1").save(tmp_path / "1.png")
    for name in sorted(os.listdir(tmp_path)):
        image = data.load_image(image_of(tmp_path, name))
        assert image.mode == "RGB" and image.size == (64, 8), name
        want = ramp if name != "1.png" else 255 * (ramp > 127)
        if name in ("I16.png", "I12.tif", "F.tif"):
            want = ramp.astype(float) / 252 * 255  # stretched to the full range
        assert np.abs(np.asarray(image).astype(float) - np.asarray(want, dtype=float)[..., None]).max() <= 2, name


def test_upright(tmp_path):
    """A photograph turned by its EXIF tag is turned back: the red corner lies top left again."""
    a = np.zeros((20, 40, 3), np.uint8)
    a[:8, :8] = 255, 0, 0
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(a).rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    image = data.load_image(image_of(tmp_path))
    assert image.size == (40, 20) and image.getpixel((2, 2)) == (255, 0, 0)
    grey = Image.fromarray(a[..., 0]).rotate(90, expand=True)
    grey.save(tmp_path / "a.tif", exif=exif)  # not compressed: Pillow, given a name, maps such a file and turns it wrong
    assert (np.asarray(data.open_image(tmp_path / "a.tif")) == a[..., 0]).all()


def test_a_marker_does_not_darken_a_16_bit_image(tmp_path):
    """12 bits of greys keep their contrast beside a few pixels at 65535 and a dead one; two values alone become black and white."""
    greys = np.random.default_rng(0).integers(0, 4096, (200, 300)).astype(np.uint16)
    plain = data.eight_bits(greys).astype(int)
    greys[:2, :50], greys[0, 60] = 65535, 0
    Image.fromarray(greys).save(tmp_path / "a.png")
    marked = np.asarray(data.open_image(tmp_path / "a.png")).astype(int)
    assert abs(marked - plain)[2:].max() <= 3 and abs(plain - greys / 4095 * 255)[2:].max() <= 4
    few = np.zeros((100, 100), np.uint16)
    few[50, 50] = 700
    assert data.eight_bits(few).max() == 255 and data.eight_bits(few).sum() == 255
    for most in (25, 29, 53, 4095):
        assert data.eight_bits(np.array([[0, most]])).tolist() == [[0, 255]]
    assert not data.eight_bits(np.full((3, 3), 7.0)).any()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_what_else_a_file_holds_is_not_passed_on(kind, tmp_path):
    """Comments, texts and EXIF may name a patient: neither a page nor a server gets them."""
    exif, text = Image.Exif(), PngInfo()
    exif[270] = "MUSTERMANN"
    text.add_text("Patient", "MUSTERMANN")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.jpg", comment=b"MUSTERMANN", exif=exif)
    picture.save(tmp_path / "a.png", pnginfo=text, exif=exif)
    for name in ("a.jpg", "a.png"):
        assert b"MUSTERMANN" in (tmp_path / name).read_bytes()
        url = data.data_url(image_of(tmp_path, name), kind=kind)
        assert b"MUSTERMANN" not in base64.b64decode(url.partition(",")[2])


# ---- Med-R1 -----------------------------------------------------------------------------------------------------------------
def med_r1(folder, *problems, name="ct_test.json"):
    good = {"image": "Images/a b.png", "solution": "<answer> B </answer>"}
    return write(folder, json.dumps([{**good, "problem": p} if isinstance(p, str) else p for p in problems]), name=name)


def test_med_r1_forms(tmp_path, capsys):
    """2 to 4 options, commas and brackets in them; "(H&E)" and an early "vitamin D)" are no markers; spaces are free."""
    cases = {"Which? A)Yes, B)No": ["Yes", "No"], "Which one? A) a, b and c, B) d (e), C) f": ["a, b and c", "d (e)", "f"],
             "Which?A)H&E (H&E) stain,B)CT (CT),C)EEG (EEG),D)x.": ["H&E (H&E) stain", "CT (CT)", "EEG (EEG)", "x."],
             "Is it? A)no vitamin D) here, B)so": ["no vitamin D) here", "so"],
             "Is it?\nA) low (C) level\nB) high": ["low (C) level", "high"]}
    file = med_r1(tmp_path, *cases)
    records = data.read_records(file)
    assert [r["options"] for r in records] == list(cases.values())
    assert all(r["answer"] == "B" and r["modality"] == "CT" and r["split"] == "test" and r["thought"] is None for r in records)
    assert records[0]["question"] == "Which?" and records[0]["path"] == str(tmp_path.resolve() / "Images" / "a b.png")
    assert capsys.readouterr().err == ""


def test_med_r1_left_out_are_told(tmp_path, capsys):
    """Bad questions don't stop the others: they are counted on stderr, the first with its reason; none left is an error."""
    good, bad = "Q? A)x, B)y", {"image": "a.png", "problem": "Q? A)x, B)y", "solution": "B"}
    file = med_r1(tmp_path, good, "no options", "Q? A)x", "Q? A)x, B)X", bad, 5, {**bad, "image": "../a"}, {"image": "a"},
                  {**bad, "solution": "<answer> C </answer>"}, {**bad, "image": "/x.png", "solution": "<answer>A</answer>"})
    assert len(data.read_records(file)) == 1
    told = capsys.readouterr().err
    assert "9 of 10 questions can't be used, as question 2: 'options' is []" in told and told.count("\n") == 1
    with pytest.raises(data.DataError, match="no usable record"):
        data.read_records(med_r1(tmp_path, "no options"))


def test_med_r1_unknown(tmp_path):
    """What neither the file's name nor the image's path tells is "unknown": nothing is guessed from the question's words."""
    for name, task, modality in (("CT_test.json", "unknown", "CT"), ("Lesion Grading_test.json", "lesion grading", "unknown")):
        (r,) = data.read_records(med_r1(tmp_path, "Is the organ in this CT benign? A)x, B)y", name=name))
        assert (r["task"], r["modality"]) == (task, modality)


PUBLISHED = {"CT(Computed Tomography)": "CT", "Dermoscopy": "Dermoscopy", "Fundus Photography": "Fundus", "ultrasound": "Ultrasound",
             "Infrared Reflectance Imaging": "Infrared Reflectance Imaging", "MR (Mag-netic Resonance Imaging)": "MRI",
             "Microscopy Images": "Microscopy", "OCT (Optical Coherence Tomography": "OCT", "X-Ray": "X-ray"}
TYPES = ("Anatomy Identification", "Disease Diagnosis", "Lesion Grading", "Modality Recognition", "Other Biological Attributes")


@pytest.mark.parametrize("split", ["train", "test"])
def test_med_r1_names(tmp_path, split):
    """As published: the file's name tells modality or question type, whatever the question's words; images start at the root."""
    for kind, names in (("modality", PUBLISHED), ("question_type", TYPES)):
        (tmp_path / "Splits" / kind / split).mkdir(parents=True)
        for name in names:
            file = med_r1(tmp_path / "Splits" / kind / split, "Is this cell of the organ in this CT benign? A)x, B)y",
                          name=f"{name}_{split}.json")
            (r,) = data.read_records(file, split, [f"modality={PUBLISHED.get(name, 'unknown')}"])
            assert r["path"] == str(tmp_path.resolve() / "Images" / "a b.png")
            assert r["task"] == (name.lower() if kind == "question_type" else "unknown")


def test_med_r1_modality_of_a_question_type(tmp_path):
    """In a file of a question type the image's path names the modality, if it names one."""
    cases = {"Images/Chest CT Scan/test/a_T1/0 (6).png": "CT", "Images/Retinal OCT-C8/a.png": "OCT",
             "Images/OCT & X-Ray 2017/a.png": "unknown", "Images/SARS-CoV-2 CT-scan/a.png": "CT",
             "Images/Chest X-Ray PA/a.png": "X-ray", "Images/MIAS/mdb1.png": "unknown"}
    one = {"problem": "Which technique? A)PET, B)ultrasound imaging, C)CT", "solution": "<answer> B </answer>"}
    records = data.read_records(med_r1(tmp_path, *({**one, "image": x} for x in cases), name="Modality Recognition_test.json"))
    assert [r["modality"] for r in records] == list(cases.values())


def test_split_options_is_linear(tmp_path):
    """A hostile text of 200,000 markers or spaces is read in well under a second."""
    for text in ("A) " * 100_000, "A)" + " " * 200_000, "A)," * 70_000, "x" * 200_000):
        with pytest.raises(data.DataError):
            data.check_record(data.foreign_record({"image": "a", "problem": text, "solution": "<answer>"}, "t", 1), ".")


def test_med_r1_as_published(capsys):
    """Every question of the published sample parses, with an answer among its options."""
    if not MED_R1.is_dir():
        pytest.skip("no published Med-R1 questions beside the repository")
    files = sorted(MED_R1.glob("*.json"))
    records = data.read_records(files)
    assert len(records) == sum(len(json.loads(f.read_text())) for f in files) and capsys.readouterr().err == ""
    assert {len(r["options"]) for r in records} <= {2, 3, 4}
    assert not [o for r in records for o in r["options"] if re.search(r"(^|[, ])[A-F]\)", o)], "a marker left in an option"
    assert {r["modality"] for r in records} == {"CT", "Dermoscopy", "Microscopy", "Ultrasound"}
    for r in records:  # of the file's name
        assert r["id"].startswith(r["modality"].lower()) and r["task"] == "unknown"


# ---- phantoms ---------------------------------------------------------------------------------------------------------------
def test_tables():
    """The paper's 10 modalities, 10 regions, 5 places; 10 paraphrases a task; 4 names a region, of one style wherever used."""
    assert len(set(data.MODALITIES)) == len(set(data.ANATOMIES)) == 10 and len(data.LOCATIONS) == 5
    assert {m for m, _ in data.PAIRS} == set(data.MODALITIES) and {a for _, a in data.PAIRS} == set(data.ANATOMIES)
    assert len(set(data.PHRASES)) == 10 and set(data.ASKED) == set(data.TASKS) and all(p.count("{}") == 1 for p in data.PHRASES)
    styles = defaultdict(set)
    for names in data.KINDS.values():
        assert len(set(names)) == 4
        for style, name in zip(data.STYLES, names, strict=True):
            styles[name].add(style)
    assert all(len(s) == 1 for s in styles.values()), "a name means one style everywhere"


def test_records_of_an_image(phantoms):
    """Without a lesion three questions, with one four, and on every second image its state as fifth: so Normal and Abnormal are
    right equally often. One split, one group and one thought beginning an image; ids unique."""
    images = defaultdict(list)
    for r in phantoms[1]:
        images[r["image"]].append(r)
    assert len(images) == 260
    counts = Counter()
    for rows in images.values():
        tasks, lesion = sorted(r["task"] for r in rows), "There is no lesion" not in rows[0]["thought"]
        state = [r["options"]["ABCD".index(r["answer"])] for r in rows if r["task"] == "anomaly"]
        counts.update([lesion, (rows[0]["split"], *state)])
        assert state == ["Abnormal"] * len(state) if lesion else state == ["Normal"]
        assert [x for x in tasks if x != "anomaly"] == (["anatomy", "location", "modality", "pathology"] if lesion else
                                                        ["anatomy", "modality"])
        assert len({(r["split"], r["group"], r["modality"], r["anatomy"]) for r in rows}) == 1
        assert len({r["thought"].split(" So ")[0] for r in rows}) == 1
    assert abs(counts[True] / 260 - data.LESION_RATE) < .1
    for split in ("train", "test"):
        assert abs(counts[split, "Abnormal"] - counts[split,]) <= 1, "every second of those with a lesion is asked"
    assert sum(rows[0]["split"] == "train" for rows in images.values()) == 182  # 70 %
    assert len({rows[0]["group"] for rows in images.values()}) == 260


def test_letters_balanced(phantoms):
    """A to D are equally frequent to 3 % in all and to one deal in every task and split: no letter is worth guessing."""
    n = Counter(r["answer"] for r in phantoms[1])
    assert all(abs(n[x] / len(phantoms[1]) - .25) < .03 for x in "ABCD")
    for key in {(r["task"], r["split"]) for r in phantoms[1]}:
        n = Counter(r["answer"] for r in phantoms[1] if (r["task"], r["split"]) == key)
        assert max(n[x] for x in "ABCD") - min(n[x] for x in "ABCD") <= 1


def test_thoughts(phantoms):
    """The last sentence names the right option and none of the wrong ones; no thought names a letter or runs long."""
    for r in phantoms[1]:
        right, last = r["options"]["ABCD".index(r["answer"])], "So " + r["thought"].split(" So ")[1]
        assert last.endswith(f" {right}.") and r["thought"].count(" So ") == 1
        said = re.findall(r"[\w-]+", last)
        assert not any(set(o.split()) <= set(said) for o in r["options"] if o != right)
        assert not re.search(r"\b[A-F]\b|\(\w\)|option|answer", r["thought"]) and len(r["thought"].split()) <= 40
        if r["task"] in ("location", "pathology"):
            assert right in r["thought"].split(" So ")[0], "the finding is seen before it is concluded"


def test_options(phantoms):
    """Four options; the right one is the image's own; wrong ones are of the task's list, pathology's of the same region."""
    lists = {"anatomy": data.ANATOMIES, "modality": data.MODALITIES, "location": data.LOCATIONS,
             "anomaly": ("Normal", "Abnormal", "Artifact", "Uncertain")}
    for r in phantoms[1]:
        names, right = lists.get(r["task"], data.KINDS[r["anatomy"]]), r["options"]["ABCD".index(r["answer"])]
        assert len(set(r["options"])) == 4 and set(r["options"]) <= set(names)
        if r["task"] in ("anatomy", "modality"):
            assert right == r[r["task"]] and not any({right, o} in data.ALIKE for o in r["options"])


def test_questions_give_nothing_away(phantoms):
    """A question without image and options tells its task and no more: the same 10 texts, whatever is shown."""
    texts = defaultdict(set)
    for r in phantoms[1]:
        texts[r["task"]].add(r["question"])
    names = {w.lower() for x in (*data.MODALITIES, *data.ANATOMIES, *data.LOCATIONS) for w in x.split()}
    names |= {k for kinds in data.KINDS.values() for k in kinds} | {"normal", "abnormal"}
    for task, found in texts.items():
        assert found <= {p.format(data.ASKED[task]) for p in data.PHRASES} and len(found) >= 8
        assert not names & {w.lower() for q in found for w in re.findall(r"[\w-]+", q)}
    assert not any(texts[a] & texts[b] for a in texts for b in texts if a != b)


def test_small_vocabulary(phantoms):
    """Few words, for the tiny tokenizer."""
    texts = [f"{rewards.question_text(r)} {rewards.answer_text(r)}" for r in phantoms[1]]
    assert len({w for text in texts for w in re.findall(r"[\w-]+", text)}) < 260


@pytest.mark.parametrize("pair", data.PAIRS, ids="-".join)
def test_lesion_is_where_it_says(pair):
    """What a lesion changes is visible, has its centre in the named region's box, and changes nothing elsewhere."""
    for i, style in enumerate(data.STYLES):
        for j, place in enumerate(data.LOCATIONS):
            healthy, _ = data.draw_phantom(np.random.default_rng([i, j]), *pair)
            image, facts = data.draw_phantom(np.random.default_rng([i, j]), *pair, (style, place))
            assert image.shape == (data.SIZE, data.SIZE, 3) and image.dtype == np.uint8
            assert facts == {"modality": pair[0], "anatomy": pair[1], "lesion": data.KINDS[pair[1]][i], "style": style,
                             "location": place}
            change = np.abs(image.astype(float) - healthy).mean(-1) / 255
            y, x = np.indices(change.shape)
            cx, cy = ((k + .5) * change for k in (x, y))
            cx, cy = cx.sum() / change.sum() / data.SIZE, cy.sum() / change.sum() / data.SIZE
            if place == "Center Region":
                assert 1 / 3 < cx < 2 / 3 and 1 / 3 < cy < 2 / 3
            else:
                assert (cx < .42) == ("Left" in place) and (cx > .58) == ("Right" in place)
                assert (cy < .42) == ("Upper" in place) and (cy > .58) == ("Lower" in place)
            assert np.sort(change.ravel())[-40:].mean() > .15
            assert change[np.hypot(x + .5 - cx * data.SIZE, y + .5 - cy * data.SIZE) > 3 * data.LESION_RADIUS[1]].max() == 0


def test_no_two_images_alike():
    """Even healthy images of one pair differ; a healthy one has no lesion in its facts."""
    for pair in data.PAIRS:
        images = [data.draw_phantom(np.random.default_rng(k), *pair) for k in range(4)]
        assert all(np.abs(images[0][0].astype(int) - x[0]).mean() > 2 for x in images[1:])
        assert images[0][1] == {"modality": pair[0], "anatomy": pair[1], "lesion": None, "style": None, "location": None}


def test_seed_decides_everything(tmp_path):
    """The same seed gives the same bytes, another seed others; a longer run starts with the same images."""
    folders = {name: Path(data.make_phantoms(tmp_path / name, seed, n)).parent
               for name, seed, n in (("a", 1, 15), ("b", 1, 15), ("c", 2, 15), ("d", 1, 20))}
    for file in sorted(p.relative_to(folders["a"]) for p in folders["a"].rglob("*.*")):
        one, two, other = ((folders[x] / file).read_bytes() for x in "abc")
        assert one == two and one != other
    assert (folders["a"] / "images/00003.png").read_bytes() == (folders["d"] / "images/00003.png").read_bytes()


def test_few_thoughts_and_careless_ones_change_nothing_else(tmp_path):
    """--thoughts keeps the chains of the first train images alone; --careless misreports the lesion
    in a share of them. Images, questions, options and answers are those of a full set, and a
    careless thought still concludes on the right option."""
    full, few, none, careless = (data.read_records(data.make_phantoms(tmp_path / name, 4, 60, *knobs))
                                 for name, knobs in (("full", ()), ("few", (10,)), ("none", (0,)),
                                                     ("careless", (None, 0.5))))
    for other in (few, none, careless):
        for r, s in zip(full, other, strict=True):
            assert all(r[k] == s[k] for k in data.KEYS if k not in ("thought",))
            assert Path(r["path"]).read_bytes() == Path(s["path"]).read_bytes()
    kept = [r for r in few if r["split"] == "train" and r["thought"]]
    train = list(dict.fromkeys(r["group"] for r in full if r["split"] == "train"))
    assert list(dict.fromkeys(r["group"] for r in kept)) == train[:10]
    assert all(r["thought"] for r in few if r["split"] != "train")
    assert not any(r["thought"] for r in none if r["split"] == "train")

    wrong = {s["group"] for r, s in zip(full, careless, strict=True) if r["thought"] != s["thought"]}
    groups = {r["group"] for r in full}
    assert 0.3 < len(wrong) / len(groups) < 0.7
    for r, s in zip(full, careless, strict=True):
        if s["group"] in wrong:
            assert s["thought"].endswith(f" {data.right_option(r)}.") and "There is a" in s["thought"]
            seen = r["thought"].split(". ")[2]
            assert seen not in s["thought"]


def test_a_record_tells_what_was_drawn(phantoms):
    """"shows" agrees with what the questions ask, on every image; no other key, and no prompt, holds it."""
    for r in phantoms[1]:
        shows, truth = r["shows"], data.right_option(r)
        assert tuple(shows) == data.SHOWS and (shows["modality"], shows["anatomy"]) == (r["modality"], r["anatomy"])
        state = "Abnormal" if shows["lesion"] else "Normal"
        told = dict(shows, pathology=shows["lesion"], anomaly=state)
        assert told[r["task"]] == truth
        if shows["lesion"]:
            assert data.KINDS[shows["anatomy"]][list(data.STYLES).index(shows["style"])] == shows["lesion"]
    assert list(phantoms[1][0])[-2:] == ["shows", "path"]  # behind the keys that were there before


def test_phantoms_are_split_in_three(phantoms):
    """By image: 70 % train, 10 % val (what a run may look at), 20 % test."""
    split = {r["group"]: r["split"] for r in phantoms[1]}
    count = {x: list(split.values()).count(x) for x in data.SPLITS}
    assert count == {"train": 182, "val": 26, "test": 52}


def test_made_once(tmp_path):
    """A second call reuses what is there; other knobs, or a folder with something else in it, are refused by name."""
    file = Path(data.make_phantoms(tmp_path / "p", 0, 3))
    before = file.stat().st_mtime_ns
    assert data.make_phantoms(tmp_path / "p", 0, 3) == str(file) and file.stat().st_mtime_ns == before
    assert os.listdir(tmp_path) == ["p"]
    for folder, n in ((tmp_path / "p", 4), (tmp_path, 3)):
        with pytest.raises(data.DataError, match="remove it or name another folder") as e:
            data.make_phantoms(folder, 0, n)
        assert str(folder) in str(e.value)
    (tmp_path / "empty").mkdir()
    assert Path(data.make_phantoms(tmp_path / "empty", 0, 1)).exists()


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    """A run stopped half way (here by Ctrl-C) leaves no folder that a later run would take for whole."""
    def stop(*a):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "phantom_records", stop)
    with pytest.raises(KeyboardInterrupt):
        data.make_phantoms(tmp_path / "p", 0, 3)
    assert os.listdir(tmp_path) == []


# ---- command line -----------------------------------------------------------------------------------------------------------
def run(*args, cwd):
    p = subprocess.run([sys.executable, ROOT / "data.py", *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=60)
    return p.returncode, p.stdout, p.stderr


def test_command_line(tmp_path):
    """phantoms, check with counts; bad input: exit code 2, one sentence, no traceback."""
    code, out, _ = run("phantoms", "--n", 13, "--out", "ph", cwd=tmp_path)
    assert code == 0 and out.strip().endswith("phantoms.jsonl")
    code, out, _ = run("check", "ph/phantoms.jsonl", cwd=tmp_path)
    assert code == 0 and "on 13 images, 0 of them can't be used\n" in out and "task: anatomy 13, anomaly 8" in out
    for args in (("check", "no.jsonl"), ("phantoms", "--n", 14, "--out", "ph"), ("phantoms", "--n", "many"), ("paint",), ()):
        code, out, err = run(*args, cwd=tmp_path)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("error, says", [
    (data.DataError("a: b"), "error: a: b"), (KeyboardInterrupt(), "error: stopped by Ctrl-C"),
    (OSError(28, "No space left on device", "out/x"), "error: out/x: No space left on device"),
    (PermissionError(13, "Permission denied", "out"), "error: out: Permission denied"),
    (OSError("encoder error"), "error: encoder error")])
def test_cli(error, says, capsys):
    """What a user can mend is one sentence and exit code 2; a bug keeps its traceback."""
    def main():
        raise error
    with pytest.raises(SystemExit) as e:
        data.cli(main)
    assert e.value.code == 2 and capsys.readouterr().err == says + "\n"
    with pytest.raises(ZeroDivisionError):
        data.cli(lambda: 1 / 0)
    closed = subprocess.run(f"{sys.executable} {ROOT}/data.py check nofile >&-", shell=True, text=True, capture_output=True)
    assert closed.returncode == 2 and closed.stderr.startswith("error: nofile: ") and closed.stderr.count("\n") == 1


def test_check_tells_missing_images(tmp_path, monkeypatch, capsys):
    """Records whose image is cut off or not there are named by check, and refused before the first step: a header isn't enough."""
    folder = Path(data.make_phantoms(tmp_path / "p", 0, 4)).parent
    records, cut = data.read_records(folder / "phantoms.jsonl"), folder / "images" / "00002.png"
    data.check_images(records)
    cut.write_bytes(cut.read_bytes()[:-200])
    failed = 0
    for rank in range(3):  # three processes share the images
        try:
            data.check_images(records, rank, 3)
        except data.DataError:
            failed += 1
    assert failed == 1
    out = check_of(folder, monkeypatch, capsys, folder / "phantoms.jsonl")
    assert "on 4 images, 1 of them can't be used" in out and f"error: {cut} is truncated or broken" in out
    with pytest.raises(data.DataError, match=r"^record '.*00002.png is truncated or broken"):
        data.check_images(records)
    shutil.rmtree(folder / "images")
    assert "on 4 images, 4 of them can't be used" in check_of(folder, monkeypatch, capsys, folder / "phantoms.jsonl")
    with pytest.raises(data.DataError, match="is missing"):
        data.load_image(records[0])


# ---- what answers are found by without understanding ------------------------------------------------------------------------
def check_of(folder, monkeypatch, capsys, *files):
    """What check prints, and its error, if any, behind that."""
    monkeypatch.setattr(sys, "argv", ["data.py", "check", *map(str, files or (folder / "q.jsonl",))])
    error = ""
    try:
        data.main()
    except data.DataError as e:
        error = f"error: {e}"
    return capsys.readouterr().out + error


def leaking(folder, told):
    """60 training pictures and 40 of test, healthy or not at random; told: test's are train's, saved as JPEG."""
    rng, lines = np.random.default_rng(0), []
    truth = rng.permutation(["Normal", "Abnormal"] * 30)
    for n in range(100):
        k, split = (n, "train") if n < 60 else (n - 60, "test")
        image = Image.fromarray(data.draw_phantom(np.random.default_rng(k if told else n), "MRI", "Brain")[0])
        image.save(folder / f"{n}.{'png' if n < 60 else 'jpg'}")
        lines.append(record(id=f"q{n}", image=f"{n}.{'png' if n < 60 else 'jpg'}", task="anomaly", split=split, group=f"g{n}",
                            options=["Normal", "Abnormal"], answer="AB"[truth[k] == "Abnormal"]))
    return lines


def test_check_finds_test_pictures_that_are_in_train(tmp_path, monkeypatch, capsys):
    """Test pictures that are train's, saved again: the look-up by pictures answers all, check says so and warns twice; the
    commonest answer is no help. With other pictures both are at chance and nothing is warned of."""
    write(tmp_path, *leaking(tmp_path, True))
    out = check_of(tmp_path, monkeypatch, capsys)
    assert re.search(r"anomaly, 40 test questions: chance 50.0%, commonest answer [4-6]\d.\d%, question's commonest [4-6]\d.\d%, "
                     r"nearest picture's 100.0%", out)
    assert "warning: anomaly is answered far above chance" in out and "warning: 40 pictures of test or val look like a picture that is in train, as " in out
    write(tmp_path, *leaking(tmp_path, False))
    out = check_of(tmp_path, monkeypatch, capsys)
    assert re.search(r"chance 50.0%, commonest answer [3-6]\d.\d%, .*nearest picture's [3-6]\d.\d%", out) and "warning" not in out


def test_check_finds_answers_that_options_tell(tmp_path, monkeypatch, capsys):
    """Options that are never right give the answer away without a picture: missing pictures are said, the look-up by options is
    made nevertheless, and counts an option that was often offered and never right below one that was right."""
    rng, lines = np.random.default_rng(0), []
    for n in range(90):
        options = [str(x) for x in rng.permutation(["CT", f"odd {n % 7}", "Artifact", "Uncertain"])]
        lines.append(record(id=f"q{n}", image=f"{n}.png", options=options, answer="ABCD"[options.index("CT")], group=f"g{n}",
                            split="train" if n < 60 else "test"))
    write(tmp_path, *lines)
    out = check_of(tmp_path, monkeypatch, capsys)
    assert "modality, 30 test questions: chance 25.0%, commonest answer 100.0%, question's commonest 100.0%\n" in out and "warning: modality" in out
    assert "on 90 images, 90 of them can't be used\n" in out
    assert f"error: {tmp_path / '0.png'} is missing; {tmp_path / '1.png'} is missing; " in out and "; and 85 more: training" in out


def test_check_finds_groups_on_both_sides(tmp_path, monkeypatch, capsys):
    """A group in train and in val or test is told, also of another source, with a picture of either side; one within a split
    isn't; neither is a picture asked of twice in one split."""
    rows = [record(id="a", group="p1"), record(id="b", group="p1"), record(id="c", group="p3", image="c.png", split="test"),
            record(id="d", group="p2", image="d.png"), record(id="e", group="p2", source="other", image="e.png", split="val")]
    write(tmp_path, *rows)
    out = check_of(tmp_path, monkeypatch, capsys)
    both = f"as {tmp_path / 'e.png'} and {tmp_path / 'd.png'}"
    assert f"warning: 1 pictures of test or val are of a group (patient) that is in train, {both}" in out
    assert "look like" not in out
    write(tmp_path, *rows[:4])
    assert "are in train" not in check_of(tmp_path, monkeypatch, capsys)


def test_the_commonest_answer_is_the_likeliest_when_offered(capsys):
    """Not the one that is most often right: "a" is right 6 times of 14, "b" 4 times of 4."""
    def asked(options, right, split):
        return dict(options=options, right=right, split=split, path="", question="?")
    train = [asked(["a", "c"], "ac"[i % 2], "train") for i in range(8)] + [asked(["a", "d"], "a", "train")] * 2
    train += [asked(["a", "b"], "b", "train")] * 4
    data.look_up("anatomy", [*train, asked(["a", "b"], "b", "test")], {})
    assert "commonest answer 100.0%" in capsys.readouterr().out


def test_the_commonest_answer_to_the_very_question(tmp_path, monkeypatch, capsys):
    """Two findings, one rare and one common: the question alone tells the answer, and check says so. A question that train
    doesn't ask has the commonest answer of all."""
    rows = []
    for n in range(80):
        for question, right in (("Effusion?", "B"), ("Fracture?", "A")):
            rows.append(record(id=f"{question}{n}", image=f"{n}.png", task="pathology", question=question, answer=right,
                               options=["Yes", "No"], group=f"g{n}", split="train" if n < 60 else "test"))
    write(tmp_path, *rows)
    out = check_of(tmp_path, monkeypatch, capsys)
    assert "chance 50.0%, commonest answer 50.0%, question's commonest 100.0%\n" in out and "warning: pathology" in out
    train = [dict(options=["x", "y"], right="y", split="train", path="", question="?")]
    data.look_up("anatomy", [*train, dict(train[0], split="test", question="Another?")], {})
    assert "question's commonest 100.0%" in capsys.readouterr().out


def test_check_tells_contradictions_and_empty_pictures(tmp_path, monkeypatch, capsys):
    """Two readers who differ on one image, and an image that shows nothing, each with an example."""
    for name, grey in (("a.png", Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64))), ("b.png", Image.new("L", (64, 64)))):
        grey.save(tmp_path / name)
    rows = [record(id="1", image="a.png"), record(id="2", image="a.png", options=["CT", "OCT", "MRI", "X-ray"], answer="B"),
            record(id="3", image="b.png", options=["CT", "MRI"]), record(id="4", image="b.png", options=["MRI", "CT"], answer="A")]
    write(tmp_path, *rows)
    out = check_of(tmp_path, monkeypatch, capsys)
    assert f"warning: 1 images show nothing, as {tmp_path / 'b.png'}\n" in out
    assert f"warning: 1 questions have several answers, as 'What is it?' about {tmp_path / 'a.png'}\n" in out


@pytest.mark.parametrize("options, said", [
    (["C", "B", "D", "A"], "option A is 'C', the letter of another option"), (["x", "a. "], "option B is 'a. '"),
    (["CT", " ct "], "no two the same")])
def test_options_that_a_reader_can_not_tell_apart(options, said):
    """A letter, and a text in any case, must mean one."""
    with pytest.raises(data.DataError, match=re.escape(said)):
        data.check_options(options)
    data.check_options(["A", "B", "C", "D"])  # each its own letter
    data.check_options(["F", "+", "++"])  # no letter of three options


def test_a_tiff_in_which_white_is_0(tmp_path):
    """Is shown with white as white, as X-rays are stored. Of 8 bits Pillow heeds the tag, in reading and in writing; of 16 bits
    in neither, so that what is written here as 0 means white."""
    for dtype, left in ((np.uint8, 0), (np.uint16, 255)):
        greys = np.full((64, 64), np.iinfo(dtype).max // 2, dtype)
        greys[:, :8], greys[:, -8:] = 0, np.iinfo(dtype).max
        Image.fromarray(greys).save(tmp_path / "a.tif", tiffinfo={262: 0})
        with Image.open(tmp_path / "a.tif") as stored:
            assert stored.tag_v2[262] == 0
        shown = np.asarray(data.open_image(tmp_path / "a.tif").convert("L"))
        assert (shown[0, 0], shown[0, -1]) == (left, 255 - left)


def test_a_careless_report_is_false_in_style_and_place():
    """Otherwise a thought that is said to misreport the lesion would in part be true."""
    rng, facts = np.random.default_rng(0), data.facts_of("MRI", "Brain", ("solid", "Left Upper"))
    reports = [data.careless_report(facts, rng) for _ in range(60)]
    assert {r["style"] for r in reports} == {*data.STYLES} - {"solid"} and {r["location"] for r in reports} == {*data.LOCATIONS} - {"Left Upper"}


def test_an_id_is_used_once_over_all_files(world):
    """Two files with a question of one id in each: the second is refused, and it is said where the first stands."""
    again = Path(world.jsonl).with_name("again.jsonl")
    data.write_records(world.records[:1], again)
    with pytest.raises(data.DataError, match=f"already used in {world.jsonl}"):
        data.read_records([world.jsonl, str(again)])


def test_the_nearest_picture_that_has_an_offered_answer(capsys):
    """The nearest picture of all has an answer that isn't offered: the next one's counts. Where none is, it is a miss."""
    points = {"a": np.eye(256)[0], "b": np.eye(256)[0] + 0.2 * np.eye(256)[1], "q": np.eye(256)[0]}
    train = [dict(options=["x", "y"], right=right, split="train", path=path, question="?") for path, right in (("a", "x"), ("b", "y"))]
    test = dict(options=["y", "z"], right="y", split="test", path="q", question="?")
    data.look_up("anatomy", [*train, test], points)
    assert "nearest picture's 100.0%" in capsys.readouterr().out
    data.look_up("anatomy", [*train, test, dict(test, options=["v", "w"], right="v")], points)
    assert "2 test questions" in (out := capsys.readouterr().out) and "nearest picture's 50.0%" in out


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A machine that loses power after the rename must not come back with an empty file under the new name."""
    told = []
    monkeypatch.setattr(data.os, "fsync", lambda number: told.append("on disk"))
    replace = data.os.replace
    monkeypatch.setattr(data.os, "replace", lambda *paths: (told.append("renamed"), replace(*paths)))
    data.write_text(tmp_path / "a.txt", "x")
    assert told == ["on disk", "renamed"] and (tmp_path / "a.txt").read_text() == "x"

    def failing(number):
        def sync(_):
            raise OSError(number, os.strerror(number))
        return sync
    monkeypatch.setattr(data.os, "fsync", failing(errno.EINVAL))  # a file system that can't
    data.write_text(tmp_path / "a.txt", "y")
    assert (tmp_path / "a.txt").read_text() == "y"
    monkeypatch.setattr(data.os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        data.write_text(tmp_path / "a.txt", "z")
    assert (tmp_path / "a.txt").read_text() == "y" and os.listdir(tmp_path) == ["a.txt"]
