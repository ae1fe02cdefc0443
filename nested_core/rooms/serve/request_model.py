"""What a client may ask: one strict model of a request's body, and the error that refuses another.

The fields are those that mlx_lm.server reads, under its names, with bounds; and those of OpenAI's
API that would change the answer and are not done here, which are taken with their default alone.
Those that cannot change an answer are left out before. Anything else is refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from mlx_lm.server import _image_url
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from nested_core.config.sections import text_as_list
from nested_core.data.lines.json_decoding import has_too_many_values
from nested_core.storage.untrusted_files import parse_json

DEFAULT_MODEL = "default_model"  # what mlx_lm takes for a request without `model`
MAX_ANSWER_TOKENS = 2**20
MAX_VALUES = 200_000  # of a body, by its commas and brackets, those of texts too
MAX_ITEMS = 4096  # messages, parts of one, tools or biases
SHOWN_PROBLEMS = 5
STATUS_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
UNUSED_KEYS = {  # OpenAI's, which cannot change the answer
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
    *("prompt_cache_key", "prompt_cache_retention"),
}


class RequestRefused(Exception):
    """A request that is not answered, because of what the client sent."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        """`status` is HTTP's; `code` is OpenAI's word for the reason, where it has one."""
        super().__init__(message)
        self.status = status
        self.code = code


def describe_error(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's API writes it, for an answer or a piece of a streamed one."""
    kind = "server_error" if status >= 500 else STATUS_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "code": code}}


def _require_data_urls(content: Any) -> Any:
    """Refuse images at an address, which mlx_lm.server would fetch."""
    for part in content if isinstance(content, list) else ():
        url = _image_url(part)
        if url is not None and not str(url).startswith("data:"):
            raise ValueError("an image has to be a data: URL; this server fetches no address")
    return content


Objects = Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)]


def _make_system(role: str) -> str:
    """Replace OpenAI's newer name of the system role, which chat templates do not have."""
    return "system" if role == "developer" else role


class Message(BaseModel):
    """A message of a conversation; chat templates read more of it than OpenAI's API names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Annotated[str, AfterValidator(_make_system)]
    content: Annotated[str | Objects | None, AfterValidator(_require_data_urls)] = None


def _take_only_prompt(prompt: object) -> object:
    """Return the prompt of a list of one; OpenAI's API takes such a list."""
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt


def _fill_in_usage(options: dict[str, bool]) -> dict[str, bool]:
    """Add the option that mlx_lm.server reads as if it were there."""
    return {"include_usage": False} | options


TemplateArgument = bool | int | float | Annotated[str, StringConstraints(max_length=4096)]
Tokens = Annotated[int, Field(ge=1, le=MAX_ANSWER_TOKENS)]
ContextSize = Annotated[int, Field(ge=0, le=MAX_ANSWER_TOKENS)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-100, le=100)]
TokenNumber = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-1000, le=1000)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StreamOption = Literal["include_usage", "include_obfuscation"]


class _Request(BaseModel):
    """What both routes take. A value that is null in the body is as if it were not there."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = DEFAULT_MODEL
    stream: bool = False
    stream_options: Annotated[dict[StreamOption, bool], AfterValidator(_fill_in_usage)] = {}
    max_tokens: Tokens = 512
    max_completion_tokens: Tokens = 512
    stop: Annotated[list[StopText], BeforeValidator(text_as_list), Field(max_length=16)] = []
    # OpenAI's seeds are signed, and mx.random.seed takes 64 bits
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), AfterValidator(lambda n: n % 2**64)] = 0
    num_draft_tokens: int = Field(3, ge=0, le=64)
    temperature: float = Field(0.0, ge=0, le=100)
    top_p: Share = 1.0
    top_k: int = Field(0, ge=0)
    min_p: Share = 0.0
    xtc_probability: Share = 0.0
    xtc_threshold: float = Field(0.1, ge=0, le=0.5)  # mlx_lm.sample_utils.apply_xtc
    repetition_penalty: float = Field(0.0, ge=0, le=100)
    repetition_context_size: ContextSize = 20
    presence_penalty: Penalty = 0.0
    presence_context_size: ContextSize = 20
    frequency_penalty: Penalty = 0.0
    frequency_context_size: ContextSize = 20
    logit_bias: Annotated[dict[TokenNumber, Bias], Field(max_length=MAX_ITEMS)] = {}
    logprobs: bool = False
    top_logprobs: int = Field(-1, ge=-1, le=11)
    n: Annotated[int, Field(ge=1, le=1)] = 1  # more are not done here


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS)]
    tools: Objects = []
    role_mapping: dict[str, str] = {}
    chat_template_kwargs: dict[str, TemplateArgument] = {}

    # OpenAI's, which would change the answer, and are not done here
    tool_choice: Literal["auto"] = "auto"
    parallel_tool_calls: Literal[True] = True
    response_format: dict[Literal["type"], Literal["text"]] = {}
    modalities: list[Literal["text"]] = []


class CompletionBody(_Request):
    """The body of /v1/completions."""

    prompt: Annotated[str, BeforeValidator(_take_only_prompt)]

    # OpenAI's, which would change the answer, and are not done here
    best_of: Annotated[int, Field(ge=1, le=1)] = 1
    echo: Literal[False] = False


ROUTES: dict[str, type[_Request]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatRequest,
    "/chat/completions": ChatRequest,
}


def read_request(path: str, body: bytes) -> dict[str, Any]:
    """Return the checked body, by mlx_lm's names.

    Raises RequestRefused with everything that is wrong.
    """
    if has_too_many_values(body, MAX_VALUES):
        raise RequestRefused(f"The request has more than {MAX_VALUES:,} values.", 413)
    try:
        given = parse_json(body)
        if b"\\u" in body:
            json.dumps(given, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"Invalid JSON in request body: {error}") from None
    if not isinstance(given, dict):
        raise RequestRefused("The request should be a JSON dictionary.")
    values = {n: v for n, v in given.items() if v is not None and n not in UNUSED_KEYS}
    try:
        return ROUTES[path].model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise RequestRefused(_describe(error)) from None
    except (RecursionError, OverflowError) as error:
        raise RequestRefused(f"The request cannot be read: {error}") from None


def _describe(error: ValidationError) -> str:
    """Describe the first problems of a body in one paragraph."""
    words = {"extra_forbidden": "not taken here"}
    said = [
        f"{'.'.join(map(str, problem['loc']))}: {words.get(problem['type'], problem['msg'])}"
        for problem in error.errors(include_url=False)[:SHOWN_PROBLEMS]
    ]
    return "; ".join(said) + "."
