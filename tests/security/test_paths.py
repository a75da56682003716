"""Names and links in a source that lead out of its folder are refused, and so are links where output is made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import alibi_hf
from alibi_hf.checkpoints.carried import require_own_tokenizer
from alibi_hf.errors import AlibiError, CheckpointFileError, UnsafeSourceError
from alibi_hf.verification.text import make_tokens
from tests.security.folders import Folders

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SECRET = "the password of this machine"
CARRIED = ["LICENSE", "tokenizer.json", "tokenizer_config.json", "merges.txt", "spiece.model", "chat_template.jinja"]
CARRIED += ["generation_config.json", "special_tokens_map.json", "additional_chat_templates/tool.jinja"]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Return a file outside every folder, which is JSON so that nothing else is wrong with it."""
    path = tmp_path / "home" / "secret.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"password": SECRET}))
    return path


def holds(folder: Path, text: str) -> bool:
    """Return whether any file under a folder holds a text."""
    return any(text.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def replace_by_link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def edit(path: Path, **fields: Any) -> None:
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | fields))


def refused(call: Callable[[], Any], error: type[AlibiError], words: str, parent: Path) -> None:
    """See that a call raises a named error with some words, and leaves nothing beside what was there."""
    before = sorted(parent.rglob("*"))
    with pytest.raises(error, match=words):
        call()
    assert sorted(parent.rglob("*")) == before


NAMES = [
    "../outside.safetensors",
    "a/../../outside.safetensors",
    "./../outside.safetensors",
    "sub/../shard.safetensors",
]
NAMES += ["..\\outside.safetensors", "C:\\outside.safetensors", "C:outside.safetensors", "\\\\server\\share\\x", "~"]
NAMES += ["~/outside.safetensors", "file:///outside.safetensors", "", ".", "..", "/", "sub", "shard.safetensors\0.txt"]
NAMES += ["/dev/zero", "\ud800.safetensors", "x" * 5000, "shard.safetensors/", "%2e%2e/outside.safetensors"]


@pytest.mark.parametrize("name", [*NAMES, "absolute"], ids=lambda name: repr(name[:30]))
def test_an_index_that_leads_out(folders: Folders, tmp_path: Path, name: str) -> None:
    """There is a whole shard at every one of these places that a path could lead to."""
    folder = folders.copy(tmp_path / "source")
    (folder / "sub").mkdir()
    for place in (folder / "shard.safetensors", tmp_path / "outside.safetensors"):
        shutil.copyfile(folder / WEIGHTS, place)
    (folder / WEIGHTS).unlink()
    name = str(tmp_path / "outside.safetensors") if name == "absolute" else name
    names = dict.fromkeys(load_file(folder / "shard.safetensors"), name)
    for file, safe in ((INDEX, True), ("pytorch_model.bin.index.json", False)):
        (folder / file).write_text(json.dumps({"weight_map": names}))
        for call in (
            lambda: alibi_hf.inspect_checkpoint(folder, allow_pickle=True),
            lambda: alibi_hf.convert(folder, tmp_path / "out", verify=False, allow_pickle=True),
            partial(alibi_hf.AlibiForCausalLM.from_pretrained, folder, use_safetensors=safe),
        ):
            refused(call, CheckpointFileError, "only files beside the index|missing|is no file|as JSON", tmp_path)
        (folder / file).unlink()


@pytest.mark.parametrize("name", ["../outside.safetensors", "absolute"])
@pytest.mark.parametrize("index", [INDEX, "model.safetensors.index.fp16.json"])
def test_an_index_of_our_own_layout_that_leads_out(folders: Folders, tmp_path: Path, name: str, index: str) -> None:
    """Transformers' loader would follow it; so it would in the class of upstream."""
    ours, theirs = folders.copy(tmp_path / "ours", folders.converted), folders.copy(tmp_path / "theirs")
    for folder in (ours, theirs):
        shutil.move(folder / WEIGHTS, tmp_path / "outside.safetensors")
        save_file({"none": torch.ones(1)}, folder / "decoy.safetensors")
        names = dict.fromkeys(load_file(tmp_path / "outside.safetensors"), name.replace("absolute", f"{tmp_path}/x"))
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    variant = "fp16" if "fp16" in index else None
    for call in (
        lambda: alibi_hf.AlibiForCausalLM.from_pretrained(ours, variant=variant),
        lambda: alibi_hf.AlibiModel.from_pretrained(tmp_path, subfolder="ours", variant=variant),
        lambda: alibi_hf.evaluate(ours, folders.text, [16]),
        lambda: alibi_hf.evaluate(f"upstream:{theirs}", folders.text, [16]),
    ):
        refused(call, CheckpointFileError, "only files beside the index", tmp_path)


def test_an_index_beside_its_shard_is_read(folders: Folders, tmp_path: Path) -> None:
    """What is refused above is refused for its name."""
    folder = folders.copy(tmp_path / "source")
    (folder / WEIGHTS).rename(folder / "shard.safetensors")
    names = dict.fromkeys(load_file(folder / "shard.safetensors"), "shard.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert alibi_hf.inspect_checkpoint(folder).parameters


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("name", CARRIED)
def test_a_link_out_of_the_folder(folders: Folders, tmp_path: Path, secret: Path, name: str, absolute: bool) -> None:
    """Converting would put a file of this machine into a folder that is made to be published; exporting likewise."""
    source, ours = folders.copy(tmp_path / "source"), folders.copy(tmp_path / "ours", folders.converted)
    for folder in (source, ours):
        target = secret if absolute else os.path.relpath(secret, (folder / name).parent)
        replace_by_link(folder / name, target)
        assert (folder / name).read_text() == secret.read_text()
    convert, export = (
        lambda: alibi_hf.convert(source, tmp_path / "out", verify=False),
        lambda: alibi_hf.export(ours, tmp_path / "out", "bloom"),
    )
    for call in (convert, export):
        refused(call, UnsafeSourceError, r"is a link to .*secret\.json, outside", tmp_path)


def test_a_folder_of_templates_that_is_a_link(folders: Folders, tmp_path: Path, secret: Path) -> None:
    folder = folders.copy(tmp_path / "source")
    (secret.parent / "notes.txt").write_text(SECRET)
    (folder / "additional_chat_templates").symlink_to(secret.parent)
    refused(lambda: alibi_hf.convert(folder, tmp_path / "out", verify=False), UnsafeSourceError, "outside", tmp_path)


def test_a_link_to_a_link_that_leads_out(folders: Folders, tmp_path: Path, secret: Path) -> None:
    folder = folders.copy(tmp_path / "source")
    (folder / "notes").symlink_to(secret)
    (folder / "LICENSE").symlink_to("notes")
    refused(lambda: alibi_hf.convert(folder, tmp_path / "out", verify=False), UnsafeSourceError, "outside", tmp_path)


def test_links_inside_the_folder_and_those_to_nothing(folders: Folders, tmp_path: Path) -> None:
    folder = folders.copy(tmp_path / "source")
    (folder / "terms").write_text("free for all")
    (folder / "LICENSE").symlink_to("terms")
    (folder / "merges.txt").symlink_to("merges.txt")  # a loop
    (folder / "vocab.txt").symlink_to("nothing")
    alibi_hf.convert(folder, tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "LICENSE").read_text() == "free for all"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert not (tmp_path / "out" / "merges.txt").exists()


def test_weights_and_config_may_be_links(folders: Folders, tmp_path: Path, secret: Path) -> None:
    """Weights often lie on another disk. Nothing but known tensors and fields is taken of these two."""
    folder = folders.copy(tmp_path / "source")
    for name in (WEIGHTS, "config.json"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    alibi_hf.convert(folder, tmp_path / "out", verify=False)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folders.converted / WEIGHTS).read_bytes()
    assert not (tmp_path / "out" / WEIGHTS).is_symlink()
    for name in (WEIGHTS, "config.json"):
        replace_by_link(folder / name, secret)
        with pytest.raises(AlibiError) as caught:
            alibi_hf.convert(folder, tmp_path / "other", verify=False)
        assert SECRET not in str(caught.value) and not (tmp_path / "other").exists()
        replace_by_link(folder / name, tmp_path / name)


def in_cache(folder: Path, cache: Path) -> Path:
    """Return a folder as the Hub's cache holds it: a snapshot of links to blobs."""
    snapshot, blobs = cache / "snapshots" / ("a" * 40), cache / "blobs"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        target, link = blobs / f"{len(list(blobs.glob('*'))):040x}", snapshot / path.relative_to(folder)
        for parent in (target.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        link.symlink_to(os.path.relpath(target, link.parent))
    return snapshot


def test_the_cache_of_the_hub_is_made_of_links(folders: Folders, tmp_path: Path, secret: Path) -> None:
    plain = folders.copy(tmp_path / "plain")
    for name in ("LICENSE", "additional_chat_templates/tool.jinja"):
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_text(name)
    snapshot = in_cache(plain, tmp_path / "models--owner--name")
    (tmp_path / "short").symlink_to(snapshot)
    for number, source in enumerate((snapshot, tmp_path / "short")):
        out = tmp_path / f"out-{number}"
        alibi_hf.convert(source, out, verify=False)
        for name in ("LICENSE", "additional_chat_templates/tool.jinja", "tokenizer.json"):
            assert (out / name).read_bytes() == (plain / name).read_bytes() and not (out / name).is_symlink()
        assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]
    assert "Lincoln" in make_tokens(snapshot, 97).origin
    (snapshot / "LICENSE").unlink()
    for target in (secret, "../../blobs/x", "../../../home/secret.json"):
        (tmp_path / "models--owner--name" / "blobs" / "x").unlink(missing_ok=True)
        (tmp_path / "models--owner--name" / "blobs" / "x").symlink_to(secret)
        replace_by_link(snapshot / "LICENSE", target)
        with pytest.raises(UnsafeSourceError, match="outside"):
            alibi_hf.convert(snapshot, tmp_path / "out", verify=False)


ELSEWHERE = ["vocab_file", "tokenizer_file", "merges_file", "special_tokens_map_file", "added_tokens_file", "spm_file"]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("setting", ELSEWHERE)
def test_a_tokenizer_that_names_a_file_elsewhere(
    folders: Folders, tmp_path: Path, secret: Path, file: str, setting: str
) -> None:
    folder = folders.copy(tmp_path / "source")
    for value in (str(secret), "../home/secret.json", "a/../../home/secret.json"):
        edit(folder / file, **{setting: value})
        with pytest.raises(UnsafeSourceError, match=setting):
            require_own_tokenizer(folder)
        assert make_tokens(folder, 97).origin.startswith("random ids")
        for call in (alibi_hf.evaluate, alibi_hf.reach):
            refused(lambda call=call: call(folder, folders.text, lengths=[16]), UnsafeSourceError, setting, tmp_path)
    alibi_hf.convert(folder, tmp_path / "out", verify=False)
    assert setting not in json.loads((tmp_path / "out" / file).read_text())
    assert not holds(tmp_path / "out", SECRET)


@pytest.mark.parametrize("name", ["../home/tokenizer.4.0.0.json", "absolute"])
def test_a_tokenizer_that_lists_files_elsewhere(folders: Folders, tmp_path: Path, secret: Path, name: str) -> None:
    """Transformers takes the newest of `fast_tokenizer_files`, wherever its name leads."""
    folder, other = folders.copy(tmp_path / "source"), secret.parent / "tokenizer.4.0.0.json"
    (folder / "tokenizer.json").rename(other)
    shutil.copyfile(other, folder / "tokenizer.json")
    edit(
        folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json", name.replace("absolute", str(other))]
    )
    with pytest.raises(UnsafeSourceError, match="fast_tokenizer_files"):
        require_own_tokenizer(folder)
    alibi_hf.convert(folder, tmp_path / "out", verify=False)
    assert "fast_tokenizer_files" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    edit(folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])
    require_own_tokenizer(folder)
    alibi_hf.convert(folder, tmp_path / "plain", verify=False)
    assert "fast_tokenizer_files" in json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())


def test_only_texts_are_licences(folders: Folders, tmp_path: Path) -> None:
    folder = folders.copy(tmp_path / "source")
    kept, left = ["LICENSE", "LICENSE.md", "LICENSE-2.0"], ["LICENSE.py", "LICENSE.PY", "LICENSE.bin", "LICENSE.so"]
    for name in (*kept, *left, "LICENSE.safetensors"):
        (folder / name).write_text("text")
    alibi_hf.convert(folder, tmp_path / "out", verify=False)
    assert sorted(path.name for path in (tmp_path / "out").glob("LICENSE*")) == sorted(kept)


def test_settings_of_the_machine_that_a_tokenizer_was_made_on(folders: Folders, tmp_path: Path) -> None:
    """Published tokenizers are full of them; they name nothing here."""
    folder = folders.copy(tmp_path / "source")
    edit(
        folder / "tokenizer_config.json", special_tokens_map_file="/home/somebody/.cache/map.json", tokenizer_file=None
    )
    assert "Lincoln" in make_tokens(folder, 97).origin
    require_own_tokenizer(folder)
    edit(folder / "tokenizer_config.json", init_inputs=["../../x.json"])
    with pytest.raises(UnsafeSourceError, match="init|x.json"):
        require_own_tokenizer(folder)


def test_names_of_chat_templates_are_not_paths(folders: Folders, tmp_path: Path) -> None:
    folder = folders.copy(tmp_path / "source")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    templates = [{"name": "default", "template": "x"}, {"name": "../../../evil", "template": "y"}]
    edit(folder / "tokenizer_config.json", chat_template=templates)
    before = sorted(tmp_path.rglob("*"))
    alibi_hf.convert(folder, tmp_path / "out", verify=False)
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "out" not in [path, *path.parents]] == before


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}], ids=["new", "overwrite", "resume"])
def test_a_link_where_the_output_is_made(
    folders: Folders, tmp_path: Path, name: str, there: bool, options: dict[str, bool]
) -> None:
    victim = tmp_path / "victim"
    if there:
        victim.mkdir()
        (victim / "mine").write_text("kept")
        (victim / ".resume.json").write_text("{}")
    (tmp_path / name).symlink_to(victim)
    call = partial(alibi_hf.convert, folders.source, tmp_path / "out", verify=False, **options)
    refused(call, CheckpointFileError, "is a link to|is no journal", tmp_path)


def test_a_link_in_a_working_folder(folders: Folders, tmp_path: Path) -> None:
    """Going on with a run would write through it."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / WEIGHTS).symlink_to(victim)
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(CheckpointFileError, match="is a link to"):
            alibi_hf.convert(folders.source, tmp_path / "out", verify=False, **options)
    assert victim.read_text() == "kept"


def test_a_journal_that_names_files_elsewhere(folders: Folders, tmp_path: Path) -> None:
    """The names of a journal are compared, not opened: going on writes the shards of this source, and no others."""
    calls = iter(range(3))

    def interrupt(*_: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    options = {"verify": False, "max_shard_size": 20000, "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        alibi_hf.convert(folders.source, tmp_path / "out", progress=interrupt, **options)
    journal = tmp_path / ".out.partial" / ".resume.json"
    victim = tmp_path / "victim.safetensors"
    save_file(load_file(folders.source / WEIGHTS), victim)
    before = victim.read_bytes()
    held = json.loads(journal.read_text())
    for name in ("../victim.safetensors", str(victim), "model.safetensors"):
        held["finished"].append({"name": name, "sha256": "0" * 64, "bytes": len(before)})
    journal.write_text(json.dumps(held))
    alibi_hf.convert(folders.source, tmp_path / "out", resume=True, **options)
    assert victim.read_bytes() == before
    alibi_hf.convert(folders.source, tmp_path / "again", **options)
    named, expected = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("out", "again"))
    assert named == expected


def test_the_output_and_the_source(folders: Folders, tmp_path: Path) -> None:
    """A link to the source is the source; a new folder in it is none of its files."""
    source = folders.copy(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", tmp_path, source / ".." / "source", source / "sub" / ".."):
        with pytest.raises(CheckpointFileError, match="would replace the source"):
            alibi_hf.convert(source, out, verify=False, overwrite=True)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    alibi_hf.convert(source, source / "out", verify=False)
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == before
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / "linked").symlink_to(target)
    alibi_hf.convert(source, tmp_path / "linked", verify=False)
    assert (tmp_path / "linked").is_symlink() and (target / WEIGHTS).is_file()
