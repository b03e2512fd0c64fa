"""What a finish reason means: that the answer is whole, that its server broke it off, or nothing known. No I/O."""

import re

_WHOLE = frozenset({
    # OpenAI and vLLM 0.32.0.
    "stop", "length", "tool_calls", "function_call", "content_filter", "repetition",
    # TGI, Anthropic, Gemini, Cohere, Mistral, Bedrock, Zhipu, and servers that pass these on.
    "eos", "eos_token", "stop_sequence", "end_turn", "complete", "completed",
    "max_tokens", "max_length", "model_length", "model_context_window_exceeded",
    "tool_call", "tool_use", "refusal", "safety", "recitation", "sensitive", "content_filtered", "guardrail_intervened",
})  # fmt: skip
"""Reasons of a whole answer, in lower case."""
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
"""Words in any other reason that show that the server broke the answer off."""


def is_known(reason: str) -> bool:
    """Whether a reason is that of a whole answer. A reason that is neither known nor a fault counts as one too."""
    return reason.lower() in _WHOLE


def is_fault(reason: str) -> bool:
    """Whether a reason shows that the server broke the answer off."""
    return not is_known(reason) and _BROKEN_OFF.search(reason.lower()) is not None
