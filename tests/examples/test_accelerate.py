"""The configs of `examples/accelerate/` say what they mean, and the memory that its README promises adds up."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from alibi_hf import AlibiModel
from examples.accelerate import memory
from examples.sharding import distributed_config, untie
from tests.distributed.accelerated import CONFIGS, parse
from tests.model.cases import build, config_of

README = (CONFIGS / "README.md").read_text(encoding="utf-8")
PUBLISHED = {"BLOOM-7B1": 7_069_016_064, "MPT-30B": 29_957_200_896, "BLOOM-176B": 176_247_271_424}


@pytest.mark.parametrize("setup", memory.SETUPS, ids=lambda setup: setup.name)
def test_a_config_has_the_gpus_of_the_table(setup: memory.Setup) -> None:
    path = CONFIGS / f"{setup.name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == setup.gpus
    assert config.mixed_precision == "bf16"
    environment = parse(path.name)
    assert int(environment.get("PARALLELISM_CONFIG_TP_SIZE", 1)) == setup.tensor
    assert ("ACCELERATE_USE_FSDP" in environment) == (setup.sharded > 1 and setup.tensor == 1)
    assert f"[{path.name}]({path.name})" in README


def test_deepspeed_config() -> None:
    assert parse("deepspeed_zero3.yaml")["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"


def test_the_model_is_loaded_with_the_sizes_of_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build("six").save_pretrained(tmp_path / "tied")
    untie(tmp_path / "tied", tmp_path / "untied")
    assert distributed_config(tmp_path / "tied") is None
    for name, value in parse("tp_fsdp.yaml").items():
        monkeypatch.setenv(name, value)
    found = distributed_config(tmp_path / "untied")
    with pytest.raises(ValueError, match="tp_size=8 with dp_shard_size=2 trains wrongly"):
        distributed_config(tmp_path / "tied")
    assert (found.tp_size, found.fsdp_size, found.fsdp_mixed_precision) == (8, 2, True)


def test_every_config_is_in_the_readme() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(re.findall(r"\[(\w+\.yaml)\]", README))


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_those_of_the_published_checkpoints(name: str, parameters: int) -> None:
    assert memory.count(memory.MODELS[name]).total == parameters


@pytest.mark.parametrize("case", ["forty", "twelve_grouped"])
def test_a_layer_keeps_what_the_formula_says(case: str) -> None:
    tokens = 512

    def kept(layers: int) -> int:
        model = AlibiModel(config_of(case, num_hidden_layers=layers)).train()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.ones(1, tokens, dtype=torch.long), use_cache=False)
        return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)

    expected = 4 * tokens * memory.layer_elements(config_of(case))  # in float32
    assert kept(3) - kept(1) == pytest.approx(2 * expected, rel=0.07)


@pytest.mark.slow
def test_the_readme_holds_what_the_script_prints(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["memory.py"])
    memory.main()
    printed = capsys.readouterr().out.strip()
    assert f"<!-- memory -->\n{printed}\n<!-- /memory -->" in README
    for count, card in ((40, "2k"), (48, "8k")):  # the text below the tables
        assert f"{count} ({card}" in README


def test_fewer_bytes_a_gpu_the_more_there_are() -> None:
    config = memory.MODELS["MPT-30B"]
    sizes = memory.count(config)
    sums = [memory.total(config, sizes, memory.Setup("", gpus), "float32", 2048) for gpus in (1, 2, 8, 64)]
    assert sums == sorted(sums, reverse=True)
    assert memory.verdict(sums[0]) == "none" and memory.verdict(sums[-1]) == "80 GB"
