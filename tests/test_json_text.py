"""JSON for readers that know no NaN."""

import json

import pytest

from kromhc_hf.inspection.page import page
from kromhc_hf.json_text import finite, json_text


NUMBERS = {"loss": [1.5, float("nan"), (float("inf"), -float("inf"))], "passed": False, "steps": 3, "name": None}


def refuse(constant: str) -> None:
    pytest.fail(f"{constant} is not JSON")


def test_numbers_that_are_not_finite_are_null() -> None:
    found = json.loads(json_text(NUMBERS), parse_constant=refuse)
    assert found == finite(NUMBERS)
    assert found == {"loss": [1.5, None, [None, None]], "passed": False, "steps": 3, "name": None}


def test_the_numbers_of_a_page_can_be_parsed() -> None:
    text = page("title", "", NUMBERS)
    numbers = text.partition('id="numbers">')[2].partition("</script>")[0]
    assert json.loads(numbers, parse_constant=refuse)["loss"][0] == 1.5
