"""What a saved model says where its family is not there and kromhc_hf is not installed.

`absent.py RESULTS MODEL` writes it to `absent.txt` beside RESULTS.
"""

import json
import sys
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM


if __name__ == "__main__":
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    results = Path(sys.argv[1])
    results.with_name("absent.txt").write_text(said)
    results.write_text(json.dumps({"version": transformers.__version__, "results": {}}))
