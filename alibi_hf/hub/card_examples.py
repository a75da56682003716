"""The examples of a card: Python that a reader pastes, each after the first in the session of those before.

The tests run them as they stand in a generated card.
"""

from alibi_hf.hub.card_facts import TASKS, CardFacts

PLACE = "path/to/this/folder"
_IDS = "[[1, 2, 3, 4]]"
_LONG = 2  # times the training length


def examples(facts: CardFacts, repo_id: str | None, commit: str | None) -> dict[str, str]:
    """Return the examples by name: "load", "package", "padding", "long" ("" where it is impossible) and "lora".

    Args:
        facts: of the folder.
        repo_id: where it is on the Hub, if it is.
        commit: the commit to pin, if there is one.
    """
    pin = ", revision=commit" if commit else ""
    made = {
        "load": _load(facts, repo_id, commit, pin) + _use(facts),
        "package": f"from alibi_hf import {facts.architecture}\n\n"
        f"model = {facts.architecture}.from_pretrained(repo{pin})",
        "padding": _padding(facts),
        "long": _long(facts),
        "lora": _lora(facts),
    }
    return {name: text.strip() for name, text in made.items()}


def _load(facts: CardFacts, repo_id: str | None, commit: str | None, pin: str) -> str:
    tokenizer = facts.tokenizer is not None
    lines = [
        *(["import torch"] if not tokenizer else []),
        f"from transformers import {facts.auto_class}" + (", AutoTokenizer" if tokenizer else ""),
        "",
        f'repo = "{repo_id or PLACE}"',
        *([f'commit = "{commit}"'] if commit else []),
        *([f"tokenizer = AutoTokenizer.from_pretrained(repo{pin})"] if tokenizer else []),
        f"model = {facts.auto_class}.from_pretrained(repo{pin}, trust_remote_code=True)",
    ]
    return "\n".join(lines) + "\n\n"


def _use(facts: CardFacts) -> str:
    given = 'tokenizer("The people of this country", return_tensors="pt")'
    lines = [f"inputs = {given}" if facts.tokenizer is not None else f'inputs = {{"input_ids": torch.tensor({_IDS})}}']
    if facts.task == "text-generation":
        lines.append("output = model.generate(**inputs, max_new_tokens=20)")
        lines.append(f"print({_decoded(facts, 'output[0]')})")
    else:
        lines.append("output = model(**inputs)")
        lines.append(f"print(output.{_result(facts)}.shape)")
    return "\n".join(lines)


def _padding(facts: CardFacts) -> str:
    """A batch padded on the left, as generation needs it."""
    settings = facts.tokenizer
    if settings is None or not (settings.get("pad_token") or settings.get("eos_token")):
        batch = [
            "import torch",
            "",
            "input_ids = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])  # the first row is two tokens shorter",
            "attention_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])",
            'batch = {"input_ids": input_ids, "attention_mask": attention_mask}',
        ]
    else:
        own = settings.get("pad_token")
        batch = [
            'tokenizer.padding_side = "left"',
            *([] if own else ["tokenizer.pad_token = tokenizer.eos_token"]),
            'texts = ["Two words", "A text of a few more words than that"]',
            'batch = tokenizer(texts, padding=True, return_tensors="pt")',
        ]
    if facts.task == "text-generation":
        use = ["output = model.generate(**batch, max_new_tokens=20)", f"print({_decoded(facts, 'output', many=True)})"]
    else:
        use = ["output = model(**batch)", f"print(output.{_result(facts)}.shape)"]
    return "\n".join(batch + use)


def _long(facts: CardFacts) -> str:
    """Twice as many tokens as it was trained on; "" where it takes no more than those."""
    if facts.config.learned_positions:
        return ""
    length = _LONG * facts.config.max_position_embeddings
    lines = ["import torch", ""]
    if facts.tokenizer is not None:
        lines.append(f'ids = tokenizer("A long text, from a file of yours. " * {length // 4})["input_ids"][:{length}]')
        lines.append("long = torch.tensor([ids])")
    else:
        lines.append(f"long = torch.randint(model.config.vocab_size, (1, {length}))")
    lines.append("with torch.no_grad():")
    if facts.task == "text-generation":
        lines.append("    output = model.generate(long, max_new_tokens=20)")
        lines.append("print(output.shape)")
    else:
        lines.append("    output = model(long)")
        lines.append(f"print(output.{_result(facts)}.shape)")
    return "\n".join(lines)


def _lora(facts: CardFacts) -> str:
    lines = [
        "from peft import LoraConfig, get_peft_model",
        "",
        f'config = LoraConfig(task_type="{TASKS[facts.architecture][1]}", r=8, target_modules=["q_proj", "v_proj"])',
        "adapted = get_peft_model(model, config)",
        "adapted.print_trainable_parameters()",
    ]
    if facts.task == "text-generation":
        lines.append('loss = adapted(**inputs, labels=inputs["input_ids"]).loss')
        lines.append("loss.backward()  # or hand `adapted` to Trainer")
    return "\n".join(lines)


def _result(facts: CardFacts) -> str:
    return {"feature-extraction": "last_hidden_state", "question-answering": "start_logits"}.get(facts.task, "logits")


def _decoded(facts: CardFacts, name: str, many: bool = False) -> str:
    if facts.tokenizer is None:
        return f"{name}.tolist()"
    return f"tokenizer.{'batch_decode' if many else 'decode'}({name}, skip_special_tokens=True)"


__all__ = ["PLACE", "examples"]
