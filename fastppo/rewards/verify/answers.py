"""The final answer in a text, of a response or of a reference, as text.

Every search takes a time linear in the text, whatever a response holds: it runs in the trainer's process.
"""

from __future__ import annotations

import re
from decimal import Decimal
from numbers import Number
from typing import NamedTuple

# A box, an escaped character, or a brace of a group.
LATEX = re.compile(r"\\(?P<box>boxed|fbox)(?![A-Za-z])\s*(?P<open>\{?)|\\.|[{}]", re.DOTALL)
UNBRACED = re.compile(r"[^\s\\{}$]+")  # \boxed 5
HASHES = "####"
SAID = re.compile(r"\banswer\s+is\b|\banswer\s*:", re.IGNORECASE)

NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?<=\d)"
PLAIN = re.compile(NUMBER)
FRACTION = rf"(?:-?\d+ \d+/\d+|{NUMBER}(?: ?/ ?\d+)?)"
# Words that join numbers into one answer, or are mathematics themselves.
JOINS = r"(?!(?:and|or|to|by|mod|pi|plus|minus|times|over|sqrt|sin|cos|tan|log|ln|x)\b)"
WITH_UNIT = re.compile(rf"(?P<number>{FRACTION}) {JOINS}[^\W\d_]{{3,}}[^\d\\=<>^+*{{}}]*")
WITH_PROSE = re.compile(rf"(?P<number>{FRACTION} ?%?)(?: ?[,;(])? ?{JOINS}(?<![%\d])[^\W\d_]{{2,}}\b.*")
SENTENCE = re.compile(r"[.!?](?:\s|$)")
# A formula that begins an answer and is all of it: no other one is joined to it.
FORMULA = re.compile(
    r"(?:\$(?P<dollars>[^$]+)\$|\\\((?P<round>.+?)\\\))(?!\s*(?:,\s*(?:(?:and|or)\s*)?[$\\]|and\b|or\b))"
)
DISPLAYED = re.compile(r"\$\$(?P<dollars>.+?)\$\$|\\\[(?P<square>.+?)\\\]", re.DOTALL)

CURRENCY = re.compile(r"^([-+]?) ?(?:\\\$|\$(?=[^$]*$)|[€£¥₹]) ?(?=[-+]?\.?\d)|(?<=\d) ?[€£¥₹]$")
GROUPED = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\[,!; ])(?=\d{3}(?!\d))")  # 10{,}000 and 10,\!000
SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
# As programs write numbers, and a column of them becomes text. 2e-1 may be twice Euler's number less 1, and stays.
SCIENTIFIC = re.compile(r"[-+]?(?:(?:\d*\.\d+|1\.?)[eE][-+]?\d{1,3}|\d+(?:e(?:[-+]\d{2,3}|\d{1,3})|E[-+]?\d{1,3}))")
MIXED = re.compile(r"(?P<whole>-?\d+) (?P<part>\d+) ?/ ?(?P<of>\d+)")
AROUND = " *`"  # Markdown around an answer
DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
CHARACTERS = str.maketrans({"−": "-", "–": "-", "°": r"^\circ", "²": "^2", "³": "^3", "·": r"\cdot ", "∞": r"\infty"})
TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textrm|textit)\s*\{(?P<inner>[^{}\\]*)\}")
CHOICE = re.compile(r"\(?([A-Z])\)?|\(([A-Z])\) (?!(?:and|or)\b|.*\([A-Z]\))\w.*")  # of several answers: A, (A), (A) 12
WORDS = re.compile(r"[^\W\d_]{3,}(?:[ '-][^\W\d_]+)*|no|No|NO")  # shorter ones are products of variables


class Answer(NamedTuple):
    """A final answer, or a text in which to look for one."""

    text: str
    found: bool  # False: nothing in the text marks the answer, and `text` is all of it


def response_answer(text: str) -> Answer:
    """The final answer of a response: of its last `\\boxed{...}`, else behind the last `####` or "the answer is".

    A box that is not closed, as in a response that was cut, is none. Behind a mark the answer is the rest of the line,
    or the next line with text; of a sentence it is the number that begins it, or the first sentence.
    """
    if (box := last_box(text)) is not None:
        return Answer(cleaned(box), True)
    marked = _behind_mark(text)
    return Answer(text, False) if marked is None else Answer(marked, True)


def reference_answer(value: object) -> str:
    """The final answer in a column's value: a number, a worked solution that ends with `#### 72`, one with a
    `\\boxed{...}`, or the answer alone. Empty for a missing value, and for one that is neither text nor a number."""
    if not isinstance(value, str | Number) or value != value:  # NaN is a missing value
        return ""
    text = str(value)
    if HASHES in text:
        return cleaned(text.rpartition(HASHES)[2])
    box = last_box(text)
    return cleaned(text if box is None else box)


def last_box(text: str) -> str | None:
    """What is in the last `\\boxed{...}` or `\\fbox{...}` that is closed; None without one."""
    opened: list[int | None] = []  # for each open brace, the start of its content if it is a box's
    last, content = -1, None
    for token in LATEX.finditer(text):
        if token["box"] and not token["open"]:
            bare = UNBRACED.match(text, token.end())
            if bare is not None:
                last, content = bare.start(), bare[0]
        elif token["box"]:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and start > last:
                last, content = start, text[start : token.start()]
    return content


def _behind_mark(text: str) -> str | None:
    """The answer behind the last `####` or "the answer is"; None without one, or if nothing follows."""
    start = text.rfind(HASHES) + len(HASHES) if HASHES in text else 0
    for said in SAID.finditer(text, start):
        start = said.end()
    if start == 0:
        return None
    rest = text[start:].lstrip(f"{AROUND}:\n")
    if formula := DISPLAYED.match(rest) or FORMULA.match(rest):
        return cleaned(next(filter(None, formula.groups()))) or None
    line = rest.partition("\n")[0]
    answer = cleaned(SENTENCE.split(line, maxsplit=1)[0])
    prose = WITH_PROSE.fullmatch(answer)
    return cleaned(prose["number"]) if prose else answer or None


def cleaned(text: str) -> str:
    """An answer without what does not belong to its value: delimiters of formulas, a final full stop, currencies, words
    for units, and separators of thousands."""
    text = " ".join(text.translate(CHARACTERS).split()).strip(AROUND).rstrip(f".,;:{AROUND}")
    for left, right in DELIMITERS:
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner and left not in inner:
            return cleaned(inner)
    if wrapped := TEXT.fullmatch(text):
        text = wrapped["inner"].strip()
    text = GROUPED.sub("", CURRENCY.sub(r"\1", text))
    if unit := WITH_UNIT.fullmatch(text):
        text = unit["number"]
    if PLAIN.fullmatch(text) or SPACED.fullmatch(text):
        return text.replace(",", "").replace(" ", "").removeprefix("+")
    if SCIENTIFIC.fullmatch(text):
        return f"{Decimal(text):f}"
    if mixed := MIXED.fullmatch(text):
        return f"{mixed['whole']}\\frac{{{mixed['part']}}}{{{mixed['of']}}}"
    if choice := CHOICE.fullmatch(text):
        return f"\\text{{{choice[1] or choice[2]}}}"
    if text == "pi":
        return "\\pi"
    return f"\\text{{{text}}}" if wrapped or WORDS.fullmatch(text) else text
