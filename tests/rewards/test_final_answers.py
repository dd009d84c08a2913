"""The final answer in a text: where it is looked for, and what of it is left."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastppo.rewards.verify.answers import last_box, reference_answer, response_answer

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether.\n#### "


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (GSM8K + "72", "72"),
        (GSM8K + "1,000", "1000"),
        (GSM8K + "-2,345.50", "-2345.50"),
        (GSM8K + "$18", "18"),
        (GSM8K + "-$18", "-18"),
        (GSM8K + "\\$18.00", "18.00"),
        (GSM8K + "20 dollars", "20"),
        (GSM8K + "3 1/2 hours.", r"3\frac{1}{2}"),
        (GSM8K + "10%", "10%"),
        ("#### 1\n#### 2 ", "2"),
        (r"We get $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (
            r"$\boxed{\left\{\frac{\sqrt{3}}{2}, \text{none}\right\}}$",
            r"\left\{\frac{\sqrt{3}}{2}, \text{none}\right\}",
        ),
        (r"First \boxed{1}, then \fbox{2}.", "2"),
        (r"The answer is \boxed 7.", "7"),
        (r"\boxed{10{,}000}", "10000"),
        (r"\boxed{10,\!000}", "10000"),
        (r"\boxed{1\,234\,567}", "1234567"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        (r"\boxed{\textbf{(A)}}", r"\text{A}"),
        ("Evelyn", r"\text{Evelyn}"),
        ("(A)", r"\text{A}"),
        ("no", r"\text{no}"),
        ("pi", r"\pi"),
        ("$x + 1$", "x + 1"),
        (r"\(x\)", "x"),
        (r"\[ x \]", "x"),
        ("$$x$$", "x"),
        ("x^2\n+ 1", "x^2 + 1"),
        ("1 000 000", "1000000"),
        ("1, 2", "1, 2"),
        ("(1,234)", "(1,234)"),
        ("10!", "10!"),
        ("\u22125", "-5"),
        ("+5", "5"),
        (72, "72"),
        (7.5, "7.5"),
        (-3, "-3"),
        (None, ""),
        (1e-5, "0.00001"),
        (1.5e20, "150000000000000000000"),
        ("2E-3", "0.002"),
        ("2e-1", "2e-1"),  # Euler's number
        ("1e9999", "1e9999"),
        ("5 \u20ac", "5"),
        (float("nan"), ""),
        (["5"], ""),
        ({"answer": 5}, ""),
        (b"5", ""),
        ("", ""),
        (GSM8K, ""),
    ],
)
def test_the_answer_of_a_reference(value, answer):
    assert reference_answer(value) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"The answer is 3, so \boxed{2}", "2"),
        (r"\boxed{2}. The answer is 3.", "2"),
        (r"\boxed{2} is wrong, it is \boxed{3", "2"),
        ("#### 5\nThe answer is 6.", "6"),
        ("The answer is 6.\n#### 5", "5"),
        ("####\n\n  5", "5"),
        ("the ANSWER IS: **5**", "5"),
        ("Answer: 5 apples", "5"),
        ("The answer is 5 because 2 + 3 = 5", "5"),
        ("The answer is 5, for 2 + 3 = 5.", "5"),
        ("The answer is 5 (five). There are 6 more.", "5"),
        ("The answer is 1,234 in 5 boxes", "1234"),
        ("The answer is 5%, roughly", "5%"),
        ("The answer is 3/4 of a cup.", "3/4"),
        ("The answer is $18.", "18"),
        ("The answer is $18$ because 3 times 6 is that", "18"),
        ("The answer is $1$ and $2$.", "$1$ and $2$"),
        ("The answer is 1 and 2.", "1 and 2"),
        ("The answer is x = 1 or x = 2.", "x = 1 or x = 2"),
        ("The answer is:\n\\[\n  x^2\n\\]\nas above", "x^2"),
        ("The answer is\n\n$$7$$\n", "7"),
        ("The answer is \\(x\\) for 3", "x"),
        ("The answer is 72! We did it.", "72"),
        ("The correct answer is (B) 12", r"\text{B}"),
        ("The answer is (A) or (B).", "(A) or (B)"),
        ("The answer is Evelyn. She has 7.", r"\text{Evelyn}"),
    ],
)
def test_the_answer_of_a_response_is_in_its_last_box_or_behind_its_last_mark(response, answer):
    assert response_answer(response) == (answer, True)


@pytest.mark.parametrize("response", ["", "so 3 + 4 = 7", "it is $x$", "\\boxed{1", "The answer is", "####\n"])
def test_a_response_without_a_mark_is_searched_whole(response):
    assert response_answer(response) == (response, False)


def test_an_empty_box_is_an_answer_that_says_nothing():
    assert response_answer(r"The answer is 5. \boxed{}") == ("", True)


GROUPS = st.recursive(
    st.text("xy1 +\\", max_size=4).map(lambda text: text.replace("\\", "\\{\\}")),
    lambda inner: st.builds("{}{{{}}}{}".format, inner, inner, inner),
    max_leaves=12,
)


@given(GROUPS, st.text(), GROUPS)
def test_a_box_ends_at_its_own_brace(content, before, other):
    before = before.replace("\\", "").replace("{", "").replace("}", "")
    assert last_box(f"{before}\\boxed{{{other}}} {{ \\boxed{{{content}}}{other}") == content


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["", "$", "\\$", "€"]), st.sampled_from(["", " clips", ".", "\n"])
)
def test_a_whole_number_is_the_same_in_every_way_to_write_it(number, currency, end):
    sign, digits = "-" * (number < 0), str(abs(number))
    for written in (digits, f"{abs(number):,}", f"{abs(number):,}".replace(",", "{,}")):
        assert reference_answer(f"#### {sign}{currency}{written}{end}") == f"{sign}{digits}"
        assert response_answer(f"\\boxed{{{sign}{written}}}").text == f"{sign}{digits}"


PARTS = [*"\\{}$()[]#:.,!%/* 1a\n", "boxed", "answer is", "\\boxed{", "\\text{", "####", "and"]


@given(st.lists(st.sampled_from(PARTS)).map("".join))
def test_any_text_has_an_answer_or_none(text):
    for answer in (response_answer(text).text, reference_answer(text)):
        assert isinstance(answer, str)


HOSTILE = (
    *("\\boxed{", "{", "\\boxed ", "\\boxed{5}", "####", "$", "\\", " ", "\n", "\\text{", "the answer is "),
    *("answer is 1,", "answer is 1,111", "answer is a ", "answer is 5 ", "answer is \\(", "answer is 5/ ", "answer: ("),
)


@pytest.mark.parametrize("part", HOSTILE)
def test_the_search_takes_a_time_linear_in_the_text(part):
    """In seconds; what is quadratic takes hours."""
    text = part * (1_000_000 // len(part))
    start = time.process_time()
    for each in (
        text,
        f"{text}x",
        f"the answer is {text[:-1]}x",
        f"the answer is 5{part[-1] * 500_000}x",
        text + "}" * 99_999,
    ):
        response_answer(each)
        reference_answer(each)
    assert time.process_time() - start < 30
