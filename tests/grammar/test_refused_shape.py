"""A device that draws by itself has no use for a mask: the request's own field is named."""

import pytest

from tokenry.errors import RequestError
from tokenry.hub import find_model
from tokenry.messages import RequestLimits
from tokenry.params import SamplingParams
from tokenry.text.outputs import OutputProcessor
from tokenry.text.tokenizer import Tokenizer


@pytest.mark.parametrize("field", ["response_format", "guided_regex", "tools"])
def test_a_shape_is_refused_by_the_field_that_asked_for_it(field):
    limits = RequestLimits(unserved=("structured_outputs",))
    front = OutputProcessor(Tokenizer.load(find_model("demo")), max_model_len=64, limits=limits)
    with pytest.raises(RequestError, match=f"^{field} cannot be served") as caught:
        front.add("a", [5], SamplingParams(structured_outputs={"regex": "a", "param": field}))
    assert caught.value.param == field
    assert front.add("b", [5], SamplingParams())
