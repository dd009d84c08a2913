"""A reward service of your own: `uvicorn --app-dir docs/examples service:app --port 8200`.

A run asks it for some responses at a time, on several connections at once, and it answers one finite number for each.
What it cannot score is a status: 4xx ends the run with the text that goes with it, 429 and 5xx are tried again.
"""

from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel


class Request(BaseModel):
    prompts: list[str]
    responses: list[str]
    ended: list[bool]  # false: cut at its maximum length
    columns: dict[str, list[Any]] = {}  # of the data, by name
    messages: list[list[dict[str, str]] | None] | None = None  # where prompts are chat


class Answer(BaseModel):
    scores: list[float]


app = FastAPI()


@app.post("/score")
def score(request: Request) -> Answer:
    if not len(request.prompts) == len(request.responses) == len(request.ended):
        raise HTTPException(400, "prompts, responses and ended are of different lengths")
    return Answer(scores=[variety(response) for response in request.responses])


def variety(response: str) -> float:
    """The share of words that have not come before in the response."""
    words = response.lower().split()
    return len(set(words)) / len(words) if words else 0.0
