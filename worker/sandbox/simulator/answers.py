"""The simulated vLLM's tokenizer, its fixed answers and its pseudo-text. Pure data, no I/O.

The tokenizer is reversible and needs no file. Tokens 0 to 3 are special. The 256 bytes, pairs of letters and all words
of the fixed answers follow. Any other character, such as an emoji, has one token for each byte, and only its last token
has text, as with the byte-level tokenizers of real models.
"""

import codecs
import hashlib
import re
from collections.abc import Iterable
from string import ascii_letters, ascii_lowercase
from typing import Literal, NamedTuple

__all__ = [
    "END",
    "START",
    "VOCABULARY",
    "Kind",
    "Token",
    "answer_tokens",
    "decode",
    "encode",
    "filler",
    "known_answer",
    "pseudo_text",
]

STORY = (
    "The river kept a ledger of every boat that crossed it. In spring the numbers were small, "
    "written in silver along the shallows; by autumn they filled the banks like fallen leaves. "
    'A child asked the ferryman who read them. "The sea does," he said, "one line at a time, '
    'and it never skips a page." So the child sat down and waited for the sea to answer. '
)
LONG_STORY = STORY + (
    "Winter came, and the ink froze in the reeds. The ferryman mended his nets by the stove, "
    "but the child went down to the water every morning. One night the ice broke, and half of "
    'the ledger was carried off under the bridge. "Is it lost?" the child asked. "No," said the '
    'ferryman, "another hand has picked up the pen, and it knows the last word that was written." '
    "In spring the river went on where it had stopped, line after line, with no word missing "
    "and none written twice. Far away the sea turned the last page. Its answer came up the river "
    "with the tide, so slowly that only the child saw it: a single boat, its lamp lit, and "
    "nobody at the oars but the current."
)

KNOWN = {
    "Who are you?": (
        "I am LLaMA, an AI assistant developed by Meta AI that can understand and respond to human input."
    ),
    "你是谁?": "我是一个人工智能助手,可以帮助你回答问题、写作和编程。很高兴认识你!",
    "Send emoji": "Sure! 🙂🚀👩‍👩‍👧‍👦 café naïve ½ 世界 🇫🇷 done ✅",
    "Tell me a story": (STORY * 3).strip(),  # as recorded
    "Tell me a long story": LONG_STORY,
    "Write code": '```python\ndef main() -> None:\n\tprint("line one\\nline two")\n```\nThat\'s it.',
    "Think first": (
        "<think>\nThe user wants me to think. 让我想想… two steps: read, answer.\n</think>\n\nThe answer is 42."
    ),
    "Weather in Paris": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call>'
    ),
    "Give JSON": '{"name": "Ada", "age": 36, "tags": ["maths", "poetry"]}',
}

WORDS = (  # noqa: SIM905, a literal would take 64 lines
    "amber anchor autumn basket beacon bridge candle canyon cedar cinder copper coral cotton cricket delta drift "
    "ember falcon feather ferry fjord forest garden glacier granite harbor hazel heron hollow island ivory "
    "jasmine lantern lichen linen marble meadow mirror moss nectar ocean orchard otter pebble pepper pine quarry "
    "quiet raven reed ripple river saffron shadow silver sparrow stone summer thicket timber tundra valley velvet "
    "willow"
).split()

END, START = 2, 3  # the ids of <|im_end|> and <|im_start|>, as in the recorded answers

_PIECE = re.compile(r"</?(?:think|tool_call)>| ?[A-Za-z]+|.", re.DOTALL)
_FRAGMENT = re.compile(r" [A-Za-z]|[A-Za-z][a-z]|.", re.DOTALL)
_RARE = re.compile("[\u4e00-\u4fff\U0001f000-\U0001ffff]")  # some Chinese and all emoji: several tokens a character
_TOOL_CALL = re.compile(
    r'(<tool_call>\s*\{"name": ")([^"]+)(", "arguments": )(\{.*\})(\}\s*</tool_call>)\s*',
    re.DOTALL,
)
_REASONING = re.compile(r"(<think>)(.*?)(</think>)(.*)", re.DOTALL)


def _vocabulary() -> list[bytes]:
    pairs = [first + second for first in " " + ascii_letters for second in ascii_lowercase]
    texts = [*KNOWN, *KNOWN.values(), *WORDS, *(f" {word}" for word in WORDS)]
    words = {piece for text in texts for piece in _PIECE.findall(text) if not _RARE.match(piece)}
    pieces = [b"<unk>", b"<s>", b"<|im_end|>", b"<|im_start|>", *(bytes([byte]) for byte in range(256))]
    return list(dict.fromkeys([*pieces, *(text.encode() for text in pairs + sorted(words))]))


VOCABULARY = _vocabulary()
"""The bytes of each token, by id."""
_IDS = {token: number for number, token in enumerate(VOCABULARY)}

Kind = Literal["content", "reasoning", "hidden", "name", "arguments"]
"""The field of the delta that gets the text of a token; `hidden` for markers and the frame of a tool call."""


class Token(NamedTuple):
    id: int
    text: str
    """The text that the token adds. A character is added by the token of its last byte; the others have no text."""
    kind: Kind
    part: str
    """The part of the text that is sent; for `name` the whole name of the function."""


def encode(text: str) -> list[int]:
    """The token ids of a text. Their entries in VOCABULARY, joined, are its UTF-8."""
    ids: list[int] = []
    for piece in _PIECE.findall(text):
        whole = _IDS.get(piece.encode())
        if whole is not None:
            ids.append(whole)
            continue
        for fragment in _FRAGMENT.findall(piece):
            raw = fragment.encode()
            known = _IDS.get(raw)
            ids.extend([known] if known is not None else (_IDS[bytes([byte])] for byte in raw))
    return ids


def decode(ids: Iterable[int]) -> str:
    """The text of token ids: U+FFFD for bytes that are not UTF-8, nothing for an unknown id."""
    known = (VOCABULARY[number] for number in ids if number < len(VOCABULARY))
    return b"".join(known).decode(errors="replace")


def filler(count: int) -> list[Token]:
    """`count` tokens to append to an answer that must not end yet; always the same tokens."""
    return _tokens("content", f" {pseudo_text('more', count)}") if count > 0 else []


def answer_tokens(answer: str, *, tools: bool, reasoning: bool) -> list[Token]:
    """The tokens of an answer without the end token. `tools` and `reasoning` are whether these parsers are on."""
    if tools and (call := _TOOL_CALL.fullmatch(answer)):
        opening, name, middle, arguments, closing = call.groups()
        return [
            *_tokens("hidden", opening),
            *(token._replace(kind="hidden", part="") for token in _tokens("name", name)[:-1]),
            _tokens("name", name)[-1]._replace(part=name),
            *_tokens("hidden", middle),
            *_tokens("arguments", arguments),
            *_tokens("hidden", closing),
        ]
    if reasoning and (thought := _REASONING.fullmatch(answer)):
        kinds: tuple[Kind, ...] = ("hidden", "reasoning", "hidden", "content")
        return [token for kind, text in zip(kinds, thought.groups(), strict=True) for token in _tokens(kind, text)]
    return _tokens("content", answer)


def _tokens(kind: Kind, text: str) -> list[Token]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    tokens = []
    for number in encode(text):
        added = decoder.decode(VOCABULARY[number])
        tokens.append(Token(number, added, kind, "" if kind == "hidden" else added))
    return tokens


def known_answer(question: str) -> str | None:
    """The fixed answer to this question, with its `<think>` and `<tool_call>` markers; None if it has none."""
    return KNOWN.get(question)


def pseudo_text(seed: str, tokens: int) -> str:
    """A text of exactly `tokens` tokens, always the same for the same seed."""
    return "".join(_pseudo_words(hashlib.shake_128(seed.encode()).digest(tokens)))


def _pseudo_words(numbers: bytes) -> Iterable[str]:
    for place, number in enumerate(numbers):
        if place % 10 == 9:
            yield "."
        else:
            yield f"{' ' if place else ''}{WORDS[number % len(WORDS)]}"
