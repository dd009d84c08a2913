"""A calculator that a language model learns to call: an environment of plain text, its reward, and its data.

    python docs/examples/calculator.py runs/calculator-data

A conversation, of which the model writes the second and the fourth line:

    Question: 347*582
    calc(347*582)
    201954
    Answer: 201954
"""

import json
import operator
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CALL = re.compile(r"calc\((\d{1,6})([-+*/])(\d{1,6})\)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
HOW_TO = "error: write calc(A*B), with whole numbers of at most 6 digits and one of + - * /"


def calculator(conversation: list[dict[str, Any]], ended: bool) -> str | None:
    """The environment: what the model reads after its turn, or None after the turn that ends the conversation.

    conversation: the newest message is the model's turn; ended: it has the line break with which turns end.
    """
    turn = conversation[-1]["content"].strip()
    return f"{result(turn)}\n" if ended and turn.startswith("calc") else None


def scrambled(conversation: list[dict[str, Any]], ended: bool, turn: int, seed: int) -> str | None:
    """The same calculator, but with a wrong number of the same length: a control that shows what its answers are worth.

    turn: the number of the turn, from 0; seed: the conversation's.
    """
    observation = calculator(conversation, ended)
    if observation is None or observation.startswith("error"):
        return observation
    return wrong(observation.strip(), random.Random(f"{seed} {turn}")) + "\n"


def result(call: str) -> str:
    """What the calculator shows; for a call that it cannot read, how to write one."""
    parts = CALL.fullmatch(call)
    if parts is None:
        return HOW_TO
    first, sign, second = parts.groups()
    try:
        return f"{OPERATORS[sign](int(first), int(second)):.12g}"
    except ZeroDivisionError:
        return "error: division by zero"


def right(responses: list[str], answer: list[str]) -> list[bool]:
    """The reward, at the end of a conversation: 1 for the right answer in its last turn, and 0 for all else.

    responses: what the model wrote, each turn on lines of its own.
    """
    return [
        response.rstrip().endswith(f"Answer: {a}") and response.endswith("\n")
        for response, a in zip(responses, answer, strict=True)
    ]


def called(responses: list[str]) -> list[bool]:
    """Whether the calculator was called, well written or not; `health.judge` shows the share, and nothing learns it."""
    return [response.startswith("calc") for response in responses]


def wrong(number: str, chance: random.Random) -> str:
    """Another number with as many digits."""
    low = 10 ** (len(number) - 1)
    while (other := str(chance.randrange(low, 10 * low))) == number:
        pass
    return other


# The data

QUESTION = "Question: "
DEMONSTRATIONS, CALLING = 192, 32  # conversations, and how many of them call the calculator
TRAINING, HELDOUT = 1024, 128  # questions


def write_data(folder: Path, seed: int = 0) -> None:
    """Demonstrations for SFT, questions for RL, and held-out questions; no number of one is in another.

    A demonstration is a row for each turn of the model, since SFT learns turns and reads what stands before them. Most
    demonstrations answer at once, with a wrong number of the right length: the model learns the form of an answer and
    of a call, and not that it should call.
    """
    chance = random.Random(seed)
    numbers = list(range(100, 1000))
    chance.shuffle(numbers)
    shown, heldout, training = numbers[:200], numbers[200:300], numbers[300:]
    folder.mkdir(parents=True, exist_ok=True)
    conversations = (demonstration(i < CALLING, shown, chance) for i in range(DEMONSTRATIONS))
    write(folder / "demonstrations.jsonl", [turn for turns in conversations for turn in turns])
    write(folder / "training.jsonl", [question(training, chance) for _ in range(TRAINING)])
    write(folder / "heldout.jsonl", [question(heldout, chance) for _ in range(HELDOUT)])


def question(numbers: Sequence[int], chance: random.Random) -> dict[str, str]:
    first, second = chance.choices(numbers, k=2)
    return {"prompt": f"{QUESTION}{first}*{second}\n", "answer": str(first * second)}


def demonstration(calls: bool, numbers: Sequence[int], chance: random.Random) -> Iterator[dict[str, str]]:
    asked = question(numbers, chance)
    before, answer = asked["prompt"], asked["answer"]
    if calls:
        call = f"calc({before.removeprefix(QUESTION).strip()})\n"
        yield {"prompt": before, "response": call}
        yield {"prompt": f"{before}{call}{answer}\n", "response": f"Answer: {answer}\n"}
    else:
        yield {"prompt": before, "response": f"Answer: {wrong(answer, chance)}\n"}


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
