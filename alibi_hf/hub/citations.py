"""What to cite: ALiBi, and the first publication of a family of checkpoints. Only what is sure is here."""

ALIBI = "alibi"
# By the family's name, or that of a checkpoint with a publication of its own.
PAPERS: dict[str, tuple[str, str, str, str]] = {
    ALIBI: (
        "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
        "Press, Ofir and Smith, Noah A. and Lewis, Mike",
        "2022",
        "https://arxiv.org/abs/2108.12409",
    ),
    "bloom": (
        "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model",
        "{BigScience Workshop}",
        "2022",
        "https://arxiv.org/abs/2211.05100",
    ),
    "bloomz": (
        "Crosslingual Generalization through Multitask Finetuning",
        "Muennighoff, Niklas and others",
        "2022",
        "https://arxiv.org/abs/2211.01786",
    ),
    "fingpt": (
        "FinGPT: Large Generative Models for a Small Language",
        "Luukkonen, Risto and others",
        "2023",
        "https://arxiv.org/abs/2311.05640",
    ),
    "poro": (
        "Poro 34B and the Blessing of Multilinguality",
        "Luukkonen, Risto and others",
        "2024",
        "https://arxiv.org/abs/2404.01856",
    ),
    "mpt": (
        "Introducing MPT-7B: A New Standard for Open-Source, Commercially Usable LLMs",
        "{MosaicML NLP Team}",
        "2023",
        "https://www.mosaicml.com/blog/mpt-7b",
    ),
    "phogpt": (
        "PhoGPT: Generative Pre-training for Vietnamese",
        "Nguyen, Dat Quoc and Nguyen, Linh The and Tran, Chi and Nguyen, Dung Ngoc and Phung, Dinh and Bui, Hung",
        "2023",
        "https://arxiv.org/abs/2311.02945",
    ),
    "falcon": (
        "The RefinedWeb Dataset for Falcon LLM: Outperforming Curated Corpora with Web Data, and Web Data Only",
        "Penedo, Guilherme and others",
        "2023",
        "https://arxiv.org/abs/2306.01116",
    ),
    "baichuan": (
        "Baichuan 2: Open Large-scale Language Models",
        "Yang, Aiyuan and others",
        "2023",
        "https://arxiv.org/abs/2309.10305",
    ),
    "btlm": (
        "BTLM-3B-8K: 7B Parameter Performance in a 3B Parameter Model",
        "Dey, Nolan and others",
        "2023",
        "https://arxiv.org/abs/2309.11568",
    ),
    "jais": (
        "Jais and Jais-chat: Arabic-Centric Foundation and Instruction-Tuned Open Generative Large Language Models",
        "Sengupta, Neha and others",
        "2023",
        "https://arxiv.org/abs/2308.16149",
    ),
}


def bibtex(*names: str) -> str:
    """Return the BibTeX entries of those of `names` that there are, in that order, ALiBi's first."""
    chosen = dict.fromkeys([ALIBI, *(name for name in names if name in PAPERS)])
    return "\n\n".join(_entry(name) for name in chosen)


def _entry(name: str) -> str:
    heading, author, year, address = PAPERS[name]
    fields = {"title": f"{{{heading}}}", "author": author, "year": year, "url": address}
    lines = ",\n".join(f"  {field:6} = {{{value}}}" for field, value in fields.items())
    return f"@misc{{{name}{year},\n{lines}\n}}"


__all__ = ["ALIBI", "PAPERS", "bibtex"]
