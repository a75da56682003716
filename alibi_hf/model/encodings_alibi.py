"""The other position encodings, beside ALiBi or instead of it: rotary (RoPE), learned and sinusoidal.

* All of them read the positions of the call's `Distances`: the number of unmasked tokens before a token in its own
  document, those in the cache included. So padding, packing and caches change nothing, as with ALiBi.
* The frequencies of RoPE and its kinds of scaling are Transformers' own (`modeling_rope_utils`), float32. They are
  worked out in each call, never a buffer. Angles, cosines and sines are float32 whatever the dtype of the model,
  float64 in a float64 model; a query or key is rotated at that precision and rounded once.
* Halves of a head are rotated against each other, as in Transformers' Llama; with `partial_rotary_factor` only the
  first features of a head.
* "dynamic" and "longrope" change their frequencies with the length of the text, here of each text by itself. Cached
  keys are then kept as they are and rotated where they are read, so that all keys of a call have the frequencies of
  the length read so far; as these change with every token past the limit, reading in pieces is not reading at once.

RoPE: Su et al., "RoFormer", arXiv:2104.09864. Sinusoidal positions: Vaswani et al., "Attention Is All You Need",
arXiv:1706.03762, section 3.5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .bias_alibi import Distances
from .positions_alibi import is_tracing
from .scaling_alibi import text_lengths

SINUSOIDAL_BASE = 10000.0

Pair = tuple[torch.Tensor, torch.Tensor]


class Rotation:
    """The cosines and sines of one call.

    Attributes:
        query: both `[batch or 1, 1, queries, rotated features]`; of the new keys too, which are cached rotated.
        key: both `[batch or 1, 1, keys, rotated features]`, of all keys, which are cached as they are; else None.
    """

    def __init__(self, query: Pair, key: Pair | None = None) -> None:
        self.query, self.key = query, key

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rotation:
        """Return the same rotation on `device`."""

        def moved(pair: Pair) -> Pair:
            return pair[0].to(device, non_blocking=non_blocking), pair[1].to(device, non_blocking=non_blocking)

        return Rotation(moved(self.query), None if self.key is None else moved(self.key))

    def before_cache(self, query: torch.Tensor, key: torch.Tensor) -> Pair:
        """Return the queries rotated, and the new keys as they are cached; `[batch, heads, queries, dim]`."""
        return rotate(query, self.query), key if self.key is not None else rotate(key, self.query)


def rotate(states: torch.Tensor, turn: Pair) -> torch.Tensor:
    """Return `states` `[batch, heads, tokens, dim]` turned by (cosine, sine), in their own dtype."""
    cos, sin = turn
    turned, kept = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)
    return turned if kept.shape[-1] == 0 else torch.cat((turned, kept), dim=-1)


def rope_types() -> list[str]:
    """Return the kinds of RoPE that can be computed: Transformers' own, and those registered with it."""
    return ["default", *ROPE_INIT_FUNCTIONS]


def changes_with_length(config: Any) -> bool:
    """True where the frequencies of RoPE depend on the length of the text."""
    kind = config.rope_parameters["rope_type"]
    return "dynamic" in kind or kind == "longrope"


def rope_frequencies(
    config: Any, device: torch.device | str | None = None, lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Return the angles by which features turn from one token to the next, and the factor on cosine and sine.

    Args:
        config: an `AlibiConfig` with `rope_parameters`.
        lengths: int64 `[...]`, tokens of the text, where the frequencies change with it.

    Returns:
        frequencies: float32 `[..., rotated features / 2]`.

    Source: `compute_default_rope_parameters` of Transformers' `modeling_llama.py`, and `modeling_rope_utils.py`.
    """
    parameters = config.rope_parameters
    if parameters["rope_type"] == "default":
        dim = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        powers = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
        return (1.0 / parameters["rope_theta"] ** powers).to(device), 1.0
    compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    frequencies, factor = compute(config, torch.device("cpu"))
    if lengths is None or not changes_with_length(config):
        return frequencies.to(device), factor
    limit = length_limit(config)
    if parameters["rope_type"] == "longrope":
        longer = compute(config, torch.device("cpu"), seq_len=limit + 1)[0].to(device)
    else:
        longer = compute(config, lengths.device, seq_len=lengths[..., None])[0]
    return torch.where(lengths[..., None] > limit, longer, frequencies.to(device)), factor


def length_limit(config: Any) -> int:
    """Return the length in tokens past which the frequencies change."""
    if config.rope_parameters["rope_type"] == "longrope":
        return config.rope_parameters["original_max_position_embeddings"]
    return config.max_position_embeddings


def make_rotation(config: Any, distances: Distances, dtype: torch.dtype) -> Rotation | None:
    """Return the rotation of one call; None without RoPE.

    Args:
        config: an `AlibiConfig`.
        distances: of the call.
        dtype: of the model.

    Raises:
        ValueError: frequencies that change with the length, and a 4-D mask over more tokens than they change at.
    """
    if config.rope_parameters is None:
        return None
    device, positions = distances.slopes.device, query_positions(distances)
    if not changes_with_length(config):
        return Rotation(_turn(positions, *rope_frequencies(config, device), dtype))
    _refuse_custom_mask(config, distances)
    keys = distances.key_position
    if keys is None:
        keys = torch.arange(distances.num_keys, device=device)[None]
    if distances.query_document is None:  # one text a row, as long as its last query says
        lengths = positions.amax(-1, keepdim=True) + 1
        frequencies = rope_frequencies(config, device, lengths)
        return Rotation(_turn(positions, *frequencies, dtype), _turn(keys, *frequencies, dtype))
    lengths = text_lengths(distances)[:, 0]  # type: ignore[index]  # no cache: the queries are the keys
    turn = _turn(positions, *rope_frequencies(config, device, lengths), dtype)
    return Rotation(turn, turn)


def query_positions(distances: Distances) -> torch.Tensor:
    """Return the position of each query in its text, int64 `[batch or 1, queries]`."""
    return distances.query_index[None] if distances.query_position is None else distances.query_position


def _turn(positions: torch.Tensor, frequencies: torch.Tensor, factor: float, dtype: torch.dtype) -> Pair:
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions[..., None].to(wide) * frequencies.to(wide)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos() * factor, angles.sin() * factor


def _refuse_custom_mask(config: Any, distances: Distances) -> None:
    """A custom mask may separate texts without telling where they begin."""
    limit = length_limit(config)
    if distances.custom_mask is not None and distances.num_keys > limit:
        raise ValueError(
            f"rope_type={config.rope_parameters['rope_type']!r} changes with the length of a text past {limit} tokens, "
            f"and a 4-D attention_mask over {distances.num_keys} tokens does not tell where texts begin; pass a 2-D "
            "mask or position_ids, or use another rope_type."
        )


def embed_sinusoidal(positions: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return sinusoidal embeddings `[batch or 1, tokens, hidden_size]`, float32 (float64 where `dtype` is).

    Sines and cosines alternate, as in the paper: feature 2i is sin(position / 10000 ** (2i / hidden_size)), feature
    2i + 1 its cosine.
    """
    wide = torch.promote_types(dtype, torch.float32)
    powers = torch.arange(0, hidden_size, 2, dtype=wide, device=positions.device) / hidden_size
    angles = positions[..., None].to(wide) / SINUSOIDAL_BASE**powers
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :hidden_size]


def embed_learned(table: nn.Embedding, distances: Distances) -> torch.Tensor:
    """Return learned embeddings `[batch or 1, tokens, hidden]`.

    Raises:
        ValueError: a position that the table does not have.
    """
    positions, rows = query_positions(distances), table.num_embeddings
    free = distances.custom_mask is not None and distances.query_position is not None  # the caller's own positions
    if not is_tracing() and (free or distances.num_keys > rows):  # asked only then: it waits for the device
        low, high = (int(end) for end in positions.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(
                f"Position {low if low < 0 else high} has no learned embedding: the model has "
                f"max_position_embeddings={rows}, positions 0 to {rows - 1}. Unlike ALiBi, a table of positions has a "
                "ceiling; read shorter texts."
            )
    return table(positions)
