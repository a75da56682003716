"""Write text with a converted folder as somebody does who has torch and transformers, and not this package.

    python examples/generate_without_package.py FOLDER [TOKENS]

Continues a prompt up to TOKENS tokens (prompt included) and prints, as one line of JSON, the training length, the
number of tokens, the class that ran, and the text past the training length. `examples/demo.py` runs this in a new
process.
"""

import json
import sys

sys.modules["alibi_hf"] = None  # from here on `import alibi_hf` raises, even where the package is installed

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

PROMPT = "My fellow citizens, the state of our Union"


def main(folder: str, length: int) -> None:
    """Load `folder` with the code that came with it, and generate `length` tokens with a fixed seed."""
    try:
        import alibi_hf  # noqa: F401
    except ImportError:
        pass
    else:
        sys.exit("alibi_hf can be imported here, so this would not show that the folder works without it")

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # it reads the config, which is code here
    set_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    sampling = {"do_sample": True, "top_p": 0.9, "temperature": 0.8}
    tokens = model.generate(**prompt, **sampling, min_length=length, max_length=length)[0]
    trained = model.config.max_position_embeddings
    result = {
        "trained": trained,
        "tokens": len(tokens),
        "loaded": f"{type(model).__module__}.{type(model).__name__}",
        "text": tokenizer.decode(tokens[trained:], skip_special_tokens=True),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 512)
