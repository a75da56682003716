"""Files made to hurt whoever reads them, by name; `python -m tests.fuzz.attacks` runs them all where memory is scarce.

Each is a change to a good folder, and what must come of it: a named error with certain words. The process may map one
GiB more than it starts with, so that whatever a file asks for beyond that fails with a `MemoryError`, which is no named
error.
"""

import tests.conftest  # noqa: F401, I001  (no network, one thread)

import json
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from alibi_hf.checkpoints.export_source import Converted
from alibi_hf.checkpoints.json_files import MAX_JSON
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import AlibiError
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from tests.fuzz.loaders import INDEX, NAMES, WEIGHTS, good, snapshot

SPARE = 1 << 30  # bytes of address space
DEEP = "[" * 100_000
BLOOM, MPT = "bloom", "mpt"
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Attack:
    """A change to a good folder, and the error and the words that come of it."""

    name: str
    kind: str
    family: str
    change: Change
    error: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What came of an attack: the errors of every way of loading, the message of the first, and what it took."""

    name: str
    kind: str
    error: str
    words: list[str]
    errors: list[str]
    message: str
    seconds: float
    grown: int
    kept: bool


def config_with(**fields: Any) -> Change:
    """config.json with some fields set."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def text_of(file: str, text: str | bytes) -> Change:
    return lambda folder: void((folder / file).write_bytes(text.encode() if isinstance(text, str) else text))


def void(_: object) -> None:
    """Drop a result, so that a lambda is a `Change`."""


def sparse(file: str, size: int, start: bytes = b"") -> Change:
    """A file that claims `size` bytes and takes none of the disk."""

    def change(folder: Path) -> None:
        (folder / file).write_bytes(start)
        os.truncate(folder / file, size)

    return change


def special(file: str, make: Callable[[Path], object]) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def entries(edit: Callable[[dict[str, Any], str], object], data: bytes = b"") -> Change:
    """The header of the weights after `edit(header, first tensor's name)`, with `data` added at the end."""

    def change(folder: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        start = 8 + struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8:start])
        edit(header, next(name for name in header if name != "__metadata__"))
        (folder / WEIGHTS).write_bytes(with_length(json.dumps(header).encode()) + whole[start:] + data)

    return change


def with_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def set_key(key: str, value: Any) -> Callable[[dict[str, Any], str], object]:
    return lambda header, name: header[name].__setitem__(key, value)


def sizes(family: str) -> Iterator[Attack]:
    """Sizes of no decoder, in a family's own names."""
    raw = json.loads((good("upstream", family) / "config.json").read_text())
    fields = Checkpoint.open(good("upstream", family)).family.FIELDS

    def named(ours: str) -> str:
        names = next(field.names for field in fields if field.to == ours)
        return next((name for name in names if name in raw), names[0])

    def attack(ours: str, value: Any, *words: str, **more: Any) -> Attack:
        change = config_with(**{named(ours): value, **more})
        shown = f"{value:.40}" if isinstance(value, str) else str(value)[:40]
        return Attack(f"{family} {ours}={shown}", "upstream", family, change, "ConfigFieldError", words)

    width, heads, layers = named("hidden_size"), named("num_attention_heads"), named("num_hidden_layers")
    yield attack("vocab_size", 10**12, named("vocab_size"), "1000000000000")
    yield attack("vocab_size", 2 * 10**9, "vocab_size", "2000000000")
    yield attack("hidden_size", 6 * 10**8, "hidden_size", "600000000")
    yield attack("num_attention_heads", 10**9, "heads", **{width: 10**9})
    yield attack("num_attention_heads", 2**20, "heads", **{width: 2**20})
    yield attack("num_attention_heads", 0, "0 heads")
    yield attack("num_attention_heads", -6, "-6 heads")
    yield attack("num_attention_heads", "6", heads, "int")
    yield attack("num_hidden_layers", 10**9, "num_hidden_layers")
    yield attack("num_hidden_layers", True, layers, "int")
    yield attack("num_hidden_layers", 2.0, layers, "int")
    yield attack("hidden_size", 0, "cannot be shared out")
    if family != "refact":  # which has its length under no name of its own
        yield attack("max_position_embeddings", 10**30, named("max_position_embeddings"))
    yield Attack(
        f"{family} num_labels", "upstream", family, config_with(num_labels=10**9), "ConfigFieldError", ("num_labels",)
    )


def texts() -> Iterator[Attack]:
    """JSON that takes memory, time or the interpreter's stack, and files that are none."""
    many = "{" + ",".join(f'"{number}":0' for number in range(100_000)) + ',"99999":0}'
    bad: dict[str, tuple[str | bytes, str]] = {
        "100,000 brackets": (DEEP, "nested"),
        "500 brackets": ('{"a":' + "[" * 500 + "]" * 500 + "}", "nested"),
        "a name twice among 100,000": (many, "is there twice"),
        "NaN": ('{"layer_norm_epsilon": NaN}', "NaN"),
        "Infinity": ('{"layer_norm_epsilon": -Infinity}', "Infinity"),
        "1e400": ('{"layer_norm_epsilon": 1e400}', "1e400"),
        "5,000 digits": ('{"vocab_size": ' + "9" * 5000 + "}", "5000 digits"),
        "half a character": ('{"model_type": "\\ud800"}', "surrogate"),
        "a byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
        "UTF-16": ("{}".encode("utf-16"), "utf-8"),
        "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
        "a list": ("[]", "not an object"),
    }
    for file, kind, family in (("config.json", "upstream", BLOOM), (INDEX, "sharded", MPT)):
        for name, (text, word) in bad.items():
            yield Attack(f"{file}: {name}", kind, family, text_of(file, text), "CheckpointFileError", (file, word))
        large = sparse(file, 1 << 30)
        words = (file, str(1 << 30), str(MAX_JSON))
        yield Attack(f"{file}: 1 GiB", kind, family, large, "CheckpointFileError", words)
        odd = {
            "a folder": Path.mkdir,
            "a pipe": os.mkfifo,
            "an endless device": lambda path: path.symlink_to("/dev/zero"),
        }
        for name, make in odd.items():
            yield Attack(f"{file}: {name}", kind, family, special(file, make), "CheckpointFileError", (file, "pipe"))
    for name, make in odd.items():
        yield Attack(f"weights: {name}", "upstream", BLOOM, special(WEIGHTS, make), "CheckpointFileError", ("no file",))
    name = "generation_config.json"
    yield Attack(name, "upstream", BLOOM, text_of(name, DEEP), "CheckpointFileError", (name, "nested"))
    odd_text = text_of(name, '{"max_new_tokens": ""}')
    yield Attack(f"{name}: no number", "upstream", BLOOM, odd_text, "ConfigFieldError", (name, "TypeError"))
    below = config_with(max_new_tokens=-1)
    yield Attack("config.json: -1 tokens", "sharded", MPT, below, "ConfigFieldError", ("max_new_tokens", "-1"))


def headers() -> Iterator[Attack]:
    """Safetensors headers that lie."""
    start, end = b'{"a":{"dtype":"F32","shape":[', b'],"data_offsets":[0,0]}}'
    names = ",".join(f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(10**6))
    files: dict[str, tuple[Change, str]] = {
        "length 2^63": (text_of(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), str(2**63)),
        "length 2^64-1": (text_of(WEIGHTS, struct.pack("<Q", 2**64 - 1) + b"{}"), str(2**64 - 1)),
        "length beyond the file": (text_of(WEIGHTS, struct.pack("<Q", 3) + b"{}"), "3 bytes"),
        "length 0": (text_of(WEIGHTS, bytes(8)), "begins with"),
        "length of 200 MB": (sparse(WEIGHTS, 10**9, struct.pack("<Q", 200_000_000)), str(MAX_JSON)),
        "100,000 brackets": (text_of(WEIGHTS, with_length(b'{"a":' + DEEP.encode())), "nested"),
        "UTF-16": (text_of(WEIGHTS, with_length("{}".encode("utf-16"))), "begins with"),
        "not UTF-8": (text_of(WEIGHTS, with_length(b'{"\xff":0}')), "utf-8"),
        "a list": (text_of(WEIGHTS, with_length(b"[]")), "begins with"),
        "a million names": (text_of(WEIGHTS, with_length(f"{{{names}}}".encode())), str(MAX_JSON)),
        "a million dimensions": (text_of(WEIGHTS, with_length(start + b"9," * 10**6 + b"9" + end)), "no tensor"),
        "metadata of numbers": (entries(lambda header, _: header.update(__metadata__={"a": 1})), "__metadata__"),
        "3,000 dimensions": (entries(set_key("shape", [1] * 3000)), "no tensor"),
        "a product beyond 64 bits": (entries(set_key("shape", [2**62, 2**62])), "takes"),
        "a size beyond 64 bits": (entries(set_key("shape", [2**64])), "no tensor"),
        "a negative size": (entries(set_key("shape", [-1, -1])), "no tensor"),
        "a size that is true": (entries(set_key("shape", [True])), "no tensor"),
        "a size of 48.0": (entries(set_key("shape", [48.0])), "no tensor"),
        "an unknown dtype": (entries(set_key("dtype", "F7")), "F7"),
        "a dtype that is a list": (entries(set_key("dtype", ["F32"])), "no tensor"),
        "offsets beyond the file": (entries(set_key("data_offsets", [0, 2**62])), "truncated or damaged"),
        "offsets that are negative": (entries(set_key("data_offsets", [-4, 0])), "no tensor"),
        "offsets the wrong way round": (entries(set_key("data_offsets", [192, 0])), "damaged"),
        "offsets that leave a gap": (entries(set_key("data_offsets", [4, 196])), "damaged"),
        "three offsets": (entries(set_key("data_offsets", [0, 1, 2])), "no tensor"),
        "bytes that belong to nothing": (entries(lambda *_: None, b"\x00" * 64), "truncated or damaged"),
    }
    for name, (change, word) in files.items():
        yield Attack(f"header: {name}", "upstream", BLOOM, change, "CheckpointFileError", (WEIGHTS, word))
    layer = entries(lambda header, _: header.update({"h." + "1" * 5000 + ".ln.weight": header.pop("__metadata__")}))
    yield Attack("header: a layer of 5,000 digits", "upstream", BLOOM, layer, "CheckpointFileError", ("no tensor",))
    digit = entries(lambda header, name: header.update({"h.\u0660.ln.weight": header.pop(name)}))
    yield Attack("header: a layer in other digits", "upstream", BLOOM, digit, "TensorError", ("not understood",))
    for name, file, word in (("300 characters", "x" * 300, "xxx"), ("a zero", "a\x00b.safetensors", "is missing")):
        index, words = json.dumps({"metadata": {}, "weight_map": {"a": file}}), (word,)
        yield Attack(f"{INDEX}: {name}", "sharded", MPT, text_of(INDEX, index), "CheckpointFileError", words)


def pickles() -> Iterator[Attack]:
    """Pickles and layer files that unpack to more than they are."""
    file = "pytorch_model.bin"

    def compressed(folder: Path) -> None:
        with zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(1 << 26))

    def expanded(folder: Path) -> None:
        torch.save({"transformer.word_embeddings.weight": torch.zeros(1, 1).expand(10**6, 10**6)}, folder / file)

    def ranks(folder: Path) -> None:
        (folder / file).unlink()
        for name in ("layer_01-model_00-model_states.pt", "layer_03-model_999999999-model_states.pt"):
            torch.save({}, folder / name)

    yield Attack("pickle: compressed", "pickled", BLOOM, compressed, "UnsafeSourceError", ("compressed", str(1 << 26)))
    yield Attack("pickle: 4 TB of one number", "pickled", BLOOM, expanded, "CheckpointFileError", (file, "1000000"))
    yield Attack("layer files: a billion ranks", "pickled", BLOOM, ranks, "CheckpointFileError", ("lacks layer_01",))


def ours() -> Iterator[Attack]:
    """config.json of this package's own layout."""
    changes: dict[str, dict[str, Any]] = {
        "vocab_size": {"vocab_size": 10**12},
        "hidden_size": {"hidden_size": 10**9},
        "intermediate_size": {"intermediate_size": 10**12},
        "num_hidden_layers": {"num_hidden_layers": 10**9},
        "num_attention_heads": {"num_attention_heads": 10**9, "num_key_value_heads": None},
        "head_dim": {"head_dim": 10**9, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "max_position_embeddings": {"max_position_embeddings": 10**30},
        "num_labels": {"num_labels": 10**9},
        "alibi_slopes": {"alibi_slopes": [0.5] * 10**5},
        "dtype": {"dtype": True},
        "dtype=torch.float8": {"dtype": "float8_e4m3fn"},
        "architectures": {"architectures": 7},
    }
    for name, fields in changes.items():
        yield Attack(f"our own {name}", "ours", BLOOM, config_with(**fields), "ConfigFieldError", (name,))
    wide = config_with(
        hidden_size=2**20, num_attention_heads=2**14, num_key_value_heads=2**14, head_dim=2**6, intermediate_size=2**22
    )
    yield Attack("our own, as large as allowed", "ours", BLOOM, wide, "TensorError", ("config.json gives",))
    absent = config_with(tie_word_embeddings=False, vocab_size=2**26)
    yield Attack("our own, with a head that is missing", "ours", BLOOM, absent, "TensorError", ("lm_head.weight",))


def all_attacks() -> list[Attack]:
    upstream = [attack for family in NAMES for attack in sizes(family)]
    return [*upstream, *texts(), *headers(), *pickles(), *ours()]


def ways(kind: str) -> list[Callable[[Path], object]]:
    """Every way of loading a folder of this kind."""
    if kind == "ours":
        return [Converted.open, AlibiForCausalLM.from_pretrained, _without_the_package]
    if kind == "pickled":
        return [lambda folder: Checkpoint.open(folder, allow_pickle=True)]
    return [Checkpoint.open, AlibiForCausalLM.from_pretrained]


def _without_the_package(folder: Path) -> object:
    """As the code that travels with the weights loads, which has no error classes of its own."""

    class Alone(AlibiForCausalLM):
        foreign_loader = None

    return Alone.from_pretrained(folder)


def run(attack: Attack) -> Result:
    with tempfile.TemporaryDirectory(prefix="alibi-hf-attack-") as parent:
        folder = Path(shutil.copytree(good(attack.kind, attack.family), Path(parent) / "source"))
        attack.change(folder)
        before, start, peak = snapshot(folder), time.monotonic(), peak_bytes()
        errors: list[Exception] = []
        for load in ways(attack.kind):
            try:
                load(folder)
            except Exception as error:
                errors.append(error)
        seconds, grown = time.monotonic() - start, peak_bytes() - peak
        kept = snapshot(folder) == before and len(list(Path(parent).iterdir())) == 1
        wanted = (attack.name, attack.kind, attack.error, list(attack.words))
        return Result(*wanted, [kind_of(error) for error in errors], str(errors[0]), seconds, grown, kept)


def kind_of(error: Exception) -> str:
    """The class of a named error; of another, which only Transformers may raise, its class in brackets."""
    name = type(error).__name__
    return name if isinstance(error, AlibiError) else f"({name}: {str(error)[:100]})"


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    attacks = all_attacks()
    for attack in attacks:
        good(attack.kind, attack.family)
    run(attacks[0])  # what is imported on first use
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + SPARE, mapped + SPARE))
    json.dump([asdict(run(attack)) for attack in attacks], sys.stdout)


if __name__ == "__main__":
    main()
