"""The bias check on right and wrong slopes, with and without padding."""

import pytest
import torch

import alibi_hf.verification.bias as bias_module
from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.checkpoints.source import Checkpoint, with_fields
from alibi_hf.model.bias_alibi import alibi_slopes
from alibi_hf.verification.bias import BiasProbe, check_bias, make_feeds, relative_error
from tests.verification.converted import pair

LENGTH = 200


def probe(family: str, heads: int = 6, **fields: object) -> BiasProbe:
    source, output = pair(family, heads)
    checkpoint = Checkpoint.open(source)
    config = with_fields(read_own_config(output), fields)
    return BiasProbe(checkpoint, config, checkpoint.family.reference(checkpoint.config), LENGTH)


@pytest.mark.parametrize("heads", [1, 6, 12, 40])
@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon", "foundry"])
def test_right_bias_passes(family: str, heads: int) -> None:
    rounding = family if family in ("bloom", "falcon") else ""
    checks = check_bias(probe(family, heads), [64, LENGTH], rounding)
    assert all(check.passed for check in checks), checks
    assert {check.length for check in checks} == {64, LENGTH}
    assert len(checks) == (6 if rounding else 4)
    gated = [check for check in checks if check.limit is not None]
    assert len(gated) == (4 if family == "falcon" else len(checks))


def wrong(name: str) -> dict[str, object]:
    """Fields that make the bias wrong."""
    slopes = alibi_slopes(6)
    return {
        "zero": {"alibi": False},
        "one head": {"alibi_slopes": [*slopes[:5], slopes[5] * (1 + 3e-6)]},
        "heads swapped": {"alibi_slopes": [slopes[1], slopes[0], *slopes[2:]]},
        "bias_max": {"alibi_bias_max": 16},
        "square root": {"alibi_distance": "sqrt"},
        "scaled": {"alibi_scaling": {"type": "linear", "factor": 1.5}},
    }[name]


@pytest.mark.parametrize("name", ["zero", "one head", "heads swapped", "bias_max", "square root", "scaled"])
def test_wrong_bias_fails(name: str) -> None:
    found = check_bias(probe("mpt", **wrong(name)), [LENGTH], "")
    assert not any(check.passed for check in found)


def test_wrong_sign_fails(monkeypatch) -> None:
    right = bias_module.our_bias
    monkeypatch.setattr(bias_module, "our_bias", lambda distances, query: -right(distances, query))
    assert not any(check.passed for check in check_bias(probe("mpt"), [LENGTH], ""))


def test_only_falcon_has_a_bias_of_its_own() -> None:
    assert probe("falcon").rounds()
    assert not probe("bloom").rounds()
    assert not probe("mpt").rounds()


def test_absolute_positions_and_distances_are_one_bias() -> None:
    feed = make_feeds(10)[1]
    slopes = torch.tensor([0.5, 0.25])[None, :, None]
    absolute, relative = slopes * torch.arange(10), slopes * (torch.arange(10) - 9)
    assert relative_error(absolute, relative, feed, 9, elementwise=True) == 0.0
    relative[:, 1, 3] += 0.01
    assert relative_error(absolute, relative, feed, 9, elementwise=True) > 1e-3
    assert relative_error(absolute, relative.index_fill(2, torch.tensor(0), 9.0), feed, 9, elementwise=True) > 1e-3


def test_masked_keys_are_not_compared() -> None:
    feed = make_feeds(12)[1]  # the second row has three masked keys
    theirs = (torch.arange(12) - 11.0).expand(2, 1, 12).clone()
    ours = theirs.clone()
    ours[1, :, :3] = -1e30
    assert relative_error(ours, theirs, feed, 11, elementwise=True) == 0.0
    ours[0, :, 0] = -1e30
    assert relative_error(ours, theirs, feed, 11, elementwise=True) > 1
