"""The reward of Con-GRPO, Eqs. (3) to (6): a question's text, and what a completion is worth.

A completion is taken apart into thought T and answer A, and scored for format, accuracy and
consistency, independently of one another: text beside the blocks costs the format, not the
accuracy. F of Eq. (6) is here a set of rules, `lexical_verdict`; judge.py has models for it.
An `item` is a record (data.py). Whatever the text, the time is linear in its length. At the end,
for eval.py alone: answers outside our tags, and whether a thought is true of its phantom.

Left out on purpose: partial credit, length rewards, any reward for an answer outside its tags.
"""

import math
import re

from data import ANATOMIES, KINDS, LETTERS, LOCATIONS, SIGNS, STATES, STYLES, TAGS, expect, fold

INSTRUCTIONS = {  # by --thinking: where the thought stands (Med-R1's ablation)
    "before": "First think in <think></think>, then give the letter in <answer></answer>.",
    "none": "Give the letter in <answer></answer>.",
    "after": "First give the letter in <answer></answer>, then say why in <think></think>.",
}
FORMS = {  # of a target (gap is nothing), and of a well-formed completion (gap is any whitespace)
    "before": "<think>{thought}</think>{gap}<answer>{answer}</answer>",
    "none": "<answer>{answer}</answer>",
    "after": "<answer>{answer}</answer>{gap}<think>{thought}</think>",
}
WEIGHTS = (1 / 3, 1 / 3, 1 / 3)  # lambda_fmt, lambda_acc, lambda_con of Eq. (3)
COPIED = ("id", "task", "modality", "question", "options", "answer")  # from a record into its row

# ---- the text of a question and of its target ----------------------------------------------------

def thinking_of(record):
    return record.get("thinking", "before")


def options_text(options):
    """Texts -> a line for each: "A) text"."""
    return "".join(f"{letter}) {text}\n" for letter, text in zip(LETTERS, options, strict=False))


def question_text(record):
    """The user's message: question, options, how to answer."""
    options, instruction = options_text(record["options"]), INSTRUCTIONS[thinking_of(record)]
    return f"{record['question']}\n{options}{instruction}"


def answer_text(record):
    """Y* of Eq. (1): "<think>T*</think><answer>A*</answer>", in the other order or without the
    thought if the record's `thinking` says so. DataError if a thought is needed and missing."""
    thinking, thought = thinking_of(record), record["thought"]
    expect(thinking == "none" or thought is not None,
           f"record {record['id']!r} has no thought, which supervised fine-tuning needs")
    return FORMS[thinking].format(thought=thought, answer=record["answer"], gap="")


# ---- a completion, taken apart -------------------------------------------------------------------

def find_block(text, name):
    """The match of <name>..</name> where the two tags occur once and in order, else None."""
    once = text.count(f"<{name}>") == text.count(f"</{name}>") == 1
    return re.search(f"<{name}>(.*)</{name}>", text, re.DOTALL) if once else None


def parse_completion(text, thinking="before"):
    """A completion's text -> (thought T, answer A), stripped strings, either may be None.

    A block counts when its two tags occur once each, in order, with more than whitespace between
    them. Both are None where the blocks overlap, or are not in the order that `thinking` asks for
    ("none" asks for no order). Text around the blocks does no harm here.
    """
    think, answer = find_block(text, "think"), find_block(text, "answer")
    if think and answer:
        think_first, answer_first = think.end() <= answer.start(), answer.end() <= think.start()
        allowed = dict(before=think_first, after=answer_first, none=think_first or answer_first)
        if not allowed[thinking]:
            return None, None
    thought = think[1].strip() if think else ""
    said = answer[1].strip() if answer else ""
    return thought or None, said or None


# "(b)", "b)", "b.", "b:" or "b" alone, then what follows the label; matched against folded text
LABELLED = re.compile(r"(?:\(([a-z])\)|([a-z])(?:\)|(?=[.:]|$)))[.:]? ?(.*)")


def answer_letter(answer, options):
    """What the answer block says -> the letter of one of `options` (list of str), or None.

    It is a label ("B", "b.", "(B)"), a label with its option's text ("B) CT", "B. CT"), or an
    option's text. None for none of these or several ("A or B", "B) <text of C>"). Nothing is
    searched for inside the answer: "normal" can match neither "abnormal" nor "no".
    """
    if answer is None:
        return None
    said = fold(answer)
    label = LABELLED.fullmatch(said)
    label_letter, rest = ((label[1] or label[2]).upper(), label[3]) if label else ("", "")
    fitting = []
    for letter, text in zip(LETTERS, map(fold, options), strict=False):
        if said == text or (label_letter == letter and rest in ("", text)):
            fitting.append(letter)
    return fitting[0] if len(fitting) == 1 else None


def read(text, item):
    """A completion on a record's question -> (thought or None, the answer's letter or None)."""
    thought, answer = parse_completion(text, thinking_of(item))
    return thought, answer_letter(answer, item["options"])


# ---- the rewards ---------------------------------------------------------------------------------

def format_reward(text, thinking="before"):
    """R_fmt, Eq. (4): 1.0 if the text is the blocks that `thinking` asks for, in order and not
    empty, and nothing else (the paper asks only that they are there); else 0.0."""
    thought, answer = parse_completion(text, thinking)
    complete = answer and (thought or thinking == "none")
    form = FORMS[thinking].format(thought=".*", answer=".*", gap=r"\s*")
    return float(bool(complete and re.fullmatch(form, text.strip(), re.DOTALL)))


def accuracy_reward(text, item):
    """R_acc, Eq. (5): I(A = A*), A the answer block's letter, A* the record's; 0.0 without one."""
    _, letter = read(text, item)
    return float(letter == item["answer"])


def consistency_reward(text, item, verdict):
    """R_con, Eq. (6): I(F(T, Q) = A); verdict: F's letter, None (undecided) or nan (F failed).

    A is the completion's own answer, right or wrong. 0.0 also if thought, answer or verdict is
    None; nan if no thought was asked for, or if F failed on it: that is not the policy's failure.
    """
    thought, letter = read(text, item)
    if thinking_of(item) == "none" or (thought is not None and failed(verdict)):
        return math.nan
    return float(thought is not None and letter is not None and letter == verdict)


def total_reward(fmt, acc, con, weights=WEIGHTS):
    """R(Y), Eq. (3): the weighted sum of floats, or of arrays or tensors of one shape, (N, G) say.

    nan in `con` gives nan: it must not pass for a 0. A part of weight 0 is left out, so that the
    reward of Acc-only training does not depend on F.
    """
    parts = zip(weights, (fmt, acc, con), strict=True)
    return sum((weight * part for weight, part in parts if weight), start=0.0 * fmt)


def failed(value):
    """Whether it is nan, which alone differs from itself: no verdict, no reply, or no figure."""
    return value != value


def score(texts, items, judge):
    """n completions and their records -> n rows (dicts) with Eqs. (4) to (6).

    A row: COPIED of the record; completion, and what was read from it: thought, given (the answer's
    letter or None), verdict (F's letter, None or nan); fmt, acc, con (floats; con may be nan).
    judge: see `judge.make_judge`; asked once.
    """
    readings = [read(text, item) for text, item in zip(texts, items, strict=True)]
    verdicts = judge([thought for thought, _ in readings], items)
    rows = []
    for text, item, (thought, given), verdict in zip(texts, items, readings, verdicts, strict=True):
        rows.append({key: item[key] for key in COPIED} | dict(
            completion=text, thought=thought, given=given, verdict=verdict,
            fmt=format_reward(text, thinking_of(item)), acc=accuracy_reward(text, item),
            con=consistency_reward(text, item, verdict)))
    return rows


# ---- what F may see of a thought (the patterns meet text whose blanks are single) ----------------

# What names an option by letter (the one group that matched) or by place (no group matched).
LABEL = re.compile(r"""
    [(\[{"'`*_“‘]{1,2}\s?([a-f])\s?[)\]}"'`*_”’]{1,2}         # "(B)", "[b]", "{B}", "**B**"
  | \b(?:option|choice|answer|letter)\s(a)\b                  # elsewhere "a" may be the article
  | \b(?:option|choice|answer|ans)[_:=-]([b-f])(?![^\W_]|-|\.\w)  # "option-B", "answer:B"
  | \b(?:option|choice|answer|ans)[_:=-](a)(?=\s?(?:[.,:;!?\n]|$))
  | \b(?:option|choice|answer)[\s_-](?:\#|no\.?\s|number\s)?
        (?:[1-6]|one|two|three|four|five|six)\b
  | \b(?:first|second|third|fourth|fifth|sixth|last|1st|2nd|3rd|[4-6]th)
        \s(?:option|choice|answer)\b
  # letters alone, not joined to something as in "B-lines", "H&E", "d'orange", "C+", "e.g."
  | (?<!\w) (?<!\w['’&-]) (?<!\b\w\.) (?:
        ([b-f])\)? (?:['’]s\b)? (?![^\W_]|['’&-]\w|\+|\.\w\b)  # "B", "B) CT": no words
      | (a) (?:\)|(?=\s?(?:[.,:;!?\n]|$)))                    # "is a.", "A) CT": no articles
      | (a) (?=\s(?:is|was|and|or|fits|it\sis|therefore)\b)
      | (?<=(?-i:[a-z,:])\s)((?-i:A))(?![\w'’-]) )            # "it is A": no sentence begins here
""", re.VERBOSE | re.IGNORECASE)
CUT = "\0"  # put where a label was; `mentions` also puts it around a name's number
STATEMENT = re.compile(r"""  # of nothing but the letter: "so the correct answer is B"
    (?:\b(?:so|thus|hence|therefore),?\s)? (?:\b(?:the|my)\s)?
    (?:\b(?:correct|right|best|final)\s)? \b(?:answer|option|choice|letter)
    (?:\s(?:is|was|must\sbe))? \s?[:=]?\s? \0 (?=\s?(?:[.,;!?\n]|$))
""", re.VERBOSE | re.IGNORECASE)
# A CUT and what goes with it: the full stop of a sentence that is all cut, else one blank.
GAP = re.compile(r"(?m:^)\0[.,;:!?]? ?|(?<=[.!?;]) ?\0[.,;:!?]?| ?\0(?=[.,;:!?\n ]|$)|\0 ?")


def single_blanks(text):
    """Runs of blanks made one; line ends stay."""
    return re.sub(r"[^\S\n]+", " ", text.replace(CUT, " "))


def replace_labels(thought, options, replace):
    """The thought, blanks single, with replace(match) for what LABEL finds, save the letters in the
    very words of an option that is more than a label, as "Hepatitis B" is."""
    thought, own = single_blanks(thought).strip(), set()  # places in the thought
    for option in options:
        words = " ".join(option.split()).rstrip(" .,;:!?")
        if STATEMENT.sub("", LABEL.sub(CUT, words)).strip(CUT):  # "Option B" is a label alone
            for found in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", thought, re.IGNORECASE):
                own.update(range(*found.span()))

    def replaced(label):
        start, end = label.span(label.lastindex or 0)  # of the letter alone
        return label[0] if {start, end - 1} <= own else replace(label)
    return LABEL.sub(replaced, thought)


def visible_thought(thought, options):
    """What F sees of a thought on a question with these options -> (text, was_cut: bool).

    Cut are the options' letters, places ("the second option") and answer statements with nothing
    else in them ("so the answer is B"): spelling the letter would make Eq. (6) hold whatever was
    thought. "(A) MRI" becomes "MRI"; articles and the letter in an option's own words stay, another
    term's letter goes. What LABEL doesn't know stays ("B1", "bee").
    """
    marked = STATEMENT.sub(CUT, replace_labels(thought, options, lambda label: CUT))
    return GAP.sub("", marked).strip(), CUT in marked


def spelled_out(thought, options):
    """The thought with its letters replaced by their options' texts, for an F that may see them."""
    texts = dict(zip(LETTERS, options, strict=False))

    def text_of(label):
        letter = label[label.lastindex].upper() if label.lastindex else None  # "second option"
        return f" {texts[letter]} " if letter in texts else label[0]
    return replace_labels(thought, options, text_of)


# ---- F by rules ----------------------------------------------------------------------------------

NEGATION = r"no|not|never|neither|nor|none|cannot|without|rather than|instead of"
DENIES_REST = re.compile(rf"\b(?:{NEGATION})\b|n['’]t\b")  # the rest of its clause
DENIES_ALL = re.compile(r"\b(?:excluded|ruled out|unlikely|absent)\b")  # its whole clause
MENTION = re.compile(rf"""  # a name's number; what denies this one alone stands before or behind it
    (\b(?:rules?\ out|ruling\ out|excludes?|excluding|absence\ of|free\ of|negative\ for
    |anything\ but)\s(?:an?\s|any\s|the\s)?)?
    {CUT}(\d+){CUT} (\s(?:is|was|would\ be)\s(?:wrong|incorrect)\b)?""", re.VERBOSE)
CLAUSE_END = re.compile(
    r"[,:]|\b(?:(?<!anything )but|however|though|while|whereas|so|therefore|thus|hence|because)\b")
# For judge.faults: a denial reaches over a list, "no cyst, glioma or abscess". F would then take
# "No lesion, Normal" for a denial of Normal.
LIST_END = re.compile(CLAUSE_END.pattern.replace("[,:]", r":|,(?= (?:and|with)\b)"))
SENTENCE_END = re.compile(r"[!?;\n]|\.(?!\d)")


def mentions(text, names, clause_end=CLAUSE_END):
    """Where a text names `names` (list of str; single characters are none), in order.

    -> [(number of the sentence, name, denied: bool)]. Denied: behind a negation in its clause, in a
    clause that calls something unlikely or excluded, or as in "absence of a cyst" and "cyst is
    wrong". Names are whole words, and a hyphen joins: "mri" is not in "ce-mri".
    """
    folded = {fold(name): name for name in names if len(fold(name)) > 1}
    if not folded:
        return []
    patterns = []
    for name in sorted(folded, key=len, reverse=True):  # the longest where several fit
        # An option that is a negation must end its clause: "no" is not in "no lesion".
        end = r"(?=\s?(?:[.,:;!?\n]|$))" if re.fullmatch(NEGATION, name) else ""
        patterns.append(re.escape(name) + end)
    # Whole words; "5 mm" is not in "2.5 mm", nor "grade 2" in "grade 2.5".
    named = re.compile(rf"(?<![\w–-])(?!(?<=\d[.,])\d)(?:{'|'.join(patterns)})"
                       r"(?![\w–-]|(?<=\d)[.,]\d)")
    order, found = list(folded), []
    # Names first become numbers: one may hold a comma, or the word "no".
    text = single_blanks(text).casefold()
    text = named.sub(lambda m: f"{CUT}{order.index(m[0])}{CUT}", text)
    for number, sentence in enumerate(SENTENCE_END.split(text)):
        for clause in clause_end.split(sentence):
            denial = DENIES_REST.search(clause)
            denied_from = denial.start() if denial else len(clause)
            if DENIES_ALL.search(clause):
                denied_from = 0
            for m in MENTION.finditer(clause):
                denied = m.start(2) >= denied_from or m[1] or m[3]
                found.append((number, folded[order[int(m[2])]], bool(denied)))
    return found


def lexical_verdict(thought, item, sees_letters=False):
    """F(T, Q) by rules -> the letter of the option that the thought supports, or None.

    An option's last mention affirms or denies it. The verdict is the affirmed option whose last
    mention comes in the latest sentence, None if several share that sentence. sees_letters: an
    option's letter counts as its text.

    It knows words, no medicine and little English. It misses an option's words in another order,
    number or hyphenation ("upper left", "cysts", "x ray"), a lesion as Abnormal, denials such as
    "no cyst, glioma or abscess" (of all three) or "a cyst cannot be seen", "no doubt", double
    negation, hedges, questions. Real thoughts deserve a model as F.
    """
    text = spelled_out(thought, item["options"]) if sees_letters else thought
    stands = {}  # option -> number of the sentence that affirmed it last
    for sentence, option, denied in mentions(text, item["options"]):
        if denied:
            stands.pop(option, None)
        else:
            stands[option] = sentence
    last = max(stands.values(), default=None)
    decided = [option for option, sentence in stands.items() if sentence == last]
    return LETTERS[item["options"].index(decided[0])] if len(decided) == 1 else None


# ---- the answer of a model that was not trained here, never read so for a reward -----------------

# Of Markdown, LaTeX, templates: "**B**", "\\boxed{B}", "<|begin_of_box|>B<|end_of_box|>".
DECORATION = re.compile(r"</?(?:think|answer)>|<\|[^<|>]*\|>|\\(?:boxed|text)\b|[*_`#>${}]|^ *[-•]")
THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
# Sentences part only before three words or more: "B. CT" is a label and its option.
SENTENCE = re.compile(r"\n|(?<=[.!?;]) (?=\S+ \S+ \S)")
# What a sentence without "if" calls the answer: "the answer is ..", "correct option: .."
STATED = re.compile(r"^(?!.*\b(?:if|unless|were)\b).*"
                    r"\b(?:(?:(?<!wrong )(?<!incorrect )answer|letter"
                    r"|(?:correct|right|best|most (?:appropriate|likely)) (?:option|choice))"
                    r"(?:(?: is| (?:would|should|must) be):? |: ?)"
                    r"|\bI(?: would|['’]d)? (?:choose|select|pick|go with) )(?:option )?"
                    r"(.+?)(?:,? (?:because|since)\b.*|, (?:as|which) .*)?$", re.IGNORECASE)
ALONE = re.compile(r"(?:option )?\W*([a-f])\W*(?: is (?:correct|right)\W*)?", re.IGNORECASE)


def plain(text):
    """Without decoration, blanks single."""
    return " ".join(DECORATION.sub("", text).split())


def letters_stated(line, options):
    """-> the letters that a line gives alone ("(B)", "Option B", "B is correct.") or as "the answer
    is B", a set."""
    alone = ALONE.fullmatch(line)
    said = [alone[1]] if alone else []
    for sentence in SENTENCE.split(line):
        said += STATED.findall(sentence)
    return {answer_letter(x, options) for x in said} - {None}


def read_leniently(text, item):
    """A completion -> (thought, letter, how it was read); thought and letter may be None.

    tags         the answer block says it, and nothing outside is looked at
    last line    it is a letter alone ("B", "**B**", "B is correct.") or says "The answer is
                 (B)."; if not, some other lines are or say so, and agree
    option text  no line is or says so; lines that are an option ("CT", "B) CT") agree
    unreadable   no letter or several; nothing in or behind an unfinished thought is an answer
    """
    if "</think>" in text and "<think>" not in text.partition("</think>")[0]:
        text = "<think>" + text  # a template has opened it
    thought, answer = parse_completion(text, thinking_of(item))
    letter = answer_letter(answer, item["options"])
    if letter:  # a thought in other tags than ours, or in none, is what stands beside the answer
        beside = re.sub(r"<answer>.*</answer>|</?think>", " ", text, flags=re.DOTALL).strip()
        return thought or beside or None, letter, "tags"
    options = [plain(option) for option in item["options"]]
    lines = [plain(line) for line in (answer or THOUGHT.sub("", text)).splitlines()]
    lines = [line for line in lines if line] or [""]
    stated = [letters_stated(line, options) for line in lines]
    letters, how = stated[-1] or set().union(*stated), "last line"
    if not letters:
        letters, how = {answer_letter(line, options) for line in lines} - {None}, "option text"
    if len(letters) != 1:
        return thought, None, "unreadable"
    if thought is None and not answer and how == "last line":  # what states no letter
        sentences = SENTENCE.split("\n".join(lines))
        thought = " ".join(x for x in sentences if not letters_stated(x, options))
    return thought, letters.pop(), "tags" if answer else how


def score_leniently(texts, items, judge):
    """`score` of what read_leniently finds; only fmt is of the text itself. A row also has read_as,
    how it was read: "failed" for a text that is nan (no reply came); fmt, acc, con are nan then."""
    came = ["" if failed(text) else text for text in texts]
    readings = [read_leniently(text, item) for text, item in zip(came, items, strict=True)]
    tagged = []  # the same in our tags; loose ones inside a thought would break them
    for item, (thought, letter, _) in zip(items, readings, strict=True):
        thought = re.sub("|".join(TAGS), " ", thought or "")
        tagged.append(answer_text(dict(item, thought=thought, answer=letter or "")))
    rows = score(tagged, items, judge)
    for text, row, item, (_, _, how) in zip(texts, rows, items, readings, strict=True):
        if failed(text):
            row |= dict(completion="", fmt=math.nan, acc=math.nan, con=math.nan, read_as="failed")
        else:
            row |= dict(completion=text, fmt=format_reward(text, thinking_of(item)), read_as=how)
    return rows


# ---- is the thought true? ------------------------------------------------------------------------

CLAIMS = {fold(name) for names in (  # what a sentence may say of a phantom
    ["lesion"], STATES, SIGNS, *(signs.split(" and ") for signs in SIGNS.values()), ANATOMIES,
    LOCATIONS, STYLES.values(), *KINDS.values()) for name in names}  # SIGNS' keys are modalities


def statements(thought, shows):
    """A thought and what its picture shows (a record's "shows") -> {sentence: is it true?}.

    A statement names something of CLAIMS. It is true if all that it affirms holds and nothing that
    it denies does. Other sentences are left out.
    """
    state = ("lesion", "Abnormal") if shows["lesion"] else ("Normal",)
    signs = SIGNS.get(shows["modality"], "").split(" and ")
    style = STYLES.get(shows["style"])
    holding = {fold(x) for x in (*state, *signs, style, *shows.values()) if x}
    so_far = {}  # number of a sentence -> whether all that it says so far is true
    for number, name, denied in mentions(thought, CLAIMS):
        right = name not in holding if denied else name in holding
        so_far[number] = so_far.get(number, True) and right
    sentences, told = SENTENCE_END.split(thought), {}
    for number, holds in so_far.items():
        sentence = sentences[number].strip()  # may stand there twice, as in "It is. It is."
        told[sentence] = told.get(sentence, True) and holds
    return told


def grounding(thought, shows):
    """-> {"grounding": share of the statements that are true, "false_statements": the others}; nan
    and none where there is no statement, or no thought or no "shows" (None)."""
    told = statements(thought, shows) if thought and shows else {}
    share = sum(told.values()) / len(told) if told else math.nan
    return dict(grounding=share, false_statements=[x for x, true in told.items() if not true])
