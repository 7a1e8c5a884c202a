"""Everything that PyPI `openai` can ask of the endpoint, and what it makes of the answers.

Run by `crates/inference/tests/inference/clients.rs`; `scripts/interop-endpoint.sh` installs the client.
Usage: openai_client.py BASE_URL KEY LIMITED_KEY [tools]
LIMITED_KEY may begin one request a minute. `tools` also asks for JSON and for calls, which needs a model that
can write quotation marks.
"""

import asyncio
import sys

import openai
from pydantic import BaseModel, Field

base_url, key, limited_key, *wanted = sys.argv[1:]
client = openai.OpenAI(base_url=base_url + "/v1", api_key=key, max_retries=0)
messages = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Name a city and its country."},
]
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


@check
def models():
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    assert raises(openai.NotFoundError, lambda: client.models.retrieve("other")).code == "model_not_found"


MODEL = client.models.list().data[0].id


@check
def chat():
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=6, temperature=0, seed=1,
        logprobs=True, top_logprobs=2, n=2, stop=["\n\n\n"], user="someone", metadata={"a": "b"},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    first = answer.choices[0]
    assert first.message.role == "assistant" and first.finish_reason in ("stop", "length")
    assert all(len(entry.top_logprobs) == 2 for entry in first.logprobs.content)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


@check
def chat_streamed():
    ask = dict(model=MODEL, messages=messages, max_tokens=6, temperature=0)
    whole = client.chat.completions.create(**ask).choices[0].message.content
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content is None
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens <= 6
    assert all(chunk.usage is None for chunk in chunks[:-1])
    # The client's own accumulator.
    with client.chat.completions.stream(**ask) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "content.delta"]
    assert snapshots[-1] == whole, snapshots


@check
def chat_left():
    """Who breaks off a stream leaves a client that can go on."""
    with client.chat.completions.create(model=MODEL, messages=messages, max_tokens=20, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1).choices


@check
def completions():
    ask = dict(model=MODEL, prompt="Once upon a time", max_tokens=4, temperature=0)
    answer = client.completions.create(**ask, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text.startswith("Once upon a time")
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.token_logprobs[1] <= 0
    assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == len(choice.logprobs.text_offset)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True))
    assert choice.text == "Once upon a time" + streamed
    assert len(client.completions.create(**{**ask, "prompt": ["a", "b"]}, n=2, seed=3).choices) == 4


@check
def responses():
    ask = dict(model=MODEL, instructions="You are brief.", input="Name a city.", max_output_tokens=6, temperature=0)
    answer = client.responses.create(**ask, store=False)
    assert answer.status in ("completed", "incomplete") and answer.output[0].role == "assistant"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.input_tokens_details.cached_tokens >= 0
    with client.responses.stream(**ask) as stream:
        events = list(stream)
    assert events[0].type == "response.created" and events[1].type == "response.in_progress"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == answer.output_text
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert deltas[-1].snapshot == answer.output_text
    again = client.responses.create(
        model=MODEL, max_output_tokens=2,
        input=[{"role": "user", "content": "Hi"}, *answer.output, {"role": "user", "content": "More."}],
    )
    assert again.usage.input_tokens > 0
    error = raises(openai.BadRequestError, lambda: client.responses.create(**ask, previous_response_id="resp_1"))
    assert error.param == "previous_response_id" and error.code == "unsupported_parameter"


@check
def asynchronous():
    async def several():
        async with openai.AsyncOpenAI(base_url=base_url + "/v1", api_key=key, max_retries=0) as several:
            ask = lambda: several.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
            answers = await asyncio.gather(*(ask() for _ in range(8)))
            assert all(answer.choices for answer in answers)
            async with several.responses.stream(model=MODEL, input="Hi", max_output_tokens=2) as stream:
                kinds = [event.type async for event in stream]
            assert kinds[-1] in ("response.completed", "response.incomplete"), kinds

    asyncio.run(several())


@check
def embeddings():
    both = client.embeddings.create(model=MODEL, input=["The Queen", "Alice"])
    assert len(both.data) == 2 and both.usage.prompt_tokens > 2
    for entry in both.data:
        assert abs(sum(value * value for value in entry.embedding) - 1) < 1e-3
    # The client asks for base64 unless told otherwise, and decodes it.
    plain = client.embeddings.create(model=MODEL, input="The Queen", encoding_format="float").data[0].embedding
    assert max(abs(a - b) for a, b in zip(plain, both.data[0].embedding)) < 1e-3


@check
def errors():
    ask = dict(model=MODEL, messages=messages, max_tokens=1)
    chat = lambda **change: client.chat.completions.create(**{**ask, **change})
    error = raises(openai.BadRequestError, lambda: chat(temperature=-1))
    assert error.param == "temperature" and error.type == "invalid_request_error"
    assert raises(openai.BadRequestError, lambda: chat(max_tokens=10**6)).code == "context_length_exceeded"
    assert raises(openai.NotFoundError, lambda: chat(model="gpt-4")).code == "model_not_found"
    assert raises(openai.NotFoundError, lambda: client.files.list()).code == "unknown_url"
    stranger = client.with_options(api_key="slm-of-somebody-else")
    assert raises(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"
    limited = client.with_options(api_key=limited_key)
    limited.chat.completions.create(**ask)
    error = raises(openai.RateLimitError, lambda: limited.chat.completions.create(**ask))
    assert error.code == "rate_limit_exceeded" and int(error.response.headers["retry-after"]) > 0


class Place(BaseModel):
    city: str = Field(max_length=20)
    stars: int = Field(ge=1, le=5)


WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Berlin", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


@check
def parsed():
    if "tools" not in wanted:
        return
    answer = client.chat.completions.parse(
        model=MODEL, messages=messages, response_format=Place, max_completion_tokens=80, temperature=0)
    assert 1 <= answer.choices[0].message.parsed.stars <= 5
    answer = client.responses.parse(
        model=MODEL, input=messages, text_format=Place, max_output_tokens=80, temperature=0)
    assert 1 <= answer.output_parsed.stars <= 5


@check
def tools():
    if "tools" not in wanted:
        return
    question = {"role": "user", "content": "What is the weather in Paris?"}
    ask = dict(
        model=MODEL, messages=[question], tools=[{"type": "function", "function": WEATHER}],
        tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=60,
    )
    answer = client.chat.completions.create(**ask).choices[0]
    [call] = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name == "weather"
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    history = [question, answer.message, result]
    again = client.chat.completions.create(**{**ask, "messages": history, "tool_choice": "none", "max_tokens": 4})
    assert again.choices[0].message.content is not None
    with client.chat.completions.stream(**ask) as stream:
        list(stream)
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert streamed.function.arguments == call.function.arguments

    ask = dict(
        model=MODEL, input=[question], tools=[{"type": "function", **WEATHER}],
        tool_choice={"type": "function", "name": "weather"}, parallel_tool_calls=False, temperature=0,
        max_output_tokens=60,
    )
    with client.responses.stream(**ask) as stream:
        events = list(stream)
        [call] = stream.get_final_response().output
    assert call.type == "function_call" and call.parsed_arguments["city"] in ("Berlin", "Paris")
    assert [event.snapshot for event in events if event.type == "response.function_call_arguments.delta"][-1] == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    again = client.responses.create(
        **{**ask, "input": [question, call.model_dump(exclude_none=True, exclude={"parsed_arguments"}), result]} |
        {"tool_choice": "none", "max_output_tokens": 4})
    assert again.output[0].type == "message"


for function in CHECKS:
    function()
    print("ok", function.__name__)
