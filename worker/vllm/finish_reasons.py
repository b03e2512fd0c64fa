"""What a finish reason says of an answer: that it is whole, that its server broke it off, or nothing that is known."""

_WHOLE = frozenset({"stop", "length", "tool_calls", "function_call", "content_filter", "repetition"})
"""Those of OpenAI and vLLM 0.32.0."""
_BROKEN_OFF = (
    "abort", "cancel", "error", "timeout", "timed_out", "time_limit", "fail", "interrupt", "disconnect", "exception",
    "shutdown", "preempt", "evict", "insufficient", "unavailable", "overload", "crash", "kill",
)  # fmt: skip
"""Words in any other reason by which a server says that it broke the answer off, itself."""


def is_known(reason: str) -> bool:
    """Whether it is a reason of a whole answer. One that is neither this nor of a fault counts as one all the same."""
    return reason in _WHOLE


def is_of_a_fault(reason: str) -> bool:
    """Whether it says that the server broke the answer off."""
    return not is_known(reason) and any(word in reason.lower() for word in _BROKEN_OFF)
