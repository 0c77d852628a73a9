"""The offline Python API: a model in this process, prompts in, finished outputs back.

In: prompts or conversations with SamplingParams. Out: `RequestOutput`s in the order of the prompts.
The same engine and the same messages as the server, without its processes: this thread steps the
engine until every request is answered.
"""

from tokenry.llm.inputs import Prompt
from tokenry.llm.offline import LLM, Conversation, MakeProcessor

__all__ = ["LLM", "Conversation", "MakeProcessor", "Prompt"]
