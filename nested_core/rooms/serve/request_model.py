"""What a client may ask: one strict model of a request's body, and the error that refuses another.

The fields are those that mlx_lm.server reads, under its names, with bounds; those of OpenAI's API
that would change the answer and are not done here, which are taken with their default alone; and
those that cannot change it, which are taken and not used. Anything else is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

DEFAULT_MODEL = "default_model"  # what mlx_lm takes for a request without `model`
MAX_ANSWER_TOKENS = 2**20
MAX_DRAFT_TOKENS = 64
MIN_SEED, SEEDS = -(2**63), 2**64  # OpenAI's are signed, and mx.random.seed takes 64 bits
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_ARGUMENT_LENGTH = 4096  # of a text in chat_template_kwargs
MAX_TEMPERATURE = 100
MAX_PENALTY = 100
MAX_LOGIT_BIAS = 1000
MAX_TOP_LOGPROBS = 11  # mlx_lm.server
MAX_XTC_THRESHOLD = 0.5  # mlx_lm.sample_utils.apply_xtc
SHOWN_PROBLEMS = 5
SHOWN_CHARACTERS = 60

STATUS_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class RequestRefused(Exception):
    """A request that is not answered, because of what the client sent."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        """`status` is HTTP's, a 4xx; `code` is OpenAI's word for the reason, where it has one."""
        super().__init__(message)
        self.status = status
        self.code = code


def describe_error(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API writes it, for a whole answer and for a piece of a streamed one."""
    kind = "server_error" if status >= 500 else STATUS_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class _Open(BaseModel):
    """Chat templates read more of a message than OpenAI's API names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(_Strict):
    """A text in a message's content."""

    type: Literal["text"]
    text: str


class ImageAddress(_Strict):
    """Where an image is."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """An image in a message's content, in the request itself: the server fetches no address."""

    type: Literal["image_url", "input_image", "image"]
    image_url: str | ImageAddress | None = None
    image: str | ImageAddress | None = None

    @model_validator(mode="after")
    def _require_data(self) -> Self:
        image = self.image if self.image_url is None else self.image_url
        url = image.url if isinstance(image, ImageAddress) else image
        if url is None or not url.startswith("data:"):
            raise ValueError("an image has to be a data: URL; this server fetches no address")
        return self


def _form_of_content(content: object) -> str:
    return "parts" if isinstance(content, list) else "text"


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str | None, Tag("text")] | Annotated[list[Part], Tag("parts")],
    Discriminator(_form_of_content),
]


def _system_for_developer(role: str) -> str:
    """OpenAI's newer name of the system role, which chat templates do not have."""
    return "system" if role == "developer" else role


class CalledFunction(_Open):
    """The function of a tool call, with its arguments as JSON."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(_Open):
    """A tool call of an earlier answer."""

    function: CalledFunction


class Message(_Open):
    """A message of a conversation."""

    role: Annotated[str, AfterValidator(_system_for_developer)]
    content: Content = None
    tool_calls: list[ToolCall] | None = None


class Function(_Open):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Open):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class TextFormat(_Strict):
    """The only form of answers: text as the model writes it."""

    type: Literal["text"]


class StreamOptions(_Strict):
    """Whether a streamed answer ends with a piece that counts its tokens."""

    include_usage: bool
    include_obfuscation: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_usage(cls, given: Any) -> Any:  # which mlx_lm reads as if it were there
        is_given = not isinstance(given, dict) or given.get("include_usage") is not None
        return given if is_given else given | {"include_usage": False}


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _only_prompt(prompt: object) -> object:
    """The prompt of a list of one; OpenAI's API takes such a list."""
    if isinstance(prompt, list):
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            raise ValueError("give one prompt a request, as a text; lists and tokens are not taken")
        return prompt[0]
    return prompt


def _refuse_adapters(adapters: object) -> None:
    raise ValueError(
        "not taken here: what is served is chosen by model, as NAME or NAME@VERSION of the registry"
    )


def _require_default_draft(draft: object) -> object:
    if draft != DEFAULT_MODEL:
        raise ValueError("not taken here: --draft-model of the server chooses it")
    return draft


def _require_plain(value: object) -> object:
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if not is_number and not (isinstance(value, str) and len(value) <= MAX_ARGUMENT_LENGTH):
        raise ValueError(
            f"expected true, false, a finite number or a text of at most {MAX_ARGUMENT_LENGTH} "
            f"characters"
        )
    return value


TemplateArgument = Annotated[object, BeforeValidator(_require_plain)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
ContextSize = Annotated[int, Field(ge=0, le=MAX_ANSWER_TOKENS)]
TokenNumber = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Seed = Annotated[int, Field(ge=MIN_SEED, le=SEEDS - 1), AfterValidator(lambda seed: seed % SEEDS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]


class _Request(_Strict):
    """What both routes take. A value that is null in the body is as if it were not there."""

    model: str = DEFAULT_MODEL
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int = Field(512, ge=1, le=MAX_ANSWER_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_ANSWER_TOKENS)
    stop: Annotated[list[StopText], BeforeValidator(_as_list), Field(max_length=MAX_STOPS)] = []
    seed: Seed | None = None
    num_draft_tokens: int = Field(3, ge=0, le=MAX_DRAFT_TOKENS)
    adapters: Annotated[object, BeforeValidator(_refuse_adapters)] = None
    draft_model: Annotated[object, BeforeValidator(_require_default_draft)] = DEFAULT_MODEL

    # sampling
    temperature: float = Field(0.0, ge=0, le=MAX_TEMPERATURE)
    top_p: Share = 1.0
    top_k: int = Field(0, ge=0)
    min_p: Share = 0.0
    xtc_probability: Share = 0.0
    xtc_threshold: float = Field(0.1, ge=0, le=MAX_XTC_THRESHOLD)
    repetition_penalty: float = Field(0.0, ge=0, le=MAX_PENALTY)
    repetition_context_size: ContextSize = 20
    presence_penalty: Penalty = 0.0
    presence_context_size: ContextSize = 20
    frequency_penalty: Penalty = 0.0
    frequency_context_size: ContextSize = 20
    logit_bias: (
        dict[TokenNumber, Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]] | None
    ) = None
    logprobs: bool = False
    top_logprobs: int = Field(-1, ge=-1, le=MAX_TOP_LOGPROBS)

    # OpenAI's, which would change the answer, and are not done here
    n: Annotated[int, Field(ge=1, le=1)] = 1

    # OpenAI's, which cannot change the answer
    user: object = None
    metadata: object = None
    store: object = None
    service_tier: object = None
    safety_identifier: object = None
    prompt_cache_key: object = None
    prompt_cache_retention: object = None
    prediction: object = None


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    role_mapping: dict[str, str] | None = None
    chat_template_kwargs: dict[str, TemplateArgument] | None = None

    # OpenAI's, which would change the answer, and are not done here
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: bool = True
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] = ["text"]

    @field_validator("tool_choice", "parallel_tool_calls")
    @classmethod
    def _let_the_model_choose(cls, value: object, info: ValidationInfo) -> object:
        if info.data.get("tools") and value in ("none", False):
            raise ValueError(
                "the model chooses among the tools of a request, and how many it calls"
            )
        return value


class CompletionBody(_Request):
    """The body of /v1/completions."""

    prompt: Annotated[str, BeforeValidator(_only_prompt)]

    # OpenAI's, which would change the answer, and are not done here
    best_of: Annotated[int, Field(ge=1, le=1)] = 1
    echo: Literal[False] = False


ROUTES: dict[str, type[_Request]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatRequest,
    "/chat/completions": ChatRequest,
}


def read_request(path: str, body: bytes, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The checked body of a request: what the client gave, or else `defaults`, by mlx_lm's names.

    Raises RequestRefused with everything that is wrong.
    """
    try:
        given = json.loads(body.decode(), parse_constant=_refuse_constant)
        json.dumps(given, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        raise RequestRefused(
            f"Invalid JSON in request body: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(given, dict):
        raise RequestRefused("The request should be a JSON dictionary.")
    set_values = {name: value for name, value in given.items() if value is not None}
    try:
        return (
            ROUTES[path].model_validate({**defaults, **set_values}).model_dump(exclude_unset=True)
        )
    except (ValidationError, RecursionError, OverflowError) as error:
        raise RequestRefused(_describe(error)) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _describe(error: Exception) -> str:
    """All problems of a body in one paragraph."""
    if not isinstance(error, ValidationError):
        return f"The request cannot be read: {type(error).__name__}: {error}"
    problems = error.errors(include_url=False)
    said = []
    for problem in problems[:SHOWN_PROBLEMS]:
        where = ".".join(map(str, problem["loc"]))
        found = "" if problem["type"] == "missing" else f" (found {_shorten(problem['input'])})"
        said.append(f"{where}: {_reason(problem)}{found}")
    more = len(problems) - len(said)
    return "; ".join(said) + (f"; and {more} more" if more else "") + "."


def _reason(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return "not taken here"
    if problem["type"] == "string_pattern_mismatch":
        return "expected the number of a token"
    if problem["loc"] == ("messages",) and problem["type"] == "list_type":
        return 'expected a list of messages such as {"role": "user", "content": "..."}'
    return str(problem["msg"]).removeprefix("Value error, ")


def _shorten(value: object) -> str:
    if isinstance(value, dict | list):
        return f"a {'dictionary' if isinstance(value, dict) else 'list'} of {len(value)}"
    shown = json.dumps(value) if isinstance(value, str | bool) else f"{value!r:.99}"
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."
