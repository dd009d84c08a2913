"""A search over local files that a language model learns to use: an environment with a state, and its data.

    python docs/examples/search.py runs/search-data

A conversation, of which the model writes the second and the fourth line:

    Question: capital of Zorland?
    search(capital of Zorland)
    The capital of Zorland is Mirefal.
    Answer: Mirefal
"""

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SEARCH = re.compile(r"search\((.+)\)")
HOW_TO = "error: write search(WORDS)"
SEARCHES = 2  # of a conversation


class Files:
    """The environment, after Gymnasium: each conversation has an instance, which reads a folder of text files."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """options: the columns of the data; `folder` with the files, and the right `answer`."""
        assert options is not None, "the columns of the data"
        self.answer: str = options["answer"]
        files = sorted(Path(options["folder"]).glob("*.txt"))
        self.lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        self.left = SEARCHES
        return "", {}  # the conversation begins with the prompt of the data

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """action: the model's turn. Returns observation, reward, terminated, truncated and info."""
        turn = action.strip()
        if not turn.startswith("search"):
            return "", float(turn == f"Answer: {self.answer}"), True, False, {}
        self.left -= 1
        return f"{self.find(turn)}\n", 0.0, False, self.left < 0, {}

    def find(self, call: str) -> str:
        """The first line with all the words; for a call that cannot be read, how to write one."""
        query = SEARCH.fullmatch(call)
        if query is None:
            return HOW_TO
        words = set(query[1].lower().split())
        return next((line for line in self.lines if words <= set(line.lower().rstrip(".").split())), "nothing found")


def searched(responses: list[str]) -> list[bool]:
    """Whether there was a search; `health.judge` shows the share, and nothing learns it."""
    return [response.startswith("search") for response in responses]


# The data

DEMONSTRATIONS, SEARCHING = 192, 32  # conversations, and how many of them search
HELDOUT = 128  # questions
COUNTRIES, FILES = 600, 6
KINDS = ("capital", "river", "king")


def write_data(folder: Path, seed: int = 0) -> None:
    """Text files with made-up facts, demonstrations for SFT, questions for RL, and held-out questions.

    All facts are in the files, and no country of one set of questions is in another. Most demonstrations answer at
    once, with a name that is wrong.
    """
    chance = random.Random(seed)
    names = made_up_names(COUNTRIES * (1 + len(KINDS)), chance)
    countries, others = names[:COUNTRIES], iter(names[COUNTRIES:])
    facts = [(kind, country, next(others)) for country in countries for kind in KINDS]
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for i in range(FILES):
        lines = (f"The {kind} of {country} is {name}.\n" for kind, country, name in facts[i::FILES])
        (texts / f"{i}.txt").write_text("".join(lines), encoding="utf-8")
    shown = [fact for fact in facts if fact[1] in set(countries[:150])]
    heldout = [fact for fact in facts if fact[1] in set(countries[150:250])]
    training = [fact for fact in facts if fact[1] in set(countries[250:])]
    wrong = [name for *_, name in shown]
    conversations = (
        demonstration(i < SEARCHING, fact, chance.choice(wrong))
        for i, fact in enumerate(chance.sample(shown, DEMONSTRATIONS))
    )
    write(folder / "demonstrations.jsonl", [turn for turns in conversations for turn in turns])
    write(folder / "training.jsonl", [question(fact, texts) for fact in training])
    write(folder / "heldout.jsonl", [question(fact, texts) for fact in chance.sample(heldout, HELDOUT)])


def made_up_names(count: int, chance: random.Random) -> list[str]:
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(chance.choices(syllables, k=3)).capitalize()] = None
    return list(names)


def question(fact: tuple[str, str, str], texts: Path) -> dict[str, str]:
    kind, country, name = fact
    return {"prompt": f"Question: {kind} of {country}?\n", "answer": name, "folder": str(texts)}


def demonstration(searches: bool, fact: tuple[str, str, str], wrong: str) -> Iterator[dict[str, str]]:
    """A row for each turn of the model."""
    kind, country, name = fact
    prompt = f"Question: {kind} of {country}?\n"
    if searches:
        call = f"search({kind} of {country})\n"
        yield {"prompt": prompt, "response": call}
        yield {
            "prompt": f"{prompt}{call}The {kind} of {country} is {name}.\n",
            "response": f"Answer: {name}\n",
        }
    else:
        yield {"prompt": prompt, "response": f"Answer: {wrong}\n"}


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
