"""What PEFT adapts in an ALiBi decoder where the caller names no modules, as in `LoraConfig()`.

PEFT keeps one table a method, from model type to module names. The projections and norms here are named as Llama's, so
each table's entry for Llama is the right one: q_proj and v_proj for LoRA, which under one budget of parameters do best
(Hu et al., "LoRA", arXiv:2106.09685, section 7.1); k_proj, v_proj and down_proj for IA3; the norms for LN tuning.

A folder loaded with `trust_remote_code` where this package is not imported has no entry: name the modules there.
"""

from transformers.utils import is_peft_available


def register_target_modules() -> None:
    """Enter the model type "alibi" into PEFT's tables, unless it is there; without PEFT, do nothing.

    PEFT has no hook for model types of others, and a script may import it before or after this package, so it is
    imported here: a quarter of a second.
    """
    if not is_peft_available():
        return
    try:
        from peft.utils import constants
    except Exception:  # a PEFT that does not go with this Transformers: of no concern to who does not use it
        return
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            table.setdefault("alibi", table["llama"])
