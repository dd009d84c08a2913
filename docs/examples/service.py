"""A reward service of your own: `uvicorn --app-dir docs/examples service:app --port 8200`.

A run sends it several responses per request, on several connections at the same time. The answer is one finite number
per response. If it cannot score a request, it answers with an error status: after 4xx the run ends with the text of the
answer; after 429 and 5xx the run tries again.
"""

from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel


class Request(BaseModel):
    prompts: list[str]
    responses: list[str]
    ended: list[bool]  # false: cut at its maximum length
    columns: dict[str, list[Any]] = {}  # columns of the data, by name
    messages: list[list[dict[str, str]] | None] | None = None  # if prompts are chat


class Answer(BaseModel):
    scores: list[float]


app = FastAPI()


@app.post("/score")
def score(request: Request) -> Answer:
    if not len(request.prompts) == len(request.responses) == len(request.ended):
        raise HTTPException(400, "prompts, responses and ended are of different lengths")
    return Answer(scores=[variety(response) for response in request.responses])


def variety(response: str) -> float:
    """The share of words that did not occur before in the response."""
    words = response.lower().split()
    return len(set(words)) / len(words) if words else 0.0
