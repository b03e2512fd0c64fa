"""How rows are filtered, sorted and fitted into the width of a terminal."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from worker.top.columns import Cell, Column, Order, arranged, gap, shortened, widths


@dataclass(frozen=True)
class _Pod:
    name: str
    load: float | None = None


COLUMNS: tuple[Column[_Pod], ...] = (
    Column("pod", lambda pod: Cell(pod.name, pod.name), least=5),
    Column("load", lambda pod: Cell("" if pod.load is None else f"{pod.load:g}", pod.load), is_number=True),
    Column("version", lambda _: Cell("0.1.0", "0.1.0"), drop=1),
)
PODS = [_Pod("b", 2), _Pod("a", 10), _Pod("c"), _Pod("B2", 1)]


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (Order(), ["b", "a", "c", "B2"]),
        (Order(-1, is_reversed=True), ["B2", "c", "a", "b"]),
        (Order(0), ["B2", "a", "b", "c"]),
        (Order(1), ["B2", "b", "a", "c"]),
        (Order(1, is_reversed=True), ["a", "b", "B2", "c"]),
    ],
)
def test_rows_are_sorted_and_those_without_a_value_come_last(order: Order, names: list[str]) -> None:
    assert [row.subject.name for row in arranged(PODS, COLUMNS, order)] == names


def test_a_filter_finds_a_text_in_any_cell_in_upper_and_lower_case() -> None:
    assert [row.subject.name for row in arranged(PODS, COLUMNS, Order(), "B")] == ["b", "B2"]
    assert [row.subject.name for row in arranged(PODS, COLUMNS, Order(), "10")] == ["a"]


def test_a_narrow_table_first_shortens_texts_and_then_leaves_columns_out() -> None:
    rows = arranged([_Pod("a-rather-long-name", 5)], COLUMNS, Order())
    assert widths(COLUMNS, rows, 200) == [18, 5, 8]
    assert widths(COLUMNS, rows, 25) == [10, 5, 8]
    assert widths(COLUMNS, rows, 14) == [8, 5, 0]
    assert widths(COLUMNS, rows, 3) == [5, 5, 0], "no less is of use"


@settings(max_examples=50)
@given(st.text(st.characters(exclude_characters="…"), max_size=30), st.integers(0, 20))
def test_a_shortened_text_fits_and_keeps_its_ends(text: str, width: int) -> None:
    short = shortened(text, width)
    assert cell_len(short) <= width or short == text
    if cell_len(text) > width > 2:
        head, _, tail = short.partition("…")
        assert text.startswith(head)
        assert text.endswith(tail)


def test_a_name_is_shortened_in_its_middle_and_a_sentence_at_its_end() -> None:
    assert shortened("vllm-relay-7d9f-x2x4z", 11) == "vllm-…x2x4z"
    assert shortened("paused by ops: upgrade", 11) == "paused by …"


def test_columns_are_further_apart_where_there_is_room() -> None:
    assert (gap(80), gap(160)) == (1, 2)
