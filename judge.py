"""F, the evaluator of Eq. (6): which option does a thought support, read without the image and without the answer?

    judge = make_judge("lexical")
    judge(thoughts, items) -> for each thought one of "A".."F", None (undecided) or nan (the evaluator itself failed)

F sees what `visible_thought` leaves: the option letters are cut, because a thought that ends in "so the answer is B" would make
Eq. (6) hold whatever was thought. sees="raw" hands the thought over whole, as the paper prints it.

`lexical` is a deterministic evaluator, for training without a second model: an option is supported where its text is affirmed,
and the last sentence that affirms one decides. It knows words and negation, and no medicine: "computed tomography" is no "CT".
Left out on purpose: synonyms, double negation, hedges ("may be a cyst" counts as a cyst). No pattern here spans more than a few
words, so the time is linear in the thought's length, whatever the thought.
"""

import re
from bisect import bisect_right
from functools import lru_cache

from data import LETTERS, DataError

# ---- what F sees (the patterns meet text whose blanks are single) ------------------------------------------------------------

LETTER = re.compile(r"""
    (?<!\w)(?: (?P<keep> (?i:hepatitis|vitamins?|influenza|ha?emophilia|pugh|stanford|factor|type|grade|stage|class|group)
                         \s[A-Fa-f]\b
        | [A-F]\s(?:cells?|modes?|scans?|waves?|arm|spine|dimer)\b | E\.\s?coli\b | C\.\s?(?:difficile|albicans)\b )
      | (?i:first|second|third|fourth|fifth|sixth|last|1st|2nd|3rd|[4-6]th)\s(?i:option|choice|answer)\b
      | (?i:option|choice|answer|letter)(?:-|\s(?:\#|(?i:no\.?|number)\s)?)(?i:[1-6]|one|two|three|four|five|six|[b-f])\b
      | (?m:^)[A-Fa-f][.:)]\s                                      # "A. MRI" opening a line
      | (?<!\()[A-Fa-f]\)                                          # "B) CT"
      | (?<!['’°.+&-])(?<!\d\s)[B-Fb-f](?![\w'’+&]|-\w|\.[gfi]\b)    # a bare letter, not "e.g.", "C+", "B-lines", "37 C", "H&E"
      | (?<=[a-z,:]\s)A(?![\w'’+-])                                # "the answer is A": a capital A inside a sentence
      | (?<!['’°.+-])[Aa](?=\s?[.,:;!?)\n]|\s?$|\s-\s|\s(?:is|was|and|or|fits|matches|because)\b) )    # an A that is no article
  | [(\[{]\s?[A-Fa-f]\s?[)\]}]                                     # "(B)", "[b]", "{B}"
  | ["'`*“‘]{1,2}[A-Fa-f]["'`*”’]{1,2}                             # "B" in quotes or stars
""", re.VERBOSE)
EMPTIED = re.compile(r"""(?i)(?:\b(?:so|thus|hence|therefore),?\s)? (?:\b(?:the|my|our)\s)?
    (?:\b(?:correct|right|best|final)\s)? \b(?:answer|option|choice|letter)
    (?:\s(?:is|was|must\sbe|would\sbe|should\sbe))? \s?[:=-]?\s?\0(?=\s?[.,;!?\n]|\s?$)
""", re.VERBOSE)  # an answer statement with nothing but the letter, here \0, to state


def single_blanks(text):
    return re.sub(r"[^\S\n]+", " ", text.replace("\0", " ")).strip()


def visible_thought(thought):
    """What F sees of a thought -> (text, was_cut: bool).

    Cut: letters used as labels ("(B)", "B) CT", "option c", a lone "B"), answer statements that hold nothing else ("so the
    answer is B"), places among the options ("the second option"). Kept: what names the finding ("So the finding is cyst.",
    "the choice is MRI" of "the choice is (A) MRI"), "a" and "A" as articles, and letters of a term: after hepatitis, vitamin,
    type, grade, stage, class, group and a few more, before cell, mode, scan and the like, joined to something ("T1 C+",
    "B-lines"), behind a number ("37 C"), "E. coli". So "class B" smuggles a letter past, and "segment C" loses its C.
    """
    text = single_blanks(thought)
    marked = LETTER.sub(lambda m: m[0] if m["keep"] else "\0", text)
    if "\0" not in marked:
        return text, False
    marked = EMPTIED.sub("\0", marked)
    gaps = r"(?:^|(?<=[.!?;\n]) ?)\0[.,;:!?]?| ?\0(?=[.,;:!?\n ]|$)|\0 ?"  # a sentence that is gone takes its stop along
    return re.sub(gaps, "", marked).strip(), True


def letters_named(text, options):
    """[(position, letter)] of the letters that visible_thought would cut: what sees="raw" adds."""
    uses = ((m.start(), re.search(r"(?<!\w)[A-Fa-f](?!\w)", m[0])) for m in LETTER.finditer(text) if not m["keep"])
    return [(at, m[0].upper()) for at, m in uses if m and m[0].upper() in LETTERS[:len(options)]]


# ---- the lexical evaluator (the patterns meet lower case) --------------------------------------------------------------------

MARK = re.compile(r"""
    (?P<stop> [!?;\n] | \.(?!\d) )                                 # a sentence ends
  | (?P<pause> : | , (?!(?:\s\w+(?:[\s-]\w+)?,){0,3}(?:\s\w+(?:[\s-]\w+)?,?)?\s(?:or|nor)\b) )  # a denial ends, lists apart
  | \b(?: (?P<end> (?:but|however|although|though|while|whereas|yet|instead(?!\sof)|so|therefore|thus|hence|then|because
        |since)\b | and\s(?=(?:the|there|it|this|that|is|are|\w+\sis)\b) )
    | (?P<back> (?<!not\s)(?:is|are|was|were|be|been|seems?|looks?|appears?)\s(?:(?!not)\w+\s)?    # denies what precedes too
        (?:excluded|ruled\sout|absent|unlikely(?!\sto)|less\slikely|implausible|missing)\b
      | (?:(?:is|are|was|were)(?:\s\w+)?(?:\snot|n['’]t)|can(?:not|\snot|['’]t)\sbe)\s(?:seen|present|visible|found|identified
        |evident|detected|likely|possible|supported|the\s(?:answer|diagnosis|finding))\b )
    | (?P<deny> (?:no(?!\sdoubt)|not(?!\s(?:only|just|excluded|ruled))|cannot|never|neither|nor|none|nothing
        |without(?!\sdoubt)|absen(?:t|ce)|lack(?:s|ing)?|free\sof|rather\sthan|instead\sof|as\sopposed\sto|exclud(?:e|es|ed|ing)
        |rul(?:e|es|ed|ing)\sout|(?:argues?|speaks?|evidence)\sagainst|unlike(?:ly\sto)?|negative\sfor|if|whether
        |(?:is|are|was|were|do|does|did|has|have|ca|could|would)n['’]t)\b ) )
""", re.VERBOSE)
PLACE = re.compile(r"\b(?:in|on|at|within|inside|near|from|by|for|over|under|through)\b")
FINDING = re.compile(r"""(?<![\w-])(?:(?P<good>normal|healthy|unremarkable)|abnormal(?:ity|ities)?|anomal(?:y|ies|ous)|lesions?
    |mass(?:es)?|nodules?|cysts?|tumou?rs?|(?!stroma)\w{2,20}oma|patholog(?:y|ies|ical)|diseased?|defects?|opacit(?:y|ies)|growths?
    |fractures?|irregular(?:ity|ities)?|unusual)(?![\w-])""", re.VERBOSE)
REST = re.compile(r"\b(?:rest|others?|otherwise|elsewhere|remaining|remainder|further|additional|second)\b")
ARTICLE = re.compile(r"(?:(?:it|this|the image) is )?(?:an? )?")
GOOD = {"no", "none", "normal", "healthy", "unremarkable", "no abnormality", "no anomaly", "no lesion", "no finding"}
BAD = {"yes", "abnormal", "abnormality", "anomaly", "lesion", "abnormality present", "anomaly present", "lesion present"}
FILLERS = set("a an the of in and or to with region area part image imaging".split())  # say nothing about which option


@lru_cache(maxsize=4096)
def option_pattern(option):
    """A word-anchored pattern of an option's text, blank for hyphen and plural for singular forgiven; None for a single letter.

    A hyphen joins: "MRI" is not in "CE-MRI", nor "cyst" in "cyst-like". The option "no" is not the "no" of "no lesion".
    """
    text = option.lower().strip(" \t\n.,;:!?")
    if len(text) < 2:
        return None
    stem, plural = text, ""
    if len(text) > 3 and text[-3:].isalpha():
        stem, plural = text[:-1] if text[-1] == "s" and text[-2] not in "sui" else text, "(?:e?s)?"
    tail = r"(?=\s?[.,;:!?\n]|\s?$)" if text == "no" else r"(?![\w-])"
    return re.compile(r"(?<![\w-])" + r"[\s-]".join(map(re.escape, re.split(r"[\s-]+", stem))) + plural + tail)


def mentions(text, options):
    """[(start, letter)] of the options' texts in `text`, in order; of those that overlap the first, then the longest."""
    found = [(m.start(), -m.end(), letter) for letter, option in zip(LETTERS, options, strict=False)
             if (pattern := option_pattern(option)) for m in pattern.finditer(text)]
    kept, end = [], 0
    for start, minus_end, letter in sorted(found):
        if start >= end:
            kept.append((start, letter))
            end = -minus_end
    return kept


def standing(text):
    """text -> a function: position -> (sentence number, True affirmed | False denied | None left open).

    Left open: what a question asks, and the X of "no lesion in the X", which denies the lesion and not that X is shown.
    """
    stops, starts, ends, clause, denial = [], [], [], 0, None  # stops: where sentences end; starts, ends: of what is denied
    for m in MARK.finditer(text + "\n"):
        if m.lastgroup == "back":
            denial = clause if denial is None else denial
        elif m.lastgroup == "deny":
            denial = m.end() if denial is None else denial
        else:
            if denial is not None:
                starts.append(denial)
                ends.append(m.start())
            if m.lastgroup == "stop":
                stops.append(m.start())
            clause, denial = m.end(), None

    def at(position):
        s, d = bisect_right(stops, position), bisect_right(starts, position) - 1
        if text[stops[s]:stops[s] + 1] == "?":
            return s, None
        if d < 0 or position >= ends[d]:
            return s, True
        return s, None if PLACE.search(text, max(starts[d], position - 60), position) else False
    return at


def polar_letters(item):
    """-> (letter of the option that says all is well, letter of the one that says something is there), either may be None.

    "yes" and "no" take their meaning from the question; where it does not ask about normality as such they have none here.
    """
    core = [o.lower().strip(" .") for o in item["options"]]
    core = [o[ARTICLE.match(o).end():] for o in core]
    good, bad = ([x for x, o in zip(LETTERS, core, strict=False) if o in words] for words in (GOOD, BAD))
    if {"yes", "no"} & set(core):
        question = item.get("question", "").lower()
        if re.search(r"\b(?:normal|healthy|free|unremarkable)\b", question):
            good, bad = bad, good
        elif not re.search(r"abnormal|anomal|lesion|unusual|wrong|irregular|patholog|disease|problem|suspicious", question):
            good, bad = [], []
    return good[0] if len(good) == 1 else None, bad[0] if len(bad) == 1 else None


def implied_letter(text, at, good, bad):
    """One finding speaks for `bad`, denials alone for `good` -> (letter or None, position of the last finding word or -1)."""
    found, last = set(), -1
    for m in FINDING.finditer(text):
        affirmed = at(m.start())[1]
        ill = affirmed != bool(m["good"])
        if affirmed is None or not ill and REST.search(text, max(0, m.start() - 30), m.end() + 20):
            continue  # "the rest is normal", "no other lesion": no word on the whole
        found.add(ill)
        last = m.start()
    return (bad if True in found else good if found else None), last


def reordered_letter(text, at, options, denied):
    """The option whose words one sentence affirms in any order ("the upper left corner"); None if the last such has two."""
    need = {x: {w.rstrip("s") for w in re.findall(r"[^\W_]+", o.lower()) if w not in FILLERS}
            for x, o in zip(LETTERS, options, strict=False) if x not in denied and len(o.split()) > 1}
    said = {}  # sentence -> its affirmed words
    for m in re.finditer(r"[^\W_]+", text) if need else ():
        sentence, affirmed = at(m.start())
        if affirmed:
            said.setdefault(sentence, set()).add(m[0].rstrip("s"))
    for words in reversed(said.values()):
        if hits := [x for x, wanted in need.items() if wanted and wanted <= words]:
            return hits[0] if len(hits) == 1 else None
    return None


def lexical_verdict(text, item, named=()):
    """The letter of the option that `text` supports, or None. named: [(position, letter)] of letters in it (sees="raw").

    1. An option stands as its last mention leaves it, affirmed or denied. Of those affirmed, the one in the last sentence is
       the verdict; two in that sentence are none.
    2. For options like normal/abnormal and yes/no, findings ("a lesion", "no abnormality") that come later speak instead.
    3. Without any mention, the words of an option may name it in another order.
    """
    text = text.lower()
    at, (good, bad) = standing(text), polar_letters(item)
    last = {}  # letter -> (sentence, position, affirmed) of its last mention that affirms or denies
    for start, letter in sorted([*mentions(text, item["options"]), *named]):
        sentence, affirmed = at(start)
        if affirmed is not None and not (affirmed and letter == good and REST.search(text, max(0, start - 30), start)):
            last[letter] = sentence, start, affirmed
    stands = {letter: where for letter, (*where, affirmed) in last.items() if affirmed}
    sentence, position = max(stands.values(), default=(-1, -1))
    if good and bad or (good or bad) and not stands:
        implied, where = implied_letter(text, at, good, bad)
        if where > position:
            return implied
    if not stands:
        return reordered_letter(text, at, item["options"], denied=last)
    decided = [letter for letter, (s, _) in stands.items() if s == sentence]
    return decided[0] if len(decided) == 1 else None


def make_judge(spec="lexical", sees="cut"):
    """spec -> judge(thoughts, items) -> list of letter | None | nan, as long as `thoughts`.

    thoughts: list of str or None (no thought: None comes back); items: their records (`options` and `question` are read).
    sees: "cut", F reads visible_thought(thought); "raw", the thought whole, letters included. None is "undecided", nan "the
    evaluator failed" (never with lexical). DataError for an unknown spec or `sees`, and for evaluators not built yet.
    """
    if sees not in ("cut", "raw"):
        raise DataError(f"judge_sees {sees!r} is unknown, expected cut or raw")
    if spec.startswith(("hf:", "openai:")):
        raise DataError(f"judge {spec!r}: {spec.split(':')[0]}: evaluators are not there yet, expected lexical")
    if spec != "lexical":
        raise DataError(f"judge {spec!r} is unknown, expected lexical, hf:NAME_OR_PATH or openai:BASE_URL#MODEL")

    def verdict(thought, item):
        if sees == "cut":
            return lexical_verdict(visible_thought(thought)[0], item)
        text = single_blanks(thought)
        return lexical_verdict(text, item, letters_named(text, item["options"]))

    def judge(thoughts, items):
        return [None if t is None else verdict(t, item) for t, item in zip(thoughts, items, strict=True)]
    return judge
