"""Texts for small language models, made of a few sentences that a model can learn."""

from __future__ import annotations

import random
from pathlib import Path

_SUBJECTS = ("the harbour", "a grey gull", "the old captain", "every boat", "the tide", "a child")
_VERBS = ("waits for", "forgets", "remembers", "looks at", "belongs to")
_OBJECTS = ("the morning", "the sea", "a letter", "the quiet town", "the long winter")


def _story(seed: int, sentences: int) -> str:
    draw = random.Random(seed)
    found = (f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)}." for _ in range(sentences))
    return " ".join(sentence.capitalize() for sentence in found) + f"\nEnd of story {seed}.\n"


STORY = tuple(_story(seed, 30) for seed in range(3))


def write_texts(folder: Path, count: int, sentences: int = 40) -> Path:
    """A folder with so many .txt files."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"text_{number:02}.txt").write_text(_story(number, sentences))
    return folder
