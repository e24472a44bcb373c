"""Runs that upload to the Hugging Face Hub and resume from it, with a stand-in server; and what the flags refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.groups.hub import HubOptions
from library.options.mistakes import Mistakes
from library.options.parse import parse
from library.training.hub.plan import UploadPlan, decide_uploads
from library.training.hub.resume import HubState, parse_state
from tests.training.hub.hub_server import TOKEN, Hub, serving, use
from tests.training.running import assert_equal_files, make_world, run


def test_a_run_uploads_and_another_resumes_from_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the token on the command line it stands in nothing that the run writes, says or uploads."""
    world, hub = make_world(tmp_path / "world"), Hub()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    flags = {
        "max_train_steps": 2, "save_every_n_steps": 1, "save_last_n_steps": 1, "save_state": True,
        "train_text_encoder": False, "huggingface_repo_id": "me/dog", "huggingface_token": TOKEN,
        "huggingface_path_in_repo": "/runs/", "save_state_to_huggingface": True, "logging_dir": tmp_path / "logs",
        "log_config": True, "mixed_precision": "no", "use_safetensors": True,
    }  # fmt: skip
    with serving(hub):
        use(hub, monkeypatch)
        first = run(world.arguments(tmp_path / "out", **flags, async_upload=True), capsys)
        assert first.code == 0, first.err
        names = {path.removeprefix("runs/").partition("/")[0] for path in hub.files}
        steps = {f"dog-step{step:08d}" for step in (1, 2)}
        assert names == {"dog.safetensors", "dog-state"} | {f"{step}.safetensors" for step in steps} | {
            f"{step}-state" for step in steps
        }
        assert hub.files["runs/dog.safetensors"] == (tmp_path / "out" / "dog.safetensors").read_bytes()

        # Resume from the middle; what this run saves is refused, and it ends well all the same.
        hub.refuse = lambda method, path: 403 if "preupload" in path else None
        resumed = {**flags, "resume": "me/dog/runs/dog-step00000001-state:main:model", "resume_from_huggingface": True}
        second = run(world.arguments(tmp_path / "again", **resumed), capsys)
    assert second.code == 0, second.err
    assert first.losses[2] == second.losses[2]
    assert_equal_files(tmp_path / "out" / "dog.safetensors", tmp_path / "again" / "dog.safetensors")
    assert "may not write there (HTTP 403)" in second.out + second.err

    said = [outcome.out + outcome.err for outcome in (first, second)]
    assert all("uploads: models and training states to the model me/dog" in text for text in said)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    everything = [*written, *hub.files.values(), *(text.encode() for text in said)]
    assert not any(TOKEN.encode() in each or TOKEN[3:].encode() in each for each in everything)


@pytest.mark.parametrize(
    "words",
    [
        ["--huggingface_token", TOKEN, "--huggingface_token", f"{TOKEN}x", "stray", TOKEN],
        ["--huggingface_tokn", TOKEN],
        ["--hub_token", "plain-secret"],
        ["--huggingface_token", f"{TOKEN}\0"],
        ["huggingface_token", TOKEN],
        ["--huggingface_token", TOKEN],
        ["--config_file", "FILE"],
    ],
)
def test_no_message_shows_a_token(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text(
        f'huggingface_token = ["{TOKEN}"]\nhuggingface_tokn = "plain-secret"\nother = "{TOKEN}"\n', encoding="utf-8"
    )
    parsed = parse([word.replace("FILE", str(tmp_path / "a.toml")) for word in words])
    told = "\n".join([*map(str, parsed.mistakes), *parsed.notes])
    assert TOKEN[3:] not in told and "plain-secret" not in told


def test_output_config_leaves_the_token_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--output_config", "--config_file", str(tmp_path / "a.toml"), "--huggingface_token", TOKEN]
    outcome = run([*words, "--huggingface_repo_id", "me/dog", "--async_upload"], capsys)
    text = (tmp_path / "a.toml").read_text(encoding="utf-8")
    assert outcome.code == 0 and TOKEN not in text + outcome.out + outcome.err and "me/dog" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"huggingface_repo_id": "dog"}, "is not a repository"),
        ({"huggingface_repo_id": "https://huggingface.co/me/dog"}, "is not a repository"),
        ({"huggingface_repo_id": "me/../dog"}, "is not a repository"),
        ({"huggingface_repo_id": "me/dog", "huggingface_path_in_repo": "../x"}, "is not a folder of a repository"),
        ({"huggingface_repo_id": "me/dog", "huggingface_path_in_repo": "a\\b"}, "is not a folder of a repository"),
        ({"huggingface_repo_id": "me/dog", "huggingface_token": None}, "there is no token"),
    ],
)
def test_what_cannot_be_uploaded_to_is_told_before_anything_is_loaded(
    given: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.training.hub.plan.has_token", lambda: False)
    mistakes = Mistakes()
    decide_uploads(HubOptions(**{"huggingface_token": TOKEN} | given), mistakes)  # type: ignore[arg-type]
    assert sum(words in str(mistake) for mistake in mistakes) == 1 and TOKEN not in str(list(map(str, mistakes)))
    assert any("HF_HUB_OFFLINE" in str(mistake) for mistake in mistakes), "the tests set it"


def test_the_flags_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert decide_uploads(HubOptions(), Mistakes()) is None
    given = HubOptions(
        huggingface_repo_id="me/dog", huggingface_repo_type="dataset", huggingface_path_in_repo="/a/b/",
        huggingface_token=TOKEN, huggingface_repo_visibility="public", async_upload=True,
        save_state_to_huggingface=True,
    )  # fmt: skip
    mistakes = Mistakes()
    plan = decide_uploads(given, mistakes)
    assert plan == UploadPlan("me/dog", "dataset", "a/b", "public", states=True, waits=False, token=TOKEN)
    assert not len(mistakes) and TOKEN not in f"{plan!r}{plan}" and "dataset me/dog" in str(plan)


@pytest.mark.parametrize(
    ("named", "state"),
    [
        ("me/dog/a/b", HubState("me/dog", "a/b")),
        ("me/dog/a/", HubState("me/dog", "a")),
        ("me/dog/a:v1", HubState("me/dog", "a", "v1")),
        ("me/dog/a:v1:dataset", HubState("me/dog", "a", "v1", "dataset")),
        ("me/dog", None),
        ("me/dog/", None),
        ("me/dog/../x", None),
        ("me/dog/*", None),
        ("me/dog/a:v1:bucket", None),
        ("/home/me/a", None),
    ],
)
def test_states_are_named_as_in_kohyas_scripts(named: str, state: HubState | None) -> None:
    assert parse_state(named) == state
