"""OpenAI's client: an answer as it comes, and one in the form of a class.

nanovllm serve demo
"""

import os

from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=os.environ.get("NANOVLLM_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
model = client.models.list().data[0].id

question = [{"role": "user", "content": "What is the capital of Italy?"}]
asked = {"model": model, "messages": question, "temperature": 0, "max_tokens": 200}
for chunk in client.chat.completions.create(**{**asked, "max_tokens": 24}, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()


class City(BaseModel):
    name: str
    country: str
    is_capital: bool


answer = client.chat.completions.parse(**asked, response_format=City)
print(repr(answer.choices[0].message.parsed))
