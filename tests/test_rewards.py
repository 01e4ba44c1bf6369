"""Eqs. (3)-(6): what a completion's text is worth. Tables are written out by hand; random texts meet a slow reference."""

import itertools
import math
import random
import re
import time

import numpy as np
import pytest
import torch

from rewards import (
    TAGS,
    accuracy_reward,
    answer_letter,
    consistency_reward,
    format_reward,
    grounding,
    parse_completion,
    statements,
    total_reward,
)

MODALITY = {"options": ["MRI", "CE-MRI", "CT", "X-ray"], "answer": "C"}
STATE = {"options": ["Normal", "Abnormal", "Artifact", "Uncertain"], "answer": "A"}
NAN = math.nan

PARSED = [  # text, thought, answer, format reward
    ("<think>t</think><answer>B</answer>", "t", "B", 1.0),
    (" \n<think>\n t \n</think>\n\t<answer> B </answer>\n", "t", "B", 1.0),
    ("<think>1 < 2 and <b> a tag </b></think><answer>B</answer>", "1 < 2 and <b> a tag </b>", "B", 1.0),
    ("", None, None, 0.0),
    ("B", None, None, 0.0),
    ("Sure. <think>t</think><answer>B</answer>", "t", "B", 0.0),
    ("<think>t</think> so <answer>B</answer>", "t", "B", 0.0),
    ("<think>t</think><answer>B</answer>.", "t", "B", 0.0),
    ("<think></think><answer>B</answer>", None, "B", 0.0),
    ("<think> \n </think><answer>B</answer>", None, "B", 0.0),
    ("<think>t</think><answer> </answer>", "t", None, 0.0),
    ("<think>t</think>", "t", None, 0.0),
    ("<think>t</think><answer>B", "t", None, 0.0),
    ("<answer>B</answer>", None, "B", 0.0),
    ("t</think><answer>B</answer>", None, "B", 0.0),
    ("<think>t<answer>B</answer>", None, "B", 0.0),
    ("<think>t</think><think>u</think><answer>B</answer>", None, "B", 0.0),
    ("<think>t</think><answer>A</answer><answer>B</answer>", "t", None, 0.0),
    ("<think><think>t</think></think><answer>B</answer>", None, "B", 0.0),
    ("</think>t<think><answer>B</answer>", None, "B", 0.0),
    ("<answer>B</answer><think>t</think>", None, None, 0.0),
    ("<think>t<answer>B</answer></think>", None, None, 0.0),
    ("<think>t<answer>B</think></answer>", None, None, 0.0),
    ("<answer><think>t</think>B</answer>", None, None, 0.0),
    ("<Think>t</Think><ANSWER>B</ANSWER>", None, None, 0.0),
    ("<think >t</think ><answer>B</answer>", None, "B", 0.0),
]


@pytest.mark.parametrize("text, thought, answer, fmt", PARSED)
def test_parse_and_format(text, thought, answer, fmt):
    """Eq. (4) is strict, and what is still readable of a broken completion is what the docstring says."""
    assert parse_completion(text) == (thought, answer)
    assert format_reward(text) == fmt


THINKING = [  # mode, text, thought, answer, format reward
    ("none", "<answer>B</answer>", None, "B", 1.0),
    ("none", " <answer>B</answer>\n", None, "B", 1.0),
    ("none", "So <answer>B</answer>", None, "B", 0.0),
    ("none", "<answer> </answer>", None, None, 0.0),
    ("none", "<think>t</think><answer>B</answer>", "t", "B", 0.0),
    ("none", "<answer>B</answer><think>t</think>", "t", "B", 0.0),
    ("none", "<think>t<answer>B</answer></think>", None, None, 0.0),
    ("after", "<answer>B</answer><think>t</think>", "t", "B", 1.0),
    ("after", "<answer>B</answer> <think>t</think>\n", "t", "B", 1.0),
    ("after", "<answer>B</answer>so<think>t</think>", "t", "B", 0.0),
    ("after", "<answer>B</answer>", None, "B", 0.0),
    ("after", "<think>t</think><answer>B</answer>", None, None, 0.0),
    ("after", "<answer>B<think>t</answer></think>", None, None, 0.0),
]


@pytest.mark.parametrize("mode, text, thought, answer, fmt", THINKING)
def test_thinking_modes(mode, text, thought, answer, fmt):
    """Med-R1's ablation: without a thought, or with the thought after the answer, the format is as strict; R_acc reads
    the answer wherever it may stand, R_con is missing (not 0) where no thought is asked for."""
    item = dict(STATE, thinking=mode, answer="B")
    assert parse_completion(text, mode) == (thought, answer)
    assert format_reward(text, mode) == fmt
    assert accuracy_reward(text, item) == float(answer == "B")
    con = consistency_reward(text, item, "B")
    assert math.isnan(con) if mode == "none" else con == float(thought is not None and answer == "B")


def test_format_equals_a_slow_reference():
    """On texts made of tags, words and blanks in any order, Eq. (4) is one anchored pattern (slow, so only here)."""
    other = r"(?!</?think>|</?answer>)"
    inside = rf"(?:{other}.)*{other}\S(?:{other}.)*"
    whole = re.compile(rf"\s*<think>{inside}</think>\s*<answer>{inside}</answer>\s*", re.DOTALL)
    rng = random.Random(0)
    texts = ["".join(rng.choices([*TAGS, "x", " "], k=rng.randint(4, 9))) for _ in range(3000)]
    gaps = [rng.choices(["", "x", " ", "x\n"], k=5) for _ in range(1000)]  # before, between and after the four tags in order
    texts += ["".join(gap + tag for gap, tag in zip(g, [*TAGS, ""], strict=True)) for g in gaps]
    wanted = [float(bool(whole.fullmatch(text))) for text in texts]
    assert [format_reward(text) for text in texts] == wanted
    assert 20 < sum(wanted) < 1000


@pytest.mark.parametrize("options", [
    MODALITY["options"], STATE["options"], ["Yes", "No"], ["E. coli", "It is normal.", "MRI (T1)"],
    ["Left Upper", "Right Upper", "Left Lower", "Right Lower", "Center Region", "B cell"]])
def test_every_spelling_of_every_option(options):
    """Letter, bracketed letter, letter with text, text; either case, blanks and final stops forgiven: always that option."""
    for letter, text in zip("ABCDEF", options, strict=False):
        labels = [letter, f"{letter}.", f"{letter})", f"({letter})", f"({letter}).", f"{letter}:"]
        spellings = [*labels, *(f"{label} {text}" for label in labels[1:]), f"{letter}){text}", text, text + ".", f" {text} \n"]
        for said in spellings:
            for form in (said, said.lower(), said.upper(), said.replace(" ", "  \n")):
                assert answer_letter(form, options) == letter, form


@pytest.mark.parametrize("options, answers", [
    ("MRI CE-MRI CT X-ray", ["A or B", "A, B", "AB", "A B", "B) CT", "(B) CT", "B) C)", "E", "(F)", "E) CT", "CT scan"]),
    ("MRI CE-MRI CT X-ray", ["", ".", "()", "?", "1", "-", "A MRI", "BCE-MRI", "CE", "RI", "M", "MRI CT", "the CT"]),
    ("Normal No", ["abnormal", "norm", "not normal", "nor", "normal no", "C", "D"]),
    ("B A", ["A", "b."]),
    ("C A B", ["A", "B", "c"]),
    ("MRI mri", ["mri", "MRI"]),
])
def test_undecidable_answers(options, answers):
    """Two readings, a letter beyond the options, or text that only contains an option: no letter rather than a guess."""
    assert [answer_letter(answer, options.split()) for answer in answers] == [None] * len(answers)


def test_answer_letter_edges():
    """No answer; options that are letters; an option that starts like a label."""
    assert answer_letter(None, ["MRI", "CT"]) is None
    assert [answer_letter(x, ["A", "B", "D", "C"]) for x in "ABCD"] == ["A", "B", None, None]
    assert answer_letter("(C)", ["A", "B", "D", "C"]) == "C"  # brackets make it a label
    assert answer_letter("C) D", ["A", "B", "D", "C"]) == "C"
    assert answer_letter("E. coli", ["A. baumannii", "E. coli"]) == "B"
    assert answer_letter("A. baumannii", ["E. coli", "A. baumannii"]) == "B"


@pytest.mark.parametrize("answer, item, acc", [
    ("C", MODALITY, 1.0), ("c) ct", MODALITY, 1.0), ("CT", MODALITY, 1.0), ("B", MODALITY, 0.0), ("CE-MRI", MODALITY, 0.0),
    ("C or B", MODALITY, 0.0), ("Normal", STATE, 1.0), ("abnormal", STATE, 0.0), ("no", STATE, 0.0)])
def test_accuracy(answer, item, acc):
    """Eq. (5), with the format right and, no less, with the format broken."""
    assert accuracy_reward(f"<think>t</think><answer>{answer}</answer>", item) == acc
    assert accuracy_reward(f"I say <answer>{answer}</answer> t", item) == acc
    assert accuracy_reward(answer, item) == 0.0  # outside its tags it is no answer


@pytest.mark.parametrize("text, verdict, con", [
    ("<think>t</think><answer>B</answer>", "B", 1.0),  # wrong answer (C is right), but it follows from the thought
    ("<think>t</think><answer>C</answer>", "C", 1.0),
    ("<think>t</think><answer>C</answer>", "B", 0.0),
    ("<think>t</think><answer>C</answer>", None, 0.0),
    ("<think>t</think><answer>C</answer>", NAN, NAN),
    ("<think>t</think> <answer>CT</answer> x", "C", 1.0),
    ("<think>t</think><answer>dog</answer>", "C", 0.0),
    ("<think>t</think><answer>dog</answer>", None, 0.0),  # None == None is no agreement
    ("<think>t</think><answer>dog</answer>", NAN, NAN),
    ("<think>t</think>", "C", 0.0),
    ("<think>t</think>", None, 0.0),
    ("<think>t</think>", NAN, NAN),
    ("<answer>C</answer>", "C", 0.0),
    ("<answer>C</answer>", None, 0.0),
    ("<answer>C</answer>", NAN, 0.0),
    ("", None, 0.0),
    ("", NAN, 0.0)])
def test_consistency(text, verdict, con):
    """Eq. (6) and its missing values: agreement with the own answer, never of None with None; nan if F failed on a thought."""
    assert consistency_reward(text, MODALITY, verdict) == pytest.approx(con, nan_ok=True)


def test_total_is_the_weighted_sum():
    """Eq. (3) on all eight corners for every row of Table 3's shape; three full marks are exactly 1."""
    for weights in ((1 / 3, 1 / 3, 1 / 3), (0.1, 0.1, 0.8), (0.1, 0.8, 0.1), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        for parts in itertools.product((0.0, 1.0), repeat=3):
            by_hand = weights[0] * parts[0] + weights[1] * parts[1] + weights[2] * parts[2]
            assert total_reward(*parts, weights) == pytest.approx(by_hand, abs=1e-15)
    assert total_reward(1.0, 1.0, 1.0) == 1.0 and total_reward(1.0, 0.0, 1.0) == pytest.approx(2 / 3)


def test_total_with_a_failed_evaluator():
    """nan is not 0: it shows in the total, unless consistency has no weight."""
    assert math.isnan(total_reward(1.0, 1.0, NAN))
    assert total_reward(0.0, 1.0, NAN, weights=(0.5, 0.5, 0.0)) == 0.5


def test_total_of_arrays():
    """(N, G) arrays and tensors: each element is what the three floats give."""
    rng = np.random.default_rng(0)
    parts = rng.integers(0, 2, (3, 4, 8)).astype(np.float32)  # fmt, acc, con: (N, G) = (4, 8)
    parts[2, 1, 5] = np.nan
    one_by_one = [[total_reward(*map(float, parts[:, n, g])) for g in range(8)] for n in range(4)]
    for total in (total_reward(*parts), total_reward(*torch.from_numpy(parts)).numpy()):
        assert total.shape == (4, 8)
        np.testing.assert_allclose(total, one_by_one, rtol=1e-6)
    assert total_reward(*parts, weights=(0.0, 1.0, 0.0)).tolist() == parts[1].tolist()


@pytest.mark.parametrize("unit", ["<think>", "</think>", "<think></think>", "<answer>", "<", " ", "x", "A) ", "(a", "\n."])
def test_a_million_characters(unit):
    """The time is linear in the text, whatever it holds: 10^6 characters take milliseconds, quadratic would take hours."""
    noise = unit * (10**6 // len(unit))
    began = time.process_time()
    for text in (noise, f"<think>{noise}</think><answer>{noise}</answer>", f"<think>t</think>{noise}<answer>C</answer>"):
        parse_completion(text)
        format_reward(text)
        accuracy_reward(text, MODALITY)
        consistency_reward(text, MODALITY, "C")
    assert answer_letter(noise, MODALITY["options"]) is None
    assert time.process_time() - began < 2


# ---- grounding ---------------------------------------------------------------------------------------------------------------

def test_gold_thoughts_are_true_of_their_pictures_alone(world):
    """Every sentence of a gold thought is read as a statement and true; of a picture that differs in everything none is."""
    for r in world.records:
        told = statements(r["thought"], r["shows"])
        assert len(told) == r["thought"].count(".") and all(told.values()), r["thought"]
        assert grounding(r["thought"], r["shows"]) == dict(grounding=1.0, false_statements=[])
    one = dict(modality="MRI", anatomy="Brain", lesion="cyst", style="cystic", location="Left Upper")
    for r in world.records:
        shows = r["shows"]
        apart = [one[key] != shows[key] for key in one]
        if all(apart) and (shows["lesion"] is None or r["task"] != "anomaly"):
            assert not any(statements(r["thought"], one).values()), r["thought"]


@pytest.mark.parametrize("sentence, true", [
    ("There is a thick rim in the Left Upper", True), ("There is a thick rim in the Right Upper", False),
    ("There is a smooth blob in the Left Upper", False), ("There is no lesion", False), ("A lesion is seen", True),
    ("There is a thick rim in the Right  Upper", False), ("There is a thick\trim in the Left Upper", True),
    ("This fits abscess", True), ("This fits cyst", False), ("This is not a cyst", True), ("No abscess", False),
    ("So the image is Abnormal", True), ("So the image is Normal", False), ("So the image is Uncertain", False),
    ("soft tissue and dark bone suggest MRI", True), ("Soft tissue and white bone suggest MRI", False),
    ("Bright vessels and soft tissue suggest CE-MRI", False), ("The region is Brain", True),
    ("The region is Lung", False), ("So the lesion lies in the Left Upper", True), ("I look at it well", None)])
def test_what_a_sentence_says_of_a_picture(sentence, true):
    """One lesion in an MRI of the brain, sentence by sentence; None: it states nothing that can be checked."""
    shows = dict(modality="MRI", anatomy="Brain", lesion="abscess", style="ring", location="Left Upper")
    told = statements(f"{sentence}. ", shows)
    assert told == ({} if true is None else {sentence: true})
    assert grounding(f"{sentence}!", shows)["false_statements"] == ([sentence] if true is False else [])


def test_nothing_known_is_no_grounding():
    """No thought, no "shows", no statement: nan, and no false sentence."""
    shows = dict(modality="MRI", anatomy="Brain", lesion=None, style=None, location=None)
    for thought, picture in ((None, shows), ("The region is Lung.", None), ("Well.", shows)):
        found = grounding(thought, picture)
        assert math.isnan(found["grounding"]) and found["false_statements"] == []
    assert grounding("No lesion. The region is Lung. It is MRI.", shows)["grounding"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("mode, text", [("after", "<answer>B</answer><think> </think>"), ("before", "<think> </think><answer>B</answer>")])
def test_an_empty_thought_is_no_format(mode, text):
    assert parse_completion(text, mode) == (None, "B") and format_reward(text, mode) == 0
