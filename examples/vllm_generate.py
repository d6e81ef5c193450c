"""A SMILE checkpoint in vLLM, offline; `vllm serve FOLDER` serves it over HTTP.

python examples/vllm_generate.py FOLDER          (needs vLLM and this package in one environment)
"""

import argparse

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a checkpoint that `smile-kernels upscale` wrote")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="of weights and activations; auto: float32 becomes 16 bit")
    args = parser.parse_args()
    # vLLM finds the plugin by itself: config.json names the method, and the installed package answers to it.
    engine = LLM(args.folder, tensor_parallel_size=args.tensor_parallel_size, dtype=args.dtype)
    for output in engine.generate([args.prompt], SamplingParams(temperature=0, max_tokens=32)):
        print(output.outputs[0].text)


if __name__ == "__main__":
    main()
