"""Anthropic's client: how long a prompt is, and an answer as it comes.

nanovllm serve demo
"""

import os

from anthropic import Anthropic

client = Anthropic(base_url=os.environ.get("NANOVLLM_URL", "http://127.0.0.1:8000"), api_key="none")
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "What is the capital of Italy?"}]

print(client.messages.count_tokens(model=model, messages=messages).input_tokens, "tokens are asked:")
with client.messages.stream(model=model, messages=messages, max_tokens=24) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print(f"\n[{stream.get_final_message().stop_reason}]")
