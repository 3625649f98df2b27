"""Swap one op in a model: torch runs everything, then Triton runs `rope`, then CUDA runs `linear`."""

import sys

import lab

# A GGUF file or a Hugging Face folder; without one, SmolLM2-135M's shape with random weights.
model = {"model": sys.argv[1]} if sys.argv[1:] else {"model": "smollm2-135m", "weights": "random"}
prompt = [1, 20, 53, 198]  # token ids; or a text, where the model has a tokenizer
answers = []
for overrides in ({}, {"rope": "triton"}, {"linear": "cuda"}):
    llm = lab.load(**model, backend="torch", overrides=overrides, dtype="fp32", trace=True)
    answer = llm.generate([prompt], lab.Sampling(), max_new_tokens=3)[0]
    ran = {row["op"]: row["backend"] for row in answer.kernels if row["op"] in ("rope", "linear")}
    print(f"rope by {ran['rope']:7} linear by {ran['linear']:6} {answer.output_ids}")
    answers.append(answer.output_ids)
assert answers[0] == answers[1] == answers[2]
print("the same tokens")
