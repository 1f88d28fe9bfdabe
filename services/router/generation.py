"""What a client asked for, whatever protocol it spoke, and what it gets back.

Protocol layers (http/, grpc/) make these and read these; nothing here knows HTTP, gRPC, or where the work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from headrace.telemetry.traces import NO_CONTEXT, Context, Span

if TYPE_CHECKING:
    from services.router.kv_mirror import KvReader

TokenArray = npt.NDArray[np.int32]
VectorArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text to continue."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that is tokens already."""

    token_ids: TokenArray


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant's turn made; `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON Schema of its arguments, None when it has none."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the model must do with its tools: "auto", "none", "required", or "named" with the tool's name."""

    kind: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""


@dataclass(frozen=True, slots=True)
class ReasoningOptions:
    """What becomes of the model's reasoning.

    Attributes:
        is_separate: Told apart from the text; else left in it.
        is_streamed: Given as it is made; else whole, before the first text.
        budget_tokens: Most tokens of it, then the block is closed; None for no limit.
    """

    is_separate: bool = True
    is_streamed: bool = True
    budget_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn of a conversation. `tool_calls` and `reasoning` are an assistant's, `tool_call_id` a tool's."""

    role: str
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class ConversationPrompt:
    """A conversation, to be rendered with the model's chat template."""

    turns: tuple[ChatTurn, ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: tuple[Tool, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables for the template, JSON values by name."""


SPECULATIVE_METHODS: Final = ("off", "ngram", "auto")
"""Ways of guessing tokens ahead, as clients name them."""

Prompt = TextPrompt | TokenPrompt | ConversationPrompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; None leaves the choice to the model's defaults."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a sequence ends."""

    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_in_output: bool = False


@dataclass(frozen=True, slots=True)
class Speculative:
    """How the output may be speculated on; None leaves the choice to the worker.

    Attributes:
        method: One of `SPECULATIVE_METHODS`.
        num_tokens: Most tokens guessed at a time.
    """

    method: str | None = None
    num_tokens: int | None = None


CONSTRAINT_KINDS: Final = ("json_schema", "json_object", "regex", "ebnf", "choice", "structural_tag")
"""Languages of constraints, as clients name them."""
TOOL_CALLS_KIND: Final = "tool_calls"
"""Free text with right calls in the model's own format: what `tool_choice: auto` makes of strict tools."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an output must be.

    Attributes:
        kind: One of `CONSTRAINT_KINDS`, or `TOOL_CALLS_KIND`.
        source: A JSON schema, a regular expression, a grammar (GBNF or Lark), a JSON array of choices, or a structural tag in JSON;
            empty for any JSON object; of tool calls what `services/router/tools.py` makes.
        param: The field of the client's request that it came from, for errors.
    """

    kind: str
    source: str = ""
    param: str = "response_format"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request for one sequence, or several choices of the same prompt.

    `logprobs` and `prompt_logprobs` are how many of the likeliest tokens are told beside each token of output and prompt; None for
    no logprobs.
    """

    model: str
    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    skip_special_tokens: bool = True
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    cache_namespace: str = ""
    num_choices: int = 1
    speculative: Speculative = field(default_factory=Speculative)
    constraint: Constraint | None = None
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    reasoning: ReasoningOptions = ReasoningOptions()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class OutputFormats:
    """How a model writes tool calls and reasoning; an empty name is no format.

    Attributes:
        starts_in_reasoning: The prompt ends inside a reasoning block.
        reasoning_end_token_ids: Tokens that close one; none where it cannot be closed from outside.
    """

    tool_format: str = ""
    reasoning_format: str = ""
    starts_in_reasoning: bool = False
    reasoning_end_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """What a tokenizer made of a prompt, and what it knows of the model."""

    token_ids: TokenArray
    max_model_len: int = 0
    eos_token_ids: tuple[int, ...] = ()
    defaults: Sampling = field(default_factory=Sampling)
    grammar: str = ""
    """What the output must be, as workers take it; empty for anything."""
    formats: OutputFormats = OutputFormats()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A new part of a tool call. The first of a call has `id` and `name`; `arguments` are characters of JSON that follow on."""

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


class LikelyToken(NamedTuple):
    """A token that could have stood somewhere, its bytes, and the natural logarithm of its probability."""

    token_id: int
    text: bytes
    logprob: float


class TokenLogprob(NamedTuple):
    """How likely a token was; None where that is not told, as for the first token of a prompt."""

    token_id: int
    text: bytes
    logprob: float | None
    top: tuple[LikelyToken, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a tokenizer tells of its model.

    Attributes:
        path: Model directory on the machine where it is served.
        architectures: Names of its classes, as config.json has them.
        tokenizer_zip: An archive of the tokenizer's files; empty unless asked for.
    """

    path: str
    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    defaults: Sampling
    tokenizer_zip: bytes = b""


@dataclass(frozen=True, slots=True)
class OutputPiece:
    """New output of one choice: reasoning, then text, then tool calls. Its last piece has a finish reason: "stop", "length", or
    "tool_calls" when it stopped and made some.

    Where logprobs were asked for there is one for each of `token_ids`, and the first piece of a choice has those of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    choice: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    vector: VectorArray | None = None
    """Of a text that was embedded; there is no other output then."""


@dataclass(frozen=True, slots=True)
class EmbeddingOffer:
    """What vectors a model makes.

    Attributes:
        size: Numbers in a vector.
        is_matryoshka: Vectors can be cut.
        dimensions: Sizes to which they can be cut; empty for any.
    """

    size: int
    is_matryoshka: bool = False
    dimensions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """A model that can be asked for now. `embedding` is None for one that generates text."""

    name: str
    max_model_len: int
    loaded_unix_s: int
    embedding: EmbeddingOffer | None = None


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A checked request for one vector a text.

    Attributes:
        inputs: The texts, as text or as tokens.
        dimensions: Numbers in each vector; None for all.
        param: The field of the client's request that the texts came from, for errors.
    """

    model: str
    inputs: tuple[TextPrompt | TokenPrompt, ...]
    dimensions: int | None = None
    param: str = "input"


@dataclass(frozen=True, slots=True)
class EmbedAnswer:
    """Vectors, float32 `[num_inputs, size]`, in the order of the texts; tokens of each text, special tokens included."""

    model: str
    vectors: VectorArray
    num_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy all schedulers together are, as they last said.

    Attributes:
        num_waiting_tokens: Prompt tokens of the sequences that wait.
        max_num_seqs: Most sequences that can run at once.
        num_kv_tokens: Tokens that all KV pages hold.
        num_used_tokens: Those of pages that running sequences hold.
    """

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    max_num_seqs: int
    num_kv_tokens: int
    num_used_tokens: int


@dataclass(slots=True)
class Call:
    """One client call on its way: identity, whose it is, trace, deadline. Ended exactly once by the layer that began it."""

    request_id: str
    endpoint: str
    started_ns: int
    started_unix_ns: int
    span: Span = field(default_factory=lambda: Span(None, NO_CONTEXT))
    timeout_s: float | None = None
    is_streaming: bool = False
    tenant: str = ""
    is_online: bool = True
    """Whether somebody waits for it; false for a request of a batch."""
    cut: Callable[[], object] | None = None
    """Breaks the client's connection; set by a layer whose sends may block for ever."""

    @property
    def context(self) -> Context:
        """Trace context below the call's own span."""
        return self.span.context


class OutputStream(Protocol):
    """The output of one open request, as a protocol layer reads it."""

    @property
    def model(self) -> str:
        """The model that answers."""
        ...

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt; known with the first output."""
        ...

    @property
    def num_output_tokens(self) -> int:
        """Tokens made so far, over all choices."""
        ...

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV was reused."""
        ...

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens made so far that were reasoning, over all choices."""
        ...

    async def next(self) -> OutputPiece:
        """All output of one choice that has come since it was last given, waiting for some.

        Raises:
            HeadraceError: The request ended without its full output.
        """
        ...

    def close(self) -> None:
        """The client is gone or has all it wanted; aborts what is still running. Idempotent."""
        ...


class KvSource(Protocol):
    """Where gateways read along what the lanes have cached."""

    def read(self, wake: Callable[[], object]) -> KvReader:
        """Read from now on; `wake` is called when something has changed."""
        ...

    def close(self, reader: KvReader) -> None:
        """A reader leaves."""
        ...


class Engine(Protocol):
    """What the protocol layers need from the rest of the router."""

    @property
    def num_online_requests(self) -> int:
        """Open generations that somebody waits for, each choice as one."""
        ...

    def begin_call(self, *, protocol: str, endpoint: str, traceparent: str = "", tracestate: str = "") -> Call:
        """Open a client call ("http" or "grpc"): mint its id, start its span, note its time."""
        ...

    def end_call(self, call: Call, *, status: str, error_code: str | None = None) -> None:
        """Close a client call: span, metrics."""
        ...

    def open_stream(self, request: GenerationRequest, call: Call) -> OutputStream:
        """Start a generation.

        Raises:
            OverloadedError: Too many requests are open.
            UnavailableError: The router is draining.
            NotFoundError: No such model.
        """
        ...

    async def tokenize(self, model: str, prompt: Prompt, call: Call) -> EncodedPrompt:
        """Tokens of a prompt."""
        ...

    async def detokenize(self, model: str, token_ids: Sequence[int], call: Call, *, skip_special_tokens: bool) -> str:
        """Text of tokens."""
        ...

    async def describe(self, model: str, call: Call, *, with_files: bool = False) -> ModelDescription:
        """What a model is, with the files of its tokenizer where they are asked for."""
        ...

    async def embed(self, request: EmbedRequest, call: Call) -> EmbedAnswer:
        """One vector a text.

        Raises:
            InvalidRequestError: The model makes no vectors, not of that size, or not of such a text.
            NotFoundError: No such model.
            OverloadedError: Too many requests are open.
            UnavailableError: The router is draining, or a stage is missing.
        """
        ...

    async def flush_cache(self, call: Call) -> int:
        """Have all schedulers drop their prefix caches; gives the pages dropped."""
        ...

    def list_models(self) -> list[ModelOffer]:
        """Models that can be served now."""
        ...

    def load(self) -> EngineLoad:
        """How busy the schedulers are."""
        ...

    @property
    def kv(self) -> KvSource:
        """What the lanes have cached."""
        ...

    def not_ready_reason(self) -> str | None:
        """Why a request could not be served now; None when it could."""
        ...

    def health(self) -> dict[str, object]:
        """What the router knows of every stage."""
        ...

    def metrics(self) -> bytes:
        """The process's metrics in Prometheus' text format."""
        ...
