"""What the page shows of events."""

from __future__ import annotations

import json
import random
from typing import Any

from library.training.events.record import events_of, without_superseded
from library.watch.run_state import RunState
from library.watch.snapshot import snapshot, text_of
from tests.watch.records import BEGAN, begin, drawn, line, status


def shown(*lines: bytes) -> dict[str, Any]:
    """The snapshot after these events, as a browser gets it."""
    state = RunState()
    for event in events_of(b"".join(lines)):
        state.add(event)
    answer: dict[str, Any] = json.loads(json.dumps(snapshot(state), allow_nan=False))
    return answer


def curves(answer: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    return {chart["name"]: {curve["name"]: curve["steps"] for curve in chart["curves"]} for chart in answer["charts"]}


def test_values_are_sorted_into_charts() -> None:
    evaluation = {"loss/validation/step_average": 0.1, "loss/validation/step_average_t000_249": 0.2}
    answer = shown(
        begin(),
        status(1, loss=0.5, loss__subject=0.3, lr__unet=1e-4, drift__class=0.1),
        line("training.status", 2, values={}, seconds_per_step=0.5, memory_bytes=100, gpu_memory_bytes=200),
        line("evaluation", 2, values={**evaluation, "loss/validation/step_divergence": 0.0, "evaluation/dino": 0.4}),
        line("evaluation", 2, values={"evaluation/clip_score": 31.0, "evaluation/clip_score/00_64x64_ema": 30.0}),
    )
    assert set(
        curves(shown(begin(), line("evaluation", 2, values={"loss/validation/epoch_class_t125_249_ema": 1.0})))
    ) == {"epoch_class_ema by timestep"}
    assert curves(answer) == {
        "loss": {"loss": [1], "loss/subject": [1]},
        "validation loss": {"loss/validation/step_average": [2]},
        "step_average by timestep": {"loss/validation/step_average_t000_249": [2]},
        "divergence": {"loss/validation/step_divergence": [2]},
        "evaluation": {"evaluation/dino": [2]},
        "CLIP score": {"evaluation/clip_score": [2], "evaluation/clip_score/00_64x64_ema": [2]},
        "drift": {"drift/class": [1]},
        "learning rate": {"lr/unet": [1]},
        "speed": {"seconds per step": [2]},
        "memory": {"memory": [2], "GPU memory": [2]},
    }
    assert list(curves(answer))[:2] == ["loss", "validation loss"] and list(curves(answer))[-1] == "memory"


def test_losses_of_adapters_and_of_whole_models_are_compared() -> None:
    adapter = shown(begin(), status(1, loss__current=0.5, loss__average=0.5), status(1, loss__epoch_average=0.5))
    assert curves(adapter) == {"loss": {"loss": [1], "loss/average": [1], "loss/epoch": [1]}}


def test_the_head_of_the_page() -> None:
    answer = shown(
        begin(total_steps=50, epochs=5, plan=[["model", "a.safetensors"], ["notes", "beware"]], options={"seed": 1}),
        line(
            "training.status", 3, values={"loss": 0.5}, loss=0.5, epoch=1, seconds_per_step=2.0, remaining_seconds=94.0
        ),
        line("training.status", 3, values={"loss/epoch": 0.4}, epoch=1, loss=None),
    )
    assert (answer["stage"], answer["step"], answer["steps"], answer["epochs"]) == ("started", 3, 50, 5)
    assert answer["status"] == {"epoch": 1, "seconds_per_step": 2.0, "remaining_seconds": 94.0}
    assert answer["began"] == BEGAN.timestamp() and answer["last"] == BEGAN.timestamp() + 3
    assert answer["notes"] == ["beware"] and answer["plan"][0] == ["model", "a.safetensors"]
    assert answer["options"] == {"seed": "1"}


def test_a_resumed_run_takes_back_what_it_does_again() -> None:
    first = [begin()] + [status(step, loss=1.0) for step in range(1, 10)]
    first += [
        drawn("output/sample/a.png", 4),
        drawn("output/sample/b.png", 8),
        drawn("output/sample/c.png", 8, "a cat"),
    ]
    first += [line("training.checkpoint", step, path=f"{step}", bytes=1, kind="state") for step in (4, 8)]
    first += [line("notification", 4, message="kept"), line("notification", 9, message="superseded")]
    first += [line("error", 9, message="the loss is not finite")]
    failed = shown(*first)
    assert failed["stage"] == "failed" and failed["ending"] == "the loss is not finite"

    resumed = shown(*first, begin("resumed", 4), status(5, loss=2.0))
    (loss,) = (curve for chart in resumed["charts"] for curve in chart["curves"])
    assert loss["steps"] == [1, 2, 3, 4, 5] and loss["means"] == [1.0, 1.0, 1.0, 1.0, 2.0]
    assert [[step for step, _ in prompt["images"]] for prompt in resumed["prompts"]] == [[4]]
    assert [saved["step"] for saved in resumed["checkpoints"]] == [4]
    assert [text for _, _, text in resumed["messages"]] == ["kept"]
    assert resumed["stage"] == "resumed" and resumed["step"] == 5 and resumed["ending"] == ""


def test_superseded_events_are_those_of_the_record() -> None:
    """docs/events.md: what without_superseded leaves out makes no difference."""
    randoms = random.Random(7)
    for _ in range(30):
        lines, step = [begin()], 0
        for _ in range(40):
            step += 1
            kinds = [status(step, loss=randoms.random()), status(step, loss=None), drawn(f"output/{step}.png", step)]
            kinds += [line("notification", step, message=str(step)), line("error", step, message="failed")]
            kinds += [line("training.checkpoint", step, path="a", bytes=1, kind="model")]
            kinds += [line("lifecycle.stage", step, stage="interrupted", message="saved")]
            lines.append(randoms.choice(kinds))
            if randoms.random() < 0.1:
                step = randoms.randrange(step)
                lines.append(begin("resumed", step))
            elif randoms.random() < 0.03:
                step = 0
                lines.append(begin())
        whole, holding = RunState(), RunState()
        for event in events_of(b"".join(lines)):
            whole.add(event)
        for event in without_superseded(events_of(b"".join(lines))):
            holding.add(event)
        assert snapshot(whole) == snapshot(holding)


def test_a_run_that_starts_in_the_same_record_begins_with_nothing() -> None:
    answer = shown(
        begin(), status(1, loss=1.0), drawn("output/a.png", 0), line("notification", 0, message="m"), begin()
    )
    assert answer["charts"] == answer["prompts"] == answer["messages"] == [] and answer["step"] == 0


def test_how_a_run_ends() -> None:
    answer = shown(begin(), line("lifecycle.stage", 9, stage="finished"))
    assert (answer["stage"], answer["ending"]) == ("finished", "")
    answer = shown(begin(), line("lifecycle.stage", 9, stage="interrupted", message="saved: x"))
    assert answer["stage"] == "interrupted" and answer["ending"] == "saved: x"


def test_images_are_sorted_by_prompt_and_version_of_the_weights() -> None:
    answer = shown(
        begin(),
        drawn("output/b0.png", 0, "a cat", "sample/01"),
        drawn("output/a0.png", 0, "a dog", "sample/00"),
        drawn("output/e0.png", 0, "a dog", "sample/00_ema"),
        drawn("output/a5.png", 5, "a dog", "sample/00"),
    )
    prompts = [(prompt["name"], prompt["text"], [step for step, _ in prompt["images"]]) for prompt in answer["prompts"]]
    assert prompts == [("sample/00", "a dog", [0, 5]), ("sample/00_ema", "a dog", [0]), ("sample/01", "a cat", [0])]
    keys = [key for prompt in answer["prompts"] for _, key in prompt["images"]]
    assert len(set(keys)) == 4


def test_a_picture_of_an_image_that_is_being_drawn_gives_way_to_the_image() -> None:
    def so_far(step: int, done: int) -> bytes:
        name, path = f"so_far/00_ema/{done:02d}", f"output/sample/so_far/{step}_{done}.png"
        return line("validation.image", step, name=name, path=path, prompt="a dog", step_label=f"{done}/20")

    first = [begin(), so_far(5, 5), so_far(5, 10)]
    (prompt,) = shown(*first)["prompts"]
    assert (prompt["name"], prompt["images"], prompt["so_far"][0], prompt["so_far"][2]) == (
        "sample/00_ema",
        [],
        5,
        "10/20",
    )
    done = drawn("output/a.png", 5, "a dog", "sample/00_ema")
    (prompt,) = shown(*first, done)["prompts"]
    assert [step for step, _ in prompt["images"]] == [5] and prompt["so_far"] is None
    (prompt,) = shown(*first, done, so_far(9, 5), begin("resumed", 6))["prompts"]
    assert [step for step, _ in prompt["images"]] == [5] and prompt["so_far"] is None
    assert shown(*first, begin("resumed", 3))["prompts"] == []


def test_warnings_are_shown_apart() -> None:
    answer = shown(
        begin(), line("notification", 1, message="said"), line("notification", 2, message="beware", severity="warning")
    )
    assert answer["warnings"] == [[2, "beware"]] and [text for _, _, text in answer["messages"]] == ["said", "beware"]


def test_numbers_that_json_does_not_have_are_counted() -> None:
    answer = shown(begin(total_steps=None), status(1, loss=None), status(2, loss=1.0), status(3, loss=10**400))
    assert answer["charts"][0]["curves"][0]["not_finite"] == 2 and answer["steps"] is None


def test_events_of_another_form_are_passed_over() -> None:
    """A record may come from anywhere."""
    answer = shown(
        begin(plan="text", options=["a"], total_steps="many", epochs=True, output_dir=None),
        line("training.status", 1, values=[1], loss="x", seconds_per_step={}, memory_bytes="much"),
        line("evaluation", 1),
        line("validation.image", 1, path=None, prompt=7),
        line("training.checkpoint", 1, bytes="x"),
        line("notification", 1),
        line("error", 1, message=["a"]),
        line("of a later version", 1, a=1),
        line("training.status", 1, values={}, loss=10**400, remaining_seconds=10**400),
    )
    assert answer["status"] == {}
    assert answer["plan"] == [] and answer["options"] == {} and answer["steps"] is None and answer["charts"] == []


def test_options_as_text() -> None:
    assert [text_of(value) for value in (True, 2e-06, 0.1, 3, "a b", [512, 512], None)] == [
        "yes", "2e-06", "0.1", "3", "a b", "512 512", "None"
    ]  # fmt: skip
