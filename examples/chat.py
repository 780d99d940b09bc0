"""Two turns of a conversation. The second one finds the first in the prefix cache."""

from nanovllm import LLM, SamplingParams

with LLM("demo") as llm:
    params = SamplingParams(temperature=0.0, max_tokens=48)
    messages = [{"role": "user", "content": "What is the capital of Italy?"}]
    for question in (None, "And what is it famous for?"):
        if question is not None:
            messages.append({"role": "user", "content": question})
        (output,) = llm.chat(messages, params, use_tqdm=False)
        answer = output.outputs[0].text
        messages.append({"role": "assistant", "content": answer})
        print(f"> {messages[-2]['content']}\n{answer}\n[{output.num_cached_tokens} prompt tokens were cached]\n")
