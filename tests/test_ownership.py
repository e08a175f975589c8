"""Folders, keys and files of settings that somebody else could have put there: refused before anything is read."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import esper
from esper import Blueprint, Platform
from esper.artifacts import SigningKey, SigningKeyError
from esper.compiler.variant_store import VariantKey, VariantStore
from esper.configs import ConfigError, EsperConfig, PlatformConfig, load_config
from esper.ownership import UnsafePathError, check_own, make_own_folder
from esper.services.errors import StoreUnsafeError
from tests.kernel_shelf import KernelShelf

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes as POSIX has them")
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
STRANGER = 54321
KEY = VariantKey.of({"torch": "2.13.0", "graph": b"one"})


def give_away(path: Path) -> None:
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def open_up(path: Path) -> None:
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o002)


HOLES = [pytest.param(give_away, id="another user's", marks=as_root), pytest.param(open_up, id="others may write")]


def planted(folder: Path) -> str:
    """A data folder with a kernel in it, signed with the key that lies there; the kernel's id."""
    with Platform.embedded(folder) as platform:
        assert len(platform.trust) == 1  # its own key, which is made with the folder
    with KernelShelf(folder) as shelf:
        return shelf.put(Blueprint.bottleneck(4, 4, 2, start="kaiming")).id


# -- a data folder that somebody else has prepared ---------------------------------------------------------------------


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("where", ["the folder", "one above", "two above"])
def test_no_kernel_of_a_folder_that_others_can_change_is_loaded(
    hole: Callable[[Path], None], where: str, tmp_path: Path
) -> None:
    folder = tmp_path / "above" / "project" / "data"
    kernel = planted(folder)
    hole({"the folder": folder, "one above": folder.parent, "two above": folder.parent.parent}[where])
    before = sorted(each.name for each in folder.iterdir())
    with Platform.embedded(folder) as platform:
        for use in (
            lambda: platform.store,
            lambda: platform.trust,
            lambda: platform.submit(Blueprint.bottleneck(4, 4, 2)),
        ):
            with pytest.raises(StoreUnsafeError, match=r"the data folder is not used: .*(belongs to|others can write)"):
                use()
        model = esper.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)), platform=platform)
        assert not asyncio.run(model.load_kernel("0", 0, kernel))
    assert sorted(each.name for each in folder.iterdir()) == before


def test_a_connected_platform_takes_no_key_from_such_a_folder(tmp_path: Path) -> None:
    planted(tmp_path / "data")
    open_up(tmp_path / "data")
    config = EsperConfig().model_copy(update={"platform": PlatformConfig(root=tmp_path / "data")})
    config = config.model_copy(update={"urza": config.urza.model_copy(update={"url": "http://127.0.0.1:9"})})
    with Platform.connect(config) as platform, pytest.raises(StoreUnsafeError, match="others can write"):
        assert platform.trust


def test_a_link_leads_to_what_it_names(tmp_path: Path) -> None:
    planted(tmp_path / "shared" / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").symlink_to("../shared/data")
    with Platform.embedded(tmp_path / "mine" / "data") as platform:
        assert platform.store.stats().kernels == 1
    open_up(tmp_path / "shared")
    with Platform.embedded(tmp_path / "mine" / "data") as platform, pytest.raises(StoreUnsafeError, match="shared has"):
        assert platform.store


def test_a_folder_that_is_made_is_this_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        planted(tmp_path / "new" / "data")
        planted(tmp_path / "new" / "data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE((tmp_path / "new/data").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


# -- what is no hole ---------------------------------------------------------------------------------------------------


def test_a_folder_of_ones_own_in_a_shared_one_like_tmp(tmp_path: Path) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    planted(shared / "data")
    check_own(shared / "data", "the data folder")
    check_own(shared / "not there yet", "the data folder")
    with pytest.raises(UnsafePathError, match="mode 1777"):
        check_own(shared, "the data folder")


@as_root
def test_in_a_shared_folder_others_folders_and_links_are_refused(tmp_path: Path) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    make_own_folder(shared / "mine", "the data folder")
    (shared / "theirs").mkdir()
    (shared / "link").symlink_to("mine")
    check_own(shared / "link", "the data folder")
    give_away(shared / "theirs")
    give_away(shared / "link")
    for name in ("theirs", "theirs/data", "link", "link/data"):
        with pytest.raises(UnsafePathError, match="belongs to user 54321, and this process runs as root"):
            check_own(shared / name, "the data folder")


@as_root
def test_a_group_of_ones_own_may_write_and_any_other_may_not(tmp_path: Path) -> None:
    """The umask 002 of many distributions, and the `fsGroup` of a pod, which no list of groups has."""
    import grp

    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(0o775)
    for group in (0, STRANGER):  # root's own, and one that nobody is known to be in
        os.chown(folder, 0, group)
        check_own(folder, "the data folder")
    other = next(each.gr_gid for each in grp.getgrall() if each.gr_gid)
    os.chown(folder, 0, other)
    with pytest.raises(UnsafePathError, match=r"mode 0775, so others can write to it; .*chmod go-w"):
        check_own(folder, "the data folder")


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="access lists as Linux has them")
def test_an_access_list_is_not_overlooked(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    folder.chmod(0o770)
    check_own(folder, "the data folder")
    nobody = 2**32 - 1
    owner, user, group, mask, other = (1, 7, nobody), (2, 7, STRANGER), (4, 0, nobody), (16, 7, nobody), (32, 0, nobody)
    entries = b"".join(struct.pack("<HHI", *each) for each in (owner, user, group, mask, other))
    try:
        os.setxattr(folder, "system.posix_acl_access", struct.pack("<I", 2) + entries)
    except OSError:
        pytest.skip("the file system has no access lists")
    with pytest.raises(UnsafePathError, match="others can write"):
        check_own(folder, "the data folder")


def test_links_in_a_circle_have_an_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UnsafePathError, match="no end"):
        check_own(tmp_path / "a" / "data", "the data folder")


def test_a_relative_path_is_looked_at_from_the_root_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "open")
    check_own("data/../data", "the data folder")
    open_up(tmp_path / "open")
    for path in ("data", "./data/../data", "../open/data"):
        with pytest.raises(UnsafePathError, match="open has mode"):
            check_own(path, "the data folder")


# -- keys, trust lists, compiled variants ------------------------------------------------------------------------------


@as_root
def test_a_key_of_another_user_is_refused_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    planted(tmp_path / "data")
    give_away(tmp_path / "data" / "signing.pem")
    with pytest.raises(SigningKeyError, match=r"belongs to the user 54321.*run as that user"):
        SigningKey.load(tmp_path / "data" / "signing.pem")
    with Platform.embedded(tmp_path / "data") as platform, pytest.raises(SigningKeyError, match="belongs to"):
        assert platform.trust


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o400, 0o600])
def test_a_key_is_private(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    key = SigningKey.generate()
    key.save(path)
    path.chmod(mode)
    if mode & 0o077:
        with pytest.raises(SigningKeyError, match=f"has mode {mode:04o}; make it private: chmod 600"):
            SigningKey.load(path)
    else:
        assert SigningKey.load(path).key_id == key.key_id


def test_a_key_that_others_could_exchange_is_refused_and_none_is_made_there(tmp_path: Path) -> None:
    SigningKey.generate().save(tmp_path / "key")
    open_up(tmp_path)
    try:
        for path in (tmp_path / "key", tmp_path / "another"):
            with pytest.raises(SigningKeyError, match="others can write"):
                SigningKey.load_or_create(path)
    finally:
        tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == ["key"]


@pytest.mark.parametrize("hole", HOLES)
def test_a_list_of_trusted_keys_that_others_can_change_is_refused(hole: Callable[[Path], None], tmp_path: Path) -> None:
    settings = tmp_path / "esper.yaml"
    settings.write_text(f"platform:\n  trusted_keys: ['{'ab' * 32}']\n")
    assert load_config(settings).platform.trusted_keys == ("ab" * 32,)
    hole(settings)
    with pytest.raises(ConfigError, match=r"trust list platform.trusted_keys in .* is not used"):
        load_config(settings)
    settings.write_text("name: lab\n")
    assert load_config(settings).name == "lab"  # nothing that anybody has to be trusted for


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("where", ["the file", "the folder", "Inductor's folder"])
def test_no_variant_is_read_that_others_could_have_written(
    hole: Callable[[Path], None], where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = VariantStore(tmp_path / "inductor" / "esper")
    store.put(KEY, b"code")
    assert store.get(KEY) == b"code"
    (file,) = store.folder.iterdir()
    hole({"the file": file, "the folder": store.folder, "Inductor's folder": store.folder.parent}[where])
    with caplog.at_level(logging.WARNING):
        assert store.get(KEY) is None
        assert store.get(KEY) is None
        if where != "the file":
            store.put(VariantKey.of({"graph": b"other"}), b"code")
    assert list(store.folder.iterdir()) == [file]
    (record,) = caplog.records
    assert "the next run compiles them again" in record.getMessage()
    assert "TORCHINDUCTOR_CACHE_DIR" in record.getMessage()


def test_variants_are_found_again_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        VariantStore(tmp_path / "store").put(KEY, b"code")
    finally:
        os.umask(before)
    assert VariantStore(tmp_path / "store").get(KEY) == b"code"
