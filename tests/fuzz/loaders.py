"""The loaders that are fuzzed: each takes the bytes of one bad file and either loads it whole, or raises a named error.

Whatever loads is looked at from outside: the safetensors library must read the same tensors, and each must have a fate.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hypothesis import strategies as st
from safetensors import safe_open

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.export_source import Converted
from alibi_hf.checkpoints.inspect import inspect_checkpoint
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import AlibiError
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from tests.all_families import FAMILIES
from tests.builders import tokenizer
from tests.fuzz.mutations import changed_index, changed_json, changed_safetensors, damaged
from tests.scratch import scratch_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = tuple(FAMILIES)


@dataclass(frozen=True)
class Case:
    """One bad file in a folder that is good otherwise."""

    kind: str
    family: str
    file: str
    data: bytes


@cache
def good(kind: str, family: str) -> Path:
    """A folder with nothing wrong: "upstream", "sharded", "pickled" or "ours"."""
    folder = scratch_folder(kind)
    if kind == "sharded":
        return FAMILIES[family](folder, shards=3)
    source = tokenizer(FAMILIES[family](folder / "source", layers=1))
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 5}')
    if kind == "ours":
        convert(source, folder / "ours", verify=False)
        return folder / "ours"
    if kind == "pickled":
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(source / WEIGHTS), source / "pytorch_model.bin")
        (source / WEIGHTS).unlink()
    return source


@contextmanager
def written(case: Case) -> Iterator[Path]:
    """The folder of a case, in a folder of its own, which must hold nothing else afterwards."""
    with tempfile.TemporaryDirectory(prefix="alibi-hf-fuzz-") as parent:
        folder = Path(shutil.copytree(good(case.kind, case.family), Path(parent) / "source"))
        (folder / case.file).write_bytes(case.data)
        before = snapshot(folder)
        yield folder
        assert snapshot(folder) == before, "the source was changed"
        assert [path.name for path in Path(parent).iterdir()] == ["source"], "something was left behind"


def snapshot(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def run(case: Case) -> str:
    """ "loaded", or the name of the named error; any other exception is a finding."""
    with written(case) as folder:
        try:
            LOADERS[case.kind](folder)
        except AlibiError as error:
            assert 0 < len(str(error)) < 2_100 and str(error).replace("\n", "").isprintable(), repr(error)
            return type(error).__name__
        return "loaded"


def _upstream(folder: Path) -> None:
    """Opens, inspects, converts, and loads directly: what one accepts all must."""
    checkpoint = Checkpoint.open(folder)
    stored = {}
    for shard in checkpoint.shards:
        with safe_open(shard, "pt") as file:
            stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert stored == {name: info.shape for name, info in checkpoint.tensors.items()}
    assert sorted(stored) == sorted(group.source for group in checkpoint.groups)
    json.dumps(inspect_checkpoint(folder).to_dict(), allow_nan=False)
    out = folder.parent / "out"
    try:
        convert(folder, out, verify=False)
        _ours(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    AlibiForCausalLM.from_pretrained(folder)


def _pickled(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    for group in checkpoint.groups:
        assert tuple(checkpoint.get(group.source).shape) == checkpoint.tensors[group.source].shape


def _ours(folder: Path) -> None:
    opened = Converted.open(folder)
    assert opened.config.vocab_size == AlibiConfig.from_pretrained(folder).vocab_size
    model = AlibiForCausalLM.from_pretrained(folder)
    assert set(opened.tensors) <= set(model.state_dict())


LOADERS: dict[str, Callable[[Path], None]] = {
    "upstream": _upstream,
    "sharded": _upstream,
    "pickled": _pickled,
    "ours": _ours,
}


@cache
def field_names(family: str) -> tuple[str, ...]:
    """The names that the family's config.json may hold, and those that every one may."""
    fields = Checkpoint.open(good("upstream", family)).family.FIELDS
    common = ("architectures", "model_type", "dtype", "id2label", "num_labels", "quantization_config", "auto_map")
    return tuple(name for field in fields for name in field.names) + common


OUR_FIELDS = tuple(name for name in AlibiConfig.__annotations__ if not name.startswith("foreign"))


def _json_of(kind: str, family: str, file: str) -> dict:
    return json.loads((good(kind, family) / file).read_text())


@st.composite
def config_cases(draw: st.DrawFn) -> Case:
    """config.json of any family."""
    family = draw(st.sampled_from(NAMES))
    raw = _json_of("upstream", family, "config.json")
    return Case("upstream", family, "config.json", draw(changed_json(raw, field_names(family))))


@st.composite
def own_config_cases(draw: st.DrawFn) -> Case:
    """config.json of this package's own layout."""
    family = draw(st.sampled_from(NAMES))
    raw = _json_of("ours", family, "config.json")
    return Case("ours", family, "config.json", draw(changed_json(raw, OUR_FIELDS)))


@st.composite
def header_cases(draw: st.DrawFn) -> Case:
    """A safetensors file, upstream's or our own."""
    kind, family = draw(st.sampled_from(("upstream", "upstream", "ours"))), draw(st.sampled_from(NAMES))
    return Case(kind, family, WEIGHTS, draw(changed_safetensors((good(kind, family) / WEIGHTS).read_bytes())))


@st.composite
def index_cases(draw: st.DrawFn) -> Case:
    """The index of a checkpoint in three shards."""
    family = draw(st.sampled_from(NAMES))
    return Case("sharded", family, INDEX, draw(changed_index(_json_of("sharded", family, INDEX))))


@st.composite
def companion_cases(draw: st.DrawFn) -> Case:
    """generation_config.json, tokenizer_config.json, and the record of a conversion."""
    family = draw(st.sampled_from(("bloom", "mpt", "jais")))
    file = draw(st.sampled_from(("generation_config.json", "tokenizer_config.json", "conversion.json")))
    kind = "ours" if file == "conversion.json" else "upstream"
    names = ("eos_token_id", "do_sample", "tokenizer_class", "added_tokens_decoder", "output", "source", "tensors")
    return Case(kind, family, file, draw(changed_json(_json_of(kind, family, file), names)))


@st.composite
def pickle_cases(draw: st.DrawFn) -> Case:
    """A pickle with bytes of its first part, which says what it holds, changed."""
    family = draw(st.sampled_from(("bloom", "mpt")))
    data = (good("pickled", family) / "pytorch_model.bin").read_bytes()
    return Case("pickled", family, "pytorch_model.bin", draw(damaged(data, window=1 << 13)))


@st.composite
def byte_cases(draw: st.DrawFn) -> Case:
    """Any bytes at all in the place of any file."""
    kind = draw(st.sampled_from(("upstream", "sharded", "ours", "pickled")))
    files = {"sharded": ("config.json", INDEX), "pickled": ("config.json", "pytorch_model.bin")}
    file = draw(st.sampled_from(files.get(kind, ("config.json", WEIGHTS, "generation_config.json"))))
    return Case(kind, draw(st.sampled_from(("bloom", "mpt"))), file, draw(st.binary(max_size=200)))


STRATEGIES: dict[str, st.SearchStrategy[Case]] = {
    "config.json, upstream": config_cases(),
    "config.json, our own": own_config_cases(),
    "safetensors header": header_cases(),
    "index": index_cases(),
    "generation, tokenizer, record": companion_cases(),
    "pickle": pickle_cases(),
    "any bytes": byte_cases(),
}
