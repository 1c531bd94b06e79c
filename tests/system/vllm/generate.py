"""Run by vLLM's Python: generate greedily from prompts of token ids, as the JSON file that is named says, into it.

Where it names a LoRA adapter, once without and once with it.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(Path(sys.argv[1]).read_text())
    began = time.perf_counter()
    engine = LLM(asked["model"], dtype="bfloat16", max_model_len=256, max_num_seqs=8, **asked["options"])
    loaded = time.perf_counter() - began
    sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]

    def generated(adapter: LoRARequest | None = None) -> list[list[int]]:
        outputs = engine.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
        return [list(one.outputs[0].token_ids) for one in outputs]

    told = {"tokens": generated(), "seconds": loaded}
    if asked["adapter"]:
        told["adapted"] = generated(LoRARequest("adapter", 1, asked["adapter"]))
    Path(sys.argv[1]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
