"""docs/histories.md and its pictures are what the table makes of them now."""

import re

import pytest

from docs import draw_histories
from mirror.core.generation import TABLE


def test_the_page_names_every_row_once_and_in_order() -> None:
    text = draw_histories.PAGE.read_text()
    between = text.partition(draw_histories.BEGIN)[2].partition(draw_histories.END)[0]
    assert re.findall(r"^\| `([a-z0-9-]+)` ", between, re.MULTILINE) == [row.rule for row in TABLE]
    assert draw_histories.page(text) == text, "make pictures"


@pytest.mark.parametrize("story", draw_histories.stories(), ids=lambda story: story.name)
def test_each_picture_is_drawn_from_the_table_and_shown(story: draw_histories.Story) -> None:
    picture = draw_histories.HERE / "pictures" / f"{story.name}.svg"
    assert picture.read_text() == story.svg(), "make pictures"
    assert f"(pictures/{picture.name})" in draw_histories.PAGE.read_text()


def test_a_story_named_after_a_rule_ends_with_it() -> None:
    rules = {row.rule for row in TABLE}
    for story in draw_histories.stories():
        assert story.name not in rules or story.outcome().rule == story.name


def test_no_picture_is_left_over() -> None:
    drawn = {f"{story.name}.svg" for story in draw_histories.stories()}
    assert {path.name for path in (draw_histories.HERE / "pictures").iterdir()} == drawn
