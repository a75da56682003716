"""The attention cores that are compared: ours through its registered interface, upstream's own, and the floor.

* `bloom-eager`, `mpt-eager`: Transformers' `BloomAttention` and `MptAttention` as they are, with an identity in place
  of the projections, fed with fused queries, keys and values in the layout that their projection gives.
* `hf-sdpa-bias`: Transformers' `sdpa_attention_forward` with `position_bias`, which makes the mask of all scores.
* What a model makes once for all layers (distances, causal masks, block masks) is made before the clock starts.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import BloomConfig, MptConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from alibi_hf.model.attention_alibi import FUNCTIONS
from alibi_hf.model.bias_alibi import config_slopes
from alibi_hf.model.dense_alibi import fused_row_is_causal
from alibi_hf.model.positions_alibi import make_distances
from alibi_hf.verification.memory import available_memory
from benchmarks.inputs import Problem

EAGER_LIMIT = 16384
GIB = 2**30


@dataclass(frozen=True)
class Core:
    """A contender made ready for one problem.

    Attributes:
        inputs: the tensors that it takes, and that gradients are taken of.
        attend: `attend(*inputs)` gives the output `[1, heads, length, head_dim]`.
        split: from the gradients of `inputs` to those of query, key and value, each of the output's shape.
    """

    inputs: tuple[torch.Tensor, ...]
    attend: Callable[..., torch.Tensor]
    split: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] = lambda gradients: gradients


@dataclass(frozen=True)
class Contender:
    """One way to compute attention.

    Attributes:
        prepare: makes it ready for a problem.
        what: one line for a reader.
        alibi: whether it adds the bias; without, there is no error to report.
        score_copies: how many float32 matrices of all scores it holds at its peak: forward, and with backward.
        eager: whether it keeps all scores, and is left out from `EAGER_LIMIT` tokens on.
        refuse: why it cannot run on a problem, or None.
    """

    prepare: Callable[[Problem], Core]
    what: str
    alibi: bool = True
    score_copies: tuple[int, int] = (0, 0)
    eager: bool = False
    refuse: Callable[[Problem], str | None] = lambda problem: None

    def left_out(self, problem: Problem, backward: bool) -> str | None:
        """Return why this contender is not run on `problem`, or None if it is."""
        if self.eager and problem.length >= EAGER_LIMIT:
            return f"eager attention is left out from {EAGER_LIMIT} tokens on"
        needed = self.score_copies[backward] * 4 * problem.heads * problem.length**2
        available = available_memory(problem.device)
        if needed > available:
            return f"needs about {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB are available"
        return self.refuse(problem)


def _own(problem: Problem) -> tuple[torch.Tensor, ...]:
    return problem.query, problem.key, problem.value


def _ours(implementation: str, window: bool, problem: Problem) -> Core:
    embeds = problem.query.new_empty(1, problem.length, 0)
    distances = make_distances(problem.config, embeds, None, None, None, None, 0)
    distances = distances.replace(window=window)
    module: Any = SimpleNamespace(layer_idx=0)
    function = FUNCTIONS[implementation]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return function(module, query, key, value, None, distances, problem.scaling)[0].transpose(1, 2)

    return Core(_own(problem), attend)


def _row(problem: Problem) -> Core:
    bias = _slopes(problem)[:, None] * torch.arange(problem.length, device=problem.device)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias[None, :, None], is_causal=True, scale=problem.scaling
        )

    return Core(_own(problem), attend)


def _no_alibi(problem: Problem) -> Core:
    causal = functools.partial(F.scaled_dot_product_attention, is_causal=True, scale=problem.scaling)
    return Core(_own(problem), causal)


def _hf_sdpa_bias(problem: Problem) -> Core:
    # As a causal model calls it: a position bias that broadcasts over queries; every layer makes the whole mask of it.
    bias = (_slopes(problem)[:, None] * torch.arange(problem.length, device=problem.device))[None, :, None]
    if problem.device != "cpu":  # the fused kernels take a mask of the queries' dtype alone
        bias = bias.to(problem.dtype)
    module: Any = SimpleNamespace(is_causal=True)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output, _ = sdpa_attention_forward(
            module, query, key, value, None, scaling=problem.scaling, is_causal=True, position_bias=bias
        )
        return output.transpose(1, 2)

    return Core(_own(problem), attend)


def _bloom(problem: Problem) -> Core:
    heads, length, dim = problem.heads, problem.length, problem.head_dim
    with torch.device("meta"):
        core = BloomAttention(BloomConfig(hidden_size=heads * dim, n_head=heads), layer_idx=0).eval()
    core.query_key_value, core.dense = nn.Identity(), nn.Identity()
    everyone = torch.ones(1, length, dtype=torch.long, device=problem.device)
    alibi = build_alibi_tensor(everyone, heads, problem.dtype)
    lowest = torch.finfo(problem.dtype).min
    mask = torch.full((1, 1, length, length), lowest, dtype=problem.dtype, device=problem.device).triu_(1)
    fused = torch.stack(_own(problem), dim=3).transpose(1, 2).reshape(1, length, heads * 3 * dim)

    def attend(fused: torch.Tensor) -> torch.Tensor:
        output, _ = core(fused, residual=0.0, alibi=alibi, attention_mask=mask)
        return output.view(1, length, heads, dim).transpose(1, 2)

    def split(gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return gradients[0].view(1, length, heads, 3, dim).transpose(1, 2).unbind(3)

    return Core((fused,), attend, split)


def _mpt(problem: Problem) -> Core:
    heads, length, dim = problem.heads, problem.length, problem.head_dim
    with torch.device("meta"):
        core = MptAttention(MptConfig(d_model=heads * dim, n_heads=heads, max_seq_len=length), layer_idx=0).eval()
    core.Wqkv, core.out_proj = nn.Identity(), nn.Identity()
    bias = build_mpt_alibi_tensor(heads, length, device=problem.device)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=problem.device).triu_(1)
    fused = torch.stack(_own(problem), dim=1).permute(0, 3, 1, 2, 4).reshape(1, length, 3 * heads * dim)

    def attend(fused: torch.Tensor) -> torch.Tensor:
        output, _ = core(fused, position_bias=bias, attention_mask=mask)
        return output.view(1, length, heads, dim).transpose(1, 2)

    def split(gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return gradients[0].view(1, length, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)

    return Core((fused,), attend, split)


def _flex(alibi: bool, problem: Problem) -> Core:
    slopes = _slopes(problem)

    def causal(b: Any, h: Any, query: Any, key: Any) -> Any:
        return query >= key

    def biased(score: Any, b: Any, h: Any, query: Any, key: Any) -> Any:
        return score + slopes[h] * (key - query)

    mask = create_block_mask(causal, None, None, problem.length, problem.length, device=problem.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    attend = functools.partial(compiled, score_mod=biased if alibi else None, block_mask=mask, scale=problem.scaling)
    return Core(_own(problem), attend)


def _flash(problem: Problem) -> Core:
    from flash_attn import flash_attn_func

    slopes = _slopes(problem)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = (states.transpose(1, 2) for states in (query, key, value))
        return flash_attn_func(*parts, softmax_scale=problem.scaling, causal=True, alibi_slopes=slopes).transpose(1, 2)

    return Core(_own(problem), attend)


def _slopes(problem: Problem) -> torch.Tensor:
    return config_slopes(problem.config, problem.device)


def _needs_row(problem: Problem) -> str | None:
    if problem.device == "cpu" and fused_row_is_causal():
        return None
    return "fused attention takes no mask together with is_causal here"


def _needs_cuda(problem: Problem) -> str | None:
    return None if problem.device.startswith("cuda") else "runs on CUDA alone"


def _needs_flash(problem: Problem) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return "flash-attn takes 16 bits alone" if problem.dtype == torch.float32 else _needs_cuda(problem)


EAGER: dict[str, Any] = {"score_copies": (4, 6), "eager": True}

CONTENDERS: dict[str, Contender] = {
    "ours": Contender(functools.partial(_ours, "sdpa", True), "this package, sdpa, with provable windows"),
    "ours-dense": Contender(functools.partial(_ours, "sdpa", False), "this package, sdpa, attention_window=False"),
    "row": Contender(_row, "PyTorch's fused attention with one float32 row of bias", refuse=_needs_row),
    "sdpa-no-alibi": Contender(_no_alibi, "PyTorch's fused causal attention without ALiBi: the floor", alibi=False),
    "hf-sdpa-bias": Contender(_hf_sdpa_bias, "Transformers' sdpa with position_bias", score_copies=(2, 2)),
    "bloom-eager": Contender(_bloom, "Transformers' BloomAttention", **EAGER),
    "mpt-eager": Contender(_mpt, "Transformers' MptAttention", **EAGER),
    "ours-flex": Contender(
        functools.partial(_ours, "flex_attention", True), "this package, flex_attention", refuse=_needs_cuda
    ),
    "flex-alibi": Contender(
        functools.partial(_flex, True), "FlexAttention, ALiBi as score_mod, causal blocks", refuse=_needs_cuda
    ),
    "flex-causal": Contender(
        functools.partial(_flex, False), "FlexAttention, causal, without ALiBi", alibi=False, refuse=_needs_cuda
    ),
    "flash-attn": Contender(_flash, "flash-attn with alibi_slopes", refuse=_needs_flash),
}
