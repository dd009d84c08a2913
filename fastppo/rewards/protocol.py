"""The JSON of requests to a reward service and of its answers. `remote` is the client, `fastppo.serve_reward` a server.

A request is `{"prompts": [text, ...], "responses": [text, ...], "ended": [true, ...]}`. A reward model ignores columns.
The answer is `{"scores": [...]}`, or `{"error": "..."}` with a status other than 200. Without `ended` all responses
count as cut, so that the model reads no EOS. `"messages": [[{"role": ..., "content": ...}, ...] or null, ...]` has the
prompts that are chat; a reward model with a chat template writes them with its own template. `"conversations"`, of the
same form, has prompt, turns and observations where an environment answered the policy; a reward model reads these.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from fastppo.data import SURROGATE, Messages, are_messages

REQUEST = '{"prompts": [text, ...], "responses": [text, ...], "ended": [true, ...]}'
MESSAGES = "messages has a list of chat messages ({role, content}) for each prompt, or null"
CONVERSATIONS = "conversations has a list of chat messages ({role, content}) for each response"
EXAMPLE: dict[str, Any] = {
    "prompts": ["Describe a tree."],
    "responses": [" It has leaves."],
    "ended": [True],
    "columns": {"answer": ["oak"]},
}


def _chat(messages: list[dict[str, Any]]) -> Messages:
    if not are_messages(messages):
        raise ValueError("not chat messages")
    return messages


CONTENT = {"anyOf": [{"type": "string"}, {"type": "null"}]}  # null beside tool_calls only
MESSAGE: dict[str, Any] = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": CONTENT},
    "required": ["role"],
    "additionalProperties": True,  # other keys are for the chat template
}
Chat = Annotated[
    list[dict[str, Any]],
    AfterValidator(_chat),
    WithJsonSchema({"type": "array", "items": MESSAGE, "minItems": 1}),
]


class ScoreRequest(BaseModel):
    """Responses to score, each with its prompt: lists of the same length."""

    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [EXAMPLE]})

    prompts: list[str] = Field(description="The prompts as text; chat as the actor's chat template writes it.")
    responses: list[str] = Field(description="The responses: the text that continues each prompt.")
    ended: list[bool] | None = Field(
        None, description="false for a response that was cut at its maximum length. If missing, all count as cut."
    )
    messages: list[Chat | None] | None = Field(
        None, description="The messages of each prompt that is chat, for the model's own chat template; else null."
    )
    conversations: list[Chat] | None = Field(
        None, description="All messages, observations included, of each response with several turns."
    )
    columns: Any = Field(
        None, description="Other columns of the data. They are ignored.", json_schema_extra={"type": "object"}
    )


class ScoreAnswer(BaseModel):
    """One finite number per response, in the order of the responses."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"scores": [0.75]}]})

    scores: list[float]


class ErrorAnswer(BaseModel):
    """Why there are no scores."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"error": f"a request is {REQUEST}"}]})

    error: str


class Health(BaseModel):
    """Whether the model is ready (status 200, else 503), and how many requests it has scored."""

    ready: bool = Field(description="false while the model loads")
    model: str = Field(description="hub name or directory")
    waiting: int = Field(description="requests that wait for a forward pass")
    requests: int = Field(description="requests that were scored")
    responses: int = Field(description="responses that were scored")
    batches: int = Field(description="groups of requests that were scored together")
    failed: int = Field(description="requests that the model could not score")


class Asked(NamedTuple):
    prompts: list[str]
    responses: list[str]
    ended: list[bool]
    messages: list[Messages | None]
    conversations: list[Messages] | None


def read_request(body: bytes) -> Asked:
    """Parse a request. Raises ValueError if it does not follow the protocol."""
    try:
        said = ScoreRequest.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"][:1] == ("messages",):
            raise ValueError(MESSAGES) from None
        if first["loc"][:1] == ("conversations",):
            raise ValueError(CONVERSATIONS) from None
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"a request is {REQUEST}; {where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON: {error}") from None
    prompts, responses = said.prompts, said.responses
    ended = [False] * len(responses) if said.ended is None else said.ended
    messages: list[Messages | None] = [None] * len(prompts) if said.messages is None else said.messages
    conversations = said.conversations
    of_responses = (responses, ended, messages, prompts if conversations is None else conversations)
    if any(len(part) != len(prompts) for part in of_responses):
        counts = f"{len(prompts)} prompts, {len(responses)} responses and {len(ended)} ended"
        more = "" if said.messages is None else f", and {len(messages)} messages"
        more += "" if conversations is None else f", and {len(conversations)} conversations"
        raise ValueError(f"the request has {counts}{more}")
    contents = [message.get("content") or "" for chat in (*messages, *(conversations or ())) for message in chat or []]
    for name, texts in (("prompt", prompts), ("response", responses), ("message", contents)):
        for i, text in enumerate(texts):
            if half := SURROGATE.search(text):
                raise ValueError(f"{name} {i} has half a character at {half.start()}, the lone surrogate {half[0]!r}")
    return Asked(prompts, responses, ended, messages, conversations)
