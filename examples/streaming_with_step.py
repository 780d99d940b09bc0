"""Text as it comes: `step()` returns the requests that changed, each with all of its output so far."""

from nanovllm import LLM, SamplingParams

with LLM("demo") as llm:
    llm.add_request("Once upon a time", SamplingParams(temperature=0.7, max_tokens=64, seed=1))
    num_printed = 0
    while llm.has_unfinished_requests():
        for output in llm.step():
            text = output.outputs[0].text
            print(text[num_printed:], end="", flush=True)
            num_printed = len(text)
    print()
