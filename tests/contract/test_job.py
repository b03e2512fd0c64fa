"""Jobs: which are valid, the error of each bad one, and the digest that distinguishes requests."""

import hashlib
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.job import (
    MAX_REQUEST_BYTES,
    InvalidJob,
    Job,
    check_limits,
    check_request,
    digest,
    is_digest_of,
    parse_job,
    request_id_of,
    with_max_tokens,
)

ASKED: Any = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
GOOD = {b"id": b"r1", b"request": msgspec.json.encode(ASKED)}


def with_request(**fields: object) -> dict[bytes, bytes]:
    return GOOD | {b"request": msgspec.json.encode(ASKED | fields)}


def error_of(fields: dict[bytes, bytes], max_request_bytes: int = MAX_REQUEST_BYTES) -> tuple[str, str]:
    """The code and the message of the error of an invalid job."""
    with pytest.raises(InvalidJob) as caught:
        parse_job(fields, max_request_bytes)
    return caught.value.code, str(caught.value)


def test_the_least_job_is_an_id_and_a_request() -> None:
    assert parse_job(GOOD) == Job(id="r1", request=ASKED)


def test_all_fields_of_a_job_are_read() -> None:
    fields = GOOD | {
        b"v": b"1",
        b"deadline": b"1767225600000",
        b"retention": b"60",
        b"fallbacks": b'["small","tiny"]',
        b"tenant": "büro".encode(),
        b"traceparent": b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        b"later": b"\xff",
    }
    assert parse_job(fields) == Job(
        id="r1",
        request=ASKED,
        deadline=1767225600000,
        retention=60,
        fallbacks=("small", "tiny"),
        tenant="büro",
        traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    )


_TEXT = st.text(st.sampled_from('ab-"\\{}é世🙂'), max_size=5)


_NAME = st.text(st.sampled_from("abcXYZ019_-"), min_size=1, max_size=128)
_TIME = st.none() | st.integers(1, 2**53 - 1)
_SPAN = st.none() | st.integers(1, 30 * 24 * 3600)


@given(_NAME, st.dictionaries(_TEXT, st.none() | _TEXT), _TIME, _SPAN, st.lists(_TEXT.filter(bool), max_size=3), _TEXT)
def test_a_job_is_read_back_from_its_fields(
    name: str, more: dict[str, Any], deadline: int | None, retention: int | None, fallbacks: list[str], tenant: str
) -> None:
    job = Job(
        id=name,
        request=ASKED | more,
        deadline=deadline,
        retention=retention,
        fallbacks=tuple(fallbacks),
        tenant=tenant,
        traceparent=tenant[::-1],
        retry_of=name,
    )
    assert parse_job({name.encode(): value.encode() for name, value in job.to_fields().items()}) == job


def test_the_fields_of_a_job_are_those_that_it_has() -> None:
    request = '{"model":"m","messages":[{"role":"user","content":"Hello"}]}'
    assert Job(id="r1", request=ASKED).to_fields() == {"v": "1", "id": "r1", "request": request}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({b"request": b"{}"}, "the job has no id: add a field `id` of 1 to 128 characters of A-Za-z0-9_-"),
        ({}, "the job has no id: add"),
        (GOOD | {b"id": b""}, "the job's id '' cannot be used: it must be 1 to 128 characters of A-Za-z0-9_-"),
        (GOOD | {b"id": b"a b"}, "the job's id 'a b' cannot be used"),
        (GOOD | {b"id": b"\xff"}, "the job's id '\ufffd' cannot be used"),
        (GOOD | {b"id": b"x" * 129}, "cannot be used"),
        ({b"id": b"r1"}, "the job has no request: add a field `request` with the JSON of a chat completion"),
        (GOOD | {b"request": b""}, "the request is not JSON: "),
        (GOOD | {b"request": b"{bad"}, "the request is not JSON: "),
        (GOOD | {b"request": b'{"messages":["\xff"]}'}, "the request is not JSON: "),
        (GOOD | {b"request": b'{"messages":["\\ud83d"]}'}, "the request is not JSON: "),
        (GOOD | {b"request": b"[" * 100_000}, "the request is not JSON: "),
        (GOOD | {b"request": b"[]"}, "the request is not a JSON object: give the body of an OpenAI chat completion"),
        (GOOD | {b"request": b"null"}, "the request is not a JSON object"),
        (GOOD | {b"request": b"{}"}, 'the request has no messages: give a list such as [{"role": "user", "content"'),
        (with_request(messages=[]), "the request has no messages"),
        (with_request(messages="Hello"), "the request has no messages"),
        (with_request(kv_transfer_params=None), "the request sets kv_transfer_params: only the worker may set this"),
        (with_request(kv_transfer_params={}, ec_transfer_params={}), "sets kv_transfer_params, ec_transfer_params: "),
        (with_request(request_id="mine"), "the request sets request_id: only the worker may set this"),
        (with_request(bootstrap_host="10.0.0.1", data_parallel_rank=1), "sets bootstrap_host, data_parallel_rank: "),
        (with_request(vllm_xargs={"kv_transfer_params": "x"}), "the request sets kv_transfer_params in vllm_xargs: "),
        (with_request(n=0), "the request's n is 0: it must be a whole number from 1"),
        (with_request(n=True), "the request's n is true: it must be"),
        (with_request(n="2"), 'the request\'s n is "2": it must be'),
        (with_request(n=1.5), "the request's n is 1.5: it must be"),
        (with_request(stream_options=[]), "the request's stream_options is not a JSON object"),
        (GOOD | {b"v": b"2"}, "the job's v is '2': this worker supports version 1 of the contract"),
        (GOOD | {b"v": b"\xff"}, "the job's v is not UTF-8"),
        (GOOD | {b"deadline": b"soon"}, "the job's deadline is 'soon': it must be a time in Unix milliseconds"),
        (GOOD | {b"deadline": b"0"}, "the job's deadline is '0': it must be"),
        (GOOD | {b"deadline": b"-1"}, "the job's deadline is '-1': it must be"),
        (GOOD | {b"deadline": b"1e3"}, "the job's deadline is '1e3': it must be"),
        (GOOD | {b"deadline": "\uff11".encode()}, "the job's deadline is '\uff11': it must be"),
        (GOOD | {b"deadline": str(2**53).encode()}, "the job's deadline is '9007199254740992': it must be"),
        (GOOD | {b"retention": b"2592001"}, "a number of seconds up to 2592000"),
        (GOOD | {b"retention": b"1.5"}, "the job's retention is '1.5': it must be a number of seconds"),
        (GOOD | {b"fallbacks": b"small"}, "the job's fallbacks is not a JSON list of model names: "),
        (GOOD | {b"fallbacks": b"[1]"}, "the job's fallbacks is not a JSON list of model names: "),
        (GOOD | {b"fallbacks": b"{}"}, "the job's fallbacks is not a JSON list of model names: "),
        (
            GOOD | {b"fallbacks": b'["small",""]'},
            "one has no name or a long one: at most 8 models of 1 to 256 characters",
        ),
        (GOOD | {b"fallbacks": msgspec.json.encode(["m" * 257])}, "one has no name or a long one"),
        (GOOD | {b"fallbacks": msgspec.json.encode(["m"] * 9)}, "the job's fallbacks are too many"),
        (with_request(model="m" * 257), "the request's model is a name of 257 characters: at most 256 are allowed"),
        (GOOD | {b"tenant": b"t" * 257}, "the job's tenant has 257 characters: at most 256 are allowed"),
        (GOOD | {b"traceparent": b"t" * 257}, "the job's traceparent has 257 characters"),
        (GOOD | {b"v": b"1" * 257}, "the job's v has 257 characters"),
        (GOOD | {b"tenant": b"\xff"}, "the job's tenant is not UTF-8"),
        (GOOD | {b"retry_of": b"no/id"}, "the job's retry_of is 'no/id': it must be the id of a request"),
        (GOOD | {b"traceparent": b"\xff"}, "the job's traceparent is not UTF-8"),
    ],
)
def test_the_error_of_a_bad_job_says_what_is_wrong(fields: dict[bytes, bytes], message: str) -> None:
    code, text = error_of(fields)
    assert message in text
    assert code == "invalid_job"
    assert len(text) < 300


def test_a_number_of_many_digits_is_refused_like_others() -> None:
    code, text = error_of(GOOD | {b"deadline": b"9" * 5000})
    assert (code, len(text) < 200) == ("invalid_job", True)


@pytest.mark.parametrize("name", [b"v", b"deadline", b"retention", b"fallbacks", b"tenant", b"traceparent"])
def test_an_empty_field_counts_as_missing(name: bytes) -> None:
    assert parse_job(GOOD | {name: b""}) == parse_job(GOOD)


@pytest.mark.parametrize("fields", [{"n": 3}, {"n": None}, {"stream_options": None}, {"stream_options": {}}, {"x": 1}])
def test_fields_that_vllm_checks_are_let_through(fields: dict[str, object]) -> None:
    assert parse_job(with_request(**fields)).request == ASKED | fields
    assert check_request(ASKED | fields) == ASKED | fields


def test_the_limit_of_a_request_counts_its_bytes() -> None:
    size = len(GOOD[b"request"])
    assert parse_job(GOOD, size).id == "r1"
    code, text = error_of(GOOD, size - 1)
    assert code == "job_too_large"
    assert text == f"the request has {size} bytes, above the limit of {size - 1} (WORKER_MAX_REQUEST_BYTES)"


def test_the_fields_beside_the_request_are_limited_too() -> None:
    names = "m" * 256
    largest = {b"fallbacks": msgspec.json.encode([names] * 8), b"tenant": names.encode(), b"unknown": b"x" * 10_000}
    assert len(parse_job(GOOD | largest, 100).fallbacks) == 8
    code, text = error_of(GOOD | {b"tenant": b"t" * 20_000}, 100)
    assert code == "job_too_large"
    assert text.startswith("the job has 20")
    assert text.endswith("above the limit of 16484 (16384 more than WORKER_MAX_REQUEST_BYTES)")
    assert error_of(GOOD | {b"unknown %d" % n: b"x" * 1000 for n in range(20)}, 100)[0] == "job_too_large"
    assert error_of(GOOD | {b"n" * 20_000: b""}, 100)[0] == "job_too_large"


def test_the_default_limit_is_four_mebibytes() -> None:
    assert error_of(GOOD | {b"request": b" " * (4 * 1024 * 1024 + 1)})[0] == "job_too_large"


def test_the_id_of_a_job_that_is_otherwise_bad_is_found() -> None:
    assert request_id_of({b"id": b"r1", b"request": b"{bad", b"v": b"7"}) == "r1"


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    one = {"model": "m", "messages": [{"role": "user", "content": "é"}], "top_k": 5}
    other = {"top_k": 5, "messages": [{"content": "é", "role": "user"}], "model": "m"}
    assert digest(one) == digest(other)
    # Clients in other languages compute it too.
    plainly = hashlib.sha256('{"a":[1,"é"],"b":1}'.encode()).hexdigest()[:32]
    assert digest({"b": 1, "a": [1, "é"]}) == plainly
    with_fallbacks = hashlib.sha256('{"a":[1,"é"],"b":1}["x","y"]'.encode()).hexdigest()[:32]
    assert digest({"b": 1, "a": [1, "é"]}, ["x", "y"]) == with_fallbacks


_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | _TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(_TEXT, _VALUE), st.dictionaries(_TEXT, _VALUE))
def test_the_digest_tells_requests_apart(one: dict[str, object], other: dict[str, object]) -> None:
    same = msgspec.json.encode(one, order="sorted") == msgspec.json.encode(other, order="sorted")
    assert (digest(one) == digest(other)) == same
    assert digest(dict(reversed(one.items()))) == digest(one)


HELLO: Any = [{"role": "user", "content": "Hello"}]
ODD: Any = [{"role": "user", "content": '你好 🙂\n\t"x" \x01/é'}]
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("request_", "alone", "with_fallbacks"),
    [
        ({"messages": HELLO}, "ebd51c78a443a93c27a9cad55a027665", "adb5ef1c8a3f21bc41eff2737bba272c"),
        (
            {"model": "m", "messages": HELLO, "max_tokens": 9, "temperature": 0.7, "top_p": 0.95, "n": 2},
            "b648f864ad4f289ecb9b58647746c382",
            "b7a6e17e43a0440032829ea66d5d4565",
        ),
        (
            {
                "model": "m", "messages": ODD, "seed": 42, "stop": ["a"], "tools": TOOLS, "min_p": 0.00001,
                "presence_penalty": -0.5, "logit_bias": {"7": -100, "10": 1.5}, "response_format": None,
            },
            "baef1308a91cdaa2cf85b10d1ab85680",
            "43c088916153a56a31fe51b8331f866e",
        ),
    ],
)  # fmt: skip
def test_the_digest_of_an_ordinary_request_stays_the_same(
    request_: dict[str, object], alone: str, with_fallbacks: str
) -> None:
    assert digest(request_) == alone
    assert digest(request_, ["small", "tiny"]) == with_fallbacks


def test_the_digest_is_the_same_however_a_number_is_written() -> None:
    made = {digest(msgspec.json.decode(b'{"a":%b}' % number)) for number in (b"1", b"1.0", b"1e0", b"10e-1")}
    assert made == {hashlib.sha256(b'{"a":1}').hexdigest()[:32]}


def test_a_digest_of_an_earlier_version_is_recognized() -> None:
    request: Any = {"model": "m", "messages": HELLO, "temperature": 1.0}
    for fallbacks, before in (((), "432fdaac85e637e01dcd70e3667abe9a"), (("a",), "64667aae2971561c005c57b95b7c9821")):
        assert is_digest_of(before, request, fallbacks)
        assert is_digest_of(digest(request, fallbacks), request, fallbacks)
        assert not is_digest_of(before, request | {"temperature": 1.5}, fallbacks)
    assert not is_digest_of("", request)


def test_the_digest_counts_the_models_to_fall_back_to() -> None:
    made = {digest(ASKED), digest(ASKED, ["a"]), digest(ASKED, ["b"]), digest(ASKED, ["a", "b"]), digest(ASKED, ["ab"])}
    assert len(made) == 5
    assert digest(ASKED, ()) == digest(ASKED)
    assert all(len(text) == 32 and int(text, 16) >= 0 for text in made)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"n": 5}, "the request's n is 5: at most 4 answers may be requested (WORKER_MAX_CHOICES)"),
        ({"best_of": 5}, "the request's best_of is 5: at most 4"),
        (
            {"max_tokens": 101},
            "the request's max_tokens is 101: it must be a whole number up to 100 (WORKER_MAX_TOKENS)",
        ),
        ({"max_completion_tokens": 101, "max_tokens": 1}, "the request's max_completion_tokens is 101: it must be"),
        ({"max_tokens": "9999"}, 'the request\'s max_tokens is "9999": it must be'),
        ({"max_tokens": 1e4}, "the request's max_tokens is 10000.0: it must be"),
        ({"max_tokens": True}, "the request's max_tokens is true: it must be"),
    ],
)
def test_a_request_above_a_limit_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJob, match=re.escape(message)) as caught:
        check_limits(request_, max_choices=4, max_tokens=100)
    assert caught.value.code == "invalid_job"


def test_a_request_within_the_limits_is_accepted() -> None:
    check_limits({"n": 4, "max_tokens": 100, "max_completion_tokens": None}, max_choices=4, max_tokens=100)
    check_limits({"max_tokens": 10**9}, max_choices=4, max_tokens=0)


@pytest.mark.parametrize(
    ("given", "limit", "sent"),
    [
        ({}, 100, {"max_tokens": 100}),
        ({"max_tokens": None}, 100, {"max_tokens": 100}),
        ({"max_completion_tokens": 5}, 100, {"max_completion_tokens": 5}),
        ({"max_tokens": 5}, 100, {"max_tokens": 5}),
        ({}, 0, {}),
    ],
)
def test_a_job_without_a_length_gets_the_limit(given: dict[str, Any], limit: int, sent: dict[str, Any]) -> None:
    assert with_max_tokens(Job(id="r", request=ASKED | given), limit).request == ASKED | sent
