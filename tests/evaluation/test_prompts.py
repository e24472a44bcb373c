"""Prompts of the subject and of its class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from library.evaluation.prompts import PAPER, SubjectWords, fill_in, read_subject_prompts, requests_of
from library.options.mistakes import UserError
from library.sampling.prompts import ImageRequest

DOG = SubjectWords("sks dog", "dog")


def texts(prompt: str, words: SubjectWords = DOG) -> tuple[str, str | None]:
    found = fill_in(ImageRequest(prompt), words)
    return found.request.prompt, found.of_class and found.of_class.prompt


def test_the_lists_of_the_paper() -> None:
    assert [len(set(prompts)) for prompts in PAPER.values()] == [25, 25]
    assert all(prompt.count("{subject}") == 1 for prompts in PAPER.values() for prompt in prompts)
    assert sorted(set(PAPER["live"]) - set(PAPER["object"]))[0] == "a {subject} in a chef outfit"


def test_the_rare_token_is_not_in_the_words_of_the_class() -> None:
    assert texts("a {subject} in the snow") == ("a sks dog in the snow", "a dog in the snow")
    assert texts("a photo of Sks dog, sks dogs") == ("a photo of Sks dog, sks dogs", "a photo of dog, sks dogs")
    assert texts("a cat") == ("a cat", None)
    assert texts("a {subject} in the snow", SubjectWords("dog", "dog")) == ("a dog in the snow",) * 2  # no identifier
    assert texts("{subject}", SubjectWords("sks dog", None)) == ("sks dog", None)
    assert texts(r"a {subject}", SubjectWords(r"(s+\1", r"\g<0>")) == (r"a (s+\1", r"a \g<0>")


def test_a_file_has_its_own_settings(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a {subject} --w 640 --d 7\na {subject} --n fog\n", encoding="utf-8")
    prompts = read_subject_prompts(file, DOG, ImageRequest("", width=512, height=512, steps=9), "--evaluation_prompts")
    assert [prompt.name for prompt in prompts] == ["a sks dog 640x512", "a sks dog 512x512"]
    of_class = [prompt.of_class for prompt in prompts]
    assert of_class == [replace(prompt.request, prompt="a dog") for prompt in prompts]
    seeds = [[request.seed for request in own] for own in requests_of(prompts, 3, 40)]
    assert seeds == [[7, 8, 9], [1040, 1041, 1042]]


def test_seeds_do_not_depend_on_the_number_of_images() -> None:
    prompts = [fill_in(ImageRequest("a {subject}"), DOG), fill_in(ImageRequest("a cat"), DOG)]
    few, many = requests_of(prompts, 1, 0), requests_of(prompts, 4, 0)
    assert [own[0] for own in few] == [own[0] for own in many]
    assert [len(own) for own in requests_of(prompts, 2, 0, of_class=True)] == [2, 0]


def test_prompts_without_the_subject_are_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n", encoding="utf-8")
    with pytest.raises(UserError, match="no prompt has {subject}"):
        read_subject_prompts(file, DOG, ImageRequest(""), "--evaluation_prompts")
