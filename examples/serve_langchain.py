"""LangChain's ChatOpenAI: an answer as it comes, and one in the form of a class.

pip install langchain-openai
nanovllm serve demo
"""

import os

from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url = os.environ.get("NANOVLLM_URL", "http://127.0.0.1:8000") + "/v1"
model = ChatOpenAI(base_url=url, api_key="none", model="demo", temperature=0, max_tokens=200)
for chunk in model.stream("What is the capital of Italy?"):
    print(chunk.content, end="", flush=True)
print()


class City(BaseModel):
    """A city and where it is."""

    name: str
    country: str


print(repr(model.with_structured_output(City).invoke("What is the capital of Italy?")))
