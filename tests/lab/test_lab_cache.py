# SPDX-License-Identifier: Apache-2.0

import pytest

from moe_tta.lab import LabError
from moe_tta.lab.cache import check_files, default_cache, install, inventory, is_built
from moe_tta.lab.cards import Card


def write(folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def card(tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    write(folder)
    return Card("tiny", inventory(folder), {})


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "tiny"


def test_installed_model_is_found(card, target):
    assert not is_built(target, card)
    install(target, card, write)
    assert is_built(target, card)
    check_files(target, card)
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_build_leaves_nothing(card, target, error):
    def broken(folder):
        write(folder)
        raise error

    with pytest.raises(type(error)):
        install(target, card, broken)
    assert list(target.parent.iterdir()) == []


def test_wrong_hash_is_refused_and_leaves_nothing(card, target):
    def other(folder):
        write(folder)
        (folder / "model.safetensors").write_bytes(b"WEIGHTS")

    expected = card.files["model.safetensors"]["sha256"]
    with pytest.raises(LabError, match=f"model.safetensors has sha256.*{expected}"):
        install(target, card, other)
    assert list(target.parent.iterdir()) == []


def test_failed_rebuild_keeps_the_old_model(card, target):
    install(target, card, write)
    with pytest.raises(LabError):
        install(target, card, lambda folder: None)
    assert is_built(target, card)


def test_model_of_another_card_is_replaced(card, target):
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    assert not is_built(target, card)
    install(target, card, write)
    assert is_built(target, card)
    assert not (target / "old").exists()


def test_truncated_file_is_noticed_by_its_size(card, target):
    install(target, card, write)
    (target / "model.safetensors").write_bytes(b"weigh")
    assert not is_built(target, card)


def test_flipped_byte_is_noticed_by_a_full_check(card, target):
    install(target, card, write)
    (target / "model.safetensors").write_bytes(b"weightz")
    assert is_built(target, card)
    with pytest.raises(LabError, match="sha256"):
        check_files(target, card)


def test_unlisted_file_is_refused(card, target):
    def extra(folder):
        write(folder)
        (folder / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(LabError, match=r"pytorch_model\.bin"):
        install(target, card, extra)


def test_files_are_readable_by_everyone(card, target):
    install(target, card, write)
    assert (target / "config.json").stat().st_mode & 0o777 == 0o644


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MOE_TTA_CACHE", raising=False)
    assert default_cache() == tmp_path / "moe-tta"
    monkeypatch.setenv("MOE_TTA_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"
