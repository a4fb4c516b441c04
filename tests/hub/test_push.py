"""`linearize push`, against a hub on the loopback that fails in every way that it is told to."""

import hashlib
import re

import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalTokenNotFoundError

from linearize import yaml_io
from linearize.errors import LinearizeError
from linearize.hub import choose_files, push

from .conftest import PART, READER, TOKEN, Fault

FILES = {
    "README.md": b'---\nlicense: mit\n---\nlinearize.load("tiny-liger")\nAutoTokenizer.from_pretrained("tiny-liger")\n',
    "config.json": b"{}",
    "figures/quality.png": b"\x89PNG" + bytes(range(256)),
    "model-00001-of-00002.safetensors": bytes(range(251)) * 500,
    "model-00002-of-00002.safetensors": b"small",
    "model.safetensors.index.json": b"{}",
}
BIG = "model-00001-of-00002.safetensors"


@pytest.fixture
def finished(tmp_path):
    """A folder as a run leaves it, with an evaluation, and with things that are not to go up."""
    folder = tmp_path / "out"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    lock = {"settings": {}, "provenance": {"linearize": "0.1.0"}, "files": [*FILES, "recipe.lock.yaml"]}
    (folder / "recipe.lock.yaml").write_text(yaml_io.dump(lock))
    for name in (
        "eval/eval.json",
        "eval/eval.md",
        "eval/scratch.bin",
        "notes.txt",
        ".env",
        ".cache/x",
        "old/model.bin",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    (folder / "model.safetensors.partial").write_text("half")
    return folder


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=TOKEN)


def expected(folder):
    """What the hub must hold: every file to the byte, but for the repository's name in the card."""
    names = [*FILES, "recipe.lock.yaml", "eval/eval.json", "eval/eval.md"]
    files = {name: (folder / name).read_bytes() for name in names}
    return files | {"README.md": files["README.md"].replace(b'"tiny-liger"', b'"me/model"')}


def held(hub, revision="main"):
    return {name: data for name, data in hub.files("me/model", revision).items() if name != ".gitattributes"}


def test_a_folder_goes_up_in_one_commit_with_a_tag(hub, api, finished):
    pushed = push(finished, "me/model", api=api)
    assert held(hub) == expected(finished)
    repository = hub.repositories["me/model"]
    assert repository.messages == ["initial commit", "Upload a checkpoint made by linearize 0.1.0"]
    assert not repository.private
    assert pushed.tag == "v0.1.0"
    assert repository.tags == {"v0.1.0": pushed.commit} == {"v0.1.0": repository.branches["main"]}
    assert pushed.url == f"{hub.url}/me/model/commit/{pushed.commit}"
    assert b"tiny-liger" in (finished / "README.md").read_bytes()


def test_what_was_pushed_comes_back_to_the_byte(hub, api, finished, tmp_path):
    push(finished, "me/model", private=True, api=api)
    folder = snapshot_download(
        "me/model",
        revision="v0.1.0",
        endpoint=hub.url,
        token=TOKEN,
        cache_dir=tmp_path / "cache",
        local_dir=tmp_path / "back",
    )
    for name, data in expected(finished).items():
        assert (tmp_path / "back" / name).read_bytes() == data, name
    assert folder
    assert hub.repositories["me/model"].private


def test_only_what_the_run_wrote_goes_up(finished):
    upload = choose_files(finished)
    assert set(upload.files) == set(expected(finished))
    assert upload.left_out == ["eval/scratch.bin", "model.safetensors.partial", "notes.txt", "old/"]
    assert upload.files[BIG] == 125_500


FAULTS = {
    "creation: 500": ("POST /api/repos/create", 500),
    "creation: dropped": ("POST /api/repos/create", "drop"),
    "creation: no answer": ("POST /api/repos/create", "hang"),
    "creation: the answer is lost": ("POST /api/repos/create", "lost"),
    "info: 429": ("GET /api/models", 429),
    "card: 500": ("validate-yaml", 500),
    "preupload: 429": ("preupload", 429),
    "batch: 500": ("objects/batch", 500),
    "upload: dropped halfway": ("PUT /lfs", "drop"),
    "upload: 500": ("PUT /lfs", 500),
    "upload: 429": ("PUT /lfs", 429),
    "upload: no answer": ("PUT /lfs", "hang"),
    "completion: 500": ("POST /complete", 500),
    "commit: 500": ("/commit/main", 500),
    "commit: dropped halfway": ("/commit/main", "drop"),
    "commit: no answer": ("/commit/main", "hang"),
    "commit: the answer is lost": ("/commit/main", "lost"),
    "tag: 500": ("/tag/", 500),
    "tag: dropped": ("/tag/", "drop"),
    "tag: the answer is lost": ("/tag/", "lost"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_is_gone_through(hub, api, finished, name):
    where, kind = FAULTS[name]
    fault = Fault(where, kind)
    hub.faults = [fault]
    pushed = push(finished, "me/model", api=api)
    assert fault.count == 0
    assert held(hub) == expected(finished)
    repository = hub.repositories["me/model"]
    assert len(repository.commits) == 2
    assert repository.tags == {"v0.1.0": pushed.commit} == {"v0.1.0": repository.branches["main"]}


@pytest.mark.parametrize("kind", ["drop", 500, 429])
def test_a_fault_that_stays_is_one_paragraph_and_the_next_push_goes_on(hub, api, finished, kind):
    small = hashlib.sha256((finished / "figures" / "quality.png").read_bytes()).hexdigest()
    hub.faults = [Fault(r"PUT .*/2$", kind, 1000)]  # the second part of the large file
    with pytest.raises(LinearizeError, match=r"The Hub did not take .* goes on with what is already there") as refused:
        push(finished, "me/model", api=api)
    assert TOKEN not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert held(hub) == {}
    assert small in hub.objects
    hub.faults, hub.received = [], {}
    push(finished, "me/model", api=api)
    assert held(hub) == expected(finished)
    assert small not in hub.received
    assert len(hub.repositories["me/model"].commits) == 2


def test_large_files_go_in_parts(hub, api, finished):
    push(finished, "me/model", api=api)
    parts = [line for line in hub.requests if re.fullmatch(r"PUT /lfs/\w+/\d+", line)]
    assert len(parts) == -(-125_500 // PART)


def test_the_same_folder_again_makes_no_commit_and_sends_nothing(hub, api, finished):
    first = push(finished, "me/model", api=api)
    hub.received = {}
    again = push(finished, "me/model", api=api)
    assert (again.commit, again.tag, hub.received) == (first.commit, "v0.1.0", {})
    assert len(hub.repositories["me/model"].commits) == 2


def test_a_newer_model_replaces_the_older_ones_weights_and_its_tag_stays(hub, api, finished):
    first = push(finished, "me/model", api=api)
    hub.repositories["me/model"].commits[first.commit]["NOTICE"] = b"the user's own"
    for name in (BIG, "model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (finished / name).unlink()
    (finished / "model.safetensors").write_bytes(b"new")
    lock = yaml_io.read(finished / "recipe.lock.yaml")
    names = [name for name in lock["files"] if (finished / name).exists()]
    (finished / "recipe.lock.yaml").write_text(yaml_io.dump({**lock, "files": [*names, "model.safetensors"]}))
    second = push(finished, "me/model", api=api)
    now = held(hub)
    assert {name for name in now if "model" in name} == {"model.safetensors"}
    assert now["NOTICE"] == b"the user's own"
    assert second.tag is None
    assert second.note == f"The tag v0.1.0 stays on the earlier commit {first.commit[:7]}."
    assert hub.repositories["me/model"].tags == {"v0.1.0": first.commit}


def test_a_branch_is_made_where_there_is_none(hub, api, finished):
    push(finished, "me/model", revision="long/context", api=api)
    assert held(hub) == {}
    assert held(hub, "long/context") == expected(finished)
    push(finished, "me/model", revision="long/context", api=api)


def test_a_pull_request_leaves_main_and_tags_alone(hub, api, finished):
    with pytest.raises(LinearizeError, match="--pr needs a repository that exists"):
        push(finished, "me/model", pr=True, api=api)
    assert hub.repositories == {}
    api.create_repo("me/model")
    pushed = push(finished, "me/model", pr=True, api=api)
    assert pushed.url == f"{hub.url}/me/model/discussions/1"
    assert (pushed.tag, held(hub), hub.repositories["me/model"].tags) == (None, {}, {})
    assert held(hub, "refs/pr/1") == expected(finished)
    with pytest.raises(LinearizeError, match="leave one out"):
        push(finished, "me/model", pr=True, revision="x", api=api)


def test_a_pull_request_is_not_opened_twice(hub, api, finished):
    api.create_repo("me/model")
    hub.faults = [Fault("/commit/main", "lost")]
    with pytest.raises(LinearizeError, match="did not take"):
        push(finished, "me/model", pr=True, api=api)
    assert hub.repositories["me/model"].pulls == 1


def test_another_model_is_not_overwritten(hub, api, finished):
    api.create_repo("me/model")
    files = hub.files("me/model")
    files |= {"config.json": b"theirs", "pytorch_model.bin": b"theirs"}
    with pytest.raises(LinearizeError, match=r"holds a model that linearize did not make \(config.json, .*--pr"):
        push(finished, "me/model", api=api)
    assert hub.files("me/model")["config.json"] == b"theirs"
    assert not any("preupload" in line for line in hub.requests)
    push(finished, "me/model", pr=True, api=api)


def test_a_public_repository_does_not_become_private(hub, api, finished):
    api.create_repo("me/model")
    with pytest.raises(LinearizeError, match="exists and is public"):
        push(finished, "me/model", private=True, api=api)
    assert held(hub) == {}


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (False, r"\(status 401\)\. Log in with `hf auth login`"),
        ("hf_wrong", r"Invalid username or password \(status 401\)\. Log in"),
        (READER, r"rights to do that \(status 403\)\. The token may not write to 'me'"),
    ],
)
def test_a_token_that_does_not_serve_says_what_to_do(hub, finished, token, words):
    api = HfApi(endpoint=hub.url, token=token)
    with pytest.raises(LinearizeError, match=words) as refused:
        push(finished, "me/model", api=api)
    assert str(token) not in str(refused.value)
    assert hub.requests.count("POST /api/repos/create") == 1
    assert hub.repositories == {}


def test_no_hub_at_all(finished, hub):
    hub.server_close()
    hub.shutdown()
    with pytest.raises(LinearizeError, match="Check the name and the connection"):
        push(finished, "me/model", api=HfApi(endpoint=hub.url, token=TOKEN))


def test_offline_mode_is_said(finished, hub, api, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LinearizeError, match="Unset HF_HUB_OFFLINE"):
        push(finished, "me/model", api=api)
    assert hub.requests == []


def test_a_refusal_before_any_request(finished):
    class Api:
        def create_repo(self, *_, **__):
            raise LocalTokenNotFoundError("Token is required.")

    with pytest.raises(LinearizeError, match=r"Token is required\. Log in with `hf auth login`"):
        push(finished, "me/model", api=Api())


@pytest.mark.parametrize("missing", ["config.json", "recipe.lock.yaml", "*.safetensors", "figures/quality.png"])
def test_an_unfinished_folder_is_refused_before_any_call(hub, api, finished, missing):
    for path in finished.glob(missing):
        path.unlink()
    with pytest.raises(
        LinearizeError, match=r"no finished linearize checkpoint: it has no .*\. Give|lacks 1 of the files"
    ):
        push(finished, "me/model", api=api)
    assert hub.requests == []


@pytest.mark.parametrize("files", [None, "all", ["../../etc/passwd"], [3]])
def test_a_lock_that_does_not_say_what_was_written_is_refused(hub, api, finished, files):
    lock = yaml_io.read(finished / "recipe.lock.yaml")
    (finished / "recipe.lock.yaml").write_text(yaml_io.dump({**lock, "files": files}))
    with pytest.raises(LinearizeError, match=r"does not say which files|lacks 1 of the files"):
        push(finished, "me/model", api=api)
    assert hub.requests == []


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(LinearizeError, match="no finished"):
        push(tmp_path / "nowhere", "me/model")


@pytest.mark.parametrize("name", ["model", "me/", "a/b/c", "me/my model", "me/modèle"])
def test_a_name_that_is_no_repository_is_refused(hub, api, finished, name):
    with pytest.raises(LinearizeError, match="owner/name"):
        push(finished, name, api=api)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x"])
def test_a_name_that_is_no_branch_is_refused(hub, api, finished, name):
    with pytest.raises(LinearizeError, match="is no name of a branch"):
        push(finished, "me/model", revision=name, api=api)
    assert hub.requests == []
