"""A conversation with a SMILE checkpoint through transformers, in a terminal.

    python examples/chat.py FOLDER

Each line is a user turn; an empty line starts a new conversation, end of input ends the program.
"""

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import smile_kernels  # noqa: F401  (with it, from_pretrained knows SMILE layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a checkpoint with a chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    turns: list[dict[str, str]] = []
    for line in map(str.strip, sys.stdin):
        if not line:
            turns = []
            continue
        turns.append({"role": "user", "content": line})
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**prompt, max_new_tokens=args.max_new_tokens, do_sample=False)
        answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        turns.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


if __name__ == "__main__":
    main()
