"""The plain decoder that Baichuan and Step1 share: Llama's layer and Llama's names, without its rotary positions.

RMSNorm before attention and before a gated MLP, no biases, an output head of its own unless the config ties it.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers.activations import ACT2FN

from alibi_hf.families._plain import PlainForCausalLM, PlainNorm, hidden_keys
from alibi_hf.model.configuration_alibi import AlibiConfig


class PlainMlp(nn.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size or 0
        self.act = ACT2FN[config.hidden_act]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class PlainLayer(nn.Module):
    """One pre-norm layer around the family's `attention`."""

    def __init__(self, config: AlibiConfig, attention: Callable[[AlibiConfig], nn.Module]) -> None:
        super().__init__()
        norm = (config.hidden_size, "rms_norm", config.norm_eps, False)
        self.input_layernorm, self.post_attention_layernorm = PlainNorm(*norm), PlainNorm(*norm)
        self.self_attn, self.mlp = attention(config), PlainMlp(config)

    def forward(self, x: Tensor, position_bias: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, tokens, width] to [batch, tokens, width]."""
        x = x + self.self_attn(self.input_layernorm(x), position_bias=position_bias, attention_mask=attention_mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainDecoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: AlibiConfig, attention: Callable[[AlibiConfig], nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([PlainLayer(config, attention) for _ in range(config.num_hidden_layers)])
        self.norm = PlainNorm(config.hidden_size, "rms_norm", config.norm_eps, False)

    def forward(self, input_ids: Tensor, position_bias: Tensor, hidden: Tensor) -> Tensor:
        """Ids [batch, tokens] to states [batch, tokens, width]; `hidden` [batch or 1, 1, tokens, tokens]."""
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, position_bias=position_bias, attention_mask=hidden)
        return self.norm(x)


class PlainLlamaForCausalLM(PlainForCausalLM):
    """The language model; a family adds its attention and the bias that it is given."""

    attention: type[nn.Module]

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.model = PlainDecoder(config, self.attention)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def position_bias(self, length: int) -> Tensor:
        """What attention adds to its scores, `Reference.bias_layout` says in which shape."""
        raise NotImplementedError

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """As `PlainForCausalLM.states`."""
        bias = self.position_bias(input_ids.shape[1])
        return self.model(input_ids, bias, hidden_keys(input_ids, attention_mask))

    def head(self) -> Tensor:
        """As `PlainForCausalLM.head`."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


__all__ = ["PlainLlamaForCausalLM"]
