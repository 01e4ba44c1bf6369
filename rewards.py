"""The reward of Con-GRPO, Eqs. (3)-(6): a completion's text is taken apart, then scored three times.

    completion -> parse_completion -> (thought, answer) -> answer_letter -> "A".."F"
    R(Y) = l_fmt R_fmt(Y) + l_acc R_acc(A, A*) + l_con R_con(T, A, Q)                                     Eq. (3)

Format, accuracy and consistency are separate rewards: text after the answer block costs the format, not the accuracy. Parsing
counts and finds the four tags and nothing else, so its time is linear in the text's length, whatever the text.

Left out on purpose: partial credit, length rewards, and any guess at an answer outside its tags (a "B" somewhere in the
text is no answer). F, the evaluator of Eq. (6), lives in judge.py; here only its verdict is compared.
"""

import math
import re

from data import LETTERS

TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # in this order, each exactly once; case matters
WEIGHTS = (1 / 3, 1 / 3, 1 / 3)  # lambda_fmt, lambda_acc, lambda_con of Eq. (3)

# "(b)", "b)", "b.", "b:" or "b" alone, then what follows the label; matched against folded text
LABELLED = re.compile(r"(?:\(([a-z])\)|([a-z])(?:\)|(?=[.:]|$)))[.:]? ?(.*)")


def split_blocks(text, thinking="before"):
    """text -> (thought or None, answer or None, well_formed): the one place that reads the tags; see parse_completion."""
    open_think, close_think, open_answer, close_answer = (text.find(t) if text.count(t) == 1 else -1 for t in TAGS)
    has_think = 0 <= open_think < close_think
    has_answer = 0 <= open_answer < close_answer
    blocks = sorted([(open_think, close_think)] * has_think + [(open_answer, close_answer)] * has_answer)
    turned = thinking != "none" and (thinking == "after") != (open_answer < open_think)
    if len(blocks) == 2 and (turned or blocks[0][1] > blocks[1][0]):  # in the wrong order, or one block inside the other
        return None, None, False
    thought = text[open_think + len(TAGS[0]):close_think].strip() if has_think else ""
    answer = text[open_answer + len(TAGS[2]):close_answer].strip() if has_answer else ""
    wanted = {"before": [thought, answer], "after": [answer, thought], "none": [answer]}[thinking]
    outside, end = "", 0
    for start, close in blocks:
        outside, end = outside + text[end:start], text.index(">", close) + 1
    well_formed = all(wanted) and len(blocks) == len(wanted) and not (outside + text[end:]).strip()
    return thought or None, answer or None, well_formed


def parse_completion(text, thinking="before"):
    """A completion's text -> (thought T, answer A), stripped strings, either may be None.

    A block counts when its opening and its closing tag occur exactly once in the text, in that order, with something other
    than whitespace between them. So:
      well formed                                     (thought, answer)
      text before, between or after the blocks        (thought, answer), the format reward alone is lost
      one block missing, unclosed, repeated or empty  that one is None, the other is still returned
      answer before thought, or nested or crossing    (None, None)

    thinking, here and below, is Med-R1's ablation: "after" expects the answer first, "none" no thought.
    """
    return split_blocks(text, thinking)[:2]


def fold(text):
    """Case, runs of whitespace and trailing punctuation forgiven; nothing else."""
    return " ".join(text.casefold().split()).rstrip(" .,;:!?")


def answer_letter(answer, options):
    """What the answer block says -> the letter of one of `options` (list of str), or None.

    Every reading of the whole answer is collected: a label ("B", "b.", "(B)"), a label with its option's text ("B) CT",
    "B. CT", "(B) CT"), an option's text alone. One letter read: that letter. None, or several ("A or B", "B) <text of C>"), or
    a letter beyond the options: None, so an option whose text is itself a letter may be undecidable. Nothing is searched for
    inside the answer: "normal" can match neither "abnormal" nor "no".
    """
    if answer is None:
        return None
    said = fold(answer)
    texts = dict(zip(LETTERS, map(fold, options), strict=False))  # letter -> folded text
    read = {letter for letter, text in texts.items() if text == said}
    if m := LABELLED.fullmatch(said):
        label, rest = (m[1] or m[2]).upper(), m[3]
        named = {letter for letter, text in texts.items() if text == rest}
        if named or not rest:
            read |= named | {label}  # a label and a text that disagree are two readings
    return read.pop() if len(read) == 1 and read <= texts.keys() else None


def format_reward(text, thinking="before"):
    """R_fmt, Eq. (4): 1.0 if the text is one think block and then one answer block, neither empty, and whitespace; else 0.0."""
    return float(split_blocks(text, thinking)[2])


def accuracy_reward(text, item):
    """R_acc, Eq. (5): I(A = A*), with A the letter of the answer block and A* the record's `answer`; 0.0 without a letter."""
    _, answer = parse_completion(text, item.get("thinking", "before"))
    return float(answer_letter(answer, item["options"]) == item["answer"])


def consistency_reward(text, item, verdict):
    """R_con, Eq. (6): I(F(T, Q) = A), with `verdict` = F's letter, None (F is undecided) or nan (F failed: no reply).

    A is the completion's own answer, right or wrong. No thought: 0.0, there was nothing for F to read; but nan where none was
    asked for. Else a failed F: nan, since a judge's failure is not the policy's. Else no letter or an undecided F: 0.0.
    """
    thinking = item.get("thinking", "before")
    thought, answer = parse_completion(text, thinking)
    if thinking == "none":
        return math.nan
    if thought is None:
        return 0.0
    if isinstance(verdict, float) and math.isnan(verdict):
        return math.nan
    return float(verdict is not None and verdict == answer_letter(answer, item["options"]))


def total_reward(fmt, acc, con, weights=WEIGHTS):
    """R(Y), Eq. (3): the weighted sum, for floats or, element by element, arrays or tensors of one shape, (N, G) say.

    nan in `con` gives nan: a missing part must not pass for a 0. A part of weight 0 is left out altogether, so that Acc-only
    training does not depend on F.
    """
    return sum((w * r for w, r in zip(weights, (fmt, acc, con), strict=True) if w), start=0.0 * fmt)
