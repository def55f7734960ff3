"""Ids on the Hugging Face hub: what is an id, which files are fetched, and what is said when that fails. No network."""

import shutil
from pathlib import Path

import pytest
import torch

from lockin_fast.sae import hub, load_sae

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")
GOLDEN = Path(__file__).parent / "golden"
REPO = {  # golden case -> folder in the repository
    "gemma_scope_1": "layer_3/width_16k/average_l0_7",
    "gemma_scope_2": "resid_post/layer_3_width_16k_l0_small",
    "llama_scope": "Llama3_1-8B-Base-L3R-8x",
    "saelens_standard": "blocks.3.hook_resid_post",
    "sparsify_topk": "layers.3",
    "dl_batchtopk": "resid_post_layer_3/trainer_0",
    "qwen_scope_L0_7": "",
}


class FakeHub:
    """A repository `org/saes` with a golden SAE in every folder, and the cache that its files are downloaded to."""

    def __init__(self, root, monkeypatch):
        self.origin, self.cache, self.downloads, self.error = root / "origin", root / "cache", [], None
        for case, folder in REPO.items():
            shutil.copytree(GOLDEN / case, self.origin / folder, dirs_exist_ok=True)
        (self.origin / "README.md").write_text("")
        (self.origin / "layer9.sae.pt").write_bytes(b"")
        files = (file for file in self.origin.rglob("*") if file.is_file())
        self.files = sorted(file.relative_to(self.origin).as_posix() for file in files)
        self.snapshot = self.cache / "models--org--saes-L0_7" / "snapshots" / "abc"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", self.list_repo_files)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        hub.fetch.cache_clear()

    def list_repo_files(self, repo, *, revision=None):
        assert repo == "org/saes" and revision in (None, "v2")
        if self.error is not None:
            raise self.error
        return self.files

    def hf_hub_download(self, repo, file, *, revision=None):
        target = self.snapshot / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.origin / file, target)
        self.downloads.append(file)
        return str(target)

    def snapshot_download(self, repo, *, revision=None, local_files_only):
        assert local_files_only
        if not self.snapshot.exists():
            raise errors.LocalEntryNotFoundError("nothing\nhere")
        return str(self.snapshot)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return FakeHub(tmp_path, monkeypatch)


@pytest.mark.parametrize("case", [case for case, folder in REPO.items() if folder])
def test_an_id_reads_what_its_folder_holds_and_downloads_no_more(case, fake):
    sae = load_sae(f"org/saes/{REPO[case]}")
    assert torch.equal(sae.weight, load_sae(GOLDEN / case).weight)
    assert 1 <= len(fake.downloads) <= 2 and all(file.startswith(REPO[case]) for file in fake.downloads)
    assert not any("expected" in file for file in fake.downloads)
    load_sae(f"hf://org/saes/{REPO[case]}", latents=[3])
    assert len(fake.downloads) <= 2, "asked for twice, downloaded once"


def test_a_file_brings_its_config(fake):
    load_sae("hf://org/saes@v2/Llama3_1-8B-Base-L3R-8x/checkpoints/final.safetensors")
    folder = "Llama3_1-8B-Base-L3R-8x"
    assert fake.downloads == [f"{folder}/checkpoints/final.safetensors", f"{folder}/hyperparams.json"]
    assert load_sae("org/saes/layers.3/cfg.json").metadata["format"] == "sparsify"


def test_one_layer_of_many_in_one_folder(fake):
    sae = load_sae("org/saes/layer3.sae.pt", latents=[1, 2])
    assert fake.downloads == ["layer3.sae.pt"] and sae.metadata["format"] == "qwen_scope"
    assert sae.k == 7, "the name of the repository is in the path"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("org/saes", ["no SAE, or several, directly in this", "layer3.sae.pt", "blocks.3.hook_resid_post", "..."]),
        ("org/saes/resid_post", ["no SAE, or several", "resid_post/layer_3_width_16k_l0_small"]),
        ("org/saes/layer_4", ["org/saes has no layer_4", "has SAEs at Llama3_1-8B-Base-L3R-8x", ", ..."]),
        ("org/saes/README.md", ["README.md"]),
    ],
)
def test_a_place_without_an_sae_names_places_with_one(text, words, fake):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_sae(text)
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value) and fake.downloads == []


def test_what_exists_here_wins(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "goodfire_pth", tmp_path / "org" / "saes")
    assert load_sae("org/saes").metadata["format"] == "goodfire"
    with pytest.raises(ValueError, match="no SAE, or several"):
        load_sae("hf://org/saes")


@pytest.mark.parametrize(
    "text", ["./org/saes", "/org/saes", "~/org/saes", "sae", "org/../saes", "org/saes/../../x", "a b/c"]
)
def test_paths_are_no_ids(text, fake):
    assert hub.hub_path(text) is None
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        load_sae(text)
    with pytest.raises(ValueError, match="expected hf://owner/name"):
        load_sae(f"hf://{text}")


def test_offline_what_was_downloaded_before_is_used(fake, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="not downloaded earlier, and HF_HUB_OFFLINE is set; HF_HUB_OFFLINE=0"):
        load_sae("org/saes/layers.3")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = load_sae("org/saes/layers.3")
    hub.fetch.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_sae("org/saes/layers.3").weight, online.weight)
    with pytest.raises(FileNotFoundError, match="has no layer_3.*among the files downloaded earlier"):
        load_sae("org/saes/layer_3/width_16k/average_l0_7")


def test_without_a_connection_the_cache_serves_or_the_reason_is_given(fake):
    fake.error = ConnectionError("name resolution failed\nand more")
    with pytest.raises(FileNotFoundError, match="cannot be reached .ConnectionError: name resolution failed.$"):
        load_sae("org/saes/layers.3")
    fake.error = None
    load_sae("org/saes/layers.3")
    hub.fetch.cache_clear()
    fake.error = ConnectionError("name resolution failed")
    assert load_sae("org/saes/layers.3").width == 48


def test_an_unknown_repository_is_one_line(fake):
    class Response:
        headers, request, status_code = {}, None, 404

    fake.error = errors.RepositoryNotFoundError("404\n\nURL", response=Response())
    with pytest.raises(FileNotFoundError, match="no repository org/saes@v2 on the hub that you may read") as raised:
        load_sae("org/saes@v2/layers.3")
    assert "\n" not in str(raised.value)
