"""The salt of a user, and the ids that are hashed with it."""

import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from medtune.pairs import safe_id, user_salt


@pytest.fixture
def config(tmp_path, monkeypatch):
    """An empty folder for settings, and no salt in the environment."""
    monkeypatch.delenv("MEDTUNE_SALT", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def test_a_salt_is_made_once_for_its_owner_only(config):
    salt = user_salt()
    file = config / "medtune" / "salt"
    assert re.fullmatch("[0-9a-f]{64}", salt)
    assert file.read_text().strip() == salt
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert user_salt() == salt
    assert [path.name for path in file.parent.iterdir()] == ["salt"]


def test_all_who_need_a_salt_at_the_same_time_get_the_same(config):
    for number in range(20):
        with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(8) as pool:
            patched.setenv("XDG_CONFIG_HOME", str(config / str(number)))
            salts = set(pool.map(lambda _: user_salt(), range(8)))
            assert salts == {user_salt()}


def test_the_environment_counts_more_than_the_file(config, monkeypatch):
    of_file = user_salt()
    monkeypatch.setenv("MEDTUNE_SALT", "of the ward")
    assert user_salt() == "of the ward"
    assert user_salt() != of_file


def test_where_no_salt_can_be_kept_it_says_what_to_give(config):
    config.write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="give salt=TEXT or set MEDTUNE_SALT") as caught:
        user_salt()
    assert "\n" not in str(caught.value)
    config.unlink()
    (config / "medtune").mkdir(parents=True)
    (config / "medtune" / "salt").write_text("")
    with pytest.raises(ValueError, match="is empty: .* or set MEDTUNE_SALT"):
        user_salt()


@pytest.mark.parametrize(
    "name",
    [
        "p10/p1000003/s50414",
        "p10\\s50414",
        "Doe_John.png",
        "ID-17.DCM",
        "scan.nii.gz",
        "/a",
        "x.jpeg ",
    ],
)
def test_an_id_that_is_a_path_or_a_file_name_is_hashed(name):
    hashed = safe_id(name)
    assert re.fullmatch("id-[0-9a-f]{16}", hashed)
    assert hashed == safe_id(name, salt=os.environ["MEDTUNE_SALT"])
    assert hashed != safe_id(name, salt="another")


@pytest.mark.parametrize("name", ["roco-17", "s1.2", "胸片 1", "1.2.840.10008.5", "", "..", "png"])
def test_other_ids_stay_as_they_are(name):
    assert safe_id(name) == name
