"""Many requests at once, which the server runs in one batch; those whose answers nobody needs any more are left.

nanovllm serve demo
"""

import asyncio
import os

from openai import AsyncOpenAI

url = os.environ.get("NANOVLLM_URL", "http://127.0.0.1:8000") + "/v1"


async def first_words(client: AsyncOpenAI, model: str, subject: str) -> str:
    """Leaving the stream ends the request on the server too."""
    text = ""
    async with await client.completions.create(
        model=model, prompt=f"{subject} is", max_tokens=200, temperature=0, stream=True
    ) as stream:
        async for chunk in stream:
            text += chunk.choices[0].text
            if len(text.split()) > 8:
                break
    return f"{subject} is{text}"


async def main() -> None:
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        model = (await client.models.list()).data[0].id
        subjects = ["The sea", "Bread", "A violin", "The moon", "Chess", "Winter", "Paper", "A good friend"]
        for sentence in await asyncio.gather(*(first_words(client, model, subject) for subject in subjects)):
            print(sentence)


asyncio.run(main())
