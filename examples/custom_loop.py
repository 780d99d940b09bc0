"""A serving loop in a few lines: requests arrive while others run, and one is called off."""

from nanovllm import LLM, SamplingParams

ARRIVALS = {  # step -> (request_id, prompt)
    0: ("fox", "The quick brown fox"),
    4: ("sea", "The sea was"),
    8: ("endless", "One, two, three,"),
}
CALL_OFF = 24  # the step at which "endless" is no longer wanted

with LLM("demo") as llm:
    step = 0
    while llm.has_unfinished_requests() or step <= max(ARRIVALS):
        if step in ARRIVALS:
            request_id, prompt = ARRIVALS[step]
            max_tokens = None if request_id == "endless" else 24
            llm.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens), request_id)
        if step == CALL_OFF:
            llm.abort_request("endless")
            print(f"step {step:3}  endless: called off")
        for output in llm.step():
            completion = output.outputs[0]
            if output.finished:
                print(f"step {step:3}  {output.request_id}: {completion.finish_reason}, {completion.text!r}")
        step += 1
    print(f"{step} steps, {llm.get_metrics()}")
