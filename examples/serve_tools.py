"""A model that calls a function, gets what it returned, and answers.

nanovllm serve demo --chat-template examples/tools.jinja
"""

import json
import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("NANOVLLM_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
model = client.models.list().data[0].id


def temperature(city: str, unit: str) -> str:
    return f"21 degrees {unit} in {city}"


parameters = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 40}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
tools = [{"type": "function", "function": {"name": "temperature", "parameters": parameters}}]
messages = [{"role": "user", "content": "How warm is it in Paris?"}]

# A large model decides by itself (tool_choice "auto"); "required" works with any: the answer is held to the schema.
asked = {"model": model, "messages": messages, "tools": tools, "temperature": 0, "max_tokens": 200}
message = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices[0].message
messages.append(message)
for call in message.tool_calls:
    arguments = json.loads(call.function.arguments)
    print(f"{call.function.name}({arguments})")
    messages.append({"role": "tool", "tool_call_id": call.id, "content": temperature(**arguments)})
print(client.chat.completions.create(**{**asked, "max_tokens": 24}).choices[0].message.content)
