"""Classifies finish reasons: the answer is complete, the server broke it off, or the reason is unknown. No I/O."""

import re

_WHOLE = frozenset({
    # OpenAI and vLLM 0.32.0.
    "stop", "length", "tool_calls", "function_call", "content_filter", "repetition",
    # TGI, Anthropic, Gemini, Cohere, Mistral, Bedrock, Zhipu, and servers that pass these on.
    "eos", "eos_token", "stop_sequence", "end_turn", "complete", "completed",
    "max_tokens", "max_length", "model_length", "model_context_window_exceeded",
    "tool_call", "tool_use", "refusal", "safety", "recitation", "sensitive", "content_filtered", "guardrail_intervened",
})  # fmt: skip
"""Reasons of a complete answer, in lower case."""
_BROKEN_OFF = re.compile(
    r"""
      abort | cancel | interrupt | preempt | evict | kill | terminat | shutdown | unload | stopped_by | stall
    | error | fail | exception | crash | broken | incomplete
    | timeout | timed_out | time_limit | max_time | deadline | expire
    | disconnect | connection | closed | lost
    | insufficient | unavailable | overload | rate_limit | quota | memory | (?<![a-z]) oom (?![a-z])
    """,
    re.VERBOSE,
)
"""Words in any other reason that indicate that the server broke the answer off."""


def is_known(reason: str) -> bool:
    """Whether a reason is on the list of those of a complete answer.

    An answer with a reason that is neither known nor a fault counts as complete too.
    """
    return reason.lower() in _WHOLE


def is_fault(reason: str) -> bool:
    """Whether a reason indicates that the server broke the answer off."""
    return not is_known(reason) and _BROKEN_OFF.search(reason.lower()) is not None
