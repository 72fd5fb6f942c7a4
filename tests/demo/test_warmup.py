"""The course in words: what each lesson adds, and that it comes in order."""

import re

import pytest

from qwenvl_jax.demo import warmup
from qwenvl_jax.demo.clips import describe_clip
from qwenvl_jax.demo.records import parse_answer, sight

SIZE = 300


def conversations(progress):
    return [warmup.lesson(3, index, progress) for index in range(SIZE)]


def times_in_front(messages) -> bool:
    return messages[0]["content"].startswith("<")


def told_times(messages) -> list[float]:
    return [float(time) for time in re.findall(r"<([0-9.]+) seconds>", messages[0]["content"])]


def test_the_first_lesson_puts_the_time_right_behind_the_word_asked_for():
    for messages in conversations(0.0):
        assert re.fullmatch(r"( [a-z]+[0-9.]+){2,4}When does the .*", messages[0]["content"])
        for reply in messages[1::2]:
            once = reply["content"][: len(reply["content"]) // 2]
            assert reply["content"] == once * 2 and once in messages[0]["content"]
        told = [float(time) for time in re.findall(r"[a-z]([0-9.]+)", messages[0]["content"])]
        assert told == sorted(told)


def paired(messages) -> bool:
    return re.match(r" [a-z]+[0-9]", messages[0]["content"]) is not None


def test_the_second_lesson_puts_the_time_behind_the_words_of_its_patch():
    made = [messages for messages in conversations(0.1) if not paired(messages)]
    assert 0.85 * SIZE < len(made) < SIZE
    for messages in made:
        assert not times_in_front(messages)
        for asked, reply in zip(messages[::2], messages[1::2], strict=True):
            colour, start, again, end = re.fullmatch(r" (\w+?)([0-9.]+) (\w+?)([0-9.]+)", reply["content"]).groups()
            assert colour == again and f" the {colour} " in asked["content"] and start == end
            # What is told has the name, and behind it, with nothing but other names between, the time.
            assert re.search(rf" {colour} \w+( \w+)*<{re.escape(start)} seconds>", messages[0]["content"])


@pytest.mark.parametrize(
    ("lesson", "progress", "terse", "front", "all_patches"),
    [
        ("recall", 0.1, (1.0, 1.0), (0.0, 0.0), (0.0, 0.0)),
        ("form", 0.25, (0.08, 0.22), (0.0, 0.0), (0.0, 0.0)),
        ("front, half way", 0.35, (0.08, 0.22), (0.35, 0.6), (0.0, 0.0)),
        ("front, at its end", 0.44, (0.08, 0.22), (0.78, 0.94), (0.0, 0.0)),
        ("patches, half way", 0.595, (0.08, 0.22), (0.78, 0.94), (0.0, 0.05)),
        ("task", 0.9, (0.08, 0.22), (0.78, 0.94), (0.78, 0.94)),
    ],
)
def test_each_lesson_adds_one_step_and_keeps_some_of_those_before(lesson, progress, terse, front, all_patches):
    made = conversations(progress)
    clips = [describe_clip(3, index, "train") for index in range(SIZE)]
    shares = {
        "terse": sum(parse_answer(m[1]["content"]) is None for m in made) / SIZE,
        "front": sum(times_in_front(m) for m in made) / SIZE,
        "all": sum(len(told_times(m)) == len(sight(c).times) for m, c in zip(made, clips, strict=True)) / SIZE,
    }
    for name, (least, most) in {"terse": terse, "front": front, "all": all_patches}.items():
        assert least <= shares[name] <= most, (lesson, name, shares)


def test_thinned_patches_keep_the_first_and_the_last_of_every_event():
    fewer = 0
    for index in range(SIZE):
        # Of the first question too, whose turn also tells the clip, the answer names the event.
        answers = [parse_answer(m["content"]) for m in warmup.lesson(3, index, 0.5)[1::2]]
        if None in answers or all(start == end for _, start, end in answers):
            continue  # a lesson that came back: terse, or every event told once
        whole = [parse_answer(m["content"]) for m in warmup.text_conversation(3, index)[1::2]]
        assert sorted(answers) == sorted(whole)
        fewer += len(told_times(warmup.lesson(3, index, 0.5))) < len(sight(describe_clip(3, index, "train")).times)
    assert fewer > SIZE / 2


def test_the_course_fills_its_budget_in_order_and_is_the_same_again():
    def count_tokens(messages):
        return sum(len(message["content"]) for message in messages)

    course = list(warmup.course(1, 200_000, count_tokens))
    assert course == list(warmup.course(1, 200_000, count_tokens))
    sizes = [count_tokens(messages) for messages in course]
    assert sum(sizes) >= 200_000 > sum(sizes[:-1])
    terse = [parse_answer(messages[1]["content"]) is None for messages in course]
    first_form = terse.index(False)
    assert sum(sizes[:first_form]) == pytest.approx(200_000 * warmup.LESSONS["recall"], rel=0.02)
    tail = course[-30:]
    assert sum(times_in_front(m) for m in tail) > 20 and sum(len(told_times(m)) > 6 for m in tail) > 20
