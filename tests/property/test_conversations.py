"""Drawn conversations render as DeepSeek's own library renders them, text and control tokens."""

import random

import deepseek_recipe as recipe
import pytest

from hadal.encoding import Encoding
from tests.golden.data import tokenizer, tokenizer_file
from tests.property.conversations import difference, draw, theirs

RECIPES = {"v4-0731": recipe.DeepseekV4Encoding, "v4.1": recipe.DeepseekV41Encoding}


@pytest.mark.parametrize("generation", RECIPES)
@pytest.mark.parametrize("seed", range(10))
def test_renders_as_the_publisher(generation, seed):
    rng = random.Random(seed)
    ours, published = Encoding.load(generation), RECIPES[generation]()
    for _ in range(100):
        assert difference(draw(rng), ours, published) is None


def test_encodes_as_the_publisher():
    rng = random.Random(0)
    ours = Encoding.load("v4-0731", tokenizer=tokenizer())
    published = recipe.DeepseekV4Encoding().with_tokenizer(
        recipe.Tokenizer.from_file(str(tokenizer_file()))
    )
    for _ in range(100):
        drawn = draw(rng)
        settings = {k: v for k, v in drawn.items() if k != "messages"}
        ids = ours.encode(drawn["messages"], generation_prompt=True, **settings)
        assert ids == published.encode(theirs(drawn))
