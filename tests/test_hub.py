import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from linearize.errors import LinearizeError
from linearize.hub import push


class FakeApi:
    def __init__(self, error=None):
        self.calls = []
        self.error = error

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        if self.error:
            raise self.error

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options.pop("repo_id"), options))
        return "https://hub/commit/1"


@pytest.fixture
def finished(tmp_path):
    for name in ("config.json", "recipe.lock.yaml", "model.safetensors", "README.md"):
        (tmp_path / name).write_text("")
    return tmp_path


def test_a_finished_folder_goes_up_in_one_call(finished):
    api = FakeApi()
    assert push(finished, "me/model", private=True, api=api) == "https://hub/commit/1"
    assert [(name, repo) for name, repo, _ in api.calls] == [("create_repo", "me/model"), ("upload_folder", "me/model")]
    assert api.calls[0][2]["exist_ok"]
    assert api.calls[0][2]["private"]
    assert api.calls[1][2]["folder_path"] == finished


@pytest.mark.parametrize("missing", ["config.json", "recipe.lock.yaml", "model.safetensors"])
def test_an_unfinished_folder_is_refused_before_any_call(finished, missing):
    (finished / missing).unlink()
    api = FakeApi()
    with pytest.raises(LinearizeError, match=r"no finished linearize checkpoint: it has no .*\. Give"):
        push(finished, "me/model", api=api)
    assert api.calls == []


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(LinearizeError, match="no finished"):
        push(tmp_path / "nowhere", "me/model", api=FakeApi())


@pytest.mark.parametrize("name", ["model", "me/", "a/b/c", "me/my model"])
def test_a_name_that_is_no_repository_is_refused(finished, name):
    api = FakeApi()
    with pytest.raises(LinearizeError, match="owner/name"):
        push(finished, name, api=api)
    assert api.calls == []


def test_a_refusal_of_the_hub_says_what_to_do(finished):
    api = FakeApi(LocalTokenNotFoundError("Token is required."))
    with pytest.raises(LinearizeError, match=r"Token is required\. Log in with `hf auth login`"):
        push(finished, "me/model", api=api)
