"""A short vLLM script; only its import line is different (it was `from vllm import LLM, SamplingParams`)."""

from nanovllm import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32)

llm = LLM(model="demo")
outputs = llm.generate(prompts, sampling_params)

for output in outputs:
    print(f"Prompt: {output.prompt!r}, generated: {output.outputs[0].text!r}")
