"""A tiny random checkpoint of every family, by the family's name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.builders import bloom, falcon, mpt
from tests.references import baichuan, btlm, mosaic, refact, step1

FAMILIES: dict[str, Callable[..., Path]] = {
    "bloom": bloom,
    "mpt": mpt,
    "falcon": falcon,
    "baichuan": baichuan.write,
    "btlm": btlm.write,
    "jais": partial(btlm.write, family="jais"),
    "mosaic_gpt": mosaic.write,
    "refact": refact.write,
    "replit_lm": partial(mosaic.write, family="replit_lm"),
    "step1": step1.write,
}
