"""Models that were not trained here: how their answers are read, and a chat server that answers in ten manners."""
import base64
import io
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_eval import run, script
from test_judges import KEY, WAITS, Handler, Server

import data
import eval as evaluation
import judge as J
import model as M
import rewards
from data import DataError

OPTIONS = ["MRI", "CT", "X-ray", "Ultrasound"]
ITEM = dict(id="q", task="modality", modality="CT", question="What is it?", options=OPTIONS, answer="B")
LISTED = rewards.options_text(OPTIONS)


# ------------------------------------------------------------------------------------------------------------- reading an answer

@pytest.mark.parametrize("how, letter, texts", [
    ("tags", "B", ["<think>t</think><answer>B</answer>", "<answer>CT</answer>", "<answer>**B**</answer>", "Well: <answer>B</answer> A",
                   "t</think><answer>B</answer>", "<answer>The answer is (B).</answer>", "<answer>\nB) CT\n</answer>\nThe answer is A."]),
    ("last line", "B", [
        "B", "b.", "(B)", "**B**", "- B", "\\boxed{B}", "<|begin_of_box|>B<|end_of_box|>", "The answer is (B).", "Answer: B", "**Answer:** B",
        "ANSWER: B", "The correct answer is **B) CT**.", "The answer is option B.", "The answer is CT.", "The answer is B. CT.",
        "The answer is B because bone is bright.", "Bone is bright. So the final answer is: B", "It may be A.\n\nB", "A\n\nNo. B it is.\n\nB",
        f"{LISTED}\nThe answer is B", "B\n\nBone is bright.", "The answer is B. Bone is bright.", "t</think>\n\nB", "<think>t</think>B",
        "The answer should be **B**.", "I would choose option B, which is bright.", "The most appropriate option is B) CT.", "The letter is B.",
        "[B]", '"B"', "Option B", "Answer:B", "The correct option is B.", "B is correct.", "The answer is **B) CT**, as it is bright.",
        "The answer is B because the other options are wrong.", "The answer is (B), because A is wrong.",
        "The answer is B.\nA second option is MRI.", "<answer>B", "<think>The answer is A.</think>\nB", "If it were dark, the answer is A. It is bright.\nThe answer is B."]),
    ("option text", "B", ["CT", "ct.", "**CT**", "B) CT", "(B) CT", "Let me see.\nCT"]),
    ("unreadable", None, [
        "", " \n", "I am unable to help with medical images.", "A or B", "A, B", "The answer is A or B.", "The answer is A. The answer is B.",
        "B) MRI", "The answer is B. MRI.", "The answer is B) MRI.", "E", "The answer is E.", LISTED, f"{LISTED}I can't tell.", "A CT scan.",
        "Answer: A cyst.", "The answer is not B.", "The answer is unclear.", "<think>t", "<think>It is bright.\nThe answer is B.",
        "<answer>A</answer> or <answer>B</answer>", "<answer>no idea</answer> B", "A.\nIt is dark.\nB.\nIt is bright.",
        "If it were dark, the answer is A.", "MRI\nor\nCT", "Is the answer B?", "I would not choose option B.", "The wrong option is B.", "The incorrect answer is B.", "The worst choice is A.",
        "Another option is CT.", "Which option is A?", "A is correct.\nB is correct.\nWell."])])
def test_answers_are_read_as_a_person_would_or_not_at_all(how, letter, texts):
    """The rules of the docstring, each manner by itself: nothing is guessed."""
    for text in texts:
        assert rewards.read_leniently(text, ITEM)[1:] == (letter, how), text


def test_options_that_are_letters_words_or_decorated():
    """The option's own letters, "A" as an article, an underscore, and the tags in another order."""
    def letter(text, *options, thinking="before"):
        return rewards.read_leniently(text, dict(options=options, thinking=thinking))[1]
    assert letter("The answer is no.", "Yes", "No") == "B" and letter("There is no lesion.", "Yes", "No") is None
    assert letter("Answer: T2_FLAIR", "T1_w", "T2_FLAIR") == "B" and letter("E. coli", "A. baumannii", "E. coli") == "B"
    assert letter("Answer: A mass", "Cyst", "Mass") is None
    assert letter("<answer>B</answer><think>t</think>", "x", "y", thinking="after") == "B"
    assert letter("B\n<think>t</think>", "x", "y", thinking="after") == "B" and letter("CT", "MRI", "CT", thinking="none") == "B"


def test_a_thought_without_tags_is_what_states_no_letter():
    """F reads the reasoning of a model without tags, and nothing where an answer is all it said."""
    def thought(text):
        return rewards.read_leniently(text, ITEM)[0]
    assert thought("Bone is bright. So it is a CT.\nThe answer is (B).") == "Bone is bright. So it is a CT."
    assert thought("**B**\n\nBone is bright.") == "Bone is bright." and not thought("B") and not thought("The answer is B) CT.")
    assert thought("Bone is bright.\n<answer>B</answer>") == "Bone is bright." and thought("<answer>B</answer>") is None
    assert thought("Bright.</think><think>CT.</think><answer>B</answer>").split() == ["Bright.", "CT."]
    assert thought("Bright.</think>\nB") == "Bright." and thought("<think>Bright.</think>\nI see.\nB") == "Bright."


def test_a_lenient_answer_is_scored_as_it_was_read():
    """A thought that holds a loose tag costs the format alone: the letter that was read is the letter that counts."""
    text = "<think>foo <answer> bar</think> B"
    (row,) = rewards.score_leniently([text], [ITEM], lambda thoughts, items: ["B"])
    assert (row["thought"], row["given"], row["read_as"]) == ("foo   bar", "B", "last line")
    assert (row["fmt"], row["acc"], row["con"]) == (0, 1, 1)


def test_a_reply_that_was_cut_off_has_answered_in_tags_or_not_at_all():
    """What then looks like an answer in the last line may be a thought's middle."""
    records = [ITEM | dict(path="p", group="g")] * 3
    texts = ["It may be B.\n\nThe answer is A", "CT", "<answer>B</answer> It is"]
    for cut_off, letters in ((False, ["A", "B", "B"]), (True, [None, None, "B"])):
        rows = evaluation.scored([(text, cut_off) for text in texts], records, J.make_judge(), rewards.score_leniently)
        assert [row["given"] for row in rows] == letters and [row["acc"] for row in rows] == [float(x == "B") for x in letters]
    assert [row["read_as"] for row in rows] == ["unreadable", "unreadable", "tags"]
    bare = [ITEM | dict(path="p", group="g", thinking="none")]  # no thought is asked for: no consistency, cut off or not
    row, = evaluation.scored([("The answer is A", True)], bare, J.make_judge(), rewards.score_leniently)
    assert row["acc"] == 0 and rewards.failed(row["con"])


@pytest.mark.parametrize("unit", ["<think>", "</think>", "<|", " ", "\n.", "answer is ", "answer: B. ", "if ", "B\n", ". a b ", "because ", "*"])
def test_reading_is_linear(unit):
    """3 * 10^4 characters of anything, before and behind an answer: milliseconds, or a second for as many answers."""
    noise, began = unit * (30000 // len(unit)), time.process_time()
    for text in (noise, f"The answer is {noise}", f"{noise}\nB"):
        rewards.read_leniently(text, ITEM)
    assert time.process_time() - began < 4


def test_scores_of_what_was_read():
    """Format is the text's own; a text that is nan has no score at all; of a text in tags the row is `score`'s."""
    texts = ["Bone is bright. It is a CT.\nThe answer is (B).", float("nan"), "I can't.", "<think>It is a CT.</think><answer>B</answer>"]
    rows = rewards.score_leniently(texts, [ITEM] * 4, J.make_judge())
    assert [row["read_as"] for row in rows] == ["last line", "failed", "unreadable", "tags"]
    assert [(row["fmt"], row["acc"], row["con"], row["given"]) for row in (rows[0], *rows[2:])] == [
        (0, 1, 1, "B"), (0, 0, 0, None), (1, 1, 1, "B")]
    assert all(rewards.failed(rows[1][key]) for key in ("fmt", "acc", "con")) and rows[1]["completion"] == ""
    assert rows[0]["completion"] == texts[0] and rows[1]["verdict"] is None
    assert rows[3] == rewards.score(texts[3:], [ITEM], J.make_judge())[0] | dict(read_as="tags")


def test_no_reward_is_read_leniently():
    """Eqs. (4) to (6) in training give nothing to an answer outside its tags; eval.py alone calls the other reading."""
    row, = rewards.score(["It is a CT.\nThe answer is (B)."], [ITEM], J.make_judge())
    assert (row["fmt"], row["acc"], row["con"], row["given"]) == (0, 0, 0, None) and "read_as" not in row
    root = Path(rewards.__file__).parent
    assert [p.name for p in sorted(root.glob("*.py")) if "rewards.score_leniently" in p.read_text()] == ["eval.py"]


@pytest.mark.parametrize("made_by", [None, "knobs.json", "base.json"])
def test_local_checkpoints(made_by, world, tmp_path, monkeypatch):
    """A folder without knobs.json or base.json is somebody else's model; one made here must keep to its tags."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(world.folder).iterdir():
        (folder / file.name).symlink_to(file)
    if made_by:
        (folder / made_by).write_text("{}")
    items = data.read_records(world.jsonl, "test")[:3]
    script(monkeypatch, world, ["<answer>A", "<answer>A</answer>", "no idea"])
    monkeypatch.setattr(evaluation, "subset", lambda records, n: items)
    run(monkeypatch, "--ckpt", folder, "--data", world.jsonl, "--out", tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "results.json").read_text())[str(folder)]
    rows = [json.loads(x) for x in next((tmp_path / "out").glob("completions-*")).read_text().splitlines()]
    assert [row["given"] for row in rows] == ["A" if made_by is None else None, "A", None]
    assert entry["read_as"] == ({} if made_by else {"last line": 1, "tags": 1, "unreadable": 1})
    report = (tmp_path / "out" / "report.md").read_text()
    assert ("| last line 1, tags 1, unreadable 1 |" in report) == (made_by is None)


# --------------------------------------------------------------------------------------------------------------- the chat server

MANNERS = {  # what the server says -> (letter, how it is read)
    "tags": ("<think>Bone is bright, so it is a CT.</think><answer>B</answer>", "B", "tags"),
    "bare": ("B", "B", "last line"),
    "sentence": ("Bone is bright, so it is a CT. The answer is (B).", "B", "last line"),
    "bold": ("It is dark.\n\n**A**", "A", "last line"),
    "option": ("CT", "B", "option text"),
    "refusal": ("I'm sorry, but I can't interpret medical images.", None, "unreadable"),
    "empty": ("", None, "unreadable"),
    "two": ("It is A or B.", None, "unreadable"),
    "broken": (None, None, "failed"),
    "slow": ("<think>Bone is bright.</think><answer>B</answer>", "B", "tags")}


class Chat(Handler):
    """Answers each question in the manner that it names; keeps the requests."""

    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        image, text = body["messages"][0]["content"]
        manner = re.match(r"(\w+): ", text["text"])[1]
        server.keys.add(self.headers["Authorization"])
        server.calls.append((manner, image["image_url"]["url"], body))
        if manner == "broken" or server.fault(text, 1):
            return self.answer(500, f"bad key {KEY}".encode())
        if manner == "slow" and len([call for call in server.calls if call[0] == "slow"]) == 1:
            time.sleep(3)  # more than the limit: it is asked again
        message = dict(role="assistant", content=MANNERS[manner][0] or None)
        choice = dict(message=message, finish_reason="length" if manner == "empty" else "stop")
        self.answer(200, json.dumps(dict(choices=[choice])).encode())


@pytest.fixture
def chat(monkeypatch, tmp_path):
    """A running server with a key, ten questions (one of each manner) in ten.jsonl, short waits."""
    monkeypatch.setattr(J, "WAITS", WAITS[:2])
    monkeypatch.setattr(evaluation, "TIMEOUT", 2.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    record = ITEM | dict(image="a.png", anatomy="Brain", thought=None, source="s", group="g", split="test")
    data.write_records([record | dict(id=x, question=f"{x}: What is it?") for x in MANNERS], tmp_path / "ten.jsonl")
    server = Server()
    server.RequestHandlerClass = Chat
    yield server
    server.shutdown()
    server.server_close()


def evaluate(monkeypatch, folder, server, *flags):
    run(monkeypatch, "--ckpt", f"Chat={server.spec}", "--data", folder / "ten.jsonl",
        "--out", folder / "out", *flags)
    rows = [json.loads(x) for x in (folder / "out" / "completions-Chat.jsonl").read_text().splitlines()]
    return json.loads((folder / "out" / "results.json").read_text())["Chat"], rows


def test_ten_manners_through_the_command(chat, monkeypatch, tmp_path, capfd):
    """Each is read as a person would read it or counted as unreadable; the one that got no reply is missing, not wrong; it alone
    is asked for again; the key is in no file and in no message."""
    entry, rows = evaluate(monkeypatch, tmp_path, chat)
    read = {row["id"]: (row["completion"], row["given"], row["read_as"]) for row in rows}
    assert read == MANNERS | dict(broken=("", None, "failed"))
    assert entry["overall"] == dict(mean=5 / 9, std=0.0, n=9, runs=1) and entry["tasks"]["modality"] == entry["overall"]
    assert entry["format"]["mean"] == 2 / 9 and entry["params"] is None
    assert entry["read_as"] == {"tags": 2, "last line": 3, "option text": 1, "unreadable": 3, "failed": 1}
    consistent = {row["id"]: row["con"] for row in rows}
    assert consistent["tags"] == consistent["sentence"] == 1 and consistent["bare"] == consistent["two"] == 0
    assert consistent["broken"] is None and entry["judge_failed"] == 0
    assert entry["consistency"]["mean"] == 2 / 9 and entry["cut_off"] == 1 / 9
    report = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"^\| Chat \| - \|.* 55\.6 .*\| 9 \|$", report, re.M)
    assert "| read as (failed: no reply) |" in report
    assert "| failed 1, last line 3, option text 1, tags 2, unreadable 3 |" in report
    assert "| Chat | CT 50 %, unreadable 30 %, MRI 10 % |" in report
    page = (tmp_path / "out" / "eval.html").read_text()
    assert page.count("<section ") == 9 and "broken" not in page
    calls = [manner for manner, *_ in chat.calls]
    assert sorted(calls) == sorted([*MANNERS, "broken", "slow"]) and chat.keys == {f"Bearer {KEY}"}

    assert evaluate(monkeypatch, tmp_path, chat)[1] == rows
    assert [manner for manner, *_ in chat.calls[len(calls):]] == ["broken"] * 2
    said = capfd.readouterr()
    texts = [p.read_text() for p in (tmp_path / "out").iterdir()]
    assert not [text for text in (said.out, said.err, *texts) if KEY in text]
    assert "some questions got no reply: HTTP 500 (2 times)" in said.out


class OwnModel(Handler):
    """Runs the server's checkpoint on what the request holds, as vLLM would."""

    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        image, text = body["messages"][0]["content"]
        png = io.BytesIO(base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")))
        with server.one_at_a_time:
            patches = server.processor.image_processor(images=[Image.open(png)], return_tensors="pt")
            images = [(patches["pixel_values"], patches["image_grid_thw"])]
            batch = M.tensors(server.processor, [text["text"]], images)
            tokens, mask = M.sample(server.net, batch, group_size=1, max_new_tokens=body["max_tokens"], temperature=body["temperature"])
        said = M.decode(server.processor, tokens, mask)[0][0]
        end = "stop" if M.finished(batch, tokens, mask).item() else "length"
        self.answer(200, json.dumps(dict(choices=[dict(message=dict(content=said), finish_reason=end)])).encode())


def test_a_server_of_the_same_checkpoint_gives_the_same_rows(chat, world, monkeypatch, tmp_path):
    """By name or through a server: the same question about the same pixels, so greedily the same completions and scores."""
    chat.RequestHandlerClass, chat.one_at_a_time = OwnModel, threading.Lock()
    chat.net, chat.processor = M.load(world.folder)
    monkeypatch.setattr(evaluation, "TIMEOUT", 60)
    run(monkeypatch, "--ckpt", f"direct={world.folder}", f"served={chat.spec}", "--data", world.jsonl, "--out", tmp_path / "out",
        "--questions", 8, "--max_new_tokens", 6, "--batch", 1)
    rows = [[json.loads(x) | dict(ckpt="") for x in (tmp_path / "out" / f"completions-{name}.jsonl").read_text().splitlines()]
            for name in ("direct", "served")]
    assert rows[0] == rows[1] and len({row["completion"] for row in rows[0]}) > 1


def test_what_is_sent_and_what_a_reply_is_kept_by(chat, monkeypatch, tmp_path):
    """Our own question behind the image, temperature, seed and limit; another of these, or of the image's size, is another
    request, and the same none."""
    evaluate(monkeypatch, tmp_path, chat, "--only", "id=bare")
    _, url, body = chat.calls[-1]
    record = data.read_records(tmp_path / "ten.jsonl", only=["id=bare"])[0]
    assert body["messages"][0]["content"][1] == dict(type="text", text=rewards.question_text(record))
    assert [x["type"] for x in body["messages"][0]["content"]] == ["image_url", "text"]
    knobs = ("model", "temperature", "seed", "max_tokens")
    assert [body[key] for key in knobs] == ["tiny", 0, 0, 512] and size_of(url) == (300, 200)
    more = ["--temperature", "0.5", "--seeds", "3", "4", "--max_new_tokens", "9"]
    for flags, calls in ((["--max_new_tokens", "9"], 1), (more, 2), (more, 0), (["--max_pixels", "20000"], 1), ([], 0)):
        before = len(chat.calls)
        entry, rows = evaluate(monkeypatch, tmp_path, chat, "--only", "id=bare", *flags)
        assert len(chat.calls) - before == calls, flags
        for _, _, body in chat.calls[before:]:
            assert body["max_tokens"] == (9 if "9" in flags else 512) and body["temperature"] == (0.5 if flags is more else 0)
        if flags is more:
            assert [row["seed"] for row in rows] == [3, 4] and entry["overall"]["n"] == 1
    assert {body["seed"] for _, _, body in chat.calls} == {0, 3, 4}
    width, height = size_of(chat.calls[-1][1])
    assert 0.97 * 20000 < width * height <= 20000 and width / height == pytest.approx(1.5, abs=0.02)


def size_of(url):
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))).size


@pytest.mark.parametrize("size, max_pixels, sent", [((100, 50), 5000, (100, 50)), ((100, 50), 1250, (50, 25)), ((99, 1), 10, (31, 1)), ((7, 7), 1, (1, 1))])
def test_images_are_shrunk_to_max_pixels(size, max_pixels, sent, tmp_path):
    """Never more pixels than asked for (but a pixel a side is the least), never enlarged; without a limit as before."""
    Image.new("RGB", size).save(tmp_path / "x.png")
    record = dict(path=str(tmp_path / "x.png"), id="x")
    width, height = size_of(J.data_url(record, 10**6, max_pixels))
    assert (width, height) == sent or width * height <= max(max_pixels, width)
    assert size_of(J.data_url(record, 40)) == tuple(max(1, round(n * min(1, 40 / max(size)))) for n in size)


def test_one_question_and_its_reading(chat, monkeypatch, tmp_path, capsys):
    """--image, --question, --options through a server: printed, and nothing is written."""
    before = sorted(tmp_path.iterdir())
    run(monkeypatch, "--ckpt", chat.spec, "--image", tmp_path / "a.png", "--question", "sentence: What is it?", "--options", *OPTIONS)
    assert "The answer is (B).\n  read as: CT" in capsys.readouterr().out and sorted(tmp_path.iterdir()) == before


def test_a_server_that_never_answers_ends_it(chat, monkeypatch, tmp_path, capsys):
    """After the first questions, in one sentence with the reason and without the key; nothing is written."""
    chat.fault = lambda *_: True
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, tmp_path, chat)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "no reply to 10 questions in a row: HTTP 500" in said and KEY not in said
    assert not list((tmp_path / "out").iterdir())


def test_addresses_and_names_that_hold_commas_and_equals():
    """openai: rows are not split; a row's name goes before the first "="."""
    url = "openai:http://h:1/v1#org/a=b,c"
    assert evaluation.checkpoints_of([url, f"My, model={url}", "S=a,b"]) == {url: [url], "My, model": [url], "S": ["a", "b"]}
    for bad in ("openai:", "openai:http://h/v1", "X=openai:h#m", "openai:http://me:secret@h/v1#m", "X=openai:http://h/v1?key=secret#m",
                f"X={url},{url}"):
        with pytest.raises(DataError, match="OPENAI_API_KEY") as error:
            evaluation.checkpoints_of([bad])
        assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config", [{"model_type": "internvl_chat"}, {"model_type": "bert"}, {"model_type": "x", "auto_map": {"AutoConfig": "c.C"}}])
def test_other_architectures_are_shown_the_way(config, tmp_path, monkeypatch, capsys):
    """One sentence names the families that are loaded and openai: for the others; no code of a checkpoint is run."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nC = None")
    Image.new("L", (56, 56)).save(tmp_path / "image.png")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--ckpt", tmp_path, "--image", tmp_path / "image.png", "--question", "Q?", "--options", "MRI", "CT")
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--ckpt openai:BASE_URL#MODEL" in said[-1] and not (tmp_path / "ran").exists()
