"""Uploads against a stand-in server: what arrives where, and that nothing that the server does ends or holds a run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from library.training.hub.plan import UploadPlan
from library.training.hub.repository import HubError, Repository
from library.training.hub.uploads import LAST_ATTEMPTS, QUEUE, Uploads
from tests.training.hub.hub_server import TOKEN, Hub, serving, use

BIG = bytes(range(256)) * 20  # by LFS


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as server:
        use(server, monkeypatch)
        yield server


def file(folder: Path, name: str = "dog.safetensors", content: bytes = BIG) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def begin(plan: UploadPlan, said: list[str], **settings: float) -> Uploads:
    return Uploads(
        plan, Repository(plan), said.append, lambda line: said.append(f"warning: {line}"),
        **dict[str, Any]({"pauses": (0.0,), "last_pause": 0.0}, **settings),
    )  # fmt: skip


@pytest.mark.parametrize("waits", [True, False])
def test_files_and_folders_arrive_in_one_commit_each(hub: Hub, tmp_path: Path, *, waits: bool) -> None:
    state = tmp_path / "dog-state"
    (state / "shards").mkdir(parents=True)
    file(state, "train_state.json", b"{}")
    file(state / "shards", "0.bin")
    said: list[str] = []
    uploads = begin(UploadPlan("me/dog", folder="a/b", states=True, waits=waits, token=TOKEN), said)
    uploads.saved(file(tmp_path), "model")
    if waits:
        assert hub.files == {"a/b/dog.safetensors": BIG}, "the run waits for it"
    uploads.saved(state, "state")
    uploads.finish()
    assert hub.files == {
        "a/b/dog.safetensors": BIG, "a/b/dog-state/train_state.json": b"{}", "a/b/dog-state/shards/0.bin": BIG,
    }  # fmt: skip
    assert [len(commit) for commit in hub.commits] == [1, 2] and hub.is_private is True
    assert {authorization for *_, authorization in hub.requests if authorization} == {f"Bearer {TOKEN}"}
    assert "uploaded to me/dog: 2 files or folders" in said and not any("warning" in line for line in said)


def test_states_stay_here_unless_they_are_asked_for(hub: Hub, tmp_path: Path) -> None:
    uploads = begin(UploadPlan("me/dog", token=TOKEN), [])
    uploads.saved(file(tmp_path), "state")
    uploads.finish()
    assert not hub.files and hub.is_private is True, "the repository is made at once: a wrong token is known early"


@pytest.mark.parametrize(
    ("is_private", "visibility", "arrives", "warned"),
    [
        (None, "public", True, False),
        (True, "public", True, False),
        (False, None, True, True),
        (False, "private", False, True),
    ],
)
def test_visibility(
    hub: Hub,
    tmp_path: Path,
    is_private: bool | None,
    visibility: Literal["private", "public"] | None,
    arrives: bool,
    warned: bool,
) -> None:
    hub.is_private = is_private
    said: list[str] = []
    uploads = begin(UploadPlan("me/dog", visibility=visibility, token=TOKEN), said)
    uploads.saved(file(tmp_path), "model")
    uploads.finish()
    assert bool(hub.files) is arrives and any("public" in line for line in said) is warned
    if is_private is None:
        assert hub.is_private is False


def test_what_may_pass_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    """The server fails for longer than huggingface_hub itself tries."""
    failures = {"preupload": 7, "commit": 1}

    def refuse(method: str, path: str) -> int | None:
        for route in failures:
            if route in path and failures[route]:
                failures[route] -= 1
                return 503
        return None

    hub.refuse = refuse
    said: list[str] = []
    uploads = begin(UploadPlan("me/dog", waits=False, token=TOKEN), said)
    uploads.saved(file(tmp_path), "model")
    with uploads._changed:
        assert uploads._changed.wait_for(lambda: uploads._count, 60)
    uploads.finish()
    assert hub.files == {"dog.safetensors": BIG}
    assert sum("tried again" in line for line in said) >= 1 and any("answers again" in line for line in said)
    assert not any("not uploaded" in line for line in said)


@pytest.mark.parametrize(("status", "words"), [(401, "may not write"), (403, "may not write"), (400, "not uploaded")])
def test_what_is_refused_is_told_and_stays_here(hub: Hub, tmp_path: Path, status: int, words: str) -> None:
    hub.is_private = True
    hub.refuse = lambda method, path: status if "preupload" in path else None
    said: list[str] = []
    uploads = begin(UploadPlan("me/dog", token=TOKEN), said)
    path = file(tmp_path)
    uploads.saved(path, "model")
    uploads.finish()
    text = "\n".join(said)
    assert words in text and f"hf upload me/dog {path} dog.safetensors" in text and TOKEN not in text
    assert path.exists() and sum("preupload" in path for _, path, _ in hub.requests) == 1


def test_a_server_that_hangs_holds_nothing(hub: Hub, tmp_path: Path) -> None:
    """Neither a save, which waits for a bounded time, nor the next ones, nor the end of an interrupted run."""
    hub.refuse = lambda method, path: hub.released.wait(60) and None
    said: list[str] = []
    uploads = begin(UploadPlan("me/dog", token=TOKEN), said, longest_wait=0.05, patience=0.05)
    for number in range(QUEUE + 2):
        uploads.saved(file(tmp_path, f"{number}.safetensors"), "model")
    removed: list[int] = []
    uploads.release(tmp_path / "9.safetensors", lambda: removed.append(9))
    uploads.release(tmp_path / "other", lambda: removed.append(0))
    assert removed == [0], "what waits is kept until it is uploaded"
    uploads.close()
    assert any("takes long" in line for line in said) and any("too many files wait" in line for line in said)
    assert any(line.startswith("warning: not uploaded: ") for line in said)


def test_no_server_at_the_end_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Hub()) as gone:
        use(gone, monkeypatch)
    said: list[str] = []
    uploads = begin(UploadPlan("me/dog", token=TOKEN), said)
    uploads.saved(file(tmp_path), "model")
    uploads.finish()
    assert any("tried again" in line for line in said) and any("not uploaded" in line for line in said)


def test_expired_files_are_removed_when_they_have_arrived(hub: Hub, tmp_path: Path) -> None:
    gate = threading.Event()
    hub.refuse = lambda method, path: gate.wait(60) and None if "preupload" in path else None
    uploads = begin(UploadPlan("me/dog", waits=False, token=TOKEN), [])
    path = file(tmp_path)
    uploads.saved(path, "model")
    uploads.release(path, path.unlink)
    uploads.catch_up()
    assert path.exists()
    gate.set()
    uploads.finish()
    assert hub.files == {"dog.safetensors": BIG} and not path.exists()


def test_each_file_has_its_last_attempts_once_the_training_has_ended(hub: Hub, tmp_path: Path) -> None:
    """However often it has failed before."""
    hub.is_private = True
    uploads = begin(UploadPlan("me/dog", token=TOKEN), said := list[str](), pauses=(0.0,) * 9 + (60.0,))
    attempts: list[str] = []

    def fail(path: Path) -> None:
        attempts.append("last" if uploads._is_ending else "first")
        if attempts.count("last") < LAST_ATTEMPTS:
            raise HubError("no answer", is_final=False)

    uploads.repository.commit = fail  # type: ignore[method-assign]
    uploads.saved(file(tmp_path), "model")
    with uploads._changed:
        assert uploads._changed.wait_for(lambda: uploads._failures == 10, 60)
    uploads.finish()
    assert attempts.count("last") == LAST_ATTEMPTS and not any("not uploaded" in line for line in said)


def test_a_file_that_was_given_up_and_saved_again_is_not_missing(hub: Hub, tmp_path: Path) -> None:
    hub.is_private = True
    hub.refuse = lambda method, path: 400 if "preupload" in path else None
    said: list[str] = []
    uploads = begin(UploadPlan("me/dog", token=TOKEN), said)
    path = file(tmp_path)
    uploads.saved(path, "model")
    assert uploads.lost == [path]
    hub.refuse = lambda method, path: None
    uploads.saved(path, "model")
    uploads.finish()
    assert hub.files == {"dog.safetensors": BIG} and not any("hf upload" in line for line in said)


def test_where_open_files_cannot_be_replaced_a_copy_is_uploaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.training.hub.repository.can_replace_open_files", lambda: False)
    path, state = file(tmp_path), tmp_path / "s"
    state.mkdir()
    file(state, "a.bin")
    opened = set[str]()
    monkeypatch.setattr("huggingface_hub.lfs.getsize", lambda name: opened.add(name) or Path(name).stat().st_size)
    repository = Repository(UploadPlan("me/dog", token=TOKEN))
    repository.commit(path)
    repository.commit(state)
    assert hub.files == {"dog.safetensors": BIG, "s/a.bin": BIG}
    assert opened and not opened & {str(path), str(state / "a.bin")}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["dog.safetensors", "s"], "copies are removed"


def test_a_token_in_an_answer_is_not_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(f"proxy says: Bearer {TOKEN} is not known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", broken)
    with pytest.raises(HubError) as raised:
        Repository(UploadPlan("me/dog", token=TOKEN)).commit(file(tmp_path))
    assert "(token) is not known" in str(raised.value) and not raised.value.is_final
    assert TOKEN not in repr(UploadPlan("me/dog", token=TOKEN))


def test_an_interrupted_run_names_the_file_that_waits_for_another_attempt(hub: Hub, tmp_path: Path) -> None:
    hub.is_private = True
    hub.refuse = lambda method, path: 503 if "preupload" in path else None
    said: list[str] = []
    uploads = begin(UploadPlan("me/dog", token=TOKEN), said, pauses=(60.0,))
    path = file(tmp_path)
    uploads.saved(path, "model")
    uploads.close()
    assert any(f"hf upload me/dog {path}" in line for line in said)


def test_what_expires_while_its_upload_is_noted_is_removed(hub: Hub, tmp_path: Path) -> None:
    """The run goes on as soon as the thread has noted that a file has arrived, before that takes the next one."""
    uploads = begin(UploadPlan("me/dog", token=TOKEN), [])
    path, attempt = file(tmp_path), uploads._try

    def noted(upload: Any) -> bool:
        is_done = attempt(upload)
        uploads.release(path, path.unlink)
        return is_done

    uploads._try = noted  # type: ignore[method-assign]
    uploads.saved(path, "model")
    uploads.finish()
    assert hub.files and not path.exists()


def test_a_file_that_is_replaced_meanwhile_arrives_as_it_was(hub: Hub, tmp_path: Path) -> None:
    """As the best model so far is, after its hash was announced and before it is sent."""
    path, other = file(tmp_path), file(tmp_path, "new", b"new" * 1000)

    def replace(method: str, route: str) -> None:
        if "/lfs/objects/batch" in route and other.exists():
            other.replace(path)

    hub.refuse = replace  # type: ignore[assignment]
    said: list[str] = []
    uploads = begin(UploadPlan("me/dog", token=TOKEN), said)
    uploads.saved(path, "model")
    assert hub.files == {"dog.safetensors": BIG}, said
    uploads.saved(path, "model")
    uploads.finish()
    assert hub.files == {"dog.safetensors": b"new" * 1000}
    assert [each.name for each in tmp_path.iterdir()] == ["dog.safetensors"]
