"""The parts of a decoder layer: norms, MLP, attention and the layer itself, each built once from the config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_alibi import ALL_ATTENTION_FUNCTIONS, check_attention, eager_attention_forward
from .bias_alibi import Distances
from .cache_alibi import find_key_norms
from .encodings_alibi import rotate
from .positions_alibi import is_tracing

MLP_ROWS = 4096  # tokens that go through an MLP together where nothing is kept for backward: its inside is wide


def make_norm(config: Any, size: int | None = None) -> nn.Module:
    """Return the norm that `config` asks for, over `size` (default: `hidden_size`) features."""
    size = size or config.hidden_size
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)


def cast_once(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return what autocast would make of the input of a product, so that several products share, and keep, one copy."""
    device = hidden_states.device.type
    if hidden_states.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return hidden_states
    return hidden_states.to(torch.get_autocast_dtype(device))


def has_hooks(module: nn.Module) -> bool:
    """True where calling the module runs more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)  # accelerate replaces forward


def is_plain_linear(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """True for a layer of this very `kind` with no hook or wrapper around it, and whose weight is not sharded."""
    if type(layer) is not kind or has_hooks(layer):
        return False
    return type(layer.weight) in (torch.Tensor, nn.Parameter) and not hasattr(layer.weight, "ds_id")  # DeepSpeed ZeRO-3


class AlibiMLP(nn.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` where `mlp_type` is "gated"."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias) if config.mlp_type == "gated" else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self._activation = type(self.act_fn)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `[batch, tokens, hidden]` to the same shape.

        While training, the input of the last product is not kept for backward: it is as large as four hidden states,
        and the activation alone, no product, makes it again. Elsewhere, without gradients, many tokens go through in
        parts; not while training, where what drops out must not depend on it: checkpointing may run it twice.
        """
        wanted = self.training or torch.is_grad_enabled() or is_tracing()
        if not wanted and hidden_states.shape[:-1].numel() > MLP_ROWS:
            tokens = max(1, MLP_ROWS // hidden_states.shape[:-2].numel())
            return torch.cat([self._map(part) for part in hidden_states.split(tokens, dim=-2)], dim=-2)
        return self._map(hidden_states)

    def _map(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = cast_once(hidden_states)
        up = self.up_proj(hidden_states)
        gate = None if self.gate_proj is None else self.gate_proj(hidden_states)
        if self.training and torch.is_grad_enabled() and self._can_recompute():
            return checkpoint(self._down, up, gate, use_reentrant=False, preserve_rng_state=False)
        return self._down(up, gate)

    def _can_recompute(self) -> bool:
        """True where the activation run twice is the activation run once: a hook, or another one, may drop out."""
        plain = type(self.act_fn) is self._activation and not has_hooks(self.act_fn)
        return plain and not is_tracing() and is_plain_linear(self.down_proj)

    def _down(self, up: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return self.down_proj(self.act_fn(up) if gate is None else self.act_fn(gate) * up)


class AlibiAttention(nn.Module):
    """Causal attention with an ALiBi bias, RoPE, both or neither; multi-head, grouped-query or multi-query."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.attention_scale if config.attention_scale is not None else config.head_dim**-0.5
        self.is_causal = True
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_out_bias)
        per_head = config.qk_norm == "head"
        self.q_norm = make_norm(config, self.head_dim if per_head else queries) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim if per_head else keys) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        distances: Distances,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output `[batch, queries, hidden]` and the weights `[batch, heads, queries, keys]` or None."""
        query, key, value = self.project(hidden_states)
        rotation = distances.rotation
        if rotation is not None:
            query, key = rotation.before_cache(query, key)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            kwargs["key_norms"] = find_key_norms(past_key_values, self.layer_idx)
        if rotation is not None and rotation.key is not None:
            key, kwargs["key_norms"] = rotate(key, rotation.key), None  # the norms are those of keys as cached
        check_attention(self.config._attn_implementation, self.config.attn_logit_softcapping)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        wants_weights = kwargs.pop("output_attentions", None)
        output, weights = attend(
            self,
            query,
            key,
            value,
            None,
            distances=self.local_distances(distances, query.shape[1]),
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            softcap=self.config.attn_logit_softcapping,
            output_attentions=self.config.output_attentions if wants_weights is None else wants_weights,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, key and value, `[batch, heads, tokens, head_dim]`; clamped, then normed, as in llm-foundry."""
        hidden_states = cast_once(hidden_states)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if (clip := self.config.clip_qkv) is not None:
            query, key, value = (states.clamp(min=-clip, max=clip) for states in (query, key, value))
        if self.config.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (states.view(shape).transpose(1, 2) for states in (query, key, value))
        if self.config.qk_norm == "head":
            if query.shape[1] != self.config.num_attention_heads and torch.is_grad_enabled():
                self._add_up_norm_gradients(query.shape[1])
            query, key = self.q_norm(query), self.k_norm(key)
        return query.to(value.dtype), key.to(value.dtype), value  # under autocast norms give float32

    def _add_up_norm_gradients(self, heads: int) -> None:
        """Let ranks add up the gradients of the norms of heads: each rank has those of its own heads.

        Transformers' plan for it adds what earlier backward passes have accumulated once more.
        """
        mesh = self._mesh(heads)
        group = mesh.get_group(mesh.ndim - 1)

        def add_up(gradient: torch.Tensor) -> torch.Tensor:
            total = gradient.contiguous().clone()
            torch.distributed.all_reduce(total, group=group)
            return total

        for parameter in (*self.q_norm.parameters(), *self.k_norm.parameters()):
            if parameter.requires_grad and not hasattr(parameter, "adds_up"):
                parameter.register_hook(add_up)
                parameter.adds_up = True  # type: ignore[attr-defined]  # of the tensor: loading and FSDP replace it

    def local_distances(self, distances: Distances, heads: int) -> Distances:
        """Return the distances of the heads on this rank: slopes belong to the global head, sharded or not.

        Raises:
            ValueError: where the shard of q_proj says nothing about which heads it holds.
        """
        if heads == self.config.num_attention_heads:
            return distances
        mesh = self._mesh(heads)
        return distances.heads(mesh.get_local_rank(mesh.ndim - 1) * heads, heads)  # tp is the last mesh dimension

    def _mesh(self, heads: int) -> Any:
        mesh = getattr(self.q_proj.weight, "device_mesh", None)  # only a DTensor has one
        if mesh is None:
            raise ValueError(
                f"This rank computes {heads} of {self.config.num_attention_heads} heads, but q_proj is no sharded "
                "tensor that tells which; shard the model with Transformers' tensor parallel plan."
            )
        return mesh


class AlibiDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = AlibiAttention(config, layer_idx)
        self.mlp = AlibiMLP(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        self.residual_dropout = nn.Dropout(config.hidden_dropout)
        self.residual_from_norm = config.residual_from_norm

    def forward(
        self,
        hidden_states: torch.Tensor,
        distances: Distances,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map `[batch, tokens, hidden]` to the same shape."""
        normed = self.input_layernorm(hidden_states)
        residual = normed if self.residual_from_norm else hidden_states
        attended, _ = self.self_attn(normed, distances=distances, past_key_values=past_key_values, **kwargs)
        hidden_states = residual + self.residual_dropout(attended)
        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.residual_from_norm else hidden_states
        return residual + self.residual_dropout(self.mlp(normed))
